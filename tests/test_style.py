"""The code is as ruff, with the settings of pyproject.toml, has it: no finding, formatted; and every test is found."""

import collections
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("check, remedy", [(["check"], "ruff check --fix"), (["format", "--check"], "ruff format")])
def test_ruff_has_nothing_to_say(check, remedy):
    command = [sys.executable, "-m", "ruff", *check, "--no-cache", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = f"run `{remedy}` and mend by hand what it leaves:\n{done.stdout[-4000:]}{done.stderr[-1000:]}"
    assert done.returncode == 0, said


def test_no_two_test_files_have_one_name():
    # pytest imports them by name alone, so that of two in different folders it collects the first
    files = collections.Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, n in files.items() if n > 1] == []
