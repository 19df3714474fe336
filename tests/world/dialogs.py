"""Dialogs about pictures in Visual Dialog's official layout, with what is odd in the real ones."""

import json
import pathlib

from world.pictures import encode, noise

QUESTIONS = ["Is it a ring?", "What color is it?", "Is it small?", "Where is the star?"]
ANSWERS = ["yes", "no", "red", "blue", "a small red ring", "left of a star", "Yes", "a star"]
FOLDERS = {
    "train": "val2014/COCO_val2014_{:012d}.jpg",
    "val": "VisualDialog_val2018/VisualDialog_val2018_{:012d}.jpg",
    "test": "VisualDialog_test2018/VisualDialog_test2018_{:012d}.jpg",
}


def turn(number: int, options=6, truth=0, answer: bool = True) -> dict:
    """A round that asks question `number` and is answered by that of its first `options` options at `truth`."""
    out = {"question": number % len(QUESTIONS)}
    out |= {"answer": (number + truth) % len(ANSWERS)} if answer else {}
    out |= {"answer_options": [(number + i) % len(ANSWERS) for i in range(options)]} if options else {}
    return out | ({"gt_index": truth} if options and answer else {})


DIALOGS = {  # image_id -> rounds
    "train": {
        n: [turn(n, truth=1), turn(n + 1, options=0), turn(n + 2, truth=2)] for n in range(1, 5)
    },  # a round that is history alone
    "val": {n: [turn(n, truth=n % 6), turn(n + 1, truth=3)] for n in range(11, 14)},
    "test": {21: [turn(0, options=0), turn(3, answer=False)], 22: [turn(1, answer=False)]},
}
RELEVANCE = {11: [0.0, 0.5, 0, 1.0, 0, 0], 12: [0.0] * 6, 13: [1.0] * 6}  # of the second round of each


def write_files(folder: pathlib.Path) -> pathlib.Path:
    """visdial_1.0_{train,val,test}.json, the dense annotations of val, and the pictures."""
    for split, dialogs in DIALOGS.items():
        rows = [{"image_id": n, "caption": f"A star {n % 2}.", "dialog": turns} for n, turns in dialogs.items()]
        write_split(folder, split, rows)
        for n in dialogs:
            path = folder / FOLDERS[split].format(n)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode(noise(n)))
    dense = [{"image_id": n, "round_id": 2, "gt_relevance": own} for n, own in RELEVANCE.items()]
    (folder / "visdial_1.0_val_dense_annotations.json").write_text(json.dumps(dense))
    return folder


def write_split(folder: pathlib.Path, split: str, rows: list[dict]) -> None:
    whole = {
        "version": "1.0",
        "split": f"{split}2018",
        "data": {"questions": QUESTIONS, "answers": ANSWERS, "dialogs": rows},
    }
    (folder / f"visdial_1.0_{split}.json").write_text(json.dumps(whole))
