"""COCO's official caption files (cocodataset.org): captions_train2017.json, captions_val2014.json, image_info_*.json.

One JSON object, {"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}. Each picture is
a record with all its captions; files without annotations are pictures alone. A file is parsed once, as a whole; the
index (blip_jax/data/index.py) holds what is used of it.
"""

from __future__ import annotations

import bisect
import json
import pathlib
import re
import sys
from collections.abc import Sequence

import numpy as np

from blip_jax.data.folders import check_links, image_folder, read_image, there
from blip_jax.data.index import Index, indexes
from blip_jax.data.pieces import parsed
from blip_jax.data.source import MAX_TEXT, Source, expand, field_of, image_id, in_keys, read_at

VERSION = 1
LAYOUT = {
    "ids": np.dtype("i8"),  # of each picture
    "captions": np.dtype("i8"),  # the number of its last caption and 1
    "name_ends": np.dtype("i8"),  # where its path ends in
    "names": np.dtype("u1"),  # UTF-8, one after another
    "text_ends": np.dtype("i8"),  # where each caption ends in
    "texts": np.dtype("u1"),
}
BEGINNING = re.compile(rb'\s*\{\s*"(?:info|images|annotations|licenses|categories|type)"\s*:')
LOOKED_AT = 100  # first pictures of a file of which one at least must be there


def is_one(path: str) -> bool:
    """Whether a file has this layout, by its beginning, and is no list of lines that begin alike."""
    try:
        if not BEGINNING.match(read_at(path, 0, 4096).removeprefix(b"\xef\xbb\xbf")):
            return False
        row = json.loads(read_at(path, 0, MAX_TEXT).removeprefix(b"\xef\xbb\xbf").strip().split(b"\n")[0])
    except OSError:
        return False
    except (ValueError, RecursionError):  # spread over lines, or longer than a row of a list may be
        return True
    return isinstance(row.get("images"), list) and all(isinstance(image, dict) for image in row["images"])


def build(path: str, image_key: str, caption_key: str) -> Index:
    """The index of one file. ValueError: what of it is not of this layout."""
    try:
        content = parsed(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path!r} begins as COCO's captions do and is no JSON: {type(e).__name__}: {e}") from None
    images, annotations = content.get("images"), content.get("annotations", [])
    if not all(isinstance(rows, list) and all(isinstance(row, dict) for row in rows) for rows in (images, annotations)):
        raise ValueError(f"{path!r} has no lists `images` and `annotations` of objects, as COCO's captions have")
    file_key, own = "file_name" if image_key == "image" else image_key, {}  # own: captions by the picture's id
    for row in images:
        number, name = row.get("id"), field_of(row, file_key)
        if not isinstance(number, int) or isinstance(number, bool) or abs(number) >= 1 << 63 or not _is_text(name):
            raise ValueError(f"{path!r}: a picture needs a whole `id` and a path {file_key!r}, not {str(row)[:200]}")
        if own.setdefault(number, []):
            raise ValueError(f"{path!r}: two pictures have the id {number}")
        own[number].append(name)
    for row in annotations:
        number, text = row.get("image_id"), field_of(row, caption_key)
        if not isinstance(number, int) or number not in own:
            raise ValueError(f"{path!r}: an annotation is of picture {number!r}, which is not among its `images`")
        if not isinstance(text, str):
            raise ValueError(
                f"{path!r}: an annotation needs a text {caption_key!r}, its fields are {sorted(row)[:12]}: give a file "
                "of captions, or set `caption_key`"
            )
        own[number].append(text)
    names, texts = [name for name, *_ in own.values()], [text for _, *texts in own.values() for text in texts]
    arrays = {
        "ids": np.array(list(own), np.int64),
        "captions": np.cumsum([len(texts) - 1 for texts in own.values()], dtype=np.int64),
    }
    for what, rows in (("name", names), ("text", texts)):
        encoded = [row.encode(errors="surrogatepass") for row in rows]
        arrays[f"{what}_ends"] = np.cumsum([len(row) for row in encoded], dtype=np.int64)
        arrays[f"{what}s"] = np.frombuffer(b"".join(encoded), np.uint8)
    return Index(arrays, {})


