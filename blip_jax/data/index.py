"""Indexes of large files: made once, in parallel, and kept, so that the next start reads them in no time.

An index is a few arrays and some notes about one file. A module makes it, by these names:

    VERSION   int; another one makes every index anew
    LAYOUT    {name: dtype} of the arrays
    build     (path, **settings) -> Index. ValueError: the file is not of the kind
    sound     (Index, size of the file) -> bool: nothing in the arrays points out of the file or out of each other
    probe     Index -> byte of the file at which its last record begins, or -1

It is kept in the folder .blip_jax_index beside the file, also on a bucket, or where that cannot be written in
$XDG_CACHE_HOME/blip_jax (~/.cache/blip_jax); in $BLIP_JAX_CACHE alone, where that is set. One counts only if it was
made of a file of the same size and modification time, by the same version and settings; if its checksum is right and
its arrays are sound; if what stands at the last record's place is what stood there; and if it belongs to this user or
to the owner of the file. Anything else is made anew.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib
import json
import logging
import os
import pathlib
import stat
import subprocess
import sys
import uuid
import zlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from blip_jax import buckets
from blip_jax.data.source import read_at

log = logging.getLogger(__name__)

FOLDER = ".blip_jax_index"
MAGIC = b"blip_jax index 1\n"
DIGEST = 16  # bytes
HEADER = 1 << 20  # bytes that the header of an index has at the most
PROBED = 512  # bytes compared at the last record
THREADS = 8  # that read files at once in a process: on network file systems most of the time is waiting
SHARE = 16  # files for which another process is worth its start


class Index(NamedTuple):
    """What is known of one file: arrays as the module's LAYOUT says, and notes that JSON can hold."""

    arrays: dict[str, np.ndarray]
    notes: dict


