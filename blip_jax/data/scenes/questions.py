"""Questions that a picture decides, and what ten people answer, as in VQA.

Of every kind the answer is drawn first, of those that the picture allows, and then what is asked about: so the answer
cannot be told from the question. What is asked for and is not there mostly has a colour or a shape of what is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from blip_jax.data.scenes import crowd, world
from blip_jax.data.scenes.crowd import KINDS, MOST, Thing, count, found, named
from blip_jax.data.scenes.words import SHAPES, TONES, pick

PEOPLE = 10
NEAR = 0.75  # probability that what is asked for and is not there is like something that is
OTHERWISE, MISTAKEN = 0.1, 0.03  # probability that one of the people says it in other words, or is wrong
COUNTS = {  # kind of question -> kind of thing that is counted
    "how many": "any",
    "how many of a colour": "colour",
    "how many of a shape": "shape",
    "how many of colour and shape": "both",
}
COLOUR, SHAPE, GROUND, THERE = "what colour", "what shape", "what background", "is there"
ASKED = (*COUNTS, COLOUR, SHAPE, GROUND, THERE)
TYPES = {**dict.fromkeys(COUNTS, "number"), **dict.fromkeys((COLOUR, SHAPE, GROUND), "other"), THERE: "yes/no"}
ABOUT = (*KINDS["shape"], *KINDS["colour"], *KINDS["both"])  # what is asked whether it is there
WORDS = ("none", "one", "two", "three")
ANSWERS = {  # kind of question -> all of its answers
    **dict.fromkeys(COUNTS, tuple(map(str, range(MOST + 1)))),
    COLOUR: crowd.COLOURS,
    SHAPE: crowd.SHAPES,
    GROUND: tuple(TONES),
    THERE: ("yes", "no"),
}
SYNONYMS = {str(n): word for n, word in enumerate(WORDS)} | {shape: SHAPES[shape][-1] for shape in crowd.SHAPES}


class Question(NamedTuple):
    kind: str  # one of ASKED
    text: str
    answer: str
    thing: Thing  # what it is about


def text_of(kind: str, thing: Thing, n: int) -> str:
    """The question of this kind about a thing that is there `n` times."""
    if kind == GROUND:
        return "what colour is the background?"
    if kind == THERE:
        return f"is there {crowd.a(thing)}?"
    if kind in COUNTS:
        return f"how many {named(thing, 2)} are there?"
    return f"{kind} {'is' if n == 1 else 'are'} the {named(thing, n)}?"


def ask(rng: np.random.Generator, picture: dict, kind: str) -> Question | None:
    """A question of this kind; None: the picture decides none."""
    if kind == GROUND:
        return Question(kind, text_of(kind, Thing(), 1), picture["background"]["tone"], Thing())
    if kind in (COLOUR, SHAPE):
        return _of_some(rng, picture, kind)
    things = ABOUT if kind == THERE else KINDS[COUNTS[kind]]
    thing, n = _drawn(rng, picture, things, yes_or_no=kind == THERE)
    answer = str(n) if kind in COUNTS else "yes" if n else "no"
    return Question(kind, text_of(kind, thing, n), answer, thing)


def _drawn(rng, picture: dict, things: Sequence[Thing], yes_or_no: bool = False) -> tuple[Thing, int]:
    """One of `things` and how often it is there, which is drawn first."""
    groups: dict[int, list[Thing]] = {}
    for thing in things:
        n = count(picture, thing)
        groups.setdefault(min(n, 1) if yes_or_no else n, []).append(thing)
    group = groups[pick(rng, sorted(groups))]
    near = [thing for thing in group if _near(picture, thing)]
    thing = pick(rng, near if near and rng.random() < NEAR else group)
    return thing, count(picture, thing)


def _near(picture: dict, thing: Thing) -> bool:
    return any(count(picture, part) for part in (Thing(thing.colour), Thing(None, thing.shape)) if any(part))


def _of_some(rng, picture: dict, kind: str) -> Question | None:
    """What colour the objects of a shape have, or what shape those of a colour, where all have the same."""
    given, wanted = ("shape", "colour") if kind == COLOUR else ("colour", "shape")
    some = [(thing, found(picture, thing)) for thing in KINDS[given]]
    same = [(thing, own) for thing, own in some if len({o[wanted] for o in own}) == 1]
    if not same:
        return None
    thing, own = pick(rng, same)
    return Question(kind, text_of(kind, thing, len(own)), own[0][wanted], thing)


def questions(seed: int, index: int, size: int, n: int) -> list[Question]:
    """n questions about picture `index` of crowd.py, of different kinds if there are as many."""
    rng, picture = world.stream(seed, index, crowd.QUESTION), crowd.scene(seed, index, size)
    out: list[Question] = []
    while len(out) < n:
        for kind in rng.permutation(len(ASKED)).tolist():
            if len(out) < n and (question := ask(rng, picture, ASKED[kind])):
                out.append(question)
    return out


def people(rng: np.random.Generator, question: Question) -> list[str]:
    """What ten people answer: most of them alike, some in other words, hardly one of them wrongly."""
    others = [text for text in ANSWERS[question.kind] if text != question.answer]
    wrong, said = pick(rng, others), SYNONYMS.get(question.answer, question.answer)
    draws = rng.random(PEOPLE)
    answers = [wrong if x < MISTAKEN else said if x < MISTAKEN + OTHERWISE else question.answer for x in draws]
    return answers if answers.count(question.answer) > PEOPLE // 2 else [question.answer] * PEOPLE
