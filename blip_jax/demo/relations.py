"""What the papers' tables order, and whether a demo orders it alike, with an error from the number of its pictures.

The error is that of having looked at these pictures and not at others: half a 95 % interval of the difference. Both
models see the same pictures, so their difference is taken picture by picture. How another training of the same models
would come out is not in it; only other seeds tell that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from blip_jax.demo.report import paper
from blip_jax.eval import recall

SIGMAS = 1.96  # of a normal distribution, on either side of its mean: 95 %
RECALL, DROPPED = "mean recall", "share of the synthetic texts that the filter dropped"
COSINE = "mean recall by cosine alone"
TRUE = {"colours": "captions with the right colours", "objects": "with the right objects", "whole": "wholly true"}
BOTH, ALONE = "both stages", "second stage alone"  # of BLIP-2
WITH_ITG, WITHOUT_ITG = "ITC + ITM + ITG", "ITC + ITM"  # objectives of its first stage


class Relation(NamedTuple):
    """Something that the paper finds larger than another, and the difference here, in points of a hundred."""

    what: str  # RECALL | DROPPED | COSINE | one of TRUE
    larger: str  # in the paper
    smaller: str
    difference: float  # larger - smaller, here
    error: float  # half the 95 % interval of it

    @property
    def verdict(self) -> str:
        """holds: as in the paper; reversed: the other way round; undecided: within the error."""
        return verdict(self.difference, self.error)


def verdict(difference: float, error: float) -> str:
    if not math.isfinite(difference) or not math.isfinite(error) or abs(difference) <= error:
        return "undecided"
    return "holds" if difference > 0 else "reversed"


def of_pictures(i2t, t2i, text_image) -> np.ndarray:
    """f64[n_images with a caption]: what each picture contributes to `recall.both_ways`' r_mean, whose mean they have.

    Args as there.
    """
    texts = np.bincount(text_image, minlength=len(i2t))
    found = texts > 0
    hits = lambda ranks: np.mean([ranks < k for k in recall.RECALLS], axis=0)
    own = np.bincount(text_image, hits(recall.text_to_image_ranks(t2i, text_image)), len(i2t))[found]
    images = hits(recall.image_to_text_ranks(i2t, text_image))
    return 50 * (images + own * found.sum() / texts.sum())


def table1(values: dict[str, np.ndarray]) -> list[Relation]:
    """The relations of the paper's table 1; values: name of a corpus -> `of_pictures` of its model."""
    return [_paired(a, b, values[a], values[b]) for a, b in paper.relations() if a in values and b in values]


def table2(values: dict[str, np.ndarray], dropped: dict[str, tuple[int, int]]) -> list[Relation]:
    """The relations of its table 2.

    values: as of `table1`, of the corpora with captions by "nucleus" and "beam", and of "neither";
    dropped: of either kind of captions (texts that the filter dropped, texts). Of what is not there nothing is said.
    """
    pairs = (("nucleus", "beam"), ("beam", "neither"))
    found = [_paired(a, b, values[a], values[b]) for a, b in pairs if a in values and b in values]
    if not dropped.keys() >= {"nucleus", "beam"}:
        return found
    shares = [(n / max(total, 1), max(total, 1)) for n, total in (dropped["nucleus"], dropped["beam"])]
    difference, error = shares[0][0] - shares[1][0], math.sqrt(sum(p * (1 - p) / n for p, n in shares))
    return [*found, Relation(DROPPED, "nucleus", "beam", 100 * difference, 100 * SIGMAS * error)]


def figure5(hits: dict[str, dict[str, np.ndarray]]) -> list[Relation]:
    """The relation of BLIP-2's figure 5, of captions instead of answers.

    hits: BOTH and ALONE -> `truth.hits` of its captions of the same pictures.
    """
    each = lambda name, part: 100 * hits[name][part]
    return [_paired(BOTH, ALONE, each(BOTH, part), each(ALONE, part), what) for part, what in TRUE.items()]


def table6(ranked: dict[str, np.ndarray], by_cosine: dict[str, np.ndarray]) -> list[Relation]:
    """The relation of BLIP-2's table 6; WITH_ITG and WITHOUT_ITG -> `of_pictures`, re-ranked and by cosine."""
    pairs = ((RECALL, ranked), (COSINE, by_cosine))
    return [_paired(WITH_ITG, WITHOUT_ITG, of[WITH_ITG], of[WITHOUT_ITG], what) for what, of in pairs]


def _paired(larger: str, smaller: str, a: np.ndarray, b: np.ndarray, what: str = RECALL) -> Relation:
    each = a - b
    error = SIGMAS * each.std(ddof=1) / math.sqrt(len(each)) if len(each) > 1 else math.inf
    return Relation(what, larger, smaller, float(each.mean()), float(error))
