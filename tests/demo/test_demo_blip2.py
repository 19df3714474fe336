"""BLIP-2 in miniature from end to end, with models too small and too little trained to find anything."""

import json
import pathlib
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from blip_jax import checkpoint, trees
from blip_jax.cli import configs, main
from blip_jax.config import source
from blip_jax.convert import read
from blip_jax.demo import blip2, blip2_results, relations
from blip_jax.tasks import two_stage
from blip_jax.train import loop, run, start

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNS = ("blip", "language", "stage1", "stage1-without-itg", "stage2", "stage2-alone")


@pytest.fixture
def small_cfg(monkeypatch):
    c = configs.load(str(ROOT / "configs" / "scenes_blip2.py")).copy_and_resolve_references().unlock()
    small = dict(width=16, heads=2, mlp=16)
    c.model.vit.update(depth=1, patch=8, **small)
    c.model.qformer.update(queries=2, vocab_size=119, **small)
    c.model.llm.update(layers=1, embed_width=16, vocab_size=300, **small)
    c.model.img_size, c.model.embed_dim = 16, 8
    c.data.train.world = source("scenes", count=16, captions=2, seed=2, size=32, easy=True)
    c.data.threads = c.data.prefetch = 2
    c.train.batch, c.train.steps = 8, 2
    c.train.log_every = c.train.save_every = 2
    c.eval.k = c.eval.batch = c.eval.rerank_texts = 8
    c.eval.loss_examples = 0
    monkeypatch.setattr(blip2, "VOCAB_SCENES", 300)
    monkeypatch.setattr(blip2, "TEXTS", 16)
    monkeypatch.setattr(blip2_results, "UNSEEN", 8)
    monkeypatch.setattr(blip2_results, "PICTURES", 8)
    return c.lock()


def test_the_two_ablations_are_run_and_reported(small_cfg, tmp_path, monkeypatch, capsys):
    out = blip2.run(small_cfg, tmp_path)
    assert not out["stopped"]
    said = capsys.readouterr().out
    names = re.findall(r"^== stage \d+ of 9: (.*?); ", said, re.M)
    assert names == [title for title, *_ in blip2.RUNS.values()][:1] + ["image tower and words of it"] + [
        title for title, *_ in blip2.RUNS.values()
    ][1:] + ["captions of unseen pictures", "report"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["name"] for r in results["captioners"]] == [relations.BOTH, relations.ALONE, blip2_results.BY_CHANCE]
    assert [r["itg"] for r in results["objectives"]] == [True, False]
    assert [(r["table"], r["what"]) for r in results["relations"]] == [
        *(("figure 5", what) for what in relations.TRUE.values()),
        ("table 6", relations.RECALL),
        ("table 6", relations.COSINE),
    ]
    one, other = (r["metrics"] for r in results["objectives"])
    assert results["relations"][3]["difference"] == pytest.approx(one["r_mean"] - other["r_mean"])
    assert results["relations"][4]["difference"] == pytest.approx(one["itc_r_mean"] - other["itc_r_mean"])
    assert len(results["captions"]) == 8 and [t["by"] for t in results["captions"][0]["texts"]] == [
        relations.BOTH,
        relations.ALONE,
    ]
    assert "loss_lm" in results["curves"][relations.WITH_ITG] and "loss_lm" in results["curves"]["language model"]
    assert "loss_lm" not in results["curves"][relations.WITHOUT_ITG]
    for name, losses in (("stage1", ("itc", "itm", "lm")), ("stage1-without-itg", ("itc", "itm"))):
        row = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        assert row["train/loss"] == pytest.approx(sum(row[f"train/loss_{loss}"] for loss in losses), rel=1e-5)
    page = (tmp_path / "report.html").read_text()
    assert results["title"] in page and "http" not in page.replace("http://www.w3.org", "")
    assert said.count("the paper has ") == 5

    whose_parts_are_whose(tmp_path, small_cfg)

    with pytest.MonkeyPatch.context() as m:  # a second start trains, captions and ranks nothing
        m.setattr(loop, "to_devices", lambda *_: pytest.fail("a finished stage was trained again"))
        m.setattr(two_stage, "two_stage_scores", lambda *_: pytest.fail("a model was evaluated again"))
        m.setattr(blip2_results, "from_pretrained", lambda *_, **__: pytest.fail("pictures were captioned again"))
        again = blip2.run(small_cfg, tmp_path)["results"]
    assert capsys.readouterr().out.count("; done before") == 9
    assert again["relations"] == results["relations"]
    assert again["phases"] == [tuple(phase) for phase in results["phases"]]


