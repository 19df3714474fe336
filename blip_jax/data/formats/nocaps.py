"""NoCaps (nocaps.org): pictures of Open Images, in the official files and in BLIP's lists, told apart by content.

`path` names one file or a glob. Official: nocaps_val_4500_captions.json, with captions and domains, and
nocaps_{val,test}_image_info.json; BLIP's: lists of {image, img_id}. Pictures lie below `images`, the folder that holds
val and test, or the pictures themselves.
"""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from blip_jax.data.folders import check_links, first_there, image_folder, read_image
from blip_jax.data.formats.json import LOOKED_AT
from blip_jax.data.pieces import parsed
from blip_jax.data.source import BadRecord, Source, expand, in_keys


class Picture(NamedTuple):
    """One row."""

    number: int  # image_id of results: `id` of official files, img_id of BLIP's
    path: str
    captions: tuple[str, ...]
    domain: str  # in-domain, near-domain, out-domain; "" where it is not known


class Pictures(Source):
    """Records {"key", "image", "image_id", "captions", "domain"}; the key is "<source>:<file>#<row>:<path>"."""

    def __init__(self, name: str, cfg):
        files = expand(name, cfg)
        self._folder = image_folder(name, cfg, files[0])
        self._rows: list[Picture | None] = []
        self._keys: list[str] = []
        for path, file in zip(files, in_keys(files)):
            rows = _content(name, path)
            self._rows += rows
            self._keys += [f"{name}:{file}#{i}" + (f":{row.path}" if row else "") for i, row in enumerate(rows)]
        numbers = [row.number for row in self._rows if row]
        if len(set(numbers)) < len(numbers):
            twice = next(n for n in numbers if numbers.count(n) > 1)
            raise ValueError(
                f"data source {name!r}: {', '.join(files)} name picture {twice} more than once: val and test number "
                "their pictures alike, give each a source of its own"
            )
        if not any(row.captions for row in self._rows if row):
            self.without_texts = f"{files[0]!r} has no captions, only pictures"
        check_links(name, self._folder, (self._place(row.path) for row in self._rows[:LOOKED_AT] if row))

    def __len__(self) -> int:
        return len(self._rows)

    def _place(self, path: str) -> str:
        return first_there(self._folder, [path, f"val/{path}", f"test/{path}", path.rsplit("/", 1)[-1]])

    def captions_of(self, i: int) -> list[str]:
        if (row := self._rows[i]) is None:
            raise BadRecord(self._keys[i], "malformed row: the number and the path of a picture are expected")
        return list(row.captions)

    def __getitem__(self, i: int) -> dict:
        captions, row = self.captions_of(i), self._rows[i]
        return {
            "key": self._keys[i],
            "image": read_image(self._keys[i], self._folder, self._place(row.path)),
            "image_id": str(row.number),
            "captions": captions,
            "domain": row.domain,
        }


def open(name: str, cfg) -> Pictures:
    """Opens the files of a config.source. ValueError: they are neither BLIP's nor official, or overlap."""
    return Pictures(name, cfg)


def _content(name: str, path: str) -> list[Picture | None]:
    try:
        content = parsed(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"data source {name!r}: {path} is no JSON ({e})") from e
    if isinstance(content, list) and any(isinstance(row, dict) and "img_id" in row for row in content):
        return [_picture(row, "img_id", "image", ()) for row in content]
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(
            f"data source {name!r}: {path} holds neither NoCaps' official `images` nor BLIP's list of {{image, img_id}}"
        )
    own: dict = {}
    for row in content.get("annotations", []):
        if not isinstance(row, dict) or not isinstance(row.get("caption"), str):
            raise ValueError(f"data source {name!r}: {path} has an annotation that is no caption: {str(row)[:120]}")
        own.setdefault(row.get("image_id"), []).append(row["caption"])
    return [_picture(row, "id", "file_name", own) for row in content["images"]]


def _picture(row, number: str, path: str, captions) -> Picture | None:
    """None: it is no picture."""
    if not isinstance(row, dict) or not isinstance(row.get(number), int) or not isinstance(row.get(path), str):
        return None
    own = captions.get(row[number], []) if captions else []
    return Picture(row[number], row[path], tuple(own), str(row.get("domain", "")))
