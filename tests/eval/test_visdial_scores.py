"""Visual Dialog's numbers against what the challenge's starter code gave, and by hand."""

import json

import numpy as np
import pytest
from world.golden import folder

from blip_jax.eval import visdial

GOLDEN = folder("scores/visdial")
WANT = json.loads((GOLDEN / "expected.json").read_text())


def arrays(name):
    with np.load(GOLDEN / "cases.npz") as found:
        return {key.split("/")[1]: found[key] for key in found if key.startswith(f"{name}/")}


@pytest.mark.parametrize("name", WANT)
def test_the_official_numbers(name):
    case = arrays(name)
    dialogs, rounds, options = case["scores"].shape
    np.testing.assert_array_equal(visdial.ranks(case["scores"]), case["ranks"])
    flat = case["scores"].reshape(-1, options)
    got = visdial.sparse(list(zip(flat, case["ans_ind"].reshape(-1))))
    annotated = case["scores"][np.arange(dialogs), case["round_id"] - 1]
    got |= visdial.dense(list(zip(annotated, case["gt_relevance"])))
    assert got.pop("ties") == got.pop("without_relevance") == 0 and len(flat) == dialogs * rounds
    assert got == {key: pytest.approx(value, abs=1e-6, rel=1e-6) for key, value in WANT[name].items()}


def test_ranks_give_the_numbers_that_scores_give():
    case = arrays(next(iter(WANT)))
    scores, ranks, truth = case["scores"][0], case["ranks"][0], case["ans_ind"][0]
    assert visdial.sparse(list(zip(scores, truth))) == visdial.sparse(list(zip(-ranks, truth)))
    assert visdial.ndcg(scores[0], case["gt_relevance"][0]) == visdial.ndcg(-ranks[0], case["gt_relevance"][0])


def test_a_tie_is_behind_its_equals_and_counted():
    assert visdial.ranks(np.array([1.0, 3.0, 1.0, 2.0])).tolist() == [3, 1, 4, 2]
    assert visdial.truth_rank([1.0, 3.0, 1.0], 0) == (3, True) and visdial.truth_rank([1.0, 3.0, 1.0], 1) == (1, False)
    got = visdial.sparse([([0.0] * 100, 0), ([1.0, 0.0], 0)])
    assert got == {"r@1": 0.5, "r@5": 0.5, "r@10": 0.5, "mean": 50.5, "mrr": pytest.approx(0.505), "ties": 1}


def test_ndcg_by_hand_and_without_relevance():
    # two options have relevance: the first two places count, 0.5 / log2(2) + 0 of 1 / log2(2) + 0.5 / log2(3)
    assert visdial.ndcg([9, 5, 1], [0.5, 0.0, 1.0]) == pytest.approx(0.5 / (1 + 0.5 / np.log2(3)))
    assert visdial.ndcg([9, 5, 1], [0, 0, 0]) is None
    got = visdial.dense([([1, 2], [0.0, 1.0]), ([1, 2], [0.0, 0.0])])
    assert got == {"ndcg": 1.0, "without_relevance": 1}
    with pytest.raises(ValueError, match="none of 1 rounds has a relevant option"):
        visdial.dense([([1, 2], [0.0, 0.0])])
    with pytest.raises(ValueError, match="3 options are scored and 2 have a relevance"):
        visdial.ndcg([1, 2, 3], [0.0, 1.0])
    with pytest.raises(ValueError, match="no round with a true option"):
        visdial.sparse([])
