"""T5: cached decoding, several texts for one encoded one, buckets of distances, dropout, precision, meshes, and which
tensors of a file are its word table and head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax import trees
from blip_jax.config.sizes import LLM_SIZES
from blip_jax.convert.rules import t5 as rules
from blip_jax.convert.tied import words_and_head
from blip_jax.models import initial
from blip_jax.models.layers import dense, stack
from blip_jax.models.text.cache import stored
from blip_jax.models.text.t5 import T5, near_buckets
from blip_jax.parallel import sharding

# more positions than the largest distance that has a bucket of its own
SIZES = dict(
    width=16, layers=2, decoder_layers=3, heads=4, head_dim=6, mlp=24, vocab_size=50, buckets=6, max_distance=7
)
B, S, G, T = 4, 9, 2, 11


def make(**changes):
    """(model, parameters large enough for every part to show)"""
    model = T5(**SIZES | changes)
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids, ids > -1, ids, ids > -1))["params"]
    params = initial.parameters({"llm": shapes}, jax.random.key(1), std=0.3, pos_std=0.0)["llm"]
    return model, params


@functools.cache
def tiny():
    return make()


def inputs():
    """embeds f32[B,S,D] and mask, padded in between; texts i32[B*G,T]"""
    rng = np.random.default_rng(0)
    mask = np.ones((B, S), bool)
    mask[1, 3:5] = mask[2, 6:] = False
    texts = rng.integers(2, SIZES["vocab_size"], (B * G, T))
    return jnp.asarray(rng.normal(size=(B, S, SIZES["width"])), jnp.float32), jnp.asarray(mask), jnp.asarray(texts)


def whole(apply, embeds, mask, texts):
    """Keys and values, and logits [B*G,T,Vp] in one pass over whole texts."""
    kv = apply(apply(embeds, mask, method="encode"), method="cross_kv")
    states = apply(texts, jnp.ones(texts.shape, bool), kv, mask, method="decode")
    return kv, apply(states, method="logits")


@functools.cache
def logits_of():
    """The tiny model's logits, a compiled function of `inputs`."""
    model, params = tiny()
    return jax.jit(lambda *args: whole(functools.partial(model.apply, {"params": params}), *args)[1])


def token_by_token(model, apply, kv, mask, texts, keep=stored):
    """The same with a cache: three tokens at once, then one at a time in a loop; logits [T-2,B*G,Vp] from the third
    on."""
    kv = keep(kv)
    extend = lambda ids, start, cache: apply(ids, start, cache, kv, mask, method="extend")
    first, cache = extend(texts[:, :3], 0, model.empty_cache(len(texts), T + 2))

    def step(cache, at):
        logits, cache = extend(jax.lax.dynamic_slice_in_dim(texts, at, 1, axis=1), at, cache)
        return cache, logits

    _, others = jax.lax.scan(step, cache, jnp.arange(3, T))
    return jnp.concatenate([first[None], others])


@pytest.mark.parametrize("unrolled", [True, False])
def test_a_cache_gives_what_a_whole_text_gives(unrolled, monkeypatch):
    monkeypatch.setattr(stack, "unrolled", lambda: unrolled)
    model, params = tiny()
    apply = functools.partial(model.apply, {"params": params})

    @jax.jit
    def run(embeds, mask, texts):
        kv, logits = whole(apply, embeds, mask, texts)
        return logits, token_by_token(model, apply, kv, mask, texts)

    logits, cached = run(*inputs())
    np.testing.assert_allclose(cached, jnp.moveaxis(logits[:, 2:], 1, 0), atol=2e-5)


def test_texts_see_their_own_encoded_text_and_nothing_behind_or_masked():
    embeds, mask, texts = inputs()
    apply = logits_of()
    logits = apply(embeds, mask, texts)
    padded = jnp.where(mask[..., None], embeds, 1e3)  # what is masked may be anything
    np.testing.assert_allclose(apply(padded, mask, texts), logits, atol=1e-5)
    later = apply(embeds, mask, texts.at[:, 5:].set(7))
    np.testing.assert_allclose(later[:, :5], logits[:, :5], atol=1e-5)
    assert np.abs(later[:, 5:] - logits[:, 5:]).max() > 0.1
    other = apply(embeds.at[1].add(1.0), mask, texts)
    changed = np.abs(other - logits).max(axis=(1, 2)) > 1e-3
    assert changed.tolist() == [b == 1 for b in range(B) for _ in range(G)]
    assert (logits[..., SIZES["vocab_size"] :] == np.finfo(np.float32).min).all()


@pytest.mark.parametrize("count, max_distance", [(32, 128), (16, 128), (6, 20)])
def test_buckets_grow_with_the_logarithm_of_the_distance(count, max_distance):
    found = near_buckets(count, max_distance)
    exact = count // 2
    np.testing.assert_array_equal(found[:exact], np.arange(exact))
    assert (np.diff(found) >= 0).all() and found[-1] == count - 1
    for bucket in range(exact + 1, count):  # first distance of each
        edge = exact * (max_distance / exact) ** ((bucket - exact) / (count - exact))
        assert abs(np.argmax(found == bucket) - edge) <= 1


