"""ArrayRecord files of msgpack maps {key, image, captions, image_id}: reading and writing.

Beside FILE there may be FILE.captions.jsonl: a line that says which FILE it belongs to, then for each record a line
with the list of its captions, so that text.buckets finds them without the pictures. `blip-jax pack` writes both.

Nothing that a file claims is believed before it is bounded: the sizes of its table of contents and of each piece that
would be unpacked stand in its headers (github.com/google/riegeli, doc/riegeli_records_file_format.md) and are read
first.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import resource
import struct
import uuid
from collections.abc import Callable, Iterable

import msgpack
import numpy as np
import pyarrow as pa
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from blip_jax import buckets
from blip_jax.data.source import MAX_BYTES, BadRecord, Source, as_captions, expand, image_id, in_keys, read_at

FORMAT = "group_size:1,uncompressed"  # random access; pictures are compressed already
CAPTIONS = ".captions.jsonl"  # behind the name of the file whose texts it holds
FIELDS = 1000  # of a record, and
FIELD_BYTES = 1 << 20  # the longest that is neither bytes nor one text, as each of its bytes may become an object
THREADS = 16  # that read the tables of contents
BLOCK, BLOCK_HEADER = 1 << 16, 24  # bytes; a header lies at the start of each block, also in the middle of a chunk
CHUNK = struct.Struct("<8xQ8xQQ")  # of a chunk's header: bytes that follow, kind | records << 8, bytes unpacked
MAGIC = b"\x10\xde\xc0\xeb\xfe\x84\xce\xc3\xc9\x71"  # behind the place of the table of contents
CODECS = {ord("z"): "zstd", ord("b"): "brotli", ord("s"): "snappy"}


class ArrayRecords(Source):
    """ArrayRecord files of msgpack maps {key, image, captions, image_id}, as `blip-jax pack` writes them.

    The key is the one that the record was written with, behind "<source>:" unless it begins so: what a source was
    packed into has its keys under its name, and two sources never share one. `captions_of` is there where each file
    has its captions beside it. 24 bytes a record are kept.
    """

    def __init__(self, name: str, cfg):
        self.name, paths = name, expand(name, cfg)
        self._names = in_keys(paths)
        try:
            with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
                self._files = list(pool.map(RecordFile, paths))
                self._captions = list(pool.map(_beside, self._files))
        except (ValueError, OSError) as e:
            raise ValueError(f"data source {name!r}: {e}") from None
        self._ends = np.cumsum([len(f) for f in self._files]).tolist()
        self._reader = functools.lru_cache(_open_files())(open_reader)
        if None not in self._captions:
            self.captions_of = self._captions_of

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, i: int) -> tuple[int, int, str]:
        """Number of the file of record `i`, its number there, and what it is called where its key cannot be read."""
        f = bisect.bisect_right(self._ends, i)
        k = i - (self._ends[f - 1] if f else 0)
        return f, k, f"{self.name}:{self._names[f]}#{k}"

    def _captions_of(self, i: int) -> list[str]:
        f, k, key = self._place(i)
        return self._captions[f].read(key, k)

    def __getitem__(self, i: int) -> dict:
        f, k, key = self._place(i)
        data = self._files[f].read(key, k, self._reader)
        try:
            record = unpack(data)
            own, image = record["key"], record["image"]
        except (ValueError, KeyError) as e:
            raise BadRecord(key, f"malformed record: {type(e).__name__}: {e}") from None
        if not isinstance(own, str) or not isinstance(image, bytes):
            raise BadRecord(key, f"malformed record: key must be text and image bytes, the key is {str(own)[:80]!r}")
        key = own if own.startswith(f"{self.name}:") else f"{self.name}:{own}"
        return {
            **record,
            "key": key,
            "captions": as_captions(key, record.get("captions")),
            "image_id": image_id(record.get("image_id"), key),
        }


class RecordFile:
    """One ArrayRecord file by record number. ValueError: it is none, or cut."""

    def __init__(self, path: str):
        self.path = path
        try:
            self._offsets, self._ends = _contents(path)
        except (ValueError, IndexError, struct.error, OSError) as e:
            raise ValueError(f"{path!r} is not ArrayRecord ({e}); `blip-jax pack` writes such files") from None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, key: str, k: int, reader: Callable[[str], ArrayRecordReader]) -> bytes:
        """Record `k`, by the reader of a path. BadRecord: it is damaged, or larger than MAX_BYTES, unpacked or not."""
        chunk = np.searchsorted(self._ends, k, "right")
        try:
            head, _ = _logical(self.path, int(self._offsets[chunk]), CHUNK.size)
            _, kind, size = CHUNK.unpack(head)
            if size > MAX_BYTES:
                of = f" of {kind >> 8} records that were packed together (group_size)" if kind >> 8 > 1 else ""
                raise BadRecord(key, f"record too large: {size} bytes unpacked{of}, at most {MAX_BYTES} are read")
            return reader(self.path).read([k])[0]
        except BadRecord:
            raise
        except Exception as e:  # the reader's own types vary with its version
            raise BadRecord(key, f"malformed record: {type(e).__name__}: {' '.join(str(e).split())[:300]}") from None


def open_reader(path: str) -> ArrayRecordReader:
    """A reader of single records, which looks at nothing before it is asked for it."""
    return ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15)


def _open_files() -> int:
    """Readers that stay open: half of the files that a process may have."""
    return max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 16)


def _beside(file: RecordFile) -> Captions | None:
    """The captions beside a file. ValueError: they are another's."""
    if not buckets.is_file(file.path + CAPTIONS):
        return None
    captions = Captions(file.path + CAPTIONS)
    found, wanted = (len(captions), captions.about.get("bytes")), (len(file), buckets.size(file.path))
    if found != wanted:
        raise ValueError(
            f"{captions.path!r} is of another file, of {found[0]} records and {found[1]} bytes, not {wanted[0]} and "
            f"{wanted[1]}: remove it, or pack the source anew"
        )
    return captions


