"""The files that are scored: predictions in the form that servers take, references as published or as BLIP has them.

Every reader says what a file lacks in one ValueError that begins with the file's name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from blip_jax import buckets
from blip_jax.data.pieces import parsed

SHOWN = 3  # examples that an error names


def content(path: str) -> Any:
    """What a JSON file holds; of JSON lines the list of their values. ValueError: it is neither."""
    data = _bytes(path)
    if data.startswith((b"PK\3\4", b"\x1f\x8b")):
        raise ValueError(f"{path}: it is compressed: unpack it first")
    try:
        text = data.decode("utf-8-sig").strip()
        try:
            return parsed(text)
        except ValueError:
            if not text.startswith("{") or "\n" not in text:
                raise
            return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: neither JSON nor JSON lines ({e})") from None


def _bytes(path: str) -> bytes:
    with buckets.opened(path) as file:
        return file.read()


def rows(path: str, fields: Mapping[str, Callable[[Any], bool]], form: str) -> list[dict]:
    """The objects of a list, each with `fields` (name -> whether a value can be one). form: how a row should look."""
    found = content(path)
    if not isinstance(found, list):
        raise ValueError(f"{path}: a list of {form} is expected, not {_kind(found)}")
    if not found:
        raise ValueError(f"{path}: the list is empty; {form} are expected")
    for i, row in enumerate(found):
        if not isinstance(row, dict) or not all(name in row and fits(row[name]) for name, fits in fields.items()):
            raise ValueError(f"{path}: row {i} is no {form}: {json.dumps(row)[:120]}")
    return found


def _kind(value) -> str:
    return f"an object with {sorted(value)[:6]}" if isinstance(value, dict) else f"a {type(value).__name__}"


def is_number(value) -> bool:
    """Whether a value can be an id: a whole number, also as text."""
    return isinstance(value, int) and not isinstance(value, bool) or isinstance(value, str) and value.isdecimal()


def is_text(value) -> bool:
    return isinstance(value, str)


def is_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def single(path: str, found: Iterable[tuple[Hashable, Any]], what: str) -> dict[Hashable, Any]:
    """The pairs as a dict. ValueError: something, such as "question", occurs twice."""
    out, twice = {}, []
    for key, value in found:
        twice += [key] if key in out else []
        out[key] = value
    if twice:
        raise ValueError(
            f"{path}: {_some(twice)} {what}s occur more than once, such as {twice[:SHOWN]}: leave one each"
        )
    return out


def check_complete(path: str, given: Iterable[Hashable], wanted: Iterable[Hashable], what: str, of: str) -> None:
    """ValueError: the predictions of the file `path` are not one for each `what` of the file `of`."""
    given, wanted = set(given), set(wanted)
    missing, more = sorted(wanted - given, key=str), sorted(given - wanted, key=str)
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} {what}s have no prediction, such as {missing[:SHOWN]}")
    if more:
        problems.append(f"{len(more)} predictions are of {what}s that {of} lacks, such as {more[:SHOWN]}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}: give one prediction for each, or the file they belong to")


def _some(found: Sequence) -> int:
    return len(set(found))


# --- captions ---------------------------------------------------------------------------------------------------------
class People(NamedTuple):
    """What people wrote about pictures."""

    captions: dict[int, list[str]]
    domains: dict[int, str]  # of NoCaps; {} where there are none


def caption_results(path: str) -> dict[int, str]:
    """COCO's results, also NoCaps': [{"image_id": 7, "caption": "a dog"}]; a caption may be empty."""
    found = rows(path, {"image_id": is_number, "caption": is_text}, '{"image_id": 7, "caption": "a dog"}')
    return single(path, ((int(row["image_id"]), row["caption"]) for row in found), "image")


def caption_references(path: str) -> People:
    """An annotation file in COCO's layout, also NoCaps', or BLIP's list [{"image", "caption"}], whose pictures are
    named by the number at the end of their file's name.
    """
    found = content(path)
    if isinstance(found, list):
        return People(_of_lists(path, found), {})
    if not isinstance(found, dict) or not all(isinstance(found.get(name), list) for name in ("images", "annotations")):
        raise ValueError(
            f"{path}: it is neither in COCO's layout, with `images` and `annotations` of captions, nor BLIP's list of "
            "{image, caption}"
        )
    captions: dict[int, list[str]] = {}
    domains: dict[int, str] = {}
    for row in found["images"]:
        if not isinstance(row, dict) or not is_number(row.get("id")):
            raise ValueError(f"{path}: a picture without `id`: {json.dumps(row)[:120]}")
        captions[int(row["id"])] = []
        if row.get("domain"):
            domains[int(row["id"])] = str(row["domain"])
    for row in found["annotations"]:
        whole = isinstance(row, dict) and is_number(row.get("image_id")) and is_text(row.get("caption"))
        if not whole or int(row["image_id"]) not in captions:
            raise ValueError(f"{path}: an annotation is no caption of one of its `images`: {json.dumps(row)[:120]}")
        captions[int(row["image_id"])].append(row["caption"])
    return People(captions, domains)


def picture_ids(path: str) -> list[int]:
    """The ids of the pictures to caption, in order: of a file in COCO's layout, of BLIP's list of NoCaps, or of its
    lists of captions, whose pictures are named by the number at the end of their file's name.
    """
    found = content(path)
    if isinstance(found, list) and not any(isinstance(row, dict) and "img_id" in row for row in found):
        return list(_of_lists(path, found))
    listed, field = (found, "img_id") if isinstance(found, list) else (found.get("images"), "id")
    if not isinstance(listed, list) or not all(isinstance(row, dict) and is_number(row.get(field)) for row in listed):
        raise ValueError(f"{path}: it is neither in COCO's layout, with `images`, nor BLIP's list of {{image, img_id}}")
    return list(single(path, ((int(row[field]), None) for row in listed), "picture"))


def _of_lists(path: str, found: list) -> dict[int, list[str]]:
    captions: dict[int, list[str]] = {}
    for i, row in enumerate(found):
        row = row if isinstance(row, dict) else {}
        texts = [row["caption"]] if is_text(row.get("caption")) else row.get("caption")
        number = image_number(row.get("image"))
        if number is None or not is_texts(texts):
            raise ValueError(
                f'{path}: row {i} is no {{"image": "COCO_val2014_000000000007.jpg", "caption": ["a dog", ...]}}: '
                f"{json.dumps(found[i])[:120]}"
            )
        captions.setdefault(number, []).extend(texts)
    return captions


def image_number(name) -> int | None:
    """The number at the end of a picture's file name, COCO's image_id; None: there is none."""
    match = re.search(r"(\d+)$", os.path.splitext(os.path.basename(name))[0]) if isinstance(name, str) else None
    return int(match[1]) if match else None


# --- questions --------------------------------------------------------------------------------------------------------
def vqa_results(path: str) -> dict[int, str]:
    """The server's form: [{"question_id": 7, "answer": "yes"}]."""
    found = rows(path, {"question_id": is_number, "answer": is_text}, '{"question_id": 7, "answer": "yes"}')
    return single(path, ((int(row["question_id"]), row["answer"]) for row in found), "question")


