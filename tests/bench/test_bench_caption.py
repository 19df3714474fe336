"""The caption benchmark on a tiny model: its figures, the check that the peer is our model, the original's way of
decoding."""

import functools
import importlib.util
import json
import os
import re

import jax
import numpy as np
import pytest

from blip_jax.bench import caption, throughput
from blip_jax.cli import main
from blip_jax.inference import programs

PEER = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
needs_peer = pytest.mark.skipif(not PEER, reason="torch and transformers are not installed; pip install -e '.[peers]'")
THREADS = len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def ours():
    return caption.Ours("tiny", 16, "float32")


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(3).integers(0, 256, (2, 16, 16, 3), np.uint8)


def test_command_prints_tables_and_writes_figures_with_their_circumstances(tmp_path, capsys):
    out = tmp_path / "caption.json"
    flags = [
        "bench",
        "caption",
        "--size=tiny",
        "--img_size=16",
        "--dtype=float32",
        "--captions=1",
        "--batch=2",
        "--tokens=3",
        "--rounds=2",
        f"--threads={THREADS}",
        "--against=transformers",
        f"--out={out}",
    ]
    assert main.main(flags) == 0
    text, result = capsys.readouterr().out, json.loads(out.read_text())
    assert result["command"] == "blip-jax " + " ".join(flags) and result["settings"]["tokens"] == 3
    assert (
        result["hardware"]["cores"] == os.cpu_count()
        and result["versions"]["jax"] == jax.__version__
        and result["revision"]
    )
    sides = ["ours", "transformers", "original"] if PEER else ["ours", "original"]
    (case,) = result["cases"]
    assert (case["img_size"], case["dtype"], case["captions"]) == (16, "float32", 1)
    assert list(case["seconds"]) == sides and all(len(t) == 2 and min(t) > 0 for t in case["seconds"].values())
    for side in sides:
        assert case["images_per_s"][side] == pytest.approx(2 / np.median(case["seconds"][side]))
    assert list(case["ours_over"]) == sides[1:]
    assert all(set(part) == {"vision", "image_kv", "token_loop"} for part in case["part_seconds"].values())
    assert re.search(rf"\| 16 \| float32 \| 1 \| {case['images_per_s']['ours']:.2f} \|", text)
    if PEER:
        assert result["agreement"][0]["greedy_ids_equal"] and result["agreement"][0]["logit_difference"] < 1e-5
    else:
        assert "skipped: the comparison with transformers" in text and result["peer"] is None


def test_without_the_peer_it_says_so_and_goes_on(monkeypatch):
    said = []
    monkeypatch.setattr(throughput.importlib.util, "find_spec", lambda name: None)
    assert caption._peer(caption.Settings(against="transformers"), said.append) is None
    assert said == [
        "skipped: the comparison with transformers, not installed: torch, transformers; pip install -e '.[peers]'"
    ]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--threads=1000"], "cores; give 1 to"),
        (["--img_size=17"], "multiple of the patch of 8 pixels"),
        (["--out=/nowhere/x.json"], "no such folder"),
    ],
)
def test_wrong_flags_are_one_line_before_anything_is_measured(flags, message, capsys):
    assert main.main(["bench", "caption", "--size=tiny", f"--threads={THREADS}", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_the_originals_way_projects_within_the_loop_and_gives_the_same_captions(ours, pictures):
    method, keys = programs.Method(n=3, min_length=8, max_length=8), np.arange(4, dtype=np.uint32).reshape(2, 2)
    states = ours.vision(ours.weights, pictures)  # [2,5,48]
    as_kv = ((states[:, :, None], states[:, :, None]),)
    decode = jax.jit(
        programs.decoder(caption.OriginalWay(ours.model), ours.prompt, method, eos=caption.EOS, pad=caption.PAD)
    )
    compiled = decode.lower(ours.weights, as_kv, keys).compile()
    text = compiled.as_text()
    names = set(re.findall(r"body=%([\w.]+)", text))
    bodies = [re.search(rf"^%{re.escape(name)} .*?^}}", text, re.M | re.S)[0] for name in names]
    projections = [body.count(" = f32[30,32]") for body in bodies]  # 2 pictures x 3 captions x 5 positions
    assert max(projections) >= 4  # keys and values of two layers, for every token: XLA has not moved them out

    mine = ours.loop(method)(ours.weights, ours.image_kv(ours.weights, states), keys)
    theirs = compiled(ours.weights, as_kv, keys)
    assert len({tuple(row) for row in np.asarray(mine["ids"]).reshape(6, 8)}) == 6
    np.testing.assert_array_equal(mine["ids"], theirs["ids"])
    np.testing.assert_allclose(mine["log_prob"], theirs["log_prob"], rtol=1e-5)


@needs_peer
def test_a_peer_with_one_weight_changed_is_refused(ours, pictures):
    from blip_jax.bench.transformers_peer import Peer

    params = jax.tree.map(np.array, ours.params)
    make = lambda: Peer(ours.config, params, "float32", eos=caption.EOS, pad=caption.PAD)
    assert caption.agreement(ours, make(), pictures, "float32")["greedy_ids_equal"]
    for leaf in ("vit/blocks/attn/v/kernel", "vit/cls", "med/layer_01/cross_attn/k/kernel", "med/lm_head/ln/scale"):
        *parents, name = leaf.split("/")
        node = functools.reduce(dict.__getitem__, parents, params)
        kept, node[name] = node[name], node[name] * np.float32(1.1)
        with pytest.raises(ValueError, match="transformers with our weights is not our model: logits differ by"):
            caption.agreement(ours, make(), pictures, "float32")
        node[name] = kept
