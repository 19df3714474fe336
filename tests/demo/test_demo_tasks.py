"""The four tasks in miniature from end to end, with models too small and too little trained to find anything."""

import json
import pathlib
import re

import numpy as np
import pytest

from blip_jax.cli import configs, main
from blip_jax.data.formats import open_source
from blip_jax.data.scenes import crowd, dialogs, official, questions, sentences
from blip_jax.demo import tasks, tasks_results
from blip_jax.eval import java, visdial, vqa
from blip_jax.train import evaluation, loop

ROOT = pathlib.Path(__file__).resolve().parents[2]
TUNED = ("vqa", "nlvr", "caption", "dialog")
TITLES = [tasks.RUNS[name].title for name in TUNED]


def no_java():
    raise ValueError("no Java")


@pytest.fixture
def small_cfg(monkeypatch):
    c = configs.load(str(ROOT / "configs" / "scenes_tasks.py")).copy_and_resolve_references().unlock()
    small = dict(width=16, heads=2, mlp=16)
    c.model.vit.update(depth=1, patch=16, **small)
    c.model.med.update(layers=1, vocab_size=160, **small)
    c.model.img_size, c.model.embed_dim = 32, 8
    c.data.threads = c.data.prefetch = 2
    c.train.batch, c.train.steps = 32, 2  # of dialogs a quarter of it, a multiple of the devices
    c.train.log_every = 1
    c.eval.batch, c.eval.loss_examples = 8, 0
    monkeypatch.setattr(java, "find", no_java)  # which takes longer than all else
    monkeypatch.setattr(tasks, "VOCAB", official.Sizes(100, 2, 4, 20, 0))
    few = official.Sizes(pictures=8, captions=2, questions=3, sentences=2, dialogs=4)
    train = official.Sizes(pictures=60, captions=2, questions=3, sentences=8, dialogs=8)
    monkeypatch.setattr(tasks, "SIZES", {"train": train, "val": few._replace(dialogs=2), "test": few})
    return c.lock()


def test_four_tasks_are_trained_scored_and_reported(small_cfg, tmp_path, monkeypatch, capsys):
    out = tasks.run(small_cfg, tmp_path)
    assert not out["stopped"]
    said = capsys.readouterr().out
    tuned = [f"{what}: {title}" for title in TITLES for what in ("fine-tune", "evaluate")]
    stages = ["files of the world", "pre-training", *tuned, "report"]
    assert re.findall(r"^== stage \d+ of 11: (.*?); ", said, re.M) == stages

    kept = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("pretrain", *TUNED)}
    assert [kept[name]["objective"] for name in kept] == ["pretrain", *TUNED]
    for name in TUNED:
        assert kept[name]["train"]["init_from"] == str(tmp_path / ("vqa" if name == "nlvr" else "pretrain"))
        scored = json.loads((tmp_path / f"{name}-test" / "evaluation.json").read_text())
        best = name in tasks_results.BEST
        assert (tmp_path / name / "best").exists() == best == kept[name]["train"]["keep_best"]
        assert scored["checkpoint"].startswith(str(tmp_path / name / ("best" if best else "checkpoints")))
        # what a server takes
        assert len(list((tmp_path / f"{name}-test").iterdir())) >= 3

    results = json.loads((tmp_path / "results.json").read_text())
    are_those_of_the_files(tmp_path, small_cfg, results)
    assert results["curves"].keys() == {"pre-training", "captions", "questions", "pairs of pictures", "dialogs"}
    page = (tmp_path / "report.html").read_text()
    assert results["title"] in page and "http" not in page.replace("http://www.w3.org", "")
    assert re.findall(r'<section id="(\w+)">', page) == [
        "questions", "pairs", "described", "dialogs", "captions", "curves", "time",
    ]  # fmt: skip

    with pytest.MonkeyPatch.context() as m:  # a second start writes, trains and evaluates nothing
        m.setattr(official, "write", lambda *_: pytest.fail("files were written again"))
        m.setattr(loop, "to_devices", lambda *_: pytest.fail("a finished stage was trained again"))
        m.setattr(evaluation, "evaluate", lambda *_: pytest.fail("a model was evaluated again"))
        again = tasks.run(small_cfg, tmp_path)["results"]
    assert capsys.readouterr().out.count("; done before") == 11
    for part in ("described", "answered", "compared", "continued", "turns"):
        assert again[part] == results[part]


