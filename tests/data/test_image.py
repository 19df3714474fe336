import io
import struct
import sys
import types
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from world.pictures import encode, noise, png_header

from blip_jax.data import image

LIMIT = 1_000_000


def reason(data, limit=LIMIT):
    with pytest.raises(image.BadImage) as e:
        image.decode(data, limit)
    return str(e.value)


# --- decoding


def test_plain_jpeg_is_what_pil_decodes():
    data = encode(noise(0))
    im, notes = image.decode(data, LIMIT)
    np.testing.assert_array_equal(np.asarray(im), np.asarray(Image.open(io.BytesIO(data))))
    assert im.mode == "RGB" and notes == []


@pytest.mark.parametrize("cut", [10, 100, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated(kind, cut):
    data = encode(noise(1, 80, 60), kind)
    got = reason(data[: int(cut * len(data)) if cut < 1 else cut])
    assert got.split(":")[0] in ("truncated picture", "broken picture", "not a picture")
    if kind == "JPEG" and cut in (0.3, 0.7):
        assert got.startswith("truncated picture")


def test_unusable():
    assert reason(b"") == "empty image file"
    assert reason(b"a text file that is named .jpg").startswith("not a picture")
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").startswith("not a picture")
    assert reason(b"<svg xmlns='http://www.w3.org/2000/svg'/>").startswith("not a picture")


def test_bomb_is_found_on_the_header():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for w, h in (
            (1001, 1000),
            (10_000, 10_000),
            (60_000, 60_000),
        ):  # the pixels do not exist, so reading them would fail
            assert reason(png_header(w, h)).startswith("decompression bomb")
    assert not reason(png_header(1000, 1000)).startswith("decompression bomb")
    assert image.decode(encode(noise(0, 100, 10)), 1000)[0].size == (100, 10)
    assert reason(encode(noise(0, 101, 10)), 1000).startswith("decompression bomb: 101x10")


def test_what_takes_more_memory_than_its_pixels_is_refused_on_its_header():
    limit = -(-100 * 100 * 10 // 6)  # of pixels, 10 bytes for each that is there
    colours = noise(0, 100, 100)
    deep = png_16(np.zeros((100, 100, 3), np.uint16))
    full = {"progressive": True, "subsampling": 0}
    for name, data in (("WEBP", encode(colours, "WEBP")), ("PNG", deep)):
        said = reason(data, limit)
        assert said.startswith(f"decompression bomb: a {name} of 100x100 takes 0 MiB to decode, more than 6 bytes for")
    for data in (encode(colours, "JPEG", **full), encode(colours, "PNG"), encode(colours.convert("RGBA"), "PNG")):
        assert image.decode(data, limit)[0].size == (100, 100)
    assert "decompression bomb" in reason(encode(colours, "JPEG", **full), limit - 1)
    assert image.decode(encode(colours, "JPEG", progressive=True), limit - 1)[0].size == (100, 100)  # fewer colours


@pytest.mark.parametrize(
    "mode, kind", [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("RGBA", "PNG")]
)
def test_other_modes_become_rgb(mode, kind):
    im = noise(2).convert(mode)
    got, notes = image.decode(encode(im, kind), LIMIT)
    assert got.mode == "RGB" and got.size == im.size and notes == []
    if mode in ("RGBA", "LA"):  # alpha is dropped, not blended
        np.testing.assert_array_equal(np.asarray(got), np.asarray(im.convert("RGB")))


@pytest.mark.parametrize("mode, kind", [("L", "JPEG"), ("1", "PNG"), ("LA", "PNG"), ("I;16", "PNG"), ("L", "GIF")])
def test_grey_is_grey_until_it_is_small(mode, kind):
    """A quarter of the memory, and the pixels that it has as RGB."""
    grey = noise(0, 300, 200).convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    data = encode(deep if mode == "I;16" else grey.convert(mode), kind)
    whole, draw = image.decode(data, LIMIT)[0], lambda: np.random.default_rng(3)
    how = {"scale": (0.2, 1.0), "flip": True, "randaugment": True}
    with image.decoded([data], LIMIT) as [(im, _)]:
        assert im.mode == "L" if kind != "GIF" else im.mode in ("L", "RGB")
        np.testing.assert_array_equal(image.eval_transform(im, 32), image.eval_transform(whole, 32))
        np.testing.assert_array_equal(
            image.train_transform(im, 32, draw(), **how), image.train_transform(whole, 32, draw(), **how)
        )


def test_16_bit_is_scaled_and_noted():
    value = np.array([[0, 128, 129, 257], [2570, 32767, 65406, 65535]], np.uint16)
    got, notes = image.decode(encode(Image.fromarray(value), "PNG"), LIMIT)
    np.testing.assert_array_equal(np.asarray(got)[..., 1], [[0, 0, 1, 1], [10, 127, 254, 255]])
    assert notes == ["16-bit picture, scaled to 8 bits", "tiny picture"]
    float_pixels = Image.fromarray(np.array([[0.5]], np.float32))
    assert reason(encode(float_pixels, "TIFF")).startswith("unsupported pixels")
    below = Image.fromarray(np.array([[-1, 5]], np.int32))
    assert reason(encode(below, "TIFF")).startswith("unsupported pixels: mode I, -1 to 5")


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("dtype, kind", [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF")])
def test_deep_pictures_are_scaled_by_what_they_hold(bits, dtype, kind):
    white = (1 << bits) - 1
    value = np.linspace(0, white, 30 * 40).round().astype(dtype).reshape(30, 40)
    got, notes = image.decode(encode(Image.fromarray(value), kind), LIMIT)
    want = np.floor(value / white * 255 + 0.5)
    np.testing.assert_array_equal(np.asarray(got), np.repeat(want[..., None], 3, axis=-1))
    assert notes == [
        f"{'16-bit picture' if bits == 16 else f'picture of 16 bits or more that holds {bits}'}, scaled to 8 bits"
    ]


def test_deep_pictures_are_scaled_alike_in_strips_and_whole():
    """Lines are taken a million pixels at a time: the largest value counts wherever it stands."""
    value = np.zeros((300, 10_000), np.uint16)
    value[299, 9_999], value[0, 0] = 4095, 2048
    got = np.asarray(image.decode(encode(Image.fromarray(value), "PNG"), 10**7)[0])
    assert got[299, 9_999, 0] == 255 and got[0, 0, 0] == 128 and got[150].max() == 0


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_colours_are_scaled_by_what_they_hold(mode, bits):
    value = np.random.default_rng(bits).integers(0, 1 << bits, (30, 40, len(mode)), np.uint16)
    value[0, 0, :3] = (1 << bits) - 1
    got, notes = image.decode(png_16(value), LIMIT)
    value = value[..., :3]
    want = value >> 8 if bits == 16 else np.floor(value / ((1 << bits) - 1) * 255 + 0.5)  # of 16: the upper byte
    np.testing.assert_array_equal(np.asarray(got), want)
    assert len(notes) == 1 and "scaled to 8 bits" in notes[0]


def png_16(value: np.ndarray) -> bytes:
    """PNG of u16[h,w,3] or [h,w,4]."""
    h, w, channels = value.shape
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", w, h, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in value)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (30, 20), c) for c in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    im, notes = image.decode(data, LIMIT)
    np.testing.assert_array_equal(np.asarray(im), np.asarray(frames[0]))
    assert notes == ["animated picture, first frame used"]


def test_odd_sizes_are_noted():
    assert image.decode(encode(noise(0, 1, 1), "PNG"), LIMIT)[1] == ["tiny picture"]
    assert image.decode(encode(noise(0, 10_000, 10), "PNG"), LIMIT)[1] == ["extreme aspect ratio"]
    assert image.decode(encode(noise(0, 200, 10), "PNG"), LIMIT)[1] == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_left_alone_unless_it_is_asked_for(kind):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    for tag in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = tag
        stored = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
        stored.paste((255, 0, 0), (0, 0, 16, 16))
        data = encode(stored, kind, exif=exif, **options)
        plain, turned = image.decode(data, LIMIT)[0], image.decode(data, LIMIT, upright=True)[0]
        assert plain.size == (48, 32)
        want = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        np.testing.assert_array_equal(np.asarray(turned), np.asarray(want))


@pytest.mark.parametrize("broken", [b"Exif\0\0nothing", b"Exif\0\0II*\0\xff\xff\xff\xff", b""])
def test_a_broken_orientation_turns_nothing(broken):
    data = encode(noise(0))
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(broken)) + broken + data[2:]
    assert image.decode(data, LIMIT, upright=True)[0].size == (40, 30)
    exif = Image.Exif()
    exif[0x0112] = 77
    assert image.decode(encode(noise(0), exif=exif), LIMIT, upright=True)[0].size == (40, 30)


def box(brand: bytes, *others: bytes) -> bytes:
    """The beginning of a file of the AVIF and HEIC kind."""
    brands = brand + b"\0\0\0\0" + b"".join(others)
    return struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + b"\0" * 64


def test_avif_and_heic(monkeypatch):
    if image.AVIF:
        im = Image.new("RGB", (40, 30), (10, 200, 30))
        got, notes = image.decode(encode(im, "AVIF"), LIMIT)
        assert np.abs(np.asarray(got).astype(int) - np.asarray(im)).max() < 12 and notes == []
        assert reason(encode(im, "AVIF"), 1000).startswith("decompression bomb: 40x30")
        assert reason(encode(noise(1), "AVIF")[:-30]).split()[0] in ("broken", "truncated")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    image.heif.cache_clear()
    for data in (box(b"heic"), box(b"mif1", b"mif1", b"heic"), box(b"heix", b"mif1")):
        assert reason(data).startswith("HEIC picture: the package pillow-heif reads it; pip install pillow-heif")
    assert reason(box(b"isom", b"mp42")).startswith("not a picture")  # a film
    monkeypatch.setattr(image, "AVIF", False)
    monkeypatch.setattr(image, "FORMATS", ("JPEG", "PNG"))
    assert reason(box(b"avif", b"mif1")).startswith("AVIF picture: this Pillow cannot read it; pip install")


def test_heic_is_read_where_the_package_is(monkeypatch):
    opened = []
    fake = types.SimpleNamespace(register_heif_opener=lambda: opened.append(1) or Image.register_open("HEIF", Heif))

    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode = (40, 30), "RGB"
            self.im = Image.new("RGB", (40, 30), "blue").im

    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    image.heif.cache_clear()
    try:
        for _ in range(2):
            assert np.asarray(image.decode(box(b"heic"), LIMIT)[0])[0, 0].tolist() == [0, 0, 255]
    finally:
        image.heif.cache_clear()
        Image.OPEN.pop("HEIF")
        Image.ID.remove("HEIF")
    assert opened == [1]


def test_max_pixels_lifts_pillow_s_own_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = encode(noise(0, 100, 50), "PNG")
    assert reason(data, 999).startswith("decompression bomb")
    got = image.decode(data, 5000)[0]
    assert got.size == (100, 50) and Image.MAX_IMAGE_PIXELS == 5000
    image.train_transform(got, 8, np.random.default_rng(0), scale=(1, 1), flip=True, randaugment=False)
    image.decode(data, 10_000)
    image.decode(encode(noise(0, 10, 5), "PNG"), 100)
    assert Image.MAX_IMAGE_PIXELS == 10_000


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_broken_bytes_never_end_a_run(data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]))
    raw = bytearray(encode(noise(3, 24, 24), kind))
    for at, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), min_size=1, max_size=8)
    ):
        raw[at] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            im, _ = image.decode(bytes(raw), LIMIT)
        except image.BadImage as e:
            assert str(e)
        else:
            assert im.mode == "RGB" and im.width * im.height <= LIMIT


