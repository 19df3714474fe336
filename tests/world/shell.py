"""A shell in which `blip-jax` and `python` begin at once, for tests of many commands.

Each is a process of its own, forked from one that has everything imported and computed nothing.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps({{"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "cwd": os.getcwd()}})
    socket.send_fds(server, [asked.encode()], [0, 1, 2])
    answer = server.recv(1)
sys.exit(answer[0] if answer else 70)
"""


class Shell:
    """bash in the folder `place`; `beside` holds what it needs, outside of that folder."""

    def __init__(self, place: pathlib.Path, beside: pathlib.Path, env: dict[str, str]):
        self._folder = tempfile.TemporaryDirectory()  # a socket's path must be short
        self.place, commands, address = place, beside / "bin", os.path.join(self._folder.name, "socket")
        commands.mkdir()
        for name in ("blip-jax", "python"):
            (commands / name).write_text(CLIENT.format(python=sys.executable, address=address))
            (commands / name).chmod(0o755)
        paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        self.env = os.environ | env | {"PYTHONPATH": paths, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
        argv = [sys.executable, "-W", "ignore", __file__, address]
        self._server = subprocess.Popen(argv, cwd=place, env=self.env)
        while not os.path.exists(address):
            assert self._server.poll() is None, "the server did not begin"
            time.sleep(0.01)

    def run(self, script: str) -> subprocess.CompletedProcess:
        """What a script says, standard error included, and its status; it ends at the first command that fails."""
        argv = ["bash", "-euo", "pipefail", "-c", script]
        kept = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        return subprocess.run(argv, cwd=self.place, env=self.env, text=True, **kept)

    def close(self) -> None:
        self._server.terminate()
        self._server.wait(60)
        self._folder.cleanup()


def serve(address: str) -> None:
    """Forks a process for each {"argv", "cwd"} that comes with three open files, and answers with its status."""
    # imported for the processes that are forked, which then need not
    import blip_jax.capfilt.run  # noqa: F401
    import blip_jax.cli.main  # noqa: F401
    import blip_jax.convert.write  # noqa: F401
    import blip_jax.inference.pretrained  # noqa: F401
    import blip_jax.train.evaluation  # noqa: F401
    import blip_jax.train.loop  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    gc.freeze(), gc.set_threshold(50_000, 20, 50)  # as conftest.py
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        while True:
            client, _ = listening.accept()
            text, files, *_ = socket.recv_fds(client, 1 << 20, 3)
            if os.fork() == 0:
                listening.close()
                _work(client, json.loads(text), files)
            client.close()
            for file in files:
                os.close(file)


def _work(client: socket.socket, asked: dict, files: list[int]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
    status = 1
    try:
        os.chdir(asked["cwd"])
        status = _command(asked["argv"]) or 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        client.sendall(bytes([status]))
        os._exit(status)


def _command(argv: list[str]) -> int | None:
    """`blip-jax ...`, `python -c CODE`, `python -` or `python FILE`."""
    sys.argv = argv
    if argv[0] == "blip-jax":
        from blip_jax.cli import main

        return main.main(argv[1:])
    code = argv[2] if argv[1] == "-c" else sys.stdin.read() if argv[1] == "-" else pathlib.Path(argv[1]).read_text()
    exec(compile(code, argv[1], "exec"), {"__name__": "__main__"})
    return None


if __name__ == "__main__":
    serve(sys.argv[1])
