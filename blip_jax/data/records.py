"""Sources of records: random access to {key, image bytes, captions, image_id} in the layouts that people have.

json          BLIP's lists of {image, caption, image_id}, as one JSON array or JSON lines, beside a folder of pictures
tar           webdataset and img2dataset shards (blip_jax/data/tar.py)
array_record  ArrayRecord files written by `write_array_record`
tfds          a prepared TensorFlow Datasets data set, read without TensorFlow
scenes        the built-in world (blip_jax/data/scenes.py)

A source keeps an index in compact arrays, never the records. A wrong file list is a ValueError when the source is
opened; a record that cannot be used is a BadRecord when it is read, and the pipeline counts it.
"""

from __future__ import annotations

import array
import bisect
import glob
import json
import os
import pathlib
import re
import stat
from collections.abc import Iterable, Iterator
from typing import Protocol

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource
from tqdm import tqdm

MAX_BYTES = 1 << 28  # of one picture or row; longer is not a record but an accident
LOOKED_AT = 100  # first rows of a list that decide at opening whether it is the right kind of file


class BadRecord(Exception):
    """One record that cannot be used. `key` names it; `reason` is "category" or "category: detail"."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


class Source(Protocol):
    """Random access by index, safe from several threads. `self[i]` is a record or raises BadRecord:

    {"key": str, unique in the source; "image": bytes, encoded; "captions": list[str], raw, may be empty; "image_id": str}

    Where captions can be had without reading the picture (text.buckets needs that), `captions_of(i)` gives those of record i,
    and is a BadRecord for what self[i] is, as far as that shows without it.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict: ...


def open_source(name: str, cfg) -> Source:
    """Opens the source that `cfg` (a config.source) describes. ValueError: a wrong file list, no record."""
    if cfg.kind not in KINDS:
        raise ValueError(f"data source {name!r}: kind {cfg.kind!r} is unknown; choose one of {sorted(KINDS)}")
    src = KINDS[cfg.kind](name, cfg)
    src.name = name
    if not len(src):
        raise ValueError(
            f"data source {name!r}: {cfg.path or cfg.kind} holds no record; remove the source or give another path"
        )
    return src


def expand(name: str, cfg) -> list[str]:
    """The sorted files that cfg.path names or matches. ValueError when there are none."""
    found = sorted(glob.glob(cfg.path)) if glob.has_magic(cfg.path) else [cfg.path]
    if not found:
        raise ValueError(f"data source {name!r}: no file matches {cfg.path!r}; paths are relative to {os.getcwd()}")
    missing = [f for f in found if not os.path.isfile(f)]
    if missing:
        raise ValueError(f"data source {name!r}: {missing[0]!r} is not a file; paths are relative to {os.getcwd()}")
    return found


