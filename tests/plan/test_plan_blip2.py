"""Plans of BLIP-2's stages: frozen parts by their dtype, what is made again, and a small one compiled for a TPU."""

import json

import pytest

from blip_jax import config, trees
from blip_jax.cli import main
from blip_jax.models import flops
from blip_jax.models.layers import stack
from blip_jax.models.layers.dense import rounds
from blip_jax.plan import aot, chips, plan, programs
from blip_jax.tasks import blip2_stage1

CONFIG = """
from blip_jax.config import blip2, source

def get_config():
    c = blip2("eva_tiny", "tiny", "opt_tiny")
    c.model.img_size, c.text.max_len = 16, 8
    c.train.batch, c.train.steps = 16, 1000
    with c.data.unlocked():
        c.data.train.world = source("scenes", count=64, size=32)
    return c
"""


def sized(llm="", **leaves):
    c = config.blip2("eva_tiny", "tiny", llm).unlock()
    if not llm:
        c.task = blip2_stage1.leaves()
    c.model.img_size, c.text.max_len = 16, 8
    c.train.update(batch=16, steps=1000)
    with c.data.unlocked():
        c.data.train.world = config.source("scenes", count=64, size=32)
    c.update_from_flattened_dict(leaves)
    return c


def program(cfg):
    return plan.made(plan.request(cfg, chips.topology("v5e:2x2")))[0]


def test_frozen_parameters_are_counted_in_the_dtype_they_are_kept_in():
    made = program(sized("flant5_tiny"))
    parts, frozen = programs.arguments(made), dict(trees.paths(made.parts["frozen parameters"]))
    assert {path.split("/")[0] for path in frozen} == {"vit", "llm"}
    assert parts["frozen parameters"] == sum(x.size * (2 if rounds(path) else 4) for path, x in frozen.items())
    trained = sum(x.size for _, x in trees.paths(made.parts["parameters"]))
    assert parts["parameters"] == 4 * trained and 8 * trained <= parts["optimiser"] <= 8 * trained + 64
    split = programs.arguments(program(sized("flant5_tiny", **{"mesh.fsdp": 4})))
    assert split["frozen parameters"] < parts["frozen parameters"] / 3
    row = plan.analytic(made, plan.request(sized("flant5_tiny"), chips.topology("v5e:2x2")))
    assert row["gradient_bytes"] == 2 * trained * 2 * 3 / 4  # in bfloat16, summed over four; of frozen ones none


@pytest.mark.parametrize("llm", ["", "opt_tiny", "flant5_tiny"])
def test_layers_made_again_are_counted(llm):
    """In float32, whose products on a CPU are those of a TPU in bfloat16; layers as loops."""
    counted, made = [], []
    for remat in ("none", "full"):
        made.append(program(sized(llm, **{"model.remat": remat, "model.dtype": "float32"})))
        with stack.looped():
            counted.append(flops.count_function(made[-1].function, *made[-1].args))
    assert made[0].recomputed == 0 and made[0].flops == made[1].flops
    assert counted[1] - counted[0] == pytest.approx(made[1].recomputed, rel=0.01)


def test_a_tower_that_is_trained_is_made_again_too():
    frozen, trained = (
        programs.recomputed(sized(**{"model.remat": "full", "optim.freeze": freeze})) for freeze in (("vit/.*",), ())
    )
    assert trained > frozen > 0
    assert programs.recomputed(sized(**{"model.remat": "dots"})) == 0


@pytest.mark.skipif(not aot.installed(), reason="libtpu is not installed: pip install 'blip-jax[tpu]'")
def test_a_small_second_stage_compiled_for_a_tpu_that_is_not_here(tmp_path, capsys):
    (tmp_path / "c.py").write_text(CONFIG)
    out = tmp_path / "plan.json"
    flags = [f"--config={tmp_path / 'c.py'}", "--topology=v5e:2x2", "--config.mesh.fsdp=2", f"--out={out}"]
    assert main.main(["plan", *flags]) == 0
    text, row = capsys.readouterr().out, json.loads(out.read_text())["programs"][0]
    assert "frozen parameters" in text and "it fits" in text and row["memory"]["frozen parameters"] > 0
    assert row["memory"]["activations and temporaries"] > 0 and row["needed"] == sum(row["memory"].values())
    moved = {
        name: sum(c["ici"] for c in row["collectives"] if c["moves"] == name) for name in ("gradients", "parameters")
    }
    assert 0 < moved["gradients"] <= 1.5 * row["memory"]["parameters"] and moved["parameters"] > 0
