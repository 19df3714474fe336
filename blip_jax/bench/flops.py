"""Floating-point operations of a training step, from the sizes in the config and, as a cross-check, from a jaxpr.

A multiply-add counts as two. Only matrix products and convolutions are counted: norms, softmax, biases and the optimiser
are left out, as is usual for model FLOPs. All counts are per image-text pair. A step is the forward pass plus twice the
forward of what trains: one product for the gradient of the weights, one for that of the inputs, which is left out where
nobody needs it (pixels, momentum features, queue). The momentum pass has no backward. Recomputation by
`model.remat` is not counted, and frozen parts (`optim.freeze`) are counted as if they trained.
"""

from __future__ import annotations

import math

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def _positions(cfg) -> int:
    """P, image positions."""
    return (cfg.model.img_size // cfg.model.vit.patch) ** 2 + 1


def _vision(cfg) -> tuple[float, float]:
    """(FLOPs of the ViT for one image, of which patch embedding)."""
    v = cfg.model.vit
    positions = _positions(cfg)
    embed = 2 * (positions - 1) * v.width * 3 * v.patch**2
    dense = 2 * positions * (4 * v.width**2 + 2 * v.width * v.mlp)  # q, k, v, out, two of the mlp
    mixing = 4 * positions**2 * v.width  # scores, weighted sum
    return embed + v.depth * (dense + mixing), embed


def _text_layer(med, T: int, queries: int, P: int = 0) -> float:
    """One MED layer for one text of T positions, of which `queries` are computed; P image positions, 0: text mode."""
    D = med.width
    own = 2 * T * 2 * D**2 + 2 * queries * (2 * D**2 + 2 * D * med.mlp) + 4 * queries * T * D
    cross = 2 * queries * 2 * D**2 + 4 * queries * P * D  # query, out, scores, weighted sum; keys and values apart
    return own + (cross if P else 0)


def _image_kv(cfg) -> float:
    """Cross-attention keys and values of one image, in all MED layers."""
    return cfg.model.med.layers * 2 * _positions(cfg) * cfg.model.vit.width * 2 * cfg.model.med.width


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
    return {"vision": _vision(cfg)[0], "image_kv": 0.0 if original else _image_kv(cfg)}


def _encoder_parts(cfg, original: bool) -> tuple[dict[str, float], float]:
    """(forward FLOPs by part, backward FLOPs of the similarities) of ITC and ITM for one pair."""
    med, T, P = cfg.model.med, cfg.text.max_len, _positions(cfg)
    text, full = (med.layers * _text_layer(med, T, T, p) for p in (0, P))
    # the matching head reads position 0 alone, so the last layer needs no other query
    group = full + _image_kv(cfg) if original else full - _text_layer(med, T, T, P) + _text_layer(med, T, 1, P)
    itc, itc_backward = _contrastive(cfg)
    momentum = 1 if cfg.loss.momentum else 0
    return {
        "momentum_vision": momentum * _vision(cfg)[0],
        "text": text,
        "momentum_text": momentum * text,
        "match": 3 * (group + 2 * med.width * 2),
        "itc": itc,
    }, itc_backward


def _decoder_parts(cfg, original: bool) -> dict[str, float]:
    """Forward FLOPs of language modelling for one pair."""
    med, T = cfg.model.med, cfg.text.max_len
    full = med.layers * _text_layer(med, T, T, _positions(cfg))
    head = 2 * med.width**2 + 2 * med.width * med.vocab_size  # transform, logits
    return {
        "decoder": full + (_image_kv(cfg) if original else 0),
        "lm_head": (T if original else T - 1) * head,  # the last position predicts nothing
    }


def _step(cfg, encoder: bool, decoder: bool, original: bool) -> dict[str, float]:
    parts, itc_backward = _image_parts(cfg, original), 0.0
    if encoder:
        encoder_parts, itc_backward = _encoder_parts(cfg, original)
        parts |= encoder_parts
    if decoder:
        parts |= _decoder_parts(cfg, original)
    forward = sum(parts.values())
    trained = sum(n for part, n in parts.items() if part not in ("momentum_vision", "momentum_text", "itc"))
    return {**parts, "forward": forward, "step": forward + 2 * trained - _vision(cfg)[1] + itc_backward}


def pretrain_step(cfg, original: bool = False) -> dict[str, float]:
    """FLOPs per image-text pair of a pre-training step (BLIP paper, section 3.2: ITC, ITM and LM).

    `original`: the wiring of the published PyTorch code, where each of the four passes over an image projects its own
    cross-attention keys and values, matching computes every position of the last layer, and the language modelling head
    that of every position; these products are then in the rows of those passes. Otherwise keys and values are one row.
    Returns the forward count by part (momentum parts are 0 where `loss.momentum` is off), "forward" and "step".
    """
    return _step(cfg, True, True, original)


def retrieval_step(cfg, original: bool = False) -> dict[str, float]:
    """FLOPs per image-text pair of a retrieval fine-tuning step (ITC and ITM); arguments and result as `pretrain_step`."""
    return _step(cfg, True, False, original)


def caption_step(cfg, original: bool = False) -> dict[str, float]:
    """FLOPs per image-text pair of a captioner's fine-tuning step (LM alone); arguments and result as `pretrain_step`."""
    return _step(cfg, False, True, original)


STEPS = {"pretrain": pretrain_step, "retrieval": retrieval_step, "caption": caption_step}


def count_jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """FLOPs of the matrix products and convolutions of a jaxpr, its inner jaxprs included.

    A scan counts its body times its length, a conditional its most expensive branch. A `while` with a product inside has
    no count: ValueError.
    """
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return sum(_count_equation(eqn) for eqn in jaxpr.eqns)


def _count_equation(eqn) -> float:
    if eqn.primitive.name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2.0 * eqn.outvars[0].aval.size * math.prod(lhs[d] for d in contract)
    if eqn.primitive.name == "conv_general_dilated":
        rhs, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
        return 2.0 * eqn.outvars[0].aval.size * math.prod(rhs) / rhs[numbers.rhs_spec[0]]
    inner = [count_jaxpr(j) for p in eqn.params.values() for j in _jaxprs_in(p)]
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"] * sum(inner)
        case "cond":
            return max(inner)
        case "shard_map":
            return eqn.params["mesh"].size * sum(inner)
        case "while" if sum(inner):
            raise ValueError("count_jaxpr: a while loop with matrix products has no fixed count: use scan or fori_loop "
                             "with static bounds")
    return sum(inner)


def _jaxprs_in(param) -> list:
    if isinstance(param, (Jaxpr, ClosedJaxpr)):
        return [param]
    if isinstance(param, (tuple, list)):
        return [j for item in param for j in _jaxprs_in(item)]
    return []


def count_function(f, *args) -> float:
    """FLOPs of the matrix products of `f(*args)`, traced and not run; `args` may be arrays or ShapeDtypeStructs."""
    return count_jaxpr(jax.make_jaxpr(f)(*args))
