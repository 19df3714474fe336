"""The built-in world: records are pure functions of (seed, index), captions are true, noise is what it says it is."""

import collections
import io
import json

import numpy as np
import pytest
from PIL import Image

from blip_jax.config import source
from blip_jax.data.formats import open_source
from blip_jax.data.scenes import words as scene_words
from blip_jax.data.scenes.words import is_true, read
from blip_jax.data.scenes.world import CONTRAST, EASY_COLOURS, EASY_SHAPES, NOISE, Scenes, _mask, vocab_captions


def pixels(record) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(record["image"])))


@pytest.fixture(scope="module")
def noisy() -> list[dict]:
    source = Scenes(seed=3, count=1500, noise=0.5)
    return [source[i] for i in range(len(source))]


def scene(*objects, kind="plain", tone="grey") -> dict:
    """A scene from (size, colour, shape, row, col) tuples, for reading captions."""
    names = ("size", "colour", "shape", "row", "col")
    return {"objects": [dict(zip(names, o)) for o in objects], "background": {"kind": kind, "tone": tone}}


# --- records ----------------------------------------------------------------------------------------------------------
def test_record_depends_on_seed_and_index_only():
    few, many, again = Scenes(5, 10, noise=0.5), Scenes(5, 10**6, noise=0.5), Scenes(5, 10, noise=0.5)
    for i in (7, 0, 9, 3):
        assert few[i] == many[i] == again[i]


def test_noise_share_changes_captions_but_not_pictures():
    clean, noisy = Scenes(5, 60), Scenes(5, 60, noise=1.0)
    for i in range(60):
        assert clean[i]["image"] == noisy[i]["image"]
        assert clean[i]["captions"] == [clean[i]["truth"]["true_caption"]] == [noisy[i]["truth"]["true_caption"]]
        assert clean[i]["captions"] != noisy[i]["captions"]


def test_seeds_and_indices_differ():
    records = [Scenes(seed, 30)[i] for seed in (0, 1) for i in range(30)]
    assert len({r["image"] for r in records}) == len({r["key"] for r in records}) == 60


@pytest.mark.parametrize("size", [32, 64, 97, 224])
def test_png_decodes_to_the_size_asked_for(size):
    source = Scenes(1, 40, size=size)
    for i in range(40):
        image = Image.open(io.BytesIO(source[i]["image"]))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (size, size))


def test_records_have_the_fields_of_a_source_and_plain_truth():
    record = Scenes(2, 3, noise=1.0)[1]
    assert set(record) == {"key", "image", "captions", "image_id", "truth"}
    assert record["key"] == "scenes:scene-2-1" and len(record["captions"]) == 1
    assert json.loads(json.dumps(record["truth"])) == record["truth"]


def test_two_sources_share_no_key_and_equal_pictures_their_id():
    """Two worlds of one seed in a mixture: the second brings the first's pictures with noise, the others other ones."""
    leaves = ({}, {"noise": 1.0}, {"size": 48}, {"easy": True})
    worlds = [open_source(f"w{i}", source("scenes", count=2, seed=2, **own)) for i, own in enumerate(leaves)]
    records = [world[1] for world in worlds]
    assert [r["key"] for r in records] == [f"w{i}:scene-2-1" for i in range(4)]
    assert [r["image_id"] == records[0]["image_id"] for r in records] == [True, True, False, False]
    assert [r["image"] == records[0]["image"] for r in records] == [True, True, False, False]


@pytest.mark.parametrize("index", [-1, 10])
def test_index_outside_the_source(index):
    with pytest.raises(IndexError, match=f"record {index} of 10"):
        Scenes(0, 10)[index]


def test_bad_arguments_are_all_named():
    with pytest.raises(ValueError, match="seed is -1.*count is 0.*size is 16.*noise is 1.5"):
        Scenes(seed=-1, count=0, size=16, noise=1.5)


# --- pictures ---------------------------------------------------------------------------------------------------------
def test_pixels_show_the_objects_where_the_truth_says(noisy):
    for record in noisy[:300]:
        shown = pixels(record)
        for o in record["truth"]["objects"]:
            d = o["diameter"]
            x, y = o["left"] + d // 2, o["top"] + d // 2
            if o["shape"] == "ring":  # hollow: look at its band, three quarters of the radius out
                x += round(0.36 * d)
            assert tuple(shown[y, x].tolist()) == scene_words.COLOURS[o["colour"]], record["key"]
            assert o["row"] == 3 * y // 64 and o["col"] == 3 * (o["left"] + d // 2) // 64


