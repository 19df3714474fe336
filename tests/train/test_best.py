"""The best checkpoint beside the newest: which it is, that it outlives what is rotated away, and that whatever takes a
workdir takes it.
"""

import errno
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from world.runs import begun, leaves

from blip_jax import checkpoint, trees
from blip_jax.config import source
from blip_jax.inference.load import load
from blip_jax.tasks import caption, validate
from blip_jax.train import best, evaluation, loop, metrics

FIRST, SECOND = caption.BEST


@pytest.fixture
def cfg(tiny_cfg):
    """A captioner, whose newest checkpoint alone is kept, evaluated at each second step."""
    tiny_cfg.objective, tiny_cfg.text.prompt = "caption", "a "
    with tiny_cfg.data.unlocked():
        tiny_cfg.data.eval.world = source("scenes", count=8, size=32, seed=1)
    tiny_cfg.train.update(save_every=2, eval_every=2, keep=1, keep_best=True)
    return tiny_cfg


@pytest.fixture
def scores(monkeypatch):
    """What evaluations of the steps find."""
    found, parameters, stops = {2: 0.2, 4: 0.6, 6: 0.4, 8: 0.9}, {}, []

    def curve(loaded, data, mesh):
        step = int(loaded.origin.split()[1])
        parameters[step] = {path: np.asarray(x).tobytes() for path, x in trees.paths(jax.device_get(loaded.params))}
        if step in stops:  # by a signal that comes while it is evaluated, which the run obeys after one more step
            os.kill(os.getpid(), signal.SIGTERM)
        return {FIRST: found[step] - 0.1, SECOND: 0.1, "pictures": 8}

    monkeypatch.setattr(caption, "curve", curve)
    return parameters, stops


def test_the_best_stays_while_newer_ones_come_and_go_also_when_the_run_goes_on(cfg, scores, tmp_path, capsys):
    (parameters, stops), run = scores, tmp_path / "run"
    cfg.train.steps, stops[:] = 8, [4, 6]
    assert loop.fit(cfg, run)["stopped"]
    assert best.found(run) == (4, pytest.approx(0.6)) and list(checkpoint.folders(run)) == [5]
    assert f"step 4: {FIRST} + {SECOND} 0.6000, the best so far, kept in {run / 'best'}" in capsys.readouterr().out
    assert loop.fit(cfg, run)["stopped"]  # its score was restored
    assert "step 6: " in (text := capsys.readouterr().out) and "the best is still step 4 with 0.6000" in text
    assert list(checkpoint.folders(run)) == [7] and list(checkpoint.folders(run / "best")) == [4]
    assert leaves(run / "best") == parameters[4] != leaves(run)
    assert not checkpoint.check_folders(run / "best")[1] and checkpoint.newest_complete(run) == 7

    loaded = load(run / "best")  # vocabulary and settings are its own
    assert loaded.cfg.text.prompt == "a " and loaded.origin == str(run / "best" / "checkpoints" / "4")
    shutil.move(run / "best", tmp_path / "apart")
    assert leaves(tmp_path / "apart") == parameters[4]
    shutil.move(tmp_path / "apart", run / "best")
    assert loop.fit(cfg, run)["step"] == 8
    assert best.found(run) == (8, pytest.approx(0.9)) and leaves(run / "best") == parameters[8]
    assert [path.name for path in (run / "best" / "checkpoints").iterdir()] == ["8"]
    assert not [path for path in run.iterdir() if path.name.startswith("lock")]


def test_who_is_killed_between_evaluation_and_its_row_makes_both_again(cfg, scores, tmp_path, monkeypatch):
    run = tmp_path / "run"
    cfg.train.steps, row = 4, metrics.Writer.row

    def killed(self, step, part, numbers):
        if (step, part) == (4, "eval"):
            raise KeyboardInterrupt
        return row(self, step, part, numbers)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(metrics.Writer, "row", killed)
        loop.fit(cfg, run)
    assert best.found(run) == (4, pytest.approx(0.6))
    (run / "best" / "checkpoints" / "next" / "state").mkdir(parents=True)  # of one that was killed while it copied
    assert loop.fit(cfg, run)["eval"][FIRST] == pytest.approx(0.5)
    assert best.found(run).step == 4


def test_a_file_system_without_links_gets_copies(cfg, scores, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    cfg.train.steps = 4
    loop.fit(cfg, tmp_path / "run")
    assert leaves(tmp_path / "run" / "best") == leaves(tmp_path / "run") and best.found(tmp_path / "run").step == 4


def test_an_evaluation_that_says_nothing_is_no_rival(cfg, scores, tmp_path, monkeypatch, capsys):
    cfg.train.steps = 4
    monkeypatch.setattr(caption, "curve", lambda *_: {"pictures": 8, FIRST: float("nan")})
    loop.fit(cfg, tmp_path / "run")
    assert f"not compared with the best, as the evaluation has no {FIRST} and no {SECOND}" in capsys.readouterr().out
    assert best.found(tmp_path / "run") is None


def test_its_frozen_parameters_are_found_where_the_run_would_find_them(cfg, scores, tmp_path):
    home = tmp_path / "home"
    first = begun(cfg, home / "first")
    cfg.optim.freeze, cfg.train.init_from, cfg.train.steps = ("vit/.*",), str(first), 2
    loop.fit(cfg, home / "run")
    shutil.move(home, tmp_path / "moved")  # with its origin
    assert set(load(tmp_path / "moved" / "run" / "best").params) == set(load(tmp_path / "moved" / "run").params)


def test_a_rule_and_something_to_evaluate_are_needed(cfg, scores):
    validate(cfg)
    with cfg.data.unlocked():
        del cfg.data.eval.world
    with pytest.raises(ValueError, match="train.keep_best is set, but data.eval is empty"):
        validate(cfg)
    cfg.objective, cfg.text.prompt = "pretrain", ""
    with pytest.raises(ValueError, match="objective pretrain has no rule for which checkpoint is the best"):
        validate(cfg)


def test_the_best_is_evaluated_as_any_workdir(cfg, scores, tmp_path, monkeypatch):
    cfg.train.steps = 4
    loop.fit(cfg, tmp_path / "run")
    monkeypatch.setattr(caption, "evaluate", lambda *_: {"pictures": 0, "predictions": []})
    evaluation.evaluate(cfg, tmp_path / "run", tmp_path / "run" / "best")
    said = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert said["checkpoint"] == str(tmp_path / "run" / "best" / "checkpoints" / "4")
