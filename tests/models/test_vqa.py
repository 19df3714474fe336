"""VQA model: padding of questions, answers by question, ranking against a plain loop, generation, meshes, start
from pre-training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax import config, losses, trees
from blip_jax.convert.apply import from_torch, to_torch
from blip_jax.decode import beam
from blip_jax.decode.rank import rank as choose
from blip_jax.inference.programs import rank_answers
from blip_jax.models import initial
from blip_jax.models.blip import Blip
from blip_jax.models.build import fit
from blip_jax.models.layers.attention import attention, grouped_cross_attention
from blip_jax.models.text.med import padded_vocab
from blip_jax.models.vqa import BlipVqa
from blip_jax.parallel import sharding
from blip_jax.tasks import build, vqa

B, S, V, SEP = 4, 7, 120, 2
LENGTHS = jnp.array([7, 3, 5, 4])


def vqa_config(size="tiny", img_size=16, **leaves):
    cfg = config.base(size)
    with cfg.unlocked():
        cfg.objective = "vqa"
        cfg.model.update(img_size=img_size, dtype="float32", **leaves)
    return cfg


@functools.cache
def world():
    """(model, params with lively logits, jitted model.apply with these params, questions)"""
    cfg = vqa_config()
    model = build(cfg)
    params = jax.jit(lambda: initial.init_params(cfg, model, jax.random.key(0)))()
    params = initial.magnified(params, 5)
    compiled = functools.cache(
        lambda method, how: jax.jit(lambda p, a: model.apply({"params": p}, *a, method=method, **dict(how)))
    )
    apply = lambda method, *args, **how: compiled(method, tuple(how.items()))(params, args)
    rng = np.random.default_rng(0)
    img = jnp.asarray(rng.normal(size=(B, 16, 16, 3)), jnp.float32)
    ids, mask = jnp.asarray(rng.integers(3, 110, (B, S)), jnp.int32), jnp.arange(S) < LENGTHS[:, None]
    return model, params, apply, (img, jnp.where(mask, ids, 0), mask)


def asked(model, params, img, ids, mask):
    """Keys and values of the questions, for `model.apply` inside jit."""
    run = lambda method, *args: model.apply({"params": params}, *args, method=method)
    return run("question_kv", run("encode_question", ids, mask, run("image_kv", run("encode_image", img))))


@functools.cache
def questions():
    _, params, _, question = world()
    return compiled_questions()(params, question)


@functools.cache
def compiled_questions():
    """`asked` of the tiny model, jitted: of parameters and questions."""
    model = world()[0]
    return jax.jit(lambda p, q: asked(model, p, *q))


def random_params(cfg, model, seed):
    """Numbers in the shapes of the parameters, without compiling anything."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def candidates(rng, count=9, width=6):
    """ids i32[count,width] and mask of answers of 2 to width-2 tokens between [CLS] and [SEP]; the first two share
    a first token."""
    mask = np.arange(width) < rng.integers(4, width + 1, count)[:, None]
    mask[0] = True  # the longest fills the width
    ids = np.where(mask, rng.integers(3, 110, (count, width)), 0)
    ids[np.arange(count), mask.sum(1) - 1] = SEP
    ids[:, 0], ids[1, 1] = 1, ids[0, 1]
    return jnp.asarray(ids, jnp.int32), jnp.asarray(mask)


def test_parameter_count_of_the_published_model():
    cfg = vqa_config("base", 480)
    shapes = jax.eval_shape(lambda: initial.init_params(cfg, build(cfg), jax.random.key(0)))
    pad = padded_vocab(30524) - 30524
    # two word embeddings, one bias of the head
    count = sum(x.size for x in jax.tree.leaves(shapes)) - pad * (2 * 768 + 1)
    assert count == 361_478_972
    assert set(shapes) == {"vit", "med", "med_dec"} and shapes["vit"]["pos_embed"].shape == (901, 768)


def test_answer_decoder_reads_states_of_the_text_width_and_shares_nothing():
    cfg = vqa_config("large", 32)
    shapes = jax.eval_shape(lambda: initial.init_params(cfg, build(cfg), jax.random.key(0)))
    of = lambda part, block: shapes[part]["blocks"][block]["k"]["kernel"].shape[1:]
    assert (of("med", "cross_attn"), of("med_dec", "cross_attn")) == ((1024, 12, 64), (768, 12, 64))
    assert "self_attn_dec" not in shapes["med"]["blocks"] and "self_attn" not in shapes["med_dec"]["blocks"]
    assert "lm_head" not in shapes["med"] and "lm_head" in shapes["med_dec"]


