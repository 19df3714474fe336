"""Pictures: decoding of untrusted bytes, and the original's transforms for training and evaluation.

Everything works on 8-bit RGB and stays 8-bit: pixels are normalised on the device. Resizing is PIL's bicubic filter,
and the warps of RandAugment use 5-bit fixed-point bilinear sampling between pixel centres, which is what OpenCV's
warpAffine computes in the published runs. Orientation tags are left alone, as they were there, unless `upright` is
asked for.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps

from blip_jax.data.encoded import (
    A_PIXEL,
    GREY,
    LOWER,
    READS,
    READS_OF_PIXELS,
    ROOM,
    BadImage,
    Reads,
    check_scans,
    cost,
    essential,
    held,
    named,
    stored,
)

try:
    from PIL import AvifImagePlugin

    AVIF = AvifImagePlugin.SUPPORTED
except ImportError:  # before Pillow 11.3
    AVIF = False
# Pillow asks for the memory of a picture in blocks. Those above 32 MiB the C library gives back to the system when they
# are free; smaller ones stay with the thread that had them, so that each thread would keep its largest picture.
if "PILLOW_BLOCK_SIZE" not in os.environ:
    Image.core.set_block_size(40 << 20)

# no format whose decoder starts another program
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM") + ("AVIF",) * AVIF
IN_PYTHON = ("ppm", "ppm_plain", "bmp_rle")  # Pillow's decoders that take value after value, 1 to 2 us each
IN_PYTHON_VALUES = 1 << 22  # most that these are given
TURNS = {  # value of the orientation tag -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TILE_WIDTH, TILE_HEIGHT = 322, 323  # tags of a TIFF
DEPTHS = (8, 10, 12, 14, 16)  # bits of the sensors whose values 16-bit and integer pictures hold
FILL = 128  # grey of the places that a warp uncovers
SHEAR, TRANSLATE, ROTATE = 0.15, 5, 15.0  # RandAugment at magnitude 5 of 10: slope, pixels, degrees
TINY, STRETCHED = 8, 20  # pictures with both sides below so many pixels, or an aspect ratio above so much, are noted


def decode(data: bytes, max_pixels: int, upright: bool = False) -> tuple[Image.Image, list[str]]:
    """The first frame of an encoded picture as PIL RGB, and notes on what is irregular but usable.

    The size is compared with `max_pixels` on the header, before any pixel is decoded; Pillow's own limit is raised to
    `max_pixels` where it is lower. upright: turned as its EXIF orientation says.

    Greyscale, CMYK, palette and alpha (which is dropped) are ordinary and not noted. What has 16 bits, and integers,
    are scaled by what they hold and noted: the least of 8, 10, 12, 14, 16 bits in which the largest value fits, so
    4095 is white where nothing is above it, and 65535 where something is above 16383. Noted are also animations,
    pictures below 8x8 and aspect ratios above 20. Raises BadImage: empty file, not a picture, decompression bomb,
    truncated, broken.
    """
    with _refusing():
        opened = [_opened(data, max_pixels)]
    with ROOM.hold(held(opened[0][0])), _refusing():
        im, notes = _8_bits(opened.pop(), upright)
        return (im if im.mode == "RGB" else im.convert("RGB")), notes


@contextlib.contextmanager
def decoded(
    encoded: Sequence[bytes], max_pixels: int, upright: bool = False
) -> Iterator[list[tuple[Image.Image, list[str]]]]:
    """`decode` of several pictures at once, which are closed at the end of the `with` block.

    Grey ones stay grey, mode L, which is a quarter of the memory: the transforms below make them RGB.
    Waits until there is room for all of them beside those of other threads (encoded.ROOM). Do not nest.
    """
    with _refusing():
        opened = [_opened(data, max_pixels) for data in encoded]
    with ROOM.hold(sum(held(im) for im, _ in opened)):
        with _refusing():
            opened.reverse()  # each is let go when it is converted
            found = [_8_bits(opened.pop(), upright) for _ in encoded]
        try:
            yield found
        finally:
            for im, _ in found:  # before another thread takes their room
                im.close()


@contextlib.contextmanager
def converted(im: Image.Image) -> Iterator[tuple[Image.Image, list[str]]]:
    """What `decoded` gives, upright, of a picture that is a PIL image, decoded or not. BadImage: as there."""
    if 0 in im.size:
        raise BadImage(f"broken picture: {im.width}x{im.height}")
    with ROOM.hold(held(im)):
        with _refusing():
            found = _8_bits((im, None), upright=True)
        yield found


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What Pillow raises becomes BadImage."""
    try:
        yield
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not a picture: none of " + ", ".join(FORMATS)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise BadImage(f"decompression bomb: {e}") from None
    except Exception as e:  # the decoders raise a dozen types on broken bytes, none of which may end a run
        cut = isinstance(e, EOFError) or "truncated" in str(e).lower()
        raise BadImage(f"{'truncated' if cut else 'broken'} picture: {type(e).__name__}: {e}") from None


