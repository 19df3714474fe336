"""Output shards: which records belong to which, and a writer whose shard appears whole or not at all.

OUT/shards/00000/ holds decisions.parquet, web.array_record and synthetic.array_record. It is written as
OUT/unfinished/00000/ and then renamed: the rename is the commit. Whatever a killed process leaves in unfinished/ counts
for nothing; it goes when the shard is made anew, all of it at the end. OUT is on a file system where a rename is
atomic, or on a bucket, where nothing is renamed: there a shard is written in a local folder and copied, its decision
table last, and that is the commit. What a killed process has copied without the table is copied again.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import contextlib
import hashlib
import itertools
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from blip_jax import buckets
from blip_jax.capfilt import decisions
from blip_jax.capfilt.decisions import SOURCES, UNREADABLE, Row
from blip_jax.data import temporary
from blip_jax.data.formats.array_record import pack
from blip_jax.data.text.clean import plain_text

TABLE = "decisions.parquet"
PLACE = ("key", "dataset", "record", "reason")  # columns that say where a row comes from
FORMAT = "group_size:1,uncompressed"  # random access; pictures are compressed already


class Plan:
    """The records of all sources one after another, sources by name, cut into shards of `shard_examples`."""

    def __init__(self, lengths: dict[str, int], shard_examples: int):
        self._names = sorted(lengths)
        self._ends = list(itertools.accumulate(lengths[name] for name in self._names))
        self._size = shard_examples

    def __len__(self) -> int:
        """Number of shards."""
        return -(-self._ends[-1] // self._size)

    def span(self, shard: int) -> range:
        """Numbers of the records of `shard` in the order of all."""
        return range(shard * self._size, min((shard + 1) * self._size, self._ends[-1]))

    def locate(self, i: int) -> tuple[str, int]:
        """(source, record number there) of record `i` of all."""
        s = bisect.bisect_right(self._ends, i)
        return self._names[s], i - (self._ends[s - 1] if s else 0)


def folder(out: pathlib.Path, shard: int) -> pathlib.Path:
    """Where the finished shard is."""
    return out / "shards" / f"{shard:05d}"


def finished(out: pathlib.Path, count: int) -> list[int]:
    """Numbers of the finished shards among `count`."""
    if buckets.is_bucket(out):
        tables = buckets.glob(f"{folder(out, 0).parent}/*/{TABLE}", {})
        there = {pathlib.PurePosixPath(path).parent.name for path in tables}
        return [k for k in range(count) if folder(out, k).name in there]
    return [k for k in range(count) if folder(out, k).is_dir()]


def storable(fields: dict, dataset: str) -> dict:
    """A record of a source with a key and an image_id that any file can hold: NUL and broken characters replaced.

    The image_id begins with the source, as ids of two sources must not meet in the shards.
    """
    key, image_id = (plain_text(fields[name])[0] for name in ("key", "image_id"))
    return {
        **fields,
        "key": key,
        "image_id": image_id if image_id.startswith(f"{dataset}:") else f"{dataset}:{image_id}",
    }


@contextlib.contextmanager
def writing(what: str, out: pathlib.Path) -> Iterator[None]:
    """OSError that names `what`, the folder `out` and the remedy, for anything that goes wrong while it is written."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # RuntimeError: ArrayRecord's writer, which keeps the number only in words
        raise OSError(
            f"writing {what} in {out} failed: {e}. Nothing half-written counts. Make room or give a folder that can "
            "be written, then run the same command again: finished shards stay as they are"
        ) from e


def put(out: pathlib.Path, name: str, content: str, keep: bool = False) -> None:
    """Writes the file `name` of `out` whole or not at all. `keep`: one that is there already stays."""
    if buckets.is_bucket(out):
        with contextlib.suppress(FileExistsError):
            (buckets.create if keep else buckets.write)(out / name, content.encode())
        return
    beside = out / "unfinished" / f"{name}.{uuid.uuid4().hex}"
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(content, encoding="utf-8")
    if not keep:
        beside.replace(out / name)
        return
    with contextlib.suppress(FileExistsError):
        os.link(beside, out / name)
    beside.unlink()


