"""NLVR2: sentences about two pictures, in the official files (JSON lines) and in BLIP's lists, told apart by content.

`path` names one file or a glob. Pictures lie below `images`, the folder that holds images/train/<0-99>, dev and test1,
or images/dev and images/test1, or the pictures themselves.
A file that is called .png may be a JPEG: pictures are opened by content.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
from typing import NamedTuple

from blip_jax.data.folders import check_links, first_there, image_folder, read_image
from blip_jax.data.formats.json import LOOKED_AT
from blip_jax.data.pieces import parsed
from blip_jax.data.source import BadRecord, Source, expand, in_keys

PAIR = re.compile(r"(?P<split>\w+)-(?P<set>\d+)-(?P<pair>\d+)")  # of pictures, in an identifier and in a file's name


class Example(NamedTuple):
    """One row, texts that repeat stored once."""

    identifier: str  # split-set-pair-sentence; BLIP's lists have none: split-set-pair of the pictures
    group: str  # examples of one sentence and one set of pictures, of which consistency asks that all are right
    images: tuple[str, str]  # left, right
    sentence: str
    label: bool | None  # None: not known


class Sentences(Source):
    """Records {"key", "image_id", "images": [bytes, bytes], "sentence", "label": bool or None, "identifier", "group"}.

    The key is "<source>:<file>#<row>", and ":<identifier>" in official files.
    """

    def __init__(self, name: str, cfg):
        files = expand(name, cfg)
        self._folder = image_folder(name, cfg, files[0])
        self._rows: list[Example | None] = []
        self._keys: list[str] = []
        for path, file in zip(files, in_keys(files)):
            rows, official = _content(name, path)
            self._rows += rows
            self._keys += [
                f"{name}:{file}#{i}" + (f":{row.identifier}" if official and row else "") for i, row in enumerate(rows)
            ]
        check_links(name, self._folder, (path for row in self._rows[:LOOKED_AT] if row for path in row.images))

    def __len__(self) -> int:
        return len(self._rows)

    def _place(self, path: str) -> str:
        return first_there(self._folder, [path, f"images/{path}", os.path.basename(path)])

    def __getitem__(self, i: int) -> dict:
        key, row = self._keys[i], self._rows[i]
        if row is None:
            raise BadRecord(key, "malformed row: a sentence, two pictures and a label True or False are expected")
        return {
            "key": key,
            "image_id": row.images[0],
            "images": [read_image(key, self._folder, self._place(path)) for path in row.images],
            "sentence": row.sentence,
            "label": row.label,
            "identifier": row.identifier,
            "group": row.group,
        }


def open(name: str, cfg) -> Sentences:
    """Opens the files of a config.source. ValueError: they are neither BLIP's nor official."""
    return Sentences(name, cfg)


def _content(name: str, path: str) -> tuple[list[Example | None], bool]:
    """The rows of a file, and whether it is an official one."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig").strip()
        rows = parsed(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as e:
        raise ValueError(f"data source {name!r}: {path} is neither JSON nor JSON lines ({e})") from e
    official = any(isinstance(row, dict) and "identifier" in row for row in rows)
    if not official and not any(isinstance(row, dict) and "images" in row for row in rows):
        raise ValueError(
            f"data source {name!r}: {path} holds neither NLVR2's official rows (with `identifier`) nor BLIP's "
            "(with `images`)"
        )
    return [(_official if official else _of_blip)(row) for row in rows], official


def _official(row) -> Example | None:
    match = (
        re.fullmatch(PAIR.pattern + r"-(?P<sentence>\d+)", row.get("identifier", "")) if isinstance(row, dict) else None
    )
    if not match:
        return None
    split, pair = match["split"], match[0].rsplit("-", 1)[0]
    folder = f"images/train/{row.get('directory')}" if split == "train" else split
    images = [f"{folder}/{pair}-img{side}.png" for side in (0, 1)]
    return _example(
        match[0], f"{split}-{match['set']}-{match['sentence']}", images, row.get("sentence"), row.get("label")
    )


def _of_blip(row) -> Example | None:
    images = row.get("images") if isinstance(row, dict) else None
    if not isinstance(images, list) or len(images) != 2 or not all(isinstance(path, str) for path in images):
        return None
    match = PAIR.match(os.path.basename(images[0]))
    sentence = row.get("sentence")
    group = f"{match['split']}-{match['set']} {sentence}" if match else f"{images[0]} {sentence}"
    return _example(match[0] if match else images[0], group, images, sentence, row.get("label"))


def _example(identifier, group, images, sentence, label) -> Example | None:
    """None: it is no example."""
    labels = {"true": True, "false": False, "none": None}
    if not isinstance(sentence, str) or str(label).lower() not in labels:
        return None
    return Example(
        identifier, sys.intern(group), tuple(map(sys.intern, images)), sys.intern(sentence), labels[str(label).lower()]
    )
