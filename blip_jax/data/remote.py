"""Files of a source that lie on a bucket.

Lists are copied here whole before they are read, into a folder that goes with the process. Tar shards are read by
ranges, or copied into the folder that the source's `cache` names, where the next start finds them. A copy lies in
FOLDER/BUCKET/... under the name that it has there, so that keys, which tell where a file lies below the folder that all
files of a source share, are those of the bucket.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import uuid
from collections.abc import Sequence

from tqdm import tqdm

from blip_jax import buckets
from blip_jax.data import temporary

THREADS = 8  # files that are copied at once
WINDOW = 1 << 22  # bytes asked for at a time, where a file is read from its beginning to its end
_ORIGINS: dict[str, str] = {}  # local copy -> what it is a copy of


def copies(files: Sequence[str], cache: str, what: str) -> list[str]:
    """Local copies of files on a bucket; those that are there already are not copied again.

    cache: the folder they go to; "": one that is removed when the process ends. what: whose they are, for the progress
    bar. OSError: one cannot be read, or the folder not be written.
    """
    root = pathlib.Path(cache or temporary.own_folder())
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(tqdm(pool.map(lambda file: _copy(file, root), files), f"copy {what}", len(files), delay=5))


def _copy(file: str, root: pathlib.Path) -> str:
    """The copy of one file below `root`; of the same size and time it counts as the same file."""
    size, changed = buckets.stamp(file)
    copy = root / file.removeprefix(buckets.SCHEME)
    _ORIGINS[str(copy)] = file
    try:
        there = os.stat(copy)
        if (there.st_size, there.st_mtime_ns) == (size, changed):
            return str(copy)
    except FileNotFoundError:
        pass
    copy.parent.mkdir(parents=True, exist_ok=True)
    beside = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}")
    try:
        buckets.copy_here(file, beside)
        os.utime(beside, ns=(changed, changed))
        beside.replace(copy)
    finally:
        beside.unlink(missing_ok=True)
    return str(copy)


def origin(path: str) -> str:
    """What a local copy is a copy of; any other path as it is."""
    return _ORIGINS.get(path, path)


class Ranges:
    """A file on a bucket, read from its beginning on by large ranges. size: bytes."""

    def __init__(self, path: str):
        self._path, self._window, self._at = path, b"", 0
        self.size = buckets.size(path)

    def read(self, size: int, at: int) -> bytes:
        """`size` bytes from byte `at` on, fewer at the file's end."""
        size = min(size, self.size - at)
        if size <= 0:
            return b""
        begin = at - self._at
        if begin < 0 or begin + size > len(self._window):
            self._window, self._at, begin = buckets.read_at(self._path, at, max(size, WINDOW)), at, 0
        return self._window[begin : begin + size]

    def written(self, at: int) -> int:
        """The first byte from `at` on that may be other than zero, as far as the file system knows: here `at`."""
        return at

    def close(self) -> None:
        self._window = b""
