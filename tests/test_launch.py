"""launch/*.sh: they install once per version of setup.py, work in any folder, and pass their arguments on."""
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# stands in for python: notes its arguments and the folder, and makes the .venv when asked to
FAKE = """#!/usr/bin/env bash
echo "$PWD: $*" >> "{log}"
if [ "$2" = venv ]; then mkdir -p "$4/bin" && cp "$0" "$4/bin/python"; fi
if [ "$1" = --version ]; then echo "Python 3.11.0"; fi
"""


@pytest.fixture
def project(tmp_path):
    """A clone in a folder whose name has a space, with a fake python on PATH."""
    clone = tmp_path / "a folder" / "clone"
    shutil.copytree(ROOT / "launch", clone / "launch")
    shutil.copytree(ROOT / ".ci", clone / ".ci")
    (clone / "setup.py").write_text("# one")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(FAKE.format(log=tmp_path / "log"))
    (tmp_path / "bin" / "python3").chmod(0o755)
    return clone


def launch(project, script, *args):
    """(what the script printed, the calls of python it made)."""
    log = project.parent.parent / "log"
    log.unlink(missing_ok=True)
    done = subprocess.run(["bash", str(project / script), *args], cwd="/", capture_output=True, text=True,
                          env={"PATH": f"{project.parent.parent / 'bin'}:/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    return done.stdout, log.read_text().splitlines()


def installs(calls):
    return [c.split(" -e ")[1] for c in calls if "pip install" in c]


def test_installs_once_per_version_and_extra(project):
    out, calls = launch(project, "launch/demo.sh", "--config.train.steps=3")
    assert installs(calls) == ["."] and "installing the project" in out
    assert calls[-1] == f"{project}: -m blip_jax demo --workdir=runs/demo --config.train.steps=3"
    out, calls = launch(project, "launch/demo.sh")
    assert installs(calls) == [] and "setup.py has not changed" in out and "venv" not in " ".join(calls)

    _, calls = launch(project, "launch/test.sh", "-k", "a and b")
    assert installs(calls) == [".[test]"] and calls[-1] == f"{project}: -m pytest -q -rs -n 2 --dist worksteal -k a and b"
    assert installs(launch(project, "launch/test.sh")[1]) == []

    (project / "setup.py").write_text("# two")
    assert installs(launch(project, "launch/test.sh")[1]) == [".[test]"]


def test_the_whole_check_installs_torch_and_transformers_and_the_users_tests_do_not(project):
    _, calls = launch(project, ".ci/run", "-x")
    assert installs(calls) == [".[test,peers] torch==2.13.0 transformers==5.23.0", ".[test]"]
    assert calls[-1] == f"{project}: -m pytest -q -rs -n 2 --dist worksteal -x"
    assert installs(launch(project, ".ci/run")[1]) == []
    script = project / ".ci" / "run"
    script.write_text(script.read_text().replace("torch==2.13.0", "torch==2.14.0"))  # another pin is another install
    assert installs(launch(project, ".ci/run")[1]) == [".[test,peers] torch==2.14.0 transformers==5.23.0"]


def test_an_old_python_is_an_error_that_says_so(project):
    (project.parent.parent / "bin" / "python3").write_text("#!/bin/sh\nexit 1\n")
    for name in ("python3.13", "python3.12", "python3.11", "python"):
        shutil.copy(project.parent.parent / "bin" / "python3", project.parent.parent / "bin" / name)
    done = subprocess.run(["bash", str(project / "launch/demo.sh")], capture_output=True, text=True,
                          env={"PATH": f"{project.parent.parent / 'bin'}:/usr/bin:/bin"})
    assert done.returncode != 0 and "Python 3.11 or newer" in done.stderr
