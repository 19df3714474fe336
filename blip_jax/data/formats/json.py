"""BLIP's lists of {image, caption, image_id}, as one JSON array or JSON lines, beside a folder of pictures; or COCO's
official caption files, which are told by their beginning (blip_jax/data/coco.py)."""

from __future__ import annotations

import bisect
import json
import os

import numpy as np

from blip_jax.data import coco, rows
from blip_jax.data.folders import check_links, image_folder, read_image
from blip_jax.data.index import indexes
from blip_jax.data.source import (
    MAX_TEXT,
    BadRecord,
    Source,
    as_captions,
    expand,
    field_of,
    image_id,
    in_keys,
    read_at,
)

MAX_PATH = 300  # letters of an image path that a key shows
LOOKED_AT = 100  # first rows of a list that decide at opening whether it is the right kind of file


def open(name: str, cfg) -> Source:
    """Opens the files of a config.source. ValueError: they are neither BLIP's lists nor COCO's files, or both."""
    official = coco.open(name, cfg)
    return JsonRows(name, cfg) if official is None else official


class JsonRows(Source):
    """Rows {image, caption: str | [str], image_id} of JSON arrays or JSON lines; only 8 bytes a row are kept in memory.

    Image paths are taken below cfg.images ("": the folder of the list) and may not leave it, whatever links they pass.
    A row without image_id has its image path as id. The key is "<source>:<list>#<row>:<image path>", without the last
    part where there is no path. Fields are named by cfg.image_key and cfg.caption_key; "a/b" is a nested one.
    """

    def __init__(self, name: str, cfg):
        self._image_key, self._caption_key = cfg.image_key, cfg.caption_key
        self._files = expand(name, cfg)
        self._folders = [image_folder(name, cfg, f) for f in self._files]
        self._names = [f"{name}:{file}" for file in in_keys(self._files)]
        roots = [folder.path for folder in self._folders]
        shared = os.path.commonpath(roots)
        self._below = [os.path.relpath(root, shared) for root in roots]  # tells equal paths of two roots apart
        # byte offsets of rows, and of the end
        self._starts = [index.arrays["starts"] for index in indexes(rows, self._files, {}, name)]
        self._ends = np.cumsum([len(s) - 1 for s in self._starts]).tolist()
        self._check(name)

    def _check(self, name: str) -> None:
        """The first rows of each list show whether its fields are what the config says."""
        first = 0
        for path, folder, end in zip(self._files, self._folders, self._ends):
            found = [r for r in map(self._peek, range(first, min(first + LOOKED_AT, end))) if r is not None]
            if end > first and not found:
                raise ValueError(
                    f"data source {name!r}: {path!r} holds no JSON objects in its first rows; BLIP's layout is "
                    '[{"image": "a.jpg", "caption": "..."}, ...], or one such object a line'
                )
            for field, leaf in ((self._image_key, "image_key"), (self._caption_key, "caption_key")):
                if not found or any(field_of(row, field, self) is not self for row in found):
                    continue
                problem = (
                    f"no row at the start of {path!r} has the field {field!r}; the fields are {sorted(found[0])[:12]}: "
                    f"set `{leaf}`, or give a list in BLIP's layout"
                )
                if leaf == "image_key" or field != "caption":
                    raise ValueError(f"data source {name!r}: {problem}")
                self.without_texts = problem
            check_links(name, folder, (r.get(self._image_key) for r in found))
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
        key = f"{self._names[f]}#{k}"
        start, size = int(starts[k]), int(starts[k + 1] - starts[k])
        if size > MAX_TEXT:
            raise BadRecord(key, f"malformed row: {size} bytes at byte {start}, at most {MAX_TEXT} are read")
        try:
            text = read_at(self._files[f], start, size).strip(b" \t\r\n,")
            if text.endswith(b"["):  # the array ends here and another one begins
                text = text[:-1].rstrip().removesuffix(b"]")
            row = json.loads(text, strict=False)
        except ValueError as e:
            raise BadRecord(key, f"malformed row: not JSON at byte {start}: {e}") from None
        except RecursionError:
            raise BadRecord(key, f"malformed row: nested too deep at byte {start}") from None
        except OSError as e:
            raise BadRecord(key, f"unreadable file: {e}") from None
        if not isinstance(row, dict):
            raise BadRecord(key, f"malformed row: an object is expected, not {str(row)[:80]!r}")
        return key, f, row

    def captions_of(self, i: int) -> list[str]:
        key, _, row = self._row(i)
        key, _ = self._image(key, row)
        return self._captions(key, row)

    def _captions(self, key: str, row: dict) -> list[str]:
        return as_captions(key, field_of(row, self._caption_key))

    def _image(self, key: str, row: dict) -> tuple[str, str]:
        """The key of a row with the path of its image, and this path. BadRecord: it has none."""
        image = field_of(row, self._image_key)
        if not isinstance(image, str) or not image:
            raise BadRecord(key, f"malformed row: {self._image_key!r} is {str(image)[:80]!r}, not a path")
        shown = image[:MAX_PATH].encode(errors="backslashreplace").decode()  # a name on disk need not be text
        return f"{key}:{shown}", image

    def __getitem__(self, i: int) -> dict:
        key, f, row = self._row(i)
        key, image = self._image(key, row)
        return {
            "key": key,
            "image": read_image(key, self._folders[f], image),
            "captions": self._captions(key, row),
            "image_id": image_id(row.get("image_id"), os.path.normpath(os.path.join(self._below[f], image))),
        }
