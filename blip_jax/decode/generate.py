"""Sampling texts token by token: a jittable loop with an explicit cache that ends when every row has.

The model is a function `extend(ids i32[R,t], start i32[], cache) -> (logits f32[R,V], cache)`: the scores after the
last of t tokens that stand at positions start..start+t-1. Row r may mean anything; the loop never mixes rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blip_jax.decode import sampling


class Sampling(NamedTuple):
    """How a text is sampled (defaults: BLIP's captioner). Lengths are tokens and count the prompt.

    [SEP] can follow from min_length tokens on; max_length is everything, [SEP] included where it is reached.
    """

    top_p: float = 0.9
    top_k: int = 50  # the original's hidden default; 0: off
    temperature: float = 1.0
    repetition_penalty: float = 1.1
    min_length: int = 5
    max_length: int = 20


GREEDY = Sampling(top_k=1, repetition_penalty=1.0)


class _Loop(NamedTuple):
    length: Any  # i32[], tokens written
    ids: Any  # i32[R,L]
    seen: Any  # bool[R,V]
    done: Any  # bool[R]
    log_prob: Any  # f32[R]
    cache: Any


def sample(extend: Callable, logits, cache, prompt, keys, how: Sampling, *, eos: int, pad: int):
    """Continues `prompt` until [SEP] or how.max_length tokens.

    Args:
      logits f32[R,V], cache: what `extend` gave for the prompt. prompt i32[R,t], t < how.max_length; keys: random keys
        [R].
    Returns: ids i32[R,L], L = how.max_length: prompt, text, `eos` if it ended before L, then `pad`; log_prob f32[R],
    the sum of the model's own log-probabilities of what was chosen, the end included (without penalty, temperature and
    truncation).
    """
    R, t = prompt.shape
    if not t < how.max_length:
        raise ValueError(f"max_length is {how.max_length}, but the prompt alone has {t} tokens: raise max_length")
    ids = jnp.full((R, how.max_length), pad, jnp.int32).at[:, :t].set(prompt)

    def choose(s: _Loop, logits) -> _Loop:
        scores = sampling.repetition_penalty(logits, s.seen, how.repetition_penalty)
        scores = sampling.min_length(scores, s.length, how.min_length, eos)
        scores, tokens = sampling.top_k(sampling.temperature(scores, how.temperature), how.top_k)
        at = jax.vmap(jax.random.fold_in, (0, None))(keys, s.length)
        token = sampling.draw(at, sampling.top_p(scores, how.top_p), tokens)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        token = jnp.where(s.done, pad, token)
        return s._replace(
            length=s.length + 1,
            ids=jax.lax.dynamic_update_slice(s.ids, token[:, None], (0, s.length)),
            seen=s.seen | (jnp.arange(logits.shape[-1]) == token[:, None]),
            done=s.done | (token == eos),
            log_prob=s.log_prob + jnp.where(s.done, 0.0, chosen),
        )

    def body(s: _Loop) -> _Loop:
        last = jax.lax.dynamic_slice_in_dim(s.ids, s.length - 1, 1, axis=1)
        logits, cache = extend(last, s.length - 1, s.cache)
        return choose(s._replace(cache=cache), logits)

    start = _Loop(jnp.int32(t), ids, tokens_seen(prompt, logits.shape[-1]), jnp.zeros(R, bool), jnp.zeros(R), cache)
    end = jax.lax.while_loop(lambda s: (s.length < how.max_length) & ~jnp.all(s.done), body, choose(start, logits))
    return end.ids, end.log_prob


def tokens_seen(ids, vocab: int):
    """i32[R,t] -> bool[R,vocab], which tokens occur in each row; entries >= vocab count for nothing."""
    rows = jnp.arange(len(ids))[:, None]
    return jnp.zeros((len(ids), vocab), bool).at[rows, ids].set(True, mode="drop")
