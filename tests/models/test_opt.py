"""OPT: counts of the published sizes, caches and paddings that change nothing, dropout, a mesh; transformers live."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from world.opt import PAD, START, loaded, search, sizes_of

from blip_jax import trees
from blip_jax.config.sizes import LLM_SIZES
from blip_jax.models import initial
from blip_jax.models.layers import dense
from blip_jax.models.text.med import padded_vocab
from blip_jax.models.text.opt import Opt, after_prompts, positions_of
from blip_jax.parallel import sharding

Q = 3  # soft prompts of a row
EOS = 9


def model_of(size, **changes):
    return Opt(**{name: x for name, x in (LLM_SIZES[size] | changes).items() if name != "kind"})


def shapes_of(model):
    ids = jnp.zeros((1, 2), jnp.int32)

    def every_part(model):
        return model(model.embed(ids), ids == 0)

    return jax.eval_shape(lambda: model.init(jax.random.key(0), method=every_part)["params"])


TINY = model_of("opt_tiny", dropout=0.2)
BEHIND = model_of("opt_tiny", embed_width=20, pre_norm=False)  # normalised behind, and projected


@functools.cache
def lively(model):
    """Random parameters in which every position counts."""
    return initial.magnified(initial.parameters(shapes_of(model), jax.random.key(1), std=0.1, pos_std=0.1), 2)


def rows_of(model, seed=0, left=(0, 2, 4, 1)):
    """Soft prompts f32[B,Q,E] and words i32[B,T] with `left` pads before each row's own, mask bool[B,Q+T]."""
    rng, T = np.random.default_rng(seed), 7
    ids = rng.integers(4, 300, (len(left), T))
    mask = np.arange(T) >= np.array(left)[:, None]
    soft = jnp.asarray(rng.normal(0, 0.5, (len(left), Q, model.embed_width)), jnp.float32)
    return soft, jnp.where(mask, ids, PAD), jnp.pad(jnp.asarray(mask), ((0, 0), (Q, 0)), constant_values=True)


def embedded(apply, soft, ids):
    return jnp.concatenate([soft, apply(ids, method="embed")], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, soft, ids, mask):
    apply = functools.partial(model.apply, {"params": params})
    return apply(apply(embedded(apply, soft, ids), mask), method="logits")


@pytest.mark.parametrize("size, count", [("opt_2.7b", 2_651_596_800), ("opt_6.7b", 6_658_473_984)])
def test_parameters_of_the_published_sizes(size, count):
    model = model_of(size)
    spare = padded_vocab(model.vocab_size) - model.vocab_size
    found = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes_of(model)))
    assert found - spare * model.embed_width == count


@pytest.mark.parametrize("size", [size for size, sizes in LLM_SIZES.items() if sizes["kind"] == "opt"])
def test_every_parameter_has_its_rows(size):
    params = {"llm": shapes_of(model_of(size))}
    mesh = sharding.mesh_of((1, 4, 2), jax.devices())
    specs = sharding.shardings_for(params, mesh)
    whole = [path for (path, s), (_, x) in zip(trees.paths(specs), trees.paths(params)) if s.is_fully_replicated]
    assert whole and all(path.endswith(("bias", "scale")) for path in whole)
    table = {path for path, _ in trees.paths(params) if dense.rounds(path)}
    assert table == {path for path, _ in trees.paths(params) if path.endswith(("kernel", "embedding"))}
    key = jax.random.key(0)
    made = jax.eval_shape(lambda: initial.parameters(params, key, std=0.02, pos_std=0.02))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)


def test_positions_count_real_ones_only():
    mask = jnp.array([[1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 0]], bool)
    np.testing.assert_array_equal(positions_of(mask), [[0, 1, -1, -1, 2, 3], [-1, 0, 1, 2, 3, -1]])


