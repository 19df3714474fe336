"""Where the rows of a JSON array or of JSON lines begin, without parsing them."""

from __future__ import annotations

import array
import mmap
import os
import re
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from blip_jax.data.index import Index

VERSION = 1
LAYOUT = {"starts": np.dtype("i8")}  # byte offsets of the rows, and of the end of the last
LONG = 1 << 16  # bytes of a row that is looked for in one go
LAST = re.compile(rb"\]\s*+\Z")
JOINED = re.compile(rb"\]\s*+\[")  # one array behind another
BETWEEN = re.compile(rb"[\s,]*+")
STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
OBJECT = rb"(?!)"
for _ in range(6):  # an object, with objects inside it to this depth; strings may hold any bracket
    OBJECT = rb'\{(?:[^{}"]++|' + STRING + rb"|" + OBJECT + rb")*+\}"
USUAL = re.compile(OBJECT + rb"(?=\s*+[,\]])", re.DOTALL)  # most rows
TOKEN = re.compile(rb"\s*+(?:(" + STRING + rb"|[\w.+-]++)|([{\[])|([}\]])|([,:]))", re.DOTALL)
VALUE, OPEN, CLOSE, MARK = 1, 2, 3, 4  # groups of TOKEN: a string or a word; , and : are marks
FOLLOWED = re.compile(rb"\s*+[,\]]")
# where the row after a broken one may begin, for one that is an object or an array, and for anything else
NEXT = re.compile(rb"[}\]]\s*+,\s*+(?=\{)"), re.compile(rb",\s*+(?=\{)")


def build(path: str) -> Index:
    """The index of one list. ValueError: it holds no rows."""
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
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _array_rows(data, start + 1, path) if first == b"[" else _lines(data, start)
            starts = array.array("q")
            for at in found:
                starts.append(at)
                if at - bar.n > 1 << 24:
                    bar.update(at - bar.n)
    return Index({"starts": np.frombuffer(starts, np.int64)}, {})


def sound(index: Index, size: int) -> bool:
    """Whether the rows lie in the file, one behind the other."""
    starts = index.arrays["starts"]
    return len(starts) > 0 and starts[0] >= 0 and starts[-1] <= size and bool((np.diff(starts) >= 0).all())


def probe(index: Index) -> int:
    """Where the last row begins, or -1."""
    return int(index.arrays["starts"][-2]) if len(index.arrays["starts"]) > 1 else -1


def _lines(data: mmap.mmap, at: int) -> Iterator[int]:
    while at < len(data):
        end = data.find(b"\n", at) + 1 or len(data)
        if data[at : min(end, at + 64)].strip() or data[at:end].strip():
            yield at
        at = end
    yield at


def _array_rows(data: mmap.mmap, at: int, path: str) -> Iterator[int]:
    """Offsets of the elements of an array, whose [ is before `at`.

    What is between two of them and no separator is an element, too, so that it is reported and not lost.
    """
    while True:
        at = BETWEEN.match(data, at).end()
        if LAST.match(data, at):
            yield at
            return
        if joined := JOINED.match(data, at):
            at = joined.end()
            continue
        if at == len(data):
            raise ValueError(f"{path!r} is not JSON: the array has no end; the file is cut or broken, fetch it again")
        yield at
        usual = USUAL.match(data, at, at + LONG)
        at = usual.end() if usual else _end(data, at)


def _end(data: mmap.mmap, at: int) -> int:
    """Where the element at `at` ends, whatever it is, however deep or long.

    One that is broken ends before what may be the next row, behind the place where it breaks, or at the array's end.
    """
    begin, depth, before = at, 0, MARK
    while token := TOKEN.match(data, at):
        kind = token.lastindex
        if kind in (VALUE, OPEN) and before in (VALUE, CLOSE) or kind == MARK and before in (OPEN, MARK):
            break  # two values without a comma, or a comma without a value
        if kind == CLOSE and (before == MARK or depth == 0):
            break
        if kind == MARK and depth == 0:
            break
        if kind == VALUE and depth == 0 and not FOLLOWED.match(data, token.end()):
            break  # an open quote
        depth += (kind == OPEN) - (kind == CLOSE)
        at, before = token.end(), kind
        if depth == 0:
            return at
    if found := NEXT[0].search(data, at) if depth else NEXT[1].search(data, begin):
        return found.start() + 1
    last = len(data)
    while last > at and data[last - 1 : last].isspace():
        last -= 1
    return last - 1 if last - 1 > begin and data[last - 1 : last] == b"]" else len(data)
