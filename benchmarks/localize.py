"""How often a heat map of `localize` lies on the object that is named, in pictures of the built-in world.

    python benchmarks/localize.py --model=runs/demo_tasks/pretrain [--count=100 --layer=N]

In each of --count pictures with two objects of different colours the text names both, "a red square and a blue circle"
(the model is trained on such captions), and one of them, drawn at random, is asked for: the map of its colour's and its
shape's words, the mean of both. A hit is a map whose hottest place lies in the object's box (the pointing game of Zhang
et al., 2016). Beside it: a text that names the object alone, the other object's share, and what chance gives, the share
of the map's cells whose middle lies in the box. The error is one standard deviation of a share of so many pictures.

The first line says how a text with the two colours exchanged is scored, too: a model that scores it as high as the true
one has not learned which colour belongs to which shape, and finds an object by its colour alone, if it does.
"""

from __future__ import annotations

import io

import numpy as np
from absl import app, flags
from PIL import Image

import blip_jax
from blip_jax.data.scenes.world import Scenes
from blip_jax.inference.localize import peak

MODEL = flags.DEFINE_string("model", None, "anything that from_pretrained takes, trained on the easy world")
COUNT = flags.DEFINE_integer("count", 100, "pictures with two objects", lower_bound=1)
LAYER = flags.DEFINE_integer("layer", None, "of the text encoder; default: 7 of 12")
SEED = flags.DEFINE_integer("seed", 1000, "of the world; those of training are 1, 2 and 3")


def pictures(size: int) -> list[tuple[np.ndarray, list[dict]]]:
    """(u8[size,size,3], its two objects), the one that is asked for first."""
    world, rng, found, i = Scenes(SEED.value, 1 << 30, size=size, easy=True), np.random.default_rng(SEED.value), [], 0
    while len(found) < COUNT.value:
        if len(world.scene(i)["objects"]) == 2:
            record = world[i]
            objects = [record["truth"]["objects"][k] for k in rng.permutation(2)]
            found.append((np.asarray(Image.open(io.BytesIO(record["image"]))), objects))
        i += 1
    return found


def hit(heat: np.ndarray, size: int, o: dict) -> bool:
    x, y = (size * share for share in peak(heat))
    return o["left"] <= x < o["left"] + o["diameter"] and o["top"] <= y < o["top"] + o["diameter"]


def swapped(pair: list[dict]) -> str:
    """A text of both objects, each with the other's colour."""
    one, other = pair
    return f"a {other['colour']} {one['shape']} and a {one['colour']} {other['shape']}"


def said(share: float) -> str:
    error = (share * (1 - share) / COUNT.value) ** 0.5
    return f"{100 * share:5.1f} % +- {100 * error:.1f}"


def main(_) -> None:
    model = blip_jax.from_pretrained(MODEL.value)
    size = model.cfg.model.img_size
    scenes, rng = pictures(size), np.random.default_rng(0)
    images, pairs = [img for img, _ in scenes], [objects for _, objects in scenes]
    named = lambda o: f"a {o['colour']} {o['shape']}"
    first = rng.random(len(pairs)) < 0.5  # which of the two the text names first
    both = [" and ".join(map(named, pair if f else pair[::-1])) for pair, f in zip(pairs, first)]
    told = model.localize(images, both, layer=LAYER.value)
    apart = [k for k, (one, other) in enumerate(pairs) if one["shape"] != other["shape"]]
    false = model.match([images[k] for k in apart], [swapped(pairs[k]) for k in apart])
    alone = model.localize(images, [named(pair[0]) for pair in pairs], layer=LAYER.value)

    maps = {  # what is asked for -> the map of it in each picture; a text is "a COLOUR SHAPE and a COLOUR SHAPE"
        "colour and shape, text of both objects": [
            found["maps"][1 if f else 5 :][:2].mean(axis=0) for found, f in zip(told, first)
        ],
        "colour and shape, text of one object": [found["maps"][1:].mean(axis=0) for found in alone],
        "the whole text, of one object": [found["text_map"] for found in alone],
    }
    print(f"{model!r}: {len(scenes)} pictures; score {np.mean([found['score'] for found in told]):.2f} of both, "
          f"{false['probability'].mean():.2f} with their colours exchanged, "
          f"{np.mean([found['score'] for found in alone]):.2f} of one")  # fmt: skip
    for name, heats in maps.items():
        on, off = (np.mean([hit(heat, size, pair[k]) for heat, pair in zip(heats, pairs, strict=True)]) for k in (0, 1))
        print(f"{name}: on the object {said(on)}, on the other {said(off)}")
    cells = np.eye(told[0]["text_map"].size).reshape(-1, *told[0]["text_map"].shape)
    chance = np.mean([hit(cell, size, pair[0]) for cell in cells for pair in pairs])
    print(f"chance: {100 * chance:.1f} % of the cells; 50 % of a map that lies on either object")


if __name__ == "__main__":
    flags.mark_flag_as_required("model")
    app.run(main)