class Captions:
    """A file of captions beside records. `about`: what its first line says. ValueError: it is none."""

    def __init__(self, path: str):
        self.path, self._starts = path, _lines(path)
        try:
            self.about = json.loads(self._line(0))
        except (ValueError, RecursionError, IndexError, OSError) as e:
            raise ValueError(f"{path!r} is no file of captions ({e}): remove it, or pack the source anew") from None
        if not isinstance(self.about, dict):
            raise ValueError(f"{path!r} is no file of captions: remove it, or pack the source anew")

    def __len__(self) -> int:
        return len(self._starts) - 2

    def _line(self, n: int) -> bytes:
        start, size = int(self._starts[n]), int(self._starts[n + 1] - self._starts[n])
        if size > FIELD_BYTES:
            raise ValueError(f"a line of {size} bytes, at most {FIELD_BYTES} are read")
        return read_at(self.path, start, size)

    def read(self, key: str, k: int) -> list[str]:
        """The captions of record `k`, which `key` names where they are malformed."""
        try:
            return as_captions(key, json.loads(self._line(k + 1)))
        except (ValueError, RecursionError, OSError) as e:
            raise BadRecord(key, f"malformed caption: {type(e).__name__}: {e}") from None


def _lines(path: str) -> np.ndarray:
    """i64[lines + 1]: where each line begins, and the end of the last."""
    found, at = [np.zeros(1, np.int64)], 0
    with buckets.opened(path) as file:
        while block := file.read(1 << 24):
            found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + (at + 1))
            at += len(block)
    return np.concatenate(found)


# --- the table of contents


