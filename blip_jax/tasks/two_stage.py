"""Two-stage image-text retrieval (BLIP paper, section 4.1): cosine shortlist, re-ranked by the matching head.

Every text and image is embedded; for each image the k closest texts, and for each text the k closest images, are scored
by
the matching head: score = logit of "match" + cosine. All other entries are -100. Recall@K in percent, both ways.

Every shortlisted pair of either direction is scored once. Images' token states wait in host memory; a pass of the
matching head takes a batch of images and up to `eval.rerank_texts` texts of each, so keys and values serve that many
texts. Rows that only fill a static shape repeat a real row, and their results are dropped.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from blip_jax.eval import recall
from blip_jax.inference import programs
from blip_jax.inference.batching import Pass, Runner
from blip_jax.models import flops as counts
from blip_jax.parallel import sharding

log = logging.getLogger(__name__)


class Programs(NamedTuple):
    """What an evaluation passes over images, over texts, and over images with the texts that are closest."""

    view: Callable
    embed: Callable
    rerank: Callable


def programs_of(model) -> Programs:
    """The programs of `model`, not jitted."""
    return Programs(programs.view(model, "img_tok", "img_emb"), programs.embed(model), programs.rerank(model))


@functools.cache
def compiled(model) -> Programs:
    """Those of `programs_of`, which compile when they first meet a shape; kept from one evaluation of a training run to
    the next."""
    return Programs(*map(jax.jit, programs_of(model)))


def passes(cfg, model, unit: int) -> list[Pass]:
    """What `evaluate` runs, for plans; of videos where the task has frames. unit: as of `Runner`."""
    B, G, T, frames = batch_of(cfg, unit), cfg.eval.rerank_texts, cfg.text.max_len, cfg.task.get("frames", 0)
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype)
    size, R = cfg.model.img_size, max(frames, 1)
    img = rows(np.uint8, *(frames,) * bool(frames), size, size, 3)
    img_tok = rows(np.dtype(cfg.model.dtype), counts.positions(cfg.model, R), cfg.model.vit.width)
    own, (picture, words, unit_flops) = programs_of(model), counts.retrieval_passes(cfg.model, T, G, R)
    return [
        Pass("encode images", own.view, (img,), picture, pictures=R),
        Pass("encode texts", own.embed, (rows(np.int32, T), rows(bool, T)), words),
        Pass("re-rank", own.rerank, (img_tok, rows(np.int32, G, T), rows(bool, G, T)), unit_flops),
    ]


def batch_of(cfg, unit: int) -> int:
    """Images, texts or images with their texts of a pass: eval.batch, rounded up to the devices that split it."""
    return -(-cfg.eval.batch // unit) * unit


class Scores(NamedTuple):
    """Score matrices f32[n_images, n_texts] of the readable images and their texts, and i64[n_texts], each text's
    image.
    """

    cosine: np.ndarray
    i2t: np.ndarray  # what images rank texts by: logit + cosine for each image's shortlist, else -100
    t2i: np.ndarray  # what texts rank images by, likewise
    text_image: np.ndarray


def evaluate(cfg, model, params, data, tokenizer, mesh) -> dict[str, float]:
    """Image-text retrieval of `data` (a data.evaluation.EvalData) in both directions, re-ranked and by cosine alone.

    Reads cfg.eval.{k, batch, rerank_texts} and cfg.text.max_len; batches are rounded up to the devices that split them.
    Results do not depend on the batch sizes or the mesh beyond rounding. Every process calls it with the same data.
    Host memory: n_images * P * D values in the compute dtype, and a few f32 matrices [n_images, n_texts].

    Returns "images" and "texts", how many could be read and were ranked, and in percent "txt_r1", "txt_r5", "txt_r10",
    "txt_r_mean" (image to text: best rank among the image's captions), "img_*" (text to image), "r_mean" of both, and
    the same with the prefix "itc_" by cosine alone; "scores": arrays for scores.npz, as `ranked` has them.
    Raises ValueError if no readable image has a caption, a setting is not positive, or features are not finite.
    """
    scores = two_stage_scores(cfg, model, params, data, tokenizer, mesh)
    by_cosine = recall.both_ways(scores.cosine, scores.cosine, scores.text_image)
    images, texts = scores.cosine.shape
    return {
        "images": images,
        "texts": texts,
        **recall.both_ways(scores.i2t, scores.t2i, scores.text_image),
        **{f"itc_{name}": v for name, v in by_cosine.items()},
        "scores": ranked(scores),
    }


def ranked(scores: Scores) -> dict[str, np.ndarray]:
    """What `blip-jax score retrieval` gives the same numbers of: for each query its shortlist and the scores of this.

    {"i2t": f32[n_images, k], "i2t_text": i32, the texts that these are of, "t2i": f32[n_texts, k], "t2i_image": i32,
    "text_image": i32[n_texts]}; of COCO's test split, with k = 256, 61 MB, where whole matrices are 1 GB.
    """
    texts_of, i2t = recall.compact(scores.i2t)
    images_of, t2i = recall.compact(scores.t2i.T)
    text_image = scores.text_image.astype(np.int32)
    return {"i2t": i2t, "i2t_text": texts_of, "t2i": t2i, "t2i_image": images_of, "text_image": text_image}


def two_stage_scores(cfg, model, params, data, tokenizer, mesh) -> Scores:
    """Scores of both stages; arguments and errors as `evaluate`."""
    _check(cfg, data)
    run, own = Runner(mesh), compiled(model)
    batch = batch_of(cfg, run.unit)
    params = jax.device_put(params, sharding.shardings_for(params, mesh))
    img_tok, img_emb, readable = _image_features(run, own.view, params, data, batch)
    kept, text_image = _drop_unreadable(readable, np.asarray(data.text_image))
    ids, txt_mask = tokenizer.encode([c for c, keep in zip(data.captions, kept) if keep], cfg.text.max_len)
    txt_emb = run.map(
        own.embed, params, len(ids), lambda at: (ids[at], txt_mask[at]), size=batch, progress=_progress("text features")
    )["txt_emb"]
    if not readable.all():
        img_tok, img_emb = img_tok[readable], img_emb[readable]
    cosine = model.similarity(img_emb, txt_emb)
    _check_finite(cosine, "embeddings")

    texts_of = recall.shortlist(cosine, _clipped(cfg.eval.k, len(txt_emb), "texts"))
    images_of = recall.shortlist(cosine.T, _clipped(cfg.eval.k, len(img_emb), "images")).T
    needed = texts_of | images_of
    log.info("retrieval: %d images, %d texts, %d pairs to re-rank", *needed.shape, needed.sum())
    image, text = recall.rerank_units(needed, cfg.eval.rerank_texts)

    def unit(at: slice):
        rows = np.maximum(text[at], 0)  # U G
        return img_tok[image[at]], ids[rows], txt_mask[rows]

    logits = run.map(own.rerank, params, len(image), unit, size=batch, progress=_progress("re-ranking"))["logit"]
    scores, real = np.zeros(needed.shape, np.float32), text >= 0
    scores[np.broadcast_to(image[:, None], real.shape)[real], text[real]] = logits[real]
    _check_finite(scores, "matching logits")
    scores += cosine
    i2t, t2i = (np.where(shortlisted, scores, np.float32(recall.UNSCORED)) for shortlisted in (texts_of, images_of))
    return Scores(cosine, i2t, t2i, text_image)


def _image_features(run: Runner, view: Callable, params, data, batch: int):
    """(img_tok [n_images,P,D] in the compute dtype, img_emb f32[n_images,E], readable bool[n_images])"""
    batches = tqdm(data.image_batches(batch), desc="image features", total=math.ceil(data.n_images / batch), **_bar())
    passes = ((b["index"], view(params, run.put(b["img"], batch))) for b in batches)
    img_tok = img_emb = None
    readable = np.zeros(data.n_images, bool)
    with jax.set_mesh(run.mesh):
        for index, found in run.fetched(passes):
            if img_tok is None:
                img_tok = np.zeros((data.n_images, *found["img_tok"].shape[1:]), found["img_tok"].dtype)
                img_emb = np.zeros((data.n_images, *found["img_emb"].shape[1:]), np.float32)
            real = index >= 0
            img_tok[index[real]], img_emb[index[real]] = found["img_tok"][real], found["img_emb"][real]
            readable[index[real]] = True
    return img_tok, img_emb, readable


def _bar() -> dict[str, Any]:
    return {"unit": "batch", "disable": jax.process_index() != 0, "mininterval": 1.0}


def _progress(what: str) -> Callable[[Iterable], Iterable]:
    return functools.partial(tqdm, desc=what, **_bar())


def _drop_unreadable(readable, text_image):
    """(kept texts bool[n_texts], image of each kept text counted among the readable images i64)"""
    lost = int((~readable).sum())
    if lost == len(readable):
        raise ValueError(
            f"retrieval evaluation: none of the {lost} images could be read; see skipped.jsonl and data.eval"
        )
    kept = readable[text_image]
    if not kept.any():
        raise ValueError("retrieval evaluation: no readable image has a caption; see skipped.jsonl and data.eval")
    if lost:
        log.warning(
            "retrieval: %d of %d images could not be read; they and their %d captions are left out",
            lost,
            len(readable),
            int((~kept).sum()),
        )
    return kept, (np.cumsum(readable) - 1)[text_image[kept]]


def _clipped(k: int, candidates: int, what: str) -> int:
    if k > candidates:
        log.warning(
            "retrieval: eval.k = %d is more than the %d %s there are: all of them are re-ranked", k, candidates, what
        )
    return min(k, candidates)


def _check(cfg, data):
    for name in ("k", "batch", "rerank_texts"):
        if cfg.eval[name] < 1:
            raise ValueError(f"eval.{name} = {cfg.eval[name]}: a positive number was expected")
    if not len(data.captions):
        raise ValueError("retrieval evaluation: the sources of data.eval hold no caption")


def _check_finite(x, what):
    if not np.isfinite(x).all():
        raise ValueError(
            f"retrieval evaluation: {what} are not finite: the parameters hold NaN or infinity, or model.dtype "
            "overflows; evaluate an earlier checkpoint or use float32"
        )
