"""Pictures: decoding of untrusted bytes, and the original's transforms for training and evaluation.

Everything works on 8-bit RGB and stays 8-bit: pixels are normalised on the device. Resizing is PIL's bicubic filter,
and the warps of RandAugment use 5-bit fixed-point bilinear sampling between pixel centres, which is what OpenCV's
warpAffine computes in the published runs. Orientation tags are left alone, as they were there.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no format whose decoder starts another program
FILL = 128  # grey of the places that a warp uncovers
SHEAR, TRANSLATE, ROTATE = 0.15, 5, 15.0  # RandAugment at magnitude 5 of 10: slope, pixels, degrees
TINY, STRETCHED = 8, 20  # pictures with both sides below so many pixels, or an aspect ratio above so much, are noted


class BadImage(Exception):
    """A picture that cannot be used; the message is the reason, "category" or "category: detail"."""


def decode(data: bytes, max_pixels: int) -> tuple[Image.Image, list[str]]:
    """The first frame of an encoded picture as PIL RGB, and notes on what is irregular but usable.

    The size is compared with `max_pixels` on the header, before any pixel is decoded. Greyscale, CMYK, palette and
    alpha (which is dropped) are ordinary and not noted; 16-bit greyscale is scaled to 8 bits and noted, as are
    animations, pictures below 8x8 and aspect ratios above 20. Raises BadImage: empty file, not a picture, decompression
    bomb, truncated, broken.
    """
    if not data:
        raise BadImage("empty image file")
    try:
        return _decode(data, max_pixels)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not a picture: none of " + ", ".join(FORMATS)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise BadImage(f"decompression bomb: {e}") from None
    except Exception as e:  # the decoders raise a dozen types on broken bytes, none of which may end a run
        cut = isinstance(e, EOFError) or "truncated" in str(e).lower()
        raise BadImage(f"{'truncated' if cut else 'broken'} picture: {type(e).__name__}: {e}") from None


def _decode(data: bytes, max_pixels: int) -> tuple[Image.Image, list[str]]:
    with Image.open(io.BytesIO(data), formats=FORMATS) as im:
        w, h = im.size
        if w * h > max_pixels:
            raise BadImage(f"decompression bomb: {w}x{h} is more than data.max_pixels={max_pixels}")
        if not w * h:
            raise BadImage(f"broken picture: {w}x{h}")
        im.load()
        notes = []
        rgb = to_rgb(im)
        if _deep(im):
            notes.append("16-bit picture, scaled to 8 bits")
        if im.format != "MPO" and _animated(im):
            notes.append("animated picture, first frame used")
    if max(w, h) < TINY:
        notes.append("tiny picture")
    if max(w, h) > STRETCHED * min(w, h):
        notes.append("extreme aspect ratio")
    return rgb, notes


def to_rgb(im: Image.Image) -> Image.Image:
    """A PIL image of any mode as 8-bit RGB; alpha is dropped. Raises BadImage for values that are no 8 or 16 bits."""
    return _to_8_bits(im) if _deep(im) else im.convert("RGB")


def _deep(im: Image.Image) -> bool:
    return im.mode == "F" or im.mode.startswith("I")


def _to_8_bits(im: Image.Image) -> Image.Image:
    """Greyscale of more than 8 bits to RGB: 65535 becomes 255 (PIL's own conversion clips everything above 255)."""
    value = np.asarray(im)
    if im.mode == "F" or value.min() < 0 or value.max() > 65535:
        raise BadImage(f"unsupported pixels: mode {im.mode}, {value.min()} to {value.max()}; 8 or 16 bits are read")
    return Image.fromarray(((value.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")


def _animated(im: Image.Image) -> bool:
    try:  # asking looks for the second frame, which may be broken
        return bool(getattr(im, "is_animated", False))
    except Exception:
        return True


def eval_transform(im: Image.Image, size: int) -> np.ndarray:
    """PIL RGB -> u8[size,size,3]: bicubic to exactly size x size, aspect ignored (BLIP's evaluation transform)."""
    return np.asarray(im.resize((size, size), Image.Resampling.BICUBIC))


def train_transform(im: Image.Image, size: int, rng: np.random.Generator, *, scale, flip: bool, randaugment: bool):
    """PIL RGB -> u8[size,size,3]: random-resized crop, flip with probability 1/2, RandAugment(2, 5)."""
    img = crop_resize(im, size, random_crop(*im.size, scale, rng))
    if flip and rng.random() < 0.5:
        img = np.ascontiguousarray(img[:, ::-1])
    return rand_augment(img, rng) if randaugment else img


def random_crop(w: int, h: int, scale, rng: np.random.Generator, ratio=(3 / 4, 4 / 3)) -> tuple[int, int, int, int]:
    """Box (left, top, width, height) by torchvision's RandomResizedCrop rule, in pixels of a w x h picture.

    Ten tries of an area share uniform in `scale` with a log-uniform aspect ratio; then the largest centred box whose
    ratio is inside `ratio`.
    """
    for _ in range(10):
        area = w * h * rng.uniform(*scale)
        r = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        cw, ch = round(math.sqrt(area * r)), round(math.sqrt(area / r))
        if 0 < cw <= w and 0 < ch <= h:
            return int(rng.integers(w - cw + 1)), int(rng.integers(h - ch + 1)), cw, ch
    cw, ch = min(w, max(1, round(h * ratio[1]))), min(h, max(1, round(w / ratio[0])))
    return (w - cw) // 2, (h - ch) // 2, cw, ch


def crop_resize(im: Image.Image, size: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """Crop, then bicubic resize: the filter sees nothing outside the box (as PIL's resize(box=...) would)."""
    x, y, w, h = box
    return np.asarray(im.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BICUBIC))


def rand_augment(img: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """u8[h,w,3] -> u8[h,w,3]: two of the ten OPS with replacement, each applied with probability 1/2.

    Reference: BLIP's RandomAugment(2, 5).
    """
    for k in rng.integers(len(OPS), size=2):
        if rng.random() < 0.5:
            img = OPS[k](img, 1 if rng.random() < 0.5 else -1)
    return img


def identity(img, sign):
    return img


def auto_contrast(img, sign):
    """Per channel, smallest..largest value stretched to 0..255, fractions cut off; a constant channel stays."""
    return np.asarray(ImageOps.autocontrast(Image.fromarray(img)))


def equalize(img, sign):
    """Per channel, histogram equalisation with integer steps; a channel too flat for one step stays."""
    return np.asarray(ImageOps.equalize(Image.fromarray(img)))


def shear_x(img, sign):
    return warp(img, [[1, np.float32(sign * SHEAR), 0], [0, 1, 0]])


def shear_y(img, sign):
    return warp(img, [[1, 0, 0], [np.float32(sign * SHEAR), 1, 0]])


def translate_x(img, sign):
    out, n = np.full_like(img, FILL), sign * TRANSLATE
    if abs(n) < img.shape[1]:
        out[:, max(n, 0) : img.shape[1] + min(n, 0)] = img[:, max(-n, 0) : img.shape[1] - max(n, 0)]
    return out


def translate_y(img, sign):
    return translate_x(img.swapaxes(0, 1), sign).swapaxes(0, 1)


def rotate(img, sign):
    """About (w/2, h/2); a positive sign turns counter-clockwise."""
    (h, w), angle = img.shape[:2], math.radians(sign * ROTATE)
    c, s = math.cos(angle), math.sin(angle)
    return warp(img, [[c, s, (1 - c) * w / 2 - s * h / 2], [-s, c, s * w / 2 + (1 - c) * h / 2]])


# Brightness and sharpness have factor 0.5 * 1.8 + 0.1 = 1 at this magnitude: exactly nothing.
OPS = (identity, auto_contrast, identity, identity, equalize, shear_x, shear_y, translate_x, translate_y, rotate)


def warp(img: np.ndarray, matrix) -> np.ndarray:
    """u8[h,w,3] moved by the forward map [[a,b,c],[d,e,f]] of pixel centres (x, y), bilinear, FILL outside.

    Source positions are rounded to 1/32 pixel and blended with integer weights, with FILL for neighbours off the
    picture.
    """
    h, w = img.shape[:2]
    (a, b, c), (d, e, f) = np.float64(matrix)
    # the inverse map, from target pixels to source positions
    det = a * e - b * d
    a, b, d, e = e / det, -b / det, -d / det, a / det
    c, f = -a * c - b * f, -d * c - e * f

    # source x and y of every target pixel, in 1/32 pixel: a whole part and a fraction
    x, y = np.arange(w), np.arange(h)[:, None]
    sx = (_fixed(b * y + c) + 16 + _fixed(a * x)) >> 5
    sy = (_fixed(e * y + f) + 16 + _fixed(d * x)) >> 5
    fx, fy = (sx & 31).astype(np.uint64), (sy & 31).astype(np.uint64)
    at = (np.clip(sy >> 5, -2, h) + 2) * (w + 4) + np.clip(sx >> 5, -2, w) + 2

    # a pixel is one word, so that one multiplication does for 3 channels; a frame of FILL stands for what is outside
    word = np.full((h + 4, w + 4), _pack(np.full(3, FILL, np.uint8)))
    word[2:-2, 2:-2] = _pack(img)
    word = word.ravel()
    top = word[at] * (32 - fx) + word[at + 1] * fx
    low = word[at + w + 4] * (32 - fx) + word[at + w + 5] * fx
    out = top * (32 - fy) + low * fy + _pack(np.full(3, 128, np.uint8)) * np.uint64(4)  # + 512 each: rounds
    return np.stack([(out >> np.uint64(shift + 10)).astype(np.uint8) for shift in (0, 21, 42)], axis=-1)


def _pack(rgb: np.ndarray) -> np.ndarray:
    """u8[...,3] -> u64[...]: three fields of 21 bits, wide enough for 255 * 32 * 32 + 512."""
    r, g, b = np.moveaxis(rgb.astype(np.uint64), -1, 0)
    return r | g << np.uint64(21) | b << np.uint64(42)


def _fixed(v: np.ndarray) -> np.ndarray:
    return np.rint(v * 1024).astype(np.int64)
