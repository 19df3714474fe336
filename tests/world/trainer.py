"""Training processes that tests stop and kill."""

import os
import pathlib
import signal
import subprocess
import sys
import time

# imports once, then forks one training process per line of standard input: "<workdir> <log file>"; answers with its id
SERVER = """
import gc, os, sys
from blip_jax.cli import main
from blip_jax.train import loop
gc.freeze(), gc.set_threshold(50_000, 20, 50)  # as conftest.py
for line in sys.stdin:
    workdir, log = line.split()
    pid = os.fork()
    if pid == 0:
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2), os.close(0)
        try:
            os._exit(main.main(["train", "--config={config}", "--workdir=" + workdir]))
        finally:
            os._exit(99)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Trainer:
    """Training processes, forked from one that has imported everything."""

    def __init__(self, config: pathlib.Path, folder: pathlib.Path):
        self.log = folder / "log.txt"
        one_device = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        env = os.environ | {"XLA_FLAGS": one_device, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER.format(config=config)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, workdir) -> int:
        self.log.unlink(missing_ok=True)
        self.server.stdin.write(f"{workdir} {self.log}\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait_for(self, text: str, times: int = 1) -> bool:
        """Until the log holds `text` so often, or "done at step" or an error: whether it does."""
        for _ in range(12000):
            content = self.log.read_text() if self.log.exists() else ""
            if content.count(text) >= times:
                return True
            if "done at step" in content or "rror" in content:
                return False
            time.sleep(0.01)
        raise AssertionError(f"no {text!r} in:\n{content}")

    def end(self) -> int:
        """Exit status of the process that was started last."""
        return int(self.server.stdout.readline())

    def kill(self, pid: int) -> int:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it had ended by itself
            pass
        return self.end()

    def close(self):
        self.server.stdin.close()
        assert self.server.wait(60) == 0
