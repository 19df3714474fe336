"""Choosing among given answers: the few whose first token is likely are scored in full (reference: BLIP's VQA
`rank`)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def rank(first_logits, score: Callable, ids, mask, k: int):
    """The k candidates with the most probable first token, ordered by their score as whole texts.

    Args:
      first_logits: f32[B,V], what follows the start token for each of B questions.
      score: (ids i32[B*k,T], mask bool[B*k,T]) -> f32[B*k], higher is better; row b*k + j is a candidate of question b.
      ids i32[C,T], mask bool[C,T]: the candidates, the start token at 0; every one has a first token at 1.
      k: at least 1; more than C means C.
    Returns: candidates i32[B,k], best first; their scores f32[B,k]. Equal ones stay in the order of the list, here and
    in the choice of the k, where many candidates share a first token.
    """
    if k < 1 or len(ids) < 1 or ids.shape[1] < 2:
        raise ValueError(
            f"k is {k}, candidates are {tuple(ids.shape)}: give at least one candidate of two tokens, and k from 1 on"
        )
    B, k = len(first_logits), min(k, len(ids))
    _, chosen = jax.lax.top_k(first_logits[:, ids[:, 1]], k)
    chosen = jnp.sort(chosen, axis=1)  # so that equal scores below fall back to the order of the list
    rows = chosen.reshape(-1)
    scores, order = jax.lax.top_k(score(ids[rows], mask[rows]).reshape(B, k), k)
    return jnp.take_along_axis(chosen, order, axis=1), scores


def text_nll(first_logits, logits, ids, mask):
    """Summed negative log-probability f32[B,C] of C texts behind each of B prompts: the least is the likeliest text.

    Args:
      first_logits: f32[B,V], what follows a prompt; logits: f32[B,C,T-1,V], what follows tokens 0..T-2 of each text.
      ids i32[C,T], mask bool[C,T]: the texts, without a start id, ends included, padded at the right.
    """
    B, C, T = len(first_logits), *ids.shape
    of = lambda x, token: jnp.take_along_axis(x, token[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(x, axis=-1)
    first = of(jnp.broadcast_to(first_logits[:, None], (B, C, first_logits.shape[-1])), jnp.tile(ids[:, 0], (B, 1)))
    others = of(logits, jnp.broadcast_to(ids[:, 1:], (B, C, T - 1)))
    return -(first + jnp.sum(others * mask[:, 1:], axis=-1))
