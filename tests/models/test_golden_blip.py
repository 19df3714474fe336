"""Parity with the PyTorch originals: goldens in tests/golden (or $GOLDEN_DIR), computed in float32 with dropout off.

Every size comes from a case's meta.json, so other cases of the same layout run through the same tests.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from world import jitted
from world.golden import folder

from blip_jax import config, losses, tasks
from blip_jax.convert.apply import from_torch, to_torch
from blip_jax.convert.rules.blip import TIED
from blip_jax.decode import beam, generate, sampling
from blip_jax.inference import programs
from blip_jax.models.vision.vit import resize_pos_embed
from blip_jax.tasks import build, caption, pretrain, retrieval, step
from blip_jax.train import optim
from blip_jax.train import state as train_state

ATOL = 1e-5  # losses, activations, momentum parameters, queues, updated state
GRAD_TOL = 1e-4  # gradients, of the largest entry


class Case:
    """One golden folder: sizes, inputs and outputs, and the model with its weights loaded through the key table."""

    def __init__(self, name, family, weights=None):
        self.meta = json.loads((folder(f"blip/{name}") / "meta.json").read_text())
        self.io = np.load(folder(f"blip/{name}") / "io.npz")
        s, self.family = self.meta["config"], family
        self.cfg = cfg = config.base("tiny")
        with cfg.unlocked():
            cfg.objective = "pretrain" if family == "itm" else family
            cfg.model.vit.update(width=s["vw"], depth=s["vdepth"], heads=s["vheads"], mlp=4 * s["vw"], patch=s["patch"])
            layers = s["nl_tl"] if family == "nlvr" else s["tl"]
            cfg.model.med.update(
                width=s["tw"], layers=layers, heads=s["th"], mlp=s["ti"], positions=s["pos"], vocab_size=s["vocab"]
            )
            cfg.model.update(img_size=s["img"], embed_dim=s["embed"], dropout=0.0, dtype="float32")
            cfg.loss.update(queue=s["queue"], smoothing_over="valid")
            cfg.text.max_len = s["L"]
        self.model = build(cfg)
        tensors = load_file(folder(f"blip/{weights or name}") / "weights.safetensors")
        self.loaded = jax.tree.map(jnp.asarray, from_torch(family, tensors, heads=dict(vit=s["vheads"], med=s["th"])))
        assert self.model.enc_id == self.meta["tokens"]["enc"] == self.meta["tokens"]["dec"] + 1

    def batch(self, suffix=""):
        img = jnp.asarray(self.io["image" + suffix]).transpose(0, 2, 3, 1)
        mask = jnp.asarray(self.io["attention_mask" + suffix] > 0)
        batch = {"img": img, "ids": jnp.asarray(self.io["input_ids" + suffix], jnp.int32), "txt_mask": mask}
        return batch | ({"image_id": jnp.asarray(self.io["idx"], jnp.int32)} if "idx" in self.io else {})

    def apply(self, method, *args, **kwargs):
        return jitted.apply(self.model, self.loaded["params"], method, *args, **kwargs)

    def state(self, tx, first_ptr):
        momentum = self.loaded["momentum"]
        momentum["queue"]["ptr"] = jnp.int32(first_ptr)
        params = self.loaded["params"]
        return train_state.TrainState(jnp.int32(0), params, {}, tx.init(params), momentum, jax.random.key(0))

    def as_torch(self, state):
        numpy = jax.tree.map(np.asarray, {"params": state.params, "momentum": state.extra})
        return to_torch(self.family, numpy, vocab_size=self.meta["config"]["vocab"])


def close(ours, theirs, atol=ATOL, what=""):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=atol, err_msg=what)


def negatives(io, suffix=""):
    """The golden's negatives, i32[2,B]: images for texts, then texts for images."""
    return jnp.asarray(np.stack([io["neg_image_idx" + suffix], io["neg_text_idx" + suffix]]), jnp.int32)


def given(answers, weights):
    """A `draw` that returns these negatives in order and records the sampling weights it was shown."""
    answers = list(answers)

    def draw(key, w, first_row):
        weights.append(w)
        return answers.pop(0)

    return draw


