"""Floating-point operations of training, captioning, filtering and evaluation, from the sizes in the config and, as a
cross-check, from a jaxpr.

A multiply-add counts as two. Only matrix products and convolutions are counted: norms, softmax, biases and the
optimiser are left out, as is usual for model FLOPs. A training step is counted per image-text pair: the forward pass
plus twice the
forward of what trains: one product for the gradient of the weights, one for that of the inputs, which is left out where
nobody needs it (pixels, momentum features, queue). The momentum pass has no backward. Recomputation by
`model.remat` is not counted, and frozen parts (`optim.freeze`) are counted as if they trained, but for BLIP-2's tower
and language model. Captioning and filtering
are counted per image; `model` is a `cfg.model`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from blip_jax.data import windows


def positions(model, frames: int = 1) -> int:
    """P, image positions; of a video those of all frames."""
    return frames * ((model.img_size // model.vit.patch) ** 2 + 1)


def vision(model) -> tuple[float, float]:
    """(FLOPs of the ViT for one image, of which patch embedding)."""
    v = model.vit
    P = positions(model)
    embed = 2 * (P - 1) * v.width * 3 * v.patch**2
    dense = 2 * P * (4 * v.width**2 + 2 * v.width * v.mlp)  # q, k, v, out, two of the mlp
    mixing = 4 * P**2 * v.width  # scores, weighted sum
    return embed + v.depth * (dense + mixing), embed


def text_layer(med, T: int, queries: int, P: int = 0) -> float:
    """One MED layer for one text of T positions, of which `queries` are computed; P image positions, 0: text mode."""
    D = med.width
    own = 2 * T * 2 * D**2 + 2 * queries * (2 * D**2 + 2 * D * med.mlp) + 4 * queries * T * D
    cross = 2 * queries * 2 * D**2 + 4 * queries * P * D  # query, out, scores, weighted sum; keys and values apart
    return own + (cross if P else 0)


def text(model, T: int, image: bool, frames: int = 1) -> float:
    """All MED layers for every position of one text, in text mode or with an image (a video of so many frames) whose
    keys and values are there."""
    return model.med.layers * text_layer(model.med, T, T, positions(model, frames) if image else 0)


def _match(model, T: int, original: bool, frames: int = 1) -> float:
    """Matching one text with an image: the head reads position 0 alone, so our last layer has no other query."""
    med, P = model.med, positions(model, frames)
    saved = 0.0 if original else text_layer(med, T, T, P) - text_layer(med, T, 1, P)
    return text(model, T, True, frames) - saved + 2 * med.width * 2


def image_kv(model, frames: int = 1) -> float:
    """Cross-attention keys and values of one image, or of a video, in all MED layers."""
    return model.med.layers * 2 * positions(model, frames) * model.vit.width * 2 * model.med.width


def lm_head(med) -> float:
    """Transform and logits of one position."""
    return 2 * med.width**2 + 2 * med.width * med.vocab_size


def _contrastive(cfg) -> tuple[float, float]:
    """(forward, backward) of projections and similarities for one pair; the momentum features have no gradient."""
    E, loss = cfg.model.embed_dim, cfg.loss
    project = 2 * E * (cfg.model.vit.width + cfg.model.med.width)
    local = loss.group_size or cfg.train.batch // cfg.optim.accumulate
    if not loss.momentum:  # one matrix, read by rows and by columns; both sides have gradients
        similarity = 2 * E * local
        return project + similarity, 2 * (project + similarity)
    similarity = 2 * E * (local + loss.queue)
    return 2 * project + 4 * similarity, 2 * project + 2 * similarity


def _image_parts(cfg, original: bool) -> dict[str, float]:
    """Forward FLOPs of the ViT, and of the keys and values that all text passes share."""
    return {"vision": vision(cfg.model)[0], "image_kv": 0.0 if original else image_kv(cfg.model)}


def _encoder_parts(cfg, T: int, original: bool) -> tuple[dict[str, float], float]:
    """(forward FLOPs by part, backward FLOPs of the similarities) of ITC and ITM for one pair."""
    model, alone = cfg.model, text(cfg.model, T, False)
    itc, itc_backward = _contrastive(cfg)
    momentum = 1 if cfg.loss.momentum else 0
    return {
        "momentum_vision": momentum * vision(model)[0],
        "text": alone,
        "momentum_text": momentum * alone,
        "match": 3 * (_match(model, T, original) + (image_kv(model) if original else 0)),
        "itc": itc,
    }, itc_backward


def _decoder_parts(cfg, T: int, original: bool) -> dict[str, float]:
    """Forward FLOPs of language modelling for one pair."""
    return {
        "decoder": text(cfg.model, T, True) + (image_kv(cfg.model) if original else 0),
        "lm_head": (T if original else T - 1) * lm_head(cfg.model.med),  # the last position predicts nothing
    }


def _step(cfg, T: int | None, encoder: bool, decoder: bool, original: bool) -> dict[str, float]:
    parts, itc_backward, T = _image_parts(cfg, original), 0.0, T or cfg.text.max_len
    if encoder:
        encoder_parts, itc_backward = _encoder_parts(cfg, T, original)
        parts |= encoder_parts
    if decoder:
        parts |= _decoder_parts(cfg, T, original)
    forward = sum(parts.values())
    trained = sum(n for part, n in parts.items() if part not in ("momentum_vision", "momentum_text", "itc"))
    return {**parts, "forward": forward, "step": forward + 2 * trained - vision(cfg.model)[1] + itc_backward}


def pretrain_step(cfg, original: bool = False, T: int | None = None) -> dict[str, float]:
    """FLOPs per image-text pair of a pre-training step (BLIP paper, section 3.2: ITC, ITM and LM).

    `original`: the wiring of the published PyTorch code, where each of the four passes over an image projects its own
    cross-attention keys and values, matching computes every position of the last layer, and the language modelling head
    that of every position; these products are then in the rows of those passes. Otherwise keys and values are one row.
    `T`: text positions, cfg.text.max_len unless given.
    Returns the forward count by part (momentum parts are 0 where `loss.momentum` is off), "forward" and "step".
    """
    return _step(cfg, T, True, True, original)


def retrieval_step(cfg, original: bool = False, T: int | None = None) -> dict[str, float]:
    """FLOPs per image-text pair of a retrieval fine-tuning step (ITC and ITM); arguments and result as
    `pretrain_step`."""
    return _step(cfg, T, True, False, original)


def caption_step(cfg, original: bool = False, T: int | None = None) -> dict[str, float]:
    """FLOPs per image-text pair of a captioner's fine-tuning step (LM alone); arguments and result as
    `pretrain_step`."""
    return _step(cfg, T, False, True, original)


def qformer_layers(model, T: int, written: int = 0) -> float:
    """All Q-Former layers for T positions that see each other, and `written` ones before them; without the image."""
    q = model.qformer
    return q.layers * (text_layer(q, T, T) + 4 * T * written * q.width)


def qformer_kv(model) -> float:
    """Cross-attention keys and values of one image in all Q-Former layers that look at it."""
    q = model.qformer
    return q.layers // 2 * 2 * positions(model) * model.vit.width * 2 * q.width


def looking(model) -> float:
    """Cross-attention of the queries to one image in all Q-Former layers that have one, keys and values apart."""
    q = model.qformer
    return q.layers // 2 * (2 * q.queries * 2 * q.width**2 + 4 * q.queries * positions(model) * q.width)


def _blip2_match(model, T: int) -> float:
    """Matching one text of T positions with an image whose keys and values are there, by the first stage."""
    q = model.qformer
    return qformer_layers(model, q.queries + T) + looking(model) + 2 * q.queries * q.width * 2


def blip2_stage1_step(cfg, T: int | None = None, frozen: bool = True, itg: bool = True) -> dict[str, float]:
    """FLOPs per image-text pair of a step of BLIP-2's first stage (BLIP-2 paper, section 3.1), result as
    `pretrain_step`; frozen: the tower has no backward; itg: texts are generated.

    Keys and values of an image are computed once for the queries and the three matching groups, and the text that is
    generated reads the queries' of the same pass.
    """
    model, T = cfg.model, T or cfg.text.max_len
    q, E, rows = model.qformer, model.embed_dim, cfg.loss.group_size or cfg.train.batch // cfg.optim.accumulate
    project, similarity = 2 * E * q.width * (q.queries + 1), 2 * 2 * E * q.queries * rows
    parts = {
        "vision": vision(model)[0],
        "image_kv": qformer_kv(model),
        "queries": qformer_layers(model, q.queries) + looking(model),
        "text": qformer_layers(model, T),
        "match": 3 * _blip2_match(model, T),
        "decoder": qformer_layers(model, T - 1, q.queries) if itg else 0.0,
        "lm_head": (T - 1) * lm_head(q) if itg else 0.0,
        "itc": project + similarity,
    }
    forward = sum(parts.values())
    # of similarities the columns have no gradient; a trained tower has none of pixels
    whole = forward - parts["vision"] - similarity
    backward = 2 * whole + similarity + (0.0 if frozen else 2 * parts["vision"] - vision(model)[1])
    return {**parts, "forward": forward, "step": forward + backward}


def language_model(llm, T: int, U: int = 0) -> tuple[float, float]:
    """(Products with matrices, scores and weighted sums) of all layers of a language model, `cfg.model.llm`, over T
    positions, of T5 its decoder over U too; the head apart."""
    D, F = llm.width, llm.mlp
    if llm.kind == "opt":
        project = 2 * T * 2 * D * llm.embed_width if llm.embed_width != D else 0
        return llm.layers * 2 * T * (4 * D**2 + 2 * D * F) + project, llm.layers * 4 * T * T * D
    inner, decoders = llm.heads * llm.head_dim, llm.get("decoder_layers", 0) or llm.layers
    own = lambda n: 2 * n * (4 * D * inner + 3 * D * F)
    cross = 2 * U * 2 * D * inner + 2 * T * 2 * D * inner
    mixing = llm.layers * T * T + decoders * (U * U + U * T)
    return llm.layers * own(T) + decoders * (own(U) + cross), 4 * inner * mixing


def blip2_stage2_step(
    cfg, T: int | None = None, *, U: int = 0, question: int = 0, frozen: bool = True, llm_frozen: bool = True
) -> dict[str, float]:
    """FLOPs per image-text pair of a step of BLIP-2's second stage (BLIP-2 paper, section 3.2), result as
    `pretrain_step`; T: positions of the text, of T5's both where U does not say those of what it writes; question: that
    the Q-Former reads. frozen: the tower has no backward; llm_frozen: the language model has the gradients of its
    inputs alone.
    """
    model, T = cfg.model, T or cfg.text.max_len
    q, llm, U = model.qformer, model.llm, U or T
    width, (matrices, mixing) = llm.get("embed_width", llm.width), language_model(llm, q.queries + T, U)
    parts = {
        "vision": vision(model)[0],
        "image_kv": qformer_kv(model),
        "queries": qformer_layers(model, q.queries + question) + looking(model),
        "llm_proj": 2 * q.queries * q.width * width,
        "llm": matrices + mixing,
        "lm_head": (U if llm.kind == "t5" else T) * 2 * width * llm.vocab_size,
    }
    forward = sum(parts.values())
    frozen_matrices = matrices + parts["lm_head"] if llm_frozen else 0.0  # no gradient of these
    backward = 2 * (forward - parts["vision"]) - frozen_matrices
    backward += 0.0 if frozen else 2 * parts["vision"] - vision(model)[1]
    return {**parts, "forward": forward, "step": forward + backward}


def trained(cfg, parts: dict[str, float], unneeded: float | None = None) -> dict[str, float]:
    """The count of a step from forward FLOPs by part, all of which train: adds "forward" and "step".

    unneeded: FLOPs of a gradient that nobody needs, that of pixels; None: of one picture.
    """
    forward = sum(parts.values())
    return {**parts, "forward": forward, "step": 3 * forward - (vision(cfg.model)[1] if unneeded is None else unneeded)}


def bucketed_step(cfg, step: Callable, lengths: np.ndarray) -> float:
    """FLOPs per pair of a step of `cfg`, the mean over the batches that text.buckets make of texts of `lengths`,
    i32[n].

    step: the count of one length, as `pretrain_step`. lengths: positions with [CLS] and [SEP], in the order of the
    data; what does not fill a batch at the end is left out.
    ValueError: not one batch is full.
    """
    size, batch = cfg.text.bucket_window * cfg.train.batch, cfg.train.batch
    if len(lengths) < batch:
        raise ValueError(f"{len(lengths)} lengths do not fill a batch of train.batch={batch}: give more")
    parts = [lengths[first : first + size] for first in range(0, len(lengths), size)]
    T = np.concatenate([windows.cut(part[: len(part) // batch * batch], batch, cfg.text.buckets)[1] for part in parts])
    return sum(n * step(cfg, T=int(t))["step"] for t, n in zip(*np.unique(T, return_counts=True))) / len(T)


def dialog(model, C: int, T: int, rows: int) -> dict[str, float]:
    """Forward FLOPs by part of `rows` texts of T positions about one image with a caption of C (`models.dialog`).

    States, keys and values of image and caption are computed once for all of them, and the last layer of a text has one
    query. Every row is computed as a whole: it is read in both directions, so that rows with the same history share
    nothing else.
    """
    med, S = model.med, positions(model) + C
    return {
        "vision": vision(model)[0],
        "caption": text(model, C, False),
        "seen_kv": med.layers * 2 * S * model.vit.width * 2 * med.width,
        "dialog": rows * ((med.layers - 1) * text_layer(med, T, T, S) + text_layer(med, T, 1, S)),
        "head": rows * 2 * med.width * 2,
    }


def encode_image(model) -> float:
    """FLOPs of the ViT for one image."""
    return vision(model)[0]


def caption_image(model, prompt: int, tokens: int, n: int = 1) -> float:
    """FLOPs of n captions of one image, each of `tokens` tokens after `prompt` positions (`programs.captioner`).

    The ViT, keys and values and the prompt are one pass for all n (beams count as texts); the prompt gives the first
    token, and every further one reads a cache as long as the whole text.
    """
    med, cache = model.med, prompt + tokens - 1
    extend = lambda t: text(model, t, True) + med.layers * 4 * t * (cache - t) * med.width + lm_head(med)
    return encode_image(model) + image_kv(model) + extend(prompt) + n * (tokens - 1) * extend(1)


def blip2_look(model, question: int = 0) -> float:
    """FLOPs of tower and queries for one image; question: positions that the Q-Former reads beside it."""
    queries = qformer_layers(model, model.qformer.queries + question) + looking(model)
    return vision(model)[0] + qformer_kv(model) + queries


def blip2_caption_image(model, prompt: int, tokens: int, n: int = 1, question: int = 0) -> float:
    """FLOPs of n texts of one image, each of `tokens` tokens after `prompt` positions, by BLIP-2: as `caption_image`
    the Q-Former's, whose prompt is [DEC] at least, or with a language model as `inference.language.generating`, whose
    Q-Former may read a `question`.
    """
    q, found = model.qformer, blip2_look(model, question)
    if not len(model.llm):
        cache = prompt + tokens - 1
        extend = lambda t: qformer_layers(model, t, q.queries + cache - t) + lm_head(q)
        return found + extend(prompt) + n * (tokens - 1) * extend(1)
    llm, read = model.llm, q.queries + prompt
    found += 2 * q.queries * q.width * llm.get("embed_width", llm.width)
    if llm.kind == "opt":  # the pass over the prompt gives the first token, slots are those of all positions
        first = sum(language_model(llm, read)) + 2 * llm.embed_width * llm.vocab_size
        return found + first + n * (tokens - 1) * next_token(llm, read + tokens)
    # T5's start id is read once for all n texts; `language_model` counts what its decoder projects of the encoded
    return found + sum(language_model(llm, read)) + (1 + n * (tokens - 1)) * next_token(llm, tokens + 1, read)


def next_token(llm, cache: int, read: int = 0) -> float:
    """FLOPs of a token of a language model, `cfg.model.llm`, whose self-attentions have `cache` slots, T5's decoder
    behind `read` encoded positions; the head included."""
    if llm.kind == "opt":
        mixing, matrices = 4 * llm.width * llm.layers * cache, language_model(llm, 1)[0]
    else:
        decoders = llm.get("decoder_layers", 0) or llm.layers
        mixing, matrices = 4 * llm.heads * llm.head_dim * decoders * (cache + read), language_model(llm, 0, 1)[0]
    return matrices + mixing + 2 * llm.get("embed_width", llm.width) * llm.vocab_size


def filter_image(model, T: int, texts: int, itc: bool = True, original: bool = False) -> float:
    """FLOPs of scoring `texts` texts of T positions against one image (`inference.programs.score`): matching and
    cosine.

    itc False: matching alone; original: matching as the published code, with every position of the last layer.
    """
    E, cosine = model.embed_dim, 0.0
    if itc:
        cosine = 2 * E * model.vit.width + texts * (text(model, T, False) + 2 * E * model.med.width + 2 * E)
    return encode_image(model) + image_kv(model) + texts * _match(model, T, original) + cosine


def rank_image(model, T: int, answer: int, k: int, candidates: int) -> float:
    """The fewest FLOPs with which a question of T positions about one image can have `k` of its `candidates` scored in
    full, answers of `answer` positions with [DEC] and [SEP] (`inference.programs.ranking`).

    [DEC] is read once for all of them, and the last position predicts nothing. An image has one question.
    """
    med, own, k = model.med, answer - 2, min(k, candidates)
    each = med.layers * (text_layer(med, own, own, T) + 4 * own * med.width) + own * lm_head(med)  # [DEC]'s key too
    return encode_image(model) + image_kv(model) + question(model, T) + generated(model, T, 1) + k * each


def question(model, T: int, frames: int = 1) -> float:
    """FLOPs of a question of T positions about an image, or a video, whose keys and values are there: its states, and
    what the answer decoder sees of them (`inference.programs.question_kv`)."""
    med = model.med
    return text(model, T, True, frames) + med.layers * 2 * T * med.width * 2 * med.width


def generated(model, T: int, tokens: int, n: int = 1) -> float:
    """FLOPs of n answers to a question of T positions, each of `tokens` tokens after [DEC]
    (`inference.programs.answers`).

    [DEC] is read once for all n and gives the first token; every pass reads a cache as long as the whole answer.
    """
    med = model.med
    token = med.layers * (text_layer(med, 1, 1, T) + 4 * (tokens - 1) * med.width) + lm_head(med)
    return (1 + n * (tokens - 1)) * token


def ranked(model, T: int, answer: int, k: int) -> float:
    """FLOPs of scoring k candidates of `answer` positions in full, of a question of T positions
    (`inference.programs.rank_answers`): each is read from [DEC] on, which `rank_image` counts once."""
    med, own = model.med, answer - 1  # the last position predicts nothing
    return generated(model, T, 1) + k * (med.layers * text_layer(med, own, own, T) + own * lm_head(med))


def retrieval_eval(cfg, images: int, texts: int, frames: int = 1) -> dict[str, float]:
    """FLOPs of a retrieval evaluation (blip_jax/tasks/two_stage.py): {"encode", "rerank", "total"}; frames: of each
    video, where that is what `images` counts.

    Each image re-ranks its eval.k texts and each text its eval.k images; counted as if no pair were in both shortlists
    (at most), in passes of eval.rerank_texts texts an image, all full, each with its own keys and values.
    """
    group, k = cfg.eval.rerank_texts, cfg.eval.k
    picture, words, unit = retrieval_passes(cfg.model, cfg.text.max_len, group, frames)
    encode = images * picture + texts * words
    pairs = min(images * min(k, texts) + texts * min(k, images), images * texts)
    rerank = pairs / group * unit
    return {"encode": encode, "rerank": rerank, "total": encode + rerank}


def retrieval_passes(model, T: int, texts: int, frames: int = 1) -> tuple[float, float, float]:
    """FLOPs of what a retrieval evaluation passes over, by BLIP or by BLIP-2's first stage: a picture, or a video of so
    many frames; a text of T positions; a picture's keys and values with `texts` texts matched with it."""
    project = 2 * model.embed_dim
    if "qformer" not in model:
        picture = frames * (encode_image(model) + project * model.vit.width)
        words = text(model, T, False) + project * model.med.width
        return picture, words, rerank_unit(model, T, texts, frames)
    q = model.qformer
    picture = blip2_look(model) + project * q.queries * q.width
    return picture, qformer_layers(model, T) + project * q.width, qformer_kv(model) + texts * _blip2_match(model, T)