# --- crop and resize

SIDES = st.integers(1, 3000)


@settings(max_examples=300, deadline=None)
@given(w=SIDES, h=SIDES, seed=st.integers(0, 2**32), low=st.floats(0.05, 1.0))
def test_random_crop_by_property(w, h, seed, low):
    x, y, cw, ch = image.random_crop(w, h, (low, 1.0), np.random.default_rng(seed))
    assert 0 <= x <= x + cw <= w and 0 <= y <= y + ch <= h and cw > 0 and ch > 0
    # either a crop of the drawn area and ratio, or the fallback, which spans a whole side; sides are rounded
    spans = cw == w or ch == h
    assert spans or (cw + 0.5) * (ch + 0.5) >= low * w * h - 1e-6
    ratio = ((cw - 0.5) / (ch + 0.5), (cw + 0.5) / max(ch - 0.5, 1e-9))
    assert ratio[0] <= 4 / 3 + 1e-9 and ratio[1] >= 3 / 4 - 1e-9 or spans and min(cw, ch) == 1


@pytest.mark.parametrize(
    "w, h, box", [(10_000, 10, (4993, 0, 13, 10)), (10, 10_000, (0, 4993, 10, 13)), (1, 1, (0, 0, 1, 1))]
)
def test_crop_falls_back_to_the_centre(w, h, box):
    assert image.random_crop(w, h, (0.9, 1.0), np.random.default_rng(0)) == box