def _contents(path: str) -> tuple[np.ndarray, np.ndarray]:
    """i64[chunks]: where each chunk of records begins, and the number of records up to its end."""
    size = buckets.size(path)
    if not size or size % BLOCK:
        raise ValueError(f"{size} bytes; it is cut or something else")
    sizes, values = _texts(path, size - BLOCK, size)
    end = values[: int(sizes[0])]
    if not end.endswith(MAGIC) or end[:1] != b"\x08":
        raise ValueError("no table of contents at its end")

    sizes, values = _texts(path, int(_varints(end[1 : -len(MAGIC)])[0]), size)
    first = int(sizes[0])  # what the writer says of itself
    numbers = _varints(values[first:])
    fields, numbers = numbers[0::2], numbers[1::2]
    if len(fields) != len(numbers) or not np.isin(fields, (8, 16, 24)).all():
        raise ValueError("a damaged table of contents")
    # of each chunk one message: where it begins (8), bytes (16), records (24)
    ends = np.cumsum(sizes[1:].astype(np.int64))
    lengths = _lengths(values[first:])
    chunk = np.searchsorted(ends, (np.cumsum(lengths) - lengths)[0::2], "right")
    offsets, counts = np.zeros((2, len(ends)), np.int64)
    offsets[chunk[fields == 8]] = numbers[fields == 8]
    counts[chunk[fields == 24]] = numbers[fields == 24]
    if (offsets < 0).any() or (offsets >= size).any() or (counts < 0).any() or counts.sum() > MAX_BYTES:
        raise ValueError("a damaged table of contents")
    return offsets, np.cumsum(counts)


def _texts(path: str, at: int, size: int) -> tuple[np.ndarray, bytes]:
    """The chunk at `at`, one of single records: u64[n], how long each is, and all of them. ValueError: it is none."""
    header, at = _logical(path, at, CHUNK.size)
    length, kind, unpacked = CHUNK.unpack(header)
    n = kind >> 8
    # each record of the table stands for a chunk, whose header takes 40 bytes of the file
    if kind & 255 != ord("r") or not 0 < n <= size // 40 + 3 or unpacked > 64 * n + 4096 or length > 80 * n + 8192:
        raise ValueError("no table of contents")
    body, _ = _logical(path, at, length)
    if len(body) < length:
        raise ValueError("cut in its table of contents")
    packed, (shorter, rest) = body[0], _varint(body[1:])
    sizes, values = rest[:shorter], rest[shorter:]
    if packed:
        sizes, values = (_decompressed(packed, part, 64 * n + 4096) for part in (sizes, values))
    sizes = _varints(sizes)
    if len(sizes) != n or sizes.max() > len(values) or int(sizes.sum()) != len(values):
        raise ValueError("a damaged table of contents")
    return sizes, values


def _decompressed(kind: int, data: bytes, most: int) -> bytes:
    size, data = _varint(data)
    if kind not in CODECS or size > most:
        raise ValueError("a damaged table of contents")
    return pa.Codec(CODECS[kind]).decompress(data, size, asbytes=True) if size else b""


