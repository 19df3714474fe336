"""NLVR2 as a task: rows, the loss against the original's, readers of both layouts, initial weights, a run from
pre-training.
"""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from world.golden import folder
from world.pictures import encode, noise
from world.runs import begun, leaves

from blip_jax import checkpoint, config, tasks, trees
from blip_jax.convert.apply import from_torch, to_torch
from blip_jax.data.formats import open_source
from blip_jax.data.source import BadRecord
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.models import initial
from blip_jax.models.build import fit
from blip_jax.models.layers import stack
from blip_jax.tasks import nlvr
from blip_jax.tasks.step import Keys
from blip_jax.train import evaluation, loop


def sized(s, objective, layers):
    """A config of a golden's sizes."""
    cfg = config.base("tiny")
    with cfg.unlocked():
        cfg.objective = objective
        cfg.model.vit.update(width=s["vw"], depth=s["vdepth"], heads=s["vheads"], mlp=4 * s["vw"], patch=s["patch"])
        cfg.model.med.update(
            width=s["tw"], layers=layers, heads=s["th"], mlp=s["ti"], positions=s["pos"], vocab_size=s["vocab"]
        )
        cfg.model.update(img_size=s["img"], embed_dim=s["embed"], dropout=0.0, dtype="float32")
    return cfg


# --- the loss ---------------------------------------------------------------------------------------------------------
def test_golden_nlvr_task_loss_predictions_and_every_gradient():
    case = folder("blip/nlvr")
    meta, io = json.loads((case / "meta.json").read_text()), np.load(case / "io.npz")
    s = meta["config"]
    cfg = sized(s, "nlvr", s["nl_tl"])
    model, tensors = nlvr.build(cfg), load_file(case / "weights.safetensors")
    params = jax.tree.map(jnp.asarray, from_torch("nlvr", tensors, heads=dict(vit=s["vheads"], med=s["th"]))["params"])
    left, right = jnp.split(jnp.asarray(io["image"]).transpose(0, 2, 3, 1), 2)
    batch = {
        "img0": left,
        "img1": right,
        "ids": jnp.asarray(io["input_ids"], jnp.int32),
        "txt_mask": jnp.asarray(io["attention_mask"] > 0),
        "label": jnp.asarray(io["targets"] > 0),
    }
    keys = Keys(jax.random.key(0), jax.random.key(1), 0)
    step = jax.jit(jax.value_and_grad(lambda p: nlvr.loss(model, cfg, p, None, batch, keys), has_aux=True))
    with stack.looped():  # the layers one by one: test_golden_blip.py
        (loss, (metrics, found)), grads = step(params)
    np.testing.assert_allclose(loss, io["loss"], atol=1e-5)
    told = jax.jit(lambda p, batch: nlvr.logits(functools.partial(model.apply, {"params": p}), batch, None))
    with stack.looped():
        np.testing.assert_allclose(told(params, batch), io["prediction"], atol=1e-5)
        swapped = told(params, batch | {"img0": right, "img1": left})
    np.testing.assert_allclose(swapped, io["prediction_swapped"], atol=1e-5)
    right = np.mean(io["prediction"].argmax(1) == io["targets"])
    assert float(metrics["accuracy"]) == pytest.approx(right) and found == {}

    grads = to_torch("nlvr", {"params": jax.tree.map(np.asarray, grads)}, vocab_size=s["vocab"])
    names = [name for name in io.files if name.startswith("grad/")]
    assert {name[len("grad/") :] for name in names} >= {name for name in grads if "position_ids" not in name}
    for name in names:
        key, theirs = name[len("grad/") :], io[name]
        largest = np.abs(theirs).max()
        if re.search(r"key\d?\.bias$", key):  # its exact gradient is zero
            assert largest < 1e-5 and np.abs(grads[key]).max() < 1e-5, key
        else:
            np.testing.assert_allclose(grads[key], theirs, rtol=0, atol=1e-4 * largest, err_msg=key)


