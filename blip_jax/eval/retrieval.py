"""Two-stage image-text retrieval (BLIP paper, section 4.1): cosine shortlist, re-ranked by the matching head.

Every text and image is embedded; for each image the k closest texts, and for each text the k closest images, are scored
by
the matching head: score = logit of "match" + cosine. All other entries are -100. Recall@K in percent, both ways.

Every shortlisted pair of either direction is scored once. Images' token states wait in host memory; a pass of the
matching head takes a batch of images and up to `eval.rerank_texts` texts of each, so keys and values serve that many
texts. Rows that only fill a static shape repeat a real row, and their results are dropped. Ties: the shortlist prefers
the lower index; a rank counts every candidate that scores as high as the right one as before it, so a constant score
earns nothing.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from blip_jax.models.vision.vit import encode_pixels
from blip_jax.parallel import sharding

log = logging.getLogger(__name__)

UNSCORED = -100.0  # score of a pair outside the shortlist
RECALLS = (1, 5, 10)
CHUNK = 1024  # rows of a score matrix handled at a time, to bound temporaries


def shortlist(similarity: np.ndarray, k: int) -> np.ndarray:
    """bool[N,M]: True for the k largest entries of each row of f32[N,M]; equal values by lower column. k > M keeps
    all."""
    n, m = similarity.shape
    if k >= m:
        return np.ones((n, m), bool)
    keep = np.empty((n, m), bool)
    for start in range(0, n, CHUNK):
        rows = similarity[start : start + CHUNK]
        kth = -np.partition(-rows, k - 1, axis=1)[:, k - 1 : k]
        above, equal = rows > kth, rows == kth
        room = k - above.sum(axis=1, keepdims=True)
        keep[start : start + CHUNK] = above | (equal & (np.cumsum(equal, axis=1) <= room))
    return keep


def image_to_text_ranks(scores: np.ndarray, text_image: np.ndarray) -> np.ndarray:
    """Rank (from 0) of the best of each image's own captions among all texts.

    Args: scores f32[n_images, n_texts]; text_image i64[n_texts], the image of each text.
    Returns i64 of the images that have a caption, in order: how many texts of other images score at least as high.
    """
    own = scores[text_image, np.arange(len(text_image))]
    best = np.full(len(scores), -np.inf, scores.dtype)
    np.maximum.at(best, text_image, own)
    as_high = np.concatenate(
        [(scores[s : s + CHUNK] >= best[s : s + CHUNK, None]).sum(axis=1) for s in range(0, len(scores), CHUNK)]
    )
    own_as_high = np.bincount(text_image, weights=own == best[text_image], minlength=len(scores)).astype(np.int64)
    has_caption = np.bincount(text_image, minlength=len(scores)) > 0
    return (as_high - own_as_high)[has_caption]


def text_to_image_ranks(scores: np.ndarray, text_image: np.ndarray) -> np.ndarray:
    """i64[n_texts]: how many images other than its own score at least as high for each text; arguments as above."""
    own = scores[text_image, np.arange(len(text_image))]
    return sum((scores[s : s + CHUNK] >= own).sum(axis=0) for s in range(0, len(scores), CHUNK)) - 1


def recalls(ranks: np.ndarray) -> dict[str, float]:
    """{"r1", "r5", "r10", "r_mean"} in percent from ranks i64[N] that start at 0; r_mean is the mean of the three."""
    out = {f"r{k}": 100.0 * float(np.mean(ranks < k)) for k in RECALLS}
    return {**out, "r_mean": sum(out.values()) / len(RECALLS)}


def both_ways(i2t: np.ndarray, t2i: np.ndarray, text_image: np.ndarray) -> dict[str, float]:
    """Recalls of both directions in percent, their means, and "r_mean", the mean of the two means.

    Args: i2t, t2i f32[n_images, n_texts], the scores that images rank texts by, and texts images; text_image
    i64[n_texts]. Returns {"txt_r1", "txt_r5", "txt_r10", "txt_r_mean", "img_r1", ..., "r_mean"}: txt_* retrieves texts,
    img_* images.
    """
    txt = recalls(image_to_text_ranks(i2t, text_image))
    img = recalls(text_to_image_ranks(t2i, text_image))
    out = {f"txt_{name}": value for name, value in txt.items()} | {f"img_{name}": value for name, value in img.items()}
    return {**out, "r_mean": (txt["r_mean"] + img["r_mean"]) / 2}


def rerank_units(needed: np.ndarray, texts_per_unit: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the wanted pairs into units of one image and up to G = `texts_per_unit` of its texts.

    Args: needed bool[n_images, n_texts].
    Returns: image i64[U] and text i64[U,G] of each unit, -1 where a unit has fewer texts. Every wanted pair occurs
      once.
    """
    image, text = np.nonzero(needed)  # sorted by image
    per_image = np.bincount(image, minlength=len(needed))
    place = np.arange(len(image)) - (np.cumsum(per_image) - per_image)[image]  # of the pair among its image's
    units_of = -(-per_image // texts_per_unit)
    unit = (np.cumsum(units_of) - units_of)[image] + place // texts_per_unit
    texts = np.full((units_of.sum(), texts_per_unit), -1, np.int64)
    texts[unit, place % texts_per_unit] = text
    return np.repeat(np.arange(len(needed)), units_of), texts


@functools.partial(jax.jit, static_argnames=("model", "whole"))
def _embed_texts(model, whole, params, ids, txt_mask):
    _, emb = model.apply({"params": params}, ids, txt_mask, method="encode_text")
    return jax.lax.with_sharding_constraint(emb, whole)


@functools.partial(jax.jit, static_argnames=("model", "whole"))
def _encode_images(model, whole, params, img):
    """u8[B,img_h,img_w,3] -> (img_tok [B,P,D] in the compute dtype, img_emb f32[B,E])"""
    apply = functools.partial(model.apply, {"params": params})
    img_tok = encode_pixels(model, params, img)
    return jax.lax.with_sharding_constraint((img_tok, apply(img_tok, method="project_image")), (whole, whole))


@functools.partial(jax.jit, static_argnames=("model", "whole"))
def _match(model, whole, params, img_tok, ids, txt_mask):
    """img_tok [B,P,D], ids i32[B,G,T], txt_mask bool[B,G,T] -> f32[B,G], the logits of "match"."""
    apply = functools.partial(model.apply, {"params": params})
    B, G, T = ids.shape
    kv = apply(img_tok, method="image_kv")
    logits = apply(ids.reshape(B * G, T), txt_mask.reshape(B * G, T), kv, method="match")
    return jax.lax.with_sharding_constraint(logits[:, 1].astype(jnp.float32).reshape(B, G), whole)


def _on_mesh(mesh, dims: tuple, *arrays):
    """Host arrays that every process holds whole -> global arrays split by logical `dims`."""
    place = NamedSharding(mesh, sharding.partition_spec(dims))
    return [jax.make_array_from_callback(a.shape, place, a.__getitem__) for a in arrays]


def _one_behind(passes):
    """Fetches the device values of each (host value, device values) once the next pass has been started."""
    waiting = None
    for item in passes:
        if waiting is not None:
            yield waiting[0], jax.device_get(waiting[1])
        waiting = item
    if waiting is not None:
        yield waiting[0], jax.device_get(waiting[1])


def _filled(rows: np.ndarray, batch: int) -> np.ndarray:
    """Rows i64[n] extended to `batch` by repeating the first, so that filling is a harmless real row."""
    return np.concatenate([rows, np.full(batch - len(rows), rows[0])])


def _progress(steps, what: str, total: int):
    return tqdm(steps, desc=what, total=total, unit="batch", disable=jax.process_index() != 0, mininterval=1.0)


def _text_features(model, params, ids, txt_mask, mesh, batch):
    """Embeddings f32[n,E] of ids i32[n,T], txt_mask bool[n,T], in batches of `batch`."""
    whole, n = NamedSharding(mesh, PartitionSpec()), len(ids)

    def passes():
        for start in _progress(range(0, n, batch), "text features", math.ceil(n / batch)):
            rows = np.arange(start, min(start + batch, n))
            filled = _filled(rows, batch)
            yield (
                rows,
                _embed_texts(model, whole, params, *_on_mesh(mesh, ("act_batch",), ids[filled], txt_mask[filled])),
            )

    return np.concatenate([np.float32(emb)[: len(rows)] for rows, emb in _one_behind(passes())])


def _image_features(model, params, data, mesh, batch):
    """(img_tok [n_images,P,D] in the compute dtype, img_emb f32[n_images,E], readable bool[n_images])"""
    whole = NamedSharding(mesh, PartitionSpec())

    def passes():
        batches = data.image_batches(batch)
        for b in _progress(batches, "image features", math.ceil(data.n_images / batch)):
            yield b["index"], _encode_images(model, whole, params, *_on_mesh(mesh, ("act_batch",), b["img"]))

    img_tok = img_emb = None
    readable = np.zeros(data.n_images, bool)
    for index, (tok, emb) in _one_behind(passes()):
        if img_tok is None:
            img_tok = np.zeros((data.n_images, *tok.shape[1:]), tok.dtype)
            img_emb = np.zeros((data.n_images, emb.shape[1]), np.float32)
        real = index >= 0
        img_tok[index[real]], img_emb[index[real]], readable[index[real]] = tok[real], emb[real], True
    return img_tok, img_emb, readable


def _match_scores(model, params, img_tok, ids, txt_mask, needed, mesh, batch, texts_per_unit):
    """f32[n_images, n_texts]: logit of "match" where bool `needed` is set, 0 elsewhere."""
    whole = NamedSharding(mesh, PartitionSpec())
    image, text = rerank_units(needed, texts_per_unit)

    def passes():
        for start in _progress(range(0, len(image), batch), "re-ranking", math.ceil(len(image) / batch)):
            units = np.arange(start, min(start + batch, len(image)))
            filled = _filled(units, batch)
            rows = np.maximum(text[filled], 0)  # B G
            yield (
                units,
                _match(
                    model,
                    whole,
                    params,
                    *_on_mesh(mesh, ("act_batch",), img_tok[image[filled]], ids[rows], txt_mask[rows]),
                ),
            )

    scores = np.zeros(needed.shape, np.float32)
    for units, logits in _one_behind(passes()):
        of_units = logits[: len(units)]  # U G
        real = text[units] >= 0
        scores[np.broadcast_to(image[units, None], real.shape)[real], text[units][real]] = of_units[real]
    return scores


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


class Scores(NamedTuple):
    """Score matrices f32[n_images, n_texts] of the readable images and their texts, and i64[n_texts], each text's
    image."""

    cosine: np.ndarray
    i2t: np.ndarray  # what images rank texts by: logit + cosine for each image's shortlist, else -100
    t2i: np.ndarray  # what texts rank images by, likewise
    text_image: np.ndarray


def two_stage_scores(cfg, model, params, data, tokenizer, mesh) -> Scores:
    """Scores of both stages; arguments and errors as `evaluate`."""
    _check(cfg, data)
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = -(-cfg.eval.batch // split) * split
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.shardings_for(params, mesh))
        img_tok, img_emb, readable = _image_features(model, params, data, mesh, batch)
        kept, text_image = _drop_unreadable(readable, np.asarray(data.text_image))
        ids, txt_mask = tokenizer.encode([c for c, keep in zip(data.captions, kept) if keep], cfg.text.max_len)
        txt_emb = _text_features(model, params, ids, txt_mask, mesh, batch)
        if not readable.all():
            img_tok, img_emb = img_tok[readable], img_emb[readable]
        cosine = img_emb @ txt_emb.T
        _check_finite(cosine, "embeddings")
        texts_of = shortlist(cosine, _clipped(cfg.eval.k, len(txt_emb), "texts"))
        images_of = shortlist(cosine.T, _clipped(cfg.eval.k, len(img_emb), "images")).T
        needed = texts_of | images_of
        log.info("retrieval: %d images, %d texts, %d pairs to re-rank", *needed.shape, needed.sum())
        scores = _match_scores(model, params, img_tok, ids, txt_mask, needed, mesh, batch, cfg.eval.rerank_texts)
    _check_finite(scores, "matching logits")
    scores += cosine
    only = lambda shortlisted: np.where(shortlisted, scores, np.float32(UNSCORED))
    return Scores(cosine, only(texts_of), only(images_of), text_image)


def evaluate(cfg, model, params, data, tokenizer, mesh) -> dict[str, float]:
    """Image-text retrieval of `data` (a data.pipeline.EvalData) in both directions, re-ranked and by cosine alone.

    Reads cfg.eval.{k, batch, rerank_texts} and cfg.text.max_len; batches are rounded up to the devices that split them.
    Results do not depend on the batch sizes or the mesh beyond rounding. Every process calls it with the same data.
    Host memory: n_images * P * D values in the compute dtype, and a few f32 matrices [n_images, n_texts].

    Returns percent: "txt_r1", "txt_r5", "txt_r10", "txt_r_mean" (image to text: best rank among the image's captions),
    "img_*" (text to image), "r_mean" of both, and the same with the prefix "itc_" by cosine alone.
    Raises ValueError if no readable image has a caption, a setting is not positive, or features are not finite.
    """
    scores = two_stage_scores(cfg, model, params, data, tokenizer, mesh)
    by_cosine = both_ways(scores.cosine, scores.cosine, scores.text_image)
    return both_ways(scores.i2t, scores.t2i, scores.text_image) | {f"itc_{name}": v for name, v in by_cosine.items()}


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


def table(result: dict) -> str:
    """Recalls of both directions in percent, re-ranked and by cosine alone, beside what chance would give.

    result: of `evaluate`, with "images" and "texts", how many there are.
    """
    images, texts = result["images"], result["texts"]
    lines = [f"{f'{images} images, {texts} captions':28} {'R@1':>7} {'R@5':>7} {'R@10':>7}"]
    for name, side in (("image to text", "txt"), ("text to image", "img")):
        for suffix, prefix in (("", ""), (", cosine alone", "itc_")):
            numbers = [result[f"{prefix}{side}_r{k}"] for k in RECALLS]
            lines.append(f"{name + suffix:28} " + " ".join(f"{n:7.1f}" for n in numbers))
        chance = [chance_recall(images, texts, k, side) for k in RECALLS]
        lines.append(f"{name + ', chance':28} " + " ".join(f"{n:7.1f}" for n in chance))
    return "\n".join(lines)


def chance_recall(images: int, texts: int, k: int, side: str) -> float:
    """R@k in percent of a random order. side "img": one image is right; "txt": texts/images of the texts are right."""
    if side == "img":
        return 100.0 * min(k, images) / images
    right = max(1, round(texts / images))
    return 100.0 * (1 - math.comb(texts - right, min(k, texts)) / math.comb(texts, min(k, texts)))
