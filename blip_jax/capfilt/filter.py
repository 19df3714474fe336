"""The filter: matching probability and cosine of texts and images (BLIP paper, section 3.3)."""

from __future__ import annotations

import functools
from typing import Callable

import jax
import jax.numpy as jnp

from blip_jax.models.vision.vit import encode_pixels


def viewer(model) -> Callable:
    """A function (params, img u8[B,S,S,3]) -> what `scorer` needs of the images: (keys and values, img_emb
    f32[B,E])."""

    def view(params, img):
        apply = functools.partial(model.apply, {"params": params})
        img_tok = encode_pixels(model, params, img)
        return apply(img_tok, method="image_kv"), apply(img_tok, method="project_image")

    return view


def scorer(model) -> Callable:
    """A function (params, view of B images, ids i32[B,G,T], txt_mask bool[B,G,T]) -> {"itm", "itc"}, each f32[B,G].

    itm is the probability that a text belongs to its image, softmax of the matching head; itc the cosine of their
    embeddings.
    """

    def score(params, view, ids, txt_mask):
        apply = functools.partial(model.apply, {"params": params})
        (kv, img_emb), (B, G, T) = view, ids.shape
        ids, txt_mask = ids.reshape(B * G, T), txt_mask.reshape(B * G, T)
        _, txt_emb = apply(ids, txt_mask, method="encode_text")
        itm = jax.nn.softmax(apply(ids, txt_mask, kv, method="match"), axis=-1)[:, 1]
        itc = jnp.einsum("BGE,BE->BG", txt_emb.reshape(B, G, -1), img_emb, precision="highest")
        return {"itm": itm.reshape(B, G), "itc": itc}

    return score
