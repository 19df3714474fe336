"""What is in a tar file, without reading its data: members, and the samples that they form.

Only headers are read. Nothing in a file ends the reading but its end: behind an end mark (zeroed blocks, a tar appended
to another) and behind a header that cannot be right, the next header with a right checksum is looked for. So one bad
member costs what belongs to it, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from blip_jax import buckets
from blip_jax.data.index import Index
from blip_jax.data.remote import Ranges

VERSION = 1
BLOCK = 512  # bytes of a tar block
AHEAD = 4096  # bytes read at a header: small members and the next header are mostly within
PART = 1 << 20  # bytes read at a time, at the most, where headers are looked for
MAX_EXTENDED = 1 << 20  # bytes of an extended header, which holds a name
MAX_START = 1 << 26  # bytes searched for the first header, after which a file is no tar
PICTURES = ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "heic", "heif")
KINDS = (*PICTURES, "txt", "json")
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7z": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
FAULTS = (  # why a sample cannot be used; its number is in the index
    "",
    "tar cut in the middle: the file ends inside this sample",
    "malformed member: its size cannot be right",
    "malformed member: a damaged header",
    "malformed member: sparse members are not read",
    "malformed member: an extended header that cannot be read",
)
CUT, SIZE, DAMAGED, SPARSE, EXTENDED = range(1, len(FAULTS))
PLACES = ("image", "text", "json")
ROW = np.dtype([(f"{name}{part}", "u4") for name in PLACES for part in ("", "_size")] + [("fault", "u1")])
LAYOUT = {
    "rows": ROW,  # of each sample: block (of BLOCK bytes) of a member's data, 0: it has none, and bytes; and its fault
    "ends": np.dtype("u4"),  # where each sample's name ends in the next
    "names": np.dtype("u1"),  # UTF-8, one after another
}
SHOWN = 12  # extensions that are named


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


class Sample(NamedTuple):
    """Members of one name: extension as it is written -> (start, size, fault)."""

    name: str
    members: dict[str, tuple[int, int, int]]


def build(path: str, image_key: str) -> Index:
    """The samples of a tar file, in the order of their first members. ValueError: it is no tar, or a compressed one.

    Members that share a path up to the first dot of its last part are one sample, as for webdataset, also where others
    lie between them. A member that its sample has already begins another one, named with "~2", "~3", ....
    image_key: "image", or the extension of the pictures that are meant.
    """
    samples: list[Sample] = []
    newest: dict[str, Sample] = {}
    names: set[str] = set()
    seen: Counter = Counter()
    unused: Counter = Counter()
    damages: list[tuple[int, Member]] = []  # how many samples began before it
    with contextlib.closing(Ranges(path) if buckets.is_bucket(path) else Local(path)) as file:
        _check(path, file)
        walk = Walk(file)
        for member in walk:
            if not member.name:
                damages.append((len(samples), member))
                continue
            folder, slash, base = member.name.rpartition("/")
            stem, _, ext = base.partition(".")
            if not member.regular or not stem or _kind(ext) not in KINDS:
                kind = "links" if not member.regular else "hidden" if not stem else f".{ext[-20:]}" if ext else "no dot"
                unused[kind] += kind in unused or len(unused) < 100
                continue
            name = folder + slash + stem
            sample = newest.get(name)
            if sample is None or ext in sample.members:
                free = name
                while free in names:
                    seen[name] += 1
                    free = f"{name}~{seen[name] + 1}"
                names.add(free)
                sample = newest[name] = Sample(free, {})
                samples.append(sample)
            sample.members[ext] = member.start, member.size, member.fault
    if not walk.found:
        raise ValueError(f"{path!r} is not a tar file (no header in it): remove it from the list or fetch it again")
    _blame(samples, damages, walk.cut, size=walk.size)
    return _packed(samples, image_key, walk, unused)


def _check(path: str, file: Local | Ranges) -> None:
    """ValueError: an open file is compressed, or too large."""
    head = file.read(4, 0)
    for magic, tool in COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{path!r} is a compressed tar, which has no random access: unpack it once with `{tool}` and give the "
                "plain .tar"
            )
    if file.size >= BLOCK << 32:
        raise ValueError(f"{path!r} has {file.size} bytes, and tars of less than 2 TiB are read: split it")


@functools.lru_cache(1 << 12)
def _kind(ext: str) -> str:
    """What a member is by its extension, of which the last part counts: "v2.JPG" is a jpg."""
    return ext.rpartition(".")[2].lower()


def _whole(sample: Sample, texts: bool) -> bool:
    kinds = {_kind(ext) for ext in sample.members}
    return not kinds.isdisjoint(PICTURES) and (not texts or "txt" in kinds or "json" in kinds)


def _blame(samples: list[Sample], damages: list[tuple[int, Member]], cut: bool, size: int) -> None:
    """Lays each damage to a sample beside it that lacks something, or else to one of its own, so that each is named."""
    texts = any(_kind(ext) in ("txt", "json") for sample in samples for ext in sample.members)
    last = samples[-1].members.values() if samples else ()
    if cut and not any(fault == CUT for _, _, fault in last) and not any(d.fault == CUT for _, d in damages):
        damages.append((len(samples), Member("", size, 0, True, CUT)))
    for before, damage in reversed(damages):
        beside = [samples[before - 1]] if before else []
        if damage.fault != CUT:
            beside += samples[before : before + 1]
        lacking = [sample for sample in beside if not _whole(sample, texts)]
        place = "(rest)" if damage.fault == CUT else f"(byte {damage.start})"
        hurt = lacking[0] if lacking else Sample(place, {})
        if not lacking:
            samples.insert(before, hurt)
        hurt.members["damage"] = damage.start, 0, damage.fault


@functools.lru_cache(1 << 12)
def _chosen(extensions: tuple[str, ...], image_key: str) -> tuple[str | None, str | None, str | None, bool]:
    """Of a sample's members: the picture, the .txt and the .json that belong to it; and whether one is left out.

    The picture is the one with the fewest dots in its extension; of several the first in the order of PICTURES, then
    the first in the shard. A .txt and a .json belong to it that share what is before its last dot ("v2.jpg" and
    "v2.txt"), or else have nothing there, or else come first.
    """
    pictures = [ext for ext in extensions if _kind(ext) in PICTURES]
    wanted = [ext for ext in pictures if image_key in ("image", ext.lower())]
    picture = min(wanted, key=lambda ext: (ext.count("."), PICTURES.index(_kind(ext))), default=None)
    before = (picture or "").rpartition(".")[0]

    def beside(kind: str) -> str | None:
        found = [ext for ext in extensions if _kind(ext) == kind]
        return min(found, key=lambda ext: (ext.rpartition(".")[0] != before, "." in ext), default=None)

    chosen = picture, beside("txt"), beside("json")
    return *chosen, any(ext not in chosen for ext in extensions if _kind(ext) in KINDS)


def _packed(samples: list[Sample], image_key: str, walk: Walk, unused: Counter) -> Index:
    rows, several = [], []
    for sample in samples:
        picture, *texts, left_out = _chosen(tuple(sample.members), image_key)
        row, fault = [], 0
        for ext in (picture, *texts, "damage"):
            start, size, bad = sample.members.get(ext, (0, 0, 0))
            row += [start // BLOCK, min(size, 2**32 - 1)]
            fault = fault or bad
        rows.append((*row[:-2], fault))
        if left_out and picture:
            several.append((sample, " ".join(f".{ext}" for ext in (picture, *texts) if ext)))
    names = [sample.name.encode(errors="backslashreplace") for sample in samples]
    notes = {
        "several": [len(several), *(several[0][0].name[:200], several[0][1][:200])] if several else [0, "", ""],
        "behind": [len(walk.behind), *walk.behind[:1]],
        "rest": walk.rest,
        "unused": dict(unused.most_common(SHOWN)),
    }
    arrays = {
        "rows": np.array(rows, ROW),
        "ends": np.cumsum([len(name) for name in names], dtype=np.uint32),
        "names": np.frombuffer(b"".join(names), np.uint8),
    }
    return Index(arrays, notes)


def sound(index: Index, size: int) -> bool:
    """Whether every member lies in the file or is said not to, the names are whole, and the notes are notes."""
    rows, ends = index.arrays["rows"], index.arrays["ends"]
    whole = [0, *ends[-1:].tolist()][-1] == len(index.arrays["names"]) and len(ends) == len(rows)
    inside = all(
        (rows[place].astype(np.int64) * BLOCK + rows[f"{place}_size"] <= size)[rows["fault"] == 0].all()
        for place in PLACES
    )
    several, behind, rest, unused = (index.notes[name] for name in ("several", "behind", "rest", "unused"))
    noted = [type(x) for x in (*several, *behind, rest, *unused.values())]
    return (
        whole
        and inside
        and bool((np.diff(ends.astype(np.int64)) >= 0).all() and (rows["fault"] < len(FAULTS)).all())
        and noted == [int, str, str, *(int for _ in (*behind, rest, *unused))]
    )


def probe(index: Index) -> int:
    """Where the header of the last sample's first member begins, or -1."""
    row = index.arrays["rows"][-1:]
    first = min((int(row[place][0]) for place in PLACES if len(row) and row[place][0]), default=0)
    return (first - 1) * BLOCK if first else -1
