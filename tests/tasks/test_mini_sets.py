"""Each data set of the paper's tasks from its raw files to the file that a server takes, tiny.

A signal stops a run, which goes on; its best checkpoint is evaluated, and `blip-jax score` scores the result file.
"""

import contextlib
import json
import os
import signal

import pytest
from world import mini
from world.mini import MINI

from blip_jax import tasks
from blip_jax.cli import main
from blip_jax.eval import captions
from blip_jax.eval.meteor import Meteor
from blip_jax.train import best, evaluation, loop, metrics


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return mini.write(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="module")
def meteor():
    with Meteor() as running:
        yield running


def trained(cfg, workdir, monkeypatch, capsys):
    """What a run of `cfg` gives that a signal stops after its first step, and the same command ends."""
    row = metrics.Writer.row

    def stopping(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return row(*args)

    with monkeypatch.context() as m:
        m.setattr(metrics.Writer, "row", stopping)
        assert loop.fit(cfg, workdir)["stopped"]
    out = loop.fit(cfg, workdir)
    assert out["step"] == 3 and not out["stopped"]
    said = capsys.readouterr().out
    assert (
        "resuming from checkpoint 1" in said
        and f"WARNING: train.init_from is empty, so that objective {cfg.objective}" in said
    )
    evals = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines() if "eval/" in line]
    assert [found["step"] for found in evals] == [2, 3]
    if cfg.train.keep_best:
        names = [f"eval/{name}" for name in tasks.of(cfg).BEST]
        scores = {found["step"]: sum(found[name] for name in names) for found in evals}
        kept = best.found(workdir)
        assert kept.score == max(scores.values()) == pytest.approx(scores[kept.step])
    return out


def scored(capsys, what, results, references, *more):
    argv = ["score", what, f"--results={results}", f"--references={references}", "--json", *more]
    capsys.readouterr()
    assert main.main(argv) == 0
    return json.loads(capsys.readouterr().out)


def test_coco_captions_and_nocaps(tiny_cfg, pictures, tmp_path, monkeypatch, capsys, meteor):
    cfg = mini.settings(tiny_cfg, "caption", pictures)
    out = trained(cfg, tmp_path / "run", monkeypatch, capsys)
    assert out["eval"]["pictures"] == 8
    assert all(name == "pictures" or name.startswith("approximate/") for name in out["eval"])

    monkeypatch.setattr(captions, "Meteor", lambda: contextlib.nullcontext(meteor))
    test = mini.LISTS["coco"][2]
    cfg.data.eval.mini.path = str(pictures / "lists" / test)
    result = evaluation.evaluate(cfg, tmp_path / "test", tmp_path / "run" / "best")
    assert "SPICE: not computed" in capsys.readouterr().out
    given = tmp_path / "test" / "captions_blip_results.json"
    assert json.loads(given.read_text()) == json.loads((tmp_path / "test" / "predictions.json").read_text())
    assert [row["image_id"] for row in result["predictions"]] == [int(row["image"][-10:-4]) for row in mini.read(test)]
    again = scored(capsys, "caption", given, MINI / "coco_caption/annotation/coco_gt/coco_karpathy_test_gt.json")
    assert again == pytest.approx({name: result[name] for name in again}) and "METEOR" in again

    with cfg.data.unlocked():
        cfg.data.eval.mini = mini.found(pictures, "nocaps", "nocaps", "nocaps/annotation/nocaps_val_4500_captions.json")
    cfg.eval.repetition_penalty = 1.1
    result = evaluation.evaluate(cfg, tmp_path / "nocaps", tmp_path / "run" / "best")
    given = tmp_path / "nocaps" / "captions_blip_results.json"
    again = scored(capsys, "nocaps", given, MINI / "nocaps/annotation/nocaps_val_4500_captions.json")
    assert again.keys() == {"in-domain", "near-domain", "out-domain", "entire"}
    for name, own in again.items():
        assert own == pytest.approx({n: result[f"{name}/{n}"] for n in own})
    cfg.data.eval.mini.path = str(pictures / "lists" / "nocaps/annotation/nocaps_test.json")
    hidden = evaluation.evaluate(cfg, tmp_path / "hidden", tmp_path / "run" / "best")
    assert hidden.keys() == {"pictures", "predictions"} and hidden["pictures"] == 8
    assert "8 of 8 pictures have no captions of people and are not scored" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "hidden" / "captions_blip_results.json").read_text())) == 8


def test_flickr30k_retrieval(tiny_cfg, pictures, tmp_path, monkeypatch, capsys):
    cfg = mini.settings(tiny_cfg, "retrieval", pictures)
    cfg.eval.k, cfg.eval.batch = 4, 16
    out = trained(cfg, tmp_path / "run", monkeypatch, capsys)
    assert (out["eval"]["images"], out["eval"]["texts"]) == (12, 59)  # one picture has four captions
    result = evaluation.evaluate(cfg, tmp_path / "test", tmp_path / "run" / "best")
    again = scored(capsys, "retrieval", tmp_path / "test" / "scores.npz", MINI / mini.LISTS["flickr30k"][2])
    assert again == {name: result[name] for name in again} and "img_r1" in again

    # zero-shot: another data set's model, as it is
    with cfg.data.unlocked():
        cfg.data.eval.mini = mini.found(pictures, "json", "coco", mini.LISTS["coco"][2])
    assert evaluation.evaluate(cfg, tmp_path / "zero_shot", tmp_path / "run" / "best")["images"] == 8