def test_keys_of_the_state_dict_and_back():
    cfg = vqa_config()
    with cfg.unlocked():
        cfg.model.vit.update(depth=12, width=4, heads=2, mlp=8)
        cfg.model.med.update(layers=12, width=6, heads=3, mlp=4)
    params = random_params(cfg, build(cfg), 0)
    tensors = to_torch("vqa", {"params": params}, vocab_size=V)
    assert len(tensors) + 2 == 791  # the originals also store `position_ids` of both text models
    back = from_torch("vqa", tensors, heads=dict(vit=2, med=3))["params"]
    again = to_torch("vqa", {"params": back}, vocab_size=V)
    assert set(again) == set(tensors) and all(np.array_equal(again[k], tensors[k]) for k in tensors)
    assert jax.tree.structure(back) == jax.tree.structure(params)


def test_masked_keys_of_grouped_attention_equal_repeated_images():
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.normal(size=(3 * 3, 5, 2, 4)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(3, 7, 2, 4)), jnp.float32) for _ in range(2))
    mask, other = jnp.arange(7) < jnp.array([7, 2, 4])[:, None], jnp.array([2, 0, 1])
    image = jnp.stack([jnp.arange(3), other, jnp.arange(3)], axis=1).reshape(-1)  # of each row b*G + g
    want = attention(q, k[image], v[image], mask[image][:, None, None])
    np.testing.assert_allclose(
        grouped_cross_attention(q, k, v, (None, other[None], None), kv_mask=mask), want, atol=1e-6
    )
    np.testing.assert_allclose(
        grouped_cross_attention(q, k.at[1, 2:].set(9.0), v, (None, other[None], None), kv_mask=mask), want, atol=1e-6
    )


def test_states_and_masked_answers_do_not_see_question_padding():
    model, params, apply, (img, ids, mask) = world()
    kv = apply("image_kv", apply("encode_image", img))
    states = apply("encode_question", ids, mask, kv)
    junk = apply("encode_question", jnp.where(mask, ids, 9), mask, kv)
    np.testing.assert_allclose(states[mask], junk[mask], atol=1e-5)
    answers, answer_mask = candidates(np.random.default_rng(1), B)
    logits = lambda states, kv_mask: apply("lm_logits", answers, answer_mask, apply("question_kv", states), kv_mask)[
        ..., :V
    ]
    np.testing.assert_allclose(logits(states, mask), logits(junk, mask), atol=1e-4)
    open_ = logits(states, None)
    np.testing.assert_allclose(open_, logits(states, jnp.ones_like(mask)), atol=1e-5)
    assert np.abs(open_ - logits(states, mask))[1:].max() > 1e-2  # unmasked, the padding speaks
    np.testing.assert_allclose(open_[0], logits(states, mask)[0], atol=1e-5)  # the first question has none


def test_first_token_of_a_question_is_enc_unless_told():
    model, _, apply, (img, ids, mask) = world()
    kv = apply("image_kv", apply("encode_image", img))
    states = apply("encode_question", ids, mask, kv)
    np.testing.assert_array_equal(states, apply("encode_question", ids.at[:, 0].set(77), mask, kv))
    np.testing.assert_allclose(states, apply("encode_question", ids, mask, kv, first_id=119), atol=1e-6)
    assert np.abs(states - apply("encode_question", ids, mask, kv, first_id=1)).max() > 1e-2
    assert (model.dec_id, model.enc_id) == (118, 119)


def test_several_questions_of_an_image_equal_the_image_repeated():
    _, _, apply, (img, ids, mask) = world()
    two = apply("encode_question", ids, mask, apply("image_kv", apply("encode_image", img[:2])))
    four = apply("encode_question", ids, mask, apply("image_kv", apply("encode_image", img[jnp.array([0, 0, 1, 1])])))
    np.testing.assert_allclose(two, four, atol=1e-5)


def test_answers_by_question_index_equal_answers_one_by_one():
    model, params, apply, (_, _, mask) = world()
    kv = questions()
    answers, answer_mask = candidates(np.random.default_rng(2), 6)
    of = jnp.array([0, 0, 2, 3, 3, 3])
    logits = jax.jit(lambda p: model.apply({"params": p}, answers, answer_mask, kv, mask, of=of, method="lm_logits"))(
        params
    )
    for a, q in enumerate(of):
        one = jax.tree.map(lambda x: x[:, q][:, None], kv), mask[q][None]
        np.testing.assert_allclose(
            logits[a], apply("lm_logits", answers[a][None], answer_mask[a][None], *one)[0], atol=1e-4
        )


