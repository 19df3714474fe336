"""Pictures and texts as callers give them: every form is the same picture, and what is wrong is named by its place."""

import io

import numpy as np
import pytest
from PIL import Image
from world.pictures import encode, noise, png_header
from world.verbs import QUESTIONS, TEXTS, folder, models, photos  # noqa: F401 (fixtures)

from blip_jax.data import image
from blip_jax.inference import inputs


def test_every_form_of_a_picture_is_the_same_picture(tmp_path):
    rgb = photos(1)[0]
    png = encode(Image.fromarray(rgb), "PNG")
    (tmp_path / "a.png").write_bytes(png)
    alpha = np.dstack([rgb, np.full(rgb.shape[:2], 7, np.uint8)])
    forms = [
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        png,
        bytearray(png),
        memoryview(png),
        Image.open(io.BytesIO(png)),
        rgb,
        alpha,
        Image.fromarray(alpha),
        np.asfortranarray(rgb),
    ]
    want = image.eval_transform(Image.fromarray(rgb), 16)
    rows, one = inputs.pictures(forms)
    assert not one and rows[0].name == f"images[0] {str(tmp_path / 'a.png')!r}"
    for row in rows:
        np.testing.assert_array_equal(inputs.pixels(row, 16, 10**6), want, err_msg=row.name)
    for form in forms:
        assert inputs.pictures(form)[1]
    for several in (np.stack([rgb, rgb]), (rgb, png), iter([rgb, png]), {str(tmp_path / "a.png"): 1}.keys()):
        rows, one = inputs.pictures(several)
        assert not one
        np.testing.assert_array_equal(inputs.pixels(rows[-1], 16, 10**6), want)


def test_grey_palette_deep_and_tiny_pictures():
    grey = np.arange(0, 240, 8, dtype=np.uint8).reshape(5, 6)
    want = image.eval_transform(Image.fromarray(grey).convert("RGB"), 16)
    pixels = lambda x: inputs.pixels(inputs.pictures(x)[0][0], 16, 10**6)
    gray, deep = Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257)
    for form in (grey, grey[..., None], gray, deep, gray.convert("P")):
        np.testing.assert_array_equal(pixels(form), want)
    np.testing.assert_array_equal(pixels(np.full((1, 1, 3), 9, np.uint8)), np.full((16, 16, 3), 9))


