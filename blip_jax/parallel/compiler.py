"""What XLA's compilers are told, and where what they make is kept.

The TPU compiler's environment, which libtpu reads when jax starts, and its options for one program.
"""

from __future__ import annotations

import os
import pathlib
import time
import zlib

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

CHECKED = ".checked"  # in a folder of compiled programs; its time says which were looked at
WRITTEN = 5.0  # seconds without a change after which a program is no longer being written
UNUSED = 90 * 24 * 3600.0  # seconds after which a program that no run has read is removed from the folder that is ours


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

    Programs that a killed process left half written are removed, and from the folder that is ours those that no run
    has read for `UNUSED`.
    """
    import jax

    if not jax.config.jax_enable_compilation_cache:
        return "compiled programs are not kept: jax_enable_compilation_cache is off"
    if jax.config.jax_compilation_cache_dir is None:
        if jax.process_count() > 1 and jax.default_backend() == "cpu":
            return "compiled programs are not kept: of several processes of CPUs only the first would find them"
        ours = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "blip_jax"
        jax.config.update("jax_compilation_cache_dir", str(ours))
        _remove_unused(ours)
    return (
        f"compiled programs are kept in {jax.config.jax_compilation_cache_dir}; JAX_COMPILATION_CACHE_DIR names "
        "another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps none"
    ) + _without_broken()


def keep_in(folder) -> None:
    """Makes jax keep compiled programs in `folder`, unless another one is set. As `keep`."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    _without_broken()


def _without_broken() -> str:
    """Removes what is broken from the folder that is set; how much that is, in words to end a sentence with."""
    import jax

    folder = jax.config.jax_compilation_cache_dir
    broken = 0 if not folder or "://" in folder else remove_broken(pathlib.Path(folder))
    return f"; {broken} that were half written are removed" if broken else ""


def remove_broken(folder: pathlib.Path) -> int:
    """Removes the programs in `folder`, which jax keeps there, that were not written to their end; how many.

    jax writes a program into the file of its final name. What a process leaves that is killed meanwhile, as by
    preemption, or whose disk is full, it can neither read nor writes again: that program would be compiled at every
    start, with a warning. Each file is read through once, by the first run that begins after it was written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark, own = folder / CHECKED, folder / f"{CHECKED}-{os.getpid()}"
        since = mark.stat().st_mtime if mark.exists() else 0.0
        own.touch()  # the clock of the file system, which need not be this host's
        now = own.stat().st_mtime
        broken = [
            file for file in folder.glob("*-cache") if since <= _changed(file) < now - WRITTEN and not whole(file)
        ]
        for file in broken:
            file.unlink(missing_ok=True)
        os.utime(own, (now - WRITTEN, now - WRITTEN))
        own.replace(mark)
    except OSError:  # a folder that cannot be written in holds nothing of a process that was killed here
        return 0
    return len(broken)


def whole(file: pathlib.Path) -> bool:
    """Whether a compiled program, which jax compresses by zlib, is there to its last byte. One that another process
    removed meanwhile counts as whole, as does one compressed by zstandard, of which nothing is known here."""
    reader = zlib.decompressobj()
    try:
        with file.open("rb") as chunks:
            while chunk := chunks.read(1 << 20):
                if chunk.startswith(b"\x28\xb5\x2f\xfd") and chunks.tell() == len(chunk):
                    return True
                reader.decompress(chunk)
    except FileNotFoundError:
        return True
    except zlib.error:
        return False
    return reader.eof


def _remove_unused(folder: pathlib.Path) -> None:
    """Removes the programs in `folder` that were last read, or written, longer ago than `UNUSED`."""
    for file in folder.glob("*-cache"):
        try:
            if time.time() - max(file.stat().st_atime, file.stat().st_mtime) > UNUSED:
                file.unlink()
        except OSError:  # another process removed it, or it is another user's
            continue


def _changed(file: pathlib.Path) -> float:
    """When a file was last written; -1 where another process has removed it."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return -1.0
