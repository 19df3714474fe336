"""Rows for Weights & Biases, with a module that stands in for wandb, which is too large to install for this."""

import json
import sys
import types

import pytest

from blip_jax.train import loop, metrics


@pytest.fixture
def service(monkeypatch):
    """What a run at W&B was told, in order; `fails` names the call that fails from now on."""
    told, fails = [], []

    class Error(Exception):
        pass

    def call(name):
        def told_of(*args, **how):
            if name in fails:
                raise Error(f"no\n {name}")
            told.append((name, *args, how))
            return run

        return told_of

    run = types.SimpleNamespace(**{name: call(name) for name in ("define_metric", "log", "finish")})
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")  # else it counts as not installed
    module.init, module.Error, module.Settings = call("init"), Error, lambda **how: how
    monkeypatch.setitem(sys.modules, "wandb", module)
    return types.SimpleNamespace(told=told, fails=fails)


def test_a_run_that_goes_on_is_the_same_run_there_and_has_every_number(tiny_cfg, tmp_path, service):
    tiny_cfg.objective, tiny_cfg.train.wandb = "caption", "lab/blip"
    for steps in (2, 4):
        tiny_cfg.train.steps = steps
        loop.fit(tiny_cfg, tmp_path / "run")
    begun = [how for name, *_, how in service.told if name == "init"]
    assert len(begun) == 2 and begun[0]["id"] == begun[1]["id"] and len(begun[0]["id"]) == 16
    assert begun[0]["id"] == (tmp_path / "run" / "wandb.txt").read_text().strip()
    for how in begun:
        assert how["entity"] == "lab" and how["project"] == "blip" and how["resume"] == "allow"
        assert how["dir"] == str(tmp_path / "run") and how["config"]["optim"]["lr"] == tiny_cfg.optim.lr
    written = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    sent = [args[0] for name, *args in service.told if name == "log"]
    assert sent == [{k: v for k, v in row.items() if k != "time"} for row in written]
    assert [row["step"] for row in sent] == [2, 4] and "train/loss" in sent[0]
    assert [how for name, *_, how in service.told if name == "finish"] == [{"exit_code": 0}] * 2
    assert ("define_metric", "*", {"step_metric": "step"}) in service.told


def test_a_failure_of_the_service_does_not_end_the_training_and_one_of_the_training_is_told(tmp_path, service, capsys):
    def written(step):
        with metrics.Writer(tmp_path, True, step, metrics.Wandb("blip", tmp_path, {})) as writer:
            for i in range(2):
                writer.row(step + i, "train", {"loss": 1.5})
            raise RuntimeError("of the training")

    with pytest.raises(RuntimeError, match="of the training"):
        written(1)
    assert service.told[-1] == ("finish", {"exit_code": 1}) and service.told[0][1]["entity"] is None
    service.fails.append("log")
    with pytest.raises(RuntimeError, match="of the training"):
        written(3)
    assert capsys.readouterr().out.splitlines() == ["WARNING: Weights & Biases gets no more rows: Error: no log"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_what_cannot_be_used_is_said_at_the_start_with_the_remedy(tiny_cfg, tmp_path, service, monkeypatch):
    service.fails.append("init")
    with pytest.raises(ValueError, match="cannot be used: no init; log in with `wandb login`, set WANDB_MODE=offline"):
        metrics.Wandb("blip", tmp_path, {})
    for project in ("a/b/c", "/blip", "lab/"):
        with pytest.raises(ValueError, match="give PROJECT or ENTITY/PROJECT"):
            metrics.check_wandb(project)
    monkeypatch.setitem(sys.modules, "wandb", None)
    tiny_cfg.train.wandb = "blip"
    with pytest.raises(ValueError, match=r"pip install 'blip-jax\[wandb\]'"):
        loop.fit(tiny_cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()
