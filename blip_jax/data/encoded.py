"""Encoded pictures before they are decoded: what a file may cost, in memory and in time, whoever made it.

Pixels bound what a picture costs only together with what else its file says. So the scans of a JPEG, the chunks of a
PNG and the reads of a header are bounded too, and all threads of a process that decode share ROOM, so that what is in
memory at once does not grow with their number.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading
import zlib
from collections.abc import Iterator

A_PIXEL = 6  # bytes for each of the most pixels that there may be: decoding a picture takes no more
GREY = ("1", "L", "LA")  # Pillow's modes that become L, besides those of integers
# Pillow's names for the way colours of 16 bits are stored, of which it keeps the upper bytes -> for the lower bytes
LOWER = {f"{mode};16{a}": f"{mode};16{b}" for mode in ("RGB", "RGBA") for a, b in (("B", "L"), ("L", "B"))}
LOWER |= {f"{mode};16N": f"{mode};16{'B' if sys.byteorder == 'little' else 'L'}" for mode in ("RGB", "RGBA")}
READS = 10_000  # of a header: more is a comment or a list of segments that never ends, each read a step of Python
READS_OF_PIXELS = 5_000_000  # likewise while pixels are decoded
CHUNKS = 200_000  # of a PNG, and segments of a JPEG
SCANS, FULL_SCANS = 100, 20  # of a JPEG; so many over as many pixels as there may be. Encoders write 1 to about 15
PNG = b"\x89PNG\r\n\x1a\n"
# Side chunks of a PNG that are read: transparency, orientation, animation. No other changes a pixel here.
SIDE = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
EXIF_BYTES = 1 << 16  # of an eXIf chunk that is read; a JPEG has no room for more
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # of a JPEG that stands before a segment, or ends it
START, SCAN, END = 0xD8, 0xDA, 0xD9
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
AVIF = {b"avif", b"avis"}
SIGNATURES = {PNG: "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF"}


class BadImage(Exception):
    """A picture that cannot be used; the message is the reason, "category" or "category: detail"."""


class Room:
    """Bytes that several threads share: who wants more than is left waits, the next ones behind him."""

    def __init__(self, size: int):
        self._size, self._used = size, 0
        self._turn, self._changed = threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Holds `size` bytes; more than there are in all go when nobody else holds any. Never hold twice at once."""
        with self._turn, self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._size)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


# of decoded pictures, for all threads of the process: 64 MiB for each core, 512 MiB at least
ROOM = Room((64 << 20) * max(8, os.cpu_count() or 1))


class Reads(io.BytesIO):
    """A file in memory that can be read `left` times."""

    left = READS

    def read(self, *size):
        self.left -= 1
        if self.left < 0:
            raise BadImage("broken picture: too many pieces, such as a comment or a list of blocks without end")
        return super().read(*size)


def named(data: bytes) -> str:
    """What the first bytes of a file that Pillow cannot open promise: "JPEG", "HEIC", ..., or ""."""
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4]), 256)]
        brands = {brands[at : at + 4] for at in range(0, len(brands), 4)}
        return "AVIF" if brands & AVIF else "HEIC" if brands & HEIC else ""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for start, name in SIGNATURES.items() if data.startswith(start)), "")


def essential(data: bytes) -> bytes:
    """A PNG without the chunks that change no pixel: texts, colour profiles, and side chunks with a wrong checksum.

    What is no PNG is as it was. What is cut off stays cut off. BadImage: the checksum of another chunk is wrong.
    """
    if not data.startswith(PNG):
        return data
    view, at, kept = memoryview(data), len(PNG), [PNG]
    for _ in range(CHUNKS):
        end = at + 12 + int.from_bytes(view[at : at + 4])
        if end > len(data):
            return b"".join([*kept, view[at:]])
        kind = data[at + 4 : at + 8]
        sound = zlib.crc32(view[at + 4 : end - 4]) == int.from_bytes(view[end - 4 : end])
        side = bool(kind[0] & 0x20)  # a small first letter
        if not sound and not side:
            raise BadImage(f"broken picture: checksum of chunk {kind.decode() if kind.isalpha() else kind}")
        if not side or sound and kind in SIDE and (kind != b"eXIf" or end - at < EXIF_BYTES):
            kept.append(view[at:end])
        at = end
        if kind == b"IEND":
            return b"".join(kept)
    raise BadImage(f"broken picture: more than {CHUNKS} chunks")


def check_scans(data: bytes, pixels: int, max_pixels: int) -> None:
    """BadImage: a JPEG has more scans than its size allows: each of them is a pass over all its pixels."""
    most = min(SCANS, FULL_SCANS * max_pixels // pixels)
    if data.count(b"\xff\xda") <= most:  # of which those in comments, thumbnails and behind the end are none
        return
    at, scans = 2, 0
    for _ in range(CHUNKS):
        found = MARKER.search(data, at)
        if not found or data[found.end() - 1] == END:
            return
        marker, at = data[found.end() - 1], found.end()
        scans += marker == SCAN
        if scans > most:
            raise BadImage(f"decompression bomb: more than {most} scans of {pixels} pixels each")
        if marker != START:
            at += int.from_bytes(data[at : at + 2])
    raise BadImage(f"broken picture: more than {CHUNKS} segments")


def cost(im) -> int:
    """Bytes that decoding an opened picture takes at most, about: RGB is 4 a pixel, grey 1; beside it stands what it
    was made from."""
    if im.format == "WEBP":
        a_pixel = 16  # two frames of the decoder, its copy of the result
    elif im.format in ("AVIF", "HEIF"):
        a_pixel = 10  # planes of 8 bits, the copy of the result; 14 where the planes are deeper, which is not known yet
    elif stored(im) in LOWER:
        a_pixel = 12 if im.mode == "RGB" else 16  # upper bytes, lower bytes
    elif "progressive" in im.info:
        a_pixel = 4 + _coefficients(im)
    elif im.mode in ("RGB", *GREY) or im.mode.startswith("I;16"):
        a_pixel = 4
    else:
        a_pixel = 8  # and its copy in RGB
    return round(im.width * im.height * a_pixel)


def held(im) -> int:
    """Bytes that an opened picture takes at most, about, while it is decoded or, later, while its crop is beside it."""
    grey = im.mode in GREY or im.mode.startswith("I;16")
    return max(cost(im), im.width * im.height * (4 if grey else 8))


def _coefficients(im) -> float:
    """Bytes a pixel that a progressive JPEG takes until its last scan: 2 for each value of each channel."""
    sampling = [(h, v) for _, h, v, _ in getattr(im, "layer", ())]
    most = max((h for h, _ in sampling), default=0) * max((v for _, v in sampling), default=0)
    return 2 * sum(h * v for h, v in sampling) / most if most else 6


def stored(im) -> str:
    """Pillow's name for the way the pixels of an opened file are stored, "" where they are decoded already."""
    args = getattr(im, "tile", None) and im.tile[0][3]
    return (args if isinstance(args, str) else args[0]) if args else ""
