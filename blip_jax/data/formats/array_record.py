"""ArrayRecord files of msgpack maps {key, image, captions, image_id}: reading and writing."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

import msgpack
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource

from blip_jax.data.source import BadRecord, Source, as_captions, expand


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
                "blip_jax.data.formats.array_record.write_array_record"
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