class ShardWriter:
    """One shard while it is made; `commit` finishes it, `drop` leaves nothing.

    OSError: the folder cannot be written.
    """

    def __init__(self, out: pathlib.Path, shard: int):
        self._out, self.shard, self.rows = out, shard, []
        here = pathlib.Path(temporary.own_folder()) if buckets.is_bucket(out) else out
        self._part = here / "unfinished" / f"{shard:05d}"
        self._written = dict.fromkeys(SOURCES, 0)
        with self._writing():
            shutil.rmtree(self._part, ignore_errors=True)
            self._part.mkdir(parents=True)
        self._files = {s: ArrayRecordWriter(str(self._path(s)), FORMAT) for s in SOURCES}

    def _path(self, source: str) -> pathlib.Path:
        return self._part / f"{source}.array_record"

    def _writing(self):
        return writing(f"shard {self.shard:05d}", self._out)

    def add(self, record: dict | None, rows: list[Row]) -> None:
        """Takes one record and its rows; None where no text of it is kept.

        The record's kept texts of each source become a record of the shard.
        """
        self.rows += rows
        for source, file in self._files.items():
            if kept := [row.text for row in rows if row.kept and row.source == source]:
                with self._writing():
                    file.write(pack(self._written[source], {**record, "captions": kept}))
                self._written[source] += 1

    def commit(self) -> None:
        """Makes the shard appear under its name, complete and on disk."""
        with self._writing():
            for source, file in self._files.items():
                file.close()
                if (found := _count(self._path(source))) != self._written[source]:
                    raise OSError(f"{self._path(source)} holds {found} records, {self._written[source]} were written")
            decisions.write(self._part / TABLE, self.rows)
            if buckets.is_bucket(self._out):
                return self._send()
            for path in [*self._part.iterdir(), self._part]:
                _sync(path)
            final = folder(self._out, self.shard)
            final.parent.mkdir(exist_ok=True)
            self._part.rename(final)  # an error if another process has finished the same shard
            _sync(final.parent)

    def _send(self) -> None:
        """As the end of `commit`, on a bucket."""
        for name in (*(self._path(source).name for source in SOURCES), TABLE):
            buckets.send(self._part / name, folder(self._out, self.shard) / name)
        shutil.rmtree(self._part)

    def drop(self) -> None:
        """Removes what there is of the shard."""
        for file in self._files.values():
            with contextlib.suppress(RuntimeError):  # it is not wanted any more
                file.close()
        shutil.rmtree(self._part, ignore_errors=True)


def _count(path: pathlib.Path) -> int:
    reader = ArrayRecordReader(str(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def _sync(path: pathlib.Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Keys:
    """The keys of all shards seen, 8 bytes each. Every key may occur once: its name is its random stream."""

    def __init__(self, out: pathlib.Path):
        self._out = out
        self._sorted: list[np.ndarray] = []  # u64 hashes, arrays of falling size
        self._shards: list[int] = []

    def add_finished(self, finished: Sequence[int]) -> None:
        """Takes in shards from their tables, several of which are read at once; errors as `add`."""
        with concurrent.futures.ThreadPoolExecutor(buckets.THREADS) as pool:
            for i in range(0, len(finished), buckets.THREADS):
                some = finished[i : i + buckets.THREADS]
                for shard, found in zip(some, pool.map(lambda shard: _places(self._out, shard), some)):
                    self.add(shard, found)

    def add(self, shard: int, places: Iterable[tuple[str, str, int, str]]) -> None:
        """Takes in the (key, dataset, record, reason) of a shard's rows. ValueError: a key that is there already."""
        here: dict[str, tuple[str, int]] = {}
        for key, dataset, record, reason in places:
            if not reason.startswith(UNREADABLE) and here.setdefault(key, (dataset, record)) != (dataset, record):
                raise _twice(key, (*here[key], shard), (dataset, record, shard))
        names = list(here)
        new = np.array([_hash(key) for key in names], np.uint64)
        known = np.zeros(len(new), bool)
        for old in self._sorted:
            known |= old[np.minimum(np.searchsorted(old, new), len(old) - 1)] == new
        for i in np.flatnonzero(known):
            if before := self._find(names[i]):
                raise _twice(names[i], before, (*here[names[i]], shard))
        self._remember(np.sort(new), shard)

    def _remember(self, new: np.ndarray, shard: int) -> None:
        self._shards.append(shard)
        while self._sorted and len(self._sorted[-1]) <= len(new):
            new = np.sort(np.concatenate([self._sorted.pop(), new]), kind="stable")
        if len(new):
            self._sorted.append(new)

    def _find(self, wanted: str) -> tuple[str, int, int] | None:
        """(dataset, record, shard) of a key of the finished shards; None: another key has the same hash."""
        for shard in self._shards:
            for key, dataset, record, reason in _places(self._out, shard):
                if key == wanted and not reason.startswith(UNREADABLE):
                    return dataset, record, shard
        return None


def places(table: pa.Table) -> Iterator[tuple[str, str, int, str]]:
    """(key, dataset, record, reason) of the rows of a shard's table."""
    return zip(*(table.column(name).to_pylist() for name in PLACE))


def _places(out: pathlib.Path, shard: int) -> Iterator[tuple[str, str, int, str]]:
    return places(decisions.read(folder(out, shard) / TABLE, list(PLACE)))


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _twice(key: str, first: tuple[str, int, int], second: tuple[str, int, int]) -> ValueError:
    place = "record {1} of source {0!r} (shard {2:05d})"
    return ValueError(
        f"key {key!r} occurs twice: {place.format(*first)} and {place.format(*second)}. A key names one picture "
        "and its random stream: remove one of the two, or give the sources' records keys of their own"
    )
