"""Visual Dialog 1.0: dialogs about pictures, in the official files (visualdialog.org).

`path` names one file or a glob: visdial_1.0_{train,val,test}.json, and dense annotations beside them, so that
path="visdial_1.0_val*.json" finds both. Pictures lie below `images`, the folder that holds COCO's train2014 and
val2014, of which the training dialogs are, and VisualDialog_val2018 and VisualDialog_test2018; or the pictures
themselves.
"""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import numpy as np

from blip_jax.data.folders import check_links, first_there, image_folder, read_image
from blip_jax.data.pieces import parsed
from blip_jax.data.source import BadRecord, Source, expand, in_keys

LOOKED_AT = 100  # first dialogs whose pictures are looked for at opening
LAYOUTS = {  # split of a file -> where its pictures may be
    "train": ("train2014/COCO_train2014_{:012d}.jpg", "val2014/COCO_val2014_{:012d}.jpg"),
    "val": ("VisualDialog_val2018/VisualDialog_val2018_{:012d}.jpg",),
    "test": ("VisualDialog_test2018/VisualDialog_test2018_{:012d}.jpg",),
}


class Dialog(NamedTuple):
    """One row; texts are numbers of the file's lists, -1 where there is none. A dialog takes some 4 kB."""

    image_id: int
    caption: str
    questions: np.ndarray  # i32[rounds]
    answers: np.ndarray  # i32[rounds]
    options: np.ndarray  # i32[rounds, options]
    truths: np.ndarray  # i32[rounds], the place of the true answer among the options


class Dialogs(Source):
    """Records {"key", "image", "image_id", "caption", "rounds"}, a round {"question", "answer", "options", "truth",
    "relevance"}.

    answer: None where the file has none. options: texts, [] where it has none. truth: place of the true answer among
    them or None. relevance: of each option by people, or None. The key is "<source>:<file>#<row>:<image_id>".
    """

    def __init__(self, name: str, cfg):
        files = expand(name, cfg)
        self._folder = image_folder(name, cfg, files[0])
        self._rows: list[tuple[Dialog | None, dict]] = []  # with its file's {"questions", "answers", "split"}
        self._keys: list[str] = []
        self._relevance: dict[tuple[int, int], list[float]] = {}
        for path, file in zip(files, in_keys(files)):
            content = _content(name, path)
            if isinstance(content, list):
                self._relevance |= {(row["image_id"], row["round_id"]): _relevance(row) for row in content}
                continue
            lists = content["data"] | {"split": str(content.get("split", ""))}
            dialogs = lists.pop("dialogs")
            self._rows += [(dialog, lists) for dialog in dialogs]
            self._keys += [f"{name}:{file}#{i}" + (f":{d.image_id}" if d else "") for i, d in enumerate(dialogs)]
        asked = {(d.image_id, r) for d, _ in self._rows if d for r in range(1, len(d.questions) + 1)}
        if lost := self._relevance.keys() - asked:
            raise ValueError(
                f"data source {name!r}: {len(lost)} dense annotations are of rounds (picture, round) that "
                f"{', '.join(files)} do not hold, such as {sorted(lost)[:3]}: let path name the dialogs, too"
            )
        check_links(name, self._folder, (self._picture(*row) for row in self._rows[:LOOKED_AT] if row[0]))

    def __len__(self) -> int:
        return len(self._rows)

    def _picture(self, dialog: Dialog, lists: dict) -> str:
        split = next((split for split in LAYOUTS if lists["split"].startswith(split)), "train")
        paths = [layout.format(dialog.image_id) for layout in LAYOUTS[split]]
        others = [other for path in paths for other in (f"images/{path}", path.split("/")[1])]
        return first_there(self._folder, paths + others)

    def __getitem__(self, i: int) -> dict:
        key, (dialog, lists) = self._keys[i], self._rows[i]
        if dialog is None:
            raise BadRecord(key, "malformed row: a dialog with image_id, caption and rounds of questions is expected")
        image = read_image(key, self._folder, self._picture(dialog, lists))
        text = lambda kind, n: lists[kind][n] if n >= 0 else None
        try:
            rounds = [
                {
                    "question": text("questions", question),
                    "answer": text("answers", answer),
                    "options": [lists["answers"][n] for n in options if n >= 0],
                    "truth": int(truth) if truth >= 0 and options.max(initial=-1) >= 0 else None,
                    "relevance": self._relevance.get((dialog.image_id, number)),
                }
                for number, (question, answer, options, truth) in enumerate(zip(*dialog[2:]), 1)
            ]
        except IndexError:
            raise BadRecord(key, "malformed row: a question or an answer that is not in the file's list") from None
        return {
            "key": key,
            "image": image,
            "image_id": str(dialog.image_id),
            "caption": dialog.caption,
            "rounds": rounds,
        }


def open(name: str, cfg) -> Dialogs:
    """Opens the files of a config.source. ValueError: they are not official ones, or do not belong together."""
    return Dialogs(name, cfg)


def _content(name: str, path: str) -> dict | list[dict]:
    """A file of dialogs, or dense annotations."""
    try:
        content = parsed(pathlib.Path(path).read_text(encoding="utf-8-sig"), _kept)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"data source {name!r}: {path} is no JSON ({e})") from e
    if isinstance(content, list) and content and all(isinstance(row, dict) and _relevance(row) for row in content):
        return content
    data = content.get("data") if isinstance(content, dict) else None
    lists = [data.get(kind) if isinstance(data, dict) else None for kind in ("questions", "answers", "dialogs")]
    if not all(isinstance(found, list) for found in lists):
        raise ValueError(
            f"data source {name!r}: {path} holds neither dialogs of Visual Dialog 1.0, {{split, data: {{questions, "
            "answers, dialogs}}}}, nor dense annotations of their rounds"
        )
    data["dialogs"] = [dialog if isinstance(dialog, Dialog) else None for dialog in lists[2]]
    return content


def _relevance(row: dict) -> list[float] | None:
    """The training sample calls it otherwise."""
    return row.get("gt_relevance", row.get("relevance"))


def _kept(element: Any) -> Any:
    """A dialog in little room; other elements as they are."""
    if not isinstance(element, dict) or not isinstance(element.get("dialog"), list):
        return element
    try:
        turns = element["dialog"]
        number = lambda name: np.array([-1 if turn.get(name) is None else turn[name] for turn in turns], np.int32)
        options = [turn.get("answer_options") or [] for turn in turns]
        table = np.full((len(turns), max(map(len, options), default=0)), -1, np.int32)
        for row, own in zip(table, options):
            row[: len(own)] = own
        found = Dialog(
            int(element["image_id"]),
            str(element["caption"]),
            number("question"),
            number("answer"),
            table,
            number("gt_index"),
        )
        for own, truth in zip(options, found.truths):
            if not (-1 <= truth < len(own) or not own):
                return None
        return found if (found.questions >= 0).all() else None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
