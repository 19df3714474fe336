"""Retrieval: ranks and recalls by hand and by brute force.

The two stages against scoring every pair of a tiny model.
"""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_jax import config
from blip_jax.data.evaluation import EvalData
from blip_jax.data.formats import open_source
from blip_jax.data.text.wordpiece import Tokenizer, train_vocab
from blip_jax.eval import recall
from blip_jax.models import initial
from blip_jax.models.blip import Blip
from blip_jax.models.vision.vit import normalize_pixels
from blip_jax.parallel import sharding
from blip_jax.tasks import two_stage

# ---- ranks and recalls from a score matrix


def test_ranks_and_recalls_of_a_hand_example():
    text_image = np.array([0, 0, 1, 2])  # image 0 has two captions
    scores = np.array(
        [
            [0.9, 0.1, 0.8, 0.2],  # image 0: its first caption leads
            [0.5, 0.6, 0.4, 0.1],  # image 1: two captions of image 0 before its own
            [0.3, 0.7, 0.1, 0.6],  # image 2: one before
        ],
        np.float32,
    )
    assert recall.image_to_text_ranks(scores, text_image).tolist() == [0, 2, 1]
    assert recall.text_to_image_ranks(scores, text_image).tolist() == [0, 2, 1, 0]
    result = recall.both_ways(scores, scores, text_image)
    assert result["txt_r1"] == pytest.approx(100 / 3) and result["txt_r5"] == result["txt_r10"] == 100
    assert result["img_r1"] == 50 and result["img_r5"] == 100
    assert result["txt_r_mean"] == pytest.approx((100 / 3 + 200) / 3)
    assert result["r_mean"] == pytest.approx((result["txt_r_mean"] + result["img_r_mean"]) / 2)


def test_ties_count_against_the_model():
    text_image = np.array([0, 0, 1, 1])
    flat = np.zeros((2, 4), np.float32)
    assert recall.image_to_text_ranks(flat, text_image).tolist() == [2, 2]  # own second caption does not count
    assert recall.text_to_image_ranks(flat, text_image).tolist() == [1, 1, 1, 1]


def test_image_without_caption_is_a_candidate_but_no_query():
    scores = np.array([[0.5, 0.1], [0.9, 0.2], [0.0, 0.8]], np.float32)
    text_image = np.array([0, 2])
    assert recall.image_to_text_ranks(scores, text_image).tolist() == [0, 0]
    assert recall.text_to_image_ranks(scores, text_image).tolist() == [1, 0]


@st.composite
def scored(draw):
    n, m = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    values = draw(st.lists(st.integers(0, 5), min_size=n * m, max_size=n * m))
    return np.array(values, np.float32).reshape(n, m), np.array(
        draw(st.lists(st.integers(0, n - 1), min_size=m, max_size=m))
    )


@settings(max_examples=100, deadline=None)
@given(scored())
def test_ranks_equal_a_sorted_list(case):
    scores, text_image = case
    i2t = []
    for i in range(len(scores)):  # candidates sorted by score, one's own last among equals
        order = sorted(range(scores.shape[1]), key=lambda t: (-scores[i, t], text_image[t] == i))
        i2t += [rank for rank, t in enumerate(order) if text_image[t] == i][:1]
    t2i = []
    for t in range(scores.shape[1]):
        order = sorted(range(len(scores)), key=lambda i: (-scores[i, t], text_image[t] == i))
        t2i.append(order.index(text_image[t]))
    assert recall.image_to_text_ranks(scores, text_image).tolist() == i2t
    assert recall.text_to_image_ranks(scores, text_image).tolist() == t2i


@settings(max_examples=100, deadline=None)
@given(scored(), st.integers(1, 12))
def test_shortlist_is_the_head_of_a_stable_sort(case, k):
    scores, _ = case
    kept = recall.shortlist(scores, k)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    for row, best in zip(kept, order):
        assert sorted(np.flatnonzero(row)) == sorted(best)


@settings(max_examples=100, deadline=None)
@given(scored(), st.integers(1, 5))
def test_units_hold_every_wanted_pair_once(case, texts_per_unit):
    needed = case[0] > 2
    image, text = recall.rerank_units(needed, texts_per_unit)
    pairs = [(i, t) for i, row in zip(image, text) for t in row if t >= 0]
    assert sorted(pairs) == sorted(zip(*np.nonzero(needed))) and (text >= 0).any(axis=1).all()
    assert len(image) == np.ceil(needed.sum(axis=1) / texts_per_unit).sum()  # no image takes more passes than it must


def test_long_score_matrices_are_cut_in_rows(monkeypatch):
    scores = np.random.default_rng(0).normal(size=(7, 14)).astype(np.float32)
    text_image = np.repeat(np.arange(7), 2)
    whole = recall.both_ways(scores, scores, text_image), recall.shortlist(scores, 3)
    monkeypatch.setattr(recall, "CHUNK", 3)
    assert recall.both_ways(scores, scores, text_image) == whole[0]
    assert (recall.shortlist(scores, 3) == whole[1]).all()


# ---- the two stages on a tiny random model

