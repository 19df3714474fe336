"""The headers of a tar file, one after another, whatever is damaged.

Only headers are read. Nothing in a file ends the reading but its end: behind an end mark (zeroed blocks, a tar appended
to another) and behind a header that cannot be right, the next header with a right checksum is looked for. So one bad
member costs what belongs to it, and nothing else.
"""

from __future__ import annotations

import errno
import os
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from blip_jax.data.remote import Ranges

BLOCK = 512  # bytes of a tar block
AHEAD = 4096  # bytes read at a header: small members and the next header are mostly within
PART = 1 << 20  # bytes read at a time, at the most, where headers are looked for
MAX_EXTENDED = 1 << 20  # bytes of an extended header, which holds a name
MAX_START = 1 << 26  # bytes searched for the first header, after which a file is no tar
FAULTS = (  # why a sample cannot be used; its number is in the index
    "",
    "tar cut in the middle: the file ends inside this sample",
    "malformed member: its size cannot be right",
    "malformed member: a damaged header",
    "malformed member: sparse members are not read",
    "malformed member: an extended header that cannot be read",
)
CUT, SIZE, DAMAGED, SPARSE, EXTENDED = range(1, len(FAULTS))


class Member(NamedTuple):
    """A member: its data begin at byte `start`. Without a name: a place at which something is damaged."""

    name: str
    start: int
    size: int
    regular: bool
    fault: int = 0


class _Said(NamedTuple):
    """What extended headers say of the next member."""

    name: str = ""
    fault: int = 0
    size: int | None = None


_NOTHING = _Said()


class Local:
    """A file on this machine, as `remote.Ranges` is one on a bucket. size: bytes."""

    def __init__(self, path: str):
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.size = os.fstat(self._fd).st_size

    def read(self, size: int, at: int) -> bytes:
        """`size` bytes from byte `at` on, fewer at the file's end."""
        return os.pread(self._fd, size, at)

    def written(self, at: int) -> int:
        """The first byte from `at` on that may be other than zero: what was never written need not be read."""
        try:
            return os.lseek(self._fd, at, os.SEEK_DATA)
        except OSError as e:
            return self.size if e.errno == errno.ENXIO else at

    def close(self) -> None:
        os.close(self._fd)