def _opened(data: bytes, max_pixels: int) -> tuple[Image.Image, Reads]:
    """The picture with its header read and found to be affordable, and the file that the rest is read from."""
    if not data:
        raise BadImage("empty image file")
    if max_pixels > (Image.MAX_IMAGE_PIXELS or max_pixels):
        Image.MAX_IMAGE_PIXELS = max_pixels
    file = Reads(essential(data))
    im = _open(file)
    decoder = im.tile[0][0] if im.tile else ""
    tags = getattr(im, "tag_v2", {})  # of a TIFF, whose tiles may be larger than it is
    for w, h in (im.size, (tags.get(TILE_WIDTH), tags.get(TILE_HEIGHT))):
        if isinstance(w, int) and isinstance(h, int) and w * h > max_pixels:
            raise BadImage(f"decompression bomb: {w}x{h} is more than data.max_pixels={max_pixels}")
    w, h = im.size
    if not w * h:
        raise BadImage(f"broken picture: {w}x{h}")
    values = w * h * len(im.getbands())
    if decoder in IN_PYTHON and values > IN_PYTHON_VALUES:
        raise BadImage(
            f"decompression bomb: {values} values of a {im.format} of {w}x{h} that is decoded one by one, "
            f"{IN_PYTHON_VALUES} at most"
        )
    if (size := cost(im)) > A_PIXEL * max_pixels:
        raise BadImage(
            f"decompression bomb: a {im.format} of {w}x{h} takes {size >> 20} MiB to decode, more than {A_PIXEL} bytes "
            f"for each of data.max_pixels={max_pixels}"
        )
    if im.format in ("JPEG", "MPO"):
        check_scans(data, w * h, max_pixels)
    return im, file


def _open(file: Reads) -> Image.Image:
    """A file with its header read; what remains may be read in more pieces."""
    what = named(file.getvalue())
    try:
        im = Image.open(file, formats=heif() if what == "HEIC" else FORMATS)
    except Image.UnidentifiedImageError:
        if what == "AVIF" and not AVIF:
            raise BadImage("AVIF picture: this Pillow cannot read it; pip install -U 'pillow>=11.3'") from None
        if what:
            raise BadImage(f"broken picture: the header of this {what} cannot be read") from None
        raise
    file.left = READS_OF_PIXELS
    return im


@functools.cache
def heif() -> tuple[str, ...]:
    """The format of HEIC for Pillow, which reads it with another package. BadImage: it is not there."""
    try:
        import pillow_heif
    except ImportError:
        raise BadImage(
            "HEIC picture: the package pillow-heif reads it; pip install pillow-heif, or save it as JPEG"
        ) from None
    pillow_heif.register_heif_opener()
    return ("HEIF",)


def _8_bits(opened: tuple[Image.Image, Reads | None], upright: bool) -> tuple[Image.Image, list[str]]:
    """What `decoded` gives of an opened picture and of the file that it is the first frame of, if it is from one."""
    im, file = opened
    del opened
    size, packed, notes = im.size, stored(im), []
    im.load()
    turn = TURNS.get(_orientation(im)) if upright else None
    if im.mode == "F" or im.mode.startswith("I"):
        out, note = _to_8_bits(im)
        notes.append(note)
    elif file and packed in LOWER:
        out, note = _colours_to_8_bits(im, file)
        notes.append(note)
    elif im.mode in ("RGB", "L") and im.format in ("JPEG", "PNG", "BMP", "PPM"):
        out = im  # as it is: looking for further frames below does not change these
    else:
        out = im.convert("L" if im.mode in GREY else "RGB")
    if file and im.format != "MPO" and _animated(im, file):
        notes.append("animated picture, first frame used")
    del im  # a third of what a deep picture takes
    if max(size) < TINY:
        notes.append("tiny picture")
    if max(size) > STRETCHED * min(size):
        notes.append("extreme aspect ratio")
    return out if turn is None else out.transpose(turn), notes


