"""Analytic FLOPs against known counts of the published model sizes, and against the jaxprs of the real programs."""

import jax
import jax.numpy as jnp
import pytest

from blip_jax import config
from blip_jax.bench import inference
from blip_jax.inference import programs
from blip_jax.models import flops, initial
from blip_jax.models.blip import Blip
from blip_jax.models.vqa import BlipVqa


def sized(size, T, img_size=224):
    """The paper's model at T text positions, columns of one original GPU (75 rows and the queue)."""
    cfg = config.base(size)
    with cfg.unlocked():
        cfg.text.max_len, cfg.model.img_size, cfg.loss.group_size = T, img_size, 75
    return cfg


def giga(count, digits):
    return {k: round(v / 1e9, digits) for k, v in count.items()}


PARTS = ("vision", "momentum_vision", "text", "momentum_text", "image_kv", "match", "decoder", "lm_head", "forward")


@pytest.mark.parametrize(
    "size, original, expected",
    [
        ("base", True, (35.13, 35.13, 5.13, 5.13, 0, 35.32, 11.77, 1.44, 129.17)),
        ("base", False, (35.13, 35.13, 5.13, 5.13, 5.58, 17.30, 6.20, 1.39, 111.10)),
        ("large", True, (123.11, 123.11, 5.13, 5.13, 0, 40.90, 13.63, 1.44, 312.57)),
        ("large", False, (123.11, 123.11, 5.13, 5.13, 7.44, 17.30, 6.20, 1.39, 288.92)),
    ],
)
def test_forward_parts_of_pretraining(size, original, expected):
    count = giga(flops.pretrain_step(sized(size, 30), original), 2)
    assert tuple(count[p] for p in PARTS) == expected


@pytest.mark.parametrize(
    "size, T, original, expected",
    [
        ("base", 30, True, 306.6),
        ("base", 30, False, 252.4),
        ("base", 16, False, 207.8),
        ("base", 12, False, 195.1),
        ("large", 30, True, 680.7),
        ("large", 30, False, 609.8),
        ("large", 16, False, 565.2),
        ("large", 12, False, 552.6),
    ],
)
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


@pytest.mark.parametrize(
    "size, img_size, n, expected",
    [("base", 224, 1, 46.5), ("base", 224, 5, 64.8), ("base", 384, 1, 133.5), ("large", 384, 1, 410)],
)
def test_captions_of_twenty_tokens(size, img_size, n, expected):
    assert flops.caption_image(sized(size, 30, img_size).model, 4, 20, n) / 1e9 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("img_size, one, further", [(224, 47.9, 7.2), (384, 135.0, 7.7)])
def test_filter_of_texts_of_35_positions(img_size, one, further):
    model = sized("base", 35, img_size).model
    count = lambda texts: flops.filter_image(model, 35, texts, itc=False, original=True) / 1e9
    assert (round(count(1), 1), round(count(2) - count(1), 1)) == (one, further)
    assert flops.encode_image(model) < 1e9 * count(1)


def narrow(img_size=64):
    """A small model of uneven sizes."""
    cfg = config.base("tiny")
    with cfg.unlocked():
        cfg.model.update(img_size=img_size, embed_dim=24, dtype="float32")
        cfg.model.med.update(layers=3, vocab_size=1000)
    return cfg


def shapes_of(cfg, T=9):
    model, S = Blip.from_config(cfg.model), cfg.model.img_size
    img, ids = jax.ShapeDtypeStruct((2, S, S, 3), jnp.uint8), jax.ShapeDtypeStruct((2, 5, T), jnp.int32)
    float_img = jax.ShapeDtypeStruct(img.shape, jnp.float32)
    init = lambda img: model.init(jax.random.key(0), img, jnp.ones((2, 8), jnp.int32), jnp.ones((2, 8), bool))["params"]
    return model, jax.eval_shape(init, float_img), img, ids


def test_formulas_agree_with_captioner_and_filter_as_they_run():
    cfg = narrow()
    model, params, img, ids = shapes_of(cfg)
    keys = jax.ShapeDtypeStruct((2, 2), jnp.uint32)
    for method, n in (
        (programs.Method(n=3, max_length=15), 3),
        (programs.Method(kind="beam", beams=4, max_length=15), 4),
    ):
        decode = programs.decoder(model, [998, 5, 6, 7], method, eos=3, pad=0)

        def captions(params, img, keys):
            apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
            return decode(params, apply(apply(img.astype(jnp.float32), method="encode_image"), method="image_kv"), keys)

        traced = flops.count_function(captions, params, img, keys, trips=15 - 4 - 1) / 2
        assert traced == pytest.approx(flops.caption_image(cfg.model, 4, 15 - 4, n), rel=0.02)

    def scores(params, img, ids):
        return programs.score(model)(
            params, programs.view(model, "kv", "img_emb")(params, img), ids, jnp.ones(ids.shape, bool)
        )

    traced = flops.count_function(scores, params, img, ids) / 2
    assert traced == pytest.approx(flops.filter_image(cfg.model, 9, 5), rel=0.02)


