"""Analytic FLOPs against known counts of the published model sizes, and against the jaxpr of the real step."""

import jax
import jax.numpy as jnp
import pytest

from blip_jax import config
from blip_jax.bench import flops


def sized(size, T, img_size=224):
    """The paper's model at T text positions, columns of one original GPU (75 rows and the queue)."""
    cfg = config.base(size)
    with cfg.unlocked():
        cfg.text.max_len, cfg.model.img_size, cfg.loss.group_size = T, img_size, 75
    return cfg


def giga(count, digits):
    return {k: round(v / 1e9, digits) for k, v in count.items()}


PARTS = ("vision", "momentum_vision", "text", "momentum_text", "image_kv", "match", "decoder", "lm_head", "forward")


@pytest.mark.parametrize("size, original, expected", [
    ("base", True, (35.13, 35.13, 5.13, 5.13, 0, 35.32, 11.77, 1.44, 129.17)),
    ("base", False, (35.13, 35.13, 5.13, 5.13, 5.58, 17.30, 6.20, 1.39, 111.10)),
    ("large", True, (123.11, 123.11, 5.13, 5.13, 0, 40.90, 13.63, 1.44, 312.57)),
    ("large", False, (123.11, 123.11, 5.13, 5.13, 7.44, 17.30, 6.20, 1.39, 288.92)),
])
def test_forward_parts_of_pretraining(size, original, expected):
    count = giga(flops.pretrain_step(sized(size, 30), original), 2)
    assert tuple(count[p] for p in PARTS) == expected


@pytest.mark.parametrize("size, T, original, expected", [
    ("base", 30, True, 306.6), ("base", 30, False, 252.4), ("base", 16, False, 207.8), ("base", 12, False, 195.1),
    ("large", 30, True, 680.7), ("large", 30, False, 609.8), ("large", 16, False, 565.2), ("large", 12, False, 552.6),
])
def test_step_of_pretraining(size, T, original, expected):
    assert giga(flops.pretrain_step(sized(size, T), original), 1)["step"] == expected


def test_step_of_retrieval_fine_tuning():
    assert giga(flops.retrieval_step(sized("base", 35, 384), True), 1)["step"] == 683.9
    assert giga(flops.retrieval_step(sized("large", 35, 384), True), 0)["step"] == 1817


def test_step_of_captioner_fine_tuning():
    """Texts of 18 tokens: the prompt's four, and COCO's 10 to 13 with [SEP]."""
    assert giga(flops.caption_step(sized("base", 18, 384), True), 1)["step"] == 395.7
    assert giga(flops.caption_step(sized("large", 18, 384), True), 0)["step"] == 1225
    count = flops.caption_step(sized("base", 40, 384))
    assert set(count) == {"vision", "image_kv", "decoder", "lm_head", "forward", "step"}
    assert count["vision"] == flops.retrieval_step(sized("base", 40, 384))["vision"]


def test_parts_add_up_and_momentum_can_be_off():
    cfg = sized("base", 30)
    count = flops.pretrain_step(cfg)
    parts = {k: v for k, v in count.items() if k not in ("forward", "step")}
    assert sum(parts.values()) == count["forward"]
    with cfg.unlocked():
        cfg.loss.momentum, cfg.loss.queue = False, 0
    without = flops.pretrain_step(cfg)
    assert without["momentum_vision"] == without["momentum_text"] == 0
    saved = count["momentum_vision"] + count["momentum_text"] + count["itc"] - without["itc"]
    assert count["forward"] - without["forward"] == pytest.approx(saved)


def test_count_of_a_product_a_convolution_and_a_batched_product():
    f32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    assert flops.count_function(jnp.dot, f32(3, 5), f32(5, 7)) == 2 * 3 * 5 * 7
    attend = lambda q, k: jnp.einsum("BTNH,BSNH->BNTS", q, k)
    assert flops.count_function(attend, f32(2, 3, 4, 5), f32(2, 7, 4, 5)) == 2 * 2 * 3 * 7 * 4 * 5
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert flops.count_function(conv, f32(2, 8, 8, 3), f32(4, 4, 3, 6)) == 2 * 2 * 4 * (4 * 4 * 3) * 6


def test_count_goes_into_scan_conditional_and_gradient():
    x, w = jnp.ones((3, 5)), jnp.ones((4, 5, 5))
    once = 2 * 3 * 5 * 5
    scanned = lambda x, w: jax.lax.scan(lambda c, k: (jnp.tanh(c @ k), None), x, w)[0].sum()
    assert flops.count_function(jax.jit(scanned), x, w) == 4 * once
    assert flops.count_function(jax.grad(scanned, (0, 1)), x, w) == 3 * 4 * once
    branch = lambda p, x: jax.lax.cond(p, lambda x: x @ w[0] @ w[1], lambda x: x @ w[0], x)
    assert flops.count_function(branch, True, x) == 2 * once
    endless = lambda x: jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: c @ w[0], x)
    with pytest.raises(ValueError, match="while loop"):
        flops.count_function(endless, x)
