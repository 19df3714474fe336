"""The demo from end to end, with models too small and too little trained to find anything.

Stages, report, going on, stopping.
"""

import json

import jax
import numpy as np
import pytest

from blip_jax.capfilt import decisions
from blip_jax.config import source
from blip_jax.demo import results as demo_results
from blip_jax.demo import stages


@pytest.fixture
def demo_cfg(tiny_cfg):
    c = tiny_cfg
    with c.unlocked():
        del c.data.train["world"]
        c.data.train.human = source("scenes", count=16, captions=2, seed=2, size=32, weight=16.0)
        c.data.train.web = source("scenes", count=48, seed=3, size=32, noise=0.6, weight=48.0)
        c.data.eval.scenes = source("scenes", count=8, seed=1, size=32)
    c.loss.momentum, c.loss.queue = False, 0
    c.train.steps = c.train.log_every = c.train.save_every = 2
    c.eval.k, c.eval.batch, c.eval.rerank_texts = 8, 8, 8
    return c.lock()


def test_demo_makes_its_corpora_and_reports(demo_cfg, tmp_path, monkeypatch, capsys):
    kept = {}

    def everything(run, threshold, out, refilter=stages.refilter):
        kept["threshold"] = threshold
        return refilter(run, threshold, out)

    monkeypatch.setattr(stages, "refilter", everything)
    monkeypatch.setattr(stages, "capfilt", keeping_most(tmp_path / "probe"))
    out = stages.run(demo_cfg, tmp_path)
    assert not out["stopped"] and kept["threshold"] == 0
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(r["captioner"], r["filter"]): r for r in results["table1"]}
    assert set(rows) == {(a, b) for a in (False, True) for b in (False, True)}
    assert rows[False, True]["texts"] < rows[False, False]["texts"] < rows[True, False]["texts"]
    assert rows[True, True]["texts"] < rows[True, False]["texts"]
    assert all(0 <= r["noise"] <= 1 and 0 <= r["metrics"]["r_mean"] <= 100 for r in results["table1"])
    for name, web, synthetic in (
        ("neither", "scenes", ""),
        ("filter", "array_record", ""),
        ("both", "array_record", "capfilt/"),
        ("captioner", "scenes", "capfilt-unfiltered/"),
        ("both-beam", "array_record", "capfilt-beam/"),
    ):
        train = json.loads((tmp_path / f"pretrain-{name}" / "config.json").read_text())["data"]["train"]
        assert train["web"]["kind"] == web and train["human"]["weight"] == 16
        assert ("synthetic" in train) == bool(synthetic) and synthetic in train.get("synthetic", {"path": ""})["path"]
    summary = json.loads((tmp_path / "capfilt" / "summary.json").read_text())
    weights = json.loads((tmp_path / "pretrain-both" / "config.json").read_text())["data"]["train"]
    assert (weights["web"]["weight"], weights["synthetic"]["weight"]) == (
        summary["web"]["kept"],
        summary["synthetic"]["kept"],
    )
    page = (tmp_path / "report.html").read_text()
    assert results["title"] in page and "http" not in page.replace("http://www.w3.org", "")
    capsys.readouterr()

    assert demo_results.table(results).count("yes") == 4
    with pytest.MonkeyPatch.context() as m:  # a second start trains and captions nothing
        m.setattr(
            "blip_jax.tasks.step.make_step", lambda *_: lambda *_: pytest.fail("a finished stage was trained again")
        )
        again = stages.run(demo_cfg, tmp_path)
    assert [r["metrics"] for r in again["results"]["table1"]] == [r["metrics"] for r in results["table1"]]


def keeping_most(probe, capfilt=stages.capfilt):
    """CapFilt in small shards, with a threshold that a fifth of the web texts do not reach.

    An untrained filter gives all nearly the same score, and each corpus shall hold something else.
    """
    thresholds = []

    def run(cfg, out):
        cfg = cfg.copy_and_resolve_references().unlock()
        cfg.shard_examples, cfg.device_batch, cfg.method.max_length = 20, 1, 10
        if not thresholds:
            capfilt(cfg, probe)
            rows = [row for table in probe.glob("shards/*/decisions.parquet") for row in decisions.rows_of(table)]
            thresholds.append(
                float(np.quantile([row.itm for row in rows if row.source == "web" and row.itm is not None], 0.2))
            )
        cfg.threshold = thresholds[0]
        return capfilt(cfg.lock(), out)

    return run


def test_a_stopped_stage_ends_the_demo(demo_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(stages.loop, "fit", lambda cfg, workdir: {"step": 1, "stopped": True})
    assert stages.run(demo_cfg, tmp_path) == {"stopped": True}
    assert not (tmp_path / "report.html").exists()
    assert jax.config.jax_compilation_cache_dir
