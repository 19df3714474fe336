"""Captions alone, from the files that people have, to learn a vocabulary from."""

from __future__ import annotations

import csv
import glob
import json
import pathlib
from collections.abc import Iterable, Iterator

from blip_jax import config
from blip_jax.data.formats import open_source
from blip_jax.data.source import BadRecord

FIELDS = ("caption", "captions", "text")  # in any case, the first that a table or row has
ROWS = (".json", ".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}


def read(path: str) -> list[str]:
    """The captions of a file: a .txt with one a line, JSON rows, a .csv or .tsv with a header, .parquet, or a .tar of
    samples as webdataset's.

    A field `caption`, `captions` or `text` holds one or a list. ValueError: no such file, none of these kinds, or
    without such a field.
    """
    kind = pathlib.Path(path).suffix.lower()
    if not pathlib.Path(path).is_file():
        raise ValueError(f"{path} does not exist: give a file of captions")
    try:
        if kind == ".tar":
            return [*_of_shard(path)]
        if kind == ".parquet":
            return [*_of_parquet(path)]
        with open(path, encoding="utf-8-sig", newline="" if kind in TABLES else None) as f:
            if kind in TABLES:
                return [*_of_table(csv.DictReader(f, delimiter=TABLES[kind]))]
            return [*_of_rows(f.read(), lines=kind != ".json")] if kind in ROWS else f.read().splitlines()
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{path} is not UTF-8 text ({e.reason} at byte {e.start}): give a .txt, {', '.join((*ROWS, *TABLES))}, "
            ".parquet or .tar"
        ) from None
    except (ValueError, csv.Error) as e:
        raise ValueError(f"{path} {e}") from None


def _field(names: Iterable) -> str:
    names = [name for name in names if isinstance(name, str)]
    for field in FIELDS:
        if found := [name for name in names if name.lower() == field]:
            return found[0]
    raise ValueError(f"has the fields {sorted(names)[:12]}, none of {', '.join(FIELDS)}")


def _each(value) -> Iterator[str]:
    """One caption, a list of them, or none."""
    yield from (x for x in (value if isinstance(value, list) else [value]) if isinstance(x, str))


def _of_rows(text: str, lines: bool) -> Iterator[str]:
    try:
        rows = json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply for rows of captions") from None
    except ValueError:  # not one JSON value: one a line
        try:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as e:
            raise ValueError(f"is not JSON ({e})") from None
    rows = [rows] if lines and isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("is no list of rows with a `caption`: give BLIP's JSON, or a .txt")
    for row in rows:
        yield from _each(row[_field(row)])


def _of_table(rows: csv.DictReader) -> Iterator[str]:
    field = _field(rows.fieldnames or ())
    for row in rows:
        yield from _each(row[field])


def _of_parquet(path: str) -> Iterator[str]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            field = _field(file.schema_arrow.names)
            for batch in file.iter_batches(columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield from _each(value)
    except ArrowException as e:
        raise ValueError(f"is no Parquet file that can be read ({e})") from None


def _of_shard(path: str) -> Iterator[str]:
    source = open_source("captions", config.source("tar", glob.escape(path)))
    for i in range(len(source)):
        try:
            yield from source.captions_of(i)
        except BadRecord:
            continue
