"""Scripts of launch/ as tests run them: dry runs, and programs that stand in for those of a cloud."""

from __future__ import annotations

import pathlib
import shlex
import subprocess

ROOT = pathlib.Path(__file__).parents[2]
POD = ("--name=pod", "--project=my-project", "--zone=us-west4-a")
CLUSTER = ("--cluster=lab", "--project=my-project", "--zone=us-west4-a")
CODE = ("--repo=https://example.org/blip.git", f"--revision={'a' * 40}")
RUN = ["blip-jax", "train", "--config=configs/photos.py", "--workdir=/shared/a run/it's mine", "--config.optim.lr=2e-4"]


def shell(script, *args, path="", **env):
    """A script of launch/ run in /, with programs of the folder `path` before the system's."""
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *args],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": f"{path}:/usr/bin:/bin" if path else "/usr/bin:/bin", "HOME": "/nonexistent"} | env,
    )


def dry_run(script, command, *args):
    """The words of every command that a dry run prints, as a shell would read them."""
    done = shell(script, command, "--dry-run", *args)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def on_the_worker(words):
    """The words of what an ssh command, or a workload, runs there."""
    return shlex.split(next(w for w in words if w.startswith("--command=")).removeprefix("--command="))


def program(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)
    return folder
