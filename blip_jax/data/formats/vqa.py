"""Questions about pictures: VQA v2's official files (visualqa.org) and BLIP's lists, Visual Genome's among them, told
apart by content.

`path` names one file or a glob. BLIP's: lists of {question_id, question, image, dataset, answer}; official: a file of
questions, and one of annotations with their answers, so that path="v2_*train2014*.json" finds both; questions without
annotations have no answers. Pictures lie below `images`, the folder that holds train2014, val2014 and test2015 (or
Visual Genome's image), or the pictures themselves.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

from blip_jax.data.folders import check_links, first_there, image_folder, read_image
from blip_jax.data.formats.json import LOOKED_AT
from blip_jax.data.pieces import parsed
from blip_jax.data.source import BadRecord, Source, expand, in_keys


class Question(NamedTuple):
    """One row, texts that repeat stored once: a question takes some 300 bytes."""

    number: int | None  # question_id; Visual Genome's have none here
    question: str
    image: str
    answers: tuple[str, ...]  # as people gave them; () where they are not known
    dataset: str
    types: tuple[str, str]  # answer_type and question_type, "" where they are not known


class Questions(Source):
    """Records {"key", "image", "image_id", "question_id", "question", "answers", "dataset", "answer_type",
    "question_type"}.

    dataset: "vqa", or "vg" for Visual Genome. The key is "<source>:<file>#<row>", and ":<question's id>" where it has
    one.
    """

    def __init__(self, name: str, cfg):
        files = expand(name, cfg)
        self._folder = image_folder(name, cfg, files[0])
        self._rows: list[Question] = []
        self._keys: list[str] = []
        asked, answered, named = [], {}, dict(zip(files, in_keys(files)))
        for path in files:
            content = _content(name, path)
            if isinstance(content, list):
                self._add(f"{name}:{named[path]}", [_of_blip(row) for row in content])
            elif "annotations" in content:
                answered |= {a["question_id"]: a for a in content["annotations"]}
            else:
                asked.append((path, content))
        for path, content in asked:
            self._add(
                f"{name}:{named[path]}",
                [
                    _official(q, answered.pop(q.get("question_id"), None), content["data_subtype"])
                    for q in content["questions"]
                ],
            )
        if answered:
            raise ValueError(
                f"data source {name!r}: {len(answered)} annotations are of questions that {', '.join(files)} do "
                "not ask, such as "
                f"question {next(iter(answered))}: let path name the file of questions, too"
            )
        check_links(name, self._folder, (row.image for row in self._rows[:LOOKED_AT] if row))

    def _add(self, file: str, rows: list) -> None:
        """file: as keys name it."""
        self._keys += [
            f"{file}#{i}" + ("" if row is None or row.number is None else f":{row.number}")
            for i, row in enumerate(rows)
        ]
        self._rows += rows

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> Iterator[dict]:
        """The questions as BLIP's lists have them, {question_id, question, image, dataset, answer}, without pictures.

        answer: those of people, the one text of Visual Genome's; absent where none is known. What is no question is
        left out.
        """
        for row in filter(None, self._rows):
            own = {"question_id": row.number, "question": row.question, "image": row.image, "dataset": row.dataset}
            if row.answers:
                own["answer"] = row.answers[0] if row.dataset == "vg" else list(row.answers)
            yield {name: value for name, value in own.items() if value is not None}

    def __getitem__(self, i: int) -> dict:
        key, row = self._keys[i], self._rows[i]
        if row is None:
            raise BadRecord(key, "malformed row: a question, the path of an image and answers as texts are expected")
        return {
            "key": key,
            "image": read_image(key, self._folder, first_there(self._folder, [row.image, os.path.basename(row.image)])),
            "image_id": row.image,
            "question_id": row.number,
            "question": row.question,
            "answers": list(row.answers),
            "dataset": row.dataset,
            "answer_type": row.types[0],
            "question_type": row.types[1],
        }


def open(name: str, cfg) -> Questions:
    """Opens the files of a config.source. ValueError: they are neither BLIP's nor official, or do not belong
    together.
    """
    return Questions(name, cfg)


def _content(name: str, path: str):
    """A list of BLIP's rows, or an official file as a dict."""
    try:
        content = parsed(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"data source {name!r}: {path} is no JSON ({e})") from e
    official = isinstance(content, dict) and (
        "annotations" in content or {"questions", "data_subtype"} <= content.keys()
    )
    if not official and not isinstance(content, list):
        raise ValueError(
            f"data source {name!r}: {path} holds neither a list of questions in BLIP's form nor VQA's official "
            "questions or "
            "annotations"
        )
    return content


def _of_blip(row) -> Question | None:
    if not isinstance(row, dict):
        return None
    answers = row.get("answer", [])
    answers = [answers] if isinstance(answers, str) else answers
    return _question(
        row.get("question_id"), row.get("question"), row.get("image"), answers, row.get("dataset", "vqa"), ("", "")
    )


def _official(row: dict, annotation: dict | None, subtype: str) -> Question | None:
    split = subtype.replace("test-dev", "test")  # its pictures are among those of test2015
    number = row.get("image_id")
    image = f"{split}/COCO_{split}_{number:012d}.jpg" if isinstance(number, int) else None
    annotation = annotation or {"answers": []}
    answers = [a.get("answer") for a in annotation["answers"]]
    types = annotation.get("answer_type", ""), annotation.get("question_type", "")
    return _question(row.get("question_id"), row.get("question"), image, answers, "vqa", types)


def _question(number, question, image, answers, dataset, types) -> Question | None:
    """None: it is no question."""
    if not isinstance(question, str) or not isinstance(image, str) or not isinstance(answers, list):
        return None
    if not all(isinstance(a, str) for a in (*answers, *types, dataset)):
        return None
    return Question(
        number,
        question,
        sys.intern(image),
        tuple(map(sys.intern, answers)),
        sys.intern(dataset),
        tuple(map(sys.intern, types)),
    )