def _orientation(im: Image.Image) -> int:
    try:
        return im.getexif().get(0x0112, 1)
    except Exception:  # a broken tag turns nothing
        return 1


def _to_8_bits(im: Image.Image) -> tuple[Image.Image, str]:
    """Greyscale of more than 8 bits to 8, and a note (PIL's own conversion clips everything above 255)."""
    grey, note = _scaled(im, lambda box: np.asarray(im.crop(box)), (im.height, im.width))
    return Image.fromarray(grey), note


def _colours_to_8_bits(im: Image.Image, file: Reads) -> tuple[Image.Image, str]:
    """Colours of 16 bits, of whose file Pillow gives the upper bytes, to 8, and a note."""
    upper = im if im.mode == "RGB" else im.convert("RGB")
    if max(most for _, most in upper.getextrema()) >= 1 << DEPTHS[-2] - 8:
        return upper, "16-bit picture, scaled to 8 bits"
    lower = _open(Reads(file.getvalue()))
    for i, (decoder, box, at, args) in enumerate(lower.tile):
        own = LOWER[stored(lower)]
        lower.tile[i] = type(lower.tile[i])(decoder, box, at, own if isinstance(args, str) else (own, *args[1:]))
    lower.load()
    lower = lower if lower.mode == "RGB" else lower.convert("RGB")
    halves = [upper, lower]
    del upper, lower

    def lines(box) -> np.ndarray:
        high, low = (np.asarray(half.crop(box)) for half in halves)
        return high.astype(np.uint16) << 8 | low

    colours, note = _scaled(im, lines, (im.height, im.width, 3))
    halves.clear()  # before there is another copy
    return Image.fromarray(colours), note


def _scaled(im: Image.Image, lines: Callable, shape: tuple) -> tuple[np.ndarray, str]:
    """The values that `lines` gives of a box, scaled by what they hold and rounded, as u8[shape], and a note."""
    h, w = shape[:2]
    at_once = max(1, (1 << 20) // w)  # lines, so that no second copy of the picture is made
    boxes = [(0, top, w, min(top + at_once, h)) for top in range(0, h, at_once)]
    extremes = [(x.min(), x.max()) for x in map(lines, boxes)]
    least, most = min(low for low, _ in extremes), max(high for _, high in extremes)
    if im.mode == "F" or least < 0 or most > 65535:
        raise BadImage(f"unsupported pixels: mode {im.mode}, {least} to {most}; whole numbers of 8 to 16 bits are read")
    bits = next(bits for bits in DEPTHS if most < 1 << bits)
    white, out = (1 << bits) - 1, np.empty(shape, np.uint8)
    grey = ((np.arange(white + 1) * 255 + white // 2) // white).astype(np.uint8)  # of every value
    for box in boxes:
        out[box[1] : box[3]] = grey[lines(box)]
    note = "16-bit picture" if bits == 16 else f"picture of 16 bits or more that holds {bits}"
    return out, f"{note}, scaled to 8 bits"


def _animated(im: Image.Image, file: Reads) -> bool:
    file.left = READS
    try:  # asking looks for the second frame, which may be broken, and in a TIFF for all of them
        return bool(getattr(im, "is_animated", False))
    except Exception:
        return True


def eval_transform(im: Image.Image, size: int) -> np.ndarray:
    """PIL RGB or L -> u8[size,size,3]: bicubic to exactly size x size, aspect ignored (BLIP's evaluation transform)."""
    return _resized(im, size)


def _resized(im: Image.Image, size: int) -> np.ndarray:
    return np.asarray(im.resize((size, size), Image.Resampling.BICUBIC).convert("RGB"))


def train_transform(im: Image.Image, size: int, rng: np.random.Generator, *, scale, flip: bool, randaugment: bool):
    """PIL RGB or L -> u8[size,size,3]: random-resized crop, flip with probability 1/2, RandAugment(2, 5)."""
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
    return _resized(im.crop((x, y, x + w, y + h)), size)


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
