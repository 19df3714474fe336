"""Heat maps over photographs, for people to look at."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blip_jax.inference import inputs

SIDE = 240  # pixels of a photograph's longer side on a sheet
COLUMNS, GAP, LINE = 6, 10, 22  # of a sheet: photographs beside each other, pixels between them and of a line of text
COVER = 0.75  # of the photograph, where a map is hottest
# OKLab to linear RGB (Ottosson 2020, "A perceptual color space for image processing")
TO_CONES = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.291485548]]
)
TO_RGB = np.array([
    [4.0767416621, -3.3077115913, 0.2309699292],
    [-1.2684380046, 2.6097574011, -0.3413193965],
    [-0.0041960863, -0.7034186147, 1.707614701],
])  # fmt: skip


@functools.cache
def colours() -> np.ndarray:
    """u8[256,3]: from cold to hot, in equal steps of lightness: dark blue, purple, red, orange, light yellow."""
    t = np.linspace(0, 1, 256)
    light, chroma, hue = 0.3 + 0.65 * t, 0.09 + 0.11 * np.sin(np.pi * t), np.radians(280 + 185 * t)
    lab = np.stack([light, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
    linear = np.clip((lab @ TO_CONES.T) ** 3 @ TO_RGB.T, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * srgb).astype(np.uint8)


def overlay(photo: Image.Image, heat: np.ndarray) -> Image.Image:
    """A map f32[h,w] over a photograph, RGB, of its size: the hottest place covers it most, none of it where there is
    no heat. Values between the middles of cells are interpolated."""
    share = np.clip(heat / heat.max(), 0, 1) if heat.max() > 0 else np.zeros_like(heat)
    wide = np.asarray(Image.fromarray(share.astype(np.float32)).resize(photo.size, Image.Resampling.BICUBIC))
    wide = np.clip(wide, 0, 1)
    cover = COVER * wide[..., None]
    seen = np.asarray(photo) * (1 - cover) + colours()[np.round(255 * wide).astype(np.uint8)] * cover
    return Image.fromarray(np.round(seen).astype(np.uint8))


def photograph(given, max_pixels: int, side: int = SIDE) -> Image.Image:
    """A picture as verbs take them, RGB, no side longer than `side` pixels. ValueError: it cannot be used."""
    [picture], _ = inputs.pictures(given)
    return inputs.photograph(picture, side, max_pixels)


def sheet(photo: Image.Image, found: Sequence[dict]) -> Image.Image:
    """What `Pretrained.localize` found in one photograph, for each text: the map of the whole, then that of each word,
    each with its name below."""
    rows = []
    for one in found:
        named = [(f"p {one['score']:.2f}, all words", one["text_map"]), *zip(one["words"], one["maps"])]
        rows += [named[i : i + COLUMNS] for i in range(0, len(named), COLUMNS)]
    across, down = max(photo.width, SIDE // 2) + GAP, photo.height + LINE + GAP
    out = Image.new("RGB", (max(map(len, rows)) * across + GAP, len(rows) * down + GAP), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(15)
    for y, row in enumerate(rows):
        for x, (name, heat) in enumerate(row):
            at = x * across + GAP, y * down + GAP
            out.paste(overlay(photo, heat), at)
            draw.text((at[0], at[1] + photo.height + 2), _fitting(draw, font, name, across - GAP), "black", font)
    return out


def _fitting(draw: ImageDraw.ImageDraw, font, text: str, width: int) -> str:
    while draw.textlength(text, font) > width:
        text = text[:-2].rstrip("…") + "…"
    return text