def are_those_of_the_files(workdir, cfg, results):
    """The numbers that are shown, by the predictions and by the world, whose seeds are those of the config."""
    seed, size = tasks_results.seed_of(cfg, "test"), cfg.model.img_size
    predicted = {name: json.loads((workdir / f"{name}-test" / "predictions.json").read_text()) for name in TUNED}
    scored = {name: json.loads((workdir / f"{name}-test" / "evaluation.json").read_text()) for name in TUNED}

    rows = {row["name"]: row for row in results["described"]}
    assert list(rows) == [
        tasks_results.CAPTIONER, tasks_results.OTHERS, tasks_results.ONE, tasks_results.PERSON,
    ]  # fmt: skip
    assert rows[tasks_results.PERSON]["whole"] == 1 > rows[tasks_results.OTHERS]["whole"]
    assert rows[tasks_results.PERSON]["CIDEr"] > rows[tasks_results.OTHERS]["CIDEr"]
    assert "without Java" in results["described_note"]

    asked = {
        1000 * (i + 1) + n: q for i in range(8) for n, q in enumerate(questions.questions(seed, i, size, 3))
    }  # what question_ids name
    whole, *kinds = results["answered"]
    assert whole["questions"] == 24 == sum(row["questions"] for row in kinds)
    assert whole["accuracy"] == scored["vqa"]["accuracy"]
    right = [vqa.accuracy(row["answer"], [asked[row["question_id"]].answer] * 10) for row in predicted["vqa"]]
    assert whole["accuracy"] == pytest.approx(100 * np.mean(right), abs=5)  # people say it otherwise at times
    for row in kinds:
        assert row["questions"] == sum(q.kind == row["kind"] for q in asked.values())
        assert row["accuracy"] == scored["vqa"][f"question_type/{row['kind']}"]
    shown = [a for card in results["question_cards"] for a in card["asked"]]
    assert [(a["question"], a["truth"]) for a in shown] == [(q.text, q.answer) for q in asked.values()]

    whole, *kinds = results["compared"]
    assert whole["examples"] == 8 and whole["accuracy"] == scored["nlvr"]["accuracy"]
    assert {row["kind"] for row in kinds} == {sentences.sentence(seed, i, size)[0].kind for i in range(2)}
    said = [
        (s.text, label) for s, pairs in (sentences.sentence(seed, i, size) for i in range(2)) for *_, label in pairs
    ]
    cards = [(c["sentence"], c["answer"] == c["right"]) for c in results["pair_cards"]]
    assert cards == said  # an answer is right exactly where it is the label

    first, same, frequent, chance = results["continued"]
    assert [row["name"] for row in results["continued"]] == [
        tasks_results.MODEL, tasks_results.SAME, tasks_results.FREQUENT, tasks_results.RANDOM,
    ]  # fmt: skip
    assert all(first[name] == pytest.approx(scored["dialog"][name]) for name in tasks_results.RANKED)
    assert same["mrr"] > chance["mrr"] and chance["mrr"] == pytest.approx(0.0519, abs=0.04)
    turns = [r for i in range(4) for r in dialogs.dialog(seed, i, size).rounds]
    ranks = [row["ranks"] for row in predicted["dialog"]]
    # ranks are in the file's order where options tie, of which the true one is the last in the numbers
    assert first["mrr"] == pytest.approx(np.mean([1 / own[r.truth] for own, r in zip(ranks, turns)]), abs=0.01)
    for row in results["turns"]:
        assert row["rounds"] == sum(r.question.kind == row["kind"] for r in turns)
    shown = [r for card in results["dialog_cards"] for r in card["rounds"]]
    assert [(r["answer"], r["rank"]) for r in shown] == [(r.answer, own[r.truth]) for r, own in zip(turns, ranks)]
    at = tasks_results.sources(workdir, "dialog", "test")
    assert open_source("test", at["test"])[0]["image"] == crowd.png(crowd.scene(seed, 0, size), size)


def test_an_order_by_frequency_is_of_the_training_dialogs(tmp_path):
    turn = lambda question, answer: {"question": question, "answer": answer}
    rows = [[turn(0, 0), turn(1, 1)], [turn(0, 2), turn(1, 1)], [turn(0, 2)]]
    data = {"questions": ["q", "r"], "answers": ["a", "b", "c"], "dialogs": [{"dialog": row} for row in rows]}
    path = pathlib.Path(official.paths(tmp_path / "data", "train").visdial)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"data": data}))
    orders = tasks_results.orders_of(tmp_path)
    options = {"question": "q", "options": ["d", "a", "b", "c"]}
    ranked = lambda name: visdial.ranks(tasks_results.in_order(orders[name], options, 0, (1, 1))).tolist()
    assert ranked(tasks_results.SAME) == [4, 2, 3, 1]  # c twice and a once to q; b to the other question
    assert ranked(tasks_results.FREQUENT)[1:] in ([3, 1, 2], [3, 2, 1]) and ranked(tasks_results.FREQUENT)[0] == 4
    drawn = [
        visdial.ranks(tasks_results.in_order(orders[tasks_results.RANDOM], options, n, (1, 1))).tolist()
        for n in range(40)
    ]
    assert sorted({own[0] for own in drawn}) == [1, 2, 3, 4]


def test_a_stopped_stage_ends_the_miniature(small_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.loop, "fit", lambda cfg, workdir: {"step": 1, "stopped": True})
    assert tasks.run(small_cfg, tmp_path) == {"stopped": True}
    assert not (tmp_path / "report.html").exists() and (tmp_path / "data" / "vocab.txt").exists()


def test_the_command_names_the_tasks(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(tasks, "run", lambda cfg, workdir: asked.append((cfg.objective, cfg.seed)) or {"stopped": True})
    assert main.main(["demo", "tasks", f"--workdir={tmp_path}", "--config.seed=7"]) == main.AGAIN
    assert asked == [("pretrain", 7)]
