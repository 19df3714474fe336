"""NLVR2 model: two images, averaged in the first layers and merged in the later ones; padding, meshes, start from
pre-training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax import config, trees
from blip_jax.convert.apply import from_torch, to_torch
from blip_jax.convert.rules.blip import STACKS
from blip_jax.models import initial
from blip_jax.models.blip import Blip
from blip_jax.models.build import fit
from blip_jax.models.nlvr import FIRST_MERGE, BlipNlvr, TwinLayer
from blip_jax.models.text.med import padded_vocab
from blip_jax.parallel import sharding
from blip_jax.tasks import build, nlvr

B, T, V = 4, 6, 120


def nlvr_config(size="tiny", img_size=16, layers=7):
    cfg = config.base(size)
    with cfg.unlocked():
        cfg.objective = "nlvr"
        cfg.model.update(img_size=img_size, dtype="float32")
        cfg.model.med.layers = layers
    return cfg


@functools.cache
def world():
    """(model, lively params, inputs of `classified`)"""
    cfg = nlvr_config()
    model = build(cfg)
    params = jax.jit(lambda: initial.init_params(cfg, model, jax.random.key(0)))()
    params = initial.magnified(params, 5)
    rng = np.random.default_rng(0)
    left, right = jnp.asarray(rng.normal(size=(2, B, 16, 16, 3)), jnp.float32)
    ids = jnp.asarray(rng.integers(3, 110, (B, T)), jnp.int32)
    return model, params, (ids, jnp.arange(T) < jnp.array([6, 3, 4, 5])[:, None], left, right)


def classified(model, params, ids, mask, left, right, **how):
    run = lambda method, *args, **how: model.apply({"params": params}, *args, method=method, **how)
    img_tok = run("encode_image", jnp.concatenate([left, right]))
    return run("classify", ids, mask, *jnp.split(img_tok, 2), **how)


@functools.cache
def compiled(first_id):
    return jax.jit(lambda p, x: classified(world()[0], p, *x, first_id=first_id))


def logits(*inputs, first_id=None):
    return compiled(first_id)(world()[1], inputs)


def random_params(cfg, model, seed):
    """Numbers in the shapes of the parameters, without compiling anything."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def test_parameter_count_of_the_published_model():
    cfg = nlvr_config("base", 384, 12)
    shapes = jax.eval_shape(lambda: initial.init_params(cfg, build(cfg), jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) - (padded_vocab(30524) - 30524) * 768 == 259_372_034
    assert {len(x) for x in jax.tree.leaves(shapes["med"]["blocks"])} == {12}
    assert {len(x) for x in jax.tree.leaves(shapes["med"]["merge"]["blocks"])} == {12 - FIRST_MERGE}
    assert STACKS["med/merge"] == ("med", FIRST_MERGE, 1)


def test_keys_of_the_state_dict_and_back():
    cfg = nlvr_config(layers=12)
    with cfg.unlocked():
        cfg.model.vit.update(depth=12, width=4, heads=2, mlp=8)
        cfg.model.med.update(width=6, heads=3, mlp=4)
    params = random_params(cfg, build(cfg), 0)
    tensors = to_torch("nlvr", {"params": params}, vocab_size=V)
    assert len(tensors) + 1 == 579  # the original also stores `position_ids`
    merging = [k for k in tensors if "merge_layer.weight" in k]
    assert [int(k.split(".")[3]) for k in merging] == [6, 7, 8, 9, 10, 11] and {tensors[k].shape for k in merging} == {
        (6, 12)
    }
    back = from_torch("nlvr", tensors, heads=dict(vit=2, med=3))["params"]
    again = to_torch("nlvr", {"params": back}, vocab_size=V)
    assert set(again) == set(tensors) and all(np.array_equal(again[k], tensors[k]) for k in tensors)
    assert jax.tree.structure(back) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "gone",
    [
        "text_encoder.encoder.layer.7.crossattention.output.merge_layer.weight",
        "text_encoder.encoder.layer.6.crossattention.output.merge_layer.bias",
        "text_encoder.encoder.layer.7.crossattention.self1.key.weight",
        "cls_head.2.bias",
    ],
)
def test_a_missing_tensor_is_named_wherever_it_stands(gone):
    cfg = nlvr_config(layers=8)
    params = random_params(cfg, build(cfg), 0)
    tensors = to_torch("nlvr", {"params": params}, vocab_size=V)
    del tensors[gone]
    with pytest.raises(ValueError, match=f"missing: {gone}$"):
        from_torch("nlvr", tensors, heads=dict(vit=4, med=4))


def test_a_model_that_only_averages_needs_no_merging_layer():
    cfg = nlvr_config(layers=2)
    params = random_params(cfg, build(cfg), 0)
    tensors = to_torch("nlvr", {"params": params}, vocab_size=V)
    assert not any("merge" in k for k in tensors)
    assert jax.tree.structure(from_torch("nlvr", tensors, heads=dict(vit=4, med=4))["params"]) == jax.tree.structure(
        params
    )


