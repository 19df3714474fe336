"""Processes of the command line that tests stop and kill."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

# imports once, then forks one process per line of standard input, the log file and the arguments of blip-jax as JSON;
# answers with its id, and with its exit status
SERVER = """
import gc, json, os, sys
from blip_jax.cli import main
import {module}
if "STORAGE_EMULATOR_HOST" in os.environ:
    import gcsfs
gc.freeze(), gc.set_threshold(50_000, 20, 50)  # as conftest.py
for line in sys.stdin:
    log, *argv = json.loads(line)
    pid = os.fork()
    if pid == 0:
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2), os.close(0)
        try:
            os._exit(main.main(argv))
        finally:
            os._exit(99)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Commands:
    """Processes of blip-jax, one at a time, forked from one that has imported what a command needs, `module`."""

    def __init__(self, module: str, folder: pathlib.Path):
        self.log = folder / "log.txt"
        one_device = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        env = os.environ | {"XLA_FLAGS": one_device, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER.format(module=module)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *argv: str) -> int:
        """Begins a command; the id of its process."""
        self.log.unlink(missing_ok=True)
        self.server.stdin.write(json.dumps([str(self.log), *argv]) + "\n")
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


class Trainer(Commands):
    """Training processes of one config."""

    def __init__(self, config: pathlib.Path, folder: pathlib.Path):
        super().__init__("blip_jax.train.loop", folder)
        self._config = config

    def start(self, workdir) -> int:
        return self.run("train", f"--config={self._config}", f"--workdir={workdir}")
