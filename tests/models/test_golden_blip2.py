"""BLIP-2's first stage against LAVIS, in float32: features, captions, retrieval, epsilons."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from world import jitted
from world.golden2 import Case, close

from blip_jax import config, trees
from blip_jax.convert.rules import qformer as rules
from blip_jax.decode import beam
from blip_jax.eval import recall
from blip_jax.inference import programs
from blip_jax.models import initial
from blip_jax.models.blip import unit
from blip_jax.models.text.cache import images_of
from blip_jax.models.text.qformer import QFormer
from blip_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD
from blip_jax.parallel import sharding
from blip_jax.tasks import blip2_stage1, build, two_stage


def loaded(name, weights=""):
    """(case, model, parameters)"""
    case = Case(name, weights)
    return case, build(case.config()), case.params()


def cut(case, ids, mask, length):
    """Texts of at most `length` positions, [SEP] kept."""
    end = (mask.sum(-1) > length) & (jnp.arange(length) == length - 1)[:, None]
    return jnp.where(end.T, case.tokens["sep"], ids[:, :length]), mask[:, :length]


@pytest.mark.parametrize(
    "tower, trained, frozen", [("eva_g", 186_705_470, 985_894_528), ("clip_l", 183_165_758, 290_581_504)]
)
def test_parameters_of_full_size(tower, trained, frozen):
    """As many as LAVIS prints; rows that fill up the vocabulary are not counted."""
    cfg = config.blip2(tower)
    shapes = jax.eval_shape(lambda key: initial.init_params(cfg, build(cfg), key), jax.random.key(0))
    count = lambda params: sum(x.size for x in jax.tree.leaves(params))
    parts = trees.split(shapes, cfg.optim.freeze)
    assert (count(parts[0]) - (30592 - 30523) * (768 + 1), count(parts[1])) == (trained, frozen)


def test_golden_features():
    case, model, params = loaded("features")
    ids, mask = case.texts()

    def features(model, img, ids, mask, short):
        qry, kv = model.look(model.encode_image(img))
        img_emb, (txt_tok, _) = model.project_queries(qry), model.encode_text(ids, mask)
        proj = unit(model.text_proj(txt_tok))
        itc = model.similarity(img_emb, model.encode_text(*short)[1])
        return qry, img_emb, model.join(ids, mask, kv), model.match(*short, kv), itc, txt_tok, proj

    short = cut(case, ids, mask, case.meta["max_txt_len"])
    found = jax.jit(functools.partial(model.apply, method=features))(
        {"params": params}, case.images(), ids, mask, short
    )
    itc, real = found[4], np.asarray(mask)[..., None]
    close(np.diag(itc)[:, None], case.io["itc"])
    for name, ours in zip(("image_embeds", "image_embeds_proj", "multimodal_embeds", "itm_logits"), found):
        close(ours, case.io[name], what=name)
    for name, ours in zip(("text_embeds", "text_embeds_proj"), found[5:]):
        close(ours * real, case.io[name] * real, what=name)


def test_golden_captions():
    """Greedy and beam search by LAVIS's rule, whose lengths count [DEC]; three beams share the queries of an image."""
    case, model, params = loaded("itg_generate")
    apply = functools.partial(jitted.apply, model, params)
    kv = apply("image_kv", apply("encode_image", case.images()))
    ids = jnp.asarray(case.io["beam3"], jnp.int32)
    logits = apply("lm_logits", jnp.pad(ids, ((0, 0), (0, 1))), jnp.ones((len(ids), ids.shape[1] + 1), bool), kv)
    close(logits[..., : case.sizes["vocab"]], case.io["logits_beam3"], 1e-4)

    assert model.dec_id == case.tokens["dec"]
    for name, how in case.meta["decode"].items():
        found, score = jax.jit(functools.partial(decoded, model, case.tokens, how))(params, kv)
        theirs = case.io[name]
        for ids in np.asarray(found).swapaxes(0, 1):
            np.testing.assert_array_equal(ids[:, : theirs.shape[1]], theirs, err_msg=name)
            assert (ids[:, theirs.shape[1] :] == case.tokens["pad"]).all()
        if f"score/{name}" in case.io:
            np.testing.assert_allclose(score, case.io[f"score/{name}"], rtol=1e-4, err_msg=name)