def test_vqa(tiny_cfg, pictures, tmp_path, monkeypatch, capsys):
    cfg = mini.settings(tiny_cfg, "vqa", pictures)
    out = trained(cfg, tmp_path / "run", monkeypatch, capsys)
    assert out["eval"]["questions"] == 26 and not (tmp_path / "run" / "best").exists()  # the last is used
    result = evaluation.evaluate(cfg, tmp_path / "val", tmp_path / "run")
    given = tmp_path / "val" / "v2_OpenEnded_mscoco_val2014_blip_results.json"
    again = scored(capsys, "vqa", given, MINI / "vqa/official/v2_mscoco_val2014_annotations.json")
    assert again == {name: result[name] for name in again} and "answer_type/yes/no" in again
    for subset, questions in (("test2015", 24), ("test-dev2015", 12)):
        cfg.data.eval.mini.path = str(pictures / "lists" / f"vqa/official/v2_OpenEnded_mscoco_{subset}_questions.json")
        hidden = evaluation.evaluate(cfg, tmp_path / subset, tmp_path / "run")
        assert hidden.keys() == {"questions", "predictions"}
        rows = json.loads((tmp_path / subset / f"v2_OpenEnded_mscoco_{subset}_blip_results.json").read_text())
        assert len({row["question_id"] for row in rows}) == len(rows) == questions
    assert {row["answer"] for row in rows} <= set(mini.read("vqa/annotation/answer_list.json"))
    capsys.readouterr()
    cfg.data.train.mini.path = str(pictures / "lists" / "vqa/official/v2_*[nl]2014*.json")  # as the paper trains
    cfg.data.eval.mini.path = str(pictures / "lists" / "vqa/official/v2_*val2014*.json")
    assert evaluation.evaluate(cfg, tmp_path / "val", tmp_path / "run")["accuracy"] == result["accuracy"]
    assert (
        "val2014_annotations.json, which data.train.mini trains on: numbers on it say nothing"
        in capsys.readouterr().out
    )


def test_visual_dialog(tiny_cfg, pictures, tmp_path, monkeypatch, capsys):
    cfg = mini.settings(tiny_cfg, "dialog", pictures)
    cfg.eval.limit = 1
    out = trained(cfg, tmp_path / "run", monkeypatch, capsys)
    assert (out["eval"]["dialogs"], out["eval"]["rounds"]) == (1, 10)
    cfg.eval.limit = 0
    result = evaluation.evaluate(cfg, tmp_path / "val", tmp_path / "run" / "best")
    official = MINI / "visdial/visdial_1.0_val.json"
    dense = f"--dense={MINI / 'visdial/visdial_1.0_val_dense_annotations.json'}"
    again = scored(capsys, "visdial", tmp_path / "val" / "visdial_blip_ranks.json", official, dense)
    assert {"r@1", "mrr", "mean", "ndcg"} < again.keys() and result["rounds"] == 80
    if result["ties"]:  # ranks have none: of equal scores the earlier option is before the later
        assert again["mrr"] >= result["mrr"] and again["mean"] <= result["mean"]
    else:
        assert again == pytest.approx({name: result[name] for name in again})
    cfg.data.eval.mini.path = str(pictures / "lists" / "visdial/visdial_1.0_test.json")
    hidden = evaluation.evaluate(cfg, tmp_path / "hidden", tmp_path / "run" / "best")
    assert hidden.keys() == {"dialogs", "rounds", "predictions"}
    rows = json.loads((tmp_path / "hidden" / "visdial_blip_ranks.json").read_text())
    dialogs = mini.read("visdial/visdial_1.0_test.json")["data"]["dialogs"]
    assert [(row["image_id"], row["round_id"]) for row in rows] == [(d["image_id"], len(d["dialog"])) for d in dialogs]


def test_nlvr2(tiny_cfg, pictures, tmp_path, monkeypatch, capsys):
    cfg = mini.settings(tiny_cfg, "nlvr", pictures)
    trained(cfg, tmp_path / "run", monkeypatch, capsys)  # half of the pictures named .png are JPEG files
    for split in ("dev", "test1"):
        official = pictures / f"lists/nlvr2/official/{split}.json"
        cfg.data.eval.mini.path = str(official)
        result = evaluation.evaluate(cfg, tmp_path / split, tmp_path / "run" / "best")
        again = scored(capsys, "nlvr2", tmp_path / split / "predictions.csv", official)
        assert again["examples"] == result["examples"] == 28
        assert (again["accuracy"], again["consistency"]) == (result["accuracy"], result["consistency"])