def test_pixels_outside_objects_show_the_background(noisy):
    for record in noisy[:300]:
        shown, truth = pixels(record).astype(int), record["truth"]
        free = np.ones((64, 64), bool)
        for o in truth["objects"]:
            free[o["top"] : o["top"] + o["diameter"], o["left"] : o["left"] + o["diameter"]] = False
        tone = np.array(scene_words.TONES[truth["background"]["tone"]])
        assert np.abs(shown[free] - tone).max() <= CONTRAST
        shades = len(np.unique(shown[free][:, 0]))
        kind = truth["background"]["kind"]
        assert {"plain": shades == 1, "striped": shades == 2, "checked": shades == 2}.get(kind, shades > 2)


def test_objects_never_overlap(noisy):
    for record in noisy:
        covered = np.zeros((64, 64), int)
        for o in record["truth"]["objects"]:
            covered[o["top"] : o["top"] + o["diameter"], o["left"] : o["left"] + o["diameter"]] += 1
        assert covered.max() == 1
        assert covered.sum() == sum(o["diameter"] ** 2 for o in record["truth"]["objects"])  # none leaves the picture


@pytest.mark.parametrize("size", range(32, 132))
def test_objects_stay_in_their_cells_at_any_size(size):
    for i in range(8):
        for o in Scenes(0, 8, size=size).scene(i)["objects"]:
            for first, line in ((o["top"], o["row"]), (o["left"], o["col"])):
                assert line * size // 3 <= first and first + o["diameter"] <= (line + 1) * size // 3


def test_an_easy_world_has_one_or_two_large_objects_on_a_plain_background():
    world = Scenes(seed=5, count=300, size=48, easy=True, captions=3)
    pictures = [world.scene(i) for i in range(300)]
    objects = [o for s in pictures for o in s["objects"]]
    assert {len(s["objects"]) for s in pictures} == {1, 2} and {s["background"]["kind"] for s in pictures} == {"plain"}
    assert {o["shape"] for o in objects} == set(EASY_SHAPES) and {o["colour"] for o in objects} == set(EASY_COLOURS)
    assert {o["size"] for o in objects} == {"large"}
    assert {(o["row"], o["col"]) for o in objects} == {(r, c) for r in range(3) for c in range(3)}
    for i in range(20):
        captions = world[i]["captions"]
        assert (
            len(captions) == 3 and len(set(captions)) > 1 and all(scene_words.is_true(pictures[i], c) for c in captions)
        )
        assert not any(place in caption for place in scene_words.PLACES for caption in captions)


def test_each_of_several_captions_has_noise_of_its_own():
    world = Scenes(seed=5, count=300, size=48, noise=0.5, captions=2)
    told = [world.web_captions(i) for i in range(300)]
    assert {tuple(kind is None for kind, _ in of_one) for of_one in told} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    assert 0.4 < np.mean([kind is None for of_one in told for kind, _ in of_one]) < 0.6
    assert [c for _, c in told[7]] == world[7]["captions"]


def test_every_colour_stands_out_from_every_background():
    shades = [np.array(tone) + s for tone in scene_words.TONES.values() for s in (-CONTRAST, 0, CONTRAST)]
    for name, colour in scene_words.COLOURS.items():
        assert min(np.linalg.norm(np.array(colour) - shade) for shade in shades) > 60, name


def test_shapes_of_one_size_differ():
    masks = [np.asarray(_mask(shape, 12), int) for shape in scene_words.SHAPES]
    gaps = [np.abs(a - b).mean() / 255 for i, a in enumerate(masks) for b in masks[:i]]
    assert min(gaps) > 0.08


# --- captions ---------------------------------------------------------------------------------------------------------
def test_true_captions_are_read_as_true(noisy):
    assert all(is_true(r["truth"], r["truth"]["true_caption"]) for r in noisy)


def test_several_captions_of_one_scene_are_true_and_varied():
    source = Scenes(8, 20)
    for i in range(20):
        captions = source.clean_captions(i, 8)
        assert captions[:3] == source.clean_captions(i, 3)
        assert all(is_true(source.scene(i), c) for c in captions) and len(set(captions)) >= 5


def test_captions_are_short_and_of_a_small_vocabulary():
    captions = list(vocab_captions(3000))
    lengths = [len(c.replace(",", " ,").split()) for c in captions]
    words = {word for c in captions for word in c.replace(",", " ").replace(":", " ").split()}
    assert max(lengths) <= scene_words.MAX_WORDS and 10 < np.mean(lengths) < 18
    assert 70 < len(words) < 150 and len(set(captions)) > 2800


