"""The training benchmark on tiny models, through the command line.

Its figures, the peer's check, real input, wrong flags.
"""

import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest

from blip_jax.bench import throughput, train
from blip_jax.cli import main
from blip_jax.models import flops
from blip_jax.plan import chips


def bench(tmp_path, *flags):
    out = tmp_path / "train.json"
    argv = ["bench", "train", *flags, f"--out={out}"]
    assert main.main(argv) == 0
    result = json.loads(out.read_text())
    assert (
        result["command"] == "blip-jax " + " ".join(argv)
        and result["versions"]["jax"] == jax.__version__
        and result["revision"]
    )
    assert result["hardware"]["devices"] == 8 and result["hardware"]["cores"] == os.cpu_count()
    (case,) = result["cases"]
    assert case["memory"]["bytes"] > case["state_bytes"] > 0
    return case


def rates_hold(found, batch):
    """The figures of one side follow from its seconds."""
    seconds = found["step_s"]["all"]
    assert min(seconds) > 0 and found["step_s"]["p50"] == pytest.approx(np.median(seconds))
    assert found["step_s"]["p50"] <= found["step_s"]["p95"] <= max(seconds)
    assert found["images_per_s"] == pytest.approx(batch * len(seconds) / sum(seconds))
    assert (
        found["gflop_per_s"] == pytest.approx(found["images_per_s"] * found["gflop_per_image"]) and found["mfu"] is None
    )


def config_file(tmp_path, cfg):
    (tmp_path / "c.json").write_text(cfg.to_json())
    (tmp_path / "c.py").write_text(
        "import json, pathlib\nfrom ml_collections import ConfigDict\n\ndef get_config():\n"
        "    return ConfigDict(json.loads(pathlib.Path(__file__).with_name('c.json').read_text())).lock()\n"
    )
    return f"--config={tmp_path / 'c.py'}"


def test_real_input_on_all_devices_with_a_profile(tmp_path, tiny_cfg, capsys):
    profile = tmp_path / "profile"
    case = bench(
        tmp_path,
        config_file(tmp_path, tiny_cfg),
        "--config.mesh.fsdp=2",
        "--input=real",
        "--steps=4",
        f"--trace={profile}",
    )
    assert case["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1} and case["batch"] == 16 and 0 <= case["waiting"] <= 1
    ((T, found),) = case["texts"].items()
    assert T == "12" and found["share"] == 1 and len(found["step_s"]["all"]) == 4
    rates_hold(found, 16)
    assert case["images_per_s"] == pytest.approx(found["images_per_s"])
    assert case["images_per_s_per_device"] == pytest.approx(found["images_per_s"] / 8)
    assert found["gflop_per_image"] == pytest.approx(flops.pretrain_step(tiny_cfg)["step"] / 1e9)
    assert re.search(r"waiting for data [\d.]+ % of the time", capsys.readouterr().out)
    (written,) = profile.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(written)).planes
    assert sum(
        1
        for plane in planes
        for line in plane.lines
        for event in line.events
        if "PjitFunction" in event.name or "dot" in event.name
    )


def test_mfu_is_the_share_of_the_devices_peak(monkeypatch):
    monkeypatch.setattr(chips, "peak_flops", lambda kind: 2e12)
    found = throughput.figures([0.5, 1.5], images=10, image_flops=1e11, devices=4)
    assert found["images_per_s"] == 10 and found["mfu"] == pytest.approx(10 * 1e11 / (4 * 2e12))
    assert throughput.words(found) == "10 images/s, 2.5 per device, MFU 12.5 %; step p50 1 s, p95 1.45 s of 2"


def test_a_cpu_is_told_how_its_allocator_keeps_memory_until_it_does(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    assert all(setting in throughput.memory_note() for setting in throughput.KEEPS_FREED.split())
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert not throughput.memory_note()
    monkeypatch.delenv("MALLOC_MMAP_MAX_")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert not throughput.memory_note()


def test_shares_of_text_lengths_are_those_of_windows():
    cfg = train.sized("base", "pretrain", 224, "float32", 8, (12, 16, 20, 30))
    shares = train.shares(cfg)
    assert (
        sum(shares.values()) == pytest.approx(1) and set(shares) == {12, 16, 20, 30} and shares[12] > 0.4 > shares[30]
    )
    mean = sum(part * train.step_flops(cfg, T) for T, part in shares.items())
    assert mean <= 0.72 * flops.pretrain_step(cfg, original=True)["step"]
    for T in shares:
        batch = train.random_batch(cfg, T)
        assert (
            batch["ids"].shape == (8, T)
            and batch["txt_mask"].sum(1).max() <= T
            and np.array_equal(batch["ids"] > 0, batch["txt_mask"])
        )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--objective=chat"], "should be one of"),
        (["--size=tiny", "--img_size=17"], "multiple of model.vit.patch"),
        (["--size=tiny", "--img_size=16", "--buckets=12,x"], "--buckets holds 'x'"),
        (["--size=tiny", "--img_size=16", "--batch=7"], "must be a multiple of 8"),
        (["--input=real"], "needs --config"),
        (["--config=configs/scenes.py", "--batch=8"], "--batch and --config"),
        (["--size=tiny", "--img_size=16", "--out=/nowhere/x.json"], "no such folder"),
        (["--threads=1000"], "cores; give 1 to"),
        (["--against=torch"], "Unknown command line flag 'against'"),
    ],
)
def test_wrong_flags_are_one_message_before_anything_is_measured(flags, message, capsys, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])
    assert main.main(["bench", "train", *flags]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_workload_names_the_known_ones(capsys):
    assert main.main(["bench", "sleep"]) == 2
    assert (
        "blip-jax bench measures train, caption, filter, encode, rank, dialog, input, not 'sleep'"
        in capsys.readouterr().err
    )
