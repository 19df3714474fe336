"""What NVIDIA says of its GPUs, the hosts that they stand in, and their compiler, which needs none of them.

Sources: NVIDIA's data sheets of the A100 80GB, H100, H200 and DGX B200 and the user guides of the DGX systems, read
November 2026. Rates are of one direction: the data sheets count both of NVLink. `targets/` describes each GPU to XLA.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import pathlib
import re
from typing import NamedTuple

FRACTION = 0.75  # of a GPU's memory that jax takes at start, and a program may have, if the environment does not say
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # jax's variable, and its old name
A_HOST = 8  # GPUs on one NVLink switch, of HGX and DGX systems
MISSING = "the GPU compiler is not installed: pip install 'blip-jax[cuda]' (it needs no GPU)"
PLUGINS = {"jax_cuda12_plugin": "jax-cuda12-plugin", "jax_cuda13_plugin": "jax-cuda13-plugin"}  # module -> package
# Autotuning times kernels on a device. Without it XLA cannot choose between its own Triton products and cuBLAS: take
# cuBLAS, as it mostly would.
FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
CAVEAT = (
    "compiled for a GPU that is not here: products are cuBLAS's, nothing is autotuned, and attention is the plain one. "
    "cuDNN's, which a run on NVIDIA takes where sequences are long, keeps no scores, so temporaries and memory traffic "
    "are upper bounds"
)

BF16 = {  # FLOP/s without sparsity, by a part of jax's device_kind
    "A100": 312e12,
    "H100": 990e12,
    "H200": 990e12,
    "B200": 2250e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
}


class Gpu(NamedTuple):
    """One GPU, by the same names as a TPU `chips.Chip`."""

    name: str  # a100 | h100 | h200 | b200: of its file in targets/
    bf16: float  # FLOP/s
    link: float  # bytes/s into a GPU from the others of its host, by NVLink and switch
    dcn: float  # bytes/s per GPU of the network between hosts
    fraction: float = FRACTION  # of its memory that a program may have
    devices: int = 1  # of jax
    on_chip: float = math.inf

    @property
    def kind(self) -> str:
        """As jax's device_kind begins, for one that is not there."""
        return f"NVIDIA {self.name.upper()}"

    @property
    def hbm(self) -> int:
        """Bytes, as CUDA reports them."""
        return _figure(self.name, "device_memory_size")

    @property
    def hbm_rate(self) -> float:
        """Bytes/s."""
        return float(_figure(self.name, "memory_bandwidth"))

    @property
    def usable(self) -> float:
        """Bytes that jax's allocator has for a program; CUDA's context and NCCL's buffers are in what is left."""
        return self.fraction * self.hbm

    @staticmethod
    def together(inside: float, between: float) -> float:
        """Seconds of a collective that takes so many inside a host and between hosts: NCCL does both at once."""
        return max(inside, between)


GPUS = {
    # A100 80GB: 312 TFLOP/s, NVLink 600 GB/s in both directions; DGX A100: 8 x 200 Gbit/s of InfiniBand for 8 GPUs
    "a100": Gpu("a100", BF16["A100"], 300e9, 25e9),
    # H100 SXM: 1,979 TFLOP/s with sparsity, NVLink 900 GB/s in both directions; DGX H100: 8 x 400 Gbit/s
    "h100": Gpu("h100", BF16["H100"], 450e9, 50e9),
    # H200 SXM: as the H100; DGX H200: 8 x 400 Gbit/s
    "h200": Gpu("h200", BF16["H200"], 450e9, 50e9),
    # B200 of an HGX: 4.5 PFLOP/s with sparsity, NVLink 14.4 TB/s of eight in both directions; DGX B200: 8 x 400 Gbit/s
    "b200": Gpu("b200", BF16["B200"], 900e9, 50e9),
}


class Hosts(NamedTuple):
    """`hosts` hosts of `per_host` GPUs each, by the same names as a `chips.Topology`."""

    platform = "gpu"  # as jax calls its devices
    slices = 1  # of TPUs there may be several, each with its part of the data axis
    name: str
    chip: Gpu
    per_host: int
    hosts: int

    @property
    def chips(self) -> int:
        return self.per_host * self.hosts

    @property
    def devices(self) -> int:
        return self.chips

    @property
    def one(self) -> str:
        """As the user spells one host."""
        return f"{self.name}:{self.per_host}"

    def reach(self, devices) -> tuple[int, int]:
        """How many hosts a group of devices spans, and by how many links data enters a GPU inside one: 1 or none."""
        hosts = [d.process_index for d in devices]
        spans = len(set(hosts))
        return spans, int(len(hosts) > spans)

    def __str__(self) -> str:
        return self.one if self.hosts == 1 else f"{self.hosts} hosts of {self.one}"


def named(text: str) -> bool:
    """Whether a topology is one of GPUs: whether the name before ":" is."""
    return text.strip().lower().partition(":")[0] in GPUS


def topology(text: str, hosts: int = 1) -> Hosts:
    """The hosts that "h100:8" means.

    ValueError: no such GPU, or as many on a host as none has, or the environment's share of memory is none.
    """
    name, _, count = text.strip().lower().partition(":")
    if name not in GPUS or not count.isdigit():
        raise ValueError(
            f"topology {text!r} is unknown: write one of {', '.join(GPUS)} and the GPUs of a host, as h100:8"
        )
    if not 1 <= int(count) <= A_HOST:
        raise ValueError(
            f"topology {text!r} does not exist: a host has 1 to {A_HOST} GPUs on one NVLink switch; of more write "
            f"{name}:{A_HOST} and --hosts=N"
        )
    if hosts < 1:
        raise ValueError(f"hosts is {hosts}: at least one is needed")
    return Hosts(name, GPUS[name]._replace(fraction=fraction()), int(count), hosts)


def fraction() -> float:
    """The share of a GPU's memory that jax would take in this environment. ValueError: it is no share."""
    given = {name: os.environ[name] for name in FRACTIONS if os.environ.get(name)}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both set, which jax refuses: unset the latter, its old name")
    for name, text in given.items():
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:
            raise ValueError(f"{name} is {text!r}: it is the share of a GPU's memory for jax, as 0.75 or 0.95")
        return share
    return FRACTION


def target(name: str) -> str:
    """What XLA is told of a GPU: a GpuTargetConfigProto as text."""
    return (pathlib.Path(__file__).parent / "targets" / f"{name}.txtpb").read_text(encoding="utf-8")


@functools.cache
def _figure(name: str, field: str) -> int:
    return int(re.search(rf"^\s*{field}: (\d+)", target(name), re.M)[1])


def installed() -> bool:
    """Whether the GPU compiler is there: jax's plug-in for CUDA."""
    return any(importlib.util.find_spec(module) for module in PLUGINS)


def version() -> str:
    """The compiler's package and version."""
    from importlib import metadata

    package = next(package for module, package in PLUGINS.items() if importlib.util.find_spec(module))
    return f"{package} {metadata.version(package)}"


def environment_of_compiler() -> dict[str, str]:
    """What has to be in the environment before jax is imported."""
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}


def mesh(hosts: Hosts, shape: tuple):
    """`aot.mesh_of` these hosts: host after host, as jax numbers them in a run."""
    import jax
    from jax.experimental import topologies

    from blip_jax.parallel import sharding

    jax.devices()  # registers the plug-in, which is not asked for a device
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=hosts.name,
        target_config=target(hosts.name),
        topology=f"1x{hosts.hosts}x{hosts.per_host}",
    )
    return sharding.mesh_of(shape, described.devices)
