"""The benchmarks of BLIP-2's two stages on tiny models, through the command line."""

import json
import os

import pytest

from blip_jax import config
from blip_jax.bench import caption, train
from blip_jax.cli import main
from blip_jax.models import flops

THREADS = len(os.sched_getaffinity(0))


def bench(tmp_path, what, model, *flags):
    out = tmp_path / "out.json"
    argv = ["bench", what, f"--model={model}", "--img_size=16", "--dtype=float32", *flags, f"--out={out}"]
    assert main.main(argv) == 0
    (case,) = json.loads(out.read_text())["cases"]
    return case


@pytest.mark.parametrize("model", ["blip2_stage1_tiny", "blip2_flant5_tiny"])
def test_the_step_of_a_stage_is_timed_and_its_frozen_parts_are_said(model, tmp_path, capsys):
    case = bench(tmp_path, "train", model, "--batch=8", "--steps=1")
    assert case["objective"] == ("blip2_stage1" if "stage1" in model else "blip2_stage2") and case["batch"] == 8
    ((_, found),) = case["texts"].items()
    cfg = train.sized("base", "pretrain", 16, "float32", 8, model=model)
    assert found["gflop_per_image"] == pytest.approx(train.step_flops(cfg, cfg.text.max_len) / 1e9)
    assert found["step_s"]["p50"] > 0 and case["images_per_s"] > 0
    text = capsys.readouterr().out
    assert "of them frozen" in text and ("T5 of 2 layers and width 32" in text) == ("flant5" in model)


@pytest.mark.parametrize("model", ["blip2_stage1_tiny", "blip2_opt_tiny"])
def test_texts_of_a_stage_are_timed(model, tmp_path, capsys):
    few = ("--captions=2", "--batch=2", "--tokens=3", "--rounds=1", f"--threads={THREADS}")
    case = bench(tmp_path, "caption", model, *few)
    sizes = config.blip2(*config.BLIP2_MODELS[model]).model.unlock()
    sizes.img_size, prompt = 16, 1 if "stage1" in model else 4
    count = flops.blip2_caption_image(sizes, prompt, 3, 2) / 1e9
    assert case["ours"]["gflop_per_image"] == pytest.approx(count) and case["images_per_s"]["ours"] > 0
    assert set(case["part_seconds"]["ours"]) == {"vision", "image_kv", "token_loop"}
    assert "| 16 | float32 | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "what, flags, message",
    [
        ("train", ["--model=blip3"], "should be one of"),
        ("train", ["--model=blip2_opt_tiny", "--size=tiny"], "--size and --model=blip2_opt_tiny"),
        ("train", ["--model=blip2_opt_tiny", "--objective=vqa"], "--objective and --model=blip2_opt_tiny"),
        ("train", ["--objective=blip2_stage2"], "which BLIP-2? give --model=blip2_stage1"),
        ("train", ["--model=blip2_opt_tiny", "--img_size=17"], "multiple of model.vit.patch"),
        ("caption", ["--model=blip2_opt_tiny", "--img_size=17"], "multiple of the patch of 8 pixels"),
        ("caption", ["--model=blip2_opt_tiny", "--size=tiny"], "--size and --model=blip2_opt_tiny"),
        ("filter", ["--model=blip2_opt_tiny"], "Unknown command line flag 'model'"),
    ],
)
def test_wrong_flags_are_said_before_anything_is_measured(what, flags, message, capsys):
    assert main.main(["bench", what, *flags, *([f"--threads={THREADS}"] if what == "caption" else [])]) == 2
    assert message in capsys.readouterr().err


def test_every_model_has_the_image_sizes_of_its_tower():
    for tower, qformer, llm in config.BLIP2_MODELS.values():
        assert not [s for s in caption.BLIP2_IMG_SIZES if s % config.TOWER_SIZES[tower]["patch"]] or "tiny" in tower
        assert config.blip2(tower, qformer, llm).objective == ("blip2_stage2" if llm else "blip2_stage1")
