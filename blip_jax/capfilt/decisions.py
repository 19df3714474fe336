"""The decision table: one row per text with its scores, whether it is kept and why, as Parquet."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from blip_jax import buckets

SOURCES = ("web", "synthetic")
MATCHED, BELOW, EMPTY, REPEATED, UNREADABLE = "matched", "below threshold", "empty caption", "repeated", "unreadable"
REASONS = (MATCHED, BELOW, EMPTY, REPEATED)  # of a readable picture's texts; else "unreadable: category"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("dataset", pa.string()),
        ("record", pa.int64()),
        ("text", pa.string()),
        ("source", pa.string()),
        ("itm", pa.float32()),
        ("itc", pa.float32()),
        ("log_prob", pa.float32()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
    ]
)


class Row(NamedTuple):
    """One text of one record."""

    key: str  # of the record
    dataset: str  # name of its source
    record: int  # its number there
    text: str  # cleaned, as it is scored and kept
    source: str  # web | synthetic
    itm: float | None = None  # matching probability; None: not scored
    itc: float | None = None  # cosine
    log_prob: float | None = None  # the captioner's own, natural logarithm, synthetic texts only
    kept: bool = False
    reason: str = ""


def judge(rows: Iterable[Row], threshold: float) -> list[Row]:
    """The rows of one picture, web texts first, with `kept` and `reason`: a text is kept from `threshold` on, once.

    ValueError: a score is not finite.
    """
    out, seen = [], set()
    for row in rows:
        if not row.text:
            row = row._replace(kept=False, reason=EMPTY)
        elif row.text in seen:
            row = row._replace(kept=False, reason=REPEATED)
        elif not abs(row.itm) + abs(row.itc) < float("inf"):
            raise ValueError(
                f"{row.key} of {row.dataset!r}: the filter's scores are not finite (itm {row.itm}, itc {row.itc}): "
                "its parameters hold NaN or infinity, or its dtype overflows; give an earlier checkpoint or "
                "dtype=float32"
            )
        else:
            row = by_threshold(row, threshold)
        seen.add(row.text)
        out.append(row)
    return out


def by_threshold(row: Row, threshold: float) -> Row:
    """A scored row, decided by its matching probability."""
    kept = row.itm >= threshold
    return row._replace(kept=kept, reason=MATCHED if kept else BELOW)


def unreadable(key: str, dataset: str, record: int, texts: list[str], reason: str) -> list[Row]:
    """The rows of a record that cannot be used: its web texts, or one empty text where they are not known."""
    category = f"{UNREADABLE}: {reason.split(':')[0]}"
    return [Row(key, dataset, record, text, "web", reason=category) for text in texts or [""]]


def write(path: pathlib.Path, rows: list[Row]) -> None:
    """Writes the table; the same rows give the same bytes."""
    columns = zip(*rows) if rows else [[] for _ in SCHEMA]
    table = pa.table([pa.array(c, field.type) for c, field in zip(columns, SCHEMA)], schema=SCHEMA)
    pq.write_table(table, path, compression="zstd")


def read(path: pathlib.Path, columns: list[str] | None = None) -> pa.Table:
    """The table at `path`, or some columns of it, of which on a bucket no more is fetched than they take.

    ValueError: it is no decision table.
    """
    try:
        if buckets.is_bucket(path) and columns:
            with buckets.by_ranges(path) as file:
                return pq.read_table(file, columns=columns)
        file = pa.BufferReader(path.read_bytes()) if buckets.is_bucket(path) else path
        return pq.read_table(file, columns=columns or SCHEMA.names)
    except (pa.ArrowInvalid, FileNotFoundError) as e:
        raise ValueError(
            f"{path} is no decision table ({e}): remove the folder it is in and run again, to make it anew"
        ) from e


def rows_of(path: pathlib.Path) -> list[Row]:
    """The table at `path` as rows."""
    table = read(path)
    return [Row(*values) for values in zip(*(table.column(name).to_pylist() for name in Row._fields))]
