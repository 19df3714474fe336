"""Compiling for TPUs and GPUs that are not here, in a process of its own: libtpu or jax's plug-in for CUDA as a
compiler alone.

They read their environment when jax starts, log on their own and may end the process, so `compile_programs` runs this
file as `python -m blip_jax.plan.aot` with what to compile on stdin. What comes back is plain JSON. What is said here of
libtpu alone, `gpus` says of the plug-in.
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
from blip_jax.plan import chips, gpus

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


def missing(topology) -> str:
    """How to get the compiler for a topology; "" where it is here."""
    if topology.platform == "gpu":
        return "" if gpus.installed() else gpus.MISSING
    return "" if installed() else MISSING


def compiler_of(topology, exact: bool) -> str:
    """What compiles for a topology, with its version and level."""
    import jax

    if topology.platform == "gpu":
        return f"{gpus.version()}, jax {jax.__version__}, nothing autotuned"
    from importlib.metadata import version

    return f"libtpu {version('libtpu')}, jax {jax.__version__}, {'usual level' if exact else '-O0'}"


def compile_programs(request: dict, exact: bool = False, timeout: float = 3600.0) -> dict:
    """Compiles the programs that `request` describes (see `_work`) and returns what `_work` found.

    exact: for TPUs at the compiler's usual level. ValueError: no compiler, the request does not fit, time is up, or the
    compiler failed; the last line it said is in the message.
    """
    topology = _topology(request)
    if how := missing(topology):
        raise ValueError(how)

    # without the XLA_FLAGS that are here, which may ask for fake CPU devices; with this source, wherever the command is
    # run
    own = {"XLA_FLAGS": "", "JAX_OPTIMIZATION_LEVEL": ""}
    if topology.platform == "gpu":
        own |= gpus.environment_of_compiler()
    else:
        own |= environment_of_compiler() | ({} if exact else {"JAX_OPTIMIZATION_LEVEL": "O0"})
    environment = {k: v for k, v in (os.environ | own).items() if v}
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
                f"compiling for {topology} took more than {timeout:.0f} s: raise --timeout, or plan a smaller topology"
            ) from None

        who = f"the {topology.platform.upper()} compiler"
        if done.returncode < 0:
            remedy = f"{'raise' if topology.platform == 'tpu' else 'change'} train.batch, or choose another mesh"
            if "STACK OVERFLOW" in done.stderr:
                remedy = f"its stack was too small: set LIBTPU_INIT_ARGS={compiler.FLAG}={2 * compiler.STACK} or more"
            raise ValueError(f"{who} crashed for {topology} (signal {-done.returncode}): {remedy}")
        if done.returncode or not out.exists():
            raise ValueError(f"{who} failed for {topology} (status {done.returncode}): {_last(done.stderr)}")
        found = json.loads(out.read_text(encoding="utf-8"))
    if "error" in found:
        raise ValueError(found["error"])
    return found


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not re.match(r"[WIE]\d{4} |\s+(@|File)", line)]
    return lines[-1][:500] if lines else "it said nothing"


def _topology(request: dict):
    return chips.topology(request["topology"], request.get("slices", 1), request.get("hosts", 1))


def mesh_of(topology, shape: tuple):
    """Mesh (data, fsdp, tensor) of a topology's devices, which need not be here, laid out as in a run.

    Needs the environment of its compiler.
    """
    return gpus.mesh(topology, shape) if topology.platform == "gpu" else tpu_mesh(topology, shape)


def tpu_mesh(topology, shape: tuple):
    """`mesh_of` a `chips.Topology`."""
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
        "temporaries": temporaries(memory, topology.platform),
        "code": memory.generated_code_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "bytes": hlo.traffic(text, program.trips or 1),
        "collectives": moved,
        "seconds": time.perf_counter() - started,
    }


def temporaries(memory, platform: str = "tpu") -> int:
    """Bytes that a program needs beside its arguments, of a compiler's analysis.

    On a GPU that is one piece, of the size that the compiler laid out. On a TPU it is the most that is there at once:
    the number for temporaries adds what is never there together in a program of several loops, 12.6 GiB where 8.4 are
    needed, for the pre-training step of a ViT-B.
    """
    if platform == "gpu":
        return memory.temp_size_in_bytes
    return max(0, memory.peak_memory_in_bytes - memory.argument_size_in_bytes) or memory.temp_size_in_bytes


def _described(collective, mesh, topology) -> dict:
    """A `hlo.Collective` with its mesh axes, and the links that its group has.

    How many links inside a slice or a host, and how many slices or hosts it spans.
    """
    import numpy as np

    from blip_jax.parallel import sharding

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
    slices, links = topology.reach(mesh.devices.reshape(-1)[ids])
    return words | {"axis": " and ".join(axes) or "none", "devices": len(ids), "slices": slices, "links": links}


def _work(request: dict) -> dict:
    """{"programs": [a result of `compile_one` each], ...} of a request:

    topology, slices, hosts; mesh [data, fsdp, tensor]; workload train | evaluate | capfilt; config, and captioner and
    filter of capfilt, as dicts.
    """
    from ml_collections import ConfigDict

    from blip_jax.plan import programs

    topology = _topology(request)
    mesh = mesh_of(topology, tuple(request["mesh"]))
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
