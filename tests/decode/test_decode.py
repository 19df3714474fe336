"""Sampling functions, the sampler's frequencies, cached decoding and beam search.

Cached against uncached decoding, beam search against exhaustive search.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import jitted

from blip_jax import config
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.decode import beam, generate, limits, sampling
from blip_jax.inference import programs
from blip_jax.models import initial
from blip_jax.models.vision.vit import normalize_pixels
from blip_jax.tasks import build

EOS, PAD = 3, 0


@pytest.fixture(scope="module")
def captioner(tiny_vocab):
    """(model without text encoder, params with lively logits, tokenizer)"""
    cfg = config.base("tiny")
    cfg.objective = "caption"
    cfg.model.update(img_size=16, dtype="float32")
    model, tokenizer = build(cfg), Tokenizer(tiny_vocab)
    params = jax.jit(lambda: initial.init_params(cfg, model, jax.random.key(0)))()
    params = initial.magnified(params, 6)  # else all images get much the same text
    return model, params, tokenizer


def pictures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


def keys(n, seed=0):
    return np.stack([programs.example_key(f"image {i}", seed) for i in range(n)])


# --- pure functions ---------------------------------------------------------------------------------------------------
def test_repetition_penalty_divides_positive_and_multiplies_negative_scores():
    scores = jnp.array([[2.0, -2.0, 1.0, -1.0]])
    out = sampling.repetition_penalty(scores, jnp.array([[True, True, False, False]]), 2.0)
    np.testing.assert_array_equal(out, [[1.0, -4.0, 1.0, -1.0]])


@pytest.mark.parametrize("length, open_", [(4, False), (5, True), (6, True)])
def test_min_length_closes_the_end_until_it_is_reached(length, open_):
    out = sampling.min_length(jnp.zeros((1, 5)), jnp.int32(length), 5, EOS)
    assert bool(np.isfinite(out[0, EOS])) == open_ and np.isfinite(np.delete(out[0], EOS)).all()


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=30), st.floats(0.01, 1.0), st.integers(0, 30))
@settings(deadline=None, max_examples=60)
def test_top_k_then_top_p_keep_what_the_definition_says(row, p, k):
    scores, tokens = sampling.top_k(jnp.array([row], jnp.float32), k)
    assert scores.shape[1] == (min(k, len(row)) or len(row))
    np.testing.assert_array_equal(np.sort(row)[::-1][: scores.shape[1]].astype(np.float32), scores[0])
    np.testing.assert_array_equal(np.float32(row)[tokens[0]], scores[0])
    probs = np.asarray(jax.nn.softmax(scores[0]), np.float64)
    before = np.cumsum(probs) - probs
    kept = np.isfinite(np.asarray(sampling.top_p(scores, p))[0])
    assert kept[0] and (kept | (np.abs(before - p) < 1e-5))[before <= p].all()
    assert not (kept[1:] & (before > p + 1e-5)[1:]).any()


def test_frequencies_of_the_sampler_follow_the_distribution():
    rng, rows = np.random.default_rng(0), 20_000
    logits = jnp.asarray(rng.normal(0, 2, 40), jnp.float32)
    seen = jnp.zeros(40, bool).at[jnp.array([1, 5])].set(True)
    penalised = sampling.repetition_penalty(logits[None], seen[None], 1.3)
    scores, tokens = sampling.top_k(sampling.temperature(penalised, 0.8), 12)
    scores = sampling.top_p(scores, 0.9)
    many = lambda x: jnp.broadcast_to(x, (rows, x.shape[1]))
    drawn = np.asarray(sampling.draw(jax.random.split(jax.random.key(0), rows), many(scores), many(tokens)))
    expected = np.zeros(40)
    expected[tokens[0]] = np.asarray(jax.nn.softmax(scores[0]), np.float64) * rows
    observed = np.bincount(drawn, minlength=40)
    assert observed[expected == 0].sum() == 0
    possible = expected > 0
    chi2 = (((observed - expected) ** 2)[possible] / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert freedom >= 4
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom), (chi2, freedom)  # four standard deviations above the mean


# --- loops over a small table instead of a model ----------------------------------------------------------------------
def table_model(seed, vocab=6, order=2):
    """A Markov chain as `extend`: the next token's logits depend on the last `order` tokens.

    The cache, i32[1,R,L], is the text so far.
    """
    table = jax.random.normal(jax.random.key(seed), (vocab,) * (order + 1)) * 1.5

    def extend(ids, start, cache):
        for i in range(ids.shape[1]):
            cache = jax.lax.dynamic_update_slice(cache, ids[None, :, i : i + 1], (0, 0, start + i))
        last = start + ids.shape[1] - 1
        context = [
            jax.lax.dynamic_slice_in_dim(cache[0], jnp.maximum(last - j, 0), 1, axis=1)[:, 0] for j in range(order)
        ]
        return table[tuple(context)], cache

    return extend


def sequences(extend, prompt, how, vocab=6):
    """Every text of at most how.max_length tokens with its score, by brute force: {tokens without end: score}."""
    table = {}

    def logits_after(text):
        if text not in table:
            out, _ = extend(jnp.array([text]), 0, jnp.zeros((1, 1, len(text)), jnp.int32))
            table[text] = np.asarray(jax.nn.log_softmax(out[0]), np.float64)
        return table[text]

    out = {}

    def grow(text, total):
        if len(text) == how.max_length:
            out[text] = total / len(text) ** how.length_penalty
            return
        for token, score in enumerate(logits_after(text)):
            if token in text:
                score = score * how.repetition_penalty
            if token != EOS:
                grow((*text, token), total + score)
            elif len(text) >= how.min_length:
                out[(*text, EOS)] = (total + score) / len(text) ** how.length_penalty

    grow(prompt, 0.0)
    return out


@pytest.mark.parametrize("penalty, repetition", list(itertools.product([0.0, 1.0], [1.0, 1.3])))
def test_a_wide_beam_search_finds_the_best_text_there_is(penalty, repetition):
    extend, prompt = table_model(1), (4, 5)
    how = beam.Beam(beams=130, length_penalty=penalty, repetition_penalty=repetition, min_length=3, max_length=5)
    logits, cache = extend(jnp.array([prompt]), 0, jnp.zeros((1, 1, 5), jnp.int32))
    ids, log_prob, score = beam.search(
        extend, logits, jnp.repeat(cache, 130, axis=1), jnp.array([prompt]), how, 4, eos=EOS, pad=PAD
    )
    texts = sequences(extend, prompt, how)
    best = sorted(texts, key=texts.get, reverse=True)[:4]
    for row, found, want in zip(np.asarray(ids[0]), np.asarray(score[0]), best):
        assert tuple(row[: len(want)]) == want and (row[len(want) :] == PAD).all()
        assert abs(found - texts[want]) < 1e-5
    plain = sequences(extend, prompt, how._replace(repetition_penalty=1.0, length_penalty=0.0))
    np.testing.assert_allclose(log_prob[0], [plain[t] for t in best], atol=1e-5)


@pytest.mark.parametrize("n, beams", [(0, 3), (4, 3)])
def test_beam_search_gives_at_most_as_many_texts_as_beams(n, beams):
    with pytest.raises(ValueError, match="raise beams"):
        beam.search(
            None, jnp.zeros((1, 6)), None, jnp.zeros((1, 2), jnp.int32), beam.Beam(beams=beams), n, eos=EOS, pad=PAD
        )


def test_an_unknown_rule_is_an_error():
    with pytest.raises(ValueError, match="rule is 'bart': beam search has blip, lavis, hf; give one of them"):
        beam.search(
            None, jnp.zeros((1, 6)), None, jnp.zeros((1, 2), jnp.int32), beam.Beam(rule="bart"), 1, eos=EOS, pad=PAD
        )


def searched(log_probs, start, how):
    """(best text, score), one hypothesis at a time: what transformers 4.15, 4.33 and 5.23 do behind a start id."""
    M, running, pool = how.beams, [((start,), 0.0)], []
    for n in range(1, how.max_length):  # ids of a running text
        found = []
        for ids, total in running:
            scores = log_probs[ids[-1], ids[max(n - 2, 0)]].copy()
            for token in set(ids):
                scores[token] *= how.repetition_penalty
            scores[EOS] = -np.inf if n < how.min_length else scores[EOS]
            found += [((*ids, token), total + score) for token, score in enumerate(scores)]
        found = sorted(found, key=lambda text: -text[1])[: 2 * M]
        pool += [(ids, s / n**how.length_penalty) for ids, s in found[:M] if ids[-1] == EOS]
        pool = sorted(pool, key=lambda text: -text[1])[:M]
        running = [text for text in found if text[0][-1] != EOS][:M]
        best = running[0][1] if how.rule == "hf" else found[0][1]
        length = n + 1 if how.rule == "lavis" else n
        if len(pool) == M and pool[-1][1] >= best / length**how.length_penalty:
            break
    else:
        length = how.max_length - (how.rule == "hf")
        pool += [(ids, s / length**how.length_penalty) for ids, s in running]
    return max(pool, key=lambda text: text[1])


def test_beam_search_follows_the_rule_of_each_version():
    starts = (0, 1, 2, 4, 5)

    @functools.partial(jax.jit, static_argnums=2)
    def found(seed, penalty, rule):
        extend, prompt = table_model(seed), jnp.array(starts)[:, None]
        logits, cache = extend(prompt, 0, jnp.zeros((1, len(starts), 8), jnp.int32))
        how = settings_of(penalty, rule)
        ids, _, score = beam.search(extend, logits, jnp.repeat(cache, 3, axis=1), prompt, how, 1, eos=EOS, pad=PAD)
        return ids[:, 0], score[:, 0], logits_of_pairs(extend)

    def settings_of(penalty, rule):
        return beam.Beam(3, penalty, repetition_penalty=1.2, min_length=2, max_length=8, rule=rule)

    def logits_of_pairs(extend):
        """f32[last,before,V]"""
        last, before = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(6), jnp.arange(6), indexing="ij"))
        return extend(jnp.stack([before, last], 1), 0, jnp.zeros((1, 36, 2), jnp.int32))[0].reshape(6, 6, 6)

    texts = {rule: [] for rule in beam.RULES}
    for rule, got in texts.items():
        for seed, penalty in ((2, 1.0), (19, 2.0), (66, 1.0), (71, 1.0), (3, 0.0), (4, -1.0)):
            ids, score, logits = (np.asarray(x) for x in found(seed, penalty, rule))
            log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
            for row, start in enumerate(starts):
                text, value = searched(log_probs, start, settings_of(penalty, rule))
                assert tuple(ids[row][: len(text)]) == text and (ids[row][len(text) :] == PAD).all(), (rule, seed)
                assert abs(score[row] - value) < 1e-4 * max(1, abs(value))
                got.append(text)
    assert texts["blip"] != texts["lavis"] != texts["hf"] != texts["blip"]


def test_limits_in_new_tokens():
    at = limits.lengths(4, 2, 6)
    assert at == {"min_length": 6, "max_length": 10}
    open_ = [np.isfinite(sampling.min_length(jnp.zeros((1, 6)), n, at["min_length"], EOS)[0, EOS]) for n in (4, 5, 6)]
    assert open_ == [False, False, True]  # the end may be the third new token: two are before it


def test_limits_of_lavis_and_limits_that_do_not_fit():
    assert limits.of_lavis(8, 30, start_in_max=True) == {"least": 7, "most": 29}
    assert limits.of_lavis(1, 10, start_in_max=False) == limits.of_lavis(0, 10, start_in_max=False)
    for least, most in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match=f"least={least}, most={most} new tokens"):
            limits.lengths(1, least, most)


def test_a_prompt_as_long_as_the_text_is_an_error():
    with pytest.raises(ValueError, match="raise max_length"):
        generate.sample(
            None,
            jnp.zeros((1, 6)),
            None,
            jnp.zeros((1, 4), jnp.int32),
            None,
            generate.Sampling(max_length=4),
            eos=EOS,
            pad=PAD,
        )


def test_sampling_stops_when_all_rows_have_ended():
    steps = []

    def extend(ids, start, cache):
        jax.debug.callback(lambda at: steps.append(int(at)), start)
        return jnp.full((2, 6), -9.0).at[:, EOS].set(jnp.where(start >= 3, 9.0, -20.0)).at[:, 4].set(0.0), cache

    ids, _ = jax.jit(
        lambda: generate.sample(
            extend,
            jnp.full((2, 6), -9.0).at[:, 4].set(0.0),
            (),
            jnp.full((2, 1), 5),
            jax.random.split(jax.random.key(0), 2),
            generate.GREEDY._replace(min_length=0, max_length=30),
            eos=EOS,
            pad=PAD,
        )
    )()
    jax.effects_barrier()
    np.testing.assert_array_equal(ids[:, :6], [[5, 4, 4, 4, EOS, PAD]] * 2)
    assert sorted(steps) == [1, 2, 3]


# --- the model --------------------------------------------------------------------------------------------------------
def test_cached_logits_equal_uncached_ones_whatever_the_padding(captioner):
    model, params, tokenizer = captioner
    ids = tokenizer.encode(["a large red circle", "a star above a ring"], 14)[0]
    ids[:, 0] = tokenizer.dec
    lengths, ids = (ids != tokenizer.pad).sum(1), jnp.asarray(ids)
    assert 5 < lengths[0] < lengths[1] < 14
    apply = lambda *args, method: jitted.apply(model, params, method, *args)
    kv = apply(apply(jnp.asarray(pictures(2), jnp.float32) / 255, method="encode_image"), method="image_kv")
    whole = apply(ids, ids != tokenizer.pad, kv, method="lm_logits")
    cache, got = model.empty_cache(2, 13), []
    logits, cache = apply(ids[:, :4], 0, cache, kv, method="extend")
    for t in range(4, 13):
        got.append(logits)
        logits, cache = apply(ids[:, t : t + 1], t, cache, kv, method="extend")
    for row, length in enumerate(lengths):
        for t in range(4, length):
            np.testing.assert_allclose(got[t - 4][row], whole[row, t - 1], atol=1e-5, rtol=0)
    short = apply(ids[:, : lengths.max()], (ids != tokenizer.pad)[:, : lengths.max()], kv, method="lm_logits")
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(short[row, : length - 1], whole[row, : length - 1], atol=1e-5, rtol=0)


def test_log_prob_is_the_models_own(captioner):
    model, params, tokenizer = captioner
    method = programs.Method(n=3, max_length=12, top_p=0.95)
    img = pictures(4)
    out = jax.jit(programs.captioner(model, tokenizer, "a picture of ", method))(params, img, keys(4))
    prompt = len(programs.prompt_ids(tokenizer, "a picture of "))
    apply = lambda *args, method: jitted.apply(model, params, method, *args)
    tok = apply(normalize_pixels(jnp.asarray(img)), method="encode_image")
    for i in range(3):
        ids = jnp.asarray(out["ids"][:, i])
        logits = apply(ids, jnp.ones(ids.shape, bool), apply(tok, method="image_kv"), method="lm_logits")
        log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(ids)[:, 1:, None], axis=2)[..., 0]
        ended = np.cumsum(np.asarray(ids) == tokenizer.sep, axis=1)[:, :-1] > 0  # tokens behind the end
        counted = (np.arange(1, 12) >= prompt) & ~ended
        np.testing.assert_allclose(out["log_prob"][:, i], (log_p * counted).sum(1), atol=1e-4)


@pytest.mark.parametrize(
    "method", [programs.Method(n=2, max_length=14), programs.Method(kind="beam", repetition_penalty=1.0, max_length=14)]
)
def test_a_caption_depends_on_its_key_and_picture_alone(captioner, method):
    model, params, tokenizer = captioner
    make = jax.jit(programs.captioner(model, tokenizer, "a picture of ", method))
    img, key = pictures(64), keys(64)
    whole = np.asarray(make(params, img, key)["ids"])
    assert len({row.tobytes() for row in whole[:, 0]}) > 20, "the captions are all alike: the test would prove nothing"
    for size in (1, 7):
        for first in (0, 21, 50):
            part = slice(first, first + size)
            np.testing.assert_array_equal(make(params, img[part], key[part])["ids"], whole[part])
    other = np.random.default_rng(1).permutation(64)
    np.testing.assert_array_equal(make(params, img[other], key[other])["ids"], whole[other])
    mesh = jax.make_mesh((8, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    split = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        spread = make(
            jax.device_put(params, jax.NamedSharding(mesh, jax.P())),
            jax.device_put(img, split),
            jax.device_put(key, split),
        )
    np.testing.assert_array_equal(spread["ids"], whole)


def test_captions_of_one_image_and_of_two_seeds_differ(captioner):
    model, params, tokenizer = captioner
    make = jax.jit(programs.captioner(model, tokenizer, "a picture of ", programs.Method(n=4, max_length=14)))
    img = pictures(8)
    ids = np.asarray(make(params, img, keys(8))["ids"])
    assert sum(len({row.tobytes() for row in of_one}) for of_one in ids) > 20
    assert (np.asarray(make(params, img, keys(8, seed=1))["ids"]) != ids).any()
    one = np.asarray(
        jax.jit(programs.captioner(model, tokenizer, "a picture of ", programs.Method(n=1, max_length=14)))(
            params, img, keys(8)
        )["ids"]
    )
    np.testing.assert_array_equal(one[:, 0], ids[:, 0])  # the first caption does not depend on how many are made


def test_text_of_a_caption_has_no_prompt_and_no_special_token(captioner):
    _, _, tokenizer = captioner
    prompt = programs.prompt_ids(tokenizer, "a picture of ")
    assert prompt[0] == tokenizer.dec and tokenizer.sep not in prompt
    ids = tokenizer.encode(["a picture of a large red circle"], 20)[0][0]
    ids[0] = tokenizer.dec
    assert programs.text_of(tokenizer, ids, len(prompt)) == "a large red circle"


def test_unknown_method_is_named(captioner):
    model, _, tokenizer = captioner
    with pytest.raises(ValueError, match="'greedy' is unknown: choose nucleus or beam"):
        programs.captioner(model, tokenizer, "", programs.Method(kind="greedy"))