def loss_and_grads(case):
    """Losses, gradients under torch names, queue features, momentum and sampling weights, after the EMA as the
    original does."""
    state, task = case.state(optim.make(case.cfg, 1)[0], 0), tasks.of(case.cfg)
    trained, extra = task.before(case.cfg, state, 1)
    assert trained["temp"] == state.params["temp"]  # which the clamp leaves where it is
    extra |= {"alpha": jnp.float32(case.io["alpha"])}

    def loss(params):
        weights = []
        keys = step.Keys(jax.random.key(1), jax.random.key(2), 0, given(negatives(case.io), weights))
        total, aux = task.loss(case.model, case.cfg, params, extra, case.batch(), keys)
        return total, (*aux, weights)

    (_, (metrics, features, weights)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    return metrics, case.as_torch(state.replace(params=grads)), features, extra, weights


def check_grads(case, grads):
    names = [k for k in case.io if k.startswith("grad/")]
    assert names
    for name in names:
        key, theirs = name[len("grad/") :], case.io[name]
        largest = np.abs(theirs).max()
        if key.endswith("key.bias"):
            # A key's bias shifts all scores of a query alike: its gradient is zero and what is stored is rounding
            # noise.
            assert largest < 1e-5 and np.abs(grads[key]).max() < 1e-5, key
        else:
            close(grads[key], theirs, GRAD_TOL * largest, key)


def adam_gradient_sizes(state, steps_done):
    """Root mean square of each entry's gradient over the steps, from Adam's second moment."""
    nu = next(x.nu for x in jax.tree.leaves(state.opt, is_leaf=lambda x: hasattr(x, "nu")) if hasattr(x, "nu"))
    return jax.tree.map(lambda v: np.sqrt(v / (1 - 0.999**steps_done)), nu)


def adam_noise(sizes, name, lr):
    """What float32 rounding of the gradient may do to each entry in one step of Adam.

    A gradient carries rounding noise of about 1e-6 of the layer's gradients (measured against float64: ours 1e-7 to
    4e-7 root mean square, the golden's a fifth more). Adam divides by the entry's own size, so an entry whose gradient
    is itself near that noise
    moves by up to 2 lr in a direction that no two implementations share: a handful of entries, and the biases of
    attention keys, whose exact gradient is zero because they shift all scores of a query alike. Everywhere else this is
    far below 1e-5.
    """
    own = sizes[name]
    layer = max(sizes[k].max() for k in (name, name.removesuffix("bias") + "weight") if k in sizes)
    return lr * np.minimum(2.0, 1e-6 * layer / (own + 1e-8))


def test_golden_pretrain_activations():
    case = Case("pretrain", "pretrain")
    batch = case.batch()
    img_tok = case.apply("encode_image", batch["img"])
    close(img_tok, case.io["image_embeds"])
    close(case.apply("project_image", img_tok), case.io["image_feat"])
    txt_tok, txt_emb = case.apply("encode_text", batch["ids"], batch["txt_mask"])
    close(txt_tok, case.io["text_embeds"])
    close(txt_emb, case.io["text_feat"])


def test_golden_pretrain_losses_gradients_momentum_and_queue():
    case = Case("pretrain", "pretrain")
    metrics, grads, features, extra, weights = loss_and_grads(case)
    for name in ("loss_itc", "loss_itm", "loss_lm"):
        close(metrics[name], case.io[name], what=name)
    close(weights[0][0], case.io["weights_t2i"])
    close(weights[1][0], case.io["weights_i2t"])
    check_grads(case, grads)
    copies = {copy.format(i=i) for copy, _ in TIED["pretrain"] for i in range(case.meta["config"]["tl"])}
    trained = {k for k in grads if not re.search(r"_m\.|queue", k)} - copies
    assert {"grad/" + k for k in trained} == {k for k in case.io.files if k.startswith("grad/")}

    state = case.state(optim.make(case.cfg, 1)[0], len(case.io["image"]))
    after = case.as_torch(
        state.replace(extra=pretrain.after(case.cfg, extra | {"queue": state.extra["queue"]}, features))
    )
    names = [k for k in case.io.files if k.startswith("after/") and not k.endswith("position_ids")]
    assert any("_m." in k for k in names) and "after/image_queue" in names
    for name in names:
        close(after[name[len("after/") :]], case.io[name], what=name)


def test_golden_pretrain_three_steps():
    case = Case("pretrain_3steps", "pretrain", weights="pretrain")
    with case.cfg.unlocked():  # alpha 0, .1, .2: .4 * step / 4
        case.cfg.loss.update(alpha=0.4, alpha_ramp_epochs=4.0)
        case.cfg.optim.update(schedule="constant", lr=1e-3, warmup_steps=0, weight_decay=0.05)
        case.cfg.train.steps = 3
    tx, _ = optim.make(case.cfg, 1)
    state = case.state(tx, int(load_file(folder("blip/pretrain") / "weights.safetensors")["queue_ptr"][0]))
    start = case.as_torch(state)

    @jax.jit
    def one(state, batch, negs):
        return step.make_step(case.cfg, case.model, tx, 1, draw=given(negs, []))(state, batch)

    noise = {}
    for i in range(3):
        state, metrics = one(state, case.batch(str(i)), negatives(case.io, str(i)))
        sizes = case.as_torch(state.replace(params=adam_gradient_sizes(state, i + 1)))
        noise = {name: noise.get(name, 0.0) + adam_noise(sizes, name, lr=1e-3) for name in sizes}
        close(
            [metrics["loss_itc"], metrics["loss_itm"], metrics["loss_lm"]],
            case.io["losses"][i],
            what=f"losses of step {i}",
        )
    after = case.as_torch(state)
    names = [k[len("after/") :] for k in case.io.files if k.startswith("after/") and not k.endswith("position_ids")]
    assert set(names) == set(after)
    beyond = 0
    for name in names:
        difference = np.abs(after[name] - case.io["after/" + name])
        # a momentum copy follows by .005 a step
        share = 0.005 * 3 if "_m." in name else 0.0 if "queue" in name else 1.0
        allowed = ATOL + share * noise[name.replace("_m.", ".")]
        assert (difference <= allowed).all(), (name, difference.max())
        beyond += (difference > ATOL).sum()
    assert beyond <= 0.005 * sum(after[name].size for name in names)
    assert np.abs(after["text_proj.weight"] - start["text_proj.weight"]).max() > 1e-3


def test_golden_retrieval_losses_gradients_and_queue():
    case = Case("retrieval", "retrieval")
    metrics, grads, features, _, weights = loss_and_grads(case)
    close(metrics["loss_itc"], case.io["loss_itc"])
    close(metrics["loss_itm"], case.io["loss_itm"])
    close(weights[0][0], case.io["weights_t2i"])
    close(weights[1][0], case.io["weights_i2t"])
    check_grads(case, grads)
    check_queue(case, "retrieval", features)


def check_queue(case, name, features):
    tensors = load_file(folder(f"blip/{name}") / "weights.safetensors")
    state = case.state(optim.make(case.cfg, 1)[0], int(tensors["ptr_queue"][0]))
    after = case.as_torch(state.replace(extra=retrieval.after(case.cfg, state.extra, features)))
    for name in ("image_queue", "text_queue", "idx_queue", "ptr_queue"):
        close(after[name], case.io["after/" + name], what=name)


@pytest.mark.parametrize("name, negatives", [("retrieval_2ranks_all", "batch"), ("retrieval_2ranks_local", "group")])
def test_golden_retrieval_on_two_ranks_is_one_batch_in_two_groups(name, negatives):
    case = Case(name, "retrieval")
    ranks, own = case.io["neg_image_idx"].shape
    case.cfg.loss.update(group_size=own, negatives=negatives)
    case.io = {key: case.io[key] for key in case.io.files} | {
        key: case.io[key].reshape(-1) for key in ("neg_image_idx", "neg_text_idx")
    }
    metrics, grads, features, extra, weights = loss_and_grads(case)
    close(metrics["loss_itc"], case.io["loss_itc"].mean())
    close(metrics["loss_itm"], case.io["loss_itm"].mean())
    for ours, key in zip(weights, ("weights_t2i", "weights_i2t")):
        theirs = case.io[key]
        close(ours, theirs.reshape(1, ranks * own, -1) if negatives == "batch" else theirs, what=key)
    check_grads(case, grads)
    check_queue(case, name, features)


def test_golden_step_of_a_captioner():
    """Fine-tuning: the prompt's positions are not scored, by both forms of the smoothing's mean."""
    case = Case("caption_step", "caption")
    batch = case.batch()
    batch["lm_mask"] = batch["txt_mask"] & (jnp.arange(batch["ids"].shape[1]) >= int(case.io["prompt_length"]))
    keys = step.Keys(jax.random.key(0), jax.random.key(0), 0)

    def both(params):
        found = []
        for over in ("valid", "all"):
            case.cfg.loss.smoothing_over = over
            found.append(caption.loss(case.model, case.cfg, params, None, batch, keys)[0])
        return found[0], found

    grads, found = jax.jit(jax.grad(both, has_aux=True))(case.loaded["params"])
    close(found, [case.io["loss_lm"], case.io["loss_lm_torch110"]])
    kv = case.apply("image_kv", case.apply("encode_image", batch["img"]))
    logits = case.apply("lm_logits", batch["ids"], batch["txt_mask"], kv)[..., : case.meta["config"]["vocab"]]
    close(logits, case.io["logits"][:, : logits.shape[1]])
    check_grads(
        case, to_torch("caption", {"params": jax.tree.map(np.asarray, grads)}, vocab_size=case.meta["config"]["vocab"])
    )


def test_golden_itm_logits_and_cosines():
    case = Case("itm", "itm")
    case.loaded["params"]["temp"] = jnp.float32(0.07)  # the matching model has no temperature
    batch = case.batch()
    img_tok = case.apply("encode_image", batch["img"])
    logits = jax.jit(lambda *a: case.apply("match", *a, first_id=case.meta["tokens"]["cls"]))(
        batch["ids"], batch["txt_mask"], case.apply("image_kv", img_tok)
    )
    close(logits, case.io["itm_logits"])
    _, txt_emb = case.apply("encode_text", batch["ids"], batch["txt_mask"])
    close(case.apply("project_image", img_tok) @ txt_emb.T, case.io["itc_sim"])


def test_golden_pos_embed_resize():
    io = np.load(folder("blip/pos_embed") / "io.npz")
    sources = [k for k in io.files if k.startswith("pos_embed_")]
    targets = [k for k in io.files if k.startswith("to_")]
    assert sources and targets
    for target in targets:
        close(resize_pos_embed(io[sources[0]][0], io[target].shape[1]), io[target][0], what=target)


@pytest.mark.parametrize("family", ["pretrain", "retrieval", "itm", "vqa", "nlvr"])
def test_golden_weights_round_trip_bitwise(family):
    case = Case(family, family)
    tensors = load_file(folder(f"blip/{family}") / "weights.safetensors")
    back = to_torch(family, jax.tree.map(np.asarray, case.loaded), vocab_size=case.meta["config"]["vocab"])
    kept = {k: v for k, v in tensors.items() if not k.endswith("position_ids")}
    assert set(back) == set(kept)
    for name, x in kept.items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)


