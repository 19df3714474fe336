"""The caption benchmark on a tiny model: its figures, and what it refuses."""

import json
import os
import re

import jax
import numpy as np
import pytest

from blip_jax.cli import main

THREADS = len(os.sched_getaffinity(0))


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
    (case,) = result["cases"]
    assert (case["img_size"], case["dtype"], case["captions"]) == (16, "float32", 1)
    assert list(case["seconds"]) == ["ours"] and len(case["seconds"]["ours"]) == 2 and min(case["seconds"]["ours"]) > 0
    assert (
        case["images_per_s"]["ours"] == pytest.approx(2 / np.median(case["seconds"]["ours"])) and not case["ours_over"]
    )
    assert all(set(part) == {"vision", "image_kv", "token_loop"} for part in case["part_seconds"].values())
    assert re.search(rf"\| 16 \| float32 \| 1 \| {case['images_per_s']['ours']:.2f} \|", text)
    assert not result["agreement"]


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
