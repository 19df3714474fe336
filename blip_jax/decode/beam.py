"""Beam search with the originals' scores: the rules of three versions of transformers, all with early_stopping False.

A text's score is the sum of its processed log-probabilities / length ** length_penalty. A search ends when it has M
finished texts and the best that goes on, by its length so far, is no better than the worst of them. The versions count
the length differently (`RULES`). `extend` is as in decode/generate.py, on rows b*M + m.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blip_jax.decode import sampling
from blip_jax.decode.generate import tokens_seen

NEVER = -1e9  # score of the beams that start empty, so that the first expansion uses one


class Rule(NamedTuple):
    """Which length divides the score of a text of n tokens, prompt and start id included.

    ended: of a text whose end is chosen behind them, n + ended. ahead: of the best that goes on when one is chosen
    behind them, n + ahead. A text that max_length cuts: n. prompt: whether the prompt, or the start id alone, counts
    in these. running: whether the best that goes on is one that does; else the best candidate of the step, even an end.
    """

    ended: int
    ahead: int
    prompt: bool
    running: bool


RULES = {
    "blip": Rule(ended=0, ahead=0, prompt=True, running=False),  # 4.15, on which BLIP was published
    "lavis": Rule(ended=0, ahead=1, prompt=True, running=False),  # 4.33.2, which LAVIS pins for BLIP-2
    "hf": Rule(ended=1, ahead=1, prompt=False, running=True),  # 5.23
}


class Beam(NamedTuple):
    """How a text is searched (defaults: BLIP on COCO). Lengths as in `generate.Sampling`; rule: a key of RULES."""

    beams: int = 3
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    min_length: int = 5
    max_length: int = 20
    rule: str = "blip"


class _Texts(NamedTuple):
    ids: Any  # i32[B,M,L]
    score: Any  # f32[B,M]: live: sum of processed log-probabilities; finished: divided by length, -inf: none
    log_prob: Any  # f32[B,M], the model's own


class _Search(NamedTuple):
    length: Any  # i32[]
    live: _Texts
    finished: _Texts
    done: Any  # bool[B]
    cache: Any


def search(extend: Callable, logits, cache, prompt, how: Beam, n: int, *, eos: int, pad: int):
    """The n best continuations of each prompt, best first.

    Args:
      logits f32[B,V]: what follows the prompt; cache: arrays [L,B*M,...], each image's row repeated M times; prompt
      i32[B,t]; n <= how.beams. A model that is given no words has a start id for its prompt: that of the version, or,
      with version 5, which has none, one beyond the vocabulary, which no penalty sees.
    Returns: ids i32[B,n,L] as `generate.sample`; log_prob f32[B,n], the model's own, the end included; score f32[B,n].
    """
    (B, t), M, L = prompt.shape, how.beams, how.max_length
    if not 1 <= n <= M:
        raise ValueError(f"n is {n}: beam search with beams={M} gives 1 to {M} texts; raise beams")
    if how.rule not in RULES:
        raise ValueError(f"rule is {how.rule!r}: beam search has {', '.join(RULES)}; give one of them")
    if not t < L:
        raise ValueError(f"max_length is {L}, but the prompt alone has {t} tokens: raise max_length")
    rule = RULES[how.rule]
    power = lambda n: (n - (0 if rule.prompt else t)) ** how.length_penalty
    ids = jnp.full((B, M, L), pad, jnp.int32).at[:, :, :t].set(prompt[:, None])
    score = jnp.tile(jnp.where(jnp.arange(M) == 0, 0.0, NEVER), (B, 1))
    live = _Texts(ids, score, jnp.zeros((B, M)))
    none = _Texts(jnp.full_like(ids, pad), jnp.full((B, M), -jnp.inf), jnp.zeros((B, M)))

    def expand(s: _Search, logits) -> tuple[_Search, Any]:
        """One token more; logits f32[B,M,V]. Also the beam that each new one continues, i32[B,M]."""
        V = logits.shape[-1]
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        flat = log_probs.reshape(B * M, V)
        if how.repetition_penalty != 1.0:
            written = jnp.where(jnp.arange(L) < s.length, s.live.ids, V).reshape(B * M, L)
            flat = sampling.repetition_penalty(flat, tokens_seen(written, V), how.repetition_penalty)
        flat = sampling.min_length(flat, s.length, how.min_length, eos)
        total = s.live.score[..., None] + flat.reshape(B, M, V)
        best, at = jax.lax.top_k(total.reshape(B, M * V), 2 * M)
        beam, token = at // V, at % V
        parents = jax.tree.map(lambda x: _take(x, beam), s.live)
        raw = parents.log_prob + jnp.take_along_axis(log_probs.reshape(B, M * V), at, axis=1)

        ended = (token == eos) & (jnp.arange(2 * M) < M)
        ending = _Texts(
            parents.ids.at[:, :, s.length].set(eos),
            jnp.where(ended, best / power(s.length + rule.ended), -jnp.inf),
            raw,
        )
        finished = _best(s.finished, ending, M)

        rank = jnp.where(token == eos, 2 * M, jnp.arange(2 * M))
        going = jnp.argsort(rank, axis=1)[:, :M]  # the first M candidates that go on, in order
        chosen, token = jax.tree.map(lambda x: _take(x, going), (_Texts(parents.ids, best, raw), token))
        ahead = (chosen.score if rule.running else best)[:, 0] / power(s.length + rule.ahead)
        new_ids = jax.lax.dynamic_update_slice(chosen.ids, token[..., None], (0, 0, s.length))
        keep = lambda old, new: jnp.where(s.done.reshape(B, *[1] * (new.ndim - 1)), old, new)
        live, finished = jax.tree.map(keep, (s.live, s.finished), (chosen._replace(ids=new_ids), finished))
        done = s.done | (finished.score.min(axis=1) >= ahead)
        return s._replace(length=s.length + 1, live=live, finished=finished, done=done), _take(beam, going)

    def body(s: _Search) -> _Search:
        last = jax.lax.dynamic_slice_in_dim(s.live.ids, s.length - 1, 1, axis=2).reshape(B * M, 1)
        logits, cache = extend(last, s.length - 1, s.cache)
        s, beam = expand(s, logits.reshape(B, M, -1))
        reorder = lambda x: jax.vmap(_take, (0, None))(x.reshape(len(x), B, M, *x.shape[2:]), beam).reshape(x.shape)
        return s._replace(cache=jax.tree.map(reorder, cache))

    first = _Search(jnp.int32(t), live, none, jnp.zeros(B, bool), cache)
    first, _ = expand(first, jnp.broadcast_to(logits[:, None], (B, M, logits.shape[-1])))
    end = jax.lax.while_loop(lambda s: (s.length < L) & ~jnp.all(s.done), body, first)
    open_score = jnp.where(end.done[:, None], -jnp.inf, end.live.score / power(end.length))
    best = _best(end.live._replace(score=open_score), end.finished, n)
    return best.ids, best.log_prob, best.score


def _take(x, index):
    """x [B,M,...], index i32[B,m] -> [B,m,...]"""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _best(a: _Texts, b: _Texts, n: int) -> _Texts:
    """The n of both with the highest score, best first; a's before b's where equal."""
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), a, b)
    _, order = jax.lax.top_k(both.score, n)
    return jax.tree.map(lambda x: _take(x, order), both)
