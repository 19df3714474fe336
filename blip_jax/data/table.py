"""Tables of pictures and captions (CSV, TSV, Parquet): which column is what, and the records that rows are.

A column is found by the source's `image_key` and `caption_key`, or else, in any case of letters, by the names below.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import os
import shlex
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from blip_jax.data.folders import check_links, image_folder, read_image
from blip_jax.data.source import MAX_BYTES, BadRecord, Source, as_captions, expand, image_id, in_keys

log = logging.getLogger(__name__)

# the first that is there counts; of pictures a column of paths, of bytes, or of both as Hugging Face's {bytes, path}
IMAGE = ("image", "filepath", "file_path", "file_name", "filename", "image_path", "image_file", "image_name", "path")
IMAGE += ("file", "img", "jpg", "jpeg", "png", "webp", "image_bytes")
CAPTION = ("caption", "captions", "title", "text", "texts", "sentence", "sentences", "description", "comment", "alt")
URL = ("url", "image_url", "img_url", "image_link", "link")
MAX_PATH = 300  # letters of a path that a key shows
LOOKED_AT = 100  # first rows of a file that are looked at when it is opened


class File(Protocol):
    """One table. `names`: of its columns."""

    names: list[str]

    def __len__(self) -> int: ...

    def row(self, key: str, k: int, columns: list[str]) -> dict:
        """These columns of row `k`. BadRecord, of `key`: it cannot be read."""
        ...


class Columns(NamedTuple):
    """Names of columns, None for those that are not there."""

    image: str
    caption: str | None
    image_id: str | None


class Table(Source):
    """Rows of tables as records; paths of pictures are taken below cfg.images ("": the folder of the table).

    open_file: path -> File, ValueError where it is none. Attributes: files, and of each its columns.
    """

    def __init__(self, name: str, cfg, open_file: Callable[[str], File]):
        self.name, paths = name, expand(name, cfg)
        self._names, self.files, self.columns = in_keys(paths), [], []
        for path in paths:
            try:
                file = open_file(path)
            except (ValueError, OSError) as e:
                raise ValueError(f"data source {name!r}: {e}") from None
            self.files.append(file)
            self.columns.append(columns(name, cfg, path, file.names))
        self._folders = [image_folder(name, cfg, path) for path in paths]
        shared = os.path.commonpath([folder.path for folder in self._folders])
        self._below = [os.path.relpath(folder.path, shared) for folder in self._folders]  # tells equal paths apart
        self._ends = list(itertools.accumulate(map(len, self.files)))
        for path, file, own, folder in zip(paths, self.files, self.columns, self._folders):
            self._check(path, file, own, folder)
        if not any(own.caption for own in self.columns):
            self.without_texts = (
                f"{paths[0]!r} has no column of captions ({', '.join(CAPTION[:5])}, ...) among "
                f"{_listed(self.files[0].names)}: set `caption_key`"
            )

    def _check(self, path: str, file: File, own: Columns, folder) -> None:
        """The first rows show whether pictures are addresses, or lie behind links."""
        images = []
        for k in range(min(len(file), LOOKED_AT)):
            try:
                images.append(file.row("", k, [own.image])[own.image])
            except BadRecord:
                continue
        images = [image.get("path") if isinstance(image, dict) else image for image in images]
        if images and all(isinstance(image, str) and "://" in image[:12] for image in images):
            raise ValueError(f"data source {self.name!r}: {to_fetch(path, own.image, own.caption)}")
        check_links(self.name, folder, images)

    def __len__(self) -> int:
        return self._ends[-1]

    def _row(self, i: int, of: Callable[[Columns], Iterable[str | None]]) -> tuple[int, str, dict]:
        """Number of the file of row `i`, "<source>:<file>#<row>", and the columns that `of` picks."""
        f = bisect.bisect_right(self._ends, i)
        k = i - (self._ends[f - 1] if f else 0)
        key = f"{self.name}:{self._names[f]}#{k}"
        return f, key, self.files[f].row(key, k, [c for c in of(self.columns[f]) if c])

    def captions_of(self, i: int) -> list[str]:
        f, key, row = self._row(i, lambda own: [own.caption])
        return as_captions(key, row.get(self.columns[f].caption))

    def __getitem__(self, i: int) -> dict:
        f, key, row = self._row(i, lambda own: own)
        own, image = self.columns[f], row[self.columns[f].image]
        path = None
        if isinstance(image, dict):
            image, path = image.get("bytes") or image.get("path"), image.get("path")
        elif isinstance(image, str):
            path = image
        if path:
            key = f"{key}:{path[:MAX_PATH]}"
        if isinstance(image, str) and image:
            image = read_image(key, self._folders[f], image)
        if not isinstance(image, bytes):
            raise BadRecord(
                key, f"malformed row: {own.image!r} is {str(image)[:80]!r}, not a path or a picture's bytes"
            )
        if len(image) > MAX_BYTES:
            raise BadRecord(key, f"file too large: {len(image)} bytes, at most {MAX_BYTES} are read")
        return {
            "key": key,
            "image": image,
            "captions": as_captions(key, row.get(own.caption)),
            "image_id": image_id(
                row.get(own.image_id), os.path.normpath(os.path.join(self._below[f], path)) if path else key
            ),
        }


def columns(name: str, cfg, path: str, names: list[str]) -> Columns:
    """The columns of pictures, captions and image_id among `names`.

    ValueError: none has pictures, or a column that the config names is not there.
    """
    image = pick(names, cfg.image_key, IMAGE)
    caption = pick(names, cfg.caption_key, CAPTION)
    for leaf, default, found in (("image_key", "image", image), ("caption_key", "caption", caption)):
        if cfg[leaf] != default and found is None:
            raise ValueError(
                f"data source {name!r}: {path!r} has no column {cfg[leaf]!r}; its columns are {_listed(names)}: "
                f"set `{leaf}`"
            )
    if image is None:
        if url := pick(names, "", URL):
            raise ValueError(f"data source {name!r}: {to_fetch(path, url, caption)}")
        raise ValueError(
            f"data source {name!r}: {path!r} has no column of pictures ({', '.join(IMAGE[:6])}, ...); its columns are "
            f"{_listed(names)}: set `image_key`. The first line of a CSV or TSV names the columns"
        )
    if caption and sum(n.lower() in CAPTION for n in names) > 1:
        log.info("data source %r: captions are column %r of %r; set caption_key for another", name, caption, path)
    return Columns(image, caption, pick(names, "image_id", ()))


def pick(names: list[str], key: str, known: tuple[str, ...]) -> str | None:
    """The column `key`, or where that is the first of `known` or "", the next of `known` that is there."""
    if key in names:
        return key
    if key and key not in known[:1]:
        return None
    lower = {n.lower(): n for n in reversed(names)}
    return next((lower[n] for n in known if n in lower), None)


def to_fetch(path: str, url: str, caption: str | None) -> str:
    """What to do with a table of addresses."""
    format_ = {".parquet": "parquet", ".tsv": "tsv", ".json": "json", ".jsonl": "jsonl"}
    kind = format_.get(os.path.splitext(path)[1].lower(), "csv")
    columns = f"--url_col={shlex.quote(url)}" + (f" --caption_col={shlex.quote(caption)}" if caption else "")
    return (
        f"{path!r} has addresses ({url!r}) and no files of pictures (`image_key` names a field of them); nothing is "
        f"fetched here. Fetch them once: img2dataset --url_list={shlex.quote(path)} --input_format={kind} "
        f"{columns} --output_format=webdataset --output_folder=shards; then give source('tar', 'shards/*.tar')"
    )


def _listed(names: list[str]) -> str:
    return f"{[name[:60] for name in names[:12]]}{f' and {len(names) - 12} more' if len(names) > 12 else ''}"