def test_random_crop_distribution():
    rng = np.random.default_rng(0)
    boxes = np.array([image.random_crop(1000, 1000, (0.2, 1.0), rng) for _ in range(4000)])
    area = boxes[:, 2] * boxes[:, 3] / 1e6
    # areas near 1 fit only with ratios near 1, so they are drawn less often than uniformly: at most 1, at least 0.2
    assert 0.199 < area.min() < 0.22 and area.max() > 0.95
    assert abs(np.log(boxes[:, 2] / boxes[:, 3]).mean()) < 0.02
    room = boxes[boxes[:, 2] < 900]
    assert abs((room[:, 0] / (1000 - room[:, 2])).mean() - 0.5) < 0.02


def test_crop_resize_sees_nothing_outside_the_box():
    white = np.zeros((40, 40, 3), np.uint8)
    white[10:30, 10:30] = 255
    assert image.crop_resize(Image.fromarray(white), 16, (10, 10, 20, 20)).min() == 255


def test_eval_transform_is_the_bicubic_filter():
    """Against the definition: a = -0.5 cubic, stretched when shrinking, rows then columns, in 8 bits after each."""
    im, size = noise(4, 23, 17), 8

    def weights(n):
        scale = n / size
        centre, support = (np.arange(size)[:, None] + 0.5) * scale, 2 * scale
        at = np.arange(n)[None] + 0.5
        t = np.abs(at - centre) / scale
        w = np.where(t < 1, 1.5 * t**3 - 2.5 * t**2 + 1, np.where(t < 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0))
        # taps are whole pixels between the rounded ends of the support
        lo, hi = np.floor(centre - support + 0.5), np.floor(centre + support + 0.5)
        w = np.where((np.arange(n) >= lo) & (np.arange(n) < hi), w, 0)
        return w / w.sum(1, keepdims=True)

    x = np.asarray(im).astype(float)
    x = np.clip(np.rint(np.einsum("ow,hwc->hoc", weights(23), x)), 0, 255)
    x = np.clip(np.rint(np.einsum("oh,hwc->owc", weights(17), x)), 0, 255)
    got = image.eval_transform(im, size)
    assert got.shape == (8, 8, 3) and got.dtype == np.uint8
    assert np.abs(got - x).max() <= 1 and (got != x).mean() < 0.02


