"""Captioning, filter and vision tower beside transformers on tiny models: outputs agree, then all take turns."""

import functools
import json
import os
import re

import against
import jax
import numpy as np
import pytest

from blip_jax.bench import caption
from blip_jax.inference import programs
from blip_jax.models.text.cache import KeysAndValues

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[peers]'")
pytest.importorskip("transformers", reason="transformers is not installed; pip install -e '.[peers]'")
import against_transformers  # noqa: E402
import transformers_peer  # noqa: E402

THREADS = len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def ours():
    return caption.Ours("tiny", 16, "float32")


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(3).integers(0, 256, (2, 16, 16, 3), np.uint8)


@pytest.fixture
def one_torch_thread():
    """More would wait for those of the other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_captioners_agree_then_take_turns(tmp_path, capsys):
    out = tmp_path / "caption.json"
    flags = [
        "caption",
        "--size=tiny",
        "--img_size=16",
        "--dtype=float32",
        "--captions=1",
        "--batch=2",
        "--tokens=3",
        "--rounds=2",
        f"--threads={THREADS}",
        f"--out={out}",
    ]
    assert against.main(flags) == 0
    text, result = capsys.readouterr().out, json.loads(out.read_text())
    assert result["command"] == "python benchmarks/against.py " + " ".join(flags) and result["settings"]["tokens"] == 3
    assert (
        result["hardware"]["cores"] == os.cpu_count()
        and result["versions"]["jax"] == jax.__version__
        and result["revision"]
    )
    sides = ["ours", "transformers", "original"]
    (case,) = result["cases"]
    assert (case["img_size"], case["dtype"], case["captions"]) == (16, "float32", 1)
    assert list(case["seconds"]) == sides and all(len(t) == 2 and min(t) > 0 for t in case["seconds"].values())
    for side in sides:
        assert case["images_per_s"][side] == pytest.approx(2 / np.median(case["seconds"][side]))
    assert list(case["ours_over"]) == sides[1:]
    assert all(set(part) == {"vision", "image_kv", "token_loop"} for part in case["part_seconds"].values())
    assert re.search(rf"\| 16 \| float32 \| 1 \| {case['images_per_s']['ours']:.2f} \|", text)
    assert result["agreement"][0]["greedy_ids_equal"] and result["agreement"][0]["logit_difference"] < 1e-5


def test_the_originals_way_projects_within_the_loop_and_gives_the_same_captions(ours, pictures):
    method, keys = programs.Method(n=3, min_length=8, max_length=8), np.arange(4, dtype=np.uint32).reshape(2, 2)
    states = ours.vision(ours.weights, pictures)  # [2,5,48]
    as_kv = KeysAndValues(states[None, :, :, None], states[None, :, :, None])
    decode = jax.jit(
        programs.decoder(
            against_transformers.OriginalWay(ours.model), ours.prompt, method, eos=caption.EOS, pad=caption.PAD
        )
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


def test_a_peer_with_one_weight_changed_is_refused(ours, pictures):
    params = jax.tree.map(np.array, ours.params)
    make = lambda: transformers_peer.Peer(ours.config, params, "float32", eos=caption.EOS, pad=caption.PAD)
    assert against_transformers.same_captions(ours, make(), pictures, "float32")["greedy_ids_equal"]
    for leaf in ("vit/blocks/attn/v/kernel", "vit/cls", "med/blocks/cross_attn/k/kernel", "med/lm_head/ln/scale"):
        *parents, name = leaf.split("/")
        node = functools.reduce(dict.__getitem__, parents, params)
        kept, node[name] = node[name], node[name] * np.float32(1.1)
        with pytest.raises(ValueError, match="transformers with our weights is not our model: logits differ by"):
            against_transformers.same_captions(ours, make(), pictures, "float32")
        node[name] = kept


def measured(tmp_path, workload):
    """The case of one run of the command line."""
    out = tmp_path / "x.json"
    flags = [workload, "--size=tiny", "--img_size=16", "--dtype=float32", "--batch=2", "--rounds=2", f"--out={out}"]
    assert against.main(flags) == 0
    (case,) = json.loads(out.read_text())["cases"]
    return case


@pytest.mark.parametrize("workload, outputs", [("encode", {"states"}), ("filter", {"itm", "itc"})])
def test_outputs_are_the_peers_before_both_take_turns(tmp_path, capsys, one_torch_thread, workload, outputs):
    case = measured(tmp_path, workload)
    assert set(case["agreement"]) == outputs and all(x <= 1e-4 for x in case["agreement"].values())
    assert case["images"] == 2 and list(case["sides"]) == ["ours", "transformers"]
    ours, theirs = (np.array(case["sides"][s]["step_s"]["all"]) for s in case["sides"])
    assert case["ours_over"]["transformers"] == pytest.approx(np.median(theirs / ours))
    assert f"ours is {np.median(theirs / ours):.2f} times as fast as transformers" in capsys.readouterr().out


def test_a_peer_that_differs_is_refused():
    mine = {"itm": np.array([0.1, 0.9, 0.4], np.float32)}

    class Tensor:  # as torch's
        def __init__(self, x):
            self.x = np.array(x, np.float32)

        float = cpu = lambda self: self
        numpy = lambda self: self.x

    assert against_transformers.same_outputs(mine, {"itm": Tensor([0.1, 0.9, 0.4])}, "float32") == {"itm": 0.0}
    with pytest.raises(ValueError, match="is not our model: itm differs by"):
        against_transformers.same_outputs(mine, {"itm": Tensor([0.1, 0.9, 0.41])}, "float32")
