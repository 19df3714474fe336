"""OPT against transformers' own, by goldens in tests/golden (or $GOLDEN_DIR): float32, dropout off, soft prompts as
given, so that nothing but the language model is at work. Every size comes from a case's meta.json."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from world import jitted
from world.golden import folder
from world.opt import PAD, loaded, search, sizes_of

from blip_jax.decode import limits
from blip_jax.decode.rank import text_nll
from blip_jax.models.text.med import padded_vocab
from blip_jax.models.text.opt import Opt, after_prompts


class Case:
    """One golden folder and its language model, whose tensors' names begin with `prefix`."""

    def __init__(self, name, llm, prefix):
        self.meta = json.loads((folder(f"blip2/{name}") / "meta.json").read_text())
        self.io = np.load(folder(f"blip2/{name}") / "io.npz")
        self.tensors = load_file(folder(f"blip2/{name}") / "weights.safetensors")
        sizes = sizes_of(functools.reduce(dict.__getitem__, llm.split("/"), self.meta))
        self.model = Opt(**sizes)
        self.params = loaded(self.tensors, sizes, prefix)
        self.vocab = sizes["vocab_size"]

    def apply(self, method, *args, params=None):
        return jitted.apply(self.model, self.params if params is None else params, method, *args)

    def text(self, name, mask=None):
        """ids i32[B,T] and mask of what `io` calls so."""
        ids = jnp.asarray(self.io[name], jnp.int32)
        return ids, jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(self.io[mask] > 0)

    def joined(self, soft, ids, mask):
        """embeds [B,Q+T,E], mask of soft prompts and words behind them."""
        embeds = jnp.concatenate([soft, self.apply("embed", ids)], axis=1)
        return embeds, jnp.pad(mask, ((0, 0), (soft.shape[1], 0)), constant_values=True)


@functools.cache
def postnorm():
    return Case("opt_postnorm", "llm", "")


@functools.cache
def stage2():
    return Case("stage2_opt_full", "llm", "opt_model.")


@functools.cache
def hf():
    return Case("hf_opt", "config/text_config", "language_model.")


def close(ours, theirs, atol, what=""):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=atol, err_msg=what)


def next_token_loss(logits, labels):
    """Mean over labels that are not -100: logits f32[B,T,Vp] of what precedes them."""
    keep, log_p = labels >= 0, jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(nll * keep) / jnp.sum(keep)


def decoded(case, embeds, mask, settings, rule="lavis"):
    """(ids, score, logits after the prompt) with the arguments that LAVIS passed to `generate`."""
    counted = "max_length" in settings
    most = settings["max_length"] if counted else settings["max_new_tokens"]
    length = limits.lengths(1, **limits.of_lavis(settings.get("min_length", 0), most, start_in_max=counted))
    beams = settings["num_beams"] if settings["num_beams"] > 1 else 0
    how = jnp.float32(settings["length_penalty"]), jnp.int32(length["min_length"]), jnp.int32(settings["eos_token_id"])
    repetition = settings.get("repetition_penalty", 1.0)
    rule = rule if beams else ""  # one program for greedy texts
    return search(case.model, case.params, embeds, mask, how, beams, length["max_length"], repetition, rule)


