"""FlanT5 against transformers' own, by goldens in tests/golden (or $GOLDEN_DIR): float32, dropout off, soft prompts as
given, so that nothing but the language model is at work. Every size comes from a case's meta.json."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from world.golden import folder

from blip_jax import losses
from blip_jax.convert import apply
from blip_jax.convert.tied import words_and_head
from blip_jax.decode import beam, generate, limits
from blip_jax.models.text.cache import stored
from blip_jax.models.text.t5 import T5

PAD, START, END = 0, 0, 1


def loaded(tensors, sizes, prefix=""):
    """Parameters from tensors under transformers' names, of which those with the prefix are of a T5."""
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    found = apply.from_torch("t5", words_and_head(own), {"llm": sizes["heads"]})["params"]["llm"]
    return jax.tree.map(jnp.asarray, found)


def sizes_of(llm):
    """Our names of the sizes in a config of transformers."""
    return dict(
        width=llm["d_model"],
        layers=llm["num_layers"],
        decoder_layers=llm["num_decoder_layers"],
        heads=llm["num_heads"],
        head_dim=llm["d_kv"],
        mlp=llm["d_ff"],
        vocab_size=llm["vocab_size"],
        buckets=llm["relative_attention_num_buckets"],
        max_distance=llm["relative_attention_max_distance"],
        act=llm["dense_act_fn"],
    )


class Case:
    """One golden folder and its language model, whose tensors' names begin with `prefix`."""

    def __init__(self, name, llm, prefix):
        self.meta = json.loads((folder(f"blip2/{name}") / "meta.json").read_text())
        self.io = np.load(folder(f"blip2/{name}") / "io.npz")
        self.tensors = load_file(folder(f"blip2/{name}") / "weights.safetensors")
        sizes = sizes_of(functools.reduce(dict.__getitem__, llm.split("/"), self.meta))
        self.model = T5(**sizes)
        self.params = loaded(self.tensors, sizes, prefix)
        self.vocab = sizes["vocab_size"]

    def text(self, name, mask=None):
        """ids i32[B,T] and mask of what `io` calls so."""
        ids = jnp.asarray(self.io[name], jnp.int32)
        return ids, jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(self.io[mask] > 0)

    def projected(self, tokens):
        """Soft prompts of what the Q-Former gave."""
        return tokens @ self.tensors["t5_proj.weight"].T + self.tensors["t5_proj.bias"]


@functools.cache
def stage2():
    return Case("stage2_t5_full", "llm", "t5_model.")


@functools.cache
def hf():
    return Case("hf_t5", "config/text_config", "language_model.")


def close(ours, theirs, atol, what=""):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=atol, err_msg=what)


def encoded(apply, soft, ids, mask):
    """(states, mask) of soft prompts and words behind them."""
    embeds = jnp.concatenate([soft, apply(ids, method="embed")], axis=1)
    mask = jnp.pad(mask, ((0, 0), (soft.shape[1], 0)), constant_values=True)
    return apply(embeds, mask, method="encode"), mask


def shifted(ids):
    """What the decoder is given for texts: the start id, and of each all but its last."""
    return jnp.pad(ids, ((0, 0), (1, 0)), constant_values=START)[:, :-1]


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8, 9))
def search(model, params, soft, ids, mask, how, beams, length, repetition, rule):
    """how: length_penalty f32[], min_length i32[]; else one program would serve each setting."""
    penalty, least = how
    apply, B = functools.partial(model.apply, {"params": params}), len(soft)
    states, kv_mask = encoded(apply, soft, ids, mask)
    kv = stored(apply(states, method="cross_kv"))
    extend = lambda ids, start, cache: apply(ids, start, cache, kv, kv_mask, method="extend")
    prompt = jnp.full((B, 1), START)
    logits, cache = extend(prompt, jnp.int32(0), model.empty_cache(B, length))
    if not beams:
        greedy = generate.GREEDY._replace(min_length=least, max_length=length)
        keys = jax.random.split(jax.random.key(0), B)
        return *generate.sample(extend, logits, cache, prompt, keys, greedy, eos=END, pad=PAD), states
    settings = beam.Beam(beams, penalty, repetition, least, length, rule)
    cache = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=1), cache)
    ids, _, score = beam.search(extend, logits, cache, prompt, settings, 1, eos=END, pad=PAD)
    return ids[:, 0], score[:, 0], states


def decoded(case, soft, ids, mask, settings, rule="lavis"):
    """(ids, score, encoder states) with the arguments that LAVIS passed to `generate`."""
    counts = limits.of_lavis(settings["min_length"], settings["max_new_tokens"], start_in_max=False)
    length = limits.lengths(1, **counts)
    beams = settings["num_beams"] if settings["num_beams"] > 1 else 0
    how = jnp.float32(settings["length_penalty"]), jnp.int32(length["min_length"])
    rule = rule if beams else ""  # one program for greedy texts
    repetition = settings.get("repetition_penalty", 1.0)
    return search(case.model, case.params, soft, ids, mask, how, beams, length["max_length"], repetition, rule)


