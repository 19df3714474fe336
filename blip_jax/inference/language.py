"""What runs on the devices of a BLIP-2 with a language model: texts after a prompt, and how likely given texts are.

Functions of (params, rows of arrays), as those of inference/programs.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from blip_jax.inference.batching import at_least
from blip_jax.inference.programs import Method, encode_pixels, written
from blip_jax.models.layers.dense import text_layers_apart

MOST_PROMPT = 1024  # tokens
MOST_QUESTION = 128  # tokens that the Q-Former of an InstructBLIP reads
LEAST_PROMPT = 8  # prompts are padded to this many, or the next power of two


class Ids(NamedTuple):
    """Tokens of a language model that are no words."""

    start: int  # where a text begins; OPT is never given it
    end: int
    pad: int


# --- texts as ids -----------------------------------------------------------------------------------------------------
def special(model, tokenizer) -> Ids:
    """OPT begins a text with its "</s>" and ends it with a new line, T5 begins with padding."""
    if model.llm_sizes["kind"] == "opt":
        return Ids(tokenizer.bos, tokenizer.newline, tokenizer.pad)
    return Ids(tokenizer.pad, tokenizer.eos, tokenizer.pad)


def room(model, most: int) -> int:
    """Tokens that a prompt may have behind which up to `most` will stand."""
    if model.llm_sizes["kind"] != "opt":
        return MOST_PROMPT
    return max(0, min(MOST_PROMPT, model.llm_sizes["positions"] - model.qformer_sizes["queries"] - most))


def prompt_ids(model, tokenizer, prompts: list[str], most: int) -> tuple[np.ndarray, np.ndarray]:
    """ids i32[n,T], mask bool[n,T] of prompts behind which up to `most` tokens will stand.

    T is the bucket of the longest, before which (OPT) or behind which (T5) the others are padded.
    ValueError: one that leaves no room for them.
    """
    opt, free = model.llm_sizes["kind"] == "opt", room(model, most)
    sizes = tokenizer.lengths(prompts, 1 << 20)
    if (longest := int(sizes.max())) > free:
        raise ValueError(
            f"prompt {int(sizes.argmax())} has {longest} tokens: at most {free} are read, so that {most} new "
            "ones have room; shorten it"
        )
    return tokenizer.encode(prompts, prompt_positions(model, longest, most), **({"pad_left": True} if opt else {}))


def prompt_positions(model, tokens: int, most: int) -> int:
    """The bucket of a prompt of so many tokens that up to `most` will stand behind."""
    return min(at_least(tokens, LEAST_PROMPT), room(model, most))


def question_ids(model, tokenizer, asked: list[str], most: int = MOST_QUESTION) -> tuple[np.ndarray, ...]:
    """What the Q-Former of a model with `questions` reads: ids i32[n,T'], mask bool[n,T'] of the last `most` tokens of
    each text, T' the bucket of the longest; () of another model."""
    if not model.questions:
        return ()
    own, most = tokenizer.questions, min(most, model.qformer_sizes["positions"])
    T = min(at_least(int(own.lengths(asked, most).max()), LEAST_PROMPT), most)
    return own.encode(asked, T, keep_end=True)


# --- what runs --------------------------------------------------------------------------------------------------------
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


def captioner(model, tokenizer, prompt: str, method: Method) -> Callable:
    """`generating` of one prompt for all images: (params, img u8[B,S,S,3], keys u32[B,2]) -> the same result.

    ValueError: a prompt that leaves no room for method.max_length tokens.
    """
    given = *prompt_ids(model, tokenizer, [prompt], method.max_length - 1), *question_ids(model, tokenizer, [prompt])
    return continuing(model, given, method, special(model, tokenizer))


def continuing(model, prompt: tuple, method: Method, special: Ids) -> Callable:
    """`captioner` of a prompt in ids: those arrays that `generating` takes, [1,T] each."""
    generate = generating(model, method, special)

    def caption(params, img, keys):
        rows = (jnp.broadcast_to(x, (len(img), x.shape[1])) for x in prompt)
        return generate(params, img, keys, *rows)

    return caption


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
