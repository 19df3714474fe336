"""BLIP's losses as pure functions on global arrays (paper section 3.2).

Exact forms: ALBEF's ITC and ITM, BERT-style LM.

Contrastive columns and hard negatives are drawn within groups of g examples: G groups on a leading axis. One group is
the global batch; G groups are what the PyTorch original did on G GPUs. Every loss is the mean of its group means.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grouped(x, group_size: int):
    """[B,...] -> [G,g,...] with g = group_size, or one group of all for 0."""
    g = group_size or x.shape[0]
    return x.reshape(x.shape[0] // g, g, *x.shape[1:])


def similarity(emb, cols, temp):
    """Scaled cosine of each row with its group's own columns: f32[G,g,g].

    emb, cols: f32[G,g,E] unit norm; temp: f32[].
    """
    return jnp.einsum("GiE,GjE->Gij", emb, cols, precision="highest") / temp


def query_similarity(qry, txt, temp):
    """Scaled similarity of each image with its group's own texts, the largest cosine over its queries: f32[G,g,g].

    qry: f32[G,g,Q,E], txt: f32[G,g,E], both unit norm; temp: f32[] (BLIP-2 paper, section 3.1, ITC).
    """
    return jnp.einsum("GiQE,GjE->GijQ", qry, txt, precision="highest").max(-1) / temp


def queue_similarity(emb, queue, temp):
    """Scaled cosine of each row with the queue's columns: f32[G,g,K].

    emb: f32[G,g,E], queue: f32[K,E], both unit norm; temp: f32[].
    """
    return jnp.einsum("GiE,KE->GiK", emb, queue, precision="highest") / temp


def itc_targets(positive, sim_m, alpha):
    """alpha * softmax(sim_m) + (1 - alpha) * positives / number of positives, without gradient.

    positive bool[G,g,C]; sim_m f32[G,g,C], similarities of the momentum encoder, or None: hard targets. f32[G,g,C].
    """
    hard = positive / positive.sum(-1, keepdims=True)
    if sim_m is None:
        return hard
    return jax.lax.stop_gradient(alpha * jax.nn.softmax(sim_m, axis=-1) + (1 - alpha) * hard)


def smoothed_targets(positive, smoothing: float):
    """(1 - smoothing) * positives / number of positives + smoothing / C: f32[G,g,C] of bool[G,g,C] (reference: BLIP-2's
    blip2_qformer).
    """
    return (1 - smoothing) * itc_targets(positive, None, 0.0) + smoothing / positive.shape[-1]


def itc(sim_i2t, sim_t2i, target_i2t, target_t2i):
    """Image-text contrastive loss: the mean of both directions' cross-entropies, f32[] (paper section 3.2, ITC)."""

    def ce(sim, target):
        return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(sim, axis=-1), axis=-1))

    return (ce(sim_i2t, target_i2t) + ce(sim_t2i, target_t2i)) / 2


def hard_negative_weights(sim, positive, floor):
    """Sampling weights f32[G,g,g]: softmax(sim) + floor, zero at positives, without gradient.

    sim f32[G,g,g], scaled similarities to the group's own columns; floor 1e-4 in pre-training, 0 in retrieval
    fine-tuning.
    """
    weights = jax.nn.softmax(jax.lax.stop_gradient(sim), axis=-1) + floor
    return jnp.where(positive, 0.0, weights)


def masked_negative_weights(sim, positive):
    """Sampling weights f32[G,g,g]: softmax(sim) over what is no positive, without gradient; zeros where there is none.

    In exact arithmetic `hard_negative_weights` without a floor draws alike; here negatives that are far behind the
    positives keep their weights.
    """
    lowest = jnp.where(positive, -jnp.inf, jax.lax.stop_gradient(sim))
    largest = jnp.max(lowest, axis=-1, keepdims=True)
    weights = jnp.where(positive, 0.0, jnp.exp(lowest - jnp.where(jnp.isfinite(largest), largest, 0.0)))
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1.0)


