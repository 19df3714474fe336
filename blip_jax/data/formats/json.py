"""BLIP's lists of {image, caption, image_id}, as one JSON array or JSON lines, beside a folder of pictures."""

from __future__ import annotations

import array
import bisect
import json
import os
import re
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from blip_jax.data.folders import check_links, image_folder, read_image
from blip_jax.data.source import MAX_BYTES, BadRecord, Source, as_captions, expand, read_at

LOOKED_AT = 100  # first rows of a list that decide at opening whether it is the right kind of file


class JsonRows(Source):
    """Rows {image, caption: str | [str], image_id} of JSON arrays or JSON lines; only 8 bytes a row are kept in memory.

    Image paths are taken below cfg.images ("": the folder of the list) and may not leave it, whatever links they pass.
    A row without image_id has its image path as id. The key is "<image path>#<row>", or "<list>#<row>" where there is
    no path.
    """

    def __init__(self, name: str, cfg):
        self._image_key, self._caption_key = cfg.image_key, cfg.caption_key
        self._files = expand(name, cfg)
        self._folders = [image_folder(name, cfg, f) for f in self._files]
        self._starts = [_row_offsets(f) for f in self._files]  # byte offsets of rows, and of the end
        self._ends = np.cumsum([len(s) - 1 for s in self._starts]).tolist()
        self._check(name)

    def _check(self, name: str) -> None:
        """The first rows of each list show whether its fields are what the config says."""
        first = 0
        for path, folder, end in zip(self._files, self._folders, self._ends):
            rows = [r for r in map(self._peek, range(first, min(first + LOOKED_AT, end))) if r is not None]
            if end > first and not rows:
                raise ValueError(
                    f"data source {name!r}: {path!r} holds no JSON objects in its first rows; BLIP's layout is "
                    '[{"image": "a.jpg", "caption": "..."}, ...], or one such object a line'
                )
            for field, leaf in ((self._image_key, "image_key"), (self._caption_key, "caption_key")):
                if rows and not any(field in r for r in rows):
                    raise ValueError(
                        f"data source {name!r}: no row at the start of {path!r} has the field {field!r}; the fields "
                        f"are {sorted(rows[0])[:12]}: set `{leaf}`, or give a list in BLIP's layout"
                    )
            check_links(name, folder, (r.get(self._image_key) for r in rows))
            first = end

    def _peek(self, i: int) -> dict | None:
        try:
            return self._row(i)[2]
        except BadRecord:
            return None

    def __len__(self) -> int:
        return self._ends[-1]

    def _row(self, i: int) -> tuple[str, int, dict]:
        """Row `i`: "<list>#<row>", the number of its file, and the object."""
        f = bisect.bisect_right(self._ends, i)
        starts, k = self._starts[f], i - (self._ends[f - 1] if f else 0)
        key = f"{os.path.basename(self._files[f])}#{k}"
        start, size = int(starts[k]), int(starts[k + 1] - starts[k])
        if size > MAX_BYTES:
            raise BadRecord(key, f"malformed row: {size} bytes at byte {start}")
        try:
            row = json.loads(read_at(self._files[f], start, size).strip(b" \t\r\n,"), strict=False)
        except (ValueError, RecursionError) as e:
            raise BadRecord(key, f"malformed row: not JSON at byte {start}: {e}") from None
        except OSError as e:
            raise BadRecord(key, f"unreadable file: {e}") from None
        if not isinstance(row, dict):
            raise BadRecord(key, f"malformed row: an object is expected, not {str(row)[:80]!r}")
        return key, f, row

    def captions_of(self, i: int) -> list[str]:
        key, _, row = self._row(i)
        return as_captions(self._key(i, key, row), row.get(self._caption_key))

    def _key(self, i: int, key: str, row: dict) -> str:
        image = row.get(self._image_key)
        if not isinstance(image, str) or not image:
            raise BadRecord(key, f"malformed row: {self._image_key!r} is {str(image)[:80]!r}, not a path")
        return f"{image}#{i}"

    def __getitem__(self, i: int) -> dict:
        key, f, row = self._row(i)
        key, image = self._key(i, key, row), row[self._image_key]
        return {
            "key": key,
            "image": read_image(key, self._folders[f], image),
            "captions": as_captions(key, row.get(self._caption_key)),
            "image_id": str(row.get("image_id", image)),
        }


def _row_offsets(path: str) -> np.ndarray:
    """i64[rows + 1]: byte offsets of the rows of a JSON array or JSON lines file, and the end of the last."""
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
        f.seek(start + (first == b"["))
        rows = array.array("q", _array_rows(f, path, bar) if first == b"[" else _lines(f, bar))
    return np.frombuffer(rows, np.int64)


def _lines(f, bar) -> Iterator[int]:
    at = f.tell()
    for line in f:
        if not line.isspace():
            yield at
        at += len(line)
        bar.update(len(line))
    yield at


_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_ROW = rb"(?!)"
for _ in range(6):  # an object, with objects inside it to this depth; strings may hold any bracket
    _ROW = rb'\{(?:[^{}"]++|' + _STRING + rb"|" + _ROW + rb")*+\}"
_NEXT_ROW = re.compile(rb"[\s,]*+(" + _ROW + rb")", re.DOTALL)
_BETWEEN = re.compile(rb"[\s,]*+")
_BLOCK = 1 << 20  # bytes; also the longest row that is looked for


def _array_rows(f, path: str, bar) -> Iterator[int]:
    """Offsets of the rows of a JSON array whose [ has been read, without parsing them.

    What is between two rows and no separator becomes a row too, so that it is reported and not lost.
    """
    # buf: what has been read and not yet passed, which begins at offset `base` of the file; pos: how far it is read
    base, buf, pos, more = f.tell(), b"", 0, True
    while True:
        if more and len(buf) - pos < _BLOCK:
            block = f.read(_BLOCK)
            more = bool(block)
            base, buf, pos = base + pos, buf[pos:] + block, 0
            bar.update(len(block))

        if m := _NEXT_ROW.match(buf, pos):
            yield base + m.start(1)
            pos = m.end()
            continue

        # no row begins here: the end of the array, or something that is no separator
        pos = _BETWEEN.match(buf, pos).end()
        if more and len(buf) - pos < _BLOCK:
            continue
        if buf[pos : pos + 1] == b"]" and not more and not buf[pos + 1 :].strip():
            yield base + pos
            return
        yield base + pos
        m = _NEXT_ROW.search(buf, pos + 1)
        pos = m.start() if m else len(buf)
        if not (m or more):
            last = buf.rstrip()
            if not last.endswith(b"]"):
                raise ValueError(
                    f"{path!r} is not JSON: the array has no end; the file is cut or broken, fetch it again"
                )
            yield base + len(last) - 1
            return