def _is_text(value) -> bool:
    return isinstance(value, str) and value != ""


def sound(index: Index, size: int) -> bool:
    """Whether pictures, captions and texts fit each other."""
    a = index.arrays
    within = (("captions", len(a["text_ends"])), ("name_ends", len(a["names"])), ("text_ends", len(a["texts"])))
    ends = all((np.diff(a[name], prepend=0) >= 0).all() and a[name][-1:].sum() == most for name, most in within)
    return len(a["ids"]) == len(a["captions"]) == len(a["name_ends"]) and ends


def probe(index: Index) -> int:
    return -1


def captions(index: Index, pictures: range) -> list[list[str]]:
    """The captions of some pictures that follow each other."""
    ends = index.arrays["captions"]
    return [[_text(index, "text", k) for k in range(int(ends[i - 1]) if i else 0, int(ends[i]))] for i in pictures]


def _text(index: Index, what: str, k: int) -> str:
    ends = index.arrays[f"{what}_ends"]
    return index.arrays[f"{what}s"][ends[k - 1] if k else 0 : ends[k]].tobytes().decode(errors="surrogatepass")


class Captions(Source):
    """The pictures of such files, in the order of their `images`; paths are taken below cfg.images ("": the folder of
    the file), fields named by cfg.image_key ("image": file_name) and cfg.caption_key.

    The key is "<source>:<file>#<number among images>:<path>", the image_id the picture's id.
    """

    def __init__(self, name: str, cfg, files: Sequence[str]):
        self.name = name
        self._names = [f"{name}:{file}" for file in in_keys(files)]
        settings = {"image_key": cfg.image_key, "caption_key": cfg.caption_key}
        self._found = indexes(sys.modules[__name__], files, settings, name)
        self._ends = np.cumsum([len(index.arrays["ids"]) for index in self._found]).tolist()
        self._folders = [image_folder(name, cfg, file) for file in files]
        for path, folder, index in zip(files, self._folders, self._found):
            first = [_text(index, "name", k) for k in range(min(len(index.arrays["ids"]), LOOKED_AT))]
            check_links(name, folder, first)
            if first and not any(there(folder, image) for image in first):
                raise ValueError(
                    f"data source {name!r}: not one of the first {len(first)} pictures of {path!r} is in "
                    f"{folder.path!r}: set `images` to the folder that holds {first[0]!r}"
                )
        if not any(len(index.arrays["text_ends"]) for index in self._found):
            self.without_texts = f"{files[0]!r} has no annotations, only pictures"

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, i: int) -> tuple[int, int]:
        f = bisect.bisect_right(self._ends, i)
        return f, i - (self._ends[f - 1] if f else 0)

    def captions_of(self, i: int) -> list[str]:
        f, k = self._place(i)
        return captions(self._found[f], range(k, k + 1))[0]

    def __getitem__(self, i: int) -> dict:
        f, k = self._place(i)
        path = _text(self._found[f], "name", k)
        key = f"{self._names[f]}#{k}:{path.encode(errors='backslashreplace').decode()}"
        return {
            "key": key,
            "image": read_image(key, self._folders[f], path),
            "captions": self.captions_of(i),
            "image_id": image_id(int(self._found[f].arrays["ids"][k]), key),
        }


def open(name: str, cfg) -> Captions | None:
    """The files of a config.source where they have this layout, None where none has. ValueError: some have."""
    files = expand(name, cfg)
    other = [file for file in files if not is_one(file)]
    if not other:
        return Captions(name, cfg, files)
    if len(other) < len(files):
        one = next(file for file in files if file not in other)
        raise ValueError(
            f"data source {name!r}: {one!r} is one of COCO's caption files and {other[0]!r} is not: give each a source "
            "of its own"
        )
    return None
