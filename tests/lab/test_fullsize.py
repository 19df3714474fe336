"""The published sizes by shape: parameter counts, and FLOPs of the traced step against the formula."""

import functools

import fullsize
import jax
import jax.numpy as jnp
import pytest

from blip_jax import tasks
from blip_jax.models import flops


@functools.cache
def shapes_and_step(size, objective):
    cfg = fullsize.full_config(size)
    with cfg.unlocked():
        cfg.objective = objective
        if objective != "pretrain":
            cfg.model.img_size = 384  # as fine-tuned
        if objective == "caption":
            cfg.text.max_len = 40
    create, step = fullsize.make(cfg)
    return cfg, jax.eval_shape(create, jax.random.key(0)), step


@pytest.mark.parametrize(
    "size, objective, trainable, total",
    [
        ("base", "pretrain", 252_441_919, 475_892_799),
        ("large", "pretrain", 474_729_023, 920_467_007),
        ("base", "retrieval", 223_744_259, None),
        ("base", "caption", 223_971_644, 223_971_644),
        ("large", "caption", 446_290_492, 446_290_492),
    ],
)
def test_parameter_counts_of_the_published_models(size, objective, trainable, total):
    cfg, shapes, _ = shapes_and_step(size, objective)
    counts = fullsize.parameter_counts(shapes, cfg.model.med.vocab_size)
    assert counts[0] == trainable and total in (None, counts[1])


# every objective, and both sizes of the ViT, which every objective counts by the same function
@pytest.mark.parametrize("size, objective", [("base", "pretrain"), ("base", "retrieval"), ("large", "caption")])
def test_traced_step_agrees_with_the_formula(size, objective):
    cfg, shapes, step = shapes_and_step(size, objective)
    batch = fullsize.random_batch(cfg, 0)
    batch["lm_mask"] = batch["txt_mask"]
    traced = flops.count_function(step, shapes, batch) / cfg.train.batch
    formula = tasks.of(cfg).flops(cfg)["step"]
    assert traced == pytest.approx(formula, rel=0.02)
    if (size, objective) == ("base", "pretrain"):
        assert cfg.text.max_len == 30 and traced <= 1.03 * 252.4e9  # what the maths needs


def test_batch_has_captions_of_real_length():
    batch = fullsize.random_batch(fullsize.full_config("base"), 0)
    lengths = batch["txt_mask"].sum(axis=1)
    assert 8 <= lengths.min() and lengths.max() <= 14 and batch["ids"].max() < 30522
    assert jnp.array_equal(batch["ids"] > 0, batch["txt_mask"]) and batch["img"].shape == (8, 224, 224, 3)