def decoded(model, tokens, how, params, kv):
    """Ids i32[B,n,L] of texts for each image, by the settings that the original was given, and their scores: the best
    one of a search, or greedily two of the same.
    """
    extend = lambda ids, at, cache: model.apply({"params": params}, ids, at, cache, kv, method="extend")
    B, beams, ends = images_of(kv), how["num_beams"], {"eos": tokens["sep"], "pad": tokens["pad"]}
    lengths = {name: how[name] for name in ("min_length", "max_length")}
    if beams == 1:
        greedy = programs.Method("nucleus", 2, top_k=1, repetition_penalty=1.0, **lengths)
        found = programs.decoder(model, [model.dec_id], greedy, **ends)(params, kv, jnp.zeros((B, 2), jnp.uint32))
        return found["ids"], found["log_prob"]
    start = jnp.full((B, 1), model.dec_id, jnp.int32)
    logits, cache = extend(start, jnp.int32(0), model.empty_cache(B, how["max_length"] - 1))
    search = beam.Beam(beams, how.get("length_penalty", 1.0), rule="lavis", **lengths)
    cache = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=1), cache)
    ids, _, score = beam.search(extend, logits, cache, start, search, 1, **ends)
    return ids, score[:, 0]


def places(scores, right):
    """(first, last) place, from 0, that the best right candidate may have: the original's sort is not stable, and all
    pairs that are not re-ranked have one score."""
    best = scores[right].max()
    ahead, level = (scores > best).sum(), ((scores == best) & ~right).sum()
    return ahead, ahead + level


class Data:
    """Stands for an EvalData and a Tokenizer: pixels that normalising makes those of the case, texts by number."""

    def __init__(self, case):
        self.img = (np.asarray(case.images()) * np.array(PIXEL_STD) + np.array(PIXEL_MEAN)) * 255
        self.ids, self.mask = map(np.asarray, case.texts())
        self.n_images, self.captions = len(self.img), list(range(len(self.ids)))
        self.text_image = np.asarray(case.io["txt2img"])

    def image_batches(self, batch):
        for start in range(0, self.n_images, batch):
            img, index = np.zeros((batch, *self.img.shape[1:]), np.float32), np.full(batch, -1)
            found = self.img[start : start + batch]
            img[: len(found)], index[: len(found)] = found, np.arange(start, start + len(found))
            yield {"img": img, "index": index}

    def encode(self, captions, max_len):
        return self.ids[captions, :max_len], self.mask[captions, :max_len]


def test_golden_retrieval_is_reranked_by_logit_plus_cosine():
    case, model, params = loaded("rerank", "features")
    cfg, data = case.config(**{"eval.k": case.meta["k_test"], "eval.batch": 3, "eval.rerank_texts": 2}), Data(case)
    assert case.meta["max_len"] == blip2_stage1.leaves().eval_len
    cfg.text.max_len = case.meta["max_len"]
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    scores = two_stage.two_stage_scores(cfg, model, params, data, data, mesh)
    close(scores.cosine, case.io["itc"])
    close(scores.i2t, case.io["score_i2t"])
    close(scores.t2i.T, case.io["score_t2i"])
    recalls, metrics = recall.both_ways(scores.i2t, scores.t2i, scores.text_image), case.meta["metrics"]
    # up to k no pair has the score of those that are not re-ranked, among which the original's order is an accident
    compared = [name for name in recalls if name[-1].isdigit() and int(name.split("_r")[1]) <= case.meta["k_test"]]
    assert {"txt_r1", "img_r1"} <= {*compared}
    assert {name: recalls[name] for name in compared} == pytest.approx({name: metrics[name] for name in compared})
    of_texts = [places(row, scores.text_image == i) for i, row in enumerate(scores.i2t)]
    of_images = [places(row, np.arange(len(row)) == i) for i, row in zip(scores.text_image, scores.t2i.T)]
    for way, found in (("txt", np.array(of_texts)), ("img", np.array(of_images))):
        for k in (1, 5, 10):
            most, least = 100 * (found < k).mean(0)
            assert least - 1e-6 <= metrics[f"{way}_r{k}"] <= most + 1e-6, (way, k)


def test_golden_epsilons():
    """Weights so small that another epsilon, or a variance as E[x^2] - E[x]^2, shows in percents."""
    case = Case("norm_eps")
    params = case.params(rules.QUERIES)
    vision = jnp.asarray(case.io["vision"])
    qformer = QFormer(**case.qformer, kv_width=vision.shape[-1], text=False, dropout=0.0)
    apply = functools.partial(qformer.apply, {"params": params["qformer"]})
    qry, _ = apply(params["query_tokens"], apply(vision, method="image_kv"), method="look")
    close(qry, case.io["query_output"], 2e-5 * np.abs(case.io["query_output"]).max())