def same_texts(ours, theirs, what=""):
    """Ids behind the start id up to where theirs ends, and pads behind."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_array_equal(ours[:, 1 : theirs.shape[1]], theirs[:, 1:], err_msg=what)
    assert (ours[:, theirs.shape[1] :] == PAD).all(), what


def test_postnorm_logits_loss_and_gradient():
    case, io = postnorm(), postnorm().io
    ids, mask = case.text("input_ids", "attention_mask")
    labels = jnp.where(mask, ids, -100)

    @jax.jit
    def run(soft):
        def loss(soft):
            states = case.apply("__call__", *case.joined(soft, ids, mask))
            logits = case.apply("logits", states)
            return next_token_loss(logits[:, soft.shape[1] - 1 : -1], labels), logits

        return jax.value_and_grad(loss, has_aux=True)(soft)

    (loss, logits), grad = run(jnp.asarray(io["soft_prompt"]))
    everywhere = np.pad(mask, ((0, 0), (logits.shape[1] - mask.shape[1], 0)), constant_values=True)
    close(logits[..., : case.vocab] * everywhere[..., None], io["logits"], 1e-5 * np.abs(io["logits"]).max())
    assert (logits[..., case.vocab :] == np.finfo(np.float32).min).all()
    close(loss, io["loss"], 1e-5)
    close(grad, io["grad/soft_prompt"], 1e-4 * np.abs(io["grad/soft_prompt"]).max())


@pytest.mark.parametrize("name, beams", [("greedy", 1), ("beam5", 5)])
def test_postnorm_texts_behind_prompts_padded_on_the_left(name, beams):
    case, io = postnorm(), postnorm().io
    prompts = case.joined(jnp.asarray(io["soft_prompt"]), *case.text("prompt_ids", "prompt_mask"))
    settings = dict(num_beams=beams, max_new_tokens=8, length_penalty=1.0, eos_token_id=int(io["eos_token_id"]))
    ids, _, logits = decoded(case, *prompts, settings)
    same_texts(ids, io[name])
    close(logits[:, : case.vocab], io["prompt_logits"], 1e-5 * np.abs(io["prompt_logits"]).max())


def test_stage2_losses():
    case, io = stage2(), stage2().io
    ids, mask = case.text("input_ids", "attention_mask")
    Q, T = io["soft_prompt"].shape[1], ids.shape[1]

    @jax.jit
    def before_text():
        states = case.apply("__call__", *case.joined(jnp.asarray(io["soft_prompt"]), ids, mask))
        return case.apply("logits", states[:, Q - 1 : -1])

    logits = before_text()
    assert logits.shape == (len(ids), T, padded_vocab(case.vocab))
    for name, hidden in (("loss", int(io["prompt_length"])), ("loss_no_prompt", 0)):
        labels = jnp.where(mask & (jnp.arange(T) >= hidden), ids, -100)
        close(next_token_loss(logits, labels), io[name], 1e-5, name)


def prompts_of(case, name, soft):
    """Captions' one prompt for all rows, or answers' prompts, padded on the left."""
    if name.startswith("cap"):
        ids = jnp.tile(jnp.asarray(stage2().io["cap_prompt_ids"], jnp.int32), (len(soft), 1))
        return case.joined(soft, ids, jnp.ones(ids.shape, bool))
    return case.joined(soft, *stage2().text("vqa_prompt_ids", "vqa_prompt_mask"))


def test_stage2_captions_and_answers_by_the_rule_of_lavis():
    case, io = stage2(), stage2().io
    soft = jnp.asarray(io["soft_prompt"])
    for name, settings in case.meta["decode"].items():
        ids, score, logits = decoded(case, *prompts_of(case, name, soft), settings)
        same_texts(ids, io[name], name)
        if f"score/{name}" in io:
            np.testing.assert_allclose(score, io[f"score/{name}"], rtol=1e-4, err_msg=name)
        if name.startswith("vqa"):
            close(logits[:, : case.vocab], io["vqa_logits"], 1e-4, name)


def test_the_same_by_the_rule_of_hugging_face():
    case, io, decode = hf(), hf().io, stage2().meta["decode"]
    soft = jnp.asarray(io["soft_prompt_eps1e-5"])
    for name, settings in decode.items():
        ids, score, _ = decoded(case, *prompts_of(case, name, soft), settings, "hf")
        same_texts(ids, io[f"hf5/{name}"], name)
        lavis = np.pad(stage2().io[name], ((0, 0), (0, ids.shape[1])), constant_values=PAD)[:, 1 : ids.shape[1]]
        np.testing.assert_array_equal((ids[:, 1:] == lavis).all(1), case.meta["hf5_equal"][name], err_msg=name)
        if f"hf5/score/{name}" in io:
            np.testing.assert_allclose(score, io[f"hf5/score/{name}"], rtol=1e-4, err_msg=name)


def test_stage2_ranks_of_candidates():
    case, io = stage2(), stage2().io
    embeds, mask = prompts_of(case, "vqa", jnp.asarray(io["soft_prompt"]))
    ids, sizes = jnp.asarray(io["candidate_ids"], jnp.int32), io["candidate_len"]
    (C, T), B, S = ids.shape, len(embeds), mask.shape[1] + ids.shape[1] - 1

    @jax.jit
    def nll():
        first, cache = case.apply("prefill", embeds, mask, case.model.empty_cache(B, S))
        cache = jax.tree.map(lambda x: jnp.repeat(x, C, axis=1), cache)
        apply = functools.partial(case.apply, "extend_states")
        extend = after_prompts(apply, jnp.repeat(mask, C, axis=0), S)
        states, _ = extend(jnp.tile(ids[:, :-1], (B, 1)), 1, cache)
        logits = case.apply("logits", states).reshape(B, C, T - 1, -1)
        return text_nll(first, logits, ids, jnp.arange(T) < sizes[:, None])

    found = np.asarray(nll())
    np.testing.assert_allclose(found, io["candidate_nll_sum"], rtol=1e-4)
    np.testing.assert_array_equal(np.argsort(found, axis=1, kind="stable"), io["candidate_rank_sum"])
    np.testing.assert_array_equal(np.argsort(found / sizes, axis=1, kind="stable"), io["candidate_rank_mean"])


def test_every_norm_has_epsilon_1e_5():
    case = Case("norm_eps", "llm_opt", "opt_model.")
    ids, mask = case.text("input_ids")
    soft = case.io["query_output"] @ case.tensors["opt_proj.weight"].T + case.tensors["opt_proj.bias"]

    @jax.jit
    def logits_of(soft):
        return case.apply("logits", case.apply("__call__", *case.joined(soft, ids, mask)))

    close(logits_of(soft)[..., : case.vocab], case.io["opt_logits"], 2e-5 * np.abs(case.io["opt_logits"]).max())