N_IMAGES, N_TEXTS, T = 11, 25, 7


class Texts:
    """Stands for a Tokenizer: caption "17" is row 17 of random ids and lengths."""

    def __init__(self, rng):
        self.ids = rng.integers(5, 118, (N_TEXTS, T)).astype(np.int32)
        self.mask = np.arange(T) < rng.integers(2, T + 1, (N_TEXTS, 1))

    def encode(self, captions, max_len):
        rows = np.array([int(c) for c in captions])
        return np.where(self.mask[rows], self.ids[rows], 0)[:, :max_len], self.mask[rows][:, :max_len]


class Images:
    """Stands for an EvalData of random pictures, some of which cannot be read."""

    def __init__(self, rng, unreadable=()):
        self.pixels = rng.integers(0, 256, (N_IMAGES, 16, 16, 3)).astype(np.uint8)
        self.n_images, self.unreadable = N_IMAGES, unreadable
        self.captions = [str(i) for i in range(N_TEXTS)]
        self.text_image = rng.integers(0, N_IMAGES, N_TEXTS)

    def image_batches(self, batch):
        for start in range(0, N_IMAGES, batch):
            index = np.full(batch, -1, np.int64)
            rows = np.arange(start, min(start + batch, N_IMAGES))
            index[: len(rows)] = np.where(np.isin(rows, self.unreadable), -1, rows)
            img = np.zeros((batch, 16, 16, 3), np.uint8)
            img[: len(rows)] = self.pixels[rows]
            yield {"img": img, "index": index}


@functools.cache
def tiny():
    """(cfg, model, params, tokenizer) with weights large enough that matching logits differ between pairs."""
    cfg = config.base("tiny")
    with cfg.unlocked():
        cfg.model.img_size, cfg.model.dtype, cfg.text.max_len = 16, "float32", T
        cfg.eval.batch, cfg.eval.rerank_texts, cfg.eval.k = 4, 3, N_TEXTS
    model = Blip.from_config(cfg.model)
    example = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, T), jnp.int32), jnp.ones((1, T), bool)
    init = jax.jit(model.init)(jax.random.key(0), *example)
    params = initial.magnified(init["params"], 3)
    return cfg, model, params, Texts(np.random.default_rng(1))


@functools.cache
def every_pair():
    """(cosine, matching logit) f32[N_IMAGES, N_TEXTS], each pair scored in one plain pass."""
    cfg, model, params, texts = tiny()
    data = Images(np.random.default_rng(2))
    ids, mask = map(jnp.asarray, texts.encode(data.captions, T))

    @jax.jit
    def one_image(img):
        apply = functools.partial(model.apply, {"params": params})
        img_tok = apply(normalize_pixels(img[None]), method="encode_image")
        _, txt_emb = apply(ids, mask, method="encode_text")
        kv = apply(jnp.repeat(img_tok, N_TEXTS, 0), method="image_kv")
        return (txt_emb @ apply(img_tok, method="project_image")[0]), apply(ids, mask, kv, method="match")[:, 1]

    cosine, logit = zip(*(one_image(img) for img in data.pixels))
    return np.stack(cosine), np.stack(logit)


def scores_of(mesh_shape=(1, 1, 1), unreadable=(), **leaves):
    cfg, model, params, texts = tiny()
    cfg = cfg.copy_and_resolve_references()
    cfg.eval.update(leaves)
    cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor = mesh_shape
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[: int(np.prod(mesh_shape))])
    return two_stage.two_stage_scores(cfg, model, params, Images(np.random.default_rng(2), unreadable), texts, mesh)


def test_all_pairs_equal_scoring_every_pair():
    cosine, logit = every_pair()
    assert logit.std() > 0.1  # the comparison means something
    scores = scores_of()
    np.testing.assert_allclose(scores.cosine, cosine, atol=1e-5)
    np.testing.assert_allclose(scores.i2t, cosine + logit, atol=1e-5)
    np.testing.assert_allclose(scores.t2i, cosine + logit, atol=1e-5)


def test_only_the_shortlist_is_scored():
    cosine, logit = every_pair()
    scores = scores_of(k=4)
    texts_of = np.argsort(np.argsort(-cosine, axis=1), axis=1) < 4
    images_of = np.argsort(np.argsort(-cosine, axis=0), axis=0) < 4
    np.testing.assert_allclose(scores.i2t, np.where(texts_of, cosine + logit, -100), atol=1e-5)
    np.testing.assert_allclose(scores.t2i, np.where(images_of, cosine + logit, -100), atol=1e-5)
    assert (texts_of != images_of).any()


