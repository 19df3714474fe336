"""The published sizes by shape: parameter counts, and FLOPs of the traced step against the formula."""

import functools

import jax
import jax.numpy as jnp
import pytest

from blip_jax.bench import flops, fullsize


@functools.cache
def shapes_and_step(size, objective):
    cfg = fullsize.full_config(size)
    with cfg.unlocked():
        cfg.objective, cfg.model.decoder = objective, objective == "pretrain"
    create, step = fullsize.make(cfg)
    return cfg, jax.eval_shape(create, jax.random.key(0)), step


@pytest.mark.parametrize("size, objective, trainable, total", [
    ("base", "pretrain", 252_441_919, 475_892_799),
    ("large", "pretrain", 474_729_023, 920_467_007),
    ("base", "retrieval", 223_744_259 - 577 * 768 + 197 * 768, None),  # published at 384 pixels: 577 positions, here 197
])
def test_parameter_counts_of_the_published_models(size, objective, trainable, total):
    cfg, shapes, _ = shapes_and_step(size, objective)
    counts = fullsize.parameter_counts(shapes, cfg.model.med.vocab_size)
    assert counts[0] == trainable and total in (None, counts[1])


@pytest.mark.parametrize("size, objective", [("base", "pretrain"), ("large", "pretrain"), ("base", "retrieval")])
def test_traced_step_agrees_with_the_formula(size, objective):
    cfg, shapes, step = shapes_and_step(size, objective)
    traced = flops.count_function(step, shapes, fullsize.random_batch(cfg, 0)) / cfg.train.batch
    formula = {"pretrain": flops.pretrain_step, "retrieval": flops.retrieval_step}[objective](cfg)["step"]
    assert traced == pytest.approx(formula, rel=0.02)


def test_batch_has_captions_of_real_length():
    batch = fullsize.random_batch(fullsize.full_config("base"), 0)
    lengths = batch["txt_mask"].sum(axis=1)
    assert 8 <= lengths.min() and lengths.max() <= 14 and batch["ids"].max() < 30522
    assert jnp.array_equal(batch["ids"] > 0, batch["txt_mask"]) and batch["img"].shape == (8, 224, 224, 3)
