"""What a run says that starts from nothing, or from a model that is finished already."""

import types

import pytest

from blip_jax import tasks
from blip_jax.train import start

FINE_TUNED = [name for name in tasks.names() if hasattr(tasks.of(types.SimpleNamespace(objective=name)), "BEGINS_FROM")]


class Read(Exception):
    """Ends a start once everything is said."""


@pytest.mark.parametrize("objective", FINE_TUNED)
def test_a_start_from_nothing_or_from_a_finished_model_is_said_loudly(objective, tiny_cfg, monkeypatch, capsys):
    tiny_cfg.objective, tiny_cfg.train.init_from = objective, ""
    run = types.SimpleNamespace(cfg=tiny_cfg, task=tasks.of(tiny_cfg))
    assert start.load(run) is None
    assert f"WARNING: train.init_from is empty, so that objective {objective} trains random" in capsys.readouterr().out

    def together(cfg, sources):
        raise Read

    monkeypatch.setattr(start.origins, "together", together)
    for before, said in ((objective, True), ("pretrain", False)):
        found = types.SimpleNamespace(cfg=types.SimpleNamespace(objective=before))
        monkeypatch.setattr(start, "read_for", lambda cfg, path, found=found: found)
        with pytest.raises(Read):
            start.load(run, [("runs/done", None)])
        told = capsys.readouterr().out
        assert (
            f"WARNING: runs/done was trained for objective {objective} before: this run goes on with a" in told
        ) == said


def test_the_papers_fine_tuned_tasks_are_among_them():
    assert {"retrieval", "caption", "vqa", "nlvr", "dialog"} <= {*FINE_TUNED}