def vqa_references(path: str) -> dict[int, dict]:
    """Question -> {"answers", "answer_type", "question_type"} of official annotations or BLIP's list with `answer`."""
    found = content(path)
    asked = found.get("annotations") if isinstance(found, dict) else found
    if not isinstance(asked, list):
        has = "questions alone" if isinstance(found, dict) and "questions" in found else _kind(found)
        raise ValueError(
            f"{path}: it holds {has}: give VQA's annotations, v2_mscoco_*_annotations.json, or BLIP's list"
        )
    out = []
    for row in asked:
        answers = _answers(row) if isinstance(row, dict) else []
        if not is_texts(answers) or not answers or not is_number(row.get("question_id")):
            raise ValueError(f"{path}: a question without `question_id` or answers of people: {json.dumps(row)[:120]}")
        types = {name: row.get(name, "") for name in ("answer_type", "question_type")}
        out.append((int(row["question_id"]), {"answers": answers} | types))
    return single(path, out, "question")


def _answers(row: dict) -> Any:
    """Those of people, in an official annotation or in BLIP's row."""
    official = row.get("answers")
    return [a.get("answer") if isinstance(a, dict) else a for a in official] if official else row.get("answer")


class Asked(NamedTuple):
    """The questions of a file."""

    ids: list[int]
    subset: str  # of the pictures, as "test2015"; "" where the file does not say


