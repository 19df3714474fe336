"""NLVR2's accuracy and consistency against what the official program gave."""

import json

import pytest
from world.golden import folder

from blip_jax.eval import nlvr

GOLDEN = folder("scores/nlvr_consistency")


def test_the_official_numbers():
    rows = [json.loads(line) for line in (GOLDEN / "test1.json").read_text().splitlines()]
    told = dict(line.split(",") for line in (GOLDEN / "predictions.csv").read_text().splitlines())
    want = json.loads((GOLDEN / "expected.json").read_text())
    true = lambda text: text.strip().lower() == "true"
    groups = ["-".join(part for i, part in enumerate(row["identifier"].split("-")) if i != 2) for row in rows]
    got = nlvr.score([true(told[row["identifier"]]) for row in rows], [true(row["label"]) for row in rows], groups)
    assert got == {name: pytest.approx(100 * want[name]) for name in ("accuracy", "consistency")}
    assert len(set(groups)) == want["sentences"] < len(rows) == want["examples"]


def test_as_many_of_each_are_needed():
    with pytest.raises(ValueError, match="1 predictions, 2 labels, 2 groups"):
        nlvr.score([True], [True, False], ["a", "a"])
