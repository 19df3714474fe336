"""The demo from end to end, with models too small and too little trained to find anything.

Stages, report, going on, stopping.
"""

import contextlib
import json
import re

import jax
import numpy as np
import pytest

from blip_jax.capfilt import decisions
from blip_jax.config import source
from blip_jax.demo import relations, stages
from blip_jax.demo import results as demo_results
from blip_jax.demo.clock import Clock, Stage, Stopped
from blip_jax.demo.report import paper
from blip_jax.tasks import two_stage


@pytest.fixture
def demo_cfg(tiny_cfg):
    c = tiny_cfg
    with c.unlocked():
        del c.data.train["world"]
        c.data.train.human = source("scenes", count=16, captions=2, seed=2, size=32, weight=16.0)
        c.data.train.web = source("scenes", count=48, seed=3, size=32, noise=0.6, weight=48.0)
        c.data.eval.scenes = source("scenes", count=8, seed=1, size=32)
    c.loss.momentum, c.loss.queue = False, 0
    c.model.dropout = c.model.drop_path = 0.0  # a quarter less to compile
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
    # every run has its own curve, also those of one name
    assert list(results["curves"]) == [
        *(f"pre-training: {name}" for name in ("neither", "filter", "captioner", "both", "both-beam")),
        "fine-tuning: captioner",
        "fine-tuning: filter",
    ]
    last = json.loads((tmp_path / "pretrain-filter" / "metrics.jsonl").read_text().splitlines()[0])
    assert results["curves"]["pre-training: filter"]["loss_lm"] == [[2, last["train/loss_lm"]]]
    assert "loss_lm" not in results["curves"]["fine-tuning: filter"]
    # each relation of the paper's tables, with differences of the models' mean recalls
    pairs = [(r["table"], r["larger"], r["smaller"], r["what"]) for r in results["relations"]]
    assert len(pairs) == len(set(pairs)) == 6 + 3 and (1, "captioner only", "filter only", relations.RECALL) in pairs
    recall = {name: rows[key]["metrics"]["r_mean"] for key, name in paper.NAMES.items()}
    for r in results["relations"][:6]:
        assert r["difference"] == pytest.approx(recall[r["larger"]] - recall[r["smaller"]]) and r["error"] >= 0
    page = (tmp_path / "report.html").read_text()
    assert results["title"] in page and "http" not in page.replace("http://www.w3.org", "")
    said = capsys.readouterr().out
    stages_said = re.findall(r"^== stage (\d+) of (\d+): (.*?); (.*)$", said, re.M)
    assert [int(n) for n, *_ in stages_said] == list(range(1, 12)) and {of for _, of, *_ in stages_said} == {"11"}
    assert stages_said[0][3] == "about 1 min left, if 2 CPU cores are idle" and stages_said[-1][2] == "report"
    assert all(re.fullmatch(r"about \d+ min left", left) for *_, left in stages_said[1:])

    assert demo_results.table(results).count("yes") == 4
    assert demo_results.table(results).count("the paper has ") == 9
    with pytest.MonkeyPatch.context() as m:  # a second start trains and captions nothing
        m.setattr(stages.loop, "to_devices", lambda *_: pytest.fail("a finished stage was trained again"))
        m.setattr(two_stage, "two_stage_scores", lambda *_: pytest.fail("a model was evaluated again"))
        again = stages.run(demo_cfg, tmp_path)
    assert again["results"]["phases"] == [tuple(phase) for phase in results["phases"]]  # the time is not added to
    assert again["results"]["relations"] == results["relations"]
    assert capsys.readouterr().out.count("; done before") == 11
    assert [r["metrics"] for r in again["results"]["table1"]] == [r["metrics"] for r in results["table1"]]

    # without three of the corpora: nothing is asked of what they alone need, and it says what is left out
    (tmp_path / "pretrain-captioner").rename(tmp_path / "elsewhere")
    (tmp_path / "capfilt-beam").rename(tmp_path / "elsewhere-beam")
    short = stages.run(demo_cfg, tmp_path, quick=True)["results"]
    assert short["table1"] == [again["results"]["table1"][i] for i in (0, 3)] and not short["table2"]
    assert [(r["larger"], r["smaller"]) for r in short["relations"]] == [("both", "neither")]
    said = capsys.readouterr().out
    assert "left out: filter, captioner, both-beam" in said and said.count("; done before") == 6
    page = (tmp_path / "report.html").read_text()
    assert "Nucleus sampling" not in page and "Left out here: filter, captioner, both-beam." in page
    assert dict(short["facts"])["command"].startswith("blip-jax demo --quick --workdir=")


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
    assert not any(kept["done"] for kept in json.loads((tmp_path / "stages.json").read_text()).values())
    assert jax.config.jax_compilation_cache_dir


def test_the_clock_learns_from_what_is_done_and_counts_each_stage_once(tmp_path, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("blip_jax.demo.clock.time.perf_counter", lambda: now[0])
    plan = [Stage(name, cost, lambda: None) for name, cost in (("a", 60.0), ("b", 30.0), ("c", 90.0))]

    def passes(clock, stage, seconds, fails=False):
        with contextlib.suppress(Stopped), clock.running(stage):
            now[0] += seconds
            if fails:
                raise Stopped

    clock = Clock(tmp_path / "stages.json", plan)
    assert clock.left() == (180.0, False)
    passes(clock, plan[0], 50, fails=True)
    clock = Clock(tmp_path / "stages.json", plan)  # run again
    assert clock.left() == (180.0, False) and clock.seconds() == {"a": 50.0}
    passes(clock, plan[0], 70)
    assert clock.seconds() == {"a": 120.0} and clock.left() == (240.0, True)  # twice as slow as expected
    passes(clock, plan[0], 5)
    assert clock.seconds() == {"a": 120.0}
    passes(Clock(tmp_path / "stages.json", plan), plan[1], 60)
    assert Clock(tmp_path / "stages.json", plan).left() == (180.0, True)
    assert capsys.readouterr().out.split("\n\n")[0] == "\n== stage 1 of 3: a; about 3 min left, if 2 CPU cores are idle"
