"""What a run says when it starts and ends: less than a screen, with all of it in a file."""

import json
import re

import jax
import pytest

from blip_jax.config import source
from blip_jax.console import plain
from blip_jax.train import loop, summary

SCREEN = 24  # lines of a terminal


def test_the_start_is_less_than_a_screen_and_the_tables_are_in_a_file(tiny_cfg, tmp_path, capsys):
    run = loop.prepare(tiny_cfg.lock(), tmp_path / "run")
    with jax.set_mesh(run.mesh):
        summary.describe(run, None)
        said = capsys.readouterr().out
        summary.describe(run, tiny_cfg.train.steps)
    assert said.count("\n") <= SCREEN // 2 and "start.txt" in said and "new run; outputs in" in said
    assert re.search(r"^attention of a picture's \d+ positions: plain$", said, re.M)
    assert re.search(r"^parameters: total ([\d,]+): \1 trained, 0 frozen$", said, re.M)
    assert f"the first step compiles, which takes a while; then a line every {tiny_cfg.train.log_every} steps" in said
    assert "the first step compiles" not in capsys.readouterr().out  # nothing is left to do

    whole = (tmp_path / "run" / "start.txt").read_text()
    for text in ("| trained/vit/patch_embed/kernel ", '"log_every"', "kept whole on every device"):
        assert text in whole and text not in said.replace("% of the bytes are kept whole on every device", "")
    words = run.cfg.model.med.vocab_size
    assert re.search(rf"\| trained/med/\S*word\S* +\| \({words}, {run.cfg.model.med.width}\) ", whole)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == plain(tiny_cfg)


def test_all_files_that_are_missing_are_named_at_once(tiny_cfg, tmp_path):
    with tiny_cfg.data.unlocked():
        tiny_cfg.data.train.a = source("json", "nowhere/a.json")
        tiny_cfg.data.train.b = source("tar", "nowhere/*.tar")
        tiny_cfg.data.eval.c = source("array_record", "nowhere/c.array_record")
        tiny_cfg.data.eval.d = source("csv", "nowhere/d.csv")
    tiny_cfg.text.vocab = "nowhere/vocab.txt"
    with pytest.raises(ValueError) as error:
        loop.prepare(tiny_cfg, tmp_path / "run")
    head, *lines = str(error.value).splitlines()
    assert head == "5 things that the config names cannot be had:"
    for line, name in zip(lines, ("nowhere/vocab.txt", "'a'", "'b'", "'c'", "'d'"), strict=True):
        assert name in line
    assert not (tmp_path / "run").exists()


def test_the_end_is_in_words():
    counts = {"read": 480, "skipped": {"not a picture": 2, "empty caption": 3}, "noted": {}}
    assert summary.ending(True, 15, 60, 15, "runs/x/checkpoints", counts) == (
        "stopped by a signal at step 15 of 60; checkpoint 15 in runs/x/checkpoints; 480 records read, 5 skipped: "
        "empty caption 3, not a picture 2; the same command goes on from there"
    )
    whole = summary.ending(False, 60, 60, 60, "runs/x/checkpoints", counts | {"skipped": {}})
    assert whole == "done at step 60 of 60; checkpoint 60 in runs/x/checkpoints; 480 records read, 0 skipped"
