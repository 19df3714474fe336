"""Processes that meet over loopback, for the tests.

One server imports everything once and forks the processes of a run from itself.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))
from local_processes import environment, free_port  # noqa: E402


class Pod:
    """n processes of one run, of some fake devices each; `call` names a function of this file and its arguments."""

    def __init__(
        self,
        server: Server,
        folder: pathlib.Path,
        n: int,
        devices: int,
        call: list,
        started: int | None = None,
        **env: str,
    ):
        self._server, port = server, free_port()
        self.logs = [folder / f"log-{k}.txt" for k in range(n)]
        self.pids = []
        env = {"JAX_ENABLE_COMPILATION_CACHE": "true"} | env  # process 0 compiles for all, see `serve`
        for k in range(n if started is None else started):
            self.logs[k].write_text("")
            own = {
                name: value
                for name, value in environment(k, n, port, devices).items()
                if name.startswith(("BLIP", "XLA", "JAX"))
            }
            self.pids.append(server.ask({"log": str(self.logs[k]), "env": own | env, "call": call}))

    def text(self, k: int) -> str:
        return self.logs[k].read_text()

    def wait_for(self, text: str, k: int = 0, seconds: float = 240) -> None:
        """Until process k has written `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.text(k):
            assert time.monotonic() < deadline and "rror" not in self.text(k), f"no {text!r} in:\n{self.text(k)}"
            time.sleep(0.01)

    def kill(self, k: int, number=signal.SIGKILL) -> None:
        os.kill(self.pids[k], number)

    def end(self, k: int) -> int:
        """Exit status of one; of a signal negative."""
        return self._server.ask({"wait": self.pids[k]})

    def ends(self) -> list[int]:
        """Exit statuses, by number; of a signal negative."""
        return [self.end(k) for k in range(len(self.pids))]


class Server:
    """The process from which all others are forked, with everything imported and nothing computed."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: dict) -> int:
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(60) == 0


def serve() -> None:
    """Obeys lines, each a JSON object.

    {"log", "env", "call"} forks a process and answers with its id, {"wait": id} answers with its exit status.

    Of a pod process 0 alone compiles; the others get its programs from it, or find them in the compile cache where
    process 0 does. JAX has this for other platforms and takes it for granted that all processes give a program the same
    name; on CPUs a name holds what each process thinks of the devices, so only their kinds are let in.
    """
    import jax
    from jax._src import cache_key

    import blip_jax.capfilt.run  # noqa: F401
    import blip_jax.parallel.processes  # noqa: F401
    import blip_jax.train.loop  # noqa: F401

    cache_key._hash_accelerator_config = cache_key._hash_devices
    jax.config.update("jax_share_binary_between_hosts", True)
    gc.freeze(), gc.set_threshold(50_000, 20, 50)  # as conftest.py
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            file = os.open(asked["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2), os.close(0)
            os.environ.update(asked["env"])
            # jax, imported before the fork, has read the server's
            if asked["env"].get("JAX_ENABLE_COMPILATION_CACHE") == "false":
                jax.config.update("jax_enable_compilation_cache", False)
            status = 99
            try:
                name, *rest = asked["call"]
                status = CALLS[name](*rest)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)


def command(*argv: str) -> int:
    """A blip-jax command."""
    from blip_jax.cli import main

    return main.main(list(argv))


def train_and_capfilt(config: str, workdir: str, capfilt_config: str, out: str) -> int:
    """A training run, then an evaluation of its last checkpoint and a CapFilt run by the same processes."""
    from blip_jax.capfilt.run import run
    from blip_jax.parallel import processes
    from blip_jax.train import evaluation, loop

    with processes.start():
        loop.fit(_config(config), workdir)
        evaluation.evaluate(_config(config), workdir)
        run(_config(capfilt_config), out)
    return 0


def evaluate_all(train: list[str], cases: list[list[str]]) -> int:
    """A training run, (config, workdir), then evaluations, (config, workdir, checkpoint) each.

    Captions with approximate tokens: Java takes some 13 s to start.
    """
    from blip_jax.parallel import processes
    from blip_jax.tasks import caption
    from blip_jax.train import evaluation, loop

    caption.evaluate = caption.curve
    with processes.start():
        loop.fit(_config(train[0]), train[1])
        for config, workdir, origin in cases:
            evaluation.evaluate(_config(config), workdir, origin)
    return 0


def stay(beat: float = 2.5, still: float = 25.0) -> int:
    """Meets the others, says so, and waits for ever; gives a sign of life every `beat` seconds, and misses it after
    `still`."""
    from blip_jax.parallel import peers, processes

    peers.BEAT, peers.STILL, peers.LINGER = beat, still, min(still, peers.LINGER)
    with processes.start(), processes.remedy(lambda: "take another"):
        print(f"met {processes.gather(os.getpid())}", flush=True)
        while True:
            time.sleep(0.1)


def stop_one() -> int:
    """Process 1 stops as after a signal; the others stay."""
    from blip_jax.parallel import peers, processes

    peers.GRACE = 0.5
    with processes.start():
        if os.environ["BLIP_JAX_PROCESS"] == "1":
            processes.stop()
        while True:
            time.sleep(0.1)


def disagree(config: str, shared: str, private: str) -> int:
    """Process 1 differs from the others in one thing after the other; each prints what it is told of each."""
    from blip_jax.parallel import peers, processes

    processes.VISIBLE, peers.GRACE = 0.5, 1.0
    me, cfg = int(os.environ["BLIP_JAX_PROCESS"]), _config(config)
    other = _config(config)
    other.optim.lr, other.train.batch = 0.5, 48
    revision = processes.revision
    cases = {
        "the same": lambda: processes.agree(cfg, shared, records={"web": 3}),
        "config": lambda: processes.agree(other if me == 1 else cfg, shared),
        "vocabulary": lambda: processes.agree(cfg, shared, vocabulary=me == 1),
        "folder": lambda: processes.agree(cfg, private if me == 1 else shared),
    }
    clock = time.time
    if me == 1:
        time.time = lambda: clock() + 30
    with processes.start():
        for name, case in cases.items():
            print(f"{name}: {_said(case)}", flush=True)
        if me == 1:
            processes.revision = lambda: "0123abc"
        print(f"revision: {_said(cases['the same'])}", flush=True)
        processes.revision = revision
        if me == 1:
            raise ValueError("a broken file\nin two lines")
        while True:
            time.sleep(0.1)


def _said(case) -> str:
    try:
        case()
    except ValueError as e:
        return str(e)
    return "agreed"


def _config(path: str):
    scope: dict = {}
    exec(pathlib.Path(path).read_text(encoding="utf-8"), scope)
    return scope["get_config"]().unlock()


CALLS = {f.__name__: f for f in (command, train_and_capfilt, evaluate_all, stay, stop_one, disagree)}

if __name__ == "__main__":
    serve()
