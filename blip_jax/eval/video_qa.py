"""Answers about videos, MSRVTT-QA and MSVD-QA (BLIP paper, section 5.6): an answer is right, or it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def accuracy(answers: Sequence[str], right: Sequence[str]) -> float:
    """Percent of answers that are the right ones, but for case and white space around them. ValueError: there are
    none, or of one more than of the other."""
    if not answers:
        raise ValueError("no answer to be scored")
    return 100 * sum(is_right(a, b) for a, b in zip(answers, right, strict=True)) / len(answers)


def is_right(answer: str, other: str) -> bool:
    """Whether an answer is the right one, but for case and white space around it."""
    return _plain(answer) == _plain(other)


def candidates(answers: Iterable[str]) -> list[str]:
    """The different ones of the answers to training questions, the most frequent first, equal ones by the alphabet."""
    counts = Counter(map(_plain, answers))
    return sorted((text for text in counts if text), key=lambda text: (-counts[text], text))


def _plain(text: str) -> str:
    return text.lower().strip()