def reference_ce(logits, targets, mask, smoothing, positions):
    """Smoothed cross-entropy of one text in float64: the negative log-likelihood where `mask`, its smoothing where
    `positions`."""
    logp = np.asarray(logits, np.float64)[:, :V]
    logp = (
        logp - np.log(np.exp(logp - logp.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logp.max(-1, keepdims=True)
    )
    nll, smooth = -logp[np.arange(len(targets)), targets], -logp.mean(-1)
    return ((1 - smoothing) * nll * mask + smoothing * smooth * positions).sum()


@pytest.mark.parametrize("over", ["valid", "all"])
def test_weighted_answer_loss(over):
    rng = np.random.default_rng(3)
    logits = np.concatenate([rng.normal(size=(5, 4, V)), np.full((5, 4, 8), np.finfo(np.float32).min)], -1).astype(
        np.float32
    )
    # nobody reaches the last position
    targets, mask = rng.integers(0, V, (5, 4)), np.arange(4) < np.array([3, 2, 1, 3, 0])[:, None]
    weights = np.array([0.5, 0.3, 0.2, 1.0, 0.0], np.float32)  # the last row fills the batch
    positions = mask if over == "valid" else np.broadcast_to(np.arange(4) < 3, mask.shape)
    want = sum(w * reference_ce(*row, 0.1, p) for w, *row, p in zip(weights, logits, targets, mask, positions)) / 2
    ours = losses.answers(*map(jnp.asarray, (logits, targets, mask, weights)), 2, V, smoothing=0.1, over=over)
    np.testing.assert_allclose(ours, want, rtol=1e-6)


def rank(*args, **how):
    """`rank_answers` of the tiny model."""
    return ranking(tuple(how.items()))(world()[1], *args)


@functools.cache
def ranking(how):
    """`rank_answers` of the tiny model, jitted."""
    return jax.jit(functools.partial(rank_answers, world()[0], **dict(how)))


@pytest.mark.parametrize("over, k", [("valid", 9), ("all", 9), ("all", 3), ("valid", 500)])
def test_rank_agrees_with_a_plain_loop(over, k):
    _, _, apply, (_, _, mask) = world()
    kv = questions()
    answers, answer_mask = candidates(np.random.default_rng(4))
    best, scores = rank(answers, answer_mask, kv, mask, k=k, smoothing_over=over)
    assert best.shape == scores.shape == (B, min(k, 9))
    C = len(answers)
    for q in range(B):
        one = jax.tree.map(lambda x: jnp.repeat(x[:, q, None], C, axis=1), kv), jnp.repeat(mask[q][None], C, axis=0)
        logits = np.asarray(apply("lm_logits", answers, answer_mask, *one))
        first = logits[0, 0][np.asarray(answers[:, 1])]
        chosen = sorted(sorted(range(C), key=lambda c: (-first[c], c))[:k])
        m = np.asarray(answer_mask)[:, 1:]
        want = {
            c: -reference_ce(logits[c], np.asarray(answers)[c, 1:], m[c], 0.1, m[c] if over == "valid" else np.ones(5))
            for c in chosen
        }
        assert list(best[q]) == sorted(chosen, key=lambda c: (-want[c], c))
        np.testing.assert_allclose(scores[q], [want[c] for c in map(int, best[q])], rtol=1e-5)


def test_smoothing_over_all_charges_short_answers_for_the_longest_of_the_list():
    _, _, apply, (_, _, mask) = world()
    answers, answer_mask = candidates(np.random.default_rng(5))
    scores = {}
    for over in ("all", "valid"):
        best, score = rank(answers, answer_mask, questions(), mask, smoothing_over=over)
        # in the order of the list
        scores[over] = np.take_along_axis(np.asarray(score), np.argsort(best, axis=1), axis=1)
    short = np.asarray(~answer_mask.all(1))
    charged = scores["valid"] - scores["all"]
    assert 0 < short.sum() < len(short) and (charged[:, short] > 0.3).all()
    np.testing.assert_allclose(charged[:, ~short], 0, atol=1e-5)


def test_padding_of_candidates_questions_and_batch_does_not_change_the_ranking():
    model, params, apply, (img, ids, mask) = world()
    kv_of = lambda *question: compiled_questions()(params, question)
    answers, answer_mask = candidates(np.random.default_rng(6))
    best, scores = rank(answers, answer_mask, questions(), mask, k=5)
    wider = lambda x: jnp.pad(x, ((0, 0), (0, 3)))
    for other in (
        rank(wider(answers), wider(answer_mask), questions(), mask, k=5),
        rank(answers, answer_mask, kv_of(img, wider(ids), wider(mask)), wider(mask), k=5),
    ):
        np.testing.assert_array_equal(best, other[0])
        np.testing.assert_allclose(scores, other[1], rtol=1e-5)
    alone = rank(answers, answer_mask, kv_of(img[1:2], ids[1:2, :3], mask[1:2, :3]), mask[1:2, :3], k=5)
    np.testing.assert_array_equal(best[1], alone[0][0])
    np.testing.assert_allclose(scores[1], alone[1][0], rtol=1e-5)


def test_ties_fall_to_the_earlier_candidate_and_k_is_clipped():
    ids = jnp.array([[0, 5, 1], [0, 6, 1], [0, 5, 2], [0, 6, 3], [0, 5, 4]])
    first = jnp.zeros((2, 8)).at[0, 6].set(1.0)
    seen = []

    def score(rows, mask):
        seen.append(rows.shape)
        return (rows[:, 1] == 5).astype(jnp.float32)

    best, scores = choose(first, score, ids, ids >= 0, 3)
    np.testing.assert_array_equal(best, [[0, 1, 3], [0, 2, 1]])  # of question 0 both with 6 and the first with 5
    np.testing.assert_array_equal(scores, [[1, 0, 0], [1, 1, 0]])
    best, _ = choose(first, lambda rows, mask: jnp.zeros(len(rows)), ids, ids >= 0, 128)
    np.testing.assert_array_equal(best, [[0, 1, 2, 3, 4]] * 2)
    assert seen == [(6, 3)]
    for bad in (dict(k=0, ids=ids), dict(k=1, ids=ids[:0]), dict(k=1, ids=ids[:, :1])):
        with pytest.raises(ValueError, match="at least one candidate"):
            choose(first, score, bad["ids"], bad["ids"] >= 0, bad["k"])


def test_cached_decoding_equals_the_uncached_with_and_without_mask():
    model, _, apply, (_, _, mask) = world()
    kv = questions()
    answers, _ = candidates(np.random.default_rng(7), 2 * B, 5)  # two answers to each question
    answers = answers.at[:, 0].set(model.dec_id)
    for kv_mask in (mask, None):
        full = apply("lm_logits", jnp.pad(answers, ((0, 0), (0, 1))), jnp.ones((2 * B, 6), bool), kv, kv_mask)
        logits, cache = apply("extend", answers[:, :3], 0, model.empty_cache(2 * B, 5), kv, kv_mask)
        np.testing.assert_allclose(logits, full[:, 2], atol=1e-4)
        for t in (3, 4):
            logits, cache = apply("extend", answers[:, t : t + 1], t, cache, kv, kv_mask)
            np.testing.assert_allclose(logits, full[:, t], atol=1e-4)


def generated(model, params, img, ids, mask, masked):
    """Greedy answers i32[B,8]."""
    kv = asked(model, params, img, ids, mask)
    extend = lambda ids, at, cache: model.apply(
        {"params": params}, ids, at, cache, kv, mask if masked else None, method="extend"
    )
    prompt = jnp.full((len(img), 1), model.dec_id, jnp.int32)
    logits, cache = extend(prompt, 0, model.empty_cache(len(img), 8))
    return beam.search(
        extend, logits, cache, prompt, beam.Beam(beams=1, min_length=1, max_length=8), 1, eos=SEP, pad=0
    )[0][:, 0]


def test_generated_answers_depend_on_question_padding_only_without_a_mask():
    model, params, _, (img, ids, mask) = world()
    wide = lambda x: jnp.pad(x, ((0, 0), (0, 9)))
    make = lambda *question, masked: np.asarray(jax.jit(lambda p: generated(model, p, *question, masked))(params))
    np.testing.assert_array_equal(make(img, ids, mask, masked=True), make(img, wide(ids), wide(mask), masked=True))
    assert (make(img, ids, mask, masked=False) != make(img, wide(ids), wide(mask), masked=False)).any()


def test_bfloat16_computes_and_gives_float32_logits():
    cfg = vqa_config()
    with cfg.unlocked():
        cfg.model.dtype = "bfloat16"
    low, (model, params, _, (img, ids, mask)) = build(cfg), world()
    answers, answer_mask = candidates(np.random.default_rng(8))
    ranked = lambda m, p: rank_answers(m, p, answers, answer_mask, asked(m, p, img, ids, mask), mask)
    scores, exact = (jax.jit(lambda p: ranked(m, p)[1])(params) for m in (low, model))
    assert scores.dtype == jnp.float32 and np.isfinite(scores).all()
    np.testing.assert_allclose(np.sort(scores), np.sort(exact), rtol=0.1)


def test_mesh_changes_nothing():
    model, params, apply, (img, ids, mask) = world()
    answers, answer_mask = candidates(np.random.default_rng(9), 8)
    run = lambda p, img, ids, mask: rank_answers(
        model, p, answers, answer_mask, asked(model, p, img, ids, mask), mask, k=5
    )
    best, scores = jax.jit(run)(params, img, ids, mask)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    placed = jax.device_put(params, sharding.shardings_for(params, mesh))
    assert not placed["med_dec"]["blocks"]["cross_attn"]["k"]["kernel"].is_fully_replicated
    with jax.set_mesh(mesh):
        other = jax.jit(run)(placed, *(jax.device_put(x, sharding.batch_sharding(mesh)) for x in (img, ids, mask)))
    np.testing.assert_array_equal(best, other[0])
    np.testing.assert_allclose(scores, other[1], rtol=1e-5)


def started(params, fresh):
    """`fresh` with what it starts from in parameters of pre-training, and the paths of what stayed as it was."""
    fitted = fit(params, fresh, "here", vqa.START)
    random = dict(trees.paths(fresh))
    return trees.merge(fitted.params, trees.nest((path, random[path]) for path in fitted.random)), fitted.random


@pytest.mark.parametrize("wide", [False, True])
def test_start_from_pretraining(wide):
    """Both text models begin as the shared one; where image and text widths differ, the decoder's keys and values
    are random."""
    cfg = vqa_config(img_size=32)
    with cfg.unlocked():
        if not wide:
            cfg.model.vit.update(width=32, mlp=64)
    fresh = random_params(cfg, build(cfg), 0)
    before = cfg.copy_and_resolve_references()
    with before.unlocked():
        before.model.img_size = 16
    params = random_params(before, Blip.from_config(before.model), 1)
    out, random = started(params, fresh)
    assert jax.tree.structure(out) == jax.tree.structure(fresh) and jax.tree.map(jnp.shape, out) == jax.tree.map(
        jnp.shape, fresh
    )
    same = lambda a, b: jax.tree.all(jax.tree.map(np.array_equal, a, b))
    ours, theirs = out["med_dec"]["blocks"], params["med"]["blocks"]
    assert same(out["med"]["blocks"], {k: v for k, v in theirs.items() if k != "self_attn_dec"})
    assert set(ours) == set(theirs) - {"self_attn"}
    assert all(same(ours[part], theirs[part]) for part in ours if part != "cross_attn")
    for part in ("q", "out", "ln"):
        assert same(ours["cross_attn"][part], theirs["cross_attn"][part])
    for part in "kv":
        origin = fresh["med_dec"]["blocks"] if wide else theirs
        assert same(ours["cross_attn"][part]["kernel"], origin["cross_attn"][part]["kernel"])
        assert same(ours["cross_attn"][part]["bias"], theirs["cross_attn"][part]["bias"])
    assert same(out["med"]["embed"], params["med"]["embed"]) and same(out["med_dec"]["embed"], params["med"]["embed"])
    assert same(out["med_dec"]["lm_head"], params["med"]["lm_head"])
    assert random == ([f"med_dec/blocks/cross_attn/{p}/kernel" for p in "kv"] if wide else [])
    with pytest.raises(ValueError, match="med/blocks/self_attn_dec/q/kernel is missing"):
        blocks = {name: part for name, part in params["med"]["blocks"].items() if name != "self_attn_dec"}
        started(params | {"med": params["med"] | {"blocks": blocks}}, fresh)


def test_build_names_the_objectives():
    cfg = vqa_config()
    assert isinstance(build(cfg), BlipVqa)
    with cfg.unlocked():
        cfg.objective = "vqa2"
    with pytest.raises(
        ValueError, match="'vqa2': choose one of .*caption, dialog, language, nlvr, pretrain, retrieval, .*vqa"
    ):
        build(cfg)
