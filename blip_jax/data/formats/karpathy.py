"""Karpathy's splits of Flickr30k, Flickr8k and COCO as he published them: dataset_flickr30k.json, dataset_coco.json.

`path` names the file, `split` is train, val or test; COCO's train holds restval, too, as everybody trains. Pictures lie
below `images`: COCO's in train2014 and val2014, Flickr's in flickr30k-images, or in it.
"""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

from blip_jax.data.folders import check_links, first_there, image_folder, read_image
from blip_jax.data.pieces import parsed
from blip_jax.data.source import BadRecord, Source, expand, in_keys

LOOKED_AT = 100  # first pictures that are looked for at opening
SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
FLICKR = ("", "flickr30k-images/", "flickr30k_images/", "Flicker8k_Dataset/")  # below `images`


class Picture(NamedTuple):
    """One row."""

    path: str  # with COCO's folder
    image_id: str
    captions: tuple[str, ...]
    split: str


class Pictures(Source):
    """Records {"key", "image", "captions", "image_id"}, a picture with all its captions each.

    The image_id is COCO's, or Flickr's file name. The key is "<source>:<file>#<number among images>:<path>".
    """

    def __init__(self, name: str, cfg):
        files = expand(name, cfg)
        if cfg.split not in SPLITS:
            raise ValueError(f"data source {name!r}: split is {cfg.split!r}: choose one of {', '.join(SPLITS)}")
        self._folder = image_folder(name, cfg, files[0])
        self._rows: list[Picture | None] = []
        self._keys: list[str] = []
        for path, file in zip(files, in_keys(files)):
            for i, row in enumerate(_content(name, path)):
                if row is None or row.split in SPLITS[cfg.split]:
                    self._rows.append(row)
                    self._keys.append(f"{name}:{file}#{i}" + (f":{row.path}" if row else ""))
        check_links(name, self._folder, (self._place(row.path) for row in self._rows[:LOOKED_AT] if row))

    def __len__(self) -> int:
        return len(self._rows)

    def _place(self, path: str) -> str:
        return first_there(self._folder, [path] if "/" in path else [below + path for below in FLICKR])

    def captions_of(self, i: int) -> list[str]:
        if self._rows[i] is None:
            raise BadRecord(self._keys[i], "malformed row: filename, split and sentences with `raw` are expected")
        return list(self._rows[i].captions)

    def __getitem__(self, i: int) -> dict:
        captions, row = self.captions_of(i), self._rows[i]
        image = read_image(self._keys[i], self._folder, self._place(row.path))
        return {"key": self._keys[i], "image": image, "captions": captions, "image_id": row.image_id}


def open(name: str, cfg) -> Pictures:
    """Opens the file of a config.source. ValueError: it is none of Karpathy's, or the split is not one of his."""
    return Pictures(name, cfg)


def _content(name: str, path: str) -> list[Picture | None]:
    try:
        content = parsed(pathlib.Path(path).read_text(encoding="utf-8-sig"), _kept)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"data source {name!r}: {path} is no JSON ({e})") from e
    rows = content.get("images") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not any(isinstance(row, Picture) for row in rows):
        raise ValueError(
            f"data source {name!r}: {path} is none of Karpathy's files, {{images: [{{filename, split, sentences}}]}}: "
            "give BLIP's lists and COCO's annotations kind='json'"
        )
    return [row if isinstance(row, Picture) else None for row in rows]


def _kept(row: Any) -> Any:
    """A picture without the words that its sentences are cut into; other elements as they are."""
    if not isinstance(row, dict) or not isinstance(row.get("sentences"), list):
        return row
    captions = tuple(s.get("raw") if isinstance(s, dict) else None for s in row["sentences"])
    name, folder, split = row.get("filename"), row.get("filepath", ""), row.get("split")
    if not all(isinstance(text, str) for text in (*captions, name, folder, split)):
        return None
    return Picture(f"{folder}/{name}" if folder else name, str(row.get("cocoid", name)), captions, split)
