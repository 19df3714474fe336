"""The captions of files alone, to learn a vocabulary from: texts, a caption a line, or whatever a source reads."""

from __future__ import annotations

import collections
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blip_jax import buckets
from blip_jax.config import source
from blip_jax.data import coco, paths, remote
from blip_jax.data.formats import csv, kind_of, open_source
from blip_jax.data.source import BY_RANGES, BadRecord, as_captions, field_of
from blip_jax.data.table import CAPTION, pick

MISSING = object()  # the value of a field that a row does not have


def read(patterns: list[str], caption_key: str = "caption") -> tuple[list[str], dict[str, int]]:
    """The captions of the files that `patterns` name, and why some were left out: {reason: how many}.

    caption_key: their field or column, by default one of the usual names (data/table.py). A file of no known kind is
    text, a caption a line. ValueError: a file that cannot be read, or has no captions.
    """
    out, left_out = [], collections.Counter()
    for path in [path for pattern in patterns for path in paths.find(pattern, on_bucket=True)]:
        if os.path.isdir(path):
            raise ValueError(f"{path!r} is a folder: name its files, as {path.rstrip('/')}/*")
        before, missing = len(out), collections.Counter()
        kind = kind_of(path)
        copied = buckets.is_bucket(path) and kind not in BY_RANGES
        here = remote.copies([path], "", path)[0] if copied else path
        for found in READERS.get(kind, _lines)(here, caption_key):
            try:
                out += as_captions(path, _raised(found))
            except BadRecord as e:
                missing[e.reason.split(":")[0]] += 1
        left_out += missing
        if len(out) == before:
            why = f" ({', '.join(missing)})" if missing else ""
            raise ValueError(f"{path} is no list of rows with a `{caption_key}`{why}: give BLIP's JSON, or texts")
    return out, dict(left_out)


def _raised(found):
    if isinstance(found, BadRecord):
        raise found
    return found


def _lines(path: str, _) -> list[str]:
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path!r} is no UTF-8 text ({e}): give a caption a line, JSON, CSV, Parquet or tar") from None
    if "\0" in text:
        raise ValueError(f"{path!r} is no text: give a caption a line, JSON, CSV, Parquet or tar")
    return text.splitlines()


def _json(path: str, caption_key: str) -> Iterator[Any]:
    if coco.is_one(path):
        found = coco.build(path, "image", caption_key)
        yield from coco.captions(found, range(len(found.arrays["ids"])))
        return
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig").strip()
        lines = [line for line in text.split("\n") if line.strip()]
        if not text.startswith("[") and len(lines) < 2:
            raise ValueError("one object, not a list")
        for row in json.loads(text) if text.startswith("[") else map(json.loads, lines):
            field = pick(list(row), caption_key, CAPTION) if isinstance(row, dict) else None
            value = field_of(row, field or caption_key, MISSING)
            yield BadRecord(path, f"no `{caption_key}`: {str(row)[:80]}") if value is MISSING else value
    except (ValueError, RecursionError) as e:
        raise ValueError(
            f"{path} is no list of rows with a `{caption_key}`, not JSON or not whole ({e}): give BLIP's JSON, or texts"
        ) from None


def _csv(path: str, caption_key: str) -> Iterator[Any]:
    table = csv.Lines(path)
    column = _column(path, table.names, caption_key)
    for k in range(len(table)):
        try:
            yield table.row(path, k, [column])[column]
        except BadRecord as e:
            yield e


def _parquet(path: str, caption_key: str) -> Iterator[Any]:
    try:
        with pq.ParquetFile(os.path.abspath(path)) as file:
            column = _column(path, file.schema_arrow.names, caption_key)
            for batch in file.iter_batches(batch_size=1000, columns=[column]):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"{path!r} is not Parquet, or damaged ({' '.join(str(e).split())[:200]})") from None


def _column(path: str, names: list[str], caption_key: str) -> str:
    if column := pick(names, caption_key, CAPTION):
        return column
    raise ValueError(f"{path!r} has no column of captions, its columns are {names[:12]}: set --caption_key")


def _records(path: str, caption_key: str) -> Iterator[Any]:
    opened = open_source("captions", source(kind_of(path), path, caption_key=caption_key))
    read_one = getattr(opened, "captions_of", None) or (lambda i: opened[i]["captions"])
    for i in range(len(opened)):
        try:
            yield read_one(i)
        except BadRecord as e:
            yield e


def _packed(path: str, _) -> Iterator[Any]:
    raise ValueError(f"{path!r} is compressed, or an Arrow file: unpack it, or convert it to Parquet")


READERS = {"json": _json, "csv": _csv, "parquet": _parquet, "tar": _records, "array_record": _records}
READERS |= {"packed": _packed, "arrow": _packed}
