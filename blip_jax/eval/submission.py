"""Files that servers take, each checked against the file of what was asked before there is one: everything answered,
once, in plain types.

Every function returns (file name, text); the caller writes them. ValueError: predictions are missing, too many, or of a
form that the server refuses.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence

from blip_jax.eval import files

GIVEN = "the predictions"  # what errors call them


def vqa(
    predictions: Iterable[Mapping], questions: Sequence[str], answers: Sequence[str] = (), name: str = "blip"
) -> tuple[str, str]:
    """[{"question_id", "answer"}] for EvalAI, in the order of the questions.

    predictions: such rows. questions: official files of questions, or BLIP's lists; annotations beside them are
    passed over. answers: the only ones there may be, those that were ranked. The server wants all of test2015 for
    test-dev, too.
    """
    parts = [files.vqa_questions(path) for path in questions]
    asked = [number for part in parts for number in part.ids]
    subset = "_".join(dict.fromkeys(part.subset for part in parts if part.subset)) or "blip_list"
    allowed = set(answers)
    given = files.single(GIVEN, ((row["question_id"], row["answer"]) for row in predictions), "question")
    files.check_complete(GIVEN, given, asked, "question", ", ".join(questions))
    if odd := [text for text in given.values() if not isinstance(text, str) or allowed and text not in allowed]:
        raise ValueError(f"{len(odd)} answers are not of the list that was ranked, such as {odd[: files.SHOWN]}")
    rows = [{"question_id": _plain(key), "answer": given[key]} for key in dict.fromkeys(asked)]
    return f"v2_OpenEnded_mscoco_{subset}_{name}_results.json", json.dumps(rows) + "\n"


def captions(texts: Mapping[int, str], pictures: str, name: str = "blip") -> tuple[str, str]:
    """[{"image_id", "caption"}] for COCO's and NoCaps' servers, in the order of the pictures; COCO's wants it zipped.

    texts: image_id -> caption. pictures: image_info_test2014.json, nocaps_*_image_info.json or other files in COCO's
    layout, or BLIP's list of NoCaps {image, img_id}.
    """
    asked = files.picture_ids(pictures)
    files.check_complete(GIVEN, texts, asked, "picture", pictures)
    if odd := [key for key, text in texts.items() if not isinstance(text, str) or "\n" in text]:
        raise ValueError(f"{len(odd)} captions are no text of one line, such as that of {odd[: files.SHOWN]}")
    rows = [{"image_id": _plain(key), "caption": texts[key]} for key in asked]
    return f"captions_{name}_results.json", json.dumps(rows) + "\n"


def nlvr2(labels: Iterable[tuple[str, bool]], examples: str) -> tuple[str, str]:
    """Lines "dev-0-0-0,True" as NLVR2's evaluation reads them. labels: (identifier, label); examples: official file."""
    given = files.single(GIVEN, labels, "example")
    asked = files.nlvr_references(examples)
    files.check_complete(GIVEN, given, asked, "example", examples)
    return "predictions.csv", "".join(f"{key},{bool(given[key])}\n" for key in asked)


def visdial(ranks: Mapping[tuple[int, int], Sequence[int]], dialogs: str, name: str = "blip") -> tuple[str, str]:
    """[{"image_id", "round_id", "ranks"}] for EvalAI: of every round with options, all ten of val, the last of test.

    ranks: (image_id, round_id from 1) -> the rank of each option, 1 for the best. dialogs: visdial_1.0_*.json.
    """
    asked = {key: own for key, own in files.visdial_rounds(dialogs).items() if own.options}
    files.check_complete(GIVEN, ranks, asked, "round", dialogs)
    for key, own in asked.items():
        if sorted(ranks[key]) != list(range(1, own.options + 1)):
            raise ValueError(
                f"the ranks of picture {key[0]}, round {key[1]} are not 1 to {own.options}, each once: "
                f"{list(ranks[key])[:10]}"
            )
    rows = [
        {
            "image_id": _plain(image),
            "round_id": _plain(number),
            "ranks": [_plain(rank) for rank in ranks[image, number]],
        }
        for image, number in asked
    ]
    return f"visdial_{name}_ranks.json", json.dumps(rows) + "\n"


def _plain(value) -> int:
    """A whole number, NumPy's too, as Python's, which JSON can hold."""
    return operator.index(value)
