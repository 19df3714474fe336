"""Sentences about two pictures, as NLVR2's: each is shown with four pairs of pictures, true of two and false of two, so
that it cannot be told from the sentence alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from blip_jax.data.scenes import crowd, world
from blip_jax.data.scenes.crowd import THINGS, a, count
from blip_jax.data.scenes.words import pick

PAIRS = 4  # of a sentence, half of them true
SIDES = ("left", "right")


class Sentence(NamedTuple):
    kind: str  # one of KINDS
    text: str
    holds: Callable[[dict, dict], bool]  # of a left and a right scene
    around: tuple  # the things that it names


def _both(rng, thing) -> Sentence:
    return Sentence("both", f"both pictures show {a(thing)}", lambda *two: all(count(o, thing) for o in two), (thing,))


def _neither(rng, thing) -> Sentence:
    holds = lambda *two: not any(count(one, thing) for one in two)
    return Sentence("neither", f"neither picture shows {a(thing)}", holds, (thing,))


def _only_one(rng, thing) -> Sentence:
    holds = lambda *two: sum(count(one, thing) > 0 for one in two) == 1
    return Sentence("only one", f"only one of the pictures shows {a(thing)}", holds, (thing,))


def _one_and_other(rng, thing) -> Sentence:
    second = pick(rng, [other for other in THINGS if other != thing and any(other)])
    holds = lambda x, y: any(count(p, thing) and count(q, second) for p, q in ((x, y), (y, x)))
    text = f"one picture shows {a(thing)} and the other {a(second)}"
    return Sentence("one and the other", text, holds, (thing, second))


def _side(rng, thing) -> Sentence:
    side = int(rng.integers(2))
    text = f"there is {a(thing)} in the {SIDES[side]} picture"
    return Sentence("one side", text, lambda *two: count(two[side], thing) > 0, (thing,))


# What one picture can decide, and what colour decides, comes more often: from that the rest is learnt sooner.
MAKERS = (_both, _both, _side, _side, _neither, _only_one, _one_and_other)
NAMED = ("colour", "colour", "shape", "both")  # what is said of the thing
KINDS = ("both", "neither", "only one", "one and the other", "one side")


def draw(rng: np.random.Generator) -> Sentence:
    return pick(rng, MAKERS)(rng, pick(rng, crowd.KINDS[pick(rng, NAMED)]))


def sentence(seed: int, index: int, size: int) -> tuple[Sentence, list[tuple[dict, dict, bool]]]:
    """Sentence `index` of world `seed` with its pairs, (left, right, whether it holds), in an order that is drawn."""
    rng = world.stream(seed, index, crowd.SENTENCE)
    said = draw(rng)
    pairs: dict[bool, list] = {True: [], False: []}
    while min(map(len, pairs.values())) < PAIRS // 2:
        two = crowd.draw(rng, size, said.around), crowd.draw(rng, size, said.around)
        label = bool(said.holds(*two))
        if len(pairs[label]) < PAIRS // 2:
            pairs[label].append((*two, label))
    every = [*pairs[True], *pairs[False]]
    return said, [every[i] for i in rng.permutation(PAIRS).tolist()]
