"""The sections of the tasks' report: numbers as given, text escaped, each there exactly when its data is."""

import re

import pytest
from world.pictures import encode, noise

from blip_jax.demo.report import page

HOSTILE = """<script>alert(1)</script> "'><img src=x onerror=alert(2)>"""
PARTS = {"answered": "questions", "compared": "pairs", "described": "described", "continued": "dialogs"}


def results() -> dict:
    image = encode(noise(1, 16, 16), "PNG")
    ranked = {"mrr": 0.876, "r@1": 0.765, "r@5": 0.987, "r@10": 0.991, "ndcg": 0.954, "mean": 1.62}
    asked = {"question": "is there a star?", "answer": "no", "truth": "yes", "right": False}
    turn = {"question": "how many", "answer": "two", "first": "i see two stars", "true": True, "rank": 2}
    return {
        "answered": [
            {"kind": "all", "questions": 2000, "accuracy": 93.21, "commonest": 41.5, "error": 1.1},
            {"kind": "is there", "questions": 250, "accuracy": 97.5, "commonest": 50.8},
        ],
        "question_cards": [{"image": image, "asked": [asked, asked | {"answer": "yes", "right": True}]}],
        "compared": [
            {"kind": "all", "examples": 600, "accuracy": 87.65, "consistency": 61.3, "error": 2.6},
            {"kind": "both", "examples": 80, "accuracy": 91.25, "consistency": 70.0},
        ],
        "pair_cards": [{"images": [image, image], "sentence": "both are red", "answer": True, "right": False}],
        "described": [
            {"name": "captioner", "CIDEr": 1.234, "colours": 0.98, "objects": 0.91, "whole": 0.89},
            {"name": "one caption for all", "CIDEr": 0.123, "colours": 0.1, "objects": 0.02, "whole": 0.01},
        ],
        "described_note": "Approximate.",
        "continued": [{"name": "model", "error": 0.02, **ranked}, {"name": "chance", "mrr": 0.052, "mean": 50.5}],
        "turns": [{"kind": "what shape", "rounds": 60, "mrr": 0.812, "frequent": 0.321}],
        "dialog_cards": [{"image": image, "caption": "a star", "rounds": [turn, turn | {"rank": 1}]}],
    }


def shown(source: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", source, flags=re.S).split())


def test_the_numbers_are_those_given():
    text = shown(page.page(results()))
    for words in ("93.2", "41.5", "2,000", "97.5", "87.7", "61.3", "123.4", "12.3", "98.0", "Approximate.",
                  "87.6", "76.5", "95.4", "1.6", "5.2", "50.5", "81.2", "32.1"):  # fmt: skip
        assert words in text, words
    for tile in ("93.2 % accuracy of answers", "87.7 % of sentences", "123.4 CIDEr × 100", "87.6 mean reciprocal"):
        assert tile in text.replace("\u202f", " "), tile
    assert text.count("✓ right") == 1 and text.count("✕ wrong") == 2 and "it is yes" in text
    assert "“both are red” true" in text and "rank 2 how many two first here: i see two stars" in text


@pytest.mark.parametrize("part", PARTS)
def test_a_section_is_there_exactly_when_its_data_is(part):
    ids = lambda given: re.findall(r'<section id="(\w+)">', page.page(given))
    assert ids(results()) == list(PARTS.values())
    assert ids({part: results()[part]}) == [PARTS[part]] and ids({part: []}) == []


def test_captions_without_scores_have_those_of_truth():
    given = [{**row, "CIDEr": None} for row in results()["described"]]
    text = shown(page.page({"described": given}))
    assert "CIDEr" not in text and "89.0" in text


def test_hostile_text_stays_text():
    given = results()
    for part, name in (("answered", "kind"), ("compared", "kind"), ("described", "name"), ("continued", "name"),
                       ("turns", "kind"), ("pair_cards", "sentence"), ("dialog_cards", "caption")):  # fmt: skip
        given[part][0][name] = HOSTILE
    given["described_note"] = HOSTILE
    given["question_cards"][0]["asked"][0] |= dict.fromkeys(("question", "answer", "truth"), HOSTILE)
    given["dialog_cards"][0]["rounds"][0] |= dict.fromkeys(("question", "answer", "first"), HOSTILE)
    source = page.page(given)
    assert "<script" not in source and source.count("<img ") == 4 and source.count("alert(1)") == 14


def test_a_row_that_lacks_something_is_named():
    given = results()
    del given["answered"][1]["commonest"]
    with pytest.raises(ValueError, match=r"answered\[1\] lacks 'commonest'"):
        page.page(given)
