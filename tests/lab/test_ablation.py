"""benchmarks/ablation.py on a tiny model: rows that are the same step agree, others are told apart."""

import json

import ablation
import pytest

from blip_jax import tasks
from blip_jax.models import flops

TINY = ablation.Settings(size="tiny", img_size=16, batch=8, rounds=1)


@pytest.fixture
def cfg(monkeypatch):
    """The tiny configuration with one MED layer and a short queue, which `run` then takes."""
    cfg = ablation.configured(TINY)
    with cfg.unlocked():
        cfg.loss.queue, cfg.model.med.layers = 8, 1
    monkeypatch.setattr(ablation, "configured", lambda settings: cfg)
    return cfg


def test_rows_are_the_same_step_where_they_say_so_and_cost_what_the_formulas_say(cfg, tmp_path):
    by_name = {(row.lever, row.instead): row for row in ablation.rows(TINY)}
    chosen = [ablation.BASE, ablation.AGAIN, by_name["model.remat: none", "full"], by_name["loss.queue", "none"]]
    said = []
    result = ablation.run(TINY, "the command", str(tmp_path / "out.json"), said.append, only=chosen)
    base, again, remat, no_queue = result["rows"]

    assert again["metrics"] == base["metrics"] and remat["difference"] <= ablation.LIMIT < no_queue["difference"]
    assert all(len(row["seconds"]) == len(row["cpu_seconds"]) == 1 for row in result["rows"])
    assert base["gflop"] == pytest.approx(flops.pretrain_step(cfg)["step"] / 1e9, rel=0.02)
    assert remat["gflop"] > 1.02 * base["gflop"]
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == result["rows"]
    assert said[-1].count("\n") == 5 and "| model.remat: none | full |" in said[-1]


def test_every_row_is_a_config_that_the_product_accepts(cfg):
    for row in ablation.rows(TINY):
        own = cfg.copy_and_resolve_references()
        with own.unlocked():
            own.update_from_flattened_dict(row.leaves)
        tasks.validate(own, None, 1, 1)


def test_a_row_that_is_another_step_stops_the_run():
    base, row = {"loss": 2.0, "grad_norm": 1.0}, ablation.Row("a lever", "undone")
    assert ablation.difference(ablation.BASE, base, base, "float32") == 0.0
    with pytest.raises(ValueError, match="a lever: undone: .* it is not the same step"):
        ablation.difference(row, base | {"grad_norm": 1.001}, base, "float32")
    assert ablation.difference(row._replace(same=False), base | {"loss": 2.1}, base, "float32") > 0.04
    assert ablation.difference(row, base | {"loss": 2.1}, base, "bfloat16") > 0.04
    with pytest.raises(ValueError, match="nan"):
        ablation.difference(row, base | {"loss": float("nan")}, base, "float32")
