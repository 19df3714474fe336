"""The built-in world: pictures of one to three coloured shapes, captions of them, web noise, and the truth beside it.

Record i of world `seed` is a pure function of (seed, i): neither the number of records nor the noise share changes its
picture. `blip_jax.data.scenes.words.is_true` scores any caption against a record's truth.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

from blip_jax.data.scenes import words
from blip_jax.data.scenes.words import COLOURS, pick

DIAMETERS = {"large": (0.29, 0.32), "small": (0.20, 0.23)}  # of the picture's side; a cell of the grid is 0.333
EASY_SHAPES = ("circle", "square", "triangle", "cross")
EASY_COLOURS = ("red", "yellow", "green", "blue", "white", "black")
KEPT = 64  # records of pictures up to this size are drawn once and kept
CONTRAST = 20  # a pattern's two shades are the tone -+ this

# web noise: kind -> share of the noisy captions
NOISE = {"wrong": 0.25, "partly": 0.50, "boilerplate": 0.09, "file_name": 0.07, "language": 0.06, "empty": 0.03}
BOILERPLATE = (
    "click here to enlarge the picture", "free shipping on all orders over {} dollars", "photo {} of {}",
    "image may be subject to copyright", "sign up for our newsletter", "buy now and save {} percent",
    "download this stock photo in high resolution", "posted {} days ago", "all rights reserved", "no caption available",
)  # fmt: skip
FILE_NAMES = ("IMG_{:04d}.jpg", "DSC{:05d}.JPG", "image-{}.png", "screenshot_{:04d}.png", "scan{:03d}.tif")
OTHER_LANGUAGES = (
    "jetzt günstig online kaufen", "kostenloser Versand ab 50 Euro", "ein schönes Bild für das Wohnzimmer",
    "Bild vergrößern", "cliquez ici pour agrandir", "livraison gratuite en 48 heures", "une belle image à imprimer",
    "tous droits réservés", "haga clic para ampliar", "envío gratis a todo el país", "imagen decorativa para niños",
    "todos los derechos reservados",
)  # fmt: skip

_WORLD, _CAPTION, _NOISE = range(3)  # purposes of a record's random streams; those of tasks are in crowd.py


def stream(seed: int, index: int, purpose: int, part: int = 0) -> np.random.Generator:
    """What is drawn for one purpose, and one of its parts, of record `index` of world `seed`."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64), counter=[0, 0, part, purpose]))


# --- the world --------------------------------------------------------------------------------------------------------
def draw_scene(rng: np.random.Generator, size: int, easy: bool = False) -> dict:
    """What is in a picture of `size` pixels: {"objects": [...], "background": {...}}, plain values only.

    Objects lie in different cells and wholly inside them, so none hides another; their colours differ. `easy`: one or
    two large objects of EASY_SHAPES and EASY_COLOURS on a plain background.
    """
    if easy:
        return _draw(rng, size, 1 + int(rng.random() < 0.7), EASY_COLOURS, EASY_SHAPES, ("large",), ("plain",))
    count = 1 + int(rng.choice(3, p=(0.35, 0.4, 0.25)))
    return _draw(rng, size, count, tuple(COLOURS), tuple(words.SHAPES), tuple(DIAMETERS), tuple(words.BACKGROUNDS))


def draw_crowd(rng: np.random.Generator, size: int, kinds: Sequence[tuple[str, str]]) -> dict:
    """An easy scene whose objects are of these (colour, shape), which may be alike; 9 at most."""
    objects = [
        {"colour": colour, "shape": shape, **_placed(rng, cell, size, "large")}
        for cell, (colour, shape) in zip(rng.permutation(9).tolist(), kinds)
    ]
    return {"objects": objects, "background": _background(rng, ("plain",))}


def _draw(rng, size: int, count: int, all_colours: tuple, shapes: tuple, kinds: tuple, backgrounds: tuple) -> dict:
    cells, colours = rng.permutation(9)[:count], rng.permutation(len(all_colours))[:count]
    objects = []
    for cell, colour in zip(cells.tolist(), colours.tolist()):
        place = _placed(rng, cell, size, pick(rng, kinds))
        objects.append({"shape": pick(rng, shapes), "colour": all_colours[colour], **place})
    return {"objects": objects, "background": _background(rng, backgrounds)}


