#!/usr/bin/env python3
"""Runs a command as several processes of one run on this machine, over loopback.

For tests, and to debug a pod at a desk.

    python launch/local_processes.py -n 2 --devices 4 -- blip-jax train --config=configs/x.py --workdir=DIR

Each process is told its place in BLIP_JAX_COORDINATOR, BLIP_JAX_PROCESSES and BLIP_JAX_PROCESS; with --devices it sees
that many fake CPU devices, else what the machine has. Its lines are printed behind its number. SIGTERM and SIGINT are
passed on to all. When one ends badly, the others have a minute to notice by themselves, then they are killed.

Exit status: the worst. A status of its own (1, 2, ...) is worse than death by a signal (128 + its number), that than 75
(stopped, run again), that than 0. 124: --timeout is over. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

AGAIN, OVER = 75, 124
PATIENCE = 60.0  # seconds for the others to end when one has ended badly


def main(argv: list[str]) -> int:
    """Parses the command line, runs the processes, returns the exit status."""
    parser = argparse.ArgumentParser(usage="%(prog)s -n N [--devices D] [--timeout S] -- COMMAND ...")
    parser.add_argument("-n", type=int, default=2, help="processes (default 2)")
    parser.add_argument(
        "--devices", type=int, default=0, help="fake CPU devices of each process; 0: what the machine has"
    )
    parser.add_argument("--timeout", type=float, default=0, help="seconds after which all are killed; 0: none")
    parser.add_argument("command", nargs="+", help="what each process runs, after --")
    given = parser.parse_args(argv)
    if given.n < 1 or given.devices < 0 or given.timeout < 0:
        parser.error(
            f"-n {given.n}, --devices {given.devices}, --timeout {given.timeout}: numbers above 0 were expected"
        )
    return Processes(resolved(given.command), given.n, given.devices).run(given.timeout)


def resolved(command: list[str]) -> list[str]:
    """`blip-jax` becomes the one of this checkout where none is on PATH."""
    if command[0] != "blip-jax" or shutil.which("blip-jax"):
        return command
    own = pathlib.Path(__file__).resolve().parent.parent / ".venv" / "bin" / "python"
    return [str(own) if own.exists() else sys.executable, "-m", "blip_jax", *command[1:]]


def environment(process: int, processes: int, port: int, devices: int) -> dict[str, str]:
    """The environment of one of the processes."""
    env = os.environ | {
        "BLIP_JAX_COORDINATOR": f"127.0.0.1:{port}",
        "BLIP_JAX_PROCESSES": str(processes),
        "BLIP_JAX_PROCESS": str(process),
        "PYTHONUNBUFFERED": "1",
    }
    if devices:
        others = re.sub(r"--xla_force_host_platform_device_count=\S*", "", env.get("XLA_FLAGS", ""))
        env |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{others} --xla_force_host_platform_device_count={devices}".strip(),
        }
    # only process 0 would find its CPU programs there, and wait 30 s at most for those that compile
    if devices and processes > 1:
        env["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    return env


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def worst(statuses: list[int]) -> int:
    """One exit status for all, of Popen's (negative: a signal)."""

    def rank(status: int) -> int:
        return 0 if status == 0 else 1 if status == AGAIN else 2 if status < 0 else 3

    status = max(statuses, key=rank)
    return 128 - status if status < 0 else status


class Processes:
    """The processes of one run.

    Each is the head of a process group of its own, so that Ctrl-C reaches it through here only.
    """

    def __init__(self, command: list[str], n: int, devices: int):
        port = free_port()
        self._all = [
            subprocess.Popen(
                command,
                env=environment(k, n, port, devices),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for k in range(n)
        ]
        self._readers = [threading.Thread(target=self._pass_on, args=(k,), daemon=True) for k in range(n)]

    def run(self, timeout: float) -> int:
        """Waits for the end of all; the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self._signal(number))
        for reader in self._readers:
            reader.start()
        deadline, late, over = time.monotonic() + timeout if timeout else None, None, False
        while any(p.poll() is None for p in self._all):
            now, bad = time.monotonic(), [k for k, p in enumerate(self._all) if p.poll() not in (None, 0)]
            if bad and late is None:
                late = now + PATIENCE
            if deadline and now > deadline or late and now > late:
                over = bool(deadline and now > deadline)
                self._say(
                    f"{f'{timeout:g} s are over' if over else f'process {bad[0]} ended {PATIENCE:g} s ago'}: killing "
                    "the others"
                )
                self._signal(signal.SIGKILL)
                break
            time.sleep(0.05)
        statuses = [p.wait() for p in self._all]
        for reader in self._readers:
            reader.join(5)
        for k, status in enumerate(statuses):
            if status:
                self._say(
                    f"process {k} "
                    + (f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}")
                )
        return OVER if over else worst(statuses)

    def _signal(self, number: int) -> None:
        for process in self._all:
            if process.poll() is None:
                process.send_signal(number)

    def _pass_on(self, k: int) -> None:
        for line in self._all[k].stdout:
            sys.stdout.buffer.write(f"[{k}] ".encode() + line.rstrip(b"\n") + b"\n")
            sys.stdout.buffer.flush()

    def _say(self, text: str) -> None:
        print(f"local_processes: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
