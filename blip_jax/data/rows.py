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
CLOSES = {b"}": b"{", b"]": b"["}
CLOSED = (b"v", b"}", b"]")  # after these a value is complete
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
    left = len(data)  # bytes that may be looked at in vain: a file full of broken rows must not take for ever
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
        if usual := USUAL.match(data, at, at + LONG):
            at = usual.end()
            continue
        end, broken_at = _end(data, at, len(data) if left > 0 else at)
        if broken_at is None:
            at = end
        else:
            left -= broken_at - at
            at = _behind(data, at, end, broken_at)


def _end(data: mmap.mmap, begin: int, limit: int) -> tuple[int, int | None]:
    """Where the element at `begin` ends, whatever it is, however deep or long; and None, or where it proves broken.

    Of a broken one the end is where it is broken, or `begin`, if it is no object or array, or never ends.
    """
    at, before, opened = begin, b",", bytearray()  # before: the first byte of the last token, or b"v" for a value
    closed = begin  # where the last object or array ended
    while token := TOKEN.match(data, at, limit):
        kind, mark = token.lastindex, token[token.lastindex][:1]
        inside = opened[-1:]  # {, [ or nothing
        if kind == MARK:
            wrong = before not in CLOSED or not opened
        elif kind == CLOSE:
            wrong = before in b",:" or CLOSES.get(mark) != bytes(inside)
        else:
            wrong = before in CLOSED or (kind == OPEN and inside == b"{" and before != b":")
        if wrong:
            return (begin if not opened else closed if before == b"," and kind == OPEN else at), at
        if kind == OPEN:
            opened += mark
        elif kind == CLOSE:
            opened.pop()
            closed = token.start(kind)
        at, before = token.end(), b"v" if kind == VALUE else mark
        if not opened:
            open_quote = kind == VALUE and not FOLLOWED.match(data, at)
            return (begin, at) if open_quote else (at, None)
    return begin, at


def _behind(data: mmap.mmap, begin: int, end: int, broken_at: int) -> int:
    """Where a broken element of `_end` ends: before what may be the next row, or at the array's end."""
    nested = end > begin or data[begin : begin + 1] in (b"{", b"[")
    if found := NEXT[0].search(data, end) if nested else NEXT[1].search(data, begin):
        return found.start() + 1
    last = len(data)
    while last > broken_at and data[last - 1 : last].isspace():
        last -= 1
    return last - 1 if last - 1 > begin and data[last - 1 : last] == b"]" else len(data)