def whose_parts_are_whose(workdir, cfg):
    """Tower and language model are the same, bit by bit, in all runs that have them, and in none of their checkpoints;
    the second stage begins with the first's Q-Former, and alone, as the first, with the BLIP's words."""
    kept = {name: json.loads((workdir / name / "config.json").read_text()) for name in RUNS}
    assert [kept[name]["train"]["steps"] for name in RUNS] == [20, 12, 4, 4, 2, 2]
    assert kept["stage2"] | {"train": 0} == kept["stage2-alone"] | {"train": 0}
    assert [kept[name]["optim"]["lr"] for name in RUNS] == [blip2.FIRST_LR] * 4 + [cfg.optim.lr] * 2
    assert (kept["stage1"]["task"].pop("itg"), kept["stage1-without-itg"]["task"].pop("itg")) == (True, False)
    assert kept["stage1"] == kept["stage1-without-itg"]
    whole = {
        name: {path: np.asarray(x) for path, x in trees.paths(read.read(workdir / name, vocab=None).state["params"])}
        for name in RUNS
    }
    part = lambda name, part: {path: x.tobytes() for path, x in whole[name].items() if path.startswith(f"{part}/")}
    for name in RUNS[2:]:
        assert part(name, "vit") == part("blip", "vit")
        own = checkpoint.load_params(workdir / name).keys()
        assert not own & {"vit", "llm"} and "qformer" in own
    for name in RUNS[4:]:
        assert part(name, "llm") == part("language", "llm")
    # before their first step
    begun = {name: dict(trees.paths(start_of(blip2.config_of(cfg, workdir, name), workdir))) for name in RUNS[2:]}
    shared = [path for path in begun["stage2"] if path.startswith(("qformer/", "query_tokens", "ln_vision/"))]
    assert shared and all((begun["stage2"][path] == whole["stage1"][path]).all() for path in shared)
    text, drawn = {}, re.compile("qformer/cross/.*|query_tokens|ln_vision/.*")
    for name in ("stage1", "stage2-alone"):
        assert not any(map(drawn.fullmatch, begun[name]))
        text[name] = [path for path in begun[name] if path.startswith("qformer/")]
        for path in text[name]:
            theirs = whole["blip"][path.replace("qformer/", "med/").replace("/query_mlp", "/mlp")]
            assert (begun[name][path] == theirs).all(), path
    assert {path for path in shared if not drawn.fullmatch(path)} == set(text["stage2-alone"]) < set(text["stage1"])


def start_of(cfg: ConfigDict, workdir) -> dict:
    """What a new run of `cfg` takes from its origins."""
    return start.load(run.prepare(cfg, workdir / "anew"))


def test_a_stopped_stage_ends_the_miniature(small_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(blip2.loop, "fit", lambda cfg, workdir: {"step": 1, "stopped": True})
    assert blip2.run(small_cfg, tmp_path) == {"stopped": True}
    assert not (tmp_path / "report.html").exists()


def test_the_command_names_which_paper(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(blip2, "run", lambda cfg, workdir: asked.append((cfg.objective, cfg.seed)) or {"stopped": True})
    assert main.main(["demo", "blip2", f"--workdir={tmp_path}", "--config.seed=7"]) == main.AGAIN
    assert asked == [("blip2_stage2", 7)]
