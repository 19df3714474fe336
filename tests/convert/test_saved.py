"""Settings that come with a checkpoint: whatever is wrong with them is one line, before anything is built."""

import json

import numpy as np
import pytest

from blip_jax import checkpoint, config, trees
from blip_jax.convert import read, saved


@pytest.fixture
def given():
    c = config.base("tiny")
    c.text.buckets = (12, 30)
    return json.loads(c.to_json())


def changed(given: dict, path: str, value=None) -> dict:
    """With another value; without one, the leaf is gone."""
    *above, last = path.split(".")
    node = given
    for name in above:
        node = node[name]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return given


def test_what_a_run_saved_comes_back(given, tmp_path):
    c = saved.settings(given, tmp_path)
    assert json.loads(c.to_json())["model"] == given["model"] and c.text.buckets == (12, 30)
    assert c.objective == "pretrain" and c.optim == config.base().optim
    del given["model"]["init_std"]  # as of a version that had no such leaf, or one that had another
    given["model"]["later"] = 3
    assert saved.settings(given, tmp_path).model.init_std == config.base().model.init_std


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("model.vit.heads", 0, "model.vit.heads is 0: it must be at least 1 and below 2**31"),
        ("model.med.layers", -3, "model.med.layers is -3"),
        ("model.vit.depth", 10**12, "model.vit.depth is 1000000000000: it must be at least 1 and below 2**31"),
        ("model.vit.depth", 1e9, "model.vit.depth is 1000000000.0, not a whole number"),
        ("model.vit.depth", True, "model.vit.depth is True, not a whole number"),
        ("model.vit.width", "48", "model.vit.width is '48', not a whole number"),
        ("model.med.heads", [4], "model.med.heads is [4], not a whole number"),
        ("model.med.heads", 5, "model.med.width = 32 does not divide into model.med.heads = 5"),
        ("model.dropout", float("nan"), "model.dropout is nan"),
        ("model.dropout", "x" * 10**6, "model.dropout is 'xxx"),
        ("text.buckets", 7, "text.buckets is 7, not a list"),
        ("objective", 3, "objective is 3, not a text"),
        ("objective", {"a": 1}, "objective is missing"),
        ("model", 3, "model.vit.depth is missing"),
        ("model", None, "model.vit.depth is missing"),
        ("text", None, "text.max_len is missing"),
        ("objective", None, "objective is missing"),
        ("model.vit", None, "model.vit.heads is missing"),
        ("model.img_size", None, "model.img_size is missing"),
    ],
)
def test_settings_that_no_model_can_have(given, tmp_path, path, value, said):
    with pytest.raises(ValueError) as e:
        saved.settings(changed(given, path, value), tmp_path)
    text = str(e.value)
    assert f"the settings in checkpoint {tmp_path} are not those of a model: " in text and said in text, text
    assert "\n" not in text and len(text) < 1500 and "use another checkpoint" in text


@pytest.mark.parametrize("other", [None, [1], "settings", 3])
def test_no_settings_at_all(other, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} are not those of a model: they are a "):
        saved.settings(other, tmp_path)


def test_sizes_that_the_parameters_have_not(given, tmp_path):
    """Through the reader, as a workdir comes: a depth of a thousand million is refused before a model is built."""
    params = trees.nest(
        {
            "vit/blocks/mlp/fc1/kernel": np.zeros((2, 48, 192), np.float32),
            "vit/blocks/attn/q/kernel": np.zeros((2, 48, 4, 12), np.float32),
            "vision_proj/kernel": np.zeros((48, 256), np.float32),
        }.items()
    )
    saved.check_sizes(saved.settings(given, tmp_path), params, tmp_path)
    given["model"]["vit"]["depth"], given["model"]["vit"]["heads"] = 10**9, 8
    checkpoint.write(tmp_path, {"params": params, "frozen": {}, "extra": None}, {"step": 0}, given)
    with pytest.raises(ValueError) as e:
        read.read(tmp_path)
    for part in (
        "model.vit.depth is 1000000000, but vit/blocks/mlp/fc1/kernel is [2, 48, 192]",
        "model.vit.heads is 8, but vit/blocks/attn/q/kernel is [2, 48, 4, 12]",
    ):
        assert part in str(e.value)
    assert "\n" not in str(e.value)
