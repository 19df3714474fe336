"""The words of the built-in world (blip_jax/data/scenes/world.py), a writer and a reader of true captions.

`describe` writes a caption of a scene, `is_true` reads any caption and checks it against a scene, `falsify` changes one
thing in a true caption so that it no longer holds. A scene is a plain dict, {"objects": [...], "background": {...}};
places are cells (row, col) of a 3 x 3 grid.
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import NamedTuple

import numpy as np

# --- words: name -> how it is said (objects, backgrounds) or RGB (colours) --------------------------------------------
SHAPES = {
    "circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle",), "diamond": ("diamond",),
    "star": ("star",), "cross": ("cross", "plus"), "ring": ("ring", "hoop"), "heart": ("heart",),
}  # fmt: skip
COLOURS = {  # RGB
    "red": (225, 25, 30), "orange": (255, 135, 0), "yellow": (255, 232, 20), "green": (20, 165, 45),
    "cyan": (0, 215, 235), "blue": (25, 60, 245), "purple": (135, 20, 175), "pink": (255, 95, 190),
    "white": (255, 255, 255), "black": (0, 0, 0),
}  # fmt: skip
SIZES = {"large": ("large", "big"), "small": ("small", "little")}
BACKGROUNDS = {
    "plain": ("plain",), "shaded": ("shaded", "gradient"), "striped": ("striped",),
    "checked": ("checked", "chequered"), "speckled": ("speckled", "noisy"),
}  # fmt: skip
TONES = {  # RGB of the backgrounds: muted, far from every object's colour
    "grey": (150, 150, 150), "beige": (205, 185, 150), "navy": (40, 45, 95), "olive": (100, 100, 50),
    "mint": (165, 205, 180), "brown": (100, 60, 40),
}  # fmt: skip

PLACES = {  # phrase -> (row, col) it claims, None: not said
    "at the top": (0, None), "at the bottom": (2, None), "on the left": (None, 0), "on the right": (None, 2),
    "in the middle": (1, 1), "in the centre": (1, 1), "at the top centre": (0, 1), "at the bottom centre": (2, 1),
    "in the middle left": (1, 0), "in the middle right": (1, 2),
    **{f"{form.format(f'{vertical} {side}')}": (row, col)
       for form in ("in the {}", "in the {} corner")
       for row, words in ((0, ("top", "upper")), (2, ("bottom", "lower"))) for vertical in words
       for col, side in ((0, "left"), (2, "right"))},
}  # fmt: skip
RELATIONS = {  # phrase -> (axis, sign): the first has the smaller (-1) or larger (+1) row (axis 0) or col (axis 1)
    "left of": (1, -1), "to the left of": (1, -1), "right of": (1, 1), "to the right of": (1, 1),
    "above": (0, -1), "below": (0, 1), "under": (0, 1),
}  # fmt: skip
ORDERS = {"from top to bottom": 0, "from left to right": 1}  # phrase -> axis along which the objects are listed
NUMBERS = ("one", "two", "three")
THINGS = ("shapes", "objects", "things", "shape", "object", "thing")  # plurals first: the reader tries them in order
GROUNDS = ("background", "backdrop")
OPENINGS = ("", "", "", "there is", "a picture of", "an image with", "we see", "a drawing of")
FILLERS = ("there is", "a picture of", "an image with", "we see", "a drawing of", "a", "an", "the", "and", "with", "on")
MAX_WORDS = 22  # of a true caption; a comma counts as one


def pick(rng: np.random.Generator, options):
    """One of a sequence, uniformly."""
    return options[int(rng.integers(len(options)))]


# --- writing ----------------------------------------------------------------------------------------------------------
def describe(rng: np.random.Generator, scene: dict, places: bool = True) -> str:
    """One true caption of a scene, of at most MAX_WORDS words; without `places` it does not say where anything is."""
    while True:
        text = _sentence(rng, scene, places)
        if len(text.replace(",", " ,").split()) <= MAX_WORDS:
            return articles(text)


def articles(text: str) -> str:
    """The text with "a" and "an" as what follows asks for."""
    return re.sub(r"\ban? (?=(.))", lambda m: "an " if m[1] in "aeiou" else "a ", text)


def _sentence(rng, scene: dict, places: bool) -> str:
    objects = [scene["objects"][i] for i in rng.permutation(len(scene["objects"]))]
    if len(objects) == 3 and rng.random() < 0.25:
        objects.pop()
    opening, ending = _frame(rng, scene, len(objects))
    style = rng.random()
    if not places:
        body = listed([_named(rng, o) for o in objects])
    elif len(objects) == 1:
        body = _placed(rng, objects[0], 1.0)
    elif style < 0.35 and (related := _relation(rng, *objects[:2])):
        body = " and ".join([related] + [_placed(rng, o, 0.8) for o in objects[2:]])
    elif style < 0.5 and (ordered := _ordered(rng, objects)):
        body = ordered
    else:
        body = listed([_placed(rng, o, 0.8) for o in objects])
    return f"{opening} {body}{ending}".strip()


def _frame(rng, scene: dict, named: int) -> tuple[str, str]:
    """Words before and after the objects: an opening, the background, or how many there are, if all are named."""
    draw = rng.random()
    if draw < 0.35:
        return pick(rng, OPENINGS), f" on {_ground(rng, scene)}"
    if draw < 0.5:
        return f"{_ground(rng, scene)} with", ""
    if draw < 0.65 and named == len(scene["objects"]):
        things = THINGS[:3] if named > 1 else THINGS[3:]
        return pick(rng, ("only", *(f"{NUMBERS[named - 1]} {thing}:" for thing in things))), ""
    return pick(rng, OPENINGS), ""


def _named(rng, o: dict) -> str:
    size = f"{pick(rng, SIZES[o['size']])} " if rng.random() < 0.5 else ""
    return f"a {size}{o['colour']} {pick(rng, SHAPES[o['shape']])}"


def _placed(rng, o: dict, share: float) -> str:
    """The object, and with probability `share` its place."""
    return f"{_named(rng, o)} {pick(rng, _places_of(o['row'], o['col']))}" if rng.random() < share else _named(rng, o)


@functools.lru_cache(maxsize=9)
def _places_of(row: int, col: int) -> tuple[str, ...]:
    return tuple(phrase for phrase, (r, c) in PLACES.items() if r in (None, row) and c in (None, col))


def _relation(rng, a: dict, b: dict) -> str | None:
    holding = [phrase for phrase, (axis, sign) in RELATIONS.items() if sign * (_line(a, axis) - _line(b, axis)) > 0]
    return f"{_named(rng, a)} {pick(rng, holding)} {_named(rng, b)}" if holding else None


def _ordered(rng, objects: list[dict]) -> str | None:
    """All objects along an axis on which no two share a line, if there is one."""
    free = [phrase for phrase, axis in ORDERS.items() if len({_line(o, axis) for o in objects}) == len(objects)]
    if not free:
        return None
    phrase = pick(rng, free)
    return f"{listed([_named(rng, o) for o in sorted(objects, key=lambda o: _line(o, ORDERS[phrase]))])} {phrase}"


def listed(parts: list[str]) -> str:
    """ "a, b and c" """
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def _line(o: dict, axis: int) -> int:
    return o["row"] if axis == 0 else o["col"]


def _ground(rng, scene: dict) -> str:
    kind, tone = pick(rng, BACKGROUNDS[scene["background"]["kind"]]), scene["background"]["tone"]
    said = pick(rng, (f"{kind} {tone}", f"{kind} {tone}", tone))
    return f"a {said} {pick(rng, GROUNDS)}"


# --- reading ----------------------------------------------------------------------------------------------------------
class Claims(NamedTuple):
    """What a caption says: one conjunction of (name, value) pairs and relations."""

    objects: list[list[tuple]]  # of each object named, in order: size, colour, shape, row, col, as far as said
    relations: list[tuple[int, int, int]]  # (i, axis, sign): object i - 1 lies on a line before (-1) or after object i
    picture: list[tuple]  # kind and tone of the background, count of objects, as far as said


def _any(words) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


def _meaning(table: dict) -> dict[str, str]:
    return {word: name for name, words in table.items() for word in words}


_SHAPE, _SIZE, _KIND = _meaning(SHAPES), _meaning(SIZES), _meaning(BACKGROUNDS)
_PHRASE = re.compile(
    rf"(?:(?:(?P<size>{_any(_SIZE)}) )?(?:(?P<colour>{_any(COLOURS)}) )?(?P<shape>{_any(_SHAPE)})"
    rf"|(?:(?P<kind>{_any(_KIND)}) )?(?:(?P<tone>{_any(TONES)}) )?(?:{_any(GROUNDS)})"
    rf"|(?P<order>{_any(ORDERS)})|(?P<relation>{_any(RELATIONS)})|(?P<place>{_any(PLACES)})"
    rf"|(?P<number>{_any(NUMBERS)}) (?:{_any(THINGS)})|(?P<only>only)|(?:{_any(FILLERS)}))(?: |$)"
)


def read(caption: str) -> Claims | None:
    """What the caption claims; None if any of it is outside the grammar or it names no object.

    A place belongs to the object before it, a relation to the objects on its two sides.
    """
    text = " ".join(re.sub(r"[^\w ]", " ", caption.lower()).split())
    objects, relations, picture, orders = [], [], [], []
    relation, only, at = None, False, 0
    while at < len(text):
        m = _PHRASE.match(text, at)
        if not m or (m["place"] or m["relation"]) and (relation or not objects):
            return None
        at = m.end()
        if m["shape"]:
            objects.append(_said(size=_SIZE.get(m["size"]), colour=m["colour"], shape=_SHAPE[m["shape"]]))
            if relation:
                relations.append((len(objects) - 1, *RELATIONS[relation]))
        elif m["place"]:
            row, col = PLACES[m["place"]]
            objects[-1].extend(_said(row=row, col=col))
        relation = m["relation"] or (None if m["shape"] else relation)
        number = NUMBERS.index(m["number"]) + 1 if m["number"] else None
        picture += _said(kind=_KIND.get(m["kind"]), tone=m["tone"], count=number)
        orders += [ORDERS[m["order"]]] if m["order"] else []
        only = only or bool(m["only"])
    if relation or not objects:
        return None
    relations += [(i, axis, -1) for axis in orders for i in range(1, len(objects))]
    return Claims(objects, relations, picture + [("count", len(objects))] * only)


def _said(**claims) -> list[tuple]:
    return [(name, value) for name, value in claims.items() if value is not None]


def holds(claims: Claims, scene: dict) -> bool:
    """Whether distinct objects of the scene can be found of which all the claims hold."""
    picture = {**scene["background"], "count": len(scene["objects"])}
    if any(picture[name] != value for name, value in claims.picture):
        return False
    return any(
        all(o[name] == value for o, said in zip(objects, claims.objects) for name, value in said)
        and all(
            sign * (_line(objects[i - 1], axis) - _line(objects[i], axis)) > 0 for i, axis, sign in claims.relations
        )
        for objects in itertools.permutations(scene["objects"], len(claims.objects))
    )


def is_true(scene: dict, caption: str) -> bool:
    """Whether `caption` is in the grammar of this world and all that it says holds of `scene` (or a record's truth)."""
    claims = read(caption)
    return claims is not None and holds(claims, scene)


# --- making captions false --------------------------------------------------------------------------------------------
_SWAPS = (_SHAPE, dict(zip(COLOURS, COLOURS)), _SIZE, PLACES, RELATIONS, _KIND, dict(zip(TONES, TONES)))
_SWAPPABLE = re.compile(rf"\b(?:{_any(itertools.chain(*_SWAPS))})\b")


def falsify(rng: np.random.Generator, scene: dict, caption: str) -> str:
    """A true caption with one word or place or relation changed such that it can still be read but no longer holds."""
    spots = list(_SWAPPABLE.finditer(caption))
    while True:
        spot = pick(rng, spots)
        table = next(t for t in _SWAPS if spot[0] in t)
        other = pick(rng, [phrase for phrase, meaning in table.items() if meaning != table[spot[0]]])
        changed = articles(caption[: spot.start()] + other + caption[spot.end() :])
        claims = read(changed)
        if claims is not None and not holds(claims, scene):
            return changed