@pytest.mark.parametrize("merges", [False, True])
def test_order_of_the_images_matters_in_the_merging_layer(merges):
    """With the same weights in both cross-attentions the mean does not know which image came first; the merging
    layer does."""
    layer = TwinLayer(width=8, heads=2, mlp_width=16, init_std=0.5, dropout=0.0, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    x, left, right = (jnp.asarray(rng.normal(size=(2, n, 8)), jnp.float32) for n in (3, 5, 5))
    kernel = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
    join = (lambda both: both @ kernel) if merges else None
    run = jax.jit(lambda p, left, right: layer.apply({"params": p}, x, jnp.ones((2, 1, 1, 3), bool), left, right, join))
    params = jax.jit(lambda: layer.init(jax.random.key(0), x, jnp.ones((2, 1, 1, 3), bool), left, right)["params"])()
    params |= {"cross_attn1": params["cross_attn0"]}
    difference = np.abs(run(params, left, right) - run(params, right, left)).max()
    assert difference > 1e-2 if merges else difference < 1e-5


def test_each_image_is_seen_through_its_own_attention():
    ids, mask, left, right = world()[2]
    base = logits(ids, mask, left, right)
    assert np.abs(base - logits(ids, mask, right, left)).max() > 1e-2
    for changed in (logits(ids, mask, left.at[0].add(1), right), logits(ids, mask, left, right.at[0].add(1))):
        assert np.abs(base - changed)[0].max() > 1e-3
        np.testing.assert_allclose(base[1:], changed[1:], atol=1e-5)


def test_text_padding_and_first_token():
    ids, mask, left, right = world()[2]
    base = logits(ids, mask, left, right)
    np.testing.assert_allclose(base, logits(jnp.where(mask, ids, 9), mask, left, right), atol=1e-5)
    np.testing.assert_array_equal(base, logits(ids.at[:, 0].set(77), mask, left, right))  # [ENC] is put there
    np.testing.assert_allclose(base, logits(ids, mask, left, right, first_id=119), atol=1e-6)
    assert np.abs(base - logits(ids, mask, left, right, first_id=1)).max() > 1e-2


def test_dropout_and_stochastic_depth_act_in_training_only():
    cfg = nlvr_config(layers=1)
    with cfg.unlocked():
        cfg.model.drop_path = 0.5
    model, (_, _, inputs) = build(cfg), world()
    params = jax.jit(lambda: initial.init_params(cfg, model, jax.random.key(0)))()
    apply = lambda key, method, *args: model.apply(
        {"params": params}, *args, method=method, deterministic=False, rngs={"dropout": key}
    )
    for method, args in (("encode_image", inputs[2:3]), ("classify", (*inputs[:2], *2 * [jnp.ones((B, 5, 48))]))):
        a, b = (jax.jit(lambda k: apply(k, method, *args))(jax.random.key(i)) for i in (0, 1))
        assert np.abs(a - b).max() > 1e-4


def test_bfloat16_computes_and_gives_float32_logits():
    cfg = nlvr_config()
    with cfg.unlocked():
        cfg.model.dtype = "bfloat16"
    low, (_, params, inputs) = build(cfg), world()
    params = initial.magnified(params, 0.5)  # as they are they magnify bfloat16's 8 bits tenfold
    out, exact = jax.jit(lambda p, x: classified(low, p, *x))(params, inputs), compiled(None)(params, inputs)
    assert out.dtype == jnp.float32 and np.isfinite(out).all()
    assert np.ptp(exact, axis=0).min() > 0.1  # the examples are farther apart than the tolerance
    np.testing.assert_allclose(out, exact, rtol=0, atol=0.05)


def test_mesh_changes_nothing():
    model, params, inputs = world()
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    placed = jax.device_put(params, sharding.shardings_for(params, mesh))
    for part in (placed["med"]["merge"], placed["med"]["blocks"]["cross_attn1"]):
        assert not any(x.is_fully_replicated for path, x in trees.paths(part) if path.endswith("kernel"))
    with jax.set_mesh(mesh):
        out = jax.jit(lambda p, x: classified(model, p, *x))(
            placed, jax.device_put(inputs, sharding.batch_sharding(mesh))
        )
    np.testing.assert_allclose(out, logits(*inputs), atol=1e-4)


def started(params, fresh):
    """`fresh` with what it starts from in parameters of pre-training, and the paths of what stayed as it was."""
    fitted = fit(params, fresh, "here", nlvr.START)
    random = dict(trees.paths(fresh))
    return trees.merge(fitted.params, trees.nest((path, random[path]) for path in fitted.random)), fitted.random


def test_start_from_pretraining():
    """Both cross-attentions begin as the one of pre-training, its LayerNorm as the common one; merging layer and
    head are random."""
    cfg = nlvr_config(img_size=32)
    fresh = random_params(cfg, build(cfg), 0)
    before = nlvr_config(img_size=16)
    pretrained = random_params(before, Blip.from_config(before.model), 1)
    out, random = started(pretrained, fresh)
    assert jax.tree.structure(out) == jax.tree.structure(fresh) and jax.tree.map(jnp.shape, out) == jax.tree.map(
        jnp.shape, fresh
    )
    same = lambda a, b: jax.tree.all(jax.tree.map(np.array_equal, a, b))
    ours, theirs = out["med"]["blocks"], pretrained["med"]["blocks"]
    for twin in ("cross_attn0", "cross_attn1"):
        assert same(ours[twin], {k: v for k, v in theirs["cross_attn"].items() if k != "ln"})
    assert same(ours["cross_ln"], theirs["cross_attn"]["ln"])
    assert all(same(ours[k], theirs[k]) for k in ("self_attn", "mlp", "mlp_ln"))
    assert same(out["cls_head"], fresh["cls_head"]) and same(out["med"]["merge"], fresh["med"]["merge"])
    parts = "med/merge/blocks", "cls_head/dense", "cls_head/out"
    assert set(random) == {f"{part}/{leaf}" for part in parts for leaf in ("kernel", "bias")}
    narrow = pretrained | {"vit": pretrained["vit"] | {"ln_post": {"scale": np.zeros(7), "bias": np.zeros(48)}}}
    with pytest.raises(ValueError, match=r"vit/ln_post/scale is \[7\], this config needs \[48\]"):
        started(narrow, fresh)


def test_build_gives_the_model_of_the_objective():
    assert isinstance(build(nlvr_config()), BlipNlvr)