@pytest.mark.parametrize("model", [TINY, BEHIND], ids=["before", "behind"])
def test_pads_on_the_left_change_nothing_and_a_cache_neither(model):
    params, (soft, ids, mask) = lively(model), rows_of(model)
    whole = logits_of(model, params, soft, ids, mask)
    row, pads = slice(2, 3), 4
    alone = logits_of(model, params, soft[row], ids[row, pads:], jnp.ones((1, Q + 7 - pads), bool))
    np.testing.assert_allclose(whole[row, Q + pads :], alone[:, Q:], atol=2e-5, rtol=0)
    np.testing.assert_allclose(whole[row, :Q], alone[:, :Q], atol=2e-5, rtol=0)
    assert np.abs(np.diff(whole[:, -1, :300], axis=0)).max() > 0.1  # rows differ

    @jax.jit
    def in_steps(params):
        apply = functools.partial(model.apply, {"params": params})
        first, S = Q + 5, mask.shape[1]
        embeds = embedded(apply, soft, ids[:, :5])
        logits, cache = apply(embeds, mask[:, :first], apply(4, S, method="empty_cache"), method="prefill")
        extend = after_prompts(functools.partial(apply, method="extend"), mask[:, :first], S)
        states, _ = after_prompts(functools.partial(apply, method="extend_states"), mask[:, :first], S)(
            ids[:, 5:], 1, cache
        )
        found = [logits]
        for t in range(5, 7):
            logits, cache = extend(ids[:, t : t + 1], t - 4, cache)
            found.append(logits)
        return jnp.stack(found, 1), apply(states, method="logits")

    one_by_one, together = in_steps(params)
    np.testing.assert_allclose(one_by_one, whole[:, Q + 4 :], atol=2e-5, rtol=0)
    np.testing.assert_allclose(together, whole[:, Q + 5 :], atol=2e-5, rtol=0)


def test_dropout_is_on_residuals_alone_and_needs_a_key():
    params, (soft, ids, mask) = lively(TINY), rows_of(TINY)
    apply = functools.partial(TINY.apply, {"params": params})

    def states(key, params=params):
        apply = functools.partial(TINY.apply, {"params": params})
        return apply(embedded(apply, soft, ids), mask, deterministic=False, rngs={"dropout": key})

    a, b = states(jax.random.key(0)), states(jax.random.key(1))
    assert np.abs(a - b).max() > 0.01
    # what nothing is added to stays: with the parts' outputs zero, only the embeddings are left
    silent = lambda path: "/out/" in path or "/fc2/" in path
    empty = trees.nest((path, 0 * x if silent(path) else x) for path, x in trees.paths(params))
    plain = functools.partial(TINY.apply, {"params": empty})
    np.testing.assert_array_equal(states(jax.random.key(0), empty), plain(embedded(plain, soft, ids), mask))
    with pytest.raises(Exception, match="dropout"):
        apply(embedded(apply, soft, ids), mask, deterministic=False)


def test_more_positions_than_the_table_has_is_an_error():
    with pytest.raises(ValueError, match="embeds have 97 positions, the language model has a table of 96: shorten"):
        jax.eval_shape(lambda: TINY.apply({"params": lively(TINY)}, jnp.zeros((1, 97, 32)), jnp.ones((1, 97), bool)))


def test_bfloat16_is_near_and_parameters_may_be_rounded_and_cut_beforehand():
    params, (soft, ids, mask) = lively(TINY), rows_of(TINY)
    half = TINY.clone(dtype=jnp.bfloat16)
    exact, near = logits_of(TINY, params, soft, ids, mask), logits_of(half, params, soft, ids, mask)
    assert near.dtype == jnp.float32
    real = np.asarray(mask)
    error = np.abs(np.asarray(exact - near)[real][:, :300])
    assert 0 < error.max() < 0.05 * np.abs(np.asarray(exact)[real][:, :300]).max()
    rounded = trees.nest(
        (path, x.astype(jnp.bfloat16) if dense.rounds(path) else x) for path, x in trees.paths({"llm": params})
    )
    apart = dense.text_layers_apart(rounded)["llm"]
    assert dense.is_apart(apart["blocks"]) and apart["blocks"][0]["mlp"]["fc1"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(logits_of(half, apart, soft, ids, mask), near)


def test_on_a_mesh_loss_gradients_and_texts_are_the_same():
    params, (soft, ids, mask) = lively(BEHIND), rows_of(BEHIND)
    how = jnp.float32(1.0), jnp.int32(3), jnp.int32(EOS)

    @jax.jit
    def run(params, soft):
        apply = functools.partial(BEHIND.apply, {"params": params})

        def loss(soft, params):
            apply = functools.partial(BEHIND.apply, {"params": params})
            states = apply(embedded(apply, soft, ids), mask)[:, Q - 1 : -1]
            log_p = jax.nn.log_softmax(apply(states, method="logits"))
            return -jnp.sum(jnp.take_along_axis(log_p, ids[..., None], -1)[..., 0] * mask[:, Q:])

        value, grads = jax.value_and_grad(loss, (0, 1))(soft, params)
        return value, grads, search(BEHIND, params, embedded(apply, soft, ids), mask, how, 2, 5, 1.0, "lavis")

    value, grads, texts = run(params, soft)
    mesh = sharding.mesh_of((2, 2, 2), jax.devices())
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings_for(params, mesh))
        assert placed["blocks"]["mlp"]["fc1"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
        value_on, grads_on, texts_on = run(placed, jax.device_put(soft, sharding.batch_sharding(mesh)))
    np.testing.assert_allclose(value_on, value, rtol=1e-5)
    for (path, a), (_, b) in zip(trees.paths({"params": grads[1]}), trees.paths({"params": grads_on[1]})):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * max(1, np.abs(a).max()), err_msg=path)
    np.testing.assert_allclose(grads_on[0], grads[0], rtol=0, atol=1e-5 * np.abs(grads[0]).max())
    np.testing.assert_array_equal(texts_on[0], texts[0])
    np.testing.assert_allclose(texts_on[1], texts[1], rtol=1e-5)


