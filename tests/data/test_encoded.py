"""What a file may cost before it is decoded: memory shared by threads, scans, chunks, comments."""

import io
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image
from world.pictures import encode, noise

from blip_jax.data import encoded, image

LIMIT = 1_000_000
BIG = zlib.compress(b"\0" * (2 << 20))


def reason(data, limit=LIMIT):
    with pytest.raises(image.BadImage) as e:
        image.decode(data, limit)
    return str(e.value)


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


# --- PNG


@pytest.mark.parametrize(
    "side",
    [
        chunk(b"zTXt", b"Comment\0\0" + BIG),
        chunk(b"iCCP", b"icc\0\0" + BIG),
        chunk(b"iTXt", b"XML\0\1\0\0\0" + BIG),
        chunk(b"tEXt", b"Comment\0" + b"a" * (3 << 20)),
        chunk(b"tEXt", b"Comment\0hi", crc=1),
        chunk(b"gAMA", b"\0", crc=1),
        chunk(b"eXIf", b"MM\0*\0\0\0\x08" + b"\xff" * 100_000),
        chunk(b"prVt", b"of some program"),
    ],
    ids=lambda side: side[4:8].decode(),
)
@pytest.mark.parametrize("place", ["before", "behind"])
def test_side_chunks_change_no_pixel(side, place):
    good = encode(noise(0), "PNG")
    at = 33 if place == "before" else len(good) - 12  # the header's end, the beginning of IEND
    got, notes = image.decode(good[:at] + side + good[at:], LIMIT)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(noise(0)))
    assert notes == []


def test_a_wrong_checksum_of_a_chunk_that_counts_is_named():
    good = encode(noise(0).convert("P"), "PNG")
    for kind in (b"IHDR", b"PLTE", b"IDAT"):
        at = good.index(kind) + 4
        bad = bytearray(good)
        bad[at + int.from_bytes(good[at - 8 : at - 4])] ^= 1  # the first byte of its checksum
        assert reason(bytes(bad)) == f"broken picture: checksum of chunk {kind.decode()}"


def test_a_png_keeps_its_animation_and_what_is_cut_stays_cut():
    frames = [Image.new("RGB", (30, 20), c) for c in ("red", "blue")]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert image.decode(data, LIMIT)[1] == ["animated picture, first frame used"]
    good = encode(noise(0), "PNG")
    assert encoded.essential(good) == good
    for cut in (9, 20, 40, 100, len(good) - 20):
        assert encoded.essential(good[:cut]) == good[:cut]
    assert encoded.essential(b"no PNG") == b"no PNG"


def test_chunks_without_end_are_refused():
    good = encode(noise(0), "PNG")
    for kind in (b"tEXt", b"IDAT"):
        assert reason(good[:33] + chunk(kind, b"") * 200_001 + good[33:]) == "broken picture: more than 200000 chunks"


@pytest.mark.parametrize("start, kind", [(b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"GIF89a", "GIF")])
def test_a_header_that_cannot_be_read_is_no_other_kind_of_file(start, kind):
    assert reason(start + b"\1" * 5).startswith(("broken picture", "truncated picture"))


# --- JPEG


def scans(data: bytes, n: int) -> bytes:
    """A progressive JPEG with n times its first scan."""
    at = data.index(b"\xff\xda")
    end = encoded.MARKER.search(data, at + 4).start()
    return data[:at] + data[at:end] * n + data[end:]


def test_scans_are_bounded_by_the_pixels_that_each_passes_over():
    data = encode(noise(0), progressive=True)
    assert data.count(b"\xff\xda") == 10
    plain = np.asarray(image.decode(data, LIMIT)[0])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), plain)
    image.decode(scans(data, 90), LIMIT)  # 99 in all
    assert reason(scans(data, 2000)) == "decompression bomb: more than 100 scans of 1200 pixels each"
    assert reason(scans(data, 40), 1400) == "decompression bomb: more than 23 scans of 1200 pixels each"