def vqa_questions(path: str) -> Asked:
    """Of an official file of questions, or of BLIP's list, in order; annotations beside them ask nothing."""
    found = content(path)
    if isinstance(found, dict) and "annotations" in found and "questions" not in found:
        return Asked([], "")
    asked = found.get("questions") if isinstance(found, dict) else found
    if not isinstance(asked, list) or not all(isinstance(q, dict) and is_number(q.get("question_id")) for q in asked):
        raise ValueError(f"{path}: it is no file of VQA's questions: each needs a `question_id`")
    subset = found.get("data_subtype", "") if isinstance(found, dict) else ""
    return Asked(list(single(path, ((int(q["question_id"]), None) for q in asked), "question")), subset)


# --- NLVR2 ------------------------------------------------------------------------------------------------------------
LABELS = {"true": True, "false": False}
IDENTIFIER = re.compile(r"(\w+)-(\d+)-(\d+)-(\d+)")  # split-set-pair-sentence


def nlvr_results(path: str) -> dict[str, bool]:
    """The official form, a line "dev-0-0-0,True" each, of any case; or a list of {"identifier", "label"}."""
    text = _bytes(path).decode("utf-8-sig", "replace").strip()
    if text.startswith(("[", "{")):
        fits = {"identifier": is_text, "label": lambda label: str(label).lower() in LABELS}
        found = rows(path, fits, '{"identifier": "dev-0-0-0", "label": true}')
        pairs = [(row["identifier"].strip(), LABELS[str(row["label"]).lower()]) for row in found]
    else:
        pairs = []
        for i, line in enumerate(text.splitlines(), 1):
            name, comma, label = line.rpartition(",")
            if not line.strip():
                continue
            if not comma or label.strip().lower() not in LABELS:
                raise ValueError(f'{path}: line {i} is no "dev-0-0-0,True": {line[:80]!r}')
            pairs.append((name.strip(), LABELS[label.strip().lower()]))
    if not pairs:
        raise ValueError(f'{path}: it holds no prediction; a line "dev-0-0-0,True" each is expected')
    return single(path, pairs, "example")


def nlvr_references(path: str) -> dict[str, tuple[bool | None, str]]:
    """Identifier -> (label or None, what examples of one sentence and set of pictures share), of an official file."""
    found = content(path)
    found = [found] if isinstance(found, dict) and "identifier" in found else found  # a file of one line
    if isinstance(found, list) and any(isinstance(row, dict) and "images" in row for row in found):
        raise ValueError(f"{path}: BLIP's lists have no identifiers: give the official file, as dev.json or test1.json")
    out = []
    for row in found if isinstance(found, list) else [found]:
        match = IDENTIFIER.fullmatch(str(row.get("identifier", ""))) if isinstance(row, dict) else None
        if not match:
            raise ValueError(f"{path}: not one of NLVR2's official rows, which have an `identifier`: {str(row)[:120]}")
        label = LABELS.get(str(row.get("label")).lower())
        out.append((match[0], (label, f"{match[1]}-{match[2]}-{match[4]}")))
    return single(path, out, "example")


# --- Visual Dialog ----------------------------------------------------------------------------------------------------
class Round(NamedTuple):
    """One question of a dialog."""

    options: int  # how many; 0: none are known, and the round is history
    truth: int | None  # which of them is true; None: not known


