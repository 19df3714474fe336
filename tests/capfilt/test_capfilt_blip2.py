"""CapFilt with BLIP-2: a language model captions, a first stage filters. As the verbs do, and the same bytes again."""

import jax
import numpy as np
import pytest
from world.bucket import tree
from world.capfilt import settings
from world.capfilt_blip2 import save_blip2

import blip_jax
from blip_jax.capfilt import decisions
from blip_jax.capfilt.run import run
from blip_jax.data.formats import open_source
from blip_jax.data.text.clean import clean_caption


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_vocab):
    return save_blip2(tmp_path_factory.mktemp("models"), tiny_vocab, "opt", "flant5", "stage1")


@pytest.fixture
def cfg_of(models, tmp_path):
    def make(captioner, scenes=5):
        c = settings({"captioner": models[captioner], "filter": models["stage1"]}, tmp_path, scenes)
        c.method.max_length, c.text.prompt = 6, "a picture of "
        return c

    return make


@pytest.fixture
def devices(monkeypatch):
    all_of_them = jax.devices()
    return lambda count: monkeypatch.setattr(jax, "local_devices", lambda: all_of_them[:count])


def rows_of(out) -> list[decisions.Row]:
    return [row for p in sorted((out / "shards").iterdir()) for row in decisions.rows_of(p / "decisions.parquet")]


@pytest.mark.parametrize("kind", ["opt", "flant5"])
def test_captions_and_scores_are_those_of_the_verbs(kind, cfg_of, models, devices, tmp_path):
    devices(1)
    cfg = cfg_of(kind)
    cfg.method.kind, cfg.method.beams, cfg.method.repetition_penalty, cfg.method.min_length = "beam", 2, 1.0, 2
    del cfg.data.sources.unlock()["web"]
    run(cfg, tmp_path / "out")
    captioner, judge = (blip_jax.from_pretrained(models[name]) for name in (kind, "stage1"))
    source, rows = open_source("world", cfg.data.sources.world), rows_of(tmp_path / "out")
    pictures = [source[i]["image"] for i in range(5)]
    how = dict(beams=2, min_length=2, max_length=6, prompt="a picture of")
    for number, own in enumerate(captioner.caption(pictures, 2, **how)):
        made = [row for row in rows if row.record == number and row.source == "synthetic"]
        assert [row.text for row in made] == [clean_caption(told["caption"], 30) for told in own]
        np.testing.assert_allclose([row.log_prob for row in made], [told["log_prob"] for told in own], rtol=1e-4)
    scored = [row for row in rows if row.itm is not None]
    found = judge.match([pictures[row.record] for row in scored], [row.text for row in scored])
    np.testing.assert_allclose([row.itm for row in scored], found["probability"], atol=1e-5)
    np.testing.assert_allclose([row.itc for row in scored], found["cosine"], atol=1e-5)
    assert {row.source for row in scored} == {"web", "synthetic"} and len({round(row.itm, 5) for row in scored}) > 5


def test_the_same_bytes_on_other_devices_and_by_other_processes(cfg_of, devices, tmp_path):
    cfg = cfg_of("opt")
    cfg.threshold = 0.7
    devices(8)
    summary = run(cfg, tmp_path / "whole")
    rows = rows_of(tmp_path / "whole")
    assert summary["images"] == 16 and summary["unreadable"] == {"truncated picture": 1}
    assert summary["synthetic"]["texts"] == 32 == sum(row.source == "synthetic" for row in rows)
    assert {row.reason for row in rows if row.source == "web"} >= {"matched", "below threshold"}
    devices(1)
    assert run(cfg, tmp_path / "again", 1, 2) == {"stopped": False, "finished": 1, "shards": 3}
    assert run(cfg, tmp_path / "again") == summary
    whole, again = tree(tmp_path / "whole"), tree(tmp_path / "again")
    assert {k: v for k, v in whole.items() if k[:7] != "skipped"} == {
        k: v for k, v in again.items() if k[:7] != "skipped"
    }
    cfg.text.prompt = "a photo of"
    with pytest.raises(ValueError, match=r"other settings:\n  settings.text.prompt: 'a picture of ' there"):
        run(cfg, tmp_path / "whole")


def test_a_first_stage_captions_too(cfg_of, devices, tmp_path):
    devices(1)
    cfg = cfg_of("stage1", scenes=3)
    cfg.method.max_length, cfg.method.min_length = 12, 8  # the prompt counts
    del cfg.data.sources.unlock()["web"]
    summary = run(cfg, tmp_path / "out")
    assert summary["images"] == 3 and summary["synthetic"]["texts"] == 6
    assert all(np.isfinite(row.log_prob) for row in rows_of(tmp_path / "out") if row.source == "synthetic")


def test_what_does_not_fit_is_said_before_anything_is_written(cfg_of, models, tmp_path):
    cfg = cfg_of("opt")
    cfg.filter = str(models["opt"])
    with pytest.raises(ValueError, match=r"filter is .*opt.* cannot do match: it has no text encoder.*; give a"):
        run(cfg, tmp_path / "out")
    cfg = cfg_of("opt")
    cfg.text.prompt = "a picture " * 90
    with pytest.raises(ValueError, match=r"(?s)text.prompt='a picture.*at most \d+ are read, so that 6 new ones"):
        run(cfg, tmp_path / "out")
    cfg = cfg_of("opt")
    cfg.text.captioner_vocab = str(models["stage1"] / "vocab.txt")
    with pytest.raises(ValueError, match="vocab.txt is BERT's WordPiece, but .* has a language model OPT"):
        run(cfg, tmp_path / "out")
    assert not (tmp_path / "out").exists()
