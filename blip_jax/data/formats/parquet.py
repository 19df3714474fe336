"""Parquet tables of pictures, as paths or as their bytes, and captions, as img2dataset and Hugging Face write them.

Columns are read by row group, only those that are needed; the groups read last are kept in memory.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import logging
import os
import threading

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip_jax.data.source import MAX_TEXT, BadRecord
from blip_jax.data.table import Table

log = logging.getLogger(__name__)

KEPT = 1 << 30  # bytes of columns kept in memory for each source
GROUP_BYTES = 1 << 30  # that a column of a row group may take
GROUP_ROWS = 1 << 24
SMALLER = "write it with smaller row groups, as pyarrow.parquet.write_table(table, path, row_group_size=10_000)"


def open(name: str, cfg) -> Table:
    """Opens the tables of a config.source. ValueError: they are none, or have no column of pictures."""
    kept = Kept()
    table = Table(name, cfg, lambda path: Groups(path, kept))
    size = sum(file.bytes_of(own) for file, own in zip(table.files, table.columns))
    if size > KEPT:
        log.warning(
            "data source %r: its columns take %.1f GB, of which %.1f GB are kept in memory: in shuffled order whole "
            "row groups are read for single records. `blip-jax pack` makes shards of it that are read by record",
            name,
            size / 1e9,
            KEPT / 1e9,
        )
    return table


class Groups:
    """One table by row. ValueError: it is none, or its row groups are too large."""

    def __init__(self, path: str, kept: Kept):
        self.path, self._kept = path, kept
        try:
            # absolute: of a relative path the library would take s3:x or ~ for more than a name
            with pq.ParquetFile(os.path.abspath(path)) as file:
                self._metadata, schema, leaves = file.metadata, file.schema_arrow, file.schema
        except (pa.ArrowException, OSError) as e:
            raise ValueError(f"{path!r} is not Parquet, or damaged ({_line(e)}): fetch it again") from None
        self.names = list(dict.fromkeys(schema.names))
        # what repeats is kept once, so that a small file cannot become a large one
        leaves = [leaves.column(i) for i in range(len(leaves))]
        self._texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        groups = [self._metadata.row_group(g) for g in range(self._metadata.num_row_groups)]
        for g, group in enumerate(groups):
            if not 0 <= group.num_rows <= GROUP_ROWS:
                raise ValueError(f"{path!r}: row group {g} has {group.num_rows} rows, at most {GROUP_ROWS}: {SMALLER}")
        self._ends = list(itertools.accumulate(group.num_rows for group in groups))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def bytes_of(self, columns) -> int:
        """Bytes that these columns take in the whole table, unpacked."""
        return sum(self._sizes(g, column) for g in range(len(self._ends)) for column in columns if column)

    def _sizes(self, g: int, column: str) -> int:
        """Bytes of a column in row group `g`, with all that is nested in it."""
        group = self._metadata.row_group(g)
        parts = (group.column(c) for c in range(group.num_columns))
        return sum(p.total_uncompressed_size for p in parts if p.path_in_schema.split(".")[0] == column)

    def row(self, key: str, k: int, columns: list[str]) -> dict:
        g = bisect.bisect_right(self._ends, k)
        first = self._ends[g - 1] if g else 0
        row = {}
        for column in columns:
            values = self._kept.get((self.path, g, column), lambda column=column: self._read(g, column))
            if isinstance(values, str):
                raise BadRecord(key, values)
            value = values[k - first]
            if (size := _bytes_of_list(value)) > MAX_TEXT:
                raise BadRecord(
                    key, f"malformed row: a list of {size} bytes in {column!r}, at most {MAX_TEXT} are read"
                )
            row[column] = value.as_py()
        return row

    def _read(self, g: int, column: str) -> pa.ChunkedArray | str:
        """A column of row group `g`, or why it cannot be read."""
        if (size := self._sizes(g, column)) > GROUP_BYTES or size < 0:
            return f"row group too large: {size} bytes of {column!r} in {self.path!r}; {SMALLER}"
        try:
            with pq.ParquetFile(
                os.path.abspath(self.path), metadata=self._metadata, read_dictionary=self._texts
            ) as file:
                values = file.read_row_group(g, columns=[column]).column(column)
        except (pa.ArrowException, OSError, KeyError) as e:
            return f"unreadable file: row group {g} of {self.path!r}: {_line(e)}"
        if not _plain(values.type):
            return f"malformed row: {column!r} of {self.path!r} is of type {str(values.type)[:80]}"
        wanted = self._metadata.row_group(g).num_rows
        return values if len(values) == wanted else f"unreadable file: row group {g} of {self.path!r} is cut"


class Kept:
    """Columns of row groups, those asked for last, of at most KEPT bytes. Used from several threads."""

    def __init__(self):
        self._lock, self._bytes = threading.Lock(), 0
        self._values: collections.OrderedDict = collections.OrderedDict()

    def get(self, name, read):
        """What is kept as `name`, or `read()`, which then is."""
        with self._lock:  # also while reading: others mostly wait for the same group
            if name in self._values:
                self._values.move_to_end(name)
                return self._values[name]
            values = self._values[name] = read()
            self._bytes += _bytes(values)
            while self._bytes > KEPT and len(self._values) > 1:
                self._bytes -= _bytes(self._values.popitem(last=False)[1])
            return values


def _plain(type_: pa.DataType) -> bool:
    """Whether values are texts, bytes, numbers, a list of such, or a struct of such, as {bytes, path}."""
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return not pa.types.is_nested(type_.value_type)
    if pa.types.is_struct(type_):
        return not any(pa.types.is_nested(field.type) for field in type_)
    return not pa.types.is_nested(type_)


def _bytes_of_list(value: pa.Scalar) -> int:
    """Bytes that the texts of a list take when each is written out; 0 for anything else."""
    values = getattr(value, "values", None)
    if not isinstance(values, pa.Array):
        return 0
    if not isinstance(values, pa.DictionaryArray):
        return values.nbytes
    return len(values) + (pc.sum(pc.take(pc.binary_length(values.dictionary), values.indices)).as_py() or 0)


def _bytes(values) -> int:
    return 0 if isinstance(values, str) else values.nbytes


def _line(e: Exception) -> str:
    return " ".join(str(e).split())[:300]
