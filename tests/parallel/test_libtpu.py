"""What the TPU compiler is told: a stack for every command, sums in parts over several slices.

Both are left alone where the user set them.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from blip_jax.cli import main
from blip_jax.parallel import compiler
from blip_jax.plan import aot, programs
from blip_jax.tasks import step
from blip_jax.train import loop, start

COMPILED = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from blip_jax import config
from blip_jax.models.layers.attention import attention
from blip_jax.parallel import compiler, sharding
from blip_jax.plan import aot, chips, hlo

found = {"meshes": [], "sums": {}}
cfg = config.base().mesh.unlock()
for name in ("v4:2x2x2", "v5e:4x4", "v5p:2x2x2", "v6e:4x4", "v7x:2x2x1"):
    for slices in (1, 2):
        topology = chips.topology(name, slices)
        devices = aot.tpu_mesh(topology, (topology.devices, 1, 1)).devices.reshape(-1)
        cfg.data, cfg.fsdp, cfg.tensor = -1, 2, 2
        mesh = sharding.make_mesh(cfg, devices)
        part = len(mesh.devices) // slices
        if slices > 1:
            where = [{d.slice_index for d in mesh.devices[i * part:(i + 1) * part].flat} for i in range(slices)]
            assert where == [{i} for i in range(slices)]
        assert devices[0].device_kind == topology.chip.kind and compiler.slices(devices) == slices
        found["meshes"].append([name, slices, *mesh.devices.shape])
cfg.data, cfg.fsdp, cfg.tensor = 1, -1, 1
try:
    sharding.make_mesh(cfg, devices)
except ValueError as e:
    found["refused"] = str(e)

def step(w, x):
    loss = lambda w: jnp.sum(jnp.square((x @ w.astype(jnp.bfloat16)).astype(jnp.float32)))
    return w - jax.grad(loss)(w)

for name in ("v6e:8x8", "v6e:16x16", "v7x:4x4x4"):
    topology = chips.topology(name, 2)
    mesh = aot.tpu_mesh(topology, (topology.devices, 1, 1))
    place = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
    w, x = place((1024, 4096), jnp.float32), place((8 * mesh.size, 1024), jnp.bfloat16, "data")
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, out_shardings=w.sharding, compiler_options=compiler.options(mesh))
        text = jitted.lower(w, x).compile().as_text()
    found["sums"][name] = sorted([c.kind, c.bytes, len(c.group)] for c in hlo.collectives(text, mesh.size))

mesh = aot.tpu_mesh(chips.topology("v5e:2x2"), (2, 1, 2))
x = jax.ShapeDtypeStruct((2, 577, 2, 88), jnp.bfloat16, sharding=NamedSharding(mesh, P("data", None, "tensor")))
loss = lambda q, k, v: jnp.sum(jnp.square(attention(q, k, v).astype(jnp.float32)))
with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().as_text()
found["kernels"] = text.count('custom_call_target="tpu_custom_call"')
found["with scores"] = sum(f"{n},{n}]" in text for n in (577, 640))
found["moved"] = len(hlo.collectives(text, mesh.size))
json.dump(found, sys.stdout)
"""


@pytest.mark.parametrize(
    "given, want",
    [
        ("", "--fibers_default_thread_stack_size=1048576"),
        (
            "--xla_tpu_scoped_vmem_limit_kib=65536",
            "--xla_tpu_scoped_vmem_limit_kib=65536 --fibers_default_thread_stack_size=1048576",
        ),
        ("--fibers_default_thread_stack_size=4194304 --x=1", "--fibers_default_thread_stack_size=4194304 --x=1"),
    ],
)
def test_every_command_and_the_compiler_of_plans_get_a_stack(given, want, monkeypatch, capsys):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
    assert aot.environment_of_compiler()["LIBTPU_INIT_ARGS"] == want
    assert main.main(["no-such-command"]) == 2 and os.environ["LIBTPU_INIT_ARGS"] == want
    compiler.set_stack()  # once more changes nothing
    assert os.environ["LIBTPU_INIT_ARGS"] == want


