"""ViT and MED: masks, sharing, stochastic depth, rematerialisation, and what a wrong size says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from world import jitted

from blip_jax import config
from blip_jax.models.blip import Blip
from blip_jax.models.layers.attention import attention, grouped_cross_attention
from blip_jax.models.text import med
from blip_jax.models.text.med import padded_vocab
from blip_jax.models.vision.vit import Block, Vit, resize_pos_embed

B, T = 3, 6


@pytest.fixture(scope="module")
def blip():
    """(model, apply, params) of a tiny BLIP with one MED layer."""
    cfg = config.base("tiny")
    with cfg.unlocked():
        cfg.model.update(img_size=16, embed_dim=8, dtype="float32")
        cfg.model.med.update(layers=2)
    model = Blip.from_config(cfg.model)
    ids = jnp.zeros((1, T), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), ids, ids > -1)["params"]
    params = jax.tree.map(lambda x: 5 * x, params)  # large enough weights for a difference to show
    return (
        model,
        functools.partial(jitted.apply, model, params),
        params,
    )


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    img = jnp.asarray(rng.normal(size=(B, 16, 16, 3)), jnp.float32)
    return img, jnp.asarray(rng.integers(3, 110, (B, T)), jnp.int32), jnp.arange(T) < jnp.array([6, 3, 4])[:, None]


def test_attention_masks_and_rows_without_keys():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 4, 2, 8)), jnp.float32) for _ in range(3))
    mask = jnp.array([True, True, False, True])[None, None, None]
    out = attention(q, k, v, mask)
    np.testing.assert_allclose(out, attention(q, k[:, [0, 1, 3]], v[:, [0, 1, 3]]), atol=1e-6)
    np.testing.assert_array_equal(out, attention(q, k.at[:, 2].set(1e6), v.at[:, 2].set(1e6), mask))
    nothing = attention(q, k, v, jnp.zeros((1, 1, 1, 4), bool))
    np.testing.assert_allclose(nothing, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-6)


def test_grouped_cross_attention_equals_repeated_images():
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.normal(size=(B * 3, T, 2, 4)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(B, 7, 2, 4)), jnp.float32) for _ in range(2))
    other = jnp.array([2, 0, 1])
    image = jnp.stack([jnp.arange(B), other, jnp.arange(B)], axis=1).reshape(-1)  # of each row b*G + g
    found = grouped_cross_attention(q, k, v, (None, other[None], None))
    np.testing.assert_allclose(found, attention(q, k[image], v[image]), atol=1e-6)


def test_cells_of_one_device_each_keep_their_images_there():
    """A cell is a group of negatives: where it lies on one device no key or value travels, forward or backward."""
    rng = np.random.default_rng(3)
    k, v = (jnp.asarray(rng.normal(size=(16, 7, 2, 4)), jnp.float32) for _ in range(2))
    q, idx = (
        jnp.asarray(rng.normal(size=(16, 5, 2, 4)), jnp.float32),
        rng.permuted(np.tile(np.arange(16), (2, 1)), axis=1),
    )

    def loss(q, k, v, idx):
        return jnp.sum(jnp.square(grouped_cross_attention(q, k, v, (idx,))))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    for cells in (8, 1):
        local = jnp.asarray(idx[0] % (16 // cells)).reshape(cells, -1)
        image = (local + jnp.arange(cells)[:, None] * (16 // cells)).reshape(-1)
        np.testing.assert_allclose(
            loss(q, k, v, local), jnp.sum(jnp.square(attention(q, k[image], v[image]))), rtol=1e-6
        )
        args = jax.device_put(
            (q, k, v, local if cells == 8 else jnp.asarray(local)), (rows, rows, rows, rows if cells == 8 else None)
        )
        text = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=rows).lower(*args).compile().as_text()
        assert ("all-gather" in text or "all-to-all" in text or "all-reduce" in text) == (cells == 1)


def test_padding_has_no_influence(blip, inputs):
    _, apply, _ = blip
    img, ids, mask = inputs
    kv = apply("image_kv", apply("encode_image", img))
    junk = jnp.where(mask, ids, 7)
    short = slice(None, 3), slice(0, 4)  # the second and third text fit into four positions
    for method, args in (("encode_text", ()), ("match", (kv,)), ("lm_logits", (kv,))):
        first = lambda out: out[0] if method == "encode_text" else out
        a, b, cut = (
            first(apply(method, i, m, *args)) for i, m in ((ids, mask), (junk, mask), (ids[short], mask[short]))
        )
        if method == "match":
            np.testing.assert_allclose(a, b, atol=1e-6)
            np.testing.assert_allclose(a[1:], cut[1:], atol=1e-5)
        else:
            keep = np.asarray(mask)[:, : a.shape[1]]
            np.testing.assert_allclose(a[keep], b[keep], atol=1e-5)
            np.testing.assert_allclose(a[1, :3], cut[1, :3], atol=1e-5)


def test_decoder_sees_only_the_past_and_the_encoder_sees_all(blip, inputs):
    _, apply, _ = blip
    img, ids, _ = inputs
    kv, mask = apply("image_kv", apply("encode_image", img)), jnp.ones((B, T), bool)
    changed = ids.at[:, 3].set(1)
    a, b = apply("lm_logits", ids, mask, kv), apply("lm_logits", changed, mask, kv)
    np.testing.assert_array_equal(a[:, :3], b[:, :3])
    assert np.abs(a - b)[:, 3:, :110].max() > 1e-3
    assert np.abs(apply("match", ids, mask, kv) - apply("match", changed, mask, kv)).max() > 1e-4


def test_keys_and_values_with_the_last_layer_apart_are_the_same(blip, inputs, monkeypatch):
    model, _, params = blip
    img, ids, mask = inputs

    def loss(params):
        apply = lambda method, *a, **k: model.apply({"params": params}, *a, method=method, **k)
        kv = apply("image_kv", apply("encode_image", img), ended=True)
        assert isinstance(kv, med.stack.Ended) == (med.platform() != "cpu")
        logits = apply("lm_logits", ids, mask, kv)[..., :110]
        return jnp.mean(logits**2) + jnp.mean(apply("match", ids, mask, kv) ** 2)

    whole = jax.value_and_grad(loss)(params)
    monkeypatch.setattr(med, "platform", lambda: "tpu")
    apart = jax.value_and_grad(loss)(params)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max() + 1e-7)


def test_encoder_and_decoder_share_all_but_self_attention(blip, inputs):
    model, apply, params = blip
    img, ids, mask = inputs

    def changed(path, method, *args):
        blocks = params["med"]["blocks"]
        bumped = params | {
            "med": params["med"] | {"blocks": blocks | {path: jax.tree.map(lambda x: x.at[0].add(0.1), blocks[path])}}
        }
        run = lambda p: jax.tree.leaves(jitted.apply(model, p, method, *args))[0]
        return bool(np.abs(run(params) - run(bumped)).max() > 1e-6)

    kv = apply("image_kv", apply("encode_image", img))
    uses = {
        path: [
            changed(path, "encode_text", ids, mask),
            changed(path, "match", ids, mask, kv),
            changed(path, "lm_logits", ids, mask, kv),
        ]
        for path in ("self_attn", "self_attn_dec", "cross_attn", "mlp")
    }
    assert uses == {
        "self_attn": [True, True, False],
        "self_attn_dec": [False, False, True],
        "cross_attn": [False, True, True],
        "mlp": [True, True, True],
    }


def test_logits_of_vocabulary_padding_cannot_win(blip, inputs):
    model, apply, _ = blip
    img, ids, mask = inputs
    logits = apply("lm_logits", ids, mask, apply("image_kv", apply("encode_image", img)))
    assert logits.shape == (B, T - 1, padded_vocab(120)) == (B, T - 1, 128)
    assert (logits[..., 120:] == np.finfo(np.float32).min).all() and (logits[..., :120] > -1e6).all()
    assert (model.dec_id, model.enc_id) == (118, 119)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_neither_value_nor_gradient(remat):
    img = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    vit = lambda remat: Vit(width=16, depth=3, heads=2, mlp=32, patch=8, img_size=16, drop_path=0.5, remat=remat)
    params = jax.jit(vit("none").init)(jax.random.key(0), img)
    loss = lambda p, remat: (
        vit(remat).apply(p, img, deterministic=False, rngs={"dropout": jax.random.key(1)}) ** 3
    ).sum()
    plain, other = (jax.jit(jax.value_and_grad(lambda p: loss(p, r)))(params) for r in ("none", remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_stochastic_depth_drops_whole_branches_of_examples_and_keeps_the_mean():
    block = Block(width=8, heads=2, mlp=16, init_std=0.02, drops=True, dtype=jnp.float32)
    rate, x = jnp.float32(0.25), jnp.zeros((4000, 2, 8))
    params = jax.jit(block.init)({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x[:1], rate)
    # of zero tokens, the MLP's branch is this, attention's is zero
    params["params"]["mlp"]["fc2"]["bias"] += jnp.arange(1.0, 9.0)
    out = jax.jit(lambda k: block.apply(params, x, rate, rngs={"dropout": k})[0])(jax.random.key(2))
    kept = np.abs(out - jnp.arange(1.0, 9.0) / 0.75).max((1, 2)) < 1e-5
    dropped = (out == 0).all((1, 2))
    assert (kept | dropped).all() and 0.72 < kept.mean() < 0.78
    never = block.apply(params, x[:5], jnp.float32(0.0), rngs={"dropout": jax.random.key(3)})[0]
    np.testing.assert_allclose(never, jnp.broadcast_to(jnp.arange(1.0, 9.0), never.shape), atol=1e-6)


def test_wrong_image_and_table_sizes_are_named():
    vit = Vit(width=16, depth=1, heads=2, mlp=32, patch=8, img_size=16)
    with pytest.raises(ValueError, match=r"\(24, 24, 3\).*built for \(16, 16, 3\).*model.img_size"):
        vit.init(jax.random.key(0), jnp.zeros((1, 24, 24, 3)))
    with pytest.raises(ValueError, match="1 \\+ a square"):
        resize_pos_embed(np.zeros((12, 4)), 17)
    table = np.random.default_rng(0).normal(size=(17, 4)).astype(np.float32)
    np.testing.assert_array_equal(resize_pos_embed(table, 17), table)
    np.testing.assert_allclose(resize_pos_embed(np.ones((17, 4)), 50), np.ones((50, 4)), atol=1e-6)