def prompts_of(name, rows):
    """Captions' one prompt for all rows, which may be empty, or answers' prompts; all padded on the right to one
    length, so that one program serves them."""
    answers, caption = stage2().text("vqa_prompt_ids", "vqa_prompt_mask"), stage2().io["cap_prompt_ids"]
    ids, mask = answers
    if not name.startswith("vqa"):
        ids = jnp.tile(jnp.asarray([END] if name.endswith("empty") else caption, jnp.int32), (rows, 1))
        mask = jnp.ones(ids.shape, bool)
    more = max(answers[0].shape[1], len(caption)) - ids.shape[1]
    return jnp.pad(ids, ((0, 0), (0, more)), constant_values=PAD), jnp.pad(mask, ((0, 0), (0, more)))


def up_to_end(ids):
    """Ids of each row up to its first end."""
    return [row[: row.index(END) + 1 if END in row else None] for row in np.asarray(ids).tolist()]


def test_stage2_loss_and_gradient():
    case, io = stage2(), stage2().io
    (ids, mask), (out, out_mask) = case.text("input_ids", "input_mask"), case.text("output_ids", "output_mask")

    def loss_of(model):
        def loss(kernel, bias):
            apply = functools.partial(model.apply, {"params": case.params})
            states, kv_mask = encoded(apply, jnp.asarray(io["query_output"]) @ kernel.T + bias, ids, mask)
            kv = apply(states, method="cross_kv")
            logits = apply(apply(shifted(out), out_mask, kv, kv_mask, method="decode"), method="logits")
            nll = losses.lm(logits, out, out_mask, case.vocab, smoothing=0.0, over="valid")
            return nll, logits

        return loss

    weight, bias = (jnp.asarray(case.tensors[f"t5_proj.{x}"]) for x in ("weight", "bias"))
    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_of(case.model), (0, 1), has_aux=True))(weight, bias)
    close(loss, io["loss"], 1e-5)
    assert (logits[..., case.vocab :] == np.finfo(np.float32).min).all()
    for x, grad in zip(("weight", "bias"), grads):
        theirs = io[f"grad/t5_proj.{x}"]
        close(grad, theirs, 1e-4 * np.abs(theirs).max(), x)
    close(case.projected(io["query_output"]), io["soft_prompt"], 1e-5)
    tanh = case.model.clone(act="gelu_new")
    close(jax.jit(loss_of(tanh))(weight, bias)[0], io["loss_gelu_new"], 1e-5, "gelu_new")


def test_stage2_captions_and_answers_by_the_rule_of_lavis():
    case, io = stage2(), stage2().io
    soft = jnp.asarray(io["soft_prompt"])
    for name, settings in case.meta["decode"].items():
        ids, mask = prompts_of(name, len(soft))
        texts, score, states = decoded(case, soft, ids, mask, settings)
        theirs = io[name]
        np.testing.assert_array_equal(texts[:, : theirs.shape[1]], theirs, err_msg=name)
        assert (texts[:, theirs.shape[1] :] == PAD).all(), name
        if f"score/{name}" in io:
            np.testing.assert_allclose(score, io[f"score/{name}"], rtol=1e-4, err_msg=name)
        if name.startswith("vqa"):
            kept, theirs = np.pad(mask, ((0, 0), (soft.shape[1], 0)), constant_values=True), io["vqa_encoder_output"]
            close((states * kept[..., None])[:, : theirs.shape[1]], theirs, 1e-5 * np.abs(theirs).max(), name)


def test_the_same_by_the_rule_of_hugging_face():
    case, io, decode = hf(), hf().io, stage2().meta["decode"]
    soft = jnp.asarray(io["soft_prompt_eps1e-5"])
    for name, settings in decode.items():
        texts, score, _ = decoded(case, soft, *prompts_of(name, len(soft)), settings, "hf")
        assert up_to_end(texts) == up_to_end(io[f"hf5/{name}"]), name
        if f"hf5/score/{name}" in io:
            np.testing.assert_allclose(score, io[f"hf5/score/{name}"], rtol=1e-4, err_msg=name)
    settings = decode["vqa_beam5_lpm1"]  # those of "answers"
    texts, score, _ = decoded(
        case, jnp.asarray(io["soft_prompt"]), *case.text("prompt_ids", "prompt_mask"), settings, "hf"
    )
    assert up_to_end(texts) == up_to_end(io["answers"])
    np.testing.assert_allclose(score, io["answer_scores"], rtol=1e-4)