# --- transformers live ------------------------------------------------------------------------------------------------
CONFIG = dict(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    ffn_dim=48,
    num_attention_heads=4,
    max_position_embeddings=48,
    dropout=0.0,
    activation_function="relu",
    pad_token_id=PAD,
    bos_token_id=START,
    eos_token_id=EOS,
    init_std=0.3,
)


@functools.cache
def theirs(pre_norm):
    """(transformers' model, ours, our parameters) with the same random weights."""
    torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[peers]'")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; pip install -e '.[peers]'"
    )
    torch.manual_seed(3)
    config = transformers.OPTConfig(**CONFIG, do_layer_norm_before=pre_norm, word_embed_proj_dim=32 if pre_norm else 20)
    model = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            x += 0.1 * torch.randn_like(x) if name.endswith("bias") or "norm" in name else 0
    sizes = sizes_of(config.to_dict())
    return model, Opt(**sizes), loaded({k: v.numpy() for k, v in model.state_dict().items()}, sizes)


def prompts(model, seed):
    soft, ids, mask = rows_of(model, seed, left=(0, 3, 5, 1, 2, 0))
    return soft, jnp.where(mask[:, Q:], ids % 60, PAD), mask


@pytest.mark.parametrize("pre_norm", [True, False])
def test_transformers_gives_the_same_logits_behind_soft_prompts_and_pads(pre_norm):
    import torch

    model, ours, params = theirs(pre_norm)
    soft, ids, mask = prompts(ours, 0)
    tensor = lambda x: torch.from_numpy(np.array(x))
    with torch.no_grad():
        words = model.get_input_embeddings()(tensor(ids).long())
        out = model(inputs_embeds=torch.cat([tensor(soft), words], 1), attention_mask=tensor(mask).long()).logits
    found = logits_of(ours, params, soft, ids, mask)[..., :60]
    real = np.asarray(mask)
    np.testing.assert_allclose(np.asarray(found)[real], out.numpy()[real], atol=2e-5 * np.abs(out.numpy()).max())


@pytest.mark.parametrize("penalty, least, repetition", [(1.0, 0, 1.0), (2.0, 3, 1.0), (0.0, 0, 1.4), (-1.0, 2, 1.0)])
def test_transformers_gives_the_same_beams(penalty, least, repetition):
    import torch

    model, ours, params = theirs(True)
    tensor = lambda x: torch.from_numpy(np.array(x))
    ended = 0
    for seed, eos in enumerate((23, 23, 0, 54)):  # tokens that these weights often choose
        soft, ids, mask = prompts(ours, seed)
        apply = functools.partial(ours.apply, {"params": params})
        embeds = embedded(apply, soft, ids)
        with torch.no_grad():
            out = model.generate(
                inputs_embeds=tensor(embeds),
                attention_mask=tensor(mask).long(),
                num_beams=3,
                max_new_tokens=7,
                min_new_tokens=least,
                length_penalty=penalty,
                repetition_penalty=repetition,
                do_sample=False,
                eos_token_id=eos,
                return_dict_in_generate=True,
                output_scores=True,
            )
        how = jnp.float32(penalty), jnp.int32(1 + least), jnp.int32(eos)
        texts, score, _ = search(ours, params, embeds, mask, how, 3, 8, repetition, "hf")
        want = np.full((len(ids), 7), PAD)
        want[:, : out.sequences.shape[1]] = out.sequences.numpy()
        np.testing.assert_array_equal(texts[:, 1:], want)
        np.testing.assert_allclose(score, out.sequences_scores.numpy(), rtol=1e-4)
        ended += (want == eos).any(1).sum()
    assert 2 < ended < 24, ended  # texts that end and texts that are cut