def test_golden_initial_weights_come_from_where_the_original_takes_them():
    origin = json.loads((folder("blip/nlvr_init") / "origin.json").read_text())
    s, fresh = origin["config"], "initialised"
    before, after = sized(s, "pretrain", s["nl_tl"]), sized(s, "nlvr", s["nl_tl"])
    shapes = lambda cfg: jax.eval_shape(lambda: initial.init_params(cfg, tasks.build(cfg), jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes(before))
    fitted = fit(params, shapes(after), "here", nlvr.START)
    zeros = dict(trees.paths(jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes(after))))
    whole = trees.merge(fitted.params, trees.nest((path, zeros[path]) for path in fitted.random))
    begun = to_torch("nlvr", {"params": whole}, vocab_size=s["vocab"])
    theirs = to_torch("pretrain", {"params": params, "momentum": {}}, vocab_size=s["vocab"])
    told = {key: source for key, source in origin["origin"].items() if "position_ids" not in key}
    assert begun.keys() >= told.keys() and fresh in told.values()
    for key, source in told.items():
        if source == fresh:
            assert not begun[key].any(), key
        else:
            np.testing.assert_array_equal(begun[key], theirs[source], err_msg=f"{key} from {source}")


# --- rows -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.objective = "nlvr"
    tiny_cfg.model.med.layers = 7  # the last merges
    return tiny_cfg


def told(sentence="The left ring is red.", label=True):
    return {"key": "k", "images": [b"left", b"right"], "sentence": sentence, "label": label}


def test_half_of_the_time_the_pictures_change_sides_and_the_words_with_them(cfg):
    tokenizer, seen = Tokenizer(cfg.text.vocab), set()
    cfg.text.max_len = 40
    for seed in range(20):
        row = nlvr.example(told(), np.random.default_rng(seed), cfg, tokenizer)
        swapped = row["img0"] == b"right"
        assert {row["img0"], row["img1"]} == {b"left", b"right"} and row["label"] and row["label"].dtype == bool
        text = "the right ring is red" if swapped else "the left ring is red"
        np.testing.assert_array_equal(row["ids"], tokenizer.encode([text], 40)[0][0])
        seen.add(swapped)
    assert seen == {True, False}
    still = nlvr.sentence(told(), cfg, tokenizer)
    assert (still["img0"], still["img1"]) == (b"left", b"right") and "label" not in still
    rows = [told() | {"key": str(n)} for n in range(20)]
    shown = lambda: [nlvr.shown(row, cfg, tokenizer)["img0"] for row in rows]
    assert shown() == [b"left"] * 20  # evaluation leaves them where they are
    cfg.eval.exchange = True
    assert set(shown()) == {b"left", b"right"} and shown() == shown()
    for row in rows:
        one = nlvr.shown(row, cfg, tokenizer)
        text = "the right ring is red" if one["img0"] == b"right" else "the left ring is red"
        np.testing.assert_array_equal(one["ids"], tokenizer.encode([text], 40)[0][0])
    cfg.text.max_len = 5
    assert nlvr.sentence(told(), cfg, tokenizer)["notes"] == ["long sentence, cut"]
    assert nlvr.sentence(told("left \ud83d"), cfg, tokenizer)["notes"] == ["broken characters replaced"]
    with pytest.raises(BadRecord, match="sentence without a label"):
        nlvr.example(told(label=None), np.random.default_rng(0), cfg, tokenizer)


# --- files ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four training and two dev sentences in the official layout and in BLIP's."""
    folder = tmp_path_factory.mktemp("nlvr2")
    rows = {
        "train": [
            ("train-0-0-0", "The left ring is red.", "True"),
            ("train-0-0-1", "Two rings are blue.", "False"),
            ("train-0-1-0", "The left ring is red.", "False"),
            ("train-7-0-0", "A star.", "True"),
        ],
        "dev": [("dev-3-0-0", "A ring.", "True"), ("dev-3-1-0", "A ring.", "False")],
    }
    for split, lines in rows.items():
        official, blip = [], []
        for identifier, sentence, label in lines:
            pair = identifier.rsplit("-", 1)[0]
            root = "images/train/5" if split == "train" else split
            images = [f"{root}/{pair}-img{side}.png" for side in (0, 1)]
            for path in images:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(encode(noise(len(pair) + int(path[-5]))))
            official.append({"identifier": identifier, "sentence": sentence, "label": label, "directory": 5})
            blip.append({"images": images, "sentence": sentence, "label": label})
        (folder / f"{split}.json").write_text("\n".join(map(json.dumps, official)) + "\n")
        (folder / f"nlvr_{split}.json").write_text(json.dumps(blip))
    return folder