def indexes(module: ModuleType, paths: Sequence[str], settings: dict, what: str) -> list[Index]:
    """The indexes of `paths`, kept ones or new ones. ValueError: a file is not of the kind, or cannot be read.

    what: whose they are, for the progress bar and errors.
    """
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(paths, pool.map(lambda path: _load(module, path, settings), paths)))
        missing = [path for path in found if found[path] is None]
        if not missing:
            return [found[path] for path in paths]

        # several processes that begin at once begin at different files, and take over what another has made
        first = os.getpid() % len(missing)
        missing = missing[first:] + missing[:first]
        with tqdm(total=len(missing), desc=f"index {what}", unit="file", delay=5) as bar:
            workers = min(len(os.sched_getaffinity(0)), len(missing) // SHARE)
            if workers > 1:
                _in_processes(module, missing, settings, workers, bar)
            try:
                for path, index in zip(missing, pool.map(lambda path: _made(module, path, settings), missing)):
                    found[path] = index
                    bar.update(bar.n < bar.total)
            except OSError as e:
                raise ValueError(f"data source {what!r}: {e.filename or 'a file'} cannot be read: {e}") from e
            except ValueError as e:
                raise ValueError(f"data source {what!r}: {e}") from e
    return [found[path] for path in paths]


def _made(module: ModuleType, path: str, settings: dict) -> Index:
    """The index of a file, kept or new; a new one is kept, if that is possible."""
    if (index := _load(module, path, settings)) is not None:
        return index
    before = _stamp(path)
    index = module.build(path, **settings)
    if _stamp(path) != before:
        log.warning("%s changed while its index was made: what is read of it may be broken", path)
    else:
        _save(module, path, settings, index)
    return index


def _in_processes(module: ModuleType, paths: list[str], settings: dict, workers: int, bar: tqdm) -> None:
    """Has `workers` processes make and keep the indexes. What they could not do is left to the caller."""
    root = pathlib.Path(__file__).resolve().parents[2]  # where this package is; the current folder may hold anything
    command = [sys.executable, "-m", __name__, module.__name__, json.dumps(settings)]
    started: list[subprocess.Popen] = []

    def follow(number: int) -> None:
        worker = started[number]
        with worker.stdin:
            worker.stdin.write(json.dumps([_absolute(path) for path in paths[number::workers]]))
        for _ in worker.stdout:
            bar.update()

    try:
        for _ in range(workers):
            started.append(subprocess.Popen(command, cwd=root, stdin=-1, stdout=-1, stderr=-3, text=True))
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            list(pool.map(follow, range(workers)))
    except OSError as e:
        log.info("indexes are made in one process: %s", e)
    finally:
        for worker in started:
            worker.kill()
            worker.wait()


def _absolute(path: str) -> str:
    return path if buckets.is_bucket(path) else os.path.abspath(path)


def _stamp(path: str) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds."""
    if buckets.is_bucket(path):
        return buckets.stamp(path)
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _places(module: ModuleType, path: str, settings: dict) -> Iterator[pathlib.Path | epath.Path]:
    """Where the index of a file may lie, the first choice first."""
    kind = json.dumps([module.__name__, module.VERSION, settings], sort_keys=True)

    def name(file: str) -> str:
        return hashlib.blake2b(f"{kind}\0{file}".encode(errors="surrogateescape"), digest_size=DIGEST).hexdigest()

    on_bucket, own = buckets.is_bucket(path), os.environ.get("BLIP_JAX_CACHE")
    whole = path if on_bucket else os.path.realpath(path)
    if not own:
        beside = buckets.of(path) if on_bucket else pathlib.Path(path)
        yield beside.parent / FOLDER / name(beside.name)
    root = pathlib.Path(own) if own else pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "blip_jax"
    try:
        yield root.expanduser() / "index" / name(whole)
    except RuntimeError:  # there is no home
        return


def _save(module: ModuleType, path: str, settings: dict, index: Index) -> None:
    size, modified = _stamp(path)
    begins = module.probe(index)
    header = json.dumps(
        {
            "size": size,
            "modified": modified,
            "lengths": {name: len(index.arrays[name]) for name in module.LAYOUT},
            "probe": [begins, zlib.crc32(read_at(path, begins, PROBED)) if begins >= 0 else 0],
            "notes": index.notes,
        }
    ).encode()
    arrays = [np.ascontiguousarray(index.arrays[name], dtype).tobytes() for name, dtype in module.LAYOUT.items()]
    content = b"".join([len(header).to_bytes(8, "little"), header, *arrays])
    content = MAGIC + hashlib.blake2b(content, digest_size=DIGEST).digest() + content
    for place in _places(module, path, settings):
        if buckets.is_bucket(place):
            try:
                place.write_bytes(content)
                return
            except Exception as e:  # who may read a bucket may not always write there; gcsfs has types of its own
                log.info("the index of %s is not kept beside it: %s", path, e)
                continue
        beside = place.with_name(f"{place.name}.{uuid.uuid4().hex}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content)
            beside.replace(place)
            return
        except OSError:
            with contextlib.suppress(OSError):  # what a full disk left of it
                beside.unlink()
    log.info("the index of %s cannot be kept: no folder for it can be written", path)


def _load(module: ModuleType, path: str, settings: dict) -> Index | None:
    """The kept index of a file, or None."""
    for place in _places(module, path, settings):
        try:
            index = _read(module, path, place)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            log.info("the index of %s in %s is not used, but made anew: %s", path, place, e)
            continue
        if index is not None:
            return index
    return None


def _read(module: ModuleType, path: str, place: pathlib.Path) -> Index | None:
    """The index in `place`; None: it is of another state of the file. ValueError and others: it is not sound."""
    size, modified = _stamp(path)
    content = _content(path, place, 8 * size + HEADER)  # no array takes 8 bytes for one of the file's
    at = len(MAGIC) + DIGEST
    if content[: len(MAGIC)] != MAGIC:
        raise ValueError("no index")
    body = memoryview(content)[at:]
    if hashlib.blake2b(body, digest_size=DIGEST).digest() != content[len(MAGIC) : at]:
        raise ValueError("its checksum is wrong")
    end = 8 + int.from_bytes(body[:8], "little")
    if end > HEADER:
        raise ValueError("its header is too long")
    header = json.loads(bytes(body[8:end]))
    if (header["size"], header["modified"]) != (size, modified):
        return None

    arrays = {}
    for name, dtype in module.LAYOUT.items():
        count, width = header["lengths"][name], np.dtype(dtype).itemsize
        if not isinstance(count, int) or not 0 <= count <= (len(body) - end) // width:
            raise ValueError(f"its array {name} has a wrong length")
        arrays[name] = np.frombuffer(body, dtype, count, end)
        end += count * width
    index = Index(arrays, header["notes"])
    if end != len(body) or not isinstance(index.notes, dict) or not module.sound(index, size):
        raise ValueError("its arrays do not fit the file")

    begins, crc = header["probe"]
    if begins != module.probe(index) or (begins >= 0 and zlib.crc32(read_at(path, begins, PROBED)) != crc):
        raise ValueError("the file holds something else at the place of its last record")
    return index


def _content(path: str, place: pathlib.Path | epath.Path, most: int) -> bytes:
    """What is kept in `place`, at most so many bytes. ValueError: it is more, or somebody else's."""
    if buckets.is_bucket(place):
        if (size := buckets.size(place)) > most:
            raise ValueError(f"{size} bytes are too many")
        return place.read_bytes()
    owners = [os.geteuid()] + ([] if buckets.is_bucket(path) else [os.stat(path).st_uid])
    fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(fd, "rb") as f:
        kept = os.fstat(fd)
        if not stat.S_ISREG(kept.st_mode) or kept.st_uid not in owners:
            raise ValueError("no file of this user or of the owner of the data")
        if kept.st_size > most:
            raise ValueError(f"{kept.st_size} bytes are too many")
        return f.read()


def _work(module: ModuleType, settings: dict) -> None:
    """Makes and keeps the indexes of the files that stdin lists, and prints a line for each."""

    def one(path: str) -> None:
        try:
            _made(module, path, settings)
        except (OSError, ValueError):
            pass  # the process that asked makes it again, and says what is wrong

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(one, json.load(sys.stdin)):
            print(flush=True)


if __name__ == "__main__":
    _work(importlib.import_module(sys.argv[1]), json.loads(sys.argv[2]))
