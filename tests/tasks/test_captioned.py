"""Captions that are scored: which pictures count, what they are compared with, and what is said where they cannot be.

No model: what it would write is given.
"""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from world import mini
from world.mini import MINI

from blip_jax import config
from blip_jax.eval import captions, files, java
from blip_jax.eval import submission as servers
from blip_jax.inference.load import Loaded
from blip_jax.parallel import sharding
from blip_jax.tasks import caption, captioned, validate

DOMAINS = "nocaps/annotation/nocaps_val_4500_captions.json"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return mini.write(tmp_path_factory.mktemp("mini"))


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.objective, tiny_cfg.eval.batch = "caption", 8
    return tiny_cfg


@pytest.fixture
def told(cfg, tmp_path, monkeypatch):
    """The result of a captioner that says `texts` of the pictures of a source, in their order."""

    def told(source, texts, approximate=True):
        with cfg.data.unlocked():
            cfg.data.eval = ConfigDict(source if isinstance(source, dict) else {"mini": source})
        left = iter(texts)
        nothing = lambda params, img, keys: {"ids": np.zeros((len(img), 1, 1), np.int32)}
        monkeypatch.setattr(captioned, "writer", lambda *_: captioned.Writer(nothing, lambda ids: next(left)))
        data = caption.eval_data(cfg, None, tmp_path / "skipped.jsonl")
        loaded = Loaded(None, None, cfg, None, "")
        return (caption.curve if approximate else caption.evaluate)(loaded, data, sharding.make_mesh(cfg.mesh))

    return told


def test_each_domain_is_a_corpus_of_its_own(told, pictures, cfg):
    people = files.caption_references(str(MINI / DOMAINS))
    texts = {key: own[0] for key, own in people.captions.items()}
    result = told(mini.found(pictures, "nocaps", "nocaps", DOMAINS), texts.values())
    assert result["predictions"] == [{"image_id": key, "caption": text} for key, text in texts.items()]
    names = dict.fromkeys(people.domains.values())
    groups = {name: [key for key, domain in people.domains.items() if domain == name] for name in names}
    assert {name: len(keys) for name, keys in groups.items()} == {"in-domain": 3, "near-domain": 6, "out-domain": 3}
    want = captions.by_group(texts, people.captions, groups | {"entire": list(texts)}, approximate=True)
    for name, own in want.items():
        for metric, value in own.corpus.items():
            assert result[f"{name}/{metric}"] == pytest.approx(value)
    name, text = caption.submission(result, cfg)
    assert name == "captions_blip_results.json" and json.loads(text) == result["predictions"]


def test_rows_of_one_picture_are_one_caption_of_it_and_all_of_peoples(told, pictures, cfg):
    path = mini.LISTS["coco"][0]
    rows, people = mini.read(path), files.caption_references(str(MINI / path)).captions
    texts = [f"caption {i}" for i in range(len(rows))]
    result = told(mini.found(pictures, "json", "coco", path), texts)
    assert result["pictures"] == len(people) == 24 < len(rows)
    first = [i for i, row in enumerate(rows) if row["image"] not in [other["image"] for other in rows[:i]]]
    given = {row["image_id"]: row["caption"] for row in result["predictions"]}
    assert list(given.values()) == [texts[i] for i in first]
    want = captions.score(given, people, approximate=True).corpus
    assert {name: result[name] for name in want} == pytest.approx(want)
    assert set(captioned.BEST) < set(want)


def test_pictures_of_one_number_are_known_by_their_image_id(told, pictures):
    one, other = (
        mini.found(pictures, "nocaps", "nocaps", f"nocaps/annotation/nocaps_{s}.json") for s in ("val", "test")
    )
    alone = told(one, [f"caption {i}" for i in range(12)])
    both = told({"a": one, "b": other}, [f"caption {i}" for i in range(20)])
    assert [row["caption"] for row in both["predictions"]] == [f"caption {i}" for i in range(20)]
    assert both["predictions"][0]["image_id"].startswith("a:") and both["pictures"] == 20
    assert {name: x for name, x in both.items() if "/" in name} == {name: x for name, x in alone.items() if "/" in name}
    with pytest.raises(ValueError, match="have no prediction"):  # no server knows them so
        servers.captions({row["image_id"]: row["caption"] for row in both["predictions"]}, one.path)

    names = lambda *ids: list(captioned.called([("web", image_id) for image_id in ids]).values())
    assert names("cats/1.jpg", "dogs/2.jpg") == [1, 2]
    assert names("cats/1.jpg", "dogs/1.jpg", "x.jpg") == ["cats/1.jpg", "dogs/1.jpg", "x.jpg"]