def test_what_looks_like_a_scan_and_is_none_does_not_count():
    data = encode(noise(0), progressive=True)
    comment = b"\xff\xfe" + struct.pack(">H", 60_002) + b"\xff\xda" * 30_000
    want = np.asarray(image.decode(data, LIMIT)[0])
    for other in (data[:2] + comment + data[2:], data + b"\xff\xda" * 30_000):  # as the film behind a phone's picture
        np.testing.assert_array_equal(np.asarray(image.decode(other, LIMIT)[0]), want)


# --- headers


def test_headers_without_end_are_refused():
    jpeg, gif = encode(noise(0)), encode(noise(0), "GIF")
    table = 13 + 3 * (2 << (gif[10] & 7))  # where the blocks of a GIF begin
    many = b"!\xfe" + (b"\xff" + b"a" * 255) * 6000 + b"\0"
    for data in (
        b"P6\n#" + b"a" * 1_000_000 + b"\n10 10\n255\n" + b"\0" * 300,
        jpeg[:20] + b"\0" * 1_000_000 + jpeg[20:],
        jpeg[:2] + b"\xff\xfe\0\2" * 100_000 + jpeg[2:],
        gif[:table] + many + gif[table:],
    ):
        assert reason(data).startswith("broken picture: too many pieces")
    image.decode(b"P6\n#" + b"a" * 1000 + b"\n10 10\n255\n" + b"\0" * 300, LIMIT)
    profile = b"\xff\xe2" + struct.pack(">H", 65_000) + b"\0" * 64_998
    image.decode(jpeg[:2] + profile * 200 + jpeg[2:], LIMIT)  # 13 MB of segments are some


def test_what_is_decoded_value_by_value_is_small():
    ppm = lambda white: b"P6\n1183 1183\n%d\n" % white + b"\0" * (3 * 1183**2)
    assert reason(ppm(254), 10**7).startswith("decompression bomb: 4198467 values of a PPM of 1183x1183 that is")
    image.decode(ppm(255), 10**7)  # Pillow takes these as they are


def test_tiles_count_as_pixels():
    """A TIFF of 10 x 10 pixels in one tile that is much larger."""

    def tiff(tile: int) -> bytes:
        data = zlib.compress(b"\0" * (3 * tile**2))
        tags = {256: 10, 257: 10, 258: 8, 259: 8, 262: 2, 277: 3, 322: tile, 323: tile, 324: 8, 325: len(data)}
        rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + rows + b"\0" * 4

    assert image.decode(tiff(64), LIMIT)[0].size == (10, 10)
    assert reason(tiff(1008)) == "decompression bomb: 1008x1008 is more than data.max_pixels=1000000"


# --- memory


def test_threads_share_the_room():
    room, inside, most, lock = encoded.Room(100), [], [], threading.Lock()

    def work(size):
        with room.hold(size):
            with lock:
                inside.append(size)
                most.append(sum(inside))
            with lock:
                inside.remove(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in [40, 60, 70, 10] * 25 + [500]]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(most) == 101 and max(most) == 500 and sorted(most)[-2] <= 100  # the largest went alone


def test_decoding_waits_for_room_and_gives_it_back(monkeypatch):
    data, held = encode(noise(0), "PNG"), []
    room = encoded.Room(1 << 20)
    monkeypatch.setattr(image, "ROOM", room)
    started, done = threading.Event(), threading.Event()

    def other():
        started.set()
        image.decode(data, LIMIT)
        done.set()

    with image.decoded([data, data], LIMIT) as pictures:
        assert [p.size for p, _ in pictures] == [(40, 30)] * 2
        held = room._used
    assert held == 2 * 40 * 30 * 8 and room._used == 0
    for picture, _ in pictures:
        with pytest.raises(ValueError, match="closed"):
            picture.load()
    assert image.decode(data, LIMIT)[0].resize((2, 2)).size == (2, 2) and room._used == 0  # this one is kept
    with room.hold(1 << 20):
        thread = threading.Thread(target=other)
        thread.start()
        started.wait()
        assert not done.wait(0.05)
    thread.join()
    assert done.is_set() and room._used == 0
    for bad in (b"", data[:60], b"no picture"):
        with pytest.raises(image.BadImage):
            image.decode(bad, LIMIT)
    assert room._used == 0
