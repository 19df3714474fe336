"""Video retrieval's numbers against what the original gave."""

import json

import numpy as np
import pytest
from world.golden import folder

from blip_jax.eval import recall

GOLDEN = folder("scores/video_retrieval")
WANT = json.loads((GOLDEN / "expected.json").read_text())


@pytest.mark.parametrize("name", WANT)
def test_the_originals_numbers(name):
    with np.load(GOLDEN / "cases.npz") as found:
        v2t, t2v = found[f"{name}/scores_v2t"], found[f"{name}/scores_t2v"]
    got = recall.video(v2t, t2v.T, np.arange(len(t2v)))
    assert got == {key: pytest.approx(value, rel=1e-12) for key, value in WANT[name].items()}
    assert any((v2t != t2v.T).ravel())  # so that exchanging the two would show


def test_the_median_of_an_even_number_is_between_two_ranks():
    t2v = np.array([[3.0, 2.0], [1.0, 1.0]])  # [videos, texts]: the second text finds its video second
    assert recall.video(t2v, t2v, np.arange(2))["vid_mdR"] == 1.5
