"""What runs on the devices of a BLIP-2 with a language model: texts after a prompt, and how likely given texts are.

Functions of (params, rows of arrays), as those of inference/programs.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp

from blip_jax.inference.programs import Method, encode_pixels, written
from blip_jax.models.layers.dense import text_layers_apart


def generating(model, method: Method, *, start_id: int, eos: int, pad: int) -> Callable:
    """Texts that follow a prompt about each image.

    (params, img u8[B,S,S,3], keys u32[B,2], ids i32[B,T], txt_mask bool[B,T], and of a model with `questions` question
    i32[B,T'] and its mask) -> {"ids": i32[B,n,L], "log_prob": f32[B,n]}.

    The prompts are as the model's `begin` takes them. ids: `start_id`, which is not part of the text but counts in
    L = method.max_length, the text, `eos` if it ended before L, `pad`. Text i of an image is drawn with fold_in(its
    key, i).
    """

    def generate(params, img, keys, ids, txt_mask, *question):
        apply = functools.partial(model.apply, {"params": text_layers_apart(params)})
        soft = apply(encode_pixels(model, params, img), *question, method="soft_prompt")
        logits, cache, seen = apply(soft, ids, txt_mask, method.max_length, method="begin")

        def extend(ids, at, cache):
            return apply(ids, at, cache, seen, method="extend")

        start = jnp.full((len(img), 1), start_id, jnp.int32)
        return written(extend, logits, cache, start, keys, method, eos=eos, pad=pad)

    return generate


def likelihood(model) -> Callable:
    """How likely each of C given texts is after each image's prompt.

    (params, img, ids, txt_mask as of `generating`, out_ids i32[C,U], out_mask bool[C,U], and question and its mask) ->
    {"nll": f32[B,C]}, the sum of the negative log-likelihoods of a text's tokens.
    """

    def nll(params, img, ids, txt_mask, out_ids, out_mask, *question):
        apply = functools.partial(model.apply, {"params": text_layers_apart(params)})
        soft = apply(encode_pixels(model, params, img), *question, method="soft_prompt")
        return {"nll": apply(soft, ids, txt_mask, out_ids, out_mask, method="nll")}

    return nll