def _placed(rng, cell: int, size: int, kind: str) -> dict:
    """Size and place of an object in cell 0..8 of the grid."""
    row, col = divmod(cell, 3)
    diameter = round(size * rng.uniform(*DIAMETERS[kind]))
    left, top = (_offset(rng, line, diameter, size) for line in (col, row))
    return {"size": kind, "row": row, "col": col, "left": left, "top": top, "diameter": diameter}


def _background(rng, kinds: tuple) -> dict:
    background = {"kind": pick(rng, kinds), "tone": pick(rng, tuple(words.TONES))}
    return {**background, "pattern_seed": int(rng.integers(2**32))}


def _offset(rng, line: int, diameter: int, size: int) -> int:
    """First pixel of an object within the cell `line` (0..2) of a row or column."""
    first, last = line * size // 3, (line + 1) * size // 3 - diameter
    return int(rng.integers(first, last + 1))


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Outline in the square [-1, 1], y downwards."""
    turn = [2 * math.pi * i / 48 for i in range(48)]
    if shape == "heart":  # the usual heart curve, scaled to fill the square
        waves = ((13, 1), (-5, 2), (-2, 3), (-1, 4))
        return [(math.sin(t) ** 3, 0.13 - sum(a * math.cos(n * t) for a, n in waves) / 15) for t in turn]
    if shape == "star":
        spikes = [(math.pi * i / 5, 0.42 if i % 2 else 1.05) for i in range(10)]
        return [(r * math.sin(t), 0.05 - r * math.cos(t)) for t, r in spikes]
    if shape == "cross":
        points = [(-0.34, -1), (0.34, -1), (0.34, -0.34)]  # one arm, then the others, each turned by a right angle
        while len(points) < 12:
            points += [(-y, x) for x, y in points[-3:]]
        return points
    straight = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
        "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    }
    return straight.get(shape) or [(math.cos(t), math.sin(t)) for t in turn]  # circle, ring


@functools.lru_cache(maxsize=1024)
def _mask(shape: str, diameter: int) -> Image.Image:
    """Coverage of the shape, 0..255, antialiased by drawing it eight times as large."""
    side = 8 * diameter
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    draw.polygon([((x + 1) * side / 2, (y + 1) * side / 2) for x, y in _polygon(shape)], fill=255)
    if shape == "ring":
        draw.ellipse([0.27 * side, 0.27 * side, 0.73 * side, 0.73 * side], fill=0)
    return image.resize((diameter, diameter), Image.Resampling.BOX)


def _pattern(kind: str, size: int, rng) -> np.ndarray:
    """f32[size, size] in 0..1 between the two shades of a background."""
    if kind == "plain":
        return np.full((size, size), 0.5, np.float32)
    if kind == "speckled":
        return rng.random((size, size), np.float32)
    x, y = np.meshgrid(np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32))
    ramp = pick(rng, (x, y, x + y))
    if kind == "shaded":
        ramp = ramp / ramp.max()
        return ramp if rng.random() < 0.5 else 1 - ramp
    period = size * rng.uniform(0.07, 0.11)
    if kind == "striped":
        return np.floor(ramp / period) % 2
    return (np.floor(x / period) + np.floor(y / period)) % 2


def render(scene: dict, size: int) -> Image.Image:
    """The picture, RGB, `size` x `size`; pure."""
    background = scene["background"]
    shade = _pattern(background["kind"], size, np.random.Generator(np.random.Philox(background["pattern_seed"])))
    tone = np.array(words.TONES[background["tone"]], np.float32)
    image = Image.fromarray((tone + (2 * CONTRAST * shade[:, :, None] - CONTRAST)).clip(0, 255).astype(np.uint8))
    for o in scene["objects"]:
        image.paste(COLOURS[o["colour"]], (o["left"], o["top"]), _mask(o["shape"], o["diameter"]))
    return image


# --- records ----------------------------------------------------------------------------------------------------------
class Scenes:
    """A source of `count` records of world `seed`, each a picture and `captions` captions.

    noise: the share of the captions that is web noise.

    A record is {"key": "<source>:scene-<seed>-<index>", "image": PNG bytes, "captions": [str], "image_id": the same for
    the same picture in another source, "truth"}; its truth is {"objects",
    "background", "noise": kind of noise of the first caption or None, "true_caption"}, all plain values.
    """

    def __init__(
        self,
        seed: int,
        count: int,
        size: int = 64,
        noise: float = 0.0,
        captions: int = 1,
        easy: bool = False,
        name: str = "scenes",
    ):
        """seed: 0 or more; size: pixels, at least 32, so that shapes can be told; noise: share of captions, 0..1."""
        problems = [
            f"{argument} is {value!r}, expected {expected}"
            for argument, value, expected, good in (
                ("seed", seed, "0 or more", seed >= 0),
                ("count", count, "at least 1: set the number of records", count >= 1),
                ("size", size, "at least 32 pixels", size >= 32),
                ("noise", noise, "a share between 0 and 1", 0 <= noise <= 1),
                ("captions", captions, "at least 1 a record", captions >= 1),
            )
            if not good
        ]
        if problems:
            raise ValueError(f"source {name!r} of scenes: {'; '.join(problems)}")
        self.name, self.seed, self.count, self.size, self.noise = name, seed, count, size, noise
        self.captions, self.easy = captions, easy

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.count:
            raise IndexError(f"record {index} of {self.count} of source {self.name!r}")
        return dict(_kept(self, index)) if self.size <= KEPT else _record(self, index)

    def captions_of(self, index: int) -> list[str]:
        """The captions of record `index` without its picture."""
        return [c for _, c in self.web_captions(index)]

    def scene(self, index: int) -> dict:
        """What is in picture `index`."""
        return draw_scene(stream(self.seed, index, _WORLD), self.size, self.easy)

    def clean_captions(self, index: int, n: int) -> list[str]:
        """n true captions of record `index`, not necessarily different; the first is its truth's "true_caption"."""
        scene = self.scene(index)
        return [
            words.describe(stream(self.seed, index, _CAPTION, part), scene, places=not self.easy) for part in range(n)
        ]

    def web_captions(self, index: int) -> list[tuple[str | None, str]]:
        """(kind of noise or None, caption) of every caption of record `index`, without drawing the picture."""
        scene = self.scene(index)
        return [
            self._web_caption(index, part, scene, c) for part, c in enumerate(self.clean_captions(index, self.captions))
        ]

    def _web_caption(self, index: int, part: int, scene: dict, true_caption: str) -> tuple[str | None, str]:
        rng = stream(self.seed, index, _NOISE, part)
        if rng.random() >= self.noise:
            return None, true_caption
        kind = tuple(NOISE)[int(rng.choice(len(NOISE), p=tuple(NOISE.values())))]
        number = int(rng.integers(1, 1000))
        match kind:
            case "wrong":  # the caption of some other picture of the world, false here
                while words.is_true(scene, caption := self.clean_captions(int(rng.integers(2**32)), 1)[0]):
                    pass
                return kind, caption
            case "partly":
                return kind, words.falsify(rng, scene, true_caption)
            case "boilerplate":
                return kind, pick(rng, BOILERPLATE).format(number, number + 1)
            case "file_name":
                return kind, pick(rng, FILE_NAMES).format(number)
            case "language":
                return kind, pick(rng, OTHER_LANGUAGES)
        return kind, ""  # empty


def _record(world: Scenes, index: int) -> dict:
    scene, png = world.scene(index), io.BytesIO()
    render(scene, world.size).save(png, "PNG", compress_level=1)
    told = world.web_captions(index)
    truth = {**scene, "noise": told[0][0], "true_caption": world.clean_captions(index, 1)[0]}
    return {
        "key": f"{world.name}:scene-{world.seed}-{index}",
        "image": png.getvalue(),
        "captions": [c for _, c in told],
        "image_id": f"scene-{world.seed}-{index}-{world.size}px{'-easy' * world.easy}",  # all that the picture is of
        "truth": truth,
    }


# training sees a picture of so small a world many times; 13 KB each at most, as only small ones are asked for
_kept = functools.lru_cache(maxsize=10_000)(_record)


def vocab_captions(n: int, seed: int = 0) -> Iterator[str]:
    """True captions of the first n scenes of a world, without drawing them: to train a vocabulary on."""
    world = Scenes(seed, n)
    return (world.clean_captions(i, 1)[0] for i in range(n))
