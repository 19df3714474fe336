"""Sentences about two pictures, as NLVR2's: each is shown with four pairs of pictures, true of two and false of two, so
that it cannot be told from the sentence alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from blip_jax.data.scenes import crowd, world
from blip_jax.data.scenes.crowd import THINGS, a, count, named
from blip_jax.data.scenes.words import pick

PAIRS = 4  # of a sentence, half of them true
IN_ALL = ("none", "one", "two", "three", "four")
SIDES = ("left", "right")


class Sentence(NamedTuple):
    kind: str  # one of KINDS
    text: str
    holds: Callable[[dict, dict], bool]  # of a left and a right scene
    around: tuple  # the things that it names


def _in_all(rng, thing) -> Sentence:
    n = int(rng.integers(1 if any(thing) else 2, len(IN_ALL)))  # two pictures show two shapes at least
    text = f"there {'is' if n == 1 else 'are'} {IN_ALL[n]} {named(thing, n)} in all"
    return Sentence("in all", text, lambda *two: sum(count(one, thing) for one in two) == n, (thing,))


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


def _more(rng, thing) -> Sentence:
    side = int(rng.integers(2))
    text = f"the {SIDES[side]} picture shows more {named(thing, 2)} than the {SIDES[1 - side]} one"
    return Sentence("more", text, lambda *two: count(two[side], thing) > count(two[1 - side], thing), (thing,))


def _as_many(rng, thing) -> Sentence:
    holds = lambda x, y: count(x, thing) == count(y, thing)
    return Sentence("as many", f"both pictures show equally many {named(thing, 2)}", holds, (thing,))


OF_ALL = (_in_all, _more, _as_many)  # that say something of "shapes", too, which every picture shows
MAKERS = (*OF_ALL, _both, _neither, _only_one, _one_and_other, _side)
KINDS = ("in all", "more", "as many", "both", "neither", "only one", "one and the other", "one side")


def draw(rng: np.random.Generator) -> Sentence:
    make = pick(rng, MAKERS)
    things = crowd.KINDS[
        pick(rng, ("any", "colour", "shape", "both") if make in OF_ALL else ("colour", "shape", "both"))
    ]
    return make(rng, pick(rng, things))


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
