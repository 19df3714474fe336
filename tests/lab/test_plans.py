"""benchmarks/plans.py: a folder of plans as a table and a chart."""

import plans
import pytest

from blip_jax.bench import train
from blip_jax.plan import aot, chips, plan


def test_plans_together_make_a_table_and_a_chart(tmp_path, monkeypatch):
    monkeypatch.setattr(aot, "installed", lambda: False)
    cfg = train.sized("tiny", "pretrain", 16, "bfloat16", 16)
    folder = tmp_path / "plans"
    for shape, count in (("2x2", 4), ("4x4", 16)):
        made = plan.make(plan.request(cfg, chips.topology(f"v5e:{shape}")))
        made["programs"][0]["seconds"]["interconnect"] = made["programs"][0]["seconds"]["compute"] * count / 8
        plan.save(made, folder / f"scaling-v5e-{count}.json")

    plans.main(str(folder))
    table, chart = (folder / "README.md").read_text(), (tmp_path / "scaling.svg").read_text()
    assert (
        "| scaling-v5e-16 | v5e:4x4 | 16 × 1 × 1 | 1 |" in table
        and ", interconnect |" in table
        and ", compute |" in table
    )
    assert chart.count("<circle") == 2 and "4 chips" in chart and chart.startswith("<svg xmlns")
    with pytest.raises(ValueError, match="holds no plan"):
        plans.read(tmp_path / "none")
