"""What happens to next-token scores before one is chosen: pure functions, in the order in which the original applies
them.

Repetition penalty, minimum length, temperature, top-k, top-p (reference: BLIP's `generate` on transformers 4.15, whose
sampling has a top-k of 50 by default that the original's arguments do not show). Scores are logits or log-probabilities
f32[R,V].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def repetition_penalty(scores, seen, penalty: float):
    """Scores of tokens that occur already, prompt included (bool[R,V]), divided by `penalty` if positive, else
    multiplied."""
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def min_length(scores, length, minimum: int, eos: int):
    """The end token gets -inf while the text, prompt included, has `length` (i32[]) < `minimum` tokens."""
    return jnp.where((length < minimum) & (jnp.arange(scores.shape[-1]) == eos), -jnp.inf, scores)


def temperature(scores, value: float):
    """Scores divided by `value` > 0."""
    return scores / value


def top_k(scores, k: int):
    """The k largest scores, descending, and their tokens: f32[R,k], i32[R,k]. k = 0: all, sorted."""
    return jax.lax.top_k(scores, min(k, scores.shape[-1]) or scores.shape[-1])


def top_p(scores, p: float):
    """Descending scores f32[R,k] with -inf where the tokens before already hold more than `p` of the probability.

    The first token always stays, and so does the one with which the sum passes `p`.
    """
    probs = jax.nn.softmax(scores, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    return jnp.where(before > p, -jnp.inf, scores)


def draw(keys, scores, tokens):
    """One token i32[R] per row with probability softmax(scores).

    keys: R random keys, one per row; scores f32[R,k]; tokens i32[R,k]. The noise belongs to (key, token): neither the
    other rows nor the rank of a token change what is drawn.
    """
    noise_of = lambda key, token: jax.random.gumbel(jax.random.fold_in(key, token))
    noise = jax.vmap(lambda key, row: jax.vmap(lambda token: noise_of(key, token))(row))(keys, tokens)
    best = jnp.argmax(scores + noise, axis=-1)
    return jnp.take_along_axis(tokens, best[:, None], axis=-1)[:, 0]
