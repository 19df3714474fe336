"""bench/ablation.py: every lever undone is still the same step, and undoing those of the wiring gives the
original's FLOPs."""

import contextlib
import json
from unittest import mock

import jax
import pytest

from blip_jax.bench import ablation
from blip_jax.models import flops

TINY = ablation.Settings(size="tiny", img_size=16, batch=8, rounds=1)
WIRING = (
    "image keys and values once",
    "one matching pass",
    "last matching layer at [ENC] alone",
    "LM head where a word follows",
)
OTHERS = ("vocabulary loss from log-sum-exp", "pointwise gradients keep little", "ViT scanned", "attention: ours")


def together(cfg, levers, **fields):
    """One row of all these levers at once, so that one program shows them all."""
    chosen = [row for row in ablation.rows(cfg) if row.lever in levers]
    assert [row.lever for row in chosen] == list(levers)

    @contextlib.contextmanager
    def patch():
        with contextlib.ExitStack() as stack:
            for row in chosen:
                stack.enter_context(row.patch())
            if WIRING[2] in levers:  # two rows put a Med of their own in the same place
                both = type("Both", (ablation.StatesAsKv, ablation.EveryPosition), {})
                stack.enter_context(mock.patch.object(ablation.blip, "Med", both))
            yield

    return ablation.Row("all", "undone", patch=patch, **fields)


@pytest.fixture
def cfg(monkeypatch):
    """The tiny configuration with one MED layer and a short queue, which `run` then takes."""
    cfg = ablation.configured(TINY)
    with cfg.unlocked():
        cfg.loss.queue, cfg.model.med.layers = 8, 1
    monkeypatch.setattr(ablation, "configured", lambda settings: cfg)
    return cfg


def test_undone_levers_are_the_same_step_and_cost_what_the_formulas_say(cfg, tmp_path):
    undone = together(cfg, (*WIRING, *OTHERS), donate=False)
    said = []
    result = ablation.run(
        TINY, "the command", str(tmp_path / "out.json"), said.append, only=[ablation.BASE, ablation.AGAIN, undone]
    )
    base, again, original = result["rows"]
    assert again["metrics"] == base["metrics"] and original["difference"] <= ablation.LIMIT
    assert all(len(row["seconds"]) == len(row["cpu_seconds"]) == 1 for row in result["rows"])

    ours, theirs = (flops.pretrain_step(cfg, original=o)["step"] / 1e9 for o in (False, True))
    assert base["gflop"] == pytest.approx(ours, rel=0.02)
    assert original["gflop"] / base["gflop"] == pytest.approx(theirs / ours, rel=0.01) and theirs > 1.02 * ours
    assert original["extra_output_bytes"] > base["extra_output_bytes"]  # the state is not donated
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == result["rows"]
    assert said[-1].count("\n") == 4 and "| all | undone |" in said[-1]


def test_a_row_that_is_another_step_stops_the_run(cfg):
    base = {"loss": 2.0, "grad_norm": 1.0}
    assert ablation.check(ablation.BASE, base, base, "float32") == 0.0
    with pytest.raises(ValueError, match="one matching pass: three: .* it is not the same step"):
        ablation.check(ablation.Row("one matching pass", "three"), base | {"grad_norm": 1.001}, base, "float32")
    assert (
        ablation.check(
            ablation.Row("compute in float32", "bfloat16", same=False), base | {"loss": 2.1}, base, "float32"
        )
        > 0.04
    )
    assert ablation.check(ablation.Row("one matching pass", "three"), base | {"loss": 2.1}, base, "bfloat16") > 0.04
    with pytest.raises(ValueError, match="nan"):
        ablation.check(ablation.Row("one matching pass", "three"), base | {"loss": float("nan")}, base, "float32")


def test_patches_leave_nothing_behind(cfg):
    before = jax.tree.leaves(
        [
            vars(m).get(n)
            for m in (ablation.steps, ablation.med, ablation.blip, ablation.vit, ablation.attention)
            for n in ("_matching", "PostNormAttention", "Med", "attention", "grouped_cross_attention")
        ]
    )
    for row in ablation.rows(cfg):
        with row.patch():
            pass
    after = jax.tree.leaves(
        [
            vars(m).get(n)
            for m in (ablation.steps, ablation.med, ablation.blip, ablation.vit, ablation.attention)
            for n in ("_matching", "PostNormAttention", "Med", "attention", "grouped_cross_attention")
        ]
    )
    assert all(a is b for a, b in zip(before, after, strict=True))
