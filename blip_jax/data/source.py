"""Sources of records: random access to {key, image bytes, captions, image_id} in the layouts that people have.

json          BLIP's lists of {image, caption, image_id}, as one JSON array or JSON lines, beside a folder of pictures
tar           webdataset and img2dataset shards (blip_jax/data/formats/tar.py)
csv, tsv, parquet  tables with a column of paths or pictures (blip_jax/data/table.py)
karpathy      Karpathy's splits of Flickr30k and COCO (blip_jax/data/formats/karpathy.py)
array_record  ArrayRecord files as `blip-jax pack` and CapFilt write them
tfds          a prepared TensorFlow Datasets data set, read without TensorFlow
scenes        the built-in world (blip_jax/data/scenes/world.py)

Layouts that one task alone reads (vqa, nlvr, visdial, nocaps, video_text, video_qa), whose records hold other things
than captions, are modules of blip_jax/data/formats.

A source keeps an index in compact arrays, never the records. A wrong file list is a ValueError when the source is
opened; a record that cannot be used is a BadRecord when it is read, and the pipeline counts it.

The key of a record says where it is, and no two records of a run have the same:

    <source>:<file>/<member>        of a shard, as "web:00000.tar/0001"
    <source>:<file>#<row>:<image>   of a list, as "coco:train.json#12:img/7.jpg"; ":<image>" where the row names one
    <source>:<key>                  of ArrayRecord, the key that the record was written with, if it does not begin so
    <source>:scene-<seed>-<index>   of the built-in world

<file> is the path below the folder that all files of the source share (`in_keys`), rows count from 0 in each file.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Sequence
from typing import Any, Protocol

from blip_jax import buckets
from blip_jax.data import paths, remote

MAX_BYTES = 1 << 28  # of one picture; longer is not a record but an accident
MAX_TEXT = 1 << 23  # bytes of one row of a list, one caption or one .json of a shard; parsing takes many times as much
BY_RANGES = ("array_record", "tar")  # kinds whose files on gs:// are not copied before they are read
NOT_ON_BUCKETS = ("video_text", "video_qa", "tfds")
REMEDY = "of gs:// neither videos nor tfds are read: copy them here, or mount the bucket with gcsfuse"
NO_ID = ("", "nan", "none", "null")  # what tools write for an image_id that is missing


class BadRecord(Exception):
    """One record that cannot be used. `key` names it; `reason` is "category" or "category: detail"."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


class Source(Protocol):
    """Random access by index, safe from several threads. `self[i]` is a record or raises BadRecord:

    {"key": str, unique in the run; "image": bytes, encoded; "captions": list[str], raw, may be empty; "image_id":
    str, the same for all records of one picture}

    Where captions can be had without reading the picture (text.buckets needs that), `captions_of(i)` gives those of
    record i, and is a BadRecord for what self[i] is, as far as that shows without it.

    without_texts: "", or why no record has a caption, with the remedy: pictures alone are for CapFilt.
    """

    name: str
    without_texts: str = ""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict: ...


def refuse_places(name: str, cfg) -> None:
    """ValueError: a path of a source is on a bucket, or at another address, where its kind or its leaf takes none."""
    try:
        for leaf in ("path", "images", "roots", "cache"):
            for path in [cfg[leaf]] if isinstance(cfg[leaf], str) else cfg[leaf]:
                if leaf in ("roots", "cache") or cfg.kind in NOT_ON_BUCKETS:
                    buckets.local(path, leaf, REMEDY if leaf in ("path", "images") else "")
                elif leaf == "images":
                    buckets.of(path, leaf)
    except ValueError as e:
        raise ValueError(f"data source {name!r}: {e}") from None


def expand(name: str, cfg) -> list[str]:
    """The sorted files that cfg.path names (data/paths.py); of lists on a bucket, local copies.

    ValueError: there are none, or one is missing.
    """
    refuse_places(name, cfg)
    try:
        found = paths.find(cfg.path, on_bucket=True)
        if buckets.is_bucket(cfg.path) and (cfg.cache or cfg.kind not in BY_RANGES):
            found = remote.copies(found, cfg.cache, name)
    except (ValueError, OSError) as e:
        raise ValueError(f"data source {name!r}: {e}") from None
    for path in found:
        if not buckets.is_bucket(path) and not os.path.isfile(path):
            hint = f"a folder: name its files, as {path.rstrip('/')}/*" if os.path.isdir(path) else "not a file"
            raise ValueError(f"data source {name!r}: {path!r} is {hint}; paths are relative to {os.getcwd()}")
    return found


def in_keys(files: Sequence[str]) -> list[str]:
    """How keys name the files of a source: below the folder that all of them share, so that moving it changes none."""
    full = [os.path.abspath(f) for f in files]
    shared = os.path.commonpath([os.path.dirname(f) for f in full])
    return [os.path.relpath(f, shared).encode(errors="backslashreplace").decode() for f in full]


def image_id(value, own: str) -> str:
    """The image_id of a record whose field holds `value`: a text, or a whole number, of which 7, 7.0 and "7" are one.

    Anything else is no id (absent, null, empty, not a number, true, a list): `own`, which names the picture itself,
    takes its place, so that such pictures never count as one.
    """
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64:
        return str(value)
    return own if not isinstance(value, str) or value.strip().lower() in NO_ID else value.strip()


def field_of(row: Any, name: str, absent: Any = None) -> Any:
    """The field `name` of a row, or a nested one by its path; `absent`, where there is none.

    "captions/text" also takes the texts of a list of objects.
    """
    if isinstance(row, dict) and name in row:
        return row[name]
    first, _, rest = name.partition("/")
    if not rest or not isinstance(row, dict) or first not in row:
        return absent
    if not isinstance(inner := row[first], list):
        return field_of(inner, rest, absent)
    return [found for one in inner if (found := field_of(one, rest, absent)) is not absent]


def read_at(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a regular file; opened for each call, so that thousands of shards need no open files."""
    if buckets.is_bucket(path):
        return buckets.read_at(path, offset, size)
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