def test_stage2_ranks_of_candidates():
    case, io = stage2(), stage2().io
    (ids, mask), (texts, real) = (
        case.text("vqa_prompt_ids", "vqa_prompt_mask"),
        case.text("candidate_ids", "candidate_mask"),
    )
    B, C = len(ids), len(texts)

    @jax.jit
    def nll():
        apply = functools.partial(case.model.apply, {"params": case.params})
        states, kv_mask = encoded(apply, jnp.asarray(io["soft_prompt"]), ids, mask)
        kv = apply(states, method="cross_kv")
        all_of = lambda x: jnp.tile(x, (B, 1))
        states = apply(all_of(shifted(texts)), all_of(real), kv, kv_mask, method="decode")
        log_p = jax.nn.log_softmax(apply(states, method="logits"))
        chosen = jnp.take_along_axis(log_p, all_of(texts)[..., None], axis=-1)[..., 0]
        return -jnp.sum(chosen * all_of(real), axis=1).reshape(B, C)

    found = np.asarray(nll())
    np.testing.assert_allclose(found, io["candidate_nll_sum"], rtol=1e-4)
    np.testing.assert_array_equal(np.argsort(found, axis=1, kind="stable"), io["candidate_rank_sum"])


def test_every_norm_has_epsilon_1e_6():
    case = Case("norm_eps", "llm_t5", "t5_model.")
    (ids, mask), (out, out_mask) = case.text("input_ids"), case.text("decoder_input_ids")

    @jax.jit
    def logits_of(soft):
        apply = functools.partial(case.model.apply, {"params": case.params})
        states, kv_mask = encoded(apply, soft, ids, mask)
        kv = apply(states, method="cross_kv")
        return apply(apply(out, out_mask, kv, kv_mask, method="decode"), method="logits")

    ours, theirs = logits_of(case.projected(case.io["query_output"])), case.io["t5_logits"]
    close(ours[..., : case.vocab], theirs, 2e-5 * np.abs(theirs).max())


def test_live_against_transformers():
    """Random weights, FlanT5's own number of buckets, another depth, texts longer than here: loss and texts."""
    torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[peers]'")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; pip install -e '.[peers]'"
    )
    llm = dict(d_model=24, num_layers=3, num_decoder_layers=1, num_heads=3, d_kv=6, d_ff=20, vocab_size=70)
    llm |= dict(relative_attention_num_buckets=32, relative_attention_max_distance=128, dense_act_fn="gelu")
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**llm, feed_forward_proj="gated-gelu", decoder_start_token_id=START)
    ).eval()
    # the class ties head and word table however it is told; apart, the two show which of them is used where
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn(llm["vocab_size"], llm["d_model"]))
    theirs.config.scale_decoder_outputs = False
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if "relative" in name:
                x.normal_()
    tensors = {name: x.detach().numpy() for name, x in theirs.state_dict().items()}
    assert not np.array_equal(tensors["lm_head.weight"], tensors["shared.weight"])
    model = T5(**sizes_of(llm))
    params = loaded(tensors, sizes_of(llm))

    rng = np.random.default_rng(0)
    soft, ids = rng.normal(size=(2, 5, 24)).astype(np.float32), rng.integers(2, 70, (2, 160))
    mask = np.arange(160) < np.array([[160], [40]])
    out = rng.integers(2, 70, (2, 150))  # both longer than the largest distance
    real = np.pad(mask, ((0, 0), (5, 0)), constant_values=True)
    with torch.no_grad():
        embeds = torch.cat([torch.tensor(soft), theirs.shared(torch.tensor(ids))], dim=1)
        asked = dict(inputs_embeds=embeds, attention_mask=torch.tensor(real).long())
        their_logits = theirs(**asked, decoder_input_ids=torch.tensor(out)).logits

    @jax.jit
    def logits_of(params):
        apply = functools.partial(model.apply, {"params": params})
        states, kv_mask = encoded(apply, jnp.asarray(soft), jnp.asarray(ids), jnp.asarray(mask))
        kv = apply(states, method="cross_kv")
        return apply(apply(out, jnp.ones(out.shape, bool), kv, kv_mask, method="decode"), method="logits")

    ours = logits_of(params)[..., : llm["vocab_size"]]
    close(ours, their_logits, 1e-5 * float(their_logits.abs().max()))
    for beams, penalty in ((1, 1.0), (3, 1.0)):
        settings = dict(num_beams=beams, max_new_tokens=8, min_length=0, length_penalty=penalty)
        with torch.no_grad():
            made = theirs.generate(**asked, **settings, do_sample=False)
        case = types.SimpleNamespace(model=model, params=params)
        texts, *_ = decoded(case, *map(jnp.asarray, (soft, ids, mask)), settings, "hf")
        assert up_to_end(texts) == up_to_end(made), beams