def test_train_transform_on_any_size():
    for w, h in ((1, 1), (10_000, 10), (64, 48)):
        im = noise(0, w, h)
        a = image.train_transform(im, 32, np.random.default_rng(3), scale=(0.2, 1.0), flip=True, randaugment=True)
        b = image.train_transform(im, 32, np.random.default_rng(3), scale=(0.2, 1.0), flip=True, randaugment=True)
        assert a.shape == (32, 32, 3) and a.dtype == np.uint8
        np.testing.assert_array_equal(a, b)


def test_flip_happens_half_of_the_time():
    ramp = Image.fromarray(np.tile(np.arange(0, 250, 5, dtype=np.uint8)[None, :, None], (50, 1, 3)))
    plain = [
        image.train_transform(ramp, 8, np.random.default_rng(s), scale=(0.9, 1), flip=True, randaugment=False)
        for s in range(200)
    ]
    flipped = sum(p[0, 0, 0] > p[0, -1, 0] for p in plain)
    assert 75 < flipped < 125
    never = [
        image.train_transform(ramp, 8, np.random.default_rng(s), scale=(0.9, 1), flip=False, randaugment=False)
        for s in range(50)
    ]
    assert all(p[0, 0, 0] < p[0, -1, 0] for p in never)


# --- RandAugment, by hand


