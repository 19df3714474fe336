"""VQA's accuracy against what the official program gave, and by hand."""

import json

import pytest
from world.golden import folder

from blip_jax.eval import vqa

GOLDEN = folder("scores/vqa_accuracy")
LAVIS = folder("blip2/text_and_scores") / "meta.json"


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def test_texts_are_normalised_as_by_the_official_program():
    for row in golden("normalisation"):
        assert vqa.without_punctuation(row["text"]) == row["punctuation"], row
        assert vqa.plain_words(row["punctuation"]) == row["final"], row


def test_the_tables_are_the_official_programs():
    tables = golden("tables")
    assert vqa.CONTRACTIONS == tables["contractions"] and vqa.NUMBERS == tables["manualMap"]
    assert list(vqa.ARTICLES) == tables["articles"] and set(vqa.PUNCTUATION) == set(tables["punct"])


def test_every_golden_question_and_the_means():
    whole = golden("cases")
    for case in whole["cases"]:
        assert round(100 * vqa.accuracy(case["prediction"], case["answers"]), 2) == case["accuracy_percent"], case
    questions = {case["question_id"]: case for case in whole["cases"]}
    got = vqa.score({number: case["prediction"] for number, case in questions.items()}, questions)
    assert got["accuracy"] == whole["overall"]
    assert {k.split("/", 1)[1]: v for k, v in got.items() if k.startswith("answer_type")} == whole["perAnswerType"]
    assert {k.split("/", 1)[1]: v for k, v in got.items() if k.startswith("question_type")} == whole["perQuestionType"]


def test_answers_are_normalised_and_scored_as_by_lavis():
    case = json.loads(LAVIS.read_text(encoding="utf-8"))
    for text, plain in case["normalise"]:
        assert vqa.plain_words(vqa.without_punctuation(text)) == plain, text
    other = 0
    for prediction, answers, accuracy in case["vqa"]:
        got = vqa.accuracy(prediction, answers, as_lavis=True)
        assert got == pytest.approx(accuracy, abs=1e-9), (prediction, answers)
        whole = vqa.score({1: prediction}, {1: {"answers": answers}}, as_lavis=True)
        assert whole == {"accuracy": round(100 * accuracy, 2)}
        other += got != vqa.accuracy(prediction, answers)
    assert other  # the official program has another opinion of some
    assert vqa.accuracy("red", ["red"], as_lavis=True) == 0  # one answer alone has no others to agree with


def test_a_quirk_or_two():
    assert vqa.accuracy("Yes", ["yes"] * 10) == 0  # all agree: nothing is normalised
    assert vqa.accuracy("Yes", ["yes"] * 9 + ["no"]) == pytest.approx(1)
    assert vqa.accuracy("red", ["red"] * 3 + ["w"] * 7) == pytest.approx(0.9)
    with pytest.raises(ValueError, match=r"1 questions have no prediction, such as \[7\]"):
        vqa.score({}, {7: {"answers": ["a"]}})


def test_a_list_of_answers_is_what_majorities_say_often():
    asked = [["Two", "two", "3"]] * 5 + [["2"]] * 4 + [["a dog", "cat", "cat"]] * 10 + [["rare"]] * 8 + [[]]
    assert vqa.common_answers(asked) == ["cat", "2"]
    assert vqa.common_answers(asked, at_least=8) == ["cat", "2", "rare"]
    assert vqa.common_answers([["the"]] * 9) == []  # nothing is left of it