class Walk:
    """Iterates over the members of an open tar file.

    Afterwards: found, whether there was any header; behind, the bytes at which the file went on behind an end mark;
    rest, bytes at the end that are no tar; cut, whether the file ends without an end mark.
    """

    def __init__(self, file: Local | Ranges):
        self._file, self.size = file, file.size
        self._window, self._at = b"", 0  # bytes of the file from `_at` on
        self.found, self.cut, self.rest, self.behind = False, False, 0, []

    def _read(self, at: int, size: int) -> bytes:
        begin = at - self._at
        if begin < 0 or begin + size > len(self._window):
            self._window, self._at, begin = self._file.read(max(size, AHEAD), at), at, 0
        return self._window[begin : begin + size]

    def __iter__(self) -> Iterator[Member]:
        at, last, said = 0, None, _NOTHING  # last: a member that is given once it is known that a header follows it
        while at + BLOCK <= self.size:
            block = self._read(at, BLOCK)
            header = _header(block)
            if header is None:
                if block.strip(b"\0"):
                    given, at = self._behind_damage(at, last)
                    said = _NOTHING
                else:
                    given, at = self._behind_mark(at, last)
                yield from given
                if at is None:
                    return
                last = None
                continue

            self.found = True
            if last:
                yield last
            last = None
            own, size, kind = header
            start, extended = at + BLOCK, kind in b"LKxXg"
            if said.size is not None and not extended:
                size = said.size
            if kind in b"123456":  # links, devices, folders, pipes: nothing follows, whatever the size says
                size = 0
            if not 0 <= size <= self.size - start:
                given, at, said = self._behind_wrong_size(start, size, extended, own, said)
                yield from given
                if at is None:
                    return
                continue

            at = start - (-size // BLOCK) * BLOCK
            if extended:
                said = self._told(said, kind, start, size)
                continue
            if kind != b"5" and not (said.name or own).endswith("/"):  # no folder
                fault = SPARSE if kind == b"S" else said.fault
                last = Member(said.name or own, start, size, kind in b"0\0 7S", fault)
            said = _NOTHING
            if last and kind == b"S":  # the map of its holes may go on for any number of blocks
                yield last
                last, at = None, self._header_from(start, self.size)
                if at is None:
                    return
        if last:
            yield last
        self.cut = True

    def _behind_mark(self, at: int, last: Member | None) -> tuple[list[Member], int | None]:
        """What an end mark at `at` ends, and where the file goes on; None: nowhere."""
        given, data = [last] if last else [], self._data_from(at)
        if data >= self.size:
            self.found = True  # zeros alone are an empty tar
            return given, None
        following = data if _header(self._read(data, BLOCK)) else self._header_from(data, self.size)
        if following is None:
            self.rest = self.size - data
            return given, None
        self.behind.append(at)
        return given + [Member("", data, 0, True, DAMAGED)] * (following > data), following

    def _behind_damage(self, at: int, last: Member | None) -> tuple[list[Member], int | None]:
        """The same of a header that is damaged, or where the size of the last member is wrong and hides headers."""
        inside = self._header_from(last.start, at) if last else None
        following = inside or self._header_from(at + BLOCK, self.size if self.found else MAX_START)
        if following is None and not self.found:
            return [], None
        given = [last._replace(fault=SIZE) if inside else last] if last else []
        if not inside:
            given.append(Member("", at, 0, True, DAMAGED))
        self.cut |= following is None
        return given, following

    def _behind_wrong_size(
        self, start: int, size: int, extended: bool, name: str, said: _Said
    ) -> tuple[list[Member], int | None, _Said]:
        """The same of a header whose size cannot be right, unless the file is cut, and what is said from there on."""
        following = self._header_from(start, self.size)
        cut = following is None and size >= 0
        self.cut |= cut
        if extended and not cut:
            return [], following, said._replace(fault=EXTENDED)
        wrong = said.fault or (CUT if cut else SIZE)
        return [Member("" if extended else said.name or name, start, 0, True, wrong)], following, _NOTHING

    def _told(self, said: _Said, kind: bytes, start: int, size: int) -> _Said:
        """`said` and what an extended header says besides."""
        if kind not in b"LxX":
            return said
        if size > MAX_EXTENDED:
            return said._replace(fault=EXTENDED)
        data = self._read(start, size)
        if kind == b"L":
            return said._replace(name=said.name or _text(data.split(b"\0")[0]))
        records = _records(data)
        if records is None:
            return said._replace(fault=EXTENDED)
        name = records.get("GNU.sparse.name") or records.get("path") or said.name
        sparse = any(key.startswith("GNU.sparse") for key in records)
        size_of = _number(records["size"].encode()) if "size" in records else said.size
        return _Said(name, SPARSE if sparse else said.fault, size_of)

    def _data_from(self, at: int) -> int:
        """The first block from `at` on that is not all zeros; the size of the file or more: there is none."""
        part = AHEAD
        while at < self.size:
            at = max(at, self._file.written(at) // BLOCK * BLOCK)
            data = self._file.read(part, at) if at < self.size else b""
            if not data:
                return self.size
            if left := len(data.lstrip(b"\0")):
                return at + (len(data) - left) // BLOCK * BLOCK
            at, part = at + len(data), min(2 * part, PART)
        return at

    def _header_from(self, at: int, end: int) -> int | None:
        """The first block in `at` to `end` that is a header with a right checksum."""
        part = AHEAD
        while at + BLOCK <= end:
            data = self._file.read(min(part, end - at), at)
            blocks = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
            if not len(blocks):
                return None
            for k in np.flatnonzero((blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(axis=1)).tolist():
                if _header(blocks[k].tobytes()):
                    return at + k * BLOCK
            at, part = at + blocks.size, min(2 * part, PART)
        return None


def _header(block: bytes) -> tuple[str, int, bytes] | None:
    """(name, size, -1 where it is none, kind) of a header; None: its checksum is wrong, or it is shorter."""
    if len(block) < BLOCK or block[0:1] == b"\0":
        return None
    written = block[148:156]
    # adler32 has 1 + the sum of all bytes, modulo 65521, in its lower half, and takes a tenth of the time of `sum`
    if (1 + _number(written) + sum(written) - 8 * 32) % 65521 != zlib.adler32(block) & 0xFFFF:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return _text(name), _number(block[124:136]), block[156:157]


def _number(field: bytes) -> int:
    """An octal number, or a binary one as GNU writes large ones; -1: none, or a negative one."""
    try:
        return max(int(field.rstrip(b"\0 "), 8), -1)  # as nearly all are written
    except ValueError:
        pass
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits = field.split(b"\0", 1)[0].strip()
    try:
        return max(int(digits or b"0", 8), -1)
    except ValueError:
        return -1


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


def _records(data: bytes) -> dict[str, str] | None:
    """The "<length> <name>=<value>" lines of an extended header; None: they are none."""
    out, at = {}, 0
    while at < len(data) and data[at]:
        head = re.compile(rb"(\d{1,20}) ([^=]+)=").match(data, at)
        end = at + int(head[1]) if head else 0
        if not head or not head.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            return None
        out[_text(head[2])] = _text(data[head.end() : end - 1])
        at = end
    return out