def grey(rows):
    return np.repeat(np.array(rows, np.uint8)[..., None], 3, axis=-1)


def test_the_ten_operations():
    names = [op.__name__ for op in image.OPS]
    still = ["identity", "auto_contrast", "identity", "identity", "equalize"]  # brightness, sharpness: nothing
    assert names == [*still, "shear_x", "shear_y", "translate_x", "translate_y", "rotate"]


def test_auto_contrast_by_hand():
    got = image.auto_contrast(grey([[50, 100, 150]]), 1)
    np.testing.assert_array_equal(got[..., 0], [[0, 127, 255]])  # (100 - 50) * 255 / 100 = 127.5, cut off
    np.testing.assert_array_equal(image.auto_contrast(grey([[70, 70]]), 1), grey([[70, 70]]))
    one = np.stack([np.array([[10, 20]]), np.array([[5, 5]]), np.array([[0, 255]])], -1).astype(np.uint8)
    np.testing.assert_array_equal(image.auto_contrast(one, 1), [[[0, 5, 0], [255, 5, 255]]])


def test_equalize_by_hand():
    # 1020 pixels: 255 of 10, 255 of 20, 510 of 30: step = (1020 - 510) // 255 = 2; LUT = (1 + pixels below) // 2
    img = grey(np.repeat([10, 20, 30], [255, 255, 510]).reshape(20, 51))
    got = image.equalize(img, 1)
    assert {(int(a), int(b)) for a, b in zip(img.ravel(), got.ravel())} == {(10, 0), (20, 128), (30, 255)}
    few = grey([[1, 2, 3, 4]])  # (4 - 1) // 255 = 0: unchanged
    np.testing.assert_array_equal(image.equalize(few, 1), few)


def test_translate_by_hand():
    img = grey(np.arange(24).reshape(3, 8))
    np.testing.assert_array_equal(image.translate_x(img, 1)[0, :, 0], [128] * 5 + [0, 1, 2])
    np.testing.assert_array_equal(image.translate_x(img, -1)[0, :, 0], [5, 6, 7] + [128] * 5)
    np.testing.assert_array_equal(image.translate_y(img, 1), np.full_like(img, 128))  # three rows moved by five
    tall = grey(np.arange(8)[:, None])
    np.testing.assert_array_equal(image.translate_y(tall, 1)[:, 0, 0], [128] * 5 + [0, 1, 2])
    np.testing.assert_array_equal(image.translate_y(tall, -1)[:, 0, 0], [5, 6, 7] + [128] * 5)