# --- captions ---------------------------------------------------------------------------------------------------------
def caption_case():
    case = Case("caption", "caption")
    img_tok = case.apply("encode_image", case.batch()["img"])
    return case, case.apply("image_kv", img_tok), case.meta["tokens"]


def extend_of(case, kv):
    return lambda ids, start, cache: case.apply("extend", ids, start, cache, kv)


def searched(case, kv, tokens, how):
    """ids i32[B,L] of the best beam, from the prompt that the golden outputs begin with."""
    B = len(case.io["greedy"])
    prompt = jnp.asarray(case.io["greedy"][:, : int(case.io["prompt_length"])], jnp.int32)
    logits, cache = extend_of(case, kv)(prompt, 0, case.model.empty_cache(B, how.max_length))
    cache = jax.tree.map(lambda x: jnp.repeat(x, how.beams, axis=1), cache)
    ids, _, _ = jax.jit(
        lambda: beam.search(extend_of(case, kv), logits, cache, prompt, how, 1, eos=tokens["sep"], pad=tokens["pad"])
    )()
    return ids[:, 0]


def test_golden_caption_loss_and_logits():
    case, kv, _ = caption_case()
    batch = case.batch()
    prompt = int(case.io["prompt_length"])
    batch["lm_mask"] = batch["txt_mask"] & (jnp.arange(batch["ids"].shape[1]) >= prompt)
    keys = step.Keys(jax.random.key(0), jax.random.key(0), 0)
    loss = lambda p: caption.loss(case.model, case.cfg, p, None, batch, keys)
    grads, metrics = jax.jit(jax.grad(loss, has_aux=True))(case.loaded["params"])
    close(metrics[0]["loss_lm"], case.io["loss_lm"])
    close(
        case.apply("lm_logits", batch["ids"], batch["txt_mask"], kv)[..., : case.meta["config"]["vocab"]],
        case.io["logits"][:, :-1],
    )
    check_grads(
        case, to_torch("caption", {"params": jax.tree.map(np.asarray, grads)}, vocab_size=case.meta["config"]["vocab"])
    )