def test_retrieval_evaluation_is_its_passes():
    cfg = narrow()
    model, params, img, ids = shapes_of(cfg, cfg.text.max_len)
    with cfg.unlocked():
        cfg.eval.k, cfg.eval.rerank_texts = 4, 5
    apply = lambda params, *args, method: model.apply({"params": params}, *args, method=method)

    def encode(params, img, ids):
        img_tok = apply(params, img.astype(jnp.float32), method="encode_image")
        mask = jnp.ones(ids[:, 0].shape, bool)
        return apply(params, img_tok, method="project_image"), apply(params, ids[:, 0], mask, method="encode_text")[1]

    def rerank(params, img_tok, ids):
        ids = ids.reshape(10, -1)
        return apply(params, ids, jnp.ones(ids.shape, bool), apply(params, img_tok, method="image_kv"), method="match")

    img_tok = jax.ShapeDtypeStruct((2, flops.positions(cfg.model), cfg.model.vit.width), jnp.float32)
    a_pair = flops.count_function(encode, params, img, ids) / 2
    a_unit = flops.count_function(rerank, params, img_tok, ids) / 2
    count = flops.retrieval_eval(cfg, 30, 30)
    assert count["encode"] == pytest.approx(30 * a_pair, rel=0.02)
    assert count["rerank"] == pytest.approx(30 * (4 + 4) / 5 * a_unit, rel=0.02)
    assert count["total"] == count["encode"] + count["rerank"]
    few = flops.retrieval_eval(cfg, 3, 3)["rerank"]  # no pair is scored twice
    assert few == pytest.approx(9 / 5 * a_unit, rel=0.02)


def test_videos_are_their_frames():
    cfg, R, G, T = narrow(), 3, 5, 9
    model, params, _, _ = shapes_of(cfg, T)
    pixels = cfg.model.img_size, cfg.model.img_size, 3
    clips = jax.ShapeDtypeStruct((2, R, *pixels), jnp.uint8)
    traced = flops.count_function(programs.view(model, "img_tok", "img_emb"), params, clips) / 2
    project = 2 * cfg.model.embed_dim * cfg.model.vit.width
    assert traced == R * (flops.encode_image(cfg.model) + project)
    img_tok = jax.ShapeDtypeStruct((2, flops.positions(cfg.model, R), cfg.model.vit.width), jnp.float32)
    texts = jax.ShapeDtypeStruct((2, G, T), jnp.int32), jax.ShapeDtypeStruct((2, G, T), jnp.bool_)
    traced = flops.count_function(programs.rerank(model), params, img_tok, *texts) / 2
    assert traced == pytest.approx(flops.rerank_unit(cfg.model, T, G, R), rel=0.001)
    with cfg.unlocked():
        cfg.text.max_len, cfg.eval.k, cfg.eval.rerank_texts = T, 4, G
    whole, alone = flops.retrieval_eval(cfg, 30, 30, R), flops.retrieval_eval(cfg, 30, 30)
    assert whole["rerank"] == pytest.approx(30 * (4 + 4) / 5 * flops.rerank_unit(cfg.model, T, G, R))
    assert whole["encode"] - alone["encode"] == pytest.approx(30 * (R - 1) * (flops.encode_image(cfg.model) + project))


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
    assert flops.count_function(endless, x, trips=7) == 7 * once


@pytest.mark.parametrize("depth, answer", [(12, 8), (6, 12)])
def test_answers_by_rank_cost_what_the_maths_needs(depth, answer):
    """Of the published size and list, as `blip-jax bench rank` runs it: states, keys and values are computed once."""
    settings = inference.Settings("rank", img_sizes=(480,), positions=35, answer=answer)
    cfg = config.base("base")
    with cfg.unlocked():
        cfg.model.img_size = 480
        cfg.model.vit.depth = cfg.model.med.layers = depth
    model = BlipVqa.from_config(cfg.model)
    like = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    params = jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(0)))
    C, T = settings.candidates, settings.positions
    traced = flops.count_function(
        programs.ranking(model, settings.k),
        params,
        like(jnp.uint8, 2, 480, 480, 3),
        like(jnp.int32, 2, T),
        like(bool, 2, T),
        like(jnp.int32, C, answer),
        like(bool, C, answer),
    )
    needed = flops.rank_image(cfg.model, T, answer, settings.k, C)
    assert 1 <= traced / 2 / needed < 1.1
