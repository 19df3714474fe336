"""NLVR2's accuracy and consistency (Suhr et al., arXiv 1811.00491, section 6): labels in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence


def score(predictions: Sequence[bool], labels: Sequence[bool], groups: Sequence[str]) -> dict[str, float]:
    """{"accuracy", "consistency"} in percent of predictions and labels, one each an example.

    groups: what the examples of one sentence and set of pictures share; consistency is the share of groups in which all
    are right.
    ValueError: no example, or not as many of each.
    """
    if not len(predictions) == len(labels) == len(groups) > 0:
        raise ValueError(
            f"{len(predictions)} predictions, {len(labels)} labels, {len(groups)} groups: give one of each for "
            "every example"
        )
    right = [bool(p) == bool(label) for p, label in zip(predictions, labels)]
    whole: dict[str, bool] = {}
    for group, good in zip(groups, right):
        whole[group] = whole.get(group, True) and good
    return {"accuracy": 100 * sum(right) / len(right), "consistency": 100 * sum(whole.values()) / len(whole)}
