"""OPT from tensors under transformers' names, and its texts behind prompts."""

import functools

import jax
import jax.numpy as jnp

from blip_jax.convert import apply
from blip_jax.decode import beam, generate
from blip_jax.models.text.opt import after_prompts

PAD, START = 1, 2


def loaded(tensors, sizes, prefix=""):
    """Parameters from tensors under transformers' names, of which those with the prefix are of an OPT."""
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    found = apply.from_torch("opt", own, {"llm": sizes["heads"]})["params"]["llm"]
    return jax.tree.map(jnp.asarray, found)


def sizes_of(llm):
    """Our names of the sizes in a config of transformers."""
    return dict(
        width=llm["hidden_size"],
        layers=llm["num_hidden_layers"],
        heads=llm["num_attention_heads"],
        mlp=llm["ffn_dim"],
        positions=llm["max_position_embeddings"],
        vocab_size=llm["vocab_size"],
        embed_width=llm["word_embed_proj_dim"],
        pre_norm=llm["do_layer_norm_before"],
    )


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7, 8))
def search(model, params, embeds, mask, how, beams, length, repetition, rule):
    """how: length_penalty f32[], min_length i32[] and eos i32[]; else one program would serve each setting."""
    penalty, least, eos = how
    apply = functools.partial(model.apply, {"params": params})
    B, S = len(mask), mask.shape[1] + length - 2
    logits, cache = apply(embeds, mask, apply(B, S, method="empty_cache"), method="prefill")
    times = lambda x, axis: jnp.repeat(x, beams or 1, axis=axis)
    extend = after_prompts(functools.partial(apply, method="extend"), times(mask, 0), S)
    # the start id that no model is given: seen by the repetition penalty of LAVIS's version, not by that of version 5
    prompt = jnp.full((B, 1), logits.shape[-1] if rule == "hf" else START)
    if not beams:
        greedy = generate.GREEDY._replace(min_length=least, max_length=length)
        ids, log_prob = generate.sample(
            extend, logits, cache, prompt, jax.random.split(jax.random.key(0), B), greedy, eos=eos, pad=PAD
        )
        return ids, log_prob, logits
    settings = beam.Beam(beams, penalty, repetition, least, length, rule)
    cache = jax.tree.map(lambda x: times(x, 1), cache)
    ids, _, score = beam.search(extend, logits, cache, prompt, settings, 1, eos=eos, pad=PAD)
    return ids[:, 0], score[:, 0], logits