@pytest.mark.parametrize(
    "name, how",
    [
        ("beam3", beam.Beam(beams=3)),
        ("beam3_rep15", beam.Beam(beams=3, repetition_penalty=1.5, min_length=10, max_length=16)),
        ("beam5_len0", beam.Beam(beams=5, length_penalty=0.0, min_length=0)),
    ],
)
def test_golden_caption_beams(name, how):
    case, kv, tokens = caption_case()
    theirs = case.io[name]
    ours = np.asarray(searched(case, kv, tokens, how))
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)
    assert (ours[:, theirs.shape[1] :] == tokens["pad"]).all()


def test_golden_caption_greedy_sampling():
    case, kv, tokens = caption_case()
    prompt = jnp.asarray(case.io["greedy"][:, : int(case.io["prompt_length"])], jnp.int32)
    logits, cache = extend_of(case, kv)(prompt, 0, case.model.empty_cache(len(prompt), 20))
    ids, _ = generate.sample(
        extend_of(case, kv),
        logits,
        cache,
        prompt,
        jax.random.split(jax.random.key(0), len(prompt)),
        generate.GREEDY._replace(min_length=5),
        eos=tokens["sep"],
        pad=tokens["pad"],
    )
    np.testing.assert_array_equal(ids[:, : case.io["greedy"].shape[1]], case.io["greedy"])


