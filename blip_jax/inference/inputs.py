"""Pictures, texts and numbers as callers give them: one or many, as path, bytes, PIL image or array.

What is wrong is named by its place.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from blip_jax.data import image
from blip_jax.data.source import MAX_BYTES, read_at
from blip_jax.data.text.clean import plain_text

KINDS = "a path, bytes, a PIL image, or an array u8[H,W,3] (grey u8[H,W] and RGBA u8[H,W,4] too)"


class Picture(NamedTuple):
    """A picture that is not decoded yet; `name` is what an error calls it, as images[3] 'photo.jpg'."""

    name: str
    given: Any


def pictures(images) -> tuple[list[Picture], bool]:
    """The pictures, and whether it was one rather than several. ValueError: lists every item that is none, or no file.

    Several are any iterable of single ones, or an array u8[N,H,W,3]. Nothing is decoded here.
    """
    if _single(images):
        rows, one = [Picture(_named("images", images), images)], True
    else:
        if images is None or isinstance(images, dict) or not hasattr(images, "__iter__"):
            raise ValueError(f"images is {_kind(images)}: give {KINDS}, or several of these")
        rows, one = [Picture(_named(f"images[{i}]", x), x) for i, x in enumerate(images)], False
    if not rows:
        raise ValueError("images is empty: give at least one")
    if problems := [problem for row in rows if (problem := _problem(row))]:
        raise ValueError("; ".join(problems))
    return rows, one


def pixels(picture: Picture, size: int, max_pixels: int) -> np.ndarray:
    """u8[size,size,3] as evaluation sees it (data/image.py), upright by its EXIF orientation. Errors: `opened`."""
    with opened(picture, max_pixels) as found:
        return image.eval_transform(found, size)


def photograph(picture: Picture, side: int, max_pixels: int) -> Image.Image:
    """The picture for people to look at, RGB, upright, no side longer than `side` pixels. Errors: `opened`."""
    with opened(picture, max_pixels) as found:
        shrink = min(1.0, side / max(found.size))
        return found.resize([max(1, round(n * shrink)) for n in found.size], Image.Resampling.LANCZOS).convert("RGB")


@contextlib.contextmanager
def opened(picture: Picture, max_pixels: int) -> Iterator[Image.Image]:
    """The decoded picture, RGB or L, upright by its EXIF orientation.

    What is irregular about it, such as values of 16 bits, is said on standard error.
    ValueError: the picture's name and why it cannot be used.
    """
    given = picture.given
    try:
        if isinstance(given, (str, os.PathLike)):
            given = read_at(os.fspath(given), 0, MAX_BYTES + 1)
        if isinstance(given, (bytes, bytearray, memoryview)):
            if memoryview(given).nbytes > MAX_BYTES:
                raise image.BadImage(f"too large: more than {MAX_BYTES} bytes, which no picture needs")
            with image.decoded([bytes(given)], max_pixels, upright=True) as [(found, notes)]:
                yield _told(picture, notes, found)
        elif isinstance(given, Image.Image):
            with image.converted(given) as (found, notes):
                yield _told(picture, notes, found)
        else:
            yield _from_array(np.asarray(given))
    except OSError as e:
        raise ValueError(f"{picture.name}: {(e.strerror or str(e)).lower()}") from None
    except image.BadImage as e:
        raise ValueError(f"{picture.name}: {e}") from None


def _told(picture: Picture, notes: list[str], seen: Image.Image) -> Image.Image:
    for note in notes:
        tqdm.write(f"note: {picture.name}: {note}", file=sys.stderr)  # above a bar of progress, if there is one
    return seen


def texts(given, name: str, clean: Callable[[str], str], empty: bool = False) -> tuple[list[str], bool]:
    """The texts cleaned by `clean`, and whether it was one.

    ValueError: lists every one that is no text or holds no word, which `empty` allows.

    `name`: of the argument. Characters that cannot be encoded are removed first, as in training.
    """
    one = isinstance(given, str)
    if not one and (given is None or isinstance(given, (bytes, dict)) or not hasattr(given, "__iter__")):
        raise ValueError(f"{name} is {_kind(given)}: give a str, or several")
    rows = [given] if one else list(given)
    if not rows:
        raise ValueError(f"{name} is empty: give at least one text")
    out, problems = [], []
    for i, row in enumerate(rows):
        where = name if one else f"{name}[{i}]"
        if not isinstance(row, str):
            problems.append(f"{where} is {_kind(row)}: give a str")
            continue
        out.append(clean(plain_text(row)[0]))
        if not any(letter.isprintable() and not letter.isspace() for letter in out[-1]) and not empty:
            problems.append(
                f"{where} is empty" if not row.strip() else f"{where} is {row[:40]!r}, of which cleaning leaves no word"
            )
    if problems:
        raise ValueError("; ".join(problems))
    return out, one


def pairs(images: int, texts: int, name: str) -> tuple[list[int], list[int]]:
    """Which image and which text make each pair: one by one, or a single one of either with all of the other."""
    if images != texts and 1 not in (images, texts):
        raise ValueError(f"{images} images and {texts} {name}: give as many of both, or one of either")
    n = max(images, texts)
    each, first = list(range(n)), [0] * n
    return (first if images == 1 else each), (first if texts == 1 else each)


def whole(value, name: str) -> int:
    """The argument `name` as int. ValueError: it is no whole number, such as 1.5, "2" or True."""
    try:
        if not isinstance(value, (bool, np.bool_)):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} is {shown(value)}: give a whole number")


def number(value, name: str) -> float:
    """The argument `name` as int or float. ValueError: it is no number, or not finite."""
    try:
        if not isinstance(value, (bool, np.bool_, str, bytes)) and math.isfinite(value):
            return value if isinstance(value, (int, float)) else float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} is {shown(value)}: give a finite number")


def shown(value) -> str:
    """A value in an error, in one line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _single(x) -> bool:
    if isinstance(x, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        return True
    return hasattr(x, "__array__") and getattr(x, "ndim", 0) < 4


def _problem(picture: Picture) -> str:
    """What can be seen to be wrong without reading the picture."""
    given = picture.given
    if isinstance(given, (str, os.PathLike)):
        path = pathlib.Path(given)
        if str(given).startswith(("http://", "https://")):
            return f"{picture.name}: addresses are not fetched; give the file or its bytes"
        if path.is_file():
            return ""
        return f"{picture.name}: " + ("it is a folder" if path.is_dir() else "no such file")
    if isinstance(given, Image.Image):
        return f"{picture.name} is a PIL image of {given.width}x{given.height}: it has no pixels" * (0 in given.size)
    if isinstance(given, (bytes, bytearray, memoryview)):
        return ""
    if not hasattr(given, "__array__"):
        return f"{picture.name} is {_kind(given)}: give {KINDS}"
    shape, dtype = tuple(given.shape), str(given.dtype).removeprefix("torch.")
    picture_like = len(shape) == 2 or len(shape) == 3 and shape[2] in (1, 3, 4)
    if dtype == "uint8" and 0 not in shape and picture_like:
        return ""
    return f"{picture.name} is an array {dtype}{list(shape)}: arrays are u8[H,W,3], u8[H,W] or u8[H,W,4], 0 to 255"


def _from_array(x: np.ndarray) -> Image.Image:
    """u8[H,W], [H,W,1], [H,W,3] or [H,W,4], whose alpha is dropped as that of files is."""
    if x.ndim == 3:
        x = x[..., 0] if x.shape[2] == 1 else x[..., :3]
    return Image.fromarray(np.ascontiguousarray(x)).convert("RGB")


def _named(where: str, x) -> str:
    return f"{where} {os.fspath(x)!r}" if isinstance(x, (str, os.PathLike)) else where


def _kind(x) -> str:
    return "None" if x is None else f"of type {type(x).__name__}"