def test_two_hundred_captions_tell_their_pictures_apart():
    """The best possible text-to-image R@1: a reader that picks among all pictures of which the caption is true."""
    world = Scenes(101, 200)
    all_scenes = [world.scene(i) for i in range(200)]
    fitting = [sum(is_true(s, world.clean_captions(i, 1)[0]) for s in all_scenes) for i in range(200)]
    assert min(fitting) == 1 and np.mean([n == 1 for n in fitting]) > 0.85
    assert np.mean([1 / n for n in fitting]) > 0.9


TWO = scene(("large", "red", "circle", 0, 0), ("small", "blue", "star", 2, 1), kind="striped", tone="beige")


@pytest.mark.parametrize(
    ("caption", "truth"),
    [
        ("a red circle", True),
        ("A big red disc, in the upper-left corner.", True),
        ("a red circle and a blue star at the bottom", True),
        ("a blue star below a red circle on a beige background", True),
        ("a red circle to the left of a small blue star", True),
        ("from top to bottom a red circle and a blue star", True),
        ("two objects: a star and a circle", True),
        ("only a red circle and a star on a striped backdrop", True),
        ("a small red circle", False),
        ("a red star", False),
        ("a red circle and a red circle", False),  # two of them are claimed
        ("a red circle on the right", False),
        ("a red circle below a blue star", False),
        ("a red circle right of a blue star", False),
        ("from left to right a blue star and a red circle", False),
        ("three objects: a star and a circle", False),
        ("only a red circle", False),
        ("a red circle at the top on the left", True),
        ("a red circle at the top at the bottom", False),
        ("a red circle on a checked background", False),
        ("a red circle on a grey background on a beige background", False),
        ("a red circle on a grey background", False),
        ("a red circle and a green heart", False),
    ],
)
def test_reading(caption, truth):
    assert read(caption) is not None and is_true(TWO, caption) is truth


@pytest.mark.parametrize(
    "caption",
    ["", "click here", "IMG_2041.jpg", "a red", "a red circle left of", "above a red circle", "a beige background"]
    + [
        "at the top a red circle",
        "a red circle left of at the top a star",
        "a red circles",
        "a redcircle",
        "a réd circle",
    ],
)
def test_what_is_outside_the_grammar_is_not_read(caption):
    assert read(caption) is None and is_true(TWO, caption) is False


def test_objects_named_are_matched_to_objects_shown_in_any_way_that_fits():
    stars = scene(("large", "red", "star", 0, 0), ("small", "blue", "star", 0, 2))
    assert is_true(stars, "a star on the right and a red star")
    assert is_true(stars, "a star left of a star") and not is_true(stars, "a star above a star")
    assert not is_true(stars, "a red star on the right and a star on the left")


# --- noise ------------------------------------------------------------------------------------------------------------
def test_noise_has_the_shares_asked_for(noisy):
    counts = collections.Counter(r["truth"]["noise"] for r in noisy)
    total = len(noisy) - counts[None]
    assert abs(total / len(noisy) - 0.5) < 0.05 and sum(NOISE.values()) == pytest.approx(1)
    for kind, share in NOISE.items():
        assert abs(counts[kind] / total - share) < 4 * (share * (1 - share) / total) ** 0.5, kind


def test_truth_tells_noise_from_true_captions(noisy):
    for r in noisy:
        assert is_true(r["truth"], r["captions"][0]) == (r["truth"]["noise"] is None)


def test_partly_and_wholly_wrong_captions_can_be_read_but_are_false(noisy):
    for r in noisy:
        if r["truth"]["noise"] in ("partly", "wrong"):
            assert read(r["captions"][0]) is not None


def test_partly_wrong_differs_from_the_truth_in_one_thing(noisy):
    for r in noisy:
        if r["truth"]["noise"] == "partly":
            was, now = (c.replace("an ", "a ").split() for c in (r["truth"]["true_caption"], r["captions"][0]))
            same_start = next(i for i in range(99) if i == min(len(was), len(now)) or was[i] != now[i])
            same_end = next(i for i in range(99) if i == min(len(was), len(now)) or was[-1 - i] != now[-1 - i])
            assert max(len(was), len(now)) - same_start - same_end <= 5  # a longest place: "in the upper left corner"
            assert same_start + same_end > 0


def test_empty_captions_are_empty_strings(noisy):
    empty = [r for r in noisy if r["truth"]["noise"] == "empty"]
    assert empty and all(r["captions"] == [""] for r in empty)
    assert all(r["captions"][0] for r in noisy if r["truth"]["noise"] != "empty")
