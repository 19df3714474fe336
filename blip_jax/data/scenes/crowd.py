"""Pictures of one to three shapes that may be alike, so that there is something to count: the world of the tasks.

As the easy side of world.py, but for that. Picture i of world `seed` is a pure function of (seed, i), and so is all
that is asked and said about it (questions.py, dialogs.py).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from blip_jax.data.scenes import words, world
from blip_jax.data.scenes.words import pick
from blip_jax.data.scenes.world import EASY_COLOURS as COLOURS
from blip_jax.data.scenes.world import EASY_SHAPES as SHAPES

SCENE, CAPTION, QUESTION, PEOPLE, SENTENCE, DIALOG = range(3, 9)  # purposes of random streams, behind world.py's
OBJECTS = (0.2, 0.4, 0.4)  # probability of one, two, three
ALIKE = 0.5  # probability that an object has the colour of one that was drawn before, and likewise the shape
MOST = len(OBJECTS)
GROUND_TOLD = 0.5  # probability that a caption tells the background


class Thing(NamedTuple):
    """What a phrase names: objects of this colour and this shape; None: of any."""

    colour: str | None = None
    shape: str | None = None


KINDS = {  # what is said of a thing -> all such things
    "any": (Thing(),),
    "colour": tuple(Thing(colour) for colour in COLOURS),
    "shape": tuple(Thing(None, shape) for shape in SHAPES),
    "both": tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES),
}
THINGS = tuple(thing for things in KINDS.values() for thing in things)


def named(thing: Thing, n: int = 1) -> str:
    """Such as "red square", of n != 1 "red squares"; "red shape", where any shape is meant."""
    noun = thing.shape or "shape"
    noun += "" if n == 1 else "es" if noun.endswith("s") else "s"
    return f"{thing.colour} {noun}" if thing.colour else noun


def a(thing: Thing) -> str:
    """ "a red square" """
    return f"a {named(thing)}"  # no name begins with a vowel


def found(picture: dict, thing: Thing) -> list[dict]:
    """The objects of a scene that are such a thing."""
    return [o for o in picture["objects"] if thing.colour in (None, o["colour"]) and thing.shape in (None, o["shape"])]


def count(picture: dict, thing: Thing) -> int:
    return len(found(picture, thing))


def draw(rng: np.random.Generator, size: int, around: Sequence[Thing] = ()) -> dict:
    """A scene as world.py has it; around: things of which, too, colours and shapes are taken again."""
    colours, shapes = ([getattr(thing, part) for thing in around] for part in Thing._fields)
    kinds = []
    for _ in range(1 + int(rng.choice(MOST, p=OBJECTS))):
        kinds.append((_again(rng, colours, COLOURS), _again(rng, shapes, SHAPES)))
        colours, shapes = [*colours, kinds[-1][0]], [*shapes, kinds[-1][1]]
    return world.draw_crowd(rng, size, kinds)


def _again(rng, before: list, options: tuple) -> str:
    before = [value for value in before if value]
    return pick(rng, before) if before and rng.random() < ALIKE else pick(rng, options)


def scene(seed: int, index: int, size: int) -> dict:
    """What is in picture `index`."""
    return draw(world.stream(seed, index, SCENE), size)


def png(picture: dict, size: int) -> bytes:
    """A scene drawn."""
    out = io.BytesIO()
    world.render(picture, size).save(out, "PNG", compress_level=1)
    return out.getvalue()


def describe(rng: np.random.Generator, picture: dict) -> str:
    """A true caption that names every object, in an order that is drawn, and half of the time the background.

    Shorter than those of words.py, whose sizes and synonyms tell nothing here: a small model has few captions to learn
    from.
    """
    objects = [picture["objects"][i] for i in rng.permutation(len(picture["objects"]))]
    told = words.listed([a(Thing(o["colour"], o["shape"])) for o in objects])
    ground = f" on a {picture['background']['tone']} background" if rng.random() < GROUND_TOLD else ""
    return words.articles(told + ground)


def captions(seed: int, index: int, size: int, n: int) -> list[str]:
    """n true captions of picture `index`, not necessarily different."""
    picture = scene(seed, index, size)
    return [describe(world.stream(seed, index, CAPTION, part), picture) for part in range(n)]


def hint(rng: np.random.Generator, picture: dict) -> str:
    """A true caption that names one object alone."""
    return describe(rng, {**picture, "objects": [pick(rng, picture["objects"])]})