def _logical(path: str, at: int, n: int) -> tuple[bytes, int]:
    """`n` bytes from `at` on without the headers of blocks between them, and where they end."""
    data = read_at(path, at, n + BLOCK_HEADER * (n // (BLOCK - BLOCK_HEADER) + 2))
    parts, start = [], at
    while n > 0:
        if at % BLOCK == 0:
            at += BLOCK_HEADER
        part = data[at - start : at - start + min(n, BLOCK - at % BLOCK)]
        if not part:
            break
        parts.append(part)
        at, n = at + len(part), n - len(part)
    return b"".join(parts), at


def _varint(data: bytes) -> tuple[int, bytes]:
    """The number that `data` begins with, and the rest."""
    (length,) = _lengths(data[:10])[:1]
    return int(_varints(data[:length])[0]), data[length:]


def _lengths(data: bytes) -> np.ndarray:
    """i64[n]: bytes of each of the numbers of seven bits a byte, the last with the highest bit clear."""
    last = np.flatnonzero(np.frombuffer(data, np.uint8) < 128)
    return np.diff(last, prepend=-1)


def _varints(data: bytes) -> np.ndarray:
    """u64[n]: the numbers of seven bits a byte. ValueError: the last has no end, or one is longer than 64 bits."""
    raw, lengths = np.frombuffer(data, np.uint8), _lengths(data)
    if lengths.sum() != len(raw) or (len(lengths) and lengths.max() > 10):
        raise ValueError("a damaged table of contents")
    starts, out = np.cumsum(lengths) - lengths, np.zeros(len(lengths), np.uint64)
    for k in range(int(lengths.max(initial=0))):
        longer = lengths > k
        out[longer] |= (raw[starts[longer] + k] & 127).astype(np.uint64) << np.uint64(7 * k)
    return out


# --- records


def unpack(data: bytes) -> dict:
    """The msgpack map that `data` is. ValueError: it is none, or holds more than FIELDS or FIELD_BYTES allow."""
    items = msgpack.Unpacker(max_buffer_size=len(data) + 1)
    items.feed(data)
    try:
        n = items.read_map_header()
        if n > FIELDS:
            raise ValueError(f"{n} fields, at most {FIELDS} are read")
        pieces, at = [], items.tell()
        for _ in range(2 * n):
            items.skip()  # makes nothing of it
            pieces.append(memoryview(data)[at : items.tell()])
            at = items.tell()
    except (msgpack.UnpackException, RecursionError) as e:
        raise ValueError(f"{type(e).__name__}: {e}") from None
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes behind its end")
    values = map(_unpacked, pieces)
    fields = dict(zip(values, values))
    if not all(isinstance(name, str) for name in fields):
        raise ValueError("names of fields must be texts")
    return fields


def _unpacked(piece):
    """The msgpack value that `piece` is. ValueError: it is none, or a longer list or map than FIELD_BYTES."""
    if len(piece) > FIELD_BYTES and piece[0] not in (0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB):
        raise ValueError(f"a field of {len(piece)} bytes, at most {FIELD_BYTES} are read")
    try:
        return msgpack.unpackb(piece, unicode_errors="surrogatepass")
    except (msgpack.UnpackException, RecursionError, TypeError, IndexError) as e:
        raise ValueError(f"{type(e).__name__}: {e}") from None


def pack(n: int, record: dict) -> bytes:
    """Record number `n` {key: str, image: bytes, captions: [str], ...} as an ArrayRecord file holds it."""
    if not isinstance(record.get("key"), str) or not isinstance(record.get("image"), bytes):
        raise ValueError(f"record {n} needs a text `key` and an `image` of bytes, got the fields {sorted(record)}")
    return msgpack.packb(record, unicode_errors="surrogatepass")


def write_array_record(path: str | os.PathLike, records: Iterable[dict]) -> int:
    """Writes records {key: str, image: bytes, captions: [str], ...} to one ArrayRecord file; returns how many.

    Further fields may be anything msgpack holds. The file appears under its name only when it is complete.
    """
    with Writing(path) as file:
        for record in records:
            file.add(record)
        file.commit()
    return len(file)


class Writing:
    """An ArrayRecord file while it is made. `commit` makes it appear under its name; without, leaving drops it.

    beside: local folder for the unfinished file, by default that of `path`, which may be on a bucket.
    """

    def __init__(self, path: str | os.PathLike, beside: str | os.PathLike | None = None):
        self.path = path if buckets.is_bucket(path) else pathlib.Path(path)
        self._part = pathlib.Path(beside or self.path.parent) / f"{self.path.name}.{uuid.uuid4().hex[:8]}.part"
        self._writer = ArrayRecordWriter(str(self._part), FORMAT)
        self._captions: list[list[str]] = []

    def __len__(self) -> int:
        return len(self._captions)

    def add(self, record: dict) -> None:
        """Appends a record {key: str, image: bytes, captions: [str], ...}."""
        self._writer.write(pack(len(self), record))
        self._captions.append(record.get("captions"))

    def commit(self, about: dict | None = None) -> None:
        """Finishes the file; with `about`, what their first line says besides, also that of the captions beside it."""
        self._writer.close()
        _sync(self._part)
        if about is not None:
            # the captions first: where the file is, they are
            rows = ({**about, "bytes": self._part.stat().st_size}, *self._captions)
            captions = self._part.with_suffix(CAPTIONS)
            try:
                with open(captions, "w", encoding="ascii") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
                _sync(captions)
                buckets.put(captions, self.path.with_name(f"{self.path.name}{CAPTIONS}"))
            finally:
                captions.unlink(missing_ok=True)
        buckets.put(self._part, self.path)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *exc) -> None:
        with contextlib.suppress(RuntimeError):  # closed already, or not wanted any more
            self._writer.close()
        self._part.unlink(missing_ok=True)


def _sync(path: pathlib.Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
