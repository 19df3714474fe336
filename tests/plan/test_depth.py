"""A program does not grow with the depth of a tower: a stack of layers is one loop in it."""

import jax
import pytest

from blip_jax.bench import train
from blip_jax.parallel import sharding
from blip_jax.plan import programs

COUNTED = ("dot_general", "while", "reduce")  # and all operations together


def sizes(program: programs.Program, mesh) -> dict[str, int]:
    """How often each operation stands in what XLA's compiler for NVIDIA's GPUs would be given."""
    with jax.set_mesh(mesh):
        traced = jax.jit(program.function, **program.jit).trace(*program.args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return {name: text.count(f"stablehlo.{name}") for name in COUNTED} | {"all": text.count(" = ")}


@pytest.mark.parametrize(
    "task, towers",
    [
        ("pretrain", {"vit": "depth", "med": "layers"}),
        ("blip2_flant5_tiny", {"vit": "depth", "qformer": "layers", "llm": "layers"}),
    ],
)
def test_programs_do_not_grow_with_depth(task, towers):
    mesh, found = sharding.mesh_of((8, 1, 1), jax.devices()), []
    for layers in (10, 14):  # no number that another dimension has: functions of equal shapes are one
        cfg = train.sized("tiny", task, 16, "bfloat16", 16, (), task if "qformer" in towers else "")
        with cfg.unlocked():
            for tower, depth in towers.items():
                cfg.model[tower][depth] = layers
        made = {"state": programs.create(cfg, mesh), "step": programs.train(cfg, mesh)[0]}
        found.append({name: sizes(program, mesh) for name, program in made.items()})
    assert found[0] == found[1]
    step = found[0]["step"]
    assert step["dot_general"] > 30 and step["while"] >= 4 and step["all"] > 1000  # it is a step that was counted
