"""The world of the tasks written out as the files that COCO, VQA, NLVR2 and Visual Dialog publish, with pictures.

Names and layout are the official ones, so that what reads these reads it. Pictures are PNG files, whatever they are
called. Unlike those of the originals, the answers of the test splits are known.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from blip_jax.data.scenes import crowd, dialogs, questions, sentences, world

COCO = {"train": "train2014", "val": "val2014", "test": "test2015"}  # split -> what files of COCO and VQA call it
NLVR2 = {"train": "train", "val": "dev", "test": "test1"}
VISDIAL = {"train": "train", "val": "val2018", "test": "test2018"}
FOLDERS = 100  # of NLVR2's training pictures


class Sizes(NamedTuple):
    """How much of a split there is."""

    pictures: int  # with captions and questions, and the first of them with dialogs
    captions: int  # of each
    questions: int  # of each
    sentences: int  # with sentences.PAIRS pairs each
    dialogs: int


class Paths(NamedTuple):
    """What `write` makes of one split in `folder`: files, patterns of files, and folders of pictures."""

    captions: str
    coco: str  # its pictures
    vqa: str
    vqa_images: str
    nlvr2: str
    nlvr2_images: str
    visdial: str
    visdial_images: str


def paths(folder, split: str) -> Paths:
    """split: train | val | test"""
    root, coco = pathlib.Path(folder), COCO[split]
    visdial = f"visdial_1.0_{split}.json" if split == "train" else f"visdial_1.0_{split}*.json"
    return Paths(
        str(root / "coco" / "annotations" / f"captions_{coco}.json"),
        str(root / "coco" / coco),
        str(root / "vqa" / f"v2_*{coco}*.json"),
        str(root / "coco"),
        str(root / "nlvr2" / f"{NLVR2[split]}.json"),
        str(root / "nlvr2"),
        str(root / "visdial" / visdial),
        str(root / ("coco" if split == "train" else "visdial")),
    )


def write(folder, split: str, sizes: Sizes, seed: int, size: int) -> None:
    """Writes all files of a split. seed: of its world, another one for each split; size: pixels of a picture."""
    root = pathlib.Path(folder)
    _captions(root, split, sizes, seed, size)
    _vqa(root, split, sizes, seed, size)
    _nlvr2(root, split, sizes, seed, size)
    _visdial(root, split, sizes, seed, size)


def texts(split_sizes: Sizes, seed: int, size: int) -> Iterator[str]:
    """All texts of the files, to train a vocabulary on."""
    for i in range(split_sizes.pictures):
        yield from crowd.captions(seed, i, size, split_sizes.captions)
        for question in questions.questions(seed, i, size, split_sizes.questions):
            yield from (question.text, question.answer, questions.SYNONYMS.get(question.answer, question.answer))
    yield from (sentences.sentence(seed, i, size)[0].text for i in range(split_sizes.sentences))
    yield from dialogs.answers_to("")


def _captions(root, split: str, sizes: Sizes, seed: int, size: int) -> None:
    name, images, annotations = COCO[split], [], []
    for i in range(sizes.pictures):
        file = f"COCO_{name}_{i + 1:012d}.jpg"
        _picture(root / "coco" / name / file, crowd.scene(seed, i, size), size)
        images.append({"id": i + 1, "file_name": file, "width": size, "height": size})
        for text in crowd.captions(seed, i, size, sizes.captions):
            annotations.append({"id": len(annotations) + 1, "image_id": i + 1, "caption": text})
    _json(root / "coco" / "annotations" / f"captions_{name}.json", {"images": images, "annotations": annotations})


def _vqa(root, split: str, sizes: Sizes, seed: int, size: int) -> None:
    name, asked, annotations = COCO[split], [], []
    for i in range(sizes.pictures):
        rng = world.stream(seed, i, crowd.PEOPLE)
        for n, question in enumerate(questions.questions(seed, i, size, sizes.questions)):
            own = {"image_id": i + 1, "question_id": (i + 1) * 1000 + n}
            people = questions.people(rng, question)
            asked.append({**own, "question": question.text})
            annotations.append({
                **own,
                "question_type": question.kind,
                "answer_type": questions.TYPES[question.kind],
                "multiple_choice_answer": question.answer,
                "answers": [
                    {"answer_id": k, "answer": text, "answer_confidence": "yes"} for k, text in enumerate(people, 1)
                ],
            })  # fmt: skip
    of_all = {"data_type": "mscoco", "data_subtype": name}
    for file, rows in (("OpenEnded_mscoco_{}_questions", {"questions": asked, "task_type": "Open-Ended"}),
                       ("mscoco_{}_annotations", {"annotations": annotations})):  # fmt: skip
        _json(root / "vqa" / f"v2_{file.format(name)}.json", of_all | rows)


def _nlvr2(root, split: str, sizes: Sizes, seed: int, size: int) -> None:
    name, rows = NLVR2[split], []
    for i in range(sizes.sentences):
        said, pairs = sentences.sentence(seed, i, size)
        folder = f"images/train/{i % FOLDERS}" if split == "train" else f"images/{name}"
        for k, (*two, label) in enumerate(pairs):
            for side, scene in enumerate(two):
                _picture(root / "nlvr2" / folder / f"{name}-{i}-{k}-img{side}.png", scene, size)
            row = {"identifier": f"{name}-{i}-{k}-0", "sentence": said.text, "label": str(label)}
            rows.append(row | ({"directory": i % FOLDERS} if split == "train" else {}))
    _text(root / "nlvr2" / f"{name}.json", "".join(json.dumps(row) + "\n" for row in rows))


def _visdial(root, split: str, sizes: Sizes, seed: int, size: int) -> None:
    name, asked, said, rows, dense = VISDIAL[split], {}, {}, [], []
    number = lambda known, text: known.setdefault(text, len(known))
    for i in range(sizes.dialogs):
        found = dialogs.dialog(seed, i, size)
        turns = []
        for r, turn in enumerate(found.rounds, 1):
            turns.append({
                "question": number(asked, turn.question.text.removesuffix("?")),
                "answer": number(said, turn.answer),
                "answer_options": [number(said, text) for text in turn.options],
                "gt_index": turn.truth,
            })  # fmt: skip
            dense.append({"image_id": i + 1, "round_id": r, "gt_relevance": turn.relevance})
        rows.append({"image_id": i + 1, "caption": found.caption, "dialog": turns})
        if split != "train":  # those of train are COCO's
            file = f"VisualDialog_{name}_{i + 1:012d}.jpg"
            _picture(root / "visdial" / f"VisualDialog_{name}" / file, crowd.scene(seed, i, size), size)
    data = {"questions": list(asked), "answers": list(said), "dialogs": rows}
    _json(root / "visdial" / f"visdial_1.0_{split}.json", {"version": "1.0", "split": name, "data": data})
    if split != "train":
        _json(root / "visdial" / f"visdial_1.0_{split}_dense_annotations.json", dense)


def _picture(path: pathlib.Path, scene: dict, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(crowd.png(scene, size))


def _json(path: pathlib.Path, content) -> None:
    _text(path, json.dumps(content) + "\n")


def _text(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
