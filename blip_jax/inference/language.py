"""What runs on the devices of a BLIP-2 with a language model: texts after a prompt, and how likely given texts are.

Functions of (params, rows of arrays), as those of inference/programs.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from blip_jax.inference.programs import Method, encode_pixels, written
from blip_jax.models.layers.dense import text_layers_apart


class Ids(NamedTuple):
    """Tokens of a language model that are no words."""

    start: int  # where a text begins; OPT is never given it
    end: int
    pad: int


def special(kind: str, tokenizer) -> Ids:
    """Of a language model of `kind`: OPT begins a text with its "</s>" and ends it with a new line, T5 begins with
    padding."""
    if kind == "opt":
        return Ids(tokenizer.bos, tokenizer.newline, tokenizer.pad)
    return Ids(tokenizer.pad, tokenizer.eos, tokenizer.pad)


def generating(model, method: Method, special: Ids) -> Callable:
    """Texts that follow a prompt about each image.

    (params, img u8[B,S,S,3], keys u32[B,2], ids i32[B,T], txt_mask bool[B,T], and of a model with `questions` question
    i32[B,T'] and its mask) -> {"ids": i32[B,n,L], "log_prob": f32[B,n]}, as `behind`.
    """

    def generate(params, img, keys, ids, txt_mask, *question):
        apply = functools.partial(model.apply, {"params": text_layers_apart(params)})
        soft = apply(encode_pixels(model, params, img), *question, method="soft_prompt")
        return behind(apply, soft, ids, txt_mask, keys, method, special)

    return generate


def behind(apply: Callable, soft, ids, txt_mask, keys, method: Method, special: Ids) -> dict:
    """n texts behind each of B prompts, soft [B,Q,E] and ids i32[B,T], which the model's `begin` takes.

    apply: the model's, with parameters; keys u32[B,2]: text i of an image is drawn with fold_in(its key, i).
    Returns: {"ids": i32[B,n,L], "log_prob": f32[B,n]}. ids: `special.start`, which is not part of the text but counts
    in L = method.max_length, the text, `special.end` if it ended before L, `special.pad`.
    """
    logits, cache, seen = apply(soft, ids, txt_mask, method.max_length, method="begin")

    def extend(ids, at, cache):
        return apply(ids, at, cache, seen, method="extend")

    start = jnp.full((len(ids), 1), special.start, jnp.int32)
    return written(extend, logits, cache, start, keys, method, eos=special.end, pad=special.pad)


def likelihood(model) -> Callable:
    """How likely each of C given texts is after each image's prompt.

    (params, img, ids, txt_mask, and maybe question and its mask as of `generating`, out_ids i32[C,U], out_mask
    bool[C,U]) -> {"nll": f32[B,C]}, the sum of the negative log-likelihoods of a text's tokens.
    """

    def nll(params, img, ids, txt_mask, *more):
        *question, out_ids, out_mask = more
        apply = functools.partial(model.apply, {"params": text_layers_apart(params)})
        soft = apply(encode_pixels(model, params, img), *question, method="soft_prompt")
        return {"nll": apply(soft, ids, txt_mask, out_ids, out_mask, method="nll")}

    return nll
