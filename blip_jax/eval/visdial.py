"""Visual Dialog's six numbers (Das et al., arXiv 1611.08669, section 5; NDCG of the 2018 challenge): scores or ranks of
the options in, numbers out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RECALLS = (1, 5, 10)


def ranks(scores: np.ndarray) -> np.ndarray:
    """i64[..., options]: the rank of each option, 1 for the highest of f32[..., options]; of equal ones the earlier is
    before the later.
    """
    order = np.argsort(-np.asarray(scores), axis=-1, kind="stable")
    out = np.empty(order.shape, np.int64)
    np.put_along_axis(out, order, np.broadcast_to(np.arange(1, order.shape[-1] + 1), order.shape), axis=-1)
    return out


def truth_rank(scores: Sequence[float], truth: int) -> tuple[int, bool]:
    """The rank of the true option, from 1, and whether others score as high: they all come before it then."""
    scores = np.asarray(scores)
    return int((scores >= scores[truth]).sum()), bool((scores == scores[truth]).sum() > 1)


def sparse(rounds: Sequence[tuple[Sequence[float], int]]) -> dict[str, float]:
    """{"r@1", "r@5", "r@10", "mean", "mrr", "ties"} over rounds, each the scores of its options and which is true.

    Recalls and the mean reciprocal rank are fractions. ties: rounds in which another option scores as high as the true
    one, which is then behind it. ValueError: no round.
    """
    if not rounds:
        raise ValueError("no round with a true option to score: give dialogs with answer_options and gt_index")
    found, tied = np.array([truth_rank(*one) for one in rounds]).T
    out = {f"r@{k}": float((found <= k).mean()) for k in RECALLS}
    return {**out, "mean": float(found.mean()), "mrr": float((1 / found).mean()), "ties": int(tied.sum())}


def ndcg(scores: Sequence[float], relevance: Sequence[float]) -> float | None:
    """NDCG of one round with the relevance of each option by people, over as many places as options have some.

    None: no option has any. ValueError: not one of each for every option.
    """
    scores, relevance = np.asarray(scores), np.asarray(relevance, np.float64)
    if scores.shape != relevance.shape:
        raise ValueError(f"{len(scores)} options are scored and {len(relevance)} have a relevance: give one of each")
    k = int((relevance != 0).sum())
    if not k:
        return None
    gain = lambda order: float((relevance[order][:k] / np.log2(np.arange(2, k + 2))).sum())
    return gain(np.argsort(-scores, kind="stable")) / gain(np.argsort(-relevance, kind="stable"))


def dense(rounds: Sequence[tuple[Sequence[float], Sequence[float]]]) -> dict[str, float]:
    """{"ndcg", "without_relevance"}: the mean over rounds, each scores and relevance of its options, and how many have
    no relevant option and are left out. ValueError: not one round is left.
    """
    found = [ndcg(*one) for one in rounds]
    known = [value for value in found if value is not None]
    if not known:
        raise ValueError(f"none of {len(found)} rounds has a relevant option: NDCG cannot be computed")
    return {"ndcg": float(np.mean(known)), "without_relevance": len(found) - len(known)}
