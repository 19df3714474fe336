"""The code is as ruff, with the settings of pyproject.toml, has it: no finding, and formatted."""

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