def test_dropout_needs_a_key_and_takes_it_from_there():
    model, params = tiny()
    ids = inputs()[2][:B]
    real = jnp.ones(ids.shape, bool)

    @jax.jit
    def run(key):
        return model.apply({"params": params}, ids, real, ids, real, deterministic=False, rngs={"dropout": key})

    one, again, other = (run(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other)[..., : model.vocab_size].max() > 0.1


def test_rounded_once_and_cut_into_layers_the_results_are_the_same():
    model, params = make(dtype=jnp.bfloat16)
    rounded = trees.nest(
        (path, x.astype(jnp.bfloat16) if dense.rounds(path) else x) for path, x in trees.paths({"llm": params})
    )
    kept = sorted(path for path, x in trees.paths(rounded) if x.dtype == jnp.float32)
    assert all(path.endswith(("scale", "rel_bias/embedding")) for path in kept) and len(kept) == 9
    apart = dense.text_layers_apart(rounded)["llm"]
    assert dense.is_apart(apart["encoder"]["blocks"]) and dense.is_apart(apart["decoder"]["blocks"])

    @jax.jit
    def run(params, embeds, mask, texts):
        return whole(functools.partial(model.apply, {"params": params}), embeds, mask, texts)[1]

    once, every_time = run(apart, *inputs()), run(params, *inputs())
    np.testing.assert_array_equal(once, every_time)
    exact = logits_of()(*inputs())
    error = np.abs(every_time - exact)[..., : model.vocab_size]
    assert 0 < error.mean() < 0.03 * np.abs(exact[..., : model.vocab_size]).mean()


def test_every_mesh_gives_the_same_numbers():
    model, params = tiny()
    embeds, mask, texts = inputs()

    def run(params, embeds, mask, texts):
        def loss(params):
            apply = functools.partial(model.apply, {"params": params})
            kv, logits = whole(apply, embeds, mask, texts)
            log_p = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.mean(jnp.take_along_axis(log_p, texts[:, 1:, None], axis=-1)), kv

        (loss, kv), grads = jax.value_and_grad(loss, has_aux=True)(params)
        apply = functools.partial(model.apply, {"params": params})
        return loss, token_by_token(model, apply, kv, mask, texts), grads

    one = jax.jit(run)(params, embeds, mask, texts)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    places = sharding.shardings_for({"llm": params}, mesh)["llm"]
    with jax.set_mesh(mesh):
        rows = sharding.batch_sharding(mesh)
        args = (jax.device_put(params, places), *(jax.device_put(x, rows) for x in (embeds, mask, texts)))
        many = jax.jit(run, out_shardings=(None, None, places))(*args)
    for path, x in trees.paths(places):
        if not path.endswith("scale"):
            assert any(x.spec), path  # every matrix and table is split
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(many), strict=True):
        scale = np.abs(np.where(ours > -1e30, ours, 0)).max()
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, scale), err_msg=str(path))


@pytest.mark.parametrize("size, count", [("flant5_xl", 2_849_757_184), ("flant5_xxl", 11_135_332_352)])
def test_published_sizes(size, count, monkeypatch):
    monkeypatch.setattr(stack, "unrolled", lambda: False)  # one layer is traced, not all of them
    model = T5(**{name: x for name, x in LLM_SIZES[size].items() if name != "kind"}, dropout=0.0, dtype=jnp.bfloat16)
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids, ids > -1, ids, ids > -1))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(dtype=jnp.float16), "float16, in which T5 overflows: compute it in bfloat16 or float32"),
        (dict(dtype="float16"), "float16"),
        (dict(act="relu"), "act is 'relu': choose one of gelu, gelu_new"),
        (dict(buckets=7), "buckets is 7"),
        (dict(max_distance=3), "max_distance 3"),
    ],
)
def test_what_makes_no_t5(changes, said):
    with pytest.raises(ValueError, match=said):
        T5(**SIZES | changes)


def test_texts_that_do_not_share_out_over_the_encoded_ones():
    model, params = tiny()
    embeds, mask, texts = inputs()
    with pytest.raises(ValueError, match="7 texts look at 4 encoded ones"):
        jax.eval_shape(lambda: whole(functools.partial(model.apply, {"params": params}), embeds, mask, texts[:-1]))


TABLES = ("t5.shared.weight", "t5.encoder.embed_tokens.weight", "t5.decoder.embed_tokens.weight")


@pytest.mark.parametrize("held", [TABLES, TABLES[:1], TABLES[1:], TABLES[1:2], TABLES[2:]])
def test_the_word_table_is_any_of_its_names_and_never_the_head(held):
    words, head = np.arange(6.0).reshape(3, 2), np.ones((3, 2))
    tensors = dict.fromkeys(held, words) | {"t5.lm_head.weight": head, "other": head}
    found = words_and_head(tensors, "t5.")
    assert sorted(found) == ["other", "t5.lm_head.weight", "t5.shared.weight"]
    np.testing.assert_array_equal(found["t5.shared.weight"], words)
    np.testing.assert_array_equal(found["t5.lm_head.weight"], head)
    del tensors["t5.lm_head.weight"]  # then it is the table, as it is
    np.testing.assert_array_equal(words_and_head(tensors, "t5.")["t5.lm_head.weight"], words)


def test_word_tables_that_are_missing_or_differ():
    with pytest.raises(ValueError, match="no word table, t5.shared.weight, t5.encoder.embed_tokens.weight"):
        words_and_head({"t5.lm_head.weight": np.ones((3, 2))}, "t5.")
    for other in TABLES[1:]:
        tensors = dict.fromkeys(TABLES, np.ones((3, 2))) | {other: np.zeros((3, 2))}
        with pytest.raises(ValueError, match=f"t5.shared.weight and {other} differ"):
            words_and_head(tensors, "t5.")


def test_the_key_table_fills_every_parameter_once():
    _, params = tiny()
    paths = [path for _, path, *_ in rules.rows("language_model.", "")]
    assert sorted(paths) == sorted(path for path, _ in trees.paths(params))
    keys = [key for key, *_ in rules.rows("language_model.", "")]
    assert all(key.startswith("language_model.") for key in keys) and len({*keys}) == len(keys)
    assert [copy for copy, original in rules.tied("x.") if original == "x.shared.weight"] == [
        "x.encoder.embed_tokens.weight",
        "x.decoder.embed_tokens.weight",
    ]
