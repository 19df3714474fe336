"""How the parameters of a checkpoint become those of a model: fitted by name, or by what a model of another kind starts
from.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from blip_jax import trees
from blip_jax.models.vision import towers


def same(path: str) -> str:
    return path


class Start(NamedTuple):
    """What the parameters of a model start from in a checkpoint of another kind, a pre-training one, where that has
    none of the same path."""

    origin: Callable[[str], str] = same  # path of a parameter -> path of the one it starts from
    new: str = ""  # regex on paths: these start random
    misfit: str = ""  # regex on paths: these start random where the shapes differ


class Fitted(NamedTuple):
    """What `fit` found. params: nested dict of NumPy arrays, without those of `random`."""

    params: dict
    random: list[str]  # paths that start random, as `Start` has it
    missing: list[str]  # paths that the checkpoint has nothing for, with `partial`
    unused: list[str]  # paths of the checkpoint that have no place
    resized: tuple[int, int] | None  # positions of the table before and after


def fit(loaded: dict, shapes: dict, name: str, start: Start = Start(), partial: bool = False) -> Fitted:
    """Parameters `loaded` as those of a model with parameters of `shapes`: the position table of the
    image tower is resized by the rule of its kind, anything else must agree.

    name: of the checkpoint, for messages; partial: parameters that are missing from it may start random.
    ValueError: every parameter that is missing or has another shape.
    """
    have, params, random, missing, problems, resized = dict(trees.paths(loaded)), {}, [], [], [], None
    used = set()
    for path, want in trees.paths(shapes):
        origin = path if path in have else start.origin(path)
        x = have.get(origin)
        if start.new and re.fullmatch(start.new, path) and x is None:
            random.append(path)
            continue
        if x is None:
            missing.append(origin)
            continue
        used.add(origin)
        if path == "vit/pos_embed" and x.shape != want.shape and x.shape[-1] == want.shape[-1]:
            resized = x.shape[0], want.shape[0]
            x = towers.resized(np.asarray(x), want.shape[0], loaded["vit"])
        if x.shape == want.shape:
            params[path] = np.asarray(x, want.dtype)
        elif start.misfit and re.fullmatch(start.misfit, path):
            random.append(path)
        else:
            what = path if origin == path else f"{origin}, from which {path} starts,"
            problems.append(f"{what} is {list(x.shape)}, this config needs {list(want.shape)}")
    problems += [] if partial else [f"{path} is missing" for path in missing]
    if problems:
        raise ValueError(
            "\n  ".join(
                [
                    f"{name} holds another model:",
                    *problems[:20],
                    *([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []),
                    "give the model.* settings it was trained with, or another checkpoint",
                ]
            )
        )
    return Fitted(trees.nest(params.items()), random, missing, sorted(have.keys() - used), resized)