def read_at(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a regular file; opened for each call, so that thousands of shards need no open files."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # non-blocking: a pipe named like a picture must not hang the run
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError("not a regular file")
        parts = []
        while size > 0 and (part := os.pread(fd, min(size, MAX_BYTES), offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def as_captions(key: str, value) -> list[str]:
    """str | list of str | None -> list of str; anything else is a BadRecord."""
    if value is None:
        return []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(c, str) for c in value):
        raise BadRecord(key, f"malformed caption: text or a list of texts is expected, not {str(value)[:80]!r}")
    return list(value)


class JsonRows(Source):
    """Rows {image, caption: str | [str], image_id} of JSON arrays or JSON lines; only 8 bytes a row are kept in memory.

    Image paths are taken below cfg.images ("": the folder of the list) and may not leave it, whatever links they pass.
    A row without image_id has its image path as id. The key is "<image path>#<row>", or "<list>#<row>" where there is
    no path.
    """

    def __init__(self, name: str, cfg):
        self._image_key, self._caption_key = cfg.image_key, cfg.caption_key
        self._files = expand(name, cfg)
        self._roots = [os.path.realpath(cfg.images or os.path.dirname(f) or ".") for f in self._files]
        for root in self._roots:
            if not os.path.isdir(root):
                raise ValueError(f"data source {name!r}: the image folder {root!r} does not exist; set its `images`")
        self._starts = [_row_offsets(f) for f in self._files]  # byte offsets of rows, and of the end
        self._ends = np.cumsum([len(s) - 1 for s in self._starts]).tolist()
        self._check(name)

    def _check(self, name: str) -> None:
        """The first rows of each list show whether its fields are what the config says."""
        first = 0
        for path, end in zip(self._files, self._ends):
            rows = [r for r in map(self._peek, range(first, min(first + LOOKED_AT, end))) if r is not None]
            if end > first and not rows:
                raise ValueError(
                    f"data source {name!r}: {path!r} holds no JSON objects in its first rows; BLIP's layout is "
                    '[{"image": "a.jpg", "caption": "..."}, ...], or one such object a line'
                )
            for field, leaf in ((self._image_key, "image_key"), (self._caption_key, "caption_key")):
                if rows and not any(field in r for r in rows):
                    raise ValueError(
                        f"data source {name!r}: no row at the start of {path!r} has the field {field!r}; the fields "
                        f"are {sorted(rows[0])[:12]}: set `{leaf}`, or give a list in BLIP's layout"
                    )
            first = end

    def _peek(self, i: int) -> dict | None:
        try:
            return self._row(i)[2]
        except BadRecord:
            return None

    def __len__(self) -> int:
        return self._ends[-1]

    def _row(self, i: int) -> tuple[str, int, dict]:
        """Row `i`: "<list>#<row>", the number of its file, and the object."""
        f = bisect.bisect_right(self._ends, i)
        starts, k = self._starts[f], i - (self._ends[f - 1] if f else 0)
        key = f"{os.path.basename(self._files[f])}#{k}"
        start, size = int(starts[k]), int(starts[k + 1] - starts[k])
        if size > MAX_BYTES:
            raise BadRecord(key, f"malformed row: {size} bytes at byte {start}")
        try:
            row = json.loads(read_at(self._files[f], start, size).strip(b" \t\r\n,"), strict=False)
        except (ValueError, RecursionError) as e:
            raise BadRecord(key, f"malformed row: not JSON at byte {start}: {e}") from None
        except OSError as e:
            raise BadRecord(key, f"unreadable file: {e}") from None
        if not isinstance(row, dict):
            raise BadRecord(key, f"malformed row: an object is expected, not {str(row)[:80]!r}")
        return key, f, row

    def captions_of(self, i: int) -> list[str]:
        key, _, row = self._row(i)
        return as_captions(self._key(i, key, row), row.get(self._caption_key))

    def _key(self, i: int, key: str, row: dict) -> str:
        image = row.get(self._image_key)
        if not isinstance(image, str) or not image:
            raise BadRecord(key, f"malformed row: {self._image_key!r} is {str(image)[:80]!r}, not a path")
        return f"{image}#{i}"

    def __getitem__(self, i: int) -> dict:
        key, f, row = self._row(i)
        key, image = self._key(i, key, row), row[self._image_key]
        return {
            "key": key,
            "image": read_image(key, self._roots[f], image),
            "captions": as_captions(key, row.get(self._caption_key)),
            "image_id": str(row.get("image_id", image)),
        }


def read_image(key: str, root: str, path: str) -> bytes:
    """The bytes of `path` below `root` (a real path). BadRecord when it leaves the root or cannot be read."""
    try:
        real = os.path.realpath(os.path.join(root, path))
        if os.path.commonpath((root, real)) != root:
            raise BadRecord(key, f"path leaves the image root: {path!r} is {real!r}, outside {root!r}")
        size = os.stat(real).st_size
        if size > MAX_BYTES:
            raise BadRecord(key, f"file too large: {size} bytes, at most {MAX_BYTES} are read")
        return read_at(real, 0, size)
    except FileNotFoundError:
        raise BadRecord(key, f"missing file: {path!r} is not in {root!r}") from None
    except (OSError, ValueError) as e:  # ValueError: a path with NUL or broken characters
        raise BadRecord(key, f"unreadable file: {type(e).__name__}: {e}") from None


def _row_offsets(path: str) -> np.ndarray:
    """i64[rows + 1]: byte offsets of the rows of a JSON array or JSON lines file, and the end of the last."""
    size = os.path.getsize(path)
    with open(path, "rb") as f, tqdm(total=size, desc=f"index {path}", unit="B", unit_scale=True, delay=5) as bar:
        head = f.read(1 << 16)
        start = 3 if head.startswith(b"\xef\xbb\xbf") else 0
        start += len(head[start:]) - len(head[start:].lstrip())
        first = head[start : start + 1]
        if first not in (b"[", b"{"):
            raise ValueError(
                f"{path!r} is {'empty' if not head else 'not JSON'}: BLIP's layout is "
                '[{"image": "a.jpg", "caption": "..."}, ...], or one such object a line'
            )
        f.seek(start + (first == b"["))
        rows = array.array("q", _array_rows(f, path, bar) if first == b"[" else _lines(f, bar))
    return np.frombuffer(rows, np.int64)


def _lines(f, bar) -> Iterator[int]:
    at = f.tell()
    for line in f:
        if not line.isspace():
            yield at
        at += len(line)
        bar.update(len(line))
    yield at


_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_ROW = rb"(?!)"
for _ in range(6):  # an object, with objects inside it to this depth; strings may hold any bracket
    _ROW = rb'\{(?:[^{}"]++|' + _STRING + rb"|" + _ROW + rb")*+\}"
_NEXT_ROW = re.compile(rb"[\s,]*+(" + _ROW + rb")", re.DOTALL)
_BETWEEN = re.compile(rb"[\s,]*+")
_BLOCK = 1 << 20  # bytes; also the longest row that is looked for


def _array_rows(f, path: str, bar) -> Iterator[int]:
    """Offsets of the rows of a JSON array whose [ has been read, without parsing them; what is between two rows and no
    separator becomes a row too, so that it is reported and not lost."""
    base, buf, pos, more = f.tell(), b"", 0, True
    while True:
        if more and len(buf) - pos < _BLOCK:
            block = f.read(_BLOCK)
            more = bool(block)
            base, buf, pos = base + pos, buf[pos:] + block, 0
            bar.update(len(block))
        if m := _NEXT_ROW.match(buf, pos):
            yield base + m.start(1)
            pos = m.end()
            continue
        pos = _BETWEEN.match(buf, pos).end()
        if more and len(buf) - pos < _BLOCK:
            continue
        if buf[pos : pos + 1] == b"]" and not more and not buf[pos + 1 :].strip():
            yield base + pos
            return
        yield base + pos
        m = _NEXT_ROW.search(buf, pos + 1)
        pos = m.start() if m else len(buf)
        if not (m or more):
            last = buf.rstrip()
            if not last.endswith(b"]"):
                raise ValueError(
                    f"{path!r} is not JSON: the array has no end; the file is cut or broken, fetch it again"
                )
            yield base + len(last) - 1
            return


class ArrayRecords(Source):
    """ArrayRecord files of msgpack maps {key, image, captions, image_id}, as `write_array_record` writes them."""

    def __init__(self, name: str, cfg):
        self._files = expand(name, cfg)
        try:
            self._data = ArrayRecordDataSource(self._files)
            if len(self._data):
                self._data[0]
        except Exception as e:  # the reader's own types vary with its version
            raise ValueError(
                f"data source {name!r}: {cfg.path!r} is not ArrayRecord ({e}); write such files with "
                "blip_jax.data.records.write_array_record"
            ) from e

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> dict:
        key = f"record {i}"
        try:
            record = msgpack.unpackb(self._data[i])
            key, image = record["key"], record["image"]
        except Exception as e:
            raise BadRecord(key, f"malformed record: {type(e).__name__}: {e}") from None
        if not isinstance(key, str) or not isinstance(image, bytes):
            raise BadRecord(str(key), "malformed record: key must be text and image bytes")
        return {
            **record,
            "captions": as_captions(key, record.get("captions")),
            "image_id": str(record.get("image_id", key)),
        }


def write_array_record(path: str | os.PathLike, records: Iterable[dict]) -> int:
    """Writes records {key: str, image: bytes, captions: [str], ...} to one ArrayRecord file; returns how many.

    Further fields may be anything msgpack holds. The file appears under its name only when it is complete.
    """
    part = pathlib.Path(f"{path}.part")
    writer = ArrayRecordWriter(str(part), "group_size:1")
    n = 0
    for record in records:
        writer.write(pack(n, record))
        n += 1
    writer.close()
    part.replace(path)
    return n


def pack(n: int, record: dict) -> bytes:
    """Record number `n` {key: str, image: bytes, captions: [str], ...} as an ArrayRecord file holds it."""
    if not isinstance(record.get("key"), str) or not isinstance(record.get("image"), bytes):
        raise ValueError(f"record {n} needs a text `key` and an `image` of bytes, got the fields {sorted(record)}")
    return msgpack.packb(record)


class Tfds(Source):
    """A prepared TFDS data set in a random-access format: cfg.path "name/split" (or "name/config:version/split"),
    data_dir cfg.images. Fields are named by cfg.image_key and cfg.caption_key; "captions/text" goes into a nested
    field."""

    def __init__(self, name: str, cfg):
        try:
            import tensorflow_datasets as tfds
        except ImportError as e:
            raise ValueError(f"data source {name!r} is of kind tfds: pip install tensorflow-datasets ({e})") from e
        dataset, _, self._split = cfg.path.rpartition("/")
        self._fields = cfg.image_key, cfg.caption_key.split("/")
        try:
            builder = tfds.builder(dataset, data_dir=cfg.images or None)
            self._data = builder.as_data_source(self._split, decoders={cfg.image_key: tfds.decode.SkipDecoding()})
        except Exception as e:  # not found, not prepared, TFRecord files, no such split or field: each has its own type
            raise ValueError(
                f"data source {name!r}: TFDS cannot open {cfg.path!r} in {cfg.images or 'its default folder'!r} "
                f"({type(e).__name__}: {e}); it must be prepared there with file_format='array_record', and the "
                "path reads 'name/split'"
            ) from e
        missing = [f for f in (cfg.image_key, self._fields[1][0]) if f not in builder.info.features]
        if missing:
            raise ValueError(
                f"data source {name!r}: {cfg.path!r} has no field {missing}; it has {sorted(builder.info.features)}: "
                "set `image_key` and `caption_key`"
            )

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> dict:
        key = f"{self._split}#{i}"
        try:
            row = self._data[i]
            image, value = row[self._fields[0]], row
            for field in self._fields[1]:
                value = value[field]
            captions = [_utf8(c) for c in np.atleast_1d(np.asarray(value, object)).tolist()]
            image_id = _utf8(row.get("image_id", row.get("image/id", key)))
        except Exception as e:
            raise BadRecord(key, f"malformed record: {type(e).__name__}: {e}") from None
        return {"key": key, "image": bytes(image), "captions": as_captions(key, captions), "image_id": image_id}


def _utf8(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _tar(name: str, cfg) -> Source:
    from blip_jax.data.tar import TarShards

    return TarShards(name, cfg)


def _scenes(name: str, cfg) -> Source:
    from blip_jax.data.scenes import Scenes

    return Scenes(seed=cfg.seed, count=cfg.count, size=cfg.size, noise=cfg.noise, captions=cfg.captions,
                  easy=cfg.easy)


KINDS = {"json": JsonRows, "tar": _tar, "array_record": ArrayRecords, "tfds": Tfds, "scenes": _scenes}
