"""COCO's official caption files as a source of kind json."""

import json

import numpy as np
import pytest
from world.pictures import encode, noise

from blip_jax import config
from blip_jax.data import captions, coco, index
from blip_jax.data.formats import open_source

IMAGES = [
    {"id": 9, "file_name": "b.jpg", "height": 30},
    {"id": 4, "file_name": "a.jpg"},
    {"id": 5, "file_name": "c.jpg"},
]
TEXTS = [(4, "a dog"), (9, "two\\nlines, “数据” \ud800"), (4, " Another dog. ")]
ANNOTATIONS = [{"id": i, "image_id": of, "caption": text} for i, (of, text) in enumerate(TEXTS)]
WHOLE = {"info": {"year": 2017}, "licenses": [], "images": IMAGES, "annotations": ANNOTATIONS}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train").mkdir()
    for i, row in enumerate(IMAGES):
        (tmp_path / "train" / row["file_name"]).write_bytes(encode(noise(i)))
    return tmp_path


def opened(folder, content, indent=None, name="c.json", **leaves):
    (folder / name).write_text(json.dumps(content, indent=indent))
    return open_source("coco", config.source("json", str(folder / "*.json"), images=str(folder / "train"), **leaves))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("order", [list(WHOLE), ["images", "annotations"], ["annotations", "images", "info"]])
def test_each_picture_has_its_captions(folder, indent, order):
    source = opened(folder, {name: WHOLE[name] for name in order}, indent)
    records = [source[i] for i in range(len(source))]
    assert [r["key"] for r in records] == [f"coco:c.json#{i}:{n}.jpg" for i, n in enumerate("bac")]
    assert [r["image_id"] for r in records] == ["9", "4", "5"]
    assert [r["captions"] for r in records] == [source.captions_of(i) for i in range(3)]
    assert [r["captions"] for r in records] == [[TEXTS[1][1]], ["a dog", " Another dog. "], []]
    assert [r["image"] for r in records] == [(folder / "train" / f"{n}.jpg").read_bytes() for n in "bac"]
    assert source.without_texts == ""


def test_two_files_and_other_fields(folder):
    other = {
        "images": [{"id": 4, "coco_url": "a.jpg"}, {"id": 1, "coco_url": "gone.jpg"}],
        "annotations": [{"image_id": 1, "raw": {"text": "x"}}],
    }
    source = opened(folder, other, name="0.json", image_key="coco_url", caption_key="raw/text")
    assert [source.captions_of(i) for i in range(2)] == [[], ["x"]]
    (folder / "0.json").write_text(json.dumps(WHOLE))
    source = opened(folder, WHOLE)
    assert len(source) == 6 and source[4]["key"] == "coco:c.json#1:a.jpg" and source[4]["captions"][0] == "a dog"


def test_files_without_annotations_are_pictures_alone(folder):
    source = opened(folder, {"info": {}, "images": IMAGES})
    assert "no annotations" in source.without_texts and source[0]["captions"] == []


@pytest.mark.parametrize(
    "content, leaves, message",
    [
        ({"images": [{"file_name": "a.jpg"}]}, {}, "a picture needs a whole `id` and a path 'file_name'"),
        ({"images": [IMAGES[0], IMAGES[0]]}, {}, "two pictures have the id 9"),
        ({"images": IMAGES, "annotations": [{"image_id": 3, "caption": "x"}]}, {}, "of picture 3, which is not among"),
        ({"images": IMAGES, "annotations": [{"image_id": [], "caption": "x"}]}, {}, "of picture \\[\\], which is not"),
        (
            {"images": IMAGES, "annotations": [{"image_id": 9, "bbox": [1]}]},
            {},
            "fields are .'bbox', 'image_id'.: give",
        ),
        ({"images": IMAGES, "annotations": ANNOTATIONS}, {"image_key": "file"}, "a path 'file'"),
        ({"images": IMAGES, "annotations": {}}, {}, "no lists `images` and `annotations` of objects"),
        ({"info": {"a": 1}, "images": []}, {}, "holds no record"),
        ({"images": [{"id": 1, "file_name": "x/a.jpg"}]}, {}, "set `images` to the folder that holds 'x/a.jpg'"),
    ],
)
def test_what_is_wrong_is_said(folder, content, leaves, message):
    with pytest.raises(ValueError, match=f"^data source 'coco': .*{message}") as e:
        opened(folder, content, **leaves)
    assert "\n" not in str(e.value)


def test_lists_that_begin_alike_are_lists(folder):
    rows = [{"info": {"n": 1}, "image": "a.jpg", "caption": "x"}, {"images": [1], "image": "b.jpg", "caption": "y"}]
    for k, order in enumerate((rows, rows[::-1])):
        (folder / "l.json").write_text("".join(json.dumps(row) + "\n" for row in order))
        source = open_source("l", config.source("json", str(folder / "l.json"), images=str(folder / "train")))
        assert [source[i]["captions"] for i in range(2)] == ([["x"], ["y"]] if k == 0 else [["y"], ["x"]])
    with pytest.raises(ValueError, match="c.json' is one of COCO's caption files and .*l.json' is not"):
        opened(folder, WHOLE)


def test_a_cut_file_is_named_and_a_vocabulary_reads_whole_ones(folder):
    whole = json.dumps(WHOLE)
    (folder / "c.json").write_text(whole)
    assert captions.read([str(folder / "c.json")]) == ([TEXTS[1][1], "a dog", " Another dog. "], {})
    (folder / "c.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="c.json' begins as COCO's captions do and is no JSON"):
        open_source("coco", config.source("json", str(folder / "c.json")))


def test_a_kept_index_that_does_not_fit_is_not_sound(folder):
    opened(folder, WHOLE)
    good = coco.build(str(folder / "c.json"), "image", "caption").arrays
    assert coco.sound(index.Index(good, {}), 0)
    for name, x in good.items():
        for other in (x[:-1], np.append(x, x[-1:]), x[::-1] if name.endswith("ends") else x[:0]):
            assert not coco.sound(index.Index(good | {name: other}, {}), 0)