def test_an_empty_caption_is_a_caption(told, pictures, cfg):
    path = mini.LISTS["coco"][1]
    texts = ["", *(row["caption"][0] for row in mini.read(path)[1:])]
    result = told(mini.found(pictures, "json", "coco", path), texts)
    assert result["predictions"][0]["caption"] == "" and 0 < result["approximate/CIDEr"]
    assert json.loads(caption.submission(result, cfg)[1]) == result["predictions"]


@pytest.mark.parametrize("missing", ["Java", "pycocoevalcap"])
def test_what_cannot_be_scored_here_is_captioned_all_the_same(missing, told, pictures, monkeypatch, capsys):
    def gone():
        raise ValueError(f"{missing} is not there")

    monkeypatch.setattr(java, "find" if missing == "Java" else "folder", gone)
    path = mini.LISTS["coco"][1]
    result = told(mini.found(pictures, "json", "coco", path), ["a dog"] * 8, approximate=False)
    assert result.keys() == {"pictures", "predictions"} and len(result["predictions"]) == 8
    assert f"captions are made but not scored: {missing} is not there; `blip-jax score`" in capsys.readouterr().out
    curve = told(mini.found(pictures, "json", "coco", path), ["a dog"] * 8)
    assert ("approximate/CIDEr" in curve) == (missing == "Java")


def test_a_folder_without_corenlp_is_refused_before_anything_is_captioned(cfg, pictures, tmp_path):
    cfg.eval.spice = str(tmp_path)
    with cfg.data.unlocked():
        cfg.data.eval.mini = mini.found(pictures, "json", "coco", mini.LISTS["coco"][1])
    with pytest.raises(ValueError, match="SPICE needs stanford-corenlp-3.6.0.jar"):
        caption.eval_data(cfg, None, tmp_path / "skipped.jsonl")


def test_servers_take_the_captions_of_one_file(told, pictures, cfg):
    coco = [mini.found(pictures, "json", "coco", path) for path in mini.LISTS["coco"][1:]]
    result = told({"val": coco[0], "test": coco[1]}, ["a dog"] * 16)
    with pytest.raises(ValueError, match="data.eval has 2 files: a server takes the captions of one"):
        caption.submission(result, cfg)
    result = told(coco[0], ["a dog"] * 8)
    result["predictions"].pop()
    with pytest.raises(ValueError, match="1 of 8 pictures have no prediction"):
        caption.submission(result, cfg)


@pytest.mark.parametrize(
    "leaves, expected",
    [
        ({"beams": 0}, "eval.beams is 0: it must be 1 to 64"),
        ({"min_length": 21}, "eval.min_length and eval.max_length are 21 and 20"),
        ({"max_length": 41}, "eval.max_length is 41, but the text model has 40 positions"),
        ({"repetition_penalty": 0.0}, "eval.repetition_penalty is 0.0: it must be positive"),
    ],
)
def test_settings_that_do_not_fit(cfg, leaves, expected):
    validate(cfg)
    with cfg.data.unlocked():
        cfg.data.eval.world = config.source("scenes", count=8, size=32, seed=1)
    validate(cfg)
    cfg.eval.update(leaves)
    with pytest.raises(ValueError, match=expected):
        validate(cfg)


def test_records_of_another_kind_are_named(told, pictures):
    with pytest.raises(ValueError, match="no record of captions"):
        told(mini.found(pictures, "vqa", "vqa", "vqa/annotation/vqa_val.json"), [])


def test_the_table_has_a_line_for_each_number():
    numbers = {"pictures": 2, "CIDEr": 0.5, "bleu_testlen": 7}
    assert caption.table(numbers | {"predictions": []}).splitlines() == [
        "2 pictures",
        f"{'CIDEr':28} {0.5:8.4f}",
        f"{'bleu_testlen':28} {7:8}",
    ]