def opened(files, name):
    return open_source("s", config.source("nlvr", str(files / name), images=str(files)))


def test_both_layouts_give_the_same_pictures_sentences_and_groups(files):
    for split, n in (("train", 4), ("dev", 2)):
        official, ours = opened(files, f"{split}.json"), opened(files, f"nlvr_{split}.json")
        pairs = [(official[i], ours[i]) for i in range(n)]
        assert len(official) == len(ours) == n
        for a, b in pairs:
            assert [a[k] for k in ("images", "sentence", "label")] == [b[k] for k in ("images", "sentence", "label")]
            assert a["key"].endswith(f":{a['identifier']}") and a["identifier"].startswith(b["identifier"])
            assert a["key"].startswith(f"s:{split}.json#") and b["key"].startswith(f"s:nlvr_{split}.json#")
        groups = [[row["group"] for row in side] for side in zip(*pairs)]
        same = [[a == b for a in side for b in side] for side in groups]
        assert same[0] == same[1]  # who shares a sentence and a set with whom
    (files / "bad.json").write_text(
        '[{"images": ["a.png"], "sentence": "x", "label": "True"}, {"images": ["a", "b"], "label": "maybe"}]'
    )
    source = opened(files, "bad.json")
    for i in (0, 1):
        with pytest.raises(BadRecord, match="malformed row"):
            source[i]
    (files / "other.json").write_text('[{"question": 1}]')
    with pytest.raises(ValueError, match="neither NLVR2's official rows .* nor BLIP's"):
        opened(files, "other.json")


# --- runs -------------------------------------------------------------------------------------------------------------
def test_a_run_starts_from_pretraining_resumes_and_is_evaluated(tiny_cfg, files, tmp_path, capsys):
    cfg = tiny_cfg
    cfg.model.med.layers = 7
    pretrained = begun(cfg, tmp_path / "pretrained")
    before = dict(trees.paths(checkpoint.load_params(pretrained)))
    cfg.objective, cfg.train.init_from = "nlvr", str(pretrained)
    with cfg.data.unlocked():
        cfg.data.train = ConfigDict({"nlvr": config.source("nlvr", str(files / "train.json"), images=str(files))})
        cfg.data.eval = ConfigDict({"dev": config.source("nlvr", str(files / "nlvr_dev.json"), images=str(files))})
    cfg.data.epoch_examples = 16
    cfg.train.update(steps=2, log_every=1, save_every=1)
    out = loop.fit(cfg, tmp_path / "run")
    said = capsys.readouterr().out
    for part in (
        "have no origin in a checkpoint of pre-training and start random",
        "FLOPs: ",
        "nlvr: examples 2.00  accuracy ",
    ):
        assert part in said, part
    assert out["eval"]["examples"] == 2 and out["eval"]["consistency"] <= out["eval"]["accuracy"] <= 100
    after = dict(trees.paths(checkpoint.load_params(tmp_path / "run" / "checkpoints" / "1")))
    for path, x in after.items():
        if not re.fullmatch(nlvr.START.new, path):
            assert np.abs(x - before[nlvr.START.origin(path)]).max() < 0.01, path  # one step in the warm-up

    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "2")
    assert loop.fit(cfg, tmp_path / "cut")["step"] == 2
    assert leaves(tmp_path / "cut") == leaves(tmp_path / "run")

    result = evaluation.evaluate(cfg, tmp_path / "run")
    assert {k: v for k, v in result.items() if k != "predictions"} == out["eval"]
    assert json.loads((tmp_path / "run" / "predictions.json").read_text()) == result["predictions"]
    assert "nothing is written for a server" in capsys.readouterr().out  # BLIP's list has no identifiers
    assert not (tmp_path / "run" / "predictions.csv").exists()
    cfg.data.eval.dev.path = str(files / "dev.json")
    again = evaluation.evaluate(cfg, tmp_path / "run")
    told = dict(line.split(",") for line in (tmp_path / "run" / "predictions.csv").read_text().splitlines())
    wanted = [json.loads(line)["identifier"] for line in (files / "dev.json").read_text().splitlines()]
    assert list(told) == wanted and list(told.values()) == [str(row["label"]) for row in result["predictions"]]
    assert again["accuracy"] == result["accuracy"]
