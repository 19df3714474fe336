"""CSV and TSV tables with a first line that names the columns, as open_clip's filepath and title.

What separates the columns, a tab, comma, semicolon or |, is found in the first line. Fields in quotes may hold it, and
line ends. UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import array
import collections
import contextlib
import csv
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from blip_jax.data import rows
from blip_jax.data.index import Index, indexes
from blip_jax.data.source import MAX_TEXT, BadRecord, expand, read_at
from blip_jax.data.table import CAPTION, IMAGE, URL, Table, pick

SEPARATORS = "\t,;|"
QUOTED = 1 << 20  # bytes that a row with quotes may take; a quote that is not closed in so many is a letter
UTF_16 = (b"\xff\xfe", b"\xfe\xff")

# the index of one table (blip_jax/data/index.py): byte offsets of the rows behind the first line, and of the end
VERSION, LAYOUT, sound, probe = 1, rows.LAYOUT, rows.sound, rows.probe


def build(path: str, image_key: str) -> Index:
    """The index of one table. ValueError: it is none."""
    with pathlib.Path(path).open("rb") as file:
        names, separator = _first_line(path, file, image_key)
        return Index({"starts": np.frombuffer(array.array("q", _rows(file, separator, len(names))), np.int64)}, {})


def open(name: str, cfg) -> Table:
    """Opens the tables of a config.source. ValueError: they are none, or have no column of pictures."""
    files = expand(name, cfg)
    found = dict(zip(files, indexes(sys.modules[__name__], files, {"image_key": cfg.image_key}, name)))
    return Table(name, cfg, lambda path: Lines(path, cfg.image_key, found[path]))


class Lines:
    """One table; 8 bytes a row are kept. ValueError: it is none.

    index: of `build`; None: it is made.
    """

    def __init__(self, path: str, image_key: str = "image", index: Index | None = None):
        self.path = path
        with pathlib.Path(path).open("rb") as file:
            self.names, self._separator = _first_line(path, file, image_key)
        self._starts = (index or build(path, image_key)).arrays["starts"]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def row(self, key: str, k: int, columns: list[str]) -> dict:
        start, size = int(self._starts[k]), int(self._starts[k + 1] - self._starts[k])
        if size > MAX_TEXT:
            raise BadRecord(key, f"malformed row: {size} bytes at byte {start}")
        try:
            text = read_at(self.path, start, size).decode().rstrip("\r\n")
            fields = next(_parsed([text], self._separator), [])
        except (UnicodeDecodeError, csv.Error) as e:
            raise BadRecord(key, f"malformed row: {type(e).__name__} at byte {start}: {e}") from None
        except OSError as e:
            raise BadRecord(key, f"unreadable file: {e}") from None
        if len(fields) != len(self.names):
            raise BadRecord(
                key, f"malformed row: {len(fields)} fields at byte {start}, the first line names {len(self.names)}"
            )
        row = dict(zip(self.names, fields))
        return {column: row[column] for column in columns}


def _parsed(lines, separator: str, strict: bool = False) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_TEXT)
    return csv.reader(lines, delimiter=separator, strict=strict)


def _first_line(path: str, file, image_key: str) -> tuple[list[str], str]:
    """`_header` of a table, behind whose first line `file` then stands. ValueError: it is none."""
    head = file.readline(QUOTED)
    if head.startswith(UTF_16):
        raise ValueError(f"{path!r} is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    try:
        first = head.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path!r} is not UTF-8 text ({e}): give a CSV or TSV table") from None
    if not first.strip() or "\0" in first or len(head) == QUOTED:
        raise ValueError(f"{path!r} is {'no table' if first else 'empty'}: give a CSV or TSV table")
    return _header(first, image_key)


def _header(first: str, image_key: str) -> tuple[list[str], str]:
    """Names of the columns, and what separates them: so that there are pictures or addresses, else most columns."""
    found = []
    for separator in SEPARATORS:
        names = [name.strip() for name in next(_parsed([first.rstrip("\r\n")], separator), [])]
        known = pick(names, image_key, IMAGE) or pick(names, "", URL)
        found.append((known is not None, len(names), pick(names, "", CAPTION) is not None, names, separator))
    *_, names, separator = max(found, key=lambda row: row[:3])
    return names, separator


def _rows(file, separator: str, columns: int) -> Iterator[int]:
    """Where each row begins, and the end of the last; `file` stands behind the first line."""
    begun = at = file.tell()
    ahead: collections.deque = collections.deque()
    with tqdm(total=file.seek(0, 2) - at, desc=f"index {file.name}", unit="B", unit_scale=True, delay=5) as bar:
        file.seek(at)
        while line := ahead.popleft() if ahead else file.readline(QUOTED):
            size = len(line)
            if line.count(b'"') % 2 and line.endswith(b"\n"):
                size = _quoted(line, file, ahead, separator, columns)
            elif not ahead:
                while not line.endswith(b"\n") and (line := file.readline(QUOTED)):  # longer than any row may be
                    size += len(line)
            if size > len(line) or line.strip(b"\r\n"):
                yield at
            at += size
            if at - begun - bar.n > QUOTED:
                bar.update(at - begun - bar.n)
    yield at


def _quoted(line: bytes, file, ahead: collections.deque, separator: str, columns: int) -> int:
    """Bytes of the row that begins with `line`: over several lines only where quotes join them to `columns` fields."""
    taken, size = [line], len(line)

    def lines() -> Iterator[str]:
        nonlocal size
        yield line.decode("latin-1")  # separators and quotes are ASCII
        while size < QUOTED and (more := ahead.popleft() if ahead else file.readline(QUOTED)):
            taken.append(more)
            size += len(more)
            yield more.decode("latin-1")

    with contextlib.suppress(csv.Error):  # something behind a quote that closes: it opens another row's field
        fields = next(_parsed(lines(), separator, strict=True), [])
        if len(fields) == columns:
            return size
    ahead.extendleft(reversed(taken[1:]))
    return len(line)