def test_golden_caption_nucleus_step():
    case, kv, tokens = caption_case()
    prefix = jnp.asarray(case.io["nucleus_prefix"], jnp.int32)
    logits, _ = extend_of(case, kv)(prefix, 0, case.model.empty_cache(*prefix.shape))
    scores = sampling.repetition_penalty(logits, generate.tokens_seen(prefix, logits.shape[-1]), 1.1)
    scores, order = sampling.top_k(sampling.min_length(scores, prefix.shape[1], 6, tokens["sep"]), 0)
    probs = jax.nn.softmax(sampling.top_p(scores, 0.9), axis=-1)
    ours = np.zeros(logits.shape, np.float32)
    np.put_along_axis(ours, np.asarray(order), np.asarray(probs), axis=1)
    close(ours[:, : case.meta["config"]["vocab"]], case.io["nucleus_probs"], 1e-6)
    assert not ours[:, case.meta["config"]["vocab"] :].any()


# --- questions --------------------------------------------------------------------------------------------------------
def vqa_case():
    """The case, question states [B,S,D] and the questions' mask bool[B,S]."""
    case = Case("vqa", "vqa")
    kv = case.apply("image_kv", case.apply("encode_image", jnp.asarray(case.io["image"]).transpose(0, 2, 3, 1)))
    mask = jnp.asarray(case.io["question_mask"] > 0)
    return case, case.apply("encode_question", jnp.asarray(case.io["question_ids"], jnp.int32), mask, kv), mask