def visdial_rounds(path: str) -> dict[tuple[int, int], Round]:
    """(image_id, round_id from 1) -> round, of visdial_1.0_*.json, in order."""
    found = content(path)
    dialogs = found.get("data", {}).get("dialogs") if isinstance(found, dict) else None
    if not isinstance(dialogs, list):
        raise ValueError(f"{path}: it is no file of Visual Dialog 1.0, with `data` and its `dialogs`")
    out = []
    for dialog in dialogs:
        if not isinstance(dialog, dict) or not is_number(dialog.get("image_id")):
            raise ValueError(f"{path}: a dialog without `image_id`: {json.dumps(dialog)[:120]}")
        for number, turn in enumerate(dialog.get("dialog") or [], 1):
            turn = turn if isinstance(turn, dict) else {}
            options, truth = turn.get("answer_options") or [], turn.get("gt_index")
            if truth is not None and options and not 0 <= truth < len(options):
                raise ValueError(f"{path}: gt_index {truth} of {len(options)} options, picture {dialog['image_id']}")
            out.append(((int(dialog["image_id"]), number), Round(len(options), truth if options else None)))
    return single(path, out, "round")


def visdial_relevance(path: str) -> dict[tuple[int, int], list[float]]:
    """(image_id, round_id) -> relevance of each option, of the dense annotations of val or of the sample of train."""
    found = content(path)
    out = []
    for row in found if isinstance(found, list) else [found]:
        values = row.get("gt_relevance", row.get("relevance")) if isinstance(row, dict) else None
        if not isinstance(values, list) or not is_number(row.get("image_id")) or not is_number(row.get("round_id")):
            raise ValueError(
                f"{path}: no row of dense annotations, {{image_id, round_id, gt_relevance}}: {str(row)[:120]}"
            )
        out.append(((int(row["image_id"]), int(row["round_id"])), values))
    return single(path, out, "round")


def visdial_results(path: str) -> dict[tuple[int, int], list[int]]:
    """The server's form: [{"image_id": 7, "round_id": 1, "ranks": [3, 1, 2, ...]}], 1 for the best option."""
    fits = {"image_id": is_number, "round_id": is_number, "ranks": lambda ranks: isinstance(ranks, list)}
    found = rows(path, fits, '{"image_id": 7, "round_id": 1, "ranks": [3, 1, 2, ...]}')
    for row in found:
        if sorted(map(str, row["ranks"])) != sorted(map(str, range(1, len(row["ranks"]) + 1))):
            raise ValueError(
                f"{path}: the ranks of picture {row['image_id']}, round {row['round_id']} are not 1 to "
                f"{len(row['ranks'])}, each once"
            )
    return single(
        path, (((int(r["image_id"]), int(r["round_id"])), list(map(int, r["ranks"]))) for r in found), "round"
    )


# --- questions about videos -------------------------------------------------------------------------------------------
def video_qa_results(path: str) -> dict[str, dict[str, str]]:
    """Question -> {"answer", and others by the name of how they were made, "rank_vqa", say}: `evaluate`'s
    predictions.json, [{"question_id": 7, "answer": "dog"}], where every row has the same names.
    """
    found = rows(path, {"question_id": _is_id, "answer": is_text}, '{"question_id": 7, "answer": "dog"}')
    names = [name for name in found[0] if name != "question_id"]
    for i, row in enumerate(found):
        if row.keys() != {"question_id", *names} or not all(is_text(row[name]) for name in names):
            raise ValueError(f"{path}: row {i} has not texts of {names}, as row 0 has: {json.dumps(row)[:120]}")
    return single(path, ((str(row.pop("question_id")), row) for row in map(dict, found)), "question")


def video_qa_references(path: str) -> dict[str, str]:
    """Question -> the right answer, of MSRVTT-QA's and MSVD-QA's files, {id, question, answer, video_id}, or LAVIS's,
    with `question_id`.
    """
    found = content(path)
    out = []
    for row in found if isinstance(found, list) else [found]:
        number = row.get("question_id", row.get("id")) if isinstance(row, dict) else None
        if not _is_id(number) or not is_text(row.get("answer")):
            raise ValueError(f"{path}: no row of questions about videos, {{id, answer}}: {str(row)[:120]}")
        out.append((str(number), row["answer"]))
    if not out:
        raise ValueError(f"{path}: it holds no question")
    return single(path, out, "question")


def _is_id(value) -> bool:
    return is_number(value) or is_text(value) and bool(value)