def rerank_unit(model, T: int, texts: int, frames: int = 1) -> float:
    """FLOPs of one pass of re-ranking: keys and values of an image, or of a video, and `texts` texts of T positions
    matched with it."""
    return image_kv(model, frames) + texts * _match(model, T, False, frames)


def count_jaxpr(jaxpr: Jaxpr | ClosedJaxpr, trips: int | None = None) -> float:
    """FLOPs of the matrix products and convolutions of a jaxpr, its inner jaxprs included.

    A scan counts its body times its length, a Pallas kernel its own times its grid, a conditional its most expensive
    branch, a `while` with a product inside its body times `trips`; without `trips` that has no count: ValueError.
    """
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return sum(_count_equation(eqn, trips) for eqn in jaxpr.eqns)


def _count_equation(eqn, trips: int | None) -> float:
    if eqn.primitive.name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2.0 * eqn.outvars[0].aval.size * math.prod(lhs[d] for d in contract)
    if eqn.primitive.name == "conv_general_dilated":
        rhs, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
        return 2.0 * eqn.outvars[0].aval.size * math.prod(rhs) / rhs[numbers.rhs_spec[0]]
    inner = [count_jaxpr(j, trips) for p in eqn.params.values() for j in _jaxprs_in(p)]
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"] * sum(inner)
        case "pallas_call":
            return math.prod(eqn.params["grid_mapping"].grid) * sum(inner)
        case "cond":
            return max(inner)
        case "shard_map":
            return eqn.params["mesh"].size * sum(inner)
        case "while" if sum(inner):
            if trips is None:
                raise ValueError(
                    "count_jaxpr: a while loop with matrix products has no fixed count: use scan or fori_loop "
                    "with static bounds, or give trips"
                )
            return trips * sum(inner)
    return sum(inner)


def _jaxprs_in(param) -> list:
    if isinstance(param, (Jaxpr, ClosedJaxpr)):
        return [param]
    if isinstance(param, (tuple, list)):
        return [j for item in param for j in _jaxprs_in(item)]
    return []


def count_function(f, *args, trips: int | None = None) -> float:
    """FLOPs of the matrix products of `f(*args)`, traced and not run; `args` may be arrays or ShapeDtypeStructs."""
    return count_jaxpr(jax.make_jaxpr(f)(*args), trips)