def answer_loss(case, params):
    """The weighted loss of all answers, with question and image encoded inside, so that it has a gradient in every
    parameter."""
    io, V = case.io, case.meta["config"]["vocab"]
    apply = lambda method, *args, **kwargs: case.model.apply({"params": params}, *args, method=method, **kwargs)
    mask, ids, txt_mask = (
        jnp.asarray(io["question_mask"] > 0),
        jnp.asarray(io["answer_ids"], jnp.int32),
        jnp.asarray(io["answer_mask"] > 0),
    )
    kv = apply("image_kv", apply("encode_image", jnp.asarray(io["image"]).transpose(0, 2, 3, 1)))
    states = apply("encode_question", jnp.asarray(io["question_ids"], jnp.int32), mask, kv)
    question = np.repeat(np.arange(len(io["n"])), io["n"])
    logits = apply("lm_logits", ids, txt_mask, apply("question_kv", states), mask, of=jnp.asarray(question))
    return losses.answers(
        logits, ids[:, 1:], txt_mask[:, 1:], jnp.asarray(io["weights"]), len(io["n"]), V, smoothing=0.1, over="valid"
    )


def test_golden_vqa_states_loss_and_gradients():
    case, states, _ = vqa_case()
    close(states, case.io["question_states"])
    loss, grads = jax.jit(jax.value_and_grad(lambda p: answer_loss(case, p)))(case.loaded["params"])
    close(loss, case.io["loss"])
    if any(k.startswith("grad/") for k in case.io.files):
        check_grads(
            case, to_torch("vqa", {"params": jax.tree.map(np.asarray, grads)}, vocab_size=case.meta["config"]["vocab"])
        )


def test_golden_vqa_rank():
    case, states, mask = vqa_case()
    kv = case.apply("question_kv", states)
    ids, txt_mask = jnp.asarray(case.io["candidate_ids"], jnp.int32), jnp.asarray(case.io["candidate_mask"] > 0)
    ks = [int(name[len("rank_k") :]) for name in case.io.files if re.fullmatch(r"rank_k\d+", name)]
    assert ks
    for k in ks:
        ranked = jax.jit(functools.partial(programs.rank_answers, case.model, k=k, smoothing_over="valid"))
        best, _ = ranked(case.loaded["params"], ids, txt_mask, kv, mask)
        assert best.shape == (len(states), min(k, len(ids)))
        np.testing.assert_array_equal(best[:, 0], case.io[f"rank_k{k}"])


def test_golden_vqa_beams():
    case, states, _ = vqa_case()
    kv, tokens, B = case.apply("question_kv", states), case.meta["tokens"], len(states)
    names = [name for name in case.io.files if name.startswith("generate_beam")]
    assert names
    for name in names:  # questions' padding is not masked here, as the original
        how, prompt = (
            beam.Beam(beams=int(name[len("generate_beam") :]), min_length=1, max_length=10),
            jnp.full((B, 1), tokens["dec"]),
        )
        logits, cache = extend_of(case, kv)(prompt, 0, case.model.empty_cache(B, how.max_length))
        cache = jax.tree.map(lambda x: jnp.repeat(x, how.beams, axis=1), cache)
        ids, _, _ = jax.jit(
            lambda: beam.search(
                extend_of(case, kv), logits, cache, prompt, how, 1, eos=tokens["sep"], pad=tokens["pad"]
            )
        )()
        theirs = case.io[name]
        np.testing.assert_array_equal(ids[:, 0, : theirs.shape[1]], theirs)
        assert (ids[:, 0, theirs.shape[1] :] == tokens["pad"]).all()


# --- two images -------------------------------------------------------------------------------------------------------
def test_golden_nlvr_prediction_loss_and_gradients():
    case = Case("nlvr", "nlvr")
    batch, targets = case.batch(), jnp.asarray(case.io["targets"], jnp.int32)

    def loss(params):
        img_tok = case.model.apply({"params": params}, batch["img"], method="encode_image")
        logits = case.model.apply(
            {"params": params}, batch["ids"], batch["txt_mask"], *jnp.split(img_tok, 2), method="classify"
        )
        return losses.itm(logits, targets)[0], logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.loaded["params"])
    close(logits, case.io["prediction"])
    close(value, case.io["loss"])
    if any(k.startswith("grad/") for k in case.io.files):
        check_grads(
            case, to_torch("nlvr", {"params": jax.tree.map(np.asarray, grads)}, vocab_size=case.meta["config"]["vocab"])
        )
