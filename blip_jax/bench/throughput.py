"""What every benchmark shares: settings of a run, figures from times, hardware and versions, traces, files.

A figure is taken after a warm-up that compiles. FLOPs are those of `models/flops.py`, so recomputation does not raise
MFU.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from blip_jax import buckets
from blip_jax.console import revision
from blip_jax.plan import chips

PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", "numpy", "torch", "transformers")
VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_PLATFORMS",
    "OMP_NUM_THREADS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_ARENA_MAX",
)
KEEPS_FREED = "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_ARENA_MAX=1"  # glibc's
TRACED = 3  # steps of a profile


def about() -> dict:
    """Hardware, versions, revision and environment, as they stand beside every figure."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "revision": revision(),
        "hardware": {
            "cpu": cpu[0],
            "cores": os.cpu_count(),
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "processes": jax.process_count(),
        },
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in PACKAGES if importlib.util.find_spec(p)},
        },
        "environment": {k: os.environ[k] for k in VARIABLES if k in os.environ},
    }


def headline(result: dict, threads: int) -> str:
    """The line that stands above the figures of a result that holds `about`."""
    hardware, versions = result["hardware"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return (
        f"{hardware['devices']} x {hardware['device']}; {hardware['cpu']}, {hardware['cores']} cores, "
        f"{threads or len(os.sched_getaffinity(0))} threads; {versions}; revision {result['revision']}"
    )


def memory_note() -> str:
    """What to set on a CPU before a step with gigabytes of temporaries is timed.

    "" where it is set, or on other devices.
    """
    if jax.default_backend() != "cpu" or os.environ.get("MALLOC_MMAP_MAX_") == "0":
        return ""
    return (
        "note: glibc gives the memory of a step back to the kernel after it and takes it anew page by page; "
        f"{KEEPS_FREED} before the command keeps it (benchmarks/README.md)"
    )


def figures(seconds: list[float], images: int, image_flops: float, devices: int = 1) -> dict:
    """Figures of steps that took `seconds` each.

    A step did `images` images of `image_flops` FLOPs each, on `devices` devices.

    Rates are all images over all seconds. MFU is the share of the devices' bf16 peak; null where no peak is known (a
    CPU).
    """
    p50, p95 = (float(np.percentile(seconds, q)) for q in (50, 95))
    return {
        "step_s": {"p50": p50, "p95": p95, "all": list(seconds)},
        **rates(images / statistics.mean(seconds), image_flops, devices),
    }


def rates(images_per_s: float, image_flops: float, devices: int) -> dict:
    """Images per second with what follows from it."""
    peak = chips.peak_flops(jax.devices()[0].device_kind)
    return {
        "images_per_s": images_per_s,
        "images_per_s_per_device": images_per_s / devices,
        "gflop_per_image": image_flops / 1e9,
        "gflop_per_s": images_per_s * image_flops / 1e9,
        "mfu": images_per_s * image_flops / (devices * peak) if peak else None,
    }


def peak_memory() -> dict:
    """The most memory so far, in bytes: of the fullest device where it tells, else of this process."""
    stats = [d.memory_stats() for d in jax.local_devices()]
    if all(s and "peak_bytes_in_use" in s for s in stats):
        return {"bytes": max(s["peak_bytes_in_use"] for s in stats), "of": "device"}
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "of": "process"}


def words(found: dict) -> str:
    """`figures` in one line."""
    step = found["step_s"]
    return f"{rate_words(found)}; step p50 {step['p50']:.4g} s, p95 {step['p95']:.4g} s of {len(step['all'])}"


def rate_words(found: dict) -> str:
    """`rates` in one line."""
    rate = f"{found['images_per_s']:.4g} images/s"
    if found["images_per_s_per_device"] != found["images_per_s"]:
        rate += f", {found['images_per_s_per_device']:.4g} per device"
    return rate + (
        f", {found['gflop_per_s']:.1f} GFLOP/s, no peak known"
        if found["mfu"] is None
        else f", MFU {100 * found['mfu']:.1f} %"
    )


def compiled(jitted, *args) -> tuple[Any, float]:
    """(the compiled program, seconds of tracing and compiling)"""
    start = time.perf_counter()
    program = jitted.lower(*args).compile()
    return program, time.perf_counter() - start


def seconds_of(job: Callable, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls of a job that returns when its work is done."""
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        job()
        out.append(time.perf_counter() - start)
    return out


def rounds(jobs: dict[str, Callable], n: int, say: Callable) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Times jobs that take turns in each of n rounds.

    Returns (seconds of each job's first call, which compiles and does not count; seconds of each job's n calls).
    """
    first = {name: seconds_of(job, 1)[0] for name, job in jobs.items()}
    times = {name: [] for name in jobs}
    for i in range(n):
        for name, job in jobs.items():
            times[name] += seconds_of(job, 1)
        say(f"round {i + 1} of {n}: " + ", ".join(f"{name} {t[-1]:.3g} s" for name, t in times.items()))
    return first, times


def ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as fast ours is: the median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def limit_threads(threads: int) -> None:
    """Keeps this process, and with it XLA's thread pool, on `threads` cores; 0: on all that it may use."""
    cores = sorted(os.sched_getaffinity(0))
    if threads and not 1 <= threads <= len(cores):
        raise ValueError(f"--threads={threads}: this process may use {len(cores)} cores; give 1 to {len(cores)}")
    os.sched_setaffinity(0, cores[: threads or None])


def check_out(out: str, trace: str = "") -> None:
    """ValueError: --out names no file in a folder that exists, or on a bucket; --trace no local folder."""
    if trace:
        buckets.local(trace, "--trace")
    if out and not buckets.is_bucket(path := buckets.of(out, "--out")) and not path.parent.is_dir():
        raise ValueError(f"--out={out}: there is no such folder; make it first")


def write(out: str, result: dict) -> None:
    """The result as JSON, from the first process; nothing for an empty name."""
    if out and jax.process_index() == 0:
        buckets.write(buckets.of(out, "--out"), json.dumps(result, indent=1) + "\n")


@contextlib.contextmanager
def trace(folder: str, say: Callable) -> Iterator[None]:
    """A profile of what runs inside, for TensorBoard's profile plug-in and xprof."""
    with jax.profiler.trace(folder):
        yield
    say(f"profile of {TRACED} steps in {folder}: tensorboard --logdir={folder}, or xprof {folder}")


def markdown(head: list, rows: list) -> str:
    """A table."""
    line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])