def test_photographs_stand_upright(tmp_path):
    """Orientation 6, as phones write it: red at the top of the sensor is red at the right of the photograph."""
    stored = Image.new("RGB", (60, 40))
    stored.paste((255, 0, 0), (0, 0, 60, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(stored, exif=exif, quality=95)
    (tmp_path / "photo.jpg").write_bytes(data)
    want = inputs.pixels(inputs.Picture("photo", data), 32, 10**6)
    red = want[..., 0].astype(int) - want[..., 1]
    assert red[:, -6:].mean() > 200 and red[8:, :20].mean() < 20
    for form in (tmp_path / "photo.jpg", Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(inputs.pixels(inputs.Picture("photo", form), 32, 10**6), want)


def test_what_is_irregular_is_said(capsys):
    grey = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (48, 1))
    want = image.eval_transform(Image.fromarray(grey).convert("RGB"), 32)
    pixels = lambda x: inputs.pixels(inputs.Picture("x.png", x), 32, 10**6)
    np.testing.assert_array_equal(pixels(Image.fromarray(grey)), want)
    assert capsys.readouterr().err == ""
    of_8 = "note: x.png: picture of 16 bits or more that holds 8, scaled to 8 bits\n"
    for form in (Image.fromarray(grey).convert("I"), encode(Image.fromarray(grey.astype(np.uint16)), "PNG")):
        np.testing.assert_array_equal(pixels(form), want)
        assert capsys.readouterr().err == of_8
    assert pixels(encode(Image.fromarray(grey.astype(np.uint16) * 16), "PNG")).max() > 250
    assert "that holds 12, scaled" in capsys.readouterr().err
    frames = [Image.new("RGB", (30, 20), c) for c in ("red", "blue")]
    pixels(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert capsys.readouterr().err == "note: x.png: animated picture, first frame used\n"


def test_a_file_larger_than_any_picture_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_BYTES", 1000)
    data = encode(noise(0), "PNG")
    (tmp_path / "large.png").write_bytes(data)
    for form in (tmp_path / "large.png", data, memoryview(data)):
        with pytest.raises(ValueError, match="^x: too large: more than 1000 bytes"):
            inputs.pixels(inputs.Picture("x", form), 16, 10**6)


@pytest.mark.parametrize("value", [1.5, "2", None, True, np.nan, [1], b"1", np.float32(2), 1j])
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError, match="^n is .*: give a whole number$"):
        inputs.whole(value, "n")


@pytest.mark.parametrize("value", ["0.9", None, True, np.nan, np.inf, -np.inf, [0.5], b"1", 1j, 10**400])
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match="^top_p is .*: give a finite number$") as e:
        inputs.number(value, "top_p")
    assert len(str(e.value)) < 130


def test_numbers_of_any_library_are_numbers():
    assert [inputs.whole(x, "n") for x in (3, np.int64(3), np.array(3), np.uint8(3))] == [3] * 4
    assert [inputs.number(x, "p") for x in (0.5, np.float64(0.5), np.float32(0.5), np.array(0.5), 1, -2)] == [
        *[0.5] * 4,
        1,
        -2,
    ]


@pytest.mark.parametrize(
    "images, expected",
    [
        ([], "images is empty"),
        (
            [Image.new("RGB", (0, 0)), Image.new("L", (3, 0))],
            r"images\[0\] is a PIL image of 0x0: it has no pixels; images",
        ),
        (None, "images is None: give a path"),
        (7, "images is of type int"),
        ({"a": 1}, "images is of type dict"),
        ([photos(1)[0], 7, None], r"images\[1\] is of type int.*; images\[2\] is None"),
        (photos(1)[0] / 255, r"images is an array float64\[20, 30, 3\]: arrays are u8"),
        ([np.zeros((2, 2, 5), np.uint8)], r"images\[0\] is an array uint8\[2, 2, 5\]"),
        (np.zeros((0, 4, 3), np.uint8), r"images is an array uint8\[0, 4, 3\]"),
        (
            ["gone.jpg", photos(1)[0], "away.png"],
            r"images\[0\] 'gone.jpg': no such file; images\[2\] 'away.png': no such file",
        ),
        (".", "images '.': it is a folder"),
        ("https://example.org/a.jpg", "addresses are not fetched"),
        (b"", "images: empty image file"),
        ([b"hello"], r"images\[0\]: not a picture: none of JPEG"),
        (png_header(50_000, 50_000), "images: decompression bomb"),
        (encode(noise(0))[:400], "images: truncated picture"),
        (Image.fromarray(np.full((2, 2), 1e9, np.float32)), "images: unsupported pixels"),
    ],
)
def test_what_is_no_picture_is_named(models, images, expected):
    with pytest.raises(ValueError, match=expected):
        models("pretrain").caption(images)


def test_a_text_file_is_no_picture(models, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"images\[1\] '.*notes.txt': not a picture"):
        models("pretrain").caption([photos(1)[0], tmp_path / "notes.txt"])


@pytest.mark.parametrize(
    "texts, expected",
    [
        ("", "texts is empty"),
        ([], "texts is empty: give at least one"),
        (["a", " \n"], r"texts\[1\] is empty"),
        ("...!", r"texts is '...!', of which cleaning leaves no word"),
        ("\u200d", r"texts is '\\u200d', of which cleaning leaves no word"),  # of which no token is made
        (["a", 7, b"c"], r"texts\[1\] is of type int: give a str; texts\[2\] is of type bytes"),
        (b"star", "texts is of type bytes"),
    ],
)
def test_what_is_no_text_is_named(models, texts, expected):
    with pytest.raises(ValueError, match=expected):
        models("pretrain").features(photos(1)[0], texts)


def test_a_number_of_texts_that_fits_none(models):
    with pytest.raises(ValueError, match="3 images and 2 texts: give as many of both, or one of either"):
        models("retrieval").match(photos(3), TEXTS[:2])
    with pytest.raises(ValueError, match="2 images and 3 questions"):
        models("vqa").answer(photos(2), QUESTIONS)
