"""What the paper orders, checked by name: differences picture by picture, errors from how many there are."""

import numpy as np
import pytest

from blip_jax.demo import relations
from blip_jax.demo.report import paper
from blip_jax.eval import recall


def test_the_relations_are_those_that_every_column_of_the_papers_table_has():
    assert set(paper.relations()) == {
        ("both", "neither"),
        ("both", "filter only"),
        ("both", "captioner only"),
        ("filter only", "neither"),
        ("captioner only", "neither"),
        ("captioner only", "filter only"),
    }


@pytest.mark.parametrize("captions", [(1, 1, 1, 1, 1, 1), (1, 2, 3, 1, 5, 2), (2, 0, 3, 1, 0, 2)])
def test_what_pictures_contribute_has_mean_recall_as_its_mean(captions):
    rng = np.random.default_rng(sum(captions))
    text_image = np.repeat(np.arange(len(captions)), captions)
    i2t, t2i = rng.normal(size=(2, len(captions), len(text_image))).round(1)  # with ties
    each = relations.of_pictures(i2t, t2i, text_image)
    assert len(each) == np.count_nonzero(captions)
    assert each.mean() == pytest.approx(recall.both_ways(i2t, t2i, text_image)["r_mean"])


def test_the_error_covers_other_pictures():
    """Of many draws of pictures, some 95 in 100 have the true difference within the error; of equal models, too."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        common = rng.random(200) < 0.5  # what both find, which a difference of pairs does not count as an error
        a, b = (100.0 * np.where(common, 1, rng.random(200) < p) for p in (0.6, 0.4))
        (found,) = relations.table1({"both": a, "neither": b})
        inside += abs(found.difference - 10) <= found.error
    assert 0.92 < inside / 400 < 0.98
    unpaired = 1.96 * np.sqrt(a.var() / 200 + b.var() / 200)
    assert found.error < 0.9 * unpaired


def test_verdicts():
    assert [relations.verdict(*x) for x in ((2, 1), (-2, 1), (1, 1), (0, 0), (float("nan"), 1), (2, float("inf")))] == [
        "holds",
        "reversed",
        "undecided",
        "undecided",
        "undecided",
        "undecided",
    ]
    same = np.ones(9)
    assert relations.table1({"both": same, "neither": same})[0].verdict == "undecided"


def test_the_second_table_compares_decodings_and_what_the_filter_dropped():
    values = {"nucleus": np.full(50, 80.0), "beam": np.linspace(60, 80, 50), "neither": np.full(50, 50.0)}
    found = relations.table2(values, {"nucleus": (250, 1000), "beam": (190, 1000)})
    assert [(r.larger, r.smaller, r.verdict) for r in found] == [
        ("nucleus", "beam", "holds"),
        ("beam", "neither", "holds"),
        ("nucleus", "beam", "holds"),
    ]
    assert found[2].what == relations.DROPPED and found[2].difference == pytest.approx(6)
    assert found[2].error == pytest.approx(196 * np.sqrt((0.25 * 0.75 + 0.19 * 0.81) / 1000))
    few = relations.table2(values, {"nucleus": (3, 12), "beam": (2, 12)})
    assert few[2].verdict == "undecided"


def test_figure_5_compares_captions_of_the_same_pictures():
    right = {"colours": np.ones(100), "objects": np.repeat((1.0, 0.0), (80, 20)), "whole": np.repeat((1.0, 0.0), 50)}
    wrong = {"colours": np.ones(100), "objects": np.repeat((1.0, 0.0), (20, 80)), "whole": np.tile((1.0, 0.0), 50)}
    found = relations.figure5({relations.BOTH: right, relations.ALONE: wrong})
    assert [(r.what, r.larger, r.smaller) for r in found] == [
        (what, relations.BOTH, relations.ALONE) for what in relations.TRUE.values()
    ]
    assert [r.difference for r in found] == pytest.approx([0, 60, 0])
    assert [r.verdict for r in found] == ["undecided", "holds", "undecided"]
    each = np.repeat((100.0, 0.0), (60, 40))  # of 100 pictures 60 are described by one alone
    assert found[1].error == pytest.approx(1.96 * each.std(ddof=1) / 10)


def test_table_6_compares_both_ways_of_ranking():
    ranked = {relations.WITH_ITG: np.full(9, 70.0), relations.WITHOUT_ITG: np.linspace(50, 60, 9)}
    cosine = {relations.WITH_ITG: np.full(9, 40.0), relations.WITHOUT_ITG: np.linspace(50, 60, 9)}
    found = relations.table6(ranked, cosine)
    assert [(r.what, r.verdict) for r in found] == [(relations.RECALL, "holds"), (relations.COSINE, "reversed")]
    assert [r.difference for r in found] == pytest.approx([15, -15])
