"""The sections of BLIP-2's report: numbers as given, text escaped, each there exactly when its data is."""

import re

import pytest
from world.pictures import encode, noise

from blip_jax.demo.relations import ALONE, BOTH, RECALL, TRUE, WITH_ITG, WITHOUT_ITG, Relation
from blip_jax.demo.report import page

HOSTILE = """<script>alert(1)</script> "'><img src=x onerror=alert(2)>"""


def results() -> dict:
    metrics = lambda first: (
        {f"{side}_r{k}": first for side in ("txt", "img") for k in (1, 5, 10)}
        | {
            "r_mean": first,
            "itc_r_mean": first - 4,
        }
    )
    found = [("figure 5", Relation(TRUE["objects"], BOTH, ALONE, 41.25, 4.5))]
    found += [("table 6", Relation(RECALL, WITH_ITG, WITHOUT_ITG, -2.5, 1.5))]
    return {
        "captioners": [
            {"name": BOTH, "colours": 0.987, "objects": 0.812, "whole": 0.701},
            {"name": ALONE, "colours": 0.612, "objects": 0.213, "whole": 0.111},
        ],
        "objectives": [{"itg": True, "metrics": metrics(71.5)}, {"itg": False, "metrics": metrics(74.0)}],
        "relations": [{"table": at, **r._asdict(), "verdict": r.verdict} for at, r in found],
        "captions": [
            {
                "image": encode(noise(1, 16, 16), "PNG"),
                "texts": [
                    {"by": BOTH, "text": "a red star", "true": True},
                    {"by": ALONE, "text": "", "true": False},
                ],
            }
        ],
    }


def shown(source: str) -> str:
    return re.sub(r"<style>.*?</style>|<[^>]+>", " ", source, flags=re.S)


def test_the_numbers_are_those_given():
    source = page.page(results())
    text = " ".join(shown(source).split())
    for words in ("98.7", "81.2", "21.3", "71.5", "74.0", "67.5", "85.4", "67.2", "(empty)"):
        assert words in text, words
    assert "both stages > second stage alone" in text.replace("&gt;", ">") and "+41.2 ± 4.5, as in the paper" in text
    assert "-2.5 ± 1.5, the other way round" in text
    assert "21.3\u202f% → 81.2\u202f%" in shown(source) and "74.0 → 71.5" in text
    assert text.count("✓ true") == text.count("✕ false") == 1


@pytest.mark.parametrize("part", ["captioners", "objectives", "captions"])
def test_a_section_is_there_exactly_when_its_data_is(part):
    ids = lambda given: re.findall(r'<section id="(\w+)">', page.page(given))
    assert ids(results()) == ["captioners", "objectives", "captions"]
    assert ids({part: results()[part]}) == [part] and ids({part: []}) == []


def test_hostile_text_stays_text():
    given = results()
    given["captioners"][0]["name"] = given["captions"][0]["texts"][0]["by"] = HOSTILE
    given["captions"][0]["texts"][0]["text"] = HOSTILE
    source = page.page(given)
    assert "<script" not in source and source.count("<img ") == 1 and "alert(1)" in source


def test_a_row_that_lacks_something_is_named():
    given = results()
    del given["captioners"][1]["objects"]
    with pytest.raises(ValueError, match=r"captioners\[1\] lacks 'objects'"):
        page.page(given)
