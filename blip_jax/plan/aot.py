"""Compiling for TPUs that are not here: libtpu as a compiler alone, in a process of its own.

libtpu reads its environment when jax starts, logs on its own and may end the process, so `compile_programs` runs this
file as `python -m blip_jax.plan.aot` with what to compile on stdin. What comes back is plain JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from blip_jax.parallel import compiler

MISSING = "the TPU compiler is not installed: pip install 'blip-jax[tpu]' (it needs no TPU)"
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # what runs; libtpu only compiles
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process fails on a lock file
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",  # else libtpu complains on stderr
}


def environment_of_compiler() -> dict[str, str]:
    """What has to be in the environment before jax is imported."""
    return _ENVIRONMENT | {"LIBTPU_INIT_ARGS": compiler.with_stack(os.environ.get("LIBTPU_INIT_ARGS", ""))}


def installed() -> bool:
    """Whether the TPU compiler is there."""
    return importlib.util.find_spec("libtpu") is not None


def compile_programs(request: dict, exact: bool = False, timeout: float = 3600.0) -> dict:
    """Compiles the programs that `request` describes (see `_work`) and returns what `_work` found.

    exact: at the compiler's usual level. ValueError: no compiler, the request does not fit, time is up, or the compiler
    failed; the last line it said is in the message.
    """
    if not installed():
        raise ValueError(MISSING)

    # without XLA_FLAGS, which may ask for fake CPU devices; with this source, wherever the command is run
    level = {"JAX_OPTIMIZATION_LEVEL": "" if exact else "O0"}
    environment = {k: v for k, v in (os.environ | environment_of_compiler() | level).items() if v and k != "XLA_FLAGS"}
    root = str(pathlib.Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "found.json")
        command = [sys.executable, "-m", "blip_jax.plan.aot", str(out)]
        try:
            done = subprocess.run(
                command, input=json.dumps(request), capture_output=True, text=True, env=environment, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"compiling for {request['topology']} took more than {timeout:.0f} s: raise --timeout, or plan a "
                "smaller slice"
            ) from None

        if done.returncode < 0:
            remedy = "raise train.batch, or choose another mesh"
            if "STACK OVERFLOW" in done.stderr:
                remedy = f"its stack was too small: set LIBTPU_INIT_ARGS={compiler.FLAG}={2 * compiler.STACK} or more"
            raise ValueError(
                f"the TPU compiler crashed for {request['topology']} (signal {-done.returncode}): {remedy}"
            )
        if done.returncode or not out.exists():
            raise ValueError(
                f"the TPU compiler failed for {request['topology']} (status {done.returncode}): {_last(done.stderr)}"
            )
        found = json.loads(out.read_text(encoding="utf-8"))
    if "error" in found:
        raise ValueError(found["error"])
    return found


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not re.match(r"[WIE]\d{4} |\s+(@|File)", line)]
    return lines[-1][:500] if lines else "it said nothing"


def tpu_mesh(topology, shape: tuple):
    """Mesh (data, fsdp, tensor) of the devices of a `chips.Topology`, which need not be here, laid out as in a run.

    Needs `environment_of_compiler`.
    """
    from jax.experimental import topologies

    from blip_jax.parallel import sharding

    how = {}
    if topology.slices > 1:
        how["num_slices"] = topology.slices
    if topology.chip.mode:
        how["chip_config_name"] = topology.chip.mode
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology.compiler_name, **how)
    return sharding.mesh_of(shape, described.devices)


def compile_one(program, mesh, topology) -> dict:
    """What the compiler makes of a `programs.Program`.

    Memory, traffic and collectives of one device, and the FLOPs of the traced program.

    Where it does not fit, "needed" holds the bytes that the compiler asked for, and there is nothing else that it alone
    knows.
    """
    import jax

    from blip_jax.models import flops
    from blip_jax.plan import hlo

    started = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = jax.jit(program.function, **program.jit).trace(*program.args)
        found = {"traced_flops": flops.count_jaxpr(traced.jaxpr, program.trips or None)}
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as e:
            if needed := re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(e)):
                bytes_ = float(needed[1]) * 1024 ** (1 + "KMGT".index(needed[2]))
                return found | {"needed": bytes_, "seconds": time.perf_counter() - started}
            raise
    memory, text = compiled.memory_analysis(), compiled.as_text()
    moved = [_described(c, mesh, topology) for c in hlo.collectives(text, mesh.size, program.trips or 1)]
    return found | {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": temporaries(memory),
        "code": memory.generated_code_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "bytes": hlo.traffic(text, program.trips or 1),
        "collectives": moved,
        "seconds": time.perf_counter() - started,
    }


def temporaries(memory) -> int:
    """Bytes that a program needs beside its arguments, of a compiler's analysis: the most that is there at once.

    Its own number for temporaries adds what is never there together in a program of several loops: 12.6 GiB where
    8.4 are needed, for the pre-training step of a ViT-B.
    """
    return max(0, memory.peak_memory_in_bytes - memory.argument_size_in_bytes) or memory.temp_size_in_bytes


def _described(collective, mesh, topology) -> dict:
    """A `hlo.Collective` with its mesh axes, and the links that its group has.

    How many links inside a slice, and how many slices it spans.
    """
    import numpy as np

    from blip_jax.parallel import sharding
    from blip_jax.plan import chips

    words = {
        "kind": collective.kind,
        "bytes": collective.bytes,
        "count": collective.count,
        "arrays": collective.shapes,
        "op": collective.op_name,
    }
    if not collective.group:
        return words | {
            "axis": "data, between slices",
            "devices": topology.slices,
            "slices": topology.slices,
            "links": 0,
        }
    ids, inside = np.asarray(collective.group), sharding.inside_slice(mesh.devices.shape, topology.slices)
    places = np.array(np.unravel_index(ids, mesh.devices.shape))
    axes = [
        name if len(set(row)) in (size, part) else f"{name} in parts of {len(set(row))}"
        for name, row, size, part in zip(mesh.axis_names, places, mesh.devices.shape, inside)
        if len(set(row)) > 1
    ]
    devices = mesh.devices.reshape(-1)[ids]
    slices = {getattr(d, "slice_index", 0) or 0 for d in devices}
    spans = tuple(len({d.coords[i] for d in devices}) for i in range(len(topology.shape)))
    return words | {
        "axis": " and ".join(axes) or "none",
        "devices": len(ids),
        "slices": len(slices),
        "links": chips.rings(topology.chip, topology.shape, spans),
    }


def _work(request: dict) -> dict:
    """{"programs": [a result of `compile_one` each], ...} of a request:

    topology, slices; mesh [data, fsdp, tensor]; workload train | evaluate | capfilt; config, and captioner and filter
    of capfilt, as dicts.
    """
    from ml_collections import ConfigDict

    from blip_jax.plan import chips, programs

    topology = chips.topology(request["topology"], request["slices"])
    mesh = tpu_mesh(topology, tuple(request["mesh"]))
    configs = [ConfigDict(request[name]) for name in ("config", "captioner", "filter") if request.get(name)]
    made = getattr(programs, request["workload"])(configs[0], mesh, *configs[1:])
    return {"programs": [compile_one(p, mesh, topology) for p in made]}


def _main() -> None:
    import jax

    try:
        found = _work(json.loads(sys.stdin.read()))
    except (ValueError, jax.errors.JaxRuntimeError) as e:
        found = {"error": str(e)[:2000]}
    pathlib.Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main()
