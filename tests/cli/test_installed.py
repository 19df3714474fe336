"""What a wheel brings, without the checkout that it was made from."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(folder of the unpacked wheel, a folder within a repository of somebody else's)"""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a wheel is built in its checkout, which would leave a build/ there
    kept = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "blip_jax", "configs"]
    for name in subprocess.run(kept, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel", "-d", folder], cwd=source, check=True)
    [wheel] = folder.glob("*.whl")
    theirs = folder / "theirs"
    zipfile.ZipFile(wheel).extractall(theirs / "lib")
    subprocess.run(["git", "init", "-q", theirs], check=True)
    commit = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(commit, cwd=theirs, check=True)
    return theirs / "lib", theirs


def run(installed, *args) -> subprocess.CompletedProcess:
    lib, folder = installed
    env = os.environ | {"PYTHONPATH": str(lib)}
    command = [sys.executable, "-m", "blip_jax", *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_wheel_has_the_configs_and_finds_them(installed):
    lib, _ = installed
    names = lambda folder: sorted(p.name for p in folder.glob("*.py"))
    assert names(lib / "blip_jax/configs") == names(ROOT / "configs")
    assert (lib / "blip_jax/py.typed").exists()
    done = run(installed, "train", "--config=configs/pretrain.py:huge", "--workdir=x")
    assert done.returncode == 2 and "configs/pretrain.py is not here: the one of the package" in done.stderr
    assert "has no run 'huge'" in done.stderr.splitlines()[-1]


def test_it_says_its_own_version_and_not_the_revision_of_the_repository_it_lies_in(installed):
    done = run(installed, "--version")
    assert done.returncode == 0 and ", revision none" in done.stdout
