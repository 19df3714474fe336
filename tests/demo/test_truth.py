"""Decisions scored against the built-in world: hand-made decision tables whose noise, precision and ROC are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_jax.capfilt import decisions
from blip_jax.capfilt.decisions import Row
from blip_jax.data.scenes import words
from blip_jax.data.scenes.world import Scenes
from blip_jax.data.text.clean import clean_caption
from blip_jax.demo import truth


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
@settings(deadline=None)
def test_roc_area_is_the_chance_that_a_true_text_scores_higher(pairs):
    scores, positive = np.array([s for s, _ in pairs]), np.array([p for _, p in pairs])
    if positive.all() or not positive.any():
        with pytest.raises(ValueError, match="both classes"):
            truth.roc(scores, positive)
        return
    higher = scores[positive][:, None] - scores[~positive][None]
    curve, area = truth.roc(scores, positive)
    assert abs(area - ((higher > 0).mean() + (higher == 0).mean() / 2)) < 1e-9
    assert curve[0] == (0, 0) and curve[-1] == (1, 1)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(curve, curve[1:]))


def write_run(folder, rows):
    (folder / "shards" / "00000").mkdir(parents=True)
    decisions.write(folder / "shards" / "00000" / "decisions.parquet", rows)


def test_noise_is_measured_against_what_is_in_the_pictures(tmp_path):
    world, rows = Scenes(seed=4, count=60, size=32, noise=0.5), []
    for i in range(60):
        ((kind, caption),) = world.web_captions(i)
        cleaned = clean_caption(caption, 30)
        own = [
            Row(
                f"k{i}",
                "web",
                i,
                cleaned,
                "web",
                *((0.9, 0.5) if kind is None else (0.2, 0.1)) if cleaned else (None, None),
            ),
            Row(
                f"k{i}",
                "web",
                i,
                world.clean_captions(i, 2)[1] if i % 3 else "a purple cow",
                "synthetic",
                0.7 if i % 2 else 0.3,
                0.0,
                -3.0,
            ),
        ]
        rows += decisions.judge(own, 0.5)
    write_run(tmp_path, rows + decisions.unreadable("lost", "web", 0, [], "truncated picture"))
    found = truth.noise_of(truth.judged(tmp_path, {"web": world}), 0.5)
    kinds = [world.web_captions(i)[0][0] for i in range(60)]
    false_web = sum(k is not None for k in kinds)
    assert found["before"] == pytest.approx(false_web / 60) and found["web_after"] == 0 and found["auc_wrong"] == 1
    assert found["synthetic_before"] == pytest.approx(1 / 3, abs=0.05) and found["synthetic_after"] == pytest.approx(
        1 / 3, abs=0.05
    )
    kept = [r for r in rows if r.kept]
    right = [r for r in kept if words.is_true(world.scene(r.record), r.text)]
    assert found["precision"] == pytest.approx(len(right) / len(kept)) and 0.5 < found["precision"] < 1
    assert found["after"] == pytest.approx(1 - found["precision"])
    assert {kind: n for kind, n, _ in found["rows"]} == {k or "none": kinds.count(k) for k in set(kinds)}
    assert all(share == (0 if kind == "none" else 1) for kind, _, share in found["rows"])
    assert sum(found["hist"]["true"]) + sum(found["hist"]["false"]) == sum(r.itm is not None for r in rows)


def test_nothing_kept_has_no_precision(tmp_path):
    world = Scenes(seed=4, count=20, size=32, noise=0.5)
    rows = [
        r
        for i in range(20)
        for r in decisions.judge(
            [Row(f"k{i}", "web", i, clean_caption(world.web_captions(i)[0][1], 30) or "x", "web", i / 100, 0.0)], 0.5
        )
    ]
    write_run(tmp_path, rows)
    found = truth.noise_of(truth.judged(tmp_path, {"web": world}), 0.5)
    assert found["precision"] is None and found["after"] is None and found["recall"] == 0


def test_captions_are_checked_by_colours_by_objects_and_as_a_whole():
    def thing(colour, shape, row, col):
        return {"colour": colour, "shape": shape, "size": "large", "row": row, "col": col}

    scene = {
        "objects": [thing("red", "circle", 0, 0), thing("blue", "star", 1, 2)],
        "background": {"kind": "plain", "tone": "grey"},
    }
    given = {  # caption -> colours, objects, the whole
        "a red circle and a blue star on a grey background": (1, 1, 1),
        "a red circle": (1, 1, 1),
        "a small red disc": (1, 1, 0),  # it is large
        "a blue star on a mint background": (1, 1, 0),
        "a blue circle and a red star": (1, 0, 0),
        "a red circle and a red circle": (0, 0, 0),  # there is one
        "a green star": (0, 0, 0),
        "a star": (0, 1, 1),  # no colour is named
        "a grey background": (0, 0, 0),  # no object is named
        "red circle blue": (0, 0, 0),  # outside of the grammar
        "": (0, 0, 0),
    }
    found = truth.hits([scene] * len(given), list(given))
    assert {caption: tuple(int(found[part][i]) for part in truth.PARTS) for i, caption in enumerate(given)} == given
    with pytest.raises(ValueError):
        truth.hits([scene], [])
