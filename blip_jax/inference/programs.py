"""What the verbs of pretrained.py run on the device: functions of (params, rows of arrays), for jax.jit. Captions:
capfilt/caption.py.

Row b of every argument and result belongs to the same image, so rows can be padded and shared out over devices.
"""

from __future__ import annotations

import functools
from typing import Callable

import jax
import jax.numpy as jnp

from blip_jax.decode import beam
from blip_jax.models.blip import unit
from blip_jax.models.vision.vit import encode_pixels, normalize_pixels


def view(model, projected: bool) -> Callable:
    """(params, img u8[B,S,S,3]) -> {"kv": keys and values of the images, "img_emb": f32[B,E] if `projected`}."""

    def run(params, img):
        apply = functools.partial(model.apply, {"params": params})
        img_tok = encode_pixels(model, params, img)
        out = {"kv": apply(img_tok, method="image_kv")}
        return out | {"img_emb": apply(img_tok, method="project_image")} if projected else out

    return run


def text_embedding(model) -> Callable:
    """(params, ids i32[B,T], txt_mask bool[B,T]) -> {"txt_emb": f32[B,E]}, of unit norm."""
    return lambda params, ids, txt_mask: {
        "txt_emb": model.apply({"params": params}, ids, txt_mask, method="encode_text")[1]
    }


def matching(model, first_id: int) -> Callable:
    """(params, kv of B images, ids i32[B,G,T], txt_mask bool[B,G,T]) -> f32[B,G], probability that a text belongs to
    its image.

    ids and txt_mask may be [1,G,T]: the same texts for every image. `first_id` begins each text.
    """

    def run(params, kv, ids, txt_mask):
        (B, *_), (_, G, T) = kv[0][0].shape, ids.shape
        ids, txt_mask = (jnp.broadcast_to(x, (B, G, T)).reshape(B * G, T) for x in (ids, txt_mask))
        logits = model.apply({"params": params}, ids, txt_mask, kv, first_id=first_id, method="match")
        return jax.nn.softmax(logits, axis=-1)[:, 1].reshape(B, G)

    return run


def image_features(model, projected: bool) -> Callable:
    """(params, img u8[B,S,S,3]) -> {"image_embeds": f32[B,P,D], "image_embeds_proj": f32[B,P,E] if `projected`}."""

    def run(params, img):
        img_tok = encode_pixels(model, params, img).astype(jnp.float32)
        return {
            "image_embeds": img_tok,
            **_projected(model, params, img_tok, "image_embeds_proj", "vision_proj", projected),
        }

    return run


def text_features(model, projected: bool) -> Callable:
    """(params, ids i32[B,T], txt_mask bool[B,T]) -> {"text_embeds": f32[B,T,D], "text_embeds_proj": f32[B,T,E] if
    `projected`}."""

    def run(params, ids, txt_mask):
        encode = lambda blip, ids, txt_mask: blip.med(ids, txt_mask)
        txt_tok = model.apply({"params": params}, ids, txt_mask, method=encode).astype(jnp.float32)
        return {
            "text_embeds": txt_tok,
            **_projected(model, params, txt_tok, "text_embeds_proj", "text_proj", projected),
        }

    return run


def multimodal_features(model) -> Callable:
    """(params, img u8[B,S,S,3], ids i32[B,T], txt_mask bool[B,T]) -> {"multimodal_embeds": f32[B,T,D]}, with [ENC]
    first."""

    def encode(blip, img, ids, txt_mask):
        return blip.med(
            ids.at[:, 0].set(blip.enc_id), txt_mask, kv=blip.image_kv(blip.encode_image(normalize_pixels(img)))
        )

    return lambda params, *rows: {
        "multimodal_embeds": model.apply({"params": params}, *rows, method=encode).astype(jnp.float32)
    }


def _projected(model, params, tok, name: str, layer: str, wanted: bool) -> dict:
    """{name: f32[B,S,E]}, the projection `layer` of every token, of unit norm; {} where it is not wanted."""
    if not wanted:
        return {}
    return {name: unit(model.apply({"params": params}, tok, method=lambda blip, x: getattr(blip, layer)(x)))}


def answering(model, how: beam.Beam, n: int, *, eos: int, pad: int) -> Callable:
    """(params, img u8[B,S,S,3], ids i32[B,T], txt_mask bool[B,T]) -> {"ids": i32[B,n,L], "log_prob": f32[B,n]}, beam
    search.

    The padding of a question is not attended to, so that an answer does not depend on the questions beside it.
    """

    def run(params, img, ids, txt_mask):
        kv = _question(model, params, img, ids, txt_mask)
        extend = lambda ids, at, cache: model.apply(
            {"params": params}, ids, at, cache, kv, kv_mask=txt_mask, method="extend"
        )
        start = jnp.full((len(img), 1), model.dec_id, jnp.int32)
        logits, cache = extend(start, jnp.int32(0), model.empty_cache(len(img), how.max_length - 1))
        cache = jax.tree.map(lambda x: jnp.repeat(x, how.beams, axis=0), cache)
        found, log_prob, _ = beam.search(extend, logits, cache, start, how, n, eos=eos, pad=pad)
        return {"ids": found, "log_prob": log_prob}

    return run


def ranking(model, k: int) -> Callable:
    """(params, img, ids, txt_mask as in `answering`, answers i32[C,T], ans_mask bool[C,T]) -> {"candidate": i32[B,k],
    "score": f32[B,k]}.

    Best first, as `BlipVqa.rank_answers` ranks them, question padding masked.
    """

    def run(params, img, ids, txt_mask, answers, ans_mask):
        kv = _question(model, params, img, ids, txt_mask)
        best, score = model.apply({"params": params}, answers, ans_mask, kv, txt_mask, k=k, method="rank_answers")
        return {"candidate": best, "score": score}

    return run


def _question(model, params, img, ids, txt_mask):
    """`question_kv` of a question for each image."""
    apply = functools.partial(model.apply, {"params": params})
    kv = apply(encode_pixels(model, params, img), method="image_kv")
    return apply(apply(ids, txt_mask, kv, method="encode_question"), method="question_kv")
