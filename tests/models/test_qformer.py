"""Q-Former: its passes against the original's numbers and against each other, its parts, its size."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from world.golden2 import Case, close

from blip_jax import config, trees
from blip_jax.models.text.cache import empty, stored
from blip_jax.models.text.qformer import QFormer

FULL = {name: size for name, size in config.QFORMER_SIZES["base"].items() if name != "queries"}


def golden(name):
    """(case, what applies a pass, learned queries)"""
    case = Case(name)
    params = case.params()
    qformer = QFormer(**case.qformer, kv_width=params["ln_vision"]["scale"].size, dropout=0.0)
    return case, functools.partial(qformer.apply, {"params": params["qformer"]}), params["query_tokens"]


@functools.cache
def shapes(**sizes):
    """path -> shape of the parameters of a Q-Former of full size with some `sizes` changed."""
    qformer, text = QFormer(**FULL, **sizes), sizes.get("text", True)

    def passes(module, img_tok, ids):
        tokens, kv = jnp.zeros((4, FULL["width"])), module.image_kv(img_tok)
        module.look(tokens, kv)
        if text:
            txt_tok = module.join(tokens, ids, ids > 0, kv)[1]
            if sizes.get("head", True):
                module.lm_logits(txt_tok)

    args = jnp.zeros((1, 5, sizes["kv_width"])), jnp.zeros((1, 3), jnp.int32)
    found = jax.eval_shape(lambda: qformer.init(jax.random.key(0), *args, method=passes))["params"]
    return {path: x.shape for path, x in trees.paths(found)}


def test_golden_queries_text_and_matching():
    for name in ("stage1_eva", "stage1_clip"):
        case, apply, tokens = golden(name)
        kv = apply(jnp.asarray(case.io["vision_embeds"]), method="image_kv")
        close(apply(tokens, kv, method="look")[0], case.io["query_output"])
        ids, mask = case.texts()
        close(apply(ids, mask, method="read")[:, 0], case.io["text_cls"])
        head = case.params()["itm_head"]
        qry, _ = apply(tokens, ids, mask, kv, method="join")
        logits = (qry @ head["kernel"] + head["bias"]).mean(1)
        close(logits[:, 1], case.io["itm_logit"])


def test_a_text_is_decoded_with_a_cache_as_in_one_pass():
    """Two texts for each image, which share its queries; keys and values as they are and stored for a loop."""
    case, apply, tokens = golden("stage1_eva")
    seen = apply(tokens, apply(jnp.asarray(case.io["vision_embeds"]), method="image_kv"), method="look")[1]
    ids = jax.random.randint(jax.random.key(0), (2 * len(seen.k[0]), 6), 3, case.sizes["vocab"] - 1)
    want = apply(ids, jnp.ones(ids.shape, bool), seen, method="write")
    alone = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1), seen)
    close(apply(ids, jnp.ones(ids.shape, bool), alone, method="write"), want, 1e-6)
    cache, found = empty(case.qformer, len(ids), 8, jnp.float32), []
    for start, stop, kv in ((0, 3, seen), (3, 4, stored(seen)), (4, 6, seen)):
        x, cache = apply(ids[:, start:stop], jnp.int32(start), cache, kv, method="extend")
        found.append(x)
    close(jnp.concatenate(found, axis=1), want, 2e-6)


def test_a_text_behind_its_queries_is_blind_to_what_follows_and_to_padding():
    case, apply, tokens = golden("stage1_eva")
    seen = apply(tokens, apply(jnp.asarray(case.io["vision_embeds"]), method="image_kv"), method="look")[1]
    ids, mask = case.texts()
    mask = mask.at[0, 5:].set(False)
    before = apply(ids, mask, seen, method="write")
    after = apply(ids.at[0, 5:].set(7).at[1, 4:].set(9), mask, seen, method="write")
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    np.testing.assert_array_equal(before[1, :4], after[1, :4])
    assert np.abs(before[1, 4:] - after[1, 4:]).max() > 0.01
    assert np.abs(before - apply(ids, mask, jax.tree.map(jnp.zeros_like, seen), method="write")).max() > 0.01


def test_an_image_is_picked_by_index_as_if_its_keys_were_copied():
    case, apply, tokens = golden("stage1_eva")
    kv = apply(jnp.asarray(case.io["vision_embeds"]), method="image_kv")
    ids, mask = case.texts()
    B, other = len(ids), jnp.roll(jnp.arange(len(ids)), 1)[None]
    twice = lambda x: jnp.repeat(x, 2, axis=0)
    found = apply(tokens, twice(ids), twice(mask), kv, img_idx=(None, other), method="join")
    for g, of in enumerate((jnp.arange(B), other[0])):
        want = apply(tokens, ids, mask, jax.tree.map(lambda x: x[:, of], kv), method="join")
        for ours, theirs in zip(found, want):
            close(ours[g::2], theirs, 2e-6)
    assert np.abs(found[0][::2] - found[0][1::2]).max() > 0.01


def test_dropout_is_that_of_its_key():
    sizes = dict(width=16, layers=2, heads=2, mlp=16, positions=8, vocab_size=20, kv_width=12)
    qformer, (img_tok, tokens) = QFormer(**sizes, dropout=0.1), (jnp.ones((1, 3, 12)), jnp.ones((2, 16)))

    def run(module, deterministic=False):
        return module.look(tokens, module.image_kv(img_tok), deterministic=deterministic)[0]

    params = qformer.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, method=run)
    at = lambda key: qformer.apply(params, rngs={"dropout": key}, method=run)
    first, second, again = at(jax.random.key(2)), at(jax.random.key(3)), at(jax.random.key(2))
    np.testing.assert_array_equal(first, again)
    still = qformer.apply(params, True, method=run)
    assert min(np.abs(a - b).max() for a, b in ((first, second), (first, still))) > 0.01


@pytest.mark.parametrize(
    "sizes, count",
    [
        (dict(kv_width=1408), 186_282_811),
        (dict(kv_width=1024), 186_282_811 - 3_538_944),
        (dict(kv_width=1408, text=False), 105_137_664),
    ],
)
def test_parameters_of_full_size(sizes, count):
    """As many as the original prints, rows that fill up the vocabulary not counted."""
    found, padding = shapes(**sizes), (30592 - 30523) * (768 + 1)
    total = sum(map(math.prod, found.values()))
    assert total - (padding if sizes.get("text", True) else 0) == count
    assert found["cross/blocks/cross_attn/k/kernel"] == (6, sizes["kv_width"], 12, 64)
    assert found["blocks/query_mlp/fc1/kernel"] == (12, 768, 3072)


def test_parts_that_a_stage_leaves_out():
    every = shapes(kv_width=1408)
    queries, reader = shapes(kv_width=1408, text=False), shapes(kv_width=1408, head=False)
    assert {path.split("/")[0] for path in every} == {"embed", "blocks", "cross", "lm_head"}
    assert every.keys() - reader.keys() == {path for path in every if path.startswith("lm_head/")}
    of_text = ("embed/word/", "embed/pos/", "blocks/mlp/", "blocks/mlp_ln/")
    assert reader.keys() - queries.keys() == {path for path in reader if path.startswith(of_text)}
