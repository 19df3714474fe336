"""Captions of images: one pass of the vision tower, keys and values once, n texts that share them (paper section
3.3)."""

from __future__ import annotations

import functools
import hashlib
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.decode import beam, generate
from blip_jax.models.layers.cpu import single_cpu
from blip_jax.models.vision.vit import encode_pixels


class Method(NamedTuple):
    """How captions are made: nucleus sampling or beam search, n of them per image. Lengths as in
    `generate.Sampling`."""

    kind: str = "nucleus"  # nucleus | beam
    n: int = 1
    top_p: float = 0.9  # nucleus
    top_k: int = 50  # nucleus; 0: off
    temperature: float = 1.0  # nucleus
    repetition_penalty: float = 1.1  # the original: 1.1 with nucleus, 1.0 with beams
    min_length: int = 5
    max_length: int = 20
    beams: int = 3  # beam
    length_penalty: float = 1.0  # beam


def example_key(key: str, seed: int) -> np.ndarray:
    """u32[2]: the random key of an example, from its name and the seed of the run alone."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.frombuffer(digest, "<u4")


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """[DEC] and the tokens of `prompt`, without [SEP]: what every caption begins with."""
    ids, mask = tokenizer.encode([prompt], 2 + len(prompt))
    return [tokenizer.dec, *ids[0, 1 : int(mask.sum()) - 1].tolist()]


def captioner(model, tokenizer, prompt: str, method: Method) -> Callable:
    """A function (params, img u8[B,S,S,3], keys u32[B,2]) -> {"ids": i32[B,n,L], "log_prob": f32[B,n]}, for jax.jit.

    Caption i of an image is drawn with fold_in(its key, i): it depends on nothing else in the batch. ids: [DEC],
    prompt, caption, [SEP] if it ended before L = method.max_length tokens, [PAD]. log_prob: the model's own, summed
    over caption and [SEP].
    """
    start = prompt_ids(tokenizer, prompt)
    decode = decoder(model, start, method, eos=tokenizer.sep, pad=tokenizer.pad)

    def caption(params, img, keys):
        apply = functools.partial(model.apply, {"params": params})
        kv = apply(encode_pixels(model, params, img), method="image_kv")
        return decode(params, kv, keys)

    return caption


def decoder(model, prompt: list[int], method: Method, *, eos: int, pad: int) -> Callable:
    """The token loop of `captioner`: (params, image keys and values of B images, keys u32[B,2]) -> the same result."""
    if method.kind not in ("nucleus", "beam"):
        raise ValueError(f"method {method.kind!r} is unknown: choose nucleus or beam")
    rows_per_image = method.n if method.kind == "nucleus" else method.beams

    def decode(params, kv, keys):
        B, n, t = kv[0][0].shape[0], rows_per_image, len(prompt)
        # stored as the products of the loop read it (B N H P and B N P H; on a CPU, whose small products are in
        # float32, in that):
        # else every token transposes and raises all of it again
        dtype, wide = kv[0][0].dtype, jnp.float32 if single_cpu() else kv[0][0].dtype
        store = lambda k, v: (jnp.moveaxis(k, 1, -1).astype(wide), jnp.moveaxis(v, 1, 2).astype(wide))
        back = lambda k, v: (jnp.moveaxis(k, -1, 1).astype(dtype), jnp.moveaxis(v, 2, 1).astype(dtype))
        stored = jax.lax.optimization_barrier(tuple(store(*layer) for layer in kv))
        as_kv = lambda: tuple(back(*layer) for layer in stored)
        extend = lambda ids, at, cache: model.apply({"params": params}, ids, at, cache, as_kv(), method="extend")
        start = jnp.tile(jnp.array(prompt, jnp.int32), (B, 1))
        logits, cache = extend(start, jnp.int32(0), model.empty_cache(B, method.max_length - 1))
        repeat = lambda x: jnp.repeat(x, n, axis=0)  # the prompt is the same for all texts of an image: one pass
        cache = jax.tree.map(repeat, cache)
        if method.kind == "beam":
            how = beam.Beam(
                method.beams, method.length_penalty, method.repetition_penalty, method.min_length, method.max_length
            )
            ids, log_prob, _ = beam.search(extend, logits, cache, start, how, method.n, eos=eos, pad=pad)
            return {"ids": ids, "log_prob": log_prob}
        how = generate.Sampling(
            method.top_p,
            method.top_k,
            method.temperature,
            method.repetition_penalty,
            method.min_length,
            method.max_length,
        )
        of_row = lambda key, row: jax.random.fold_in(jax.random.wrap_key_data(key), row % n)
        own = jax.vmap(of_row)(repeat(keys), jnp.arange(B * n))
        ids, log_prob = generate.sample(extend, repeat(logits), cache, repeat(start), own, how, eos=eos, pad=pad)
        return {"ids": ids.reshape(B, n, -1), "log_prob": log_prob.reshape(B, n)}

    return decode


def text_of(tokenizer, ids, prompt_len: int) -> str:
    """The caption in one row of ids i32[L], without the prompt's `prompt_len` tokens, [SEP] and [PAD]."""
    return tokenizer.decode(ids[prompt_len:])