@pytest.mark.parametrize(
    "mesh_shape, batch, rerank_texts",
    [
        ((1, 1, 1), 11, 25),
        ((1, 1, 1), 1, 1),
        ((8, 1, 1), 64, 16),
        ((2, 2, 2), 5, 2),
    ],
)
def test_batch_sizes_and_meshes_do_not_matter(mesh_shape, batch, rerank_texts):
    reference = scores_of(k=4)
    scores = scores_of(mesh_shape, k=4, batch=batch, rerank_texts=rerank_texts)
    for a, b in zip(scores, reference):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_unreadable_images_go_with_their_captions(caplog):
    cosine, logit = every_pair()
    data = Images(np.random.default_rng(2))
    lost = [3, int(data.text_image[0])]
    with caplog.at_level(logging.WARNING):
        scores = scores_of(unreadable=lost)
    left = [i for i in range(N_IMAGES) if i not in lost]
    kept = np.isin(data.text_image, left)
    np.testing.assert_allclose(scores.i2t, (cosine + logit)[left][:, kept], atol=1e-5)
    assert [left[i] for i in scores.text_image] == data.text_image[kept].tolist()
    assert f"2 of 11 images could not be read; they and their {(~kept).sum()} captions" in caplog.text
    with pytest.raises(ValueError, match="none of the 11 images"):
        scores_of(unreadable=range(N_IMAGES))


def test_evaluate_reports_both_stages_and_a_clipped_k(caplog):
    cfg, model, params, texts = tiny()
    cfg = cfg.copy_and_resolve_references()
    cfg.eval.k = 20
    data = Images(np.random.default_rng(2))
    with caplog.at_level(logging.WARNING):
        result = two_stage.evaluate(cfg, model, params, data, texts, sharding.make_mesh(cfg.mesh))
    assert "eval.k = 20 is more than the 11 images" in caplog.text and "texts there are" not in caplog.text
    cosine, logit = every_pair()
    first_is_own = (cosine.argmax(axis=0) == data.text_image).mean()
    assert result["itc_img_r1"] == pytest.approx(100 * first_is_own)
    assert result["img_r1"] == pytest.approx(100 * ((cosine + logit).argmax(axis=0) == data.text_image).mean())
    names = [f"{way}_{r}" for way in ("txt", "img") for r in ("r1", "r5", "r10", "r_mean")] + ["r_mean"]
    assert sorted(result) == sorted([*names, *(f"itc_{n}" for n in names), "images", "texts", "scores"])
    own, kept = scores_of(k=20), result["scores"]
    assert kept["i2t"].shape == (N_IMAGES, 20) and kept["t2i"].shape == (N_TEXTS, N_IMAGES)
    np.testing.assert_allclose(recall.spread(kept["i2t_text"], kept["i2t"], N_TEXTS), own.i2t, atol=1e-5)
    np.testing.assert_allclose(recall.spread(kept["t2i_image"], kept["t2i"], N_IMAGES), own.t2i.T, atol=1e-5)
    assert (kept["text_image"] == own.text_image).all()
    assert (result["images"], result["texts"]) == (N_IMAGES, N_TEXTS)


def test_what_cannot_be_read_leaves_the_counts_and_the_chance():
    cfg, model, params, texts = tiny()
    data = Images(np.random.default_rng(2), unreadable=[3, 4])
    result = two_stage.evaluate(cfg, model, params, data, texts, sharding.make_mesh(cfg.mesh))
    left = int((~np.isin(data.text_image, [3, 4])).sum())
    assert (result["images"], result["texts"]) == (9, left)
    assert f"9 images, {left} captions" in recall.table(result)
    assert f"{100 / 9:.1f}" in recall.table(result)  # R@1 of text to image by chance


def test_pictures_and_captions_of_a_source(tmp_path):
    """Against the real data classes, through tokenizer and decoder.

    The data are scenes, of which the world's truth is not needed.
    """
    cfg, model, params, _ = tiny()
    cfg = cfg.copy_and_resolve_references()
    cfg.eval.k = 3
    sources = {"world": config.source("scenes", count=10, seed=1, size=32)}
    captions = [c for record in open_source("world", sources["world"]) for c in record["captions"]]
    train_vocab(captions, 118, tmp_path / "vocab.txt")
    tokenizer = Tokenizer(tmp_path / "vocab.txt")
    data = EvalData(cfg, tokenizer, sources, skipped_path=tmp_path / "skipped.jsonl")
    scores = two_stage.two_stage_scores(cfg, model, params, data, tokenizer, sharding.make_mesh(cfg.mesh))
    assert scores.cosine.shape == (10, len(captions)) and scores.text_image.tolist() == data.text_image.tolist()
    assert ((scores.i2t > -100).sum(axis=1) == 3).all() and ((scores.t2i > -100).sum(axis=0) == 3).all()


def test_functions_compile_once(caplog):
    scores_of(k=3)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        scores_of(k=5)
    assert not [r for r in caplog.messages if "Compiling" in r and re.search("view|embed|rerank", r)]


def test_settings_and_parameters_that_cannot_work():
    with pytest.raises(ValueError, match="eval.rerank_texts = 0"):
        scores_of(rerank_texts=0)
    cfg, model, params, texts = tiny()
    broken = {**params, "itm_head": jax.tree.map(lambda x: x * jnp.nan, params["itm_head"])}
    with pytest.raises(ValueError, match="matching logits are not finite"):
        two_stage.evaluate(cfg, model, broken, Images(np.random.default_rng(2)), texts, sharding.make_mesh(cfg.mesh))