def test_shear_by_hand():
    # x' = x + 0.15 y about the top-left pixel: row 2 is moved by 0.3, so sampled at x - 0.3, which is 22/32 of the way
    # from x - 1 to x after rounding to 1/32 (0.7 * 32 = 22.4)
    img = grey([[0, 32, 64, 96]] * 3)
    got = image.shear_x(img, 1)[..., 0]
    np.testing.assert_array_equal(got[0], [0, 32, 64, 96])
    np.testing.assert_array_equal(got[2], [(128 * 10 + 0 * 22) / 32, 22, 32 + 22, 64 + 22])
    np.testing.assert_array_equal(image.shear_y(img.swapaxes(0, 1), 1)[..., 0], got.T)
    np.testing.assert_array_equal(
        image.shear_x(img[:, ::-1], -1)[2, :, 0], [96 - 10, 64 - 10, 32 - 10, (0 * 22 + 128 * 10) / 32]
    )


def test_rotate_by_hand():
    """Positive turns counter-clockwise about (w/2, h/2): follow one bright pixel through the rotation."""
    img = np.full((41, 41, 3), 128, np.uint8)
    img[20, 35] = 255  # at 14.5 right of the centre (20.5, 20.5), half a pixel above it
    for sign in (1, -1):
        got = image.rotate(img, sign)[..., 0]
        y, x = np.unravel_index(got.argmax(), got.shape)
        c, s = np.cos(np.pi / 12), np.sin(np.pi / 12) * sign
        assert (x, y) == (round(20.5 + c * 14.5 + s * -0.5), round(20.5 - s * 14.5 + c * -0.5))
        assert (y < 20) == (sign > 0)
    assert image.rotate(np.zeros_like(img), 1)[0, 0, 0] == 128 and image.rotate(np.zeros_like(img), 1)[20, 20, 0] == 0


def test_warp_against_the_definition():
    """Bilinear between pixel centres with grey neighbours outside, evaluated in floating point."""
    img, matrix = np.asarray(noise(5, 19, 13)), np.array([[0.9, 0.2, -1.3], [-0.15, 1.1, 0.7]])
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    pad = np.pad(img.astype(float), ((30, 30), (30, 30), (0, 0)), constant_values=128)
    want = np.zeros(img.shape)
    for y in range(13):
        for x in range(19):
            sx, sy = inverse @ (x, y, 1)
            x0, y0 = int(np.floor(sx)), int(np.floor(sy))
            fx, fy = sx - x0, sy - y0
            p = pad[y0 + 30 : y0 + 32, x0 + 30 : x0 + 32]
            want[y, x] = (p[0, 0] * (1 - fx) + p[0, 1] * fx) * (1 - fy) + (p[1, 0] * (1 - fx) + p[1, 1] * fx) * fy
    got = image.warp(img, matrix)
    # positions are rounded to 1/32 pixel: off by at most 1/64 in x and y of a step of at most 255; values by 1/2
    assert np.abs(got - want).max() <= 2 * 255 / 64 + 0.5 + 255 * 2 / 1024
    assert np.abs(got - want).mean() < 1


def test_rand_augment_frequencies(monkeypatch):
    """Two draws with replacement of ten, each applied with probability 1/2, signs even."""
    seen = []
    monkeypatch.setattr(image, "OPS", tuple(lambda img, sign, k=k: seen.append((k, sign)) or img for k in range(10)))
    rng = np.random.default_rng(0)
    for _ in range(4000):
        image.rand_augment(grey([[0]]), rng)
    counts = np.bincount([k for k, _ in seen], minlength=10)
    assert abs(len(seen) - 4000) < 150  # 8000 draws, half applied
    assert (abs(counts - 400) < 80).all()
    assert abs(np.mean([s for _, s in seen])) < 0.06
