"""The training step beside PyTorch's on tiny models, through the command line: both sides agree, then take turns."""

import json

import against
import jax
import numpy as np
import pytest

from blip_jax.bench import train
from blip_jax.convert.apply import to_torch
from blip_jax.parallel import sharding

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[peers]'")
import against_torch  # noqa: E402
import torch_step  # noqa: E402


def measured(tmp_path, *flags):
    """The case of one run of the command line."""
    out = tmp_path / "train.json"
    argv = ["train", *flags, f"--out={out}"]
    assert against.main(argv) == 0
    result = json.loads(out.read_text())
    assert result["command"] == "python benchmarks/against.py " + " ".join(argv)
    (case,) = result["cases"]
    return case


def config_file(tmp_path, cfg):
    (tmp_path / "c.json").write_text(cfg.to_json())
    (tmp_path / "c.py").write_text(
        "import json, pathlib\nfrom ml_collections import ConfigDict\n\ndef get_config():\n"
        "    return ConfigDict(json.loads(pathlib.Path(__file__).with_name('c.json').read_text())).lock()\n"
    )
    return f"--config={tmp_path / 'c.py'}"


def test_both_sides_agree_then_take_turns_with_and_without_buckets(tmp_path, tiny_cfg, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its threads would wait for those of the other tests
    try:
        with tiny_cfg.unlocked():
            tiny_cfg.text.buckets = (11, 12)
        case = measured(tmp_path, config_file(tmp_path, tiny_cfg), "--rounds=2")
    finally:
        torch.set_num_threads(threads)
    assert case["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1} and list(case["sides"]) == [
        "torch",
        "ours",
        "ours with buckets",
    ]
    for found in case["sides"].values():
        assert len(found["step_s"]["all"]) == 2
        seconds = found["step_s"]["all"]
        assert found["images_per_s"] == pytest.approx(16 * len(seconds) / sum(seconds))
    agreement = case["agreement"]
    for positions in (11, 12):
        for name, x in agreement["torch"].items():
            assert abs(agreement[f"ours, {positions} positions"][name] - x) <= 1e-4 and x > 0.1
    texts = {int(T): found for T, found in case["texts"].items()}
    assert set(texts) == {11, 12} and sum(t["share"] for t in texts.values()) == pytest.approx(1)
    for found in texts.values():
        assert (
            found["traced_gflop_per_image"] == pytest.approx(found["gflop_per_image"], rel=0.05)
            and found["compile_s"] > 0
        )
    mixed = [sum(t["share"] * t["step_s"]["all"][i] for t in texts.values()) for i in range(2)]
    assert case["sides"]["ours with buckets"]["step_s"]["all"] == pytest.approx(mixed)
    over = np.median(np.divide(case["sides"]["torch"]["step_s"]["all"], mixed))
    assert case["ours_over"]["ours with buckets"] == pytest.approx(over)
    assert f"{over:.2f} times as fast as torch" in capsys.readouterr().out


def test_a_peer_whose_loss_differs_is_refused(monkeypatch):
    cfg = train.sized("tiny", "pretrain", 16, "float32", 4)
    with cfg.unlocked():
        cfg.loss.queue = 8
    program = train.Program(cfg, sharding.make_mesh(cfg.mesh, jax.devices()[:1]))
    state = jax.tree.map(np.asarray, {"params": program.state.params, "momentum": program.state.extra})
    peer = torch_step.Step(cfg, to_torch("pretrain", state, vocab_size=cfg.model.med.vocab_size))
    batch = train.random_batch(cfg, 30)
    losses = peer.evaluate(peer.batch(batch["img"], batch["ids"], batch["txt_mask"]), cfg.loss.alpha)
    monkeypatch.setattr(against_torch.jax, "jit", lambda f: lambda state, batch: losses)
    assert against_torch.agree(program, peer, [30], print)["torch"] == losses
    changed = losses | {"loss_itm": losses["loss_itm"] + 2e-4}
    monkeypatch.setattr(against_torch.jax, "jit", lambda f: lambda state, batch: changed)
    with pytest.raises(ValueError, match="is not our step: loss_itm is .* times would not be comparable"):
        against_torch.agree(program, peer, [30], print)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["train", "--size=tiny", "--img_size=16", "--objective=caption"],
            "objective is 'caption', must be 'pretrain'",
        ),
        (["input"], "there are peers of train, caption, filter, encode, not of 'input'"),
        (["train", "again"], "unexpected argument 'again'"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    assert against.main(flags) == 2
    assert message in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setattr(against.importlib.util, "find_spec", lambda name: None)
    assert against.main(["caption"]) == 2
    assert capsys.readouterr().err == "error: caption needs torch and transformers: pip install -e '.[peers]'\n"
