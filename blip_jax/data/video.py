"""Videos: a few frames of an untrusted file, picked and scaled as the original's decoder did it.

Frames are picked by their number in the order of display, at equal distances from the first on. They are found by
decoding from the start, never by seeking, so that they are exact whatever the file's key frames and times are. Scaling
is FFmpeg's `scale` filter with bilinear weights on the picture as it is stored, mostly YUV, and then RGB: what decord,
which the published runs read videos with, does on reading. It turns pictures upright before, where the file says how.

A file costs no more than its limits: only the containers below are opened, which name no other file; the size of a
picture is bounded by FFmpeg before it is decoded, the number of frames before the first one is, and the work of all of
them while they are. FFmpeg runs in this process.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

import numpy as np

PIXELS = 4096 * 2304  # most of a picture; a decoder keeps some twenty of them
FRAMES = 1 << 17  # most of a video: more than an hour at 30 a second
WORK = 1 << 35  # most pixels of all pictures that are decoded for one video: nine minutes of 1920 x 1080 at 30 a second
CONTAINERS = "mov,mp4,avi,matroska,webm,flv,mpeg,mpegts,asf,ogg"  # FFmpeg's names
TURNS = {90: ("1",), 180: ("1", "1"), 270: ("2",)}  # degrees, clockwise -> FFmpeg's transposes; decord knows no others


class BadVideo(Exception):
    """A video that cannot be used; the message is the reason, "category" or "category: detail"."""


def check() -> None:
    """ValueError: PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError as e:
        raise ValueError(f"videos are read with PyAV ({e}): pip install 'blip-jax[video]'") from None


def places(count: int, n: int) -> list[int]:
    """The numbers of the n frames that stand for a video of `count`: 0, s, 2s, ..., s = count // n.

    So BLIP's code, whose step is cut to a whole number. Of fewer than n frames the first is taken n times.
    """
    return [i * (count // n) for i in range(n)]


def frames(path: str, n: int, size: int, max_pixels: int = PIXELS) -> tuple[np.ndarray, list[str]]:
    """u8[n,size,size,3] RGB: the frames at `places` of a video, and notes on what is irregular but usable.

    Noted are videos of fewer frames than n, files that hold fewer than their header says, and pictures that the
    decoder knows to be damaged. max_pixels: larger pictures are not decoded, nor those above PIXELS.
    Raises BadVideo: no regular file, none of CONTAINERS, no video in it, too large, too long, broken. ValueError: PyAV
    is not installed.
    """
    check()
    max_pixels = min(max_pixels, PIXELS)
    with _opened(path, max_pixels) as (container, stream):
        count, promised = _counted(container, stream), stream.frames
    if not count:
        raise BadVideo("empty video: not one frame")
    notes = [f"short video: {count} frames, of which the first stands for all {n}"] if count < n else []
    if promised > count:
        notes.append(f"fewer frames than the file says: {count} of {promised}")
    wanted, found = places(count, n), {}
    with _opened(path, max_pixels) as (container, stream):
        for at, frame in enumerate(_decoded(container, stream, max_pixels)):
            if at in wanted:
                found[at] = _scaled(frame, size)
                if frame.is_corrupt:
                    notes.append(f"damaged frame: number {at}")
            if len(found) == len({*wanted}):
                return np.stack([found[at] for at in wanted]), notes
    raise BadVideo(f"broken video: of {count} frames decoding gives those before number {max(wanted)} alone")


@contextlib.contextmanager
def _opened(path: str, max_pixels: int) -> Iterator[tuple]:
    """(container, its first video stream). BadVideo: there is none, or whatever goes wrong inside."""
    import av

    at_all = {"max_pixels": str(2 * PIXELS)}  # FFmpeg counts lines as long as it keeps them, some pixels longer
    limits = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"} | at_all
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never answer
            raise BadVideo("not a video: not a regular file")
        try:
            container = av.open(path, options=limits)
        except av.error.ArgumentError:  # what is not on the list
            raise BadVideo(f"not a video: none of {CONTAINERS}") from None
        with container:
            if not container.streams.video:
                raise BadVideo("not a video: no stream of pictures")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadVideo("not a video: no decoder for its stream of pictures")
            _check_size(stream, max_pixels)
            stream.codec_context.options = at_all
            stream.codec_context.thread_count = 1  # several videos are decoded at once
            yield container, stream
    except BadVideo:
        raise
    except Exception as e:  # FFmpeg's errors are of a dozen types, none of which may end a run
        raise BadVideo(f"broken video: {type(e).__name__}: {getattr(e, 'strerror', None) or e}") from None


def _counted(container, stream) -> int:
    """How many frames there are, by the pieces of the stream, without decoding one."""
    count = 0
    for packet in container.demux(stream):
        count += packet.size > 0 and not packet.is_discard
        if count > FRAMES:
            raise BadVideo(f"long video: more than {FRAMES} frames")
    return count


def _check_size(picture, max_pixels: int) -> None:
    w, h = picture.width, picture.height
    if w * h > max_pixels:
        raise BadVideo(f"large video: {w}x{h}, {w * h} pixels, at most {max_pixels}")


def _decoded(container, stream, max_pixels: int) -> Iterator:
    """The frames in the order of display, whose size may change on the way."""
    work = 0
    for packet in container.demux(stream):
        work += stream.width * stream.height  # also of a frame that is never shown
        if work > WORK:
            raise BadVideo(f"large video: the frames up to the last that is wanted have more than {WORK} pixels")
        for frame in packet.decode():
            _check_size(frame, max_pixels)
            yield frame


def _scaled(frame, size: int) -> np.ndarray:
    """u8[size,size,3] of a frame, upright."""
    import av

    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(
        source,
        *(graph.add("transpose", turn) for turn in TURNS.get(-frame.rotation % 360, ())),
        graph.add("scale", f"{size}:{size}:flags=bilinear"),
        graph.add("format", "pix_fmts=rgb24"),
        graph.add("buffersink"),
    ).configure()
    graph.push(frame)
    return graph.pull().to_ndarray()
