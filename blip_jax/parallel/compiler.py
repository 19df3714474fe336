"""What XLA's compilers are told, and where what they make is kept.

The TPU compiler's environment, which libtpu reads when jax starts, and its options for one program.
"""

from __future__ import annotations

import os
import pathlib

FLAG = "--fibers_default_thread_stack_size"  # found in libtpu 0.0.38, 0.0.42.1 and 0.0.52
STACK = 1 << 20  # bytes; with the default libtpu dies of SIGSEGV where a device gets some 10 to 32 rows of a batch
# device kinds whose SparseCores carry out collectives; v5p's need a mode of the chip for it
SPARSE_CORES = ("TPU v6 lite", "TPU7x")
IN_PARTS = (  # found in libtpu 0.0.38, 0.0.42.1, 0.0.48.1, 0.0.50.1 and 0.0.52
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather",
    "xla_tpu_prefer_async_allgather_to_allreduce",
)


def with_stack(arguments: str) -> str:
    """LIBTPU_INIT_ARGS with a stack that is large enough for the compiler's threads.

    `arguments` that set their own are left alone.
    """
    return arguments if FLAG in arguments else f"{arguments} {FLAG}={STACK}".strip()


def set_stack() -> None:
    """Sets LIBTPU_INIT_ARGS for this process and those it starts; without a TPU it means nothing."""
    os.environ["LIBTPU_INIT_ARGS"] = with_stack(os.environ.get("LIBTPU_INIT_ARGS", ""))


def slices(devices) -> int:
    """How many TPU slices the devices belong to; others than TPUs count as one."""
    return len({getattr(d, "slice_index", 0) if d.platform == "tpu" else 0 for d in devices}) or 1


def options(mesh) -> dict[str, bool]:
    """`compiler_options` of the training step on a mesh; those that LIBTPU_INIT_ARGS names are left to it.

    On several slices whose chips have SparseCores gradients are summed in parts there: reduce-scatter within a slice,
    the parts between the slices, all-gather, along all links of the slice and beside the computation. By itself the
    compiler may make the first, the last or both an all-reduce, twice the bytes.
    """
    from jax.sharding import Mesh  # not above: jax is to start with the environment that is set here

    # an abstract mesh has none, and compiles nothing
    devices = list(mesh.devices.flat) if isinstance(mesh, Mesh) else []
    if slices(devices) < 2 or devices[0].device_kind not in SPARSE_CORES:
        return {}
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    return {name: True for name in IN_PARTS if name not in given}


def keep() -> str:
    """Makes jax keep compiled programs from run to run, which has to be asked before the first one; where, in words.

    In $XDG_CACHE_HOME/blip_jax (~/.cache/blip_jax), unless jax_compilation_cache_dir is set. jax's key of a program
    has the versions of itself, of XLA and of the driver, the devices and the compiler's options. Several processes of
    CPUs keep none: only the first would find its own, and wait for the others, which compile.
    """
    import jax

    if not jax.config.jax_enable_compilation_cache:
        return "compiled programs are not kept: jax_enable_compilation_cache is off"
    if jax.config.jax_compilation_cache_dir is None:
        if jax.process_count() > 1 and jax.default_backend() == "cpu":
            return "compiled programs are not kept: of several processes of CPUs only the first would find them"
        root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(root / "blip_jax"))
    return (
        f"compiled programs are kept in {jax.config.jax_compilation_cache_dir}; JAX_COMPILATION_CACHE_DIR names "
        "another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps none"
    )