def draw_negatives(key, weights, first_row=0):
    """One column per row with probability proportional to its weight, as an index into the batch: i32[B], B = G*g.

    Each row has a random stream of its own, (key, first_row + row), so the draw does not depend on the mesh or on how a
    batch is cut into micro-batches. A row whose weights are all zero (every candidate is a positive) gives -1.
    """
    G, g, _ = weights.shape
    rows = jnp.arange(G * g)
    noise = jax.vmap(lambda r: jax.random.gumbel(jax.random.fold_in(key, r), (g,)))(first_row + rows)
    choice = jnp.argmax(jnp.log(weights.reshape(G * g, g)) + noise, axis=-1)
    choice = choice + (rows // g) * g
    return jnp.where(weights.reshape(G * g, g).max(-1) > 0, choice, -1).astype(jnp.int32)


def itm(logits, labels, weights=None):
    """Image-text matching: mean cross-entropy f32[] and accuracy f32[].

    logits: f32[R,2]; labels: i32[R]; weights: f32[R].
    """
    weights = jnp.ones(labels.shape) if weights is None else weights
    total = jnp.maximum(weights.sum(), 1.0)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), labels[:, None], axis=-1)[:, 0]
    return jnp.sum(nll * weights) / total, jnp.sum((logits.argmax(-1) == labels) * weights) / total


def lm(logits, targets, mask, vocab_size: int, *, smoothing: float, over: str, group_size: int = 0):
    """Label-smoothed language-modelling loss f32[]: (1-s) * nll + s/V * sum_v(-logp_v).

    A mean per group, then over groups.

    Args:
      logits: f32[B,T,Vp], columns from vocab_size on are padding (hugely negative) and take no part.
      targets, mask: i32[B,T], bool[B,T]; False positions are ignored (ignore_index of torch).
      over: "valid": the smoothing term is averaged over valid positions (torch >= 1.11); "all": over every position,
        ignored ones included, as torch 1.10 did when the published models were trained (pytorch#73205).
    """
    nll, smooth = _cross_entropy(logits, targets, vocab_size)
    nll, smooth, mask = (grouped(x, group_size) for x in (nll, smooth, mask))

    def mean(x, m):
        return jnp.sum(x * m, axis=(1, 2)) / jnp.maximum(jnp.sum(m, axis=(1, 2)), 1)

    smooth_mean = mean(smooth, mask) if over == "valid" else jnp.mean(smooth, axis=(1, 2))
    return jnp.mean((1 - smoothing) * mean(nll, mask) + smoothing * smooth_mean)


def text_ce(logits, targets, mask, vocab_size: int, *, smoothing: float, over: str, counted=None):
    """Label-smoothed cross-entropy of each text, a sum over its positions: f32[A].

    Args:
      logits f32[A,T,Vp], targets i32[A,T], mask bool[A,T], over: as in `lm`.
      counted: bool[T], the positions that "all" means; None: up to the longest text here, as in a batch padded to its
        longest.
    """
    nll, smooth = _cross_entropy(logits, targets, vocab_size)
    everywhere = mask.any(0) if counted is None else counted
    smoothed = mask if over == "valid" else everywhere
    return jnp.sum((1 - smoothing) * nll * mask + smoothing * smooth * smoothed, axis=-1)


def answers(logits, targets, mask, weights, questions: int, vocab_size: int, *, smoothing: float, over: str):
    """VQA's loss f32[]: sum of weight * `text_ce` over the answers / number of questions (reference: BLIP's blip_vqa).

    Args:
      logits f32[A,T,Vp], targets i32[A,T], mask bool[A,T]: A answers of all the questions; smoothing, over: as in
        `text_ce`.
      weights: f32[A], the share of people who gave the answer; 0 for a row that only fills the batch.
      questions: number of questions (and images), by which the sum is divided, not by the answers.
    """
    return jnp.sum(weights * text_ce(logits, targets, mask, vocab_size, smoothing=smoothing, over=over)) / questions


def _cross_entropy(logits, targets, vocab_size: int):
    """-logp of the target and -logp averaged over the vocabulary, each f32[B,T].

    logits: f32[B,T,Vp]; targets: i32[B,T].
    """
    logz = jax.nn.logsumexp(logits, axis=-1)
    nll = logz - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    mean_z = jnp.sum(logits, axis=-1, where=jnp.arange(logits.shape[-1]) < vocab_size) / vocab_size
    return nll, logz - mean_z