def test_a_crash_of_the_compiler_says_what_helps(monkeypatch):
    """A compiler that dies as libtpu does."""
    for said, remedy in (
        ("*** SIGSEGV STACK OVERFLOW received by PID 1", "set LIBTPU_INIT_ARGS=--fibers_default_thread_stack_size="),
        ("something else", "raise train.batch"),
    ):
        script = f"import os, sys; sys.stderr.write({said!r}); sys.stderr.flush(); os.kill(os.getpid(), 11)"
        real = aot.subprocess.run

        def run(command, *, real=real, script=script, **kw):
            return real([command[0], "-c", script], **kw)

        with monkeypatch.context() as m:
            m.setattr(aot, "installed", lambda: True)
            m.setattr(aot.subprocess, "run", run)
            with pytest.raises(ValueError, match=rf"crashed for v5e:2x2 \(signal 11\): .*{remedy}"):
                aot.compile_programs({"topology": "v5e:2x2"})


class Device:
    def __init__(self, kind, slice_index):
        self.device_kind, self.slice_index, self.platform = kind, slice_index, "cpu" if kind == "cpu" else "tpu"


def mesh_of(kind, slices):
    devices = np.array([Device(kind, i % slices) for i in range(4)], object).reshape(4, 1, 1)
    mesh = object.__new__(jax.sharding.Mesh)  # jax's constructor takes real devices alone
    object.__setattr__(mesh, "devices", devices)
    return mesh


def test_sums_over_several_slices_are_made_in_parts_where_chips_have_sparsecores(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=false")
    own = {"xla_tpu_enable_sparse_core_collective_offload_2d_all_gather"}
    assert set(compiler.options(mesh_of("TPU v6 lite", 2))) == set(compiler.IN_PARTS) - own
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    assert compiler.options(mesh_of("TPU7x", 2)) == dict.fromkeys(compiler.IN_PARTS, True)
    for kind, slices in (("TPU v6 lite", 1), ("TPU v5 lite", 2), ("TPU v5", 2), ("cpu", 2)):
        assert compiler.options(mesh_of(kind, slices)) == {}
    abstract = jax.sharding.AbstractMesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    assert (
        compiler.options(abstract)
        == {}
        == compiler.options(jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,)))
    )


def test_training_and_its_plan_hand_them_to_the_compiler(tiny_cfg, tmp_path, monkeypatch, capsys):
    tiny_cfg.seed = 77  # a run of no other test, whose step would be kept
    monkeypatch.setattr(compiler, "options", lambda mesh: {"xla_of_this_test": True})
    monkeypatch.setattr(step, "make_step", lambda *_, **__: lambda state, batch: (state, {}))
    empty = lambda s, place: jax.device_put(
        jax.random.key(0) if jax.dtypes.issubdtype(s.dtype, jax.dtypes.prng_key) else np.zeros(s.shape, s.dtype), place
    )
    monkeypatch.setattr(start, "create", lambda run, _: jax.tree.map(empty, run.shapes, run.shardings))
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_of_this_test'"):
        loop.fit(tiny_cfg, tmp_path / "run")
    assert "left to it: xla_of_this_test\n" in capsys.readouterr().out
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)
    assert programs.train(tiny_cfg, mesh)[0].jit["compiler_options"] == {"xla_of_this_test": True}


@pytest.mark.skipif(not aot.installed(), reason="libtpu is not installed: pip install 'blip-jax[tpu]'")
def test_meshes_as_runs_make_them_sums_over_slices_and_attention():
    """Every TPU has such meshes, sums over slices are sent in parts, and attention of long sequences, forward and
    backward, is two kernels of each device's own rows and heads, without an array of scores. Compiled for slices that
    are not here, at the level of plans."""
    environment = os.environ | aot.environment_of_compiler() | {"JAX_OPTIMIZATION_LEVEL": "O0"}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, whole = json.loads(done.stdout), 1024 * 4096 * 2
    # of one slice, beside fsdp 2 and tensor 2
    data = {"v4:2x2x2": 2, "v5e:4x4": 4, "v5p:2x2x2": 2, "v6e:4x4": 4, "v7x:2x2x1": 2}
    assert found["meshes"] == [[name, slices, n * slices, 2, 2] for name, n in data.items() for slices in (1, 2)]
    assert "mesh.data is 1: it must be a multiple of the 2 slices" in found["refused"]
    for name, n in (("v6e:8x8", 64), ("v6e:16x16", 256), ("v7x:4x4x4", 128)):
        assert found["sums"][name] == sorted(
            [["all-reduce", whole // n, 0], ["reduce-scatter", whole, n], ["all-gather", whole, n]]
        ), name
    assert (found["kernels"], found["with scores"], found["moved"]) == (2, 0, 0)
