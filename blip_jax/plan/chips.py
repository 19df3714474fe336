"""What Google says of its TPUs, and which topologies exist. Bytes are decimal (GB) unless the name says GiB.

Sources: Google Cloud's pages of each TPU (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x), read November 2026. A
link's rate is that of one direction: the pages' bandwidth per chip over the number of its links, halved where they
count both directions. NVIDIA's GPUs are in `gpus`.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import NamedTuple

from blip_jax.plan import gpus


class Chip(NamedTuple):
    """One TPU chip. `devices`: how many jax devices it is, its cores where they are not fused."""

    platform: str  # the name that the TPU compiler knows
    kind: str  # jax's device_kind
    bf16: float  # FLOP/s
    hbm: float  # bytes, by data sheet
    usable: float  # bytes of a device's HBM that the compiler lets a program have (its own out-of-memory message)
    hbm_rate: float  # bytes/s
    link: float  # bytes/s of one interconnect link, one direction
    dims: int  # of the torus; each chip has two links per dimension
    closes: int  # a dimension of this length, or of a multiple of it in three dimensions, is a ring and not a line
    dcn: float  # bytes/s per chip of the data-centre network, between slices
    devices: int
    largest: tuple  # slice, chips per dimension
    # the compiler's name for how a run uses the cores, where its topologies do not assume that by themselves
    mode: str = ""
    # bytes/s from one device of a chip to the other, one direction; a chip of one device has none
    on_chip: float = math.inf

    @staticmethod
    def together(inside: float, between: float) -> float:
        """Seconds of a collective that takes so many inside a slice and between slices: one after the other."""
        return inside + between


GIB = 2**30
TPUS = {
    # v4: 275 TFLOP/s, 32 GiB, 1200 GB/s, 6 links of 50 GB/s; hosts of 4 chips, network taken as v5p's
    "v4": Chip("v4", "TPU v4", 275e12, 32 * GIB, 30.75 * GIB, 1200e9, 50e9, 3, 4, 6.25e9, 1, (12, 16, 16), "megacore"),
    # v5e: 197 TFLOP/s, 16 GiB, 819 GB/s (page: 800 to 820), 1600 Gbit/s over 4 links; hosts of 8 chips with
    # 2 x 100 Gbit/s
    "v5e": Chip("v5e", "TPU v5 lite", 197e12, 16 * GIB, 15.75 * GIB, 820e9, 50e9, 2, 16, 3.125e9, 1, (16, 16)),
    # v5p: 459 TFLOP/s, 95 GiB, 2765 GB/s, 1200 GB/s in both directions over 6 links, 50 Gbit/s of network per chip
    "v5p": Chip("v5p", "TPU v5", 459e12, 95 * GIB, 95.74 * GIB, 2765e9, 100e9, 3, 4, 6.25e9, 1, (16, 16, 24)),
    # v6e: 918 TFLOP/s, 32 GiB, 1640 GB/s (page: 1600), 3200 Gbit/s over 4 links; hosts of 8 chips with 4 x 200 Gbit/s
    "v6e": Chip("v6e", "TPU v6 lite", 918e12, 32 * GIB, 31.25 * GIB, 1640e9, 100e9, 2, 16, 12.5e9, 1, (16, 16)),
    # TPU7x: 2307 TFLOP/s, 192 GiB, 7380 GB/s, 1200 GB/s in both directions over 6 links, 100 Gbit/s of network per
    # chip; two devices a chip, with six times a link between them
    "v7x": Chip(
        "tpu7x", "TPU7x", 2307e12, 192 * GIB, 94.75 * GIB, 7380e9, 100e9, 3, 4, 12.5e9, 2, (16, 24, 24), on_chip=600e9
    ),
}
FLAT = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # slices of v5e and v6e
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # slices of the others below one cube of 4x4x4


class Topology(NamedTuple):
    """`slices` slices of a TPU, each of `shape` chips."""

    platform = "tpu"  # as jax calls its devices
    hosts = 1  # those of a slice follow from its shape; of GPUs there may be several
    name: str  # v4 | v5e | v5p | v6e | v7x
    chip: Chip
    shape: tuple
    slices: int

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def one(self) -> str:
        """As the user spells one slice."""
        return _spelled(self.name, self.shape)

    @property
    def compiler_name(self) -> str:
        """As the TPU compiler spells one slice."""
        return f"{self.chip.platform}:{'x'.join(map(str, self.shape))}"

    def reach(self, devices) -> tuple[int, int]:
        """How many slices a group of devices spans, and by how many links data enters its worst placed chip in one."""
        slices = {getattr(d, "slice_index", 0) or 0 for d in devices}
        spans = tuple(len({d.coords[i] for d in devices}) for i in range(len(self.shape)))
        return len(slices), rings(self.chip, self.shape, spans)

    def __str__(self) -> str:
        return self.one if self.slices == 1 else f"{self.slices} slices of {self.one}"


def topology(text: str, slices: int = 1, hosts: int = 1) -> Topology | gpus.Hosts:
    """What "v5e:4x4" or "h100:8" means, and a number of such slices of TPUs or hosts of GPUs.

    ValueError: no such chip, or no such slice or host; it says which there are, and the nearest ones.
    """
    if gpus.named(text):
        if slices != 1:
            raise ValueError(f"slices is {slices}, and {text!r} are GPUs, of which there are hosts: give --hosts")
        return gpus.topology(text, hosts)
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text.strip().lower())
    name = {"tpu7x": "v7x"}.get(match[1], match[1]) if match else ""
    if name not in TPUS:
        raise ValueError(
            f"topology {text!r} is unknown: write one of {', '.join(TPUS)} and the chips of a slice in each dimension, "
            f"as v5e:4x8 or v5p:4x4x4; or one of {', '.join(gpus.GPUS)} and the GPUs of a host, as h100:8"
        )
    if hosts != 1:
        raise ValueError(f"hosts is {hosts}, and {text!r} are TPUs, whose slice says its hosts: give --slices")
    if slices < 1:
        raise ValueError(f"slices is {slices}: at least one is needed")
    chip, shape = TPUS[name], tuple(map(int, match[2].split("x")))
    known = shapes(chip)
    if shape not in known:
        like = sorted(known, key=lambda s: (abs(math.log(max(math.prod(shape), 1) / math.prod(s))), s))[:3]
        raise ValueError(
            f"topology {text!r} does not exist: a slice of {name} has {chip.dims} dimensions, the longest last, from "
            f"{_spelled(name, known[0])} to {_spelled(name, known[-1])} chips; nearest in size are "
            f"{' and '.join(_spelled(name, s) for s in like)}"
        )
    return Topology(name, chip, shape, slices)


def shapes(chip: Chip) -> list[tuple]:
    """The slices of a chip.

    Pairs of powers of two in two dimensions; cubes of 4x4x4 and a few smaller ones in three.
    """
    if chip.dims == 2:
        return list(FLAT)
    steps = range(4, max(chip.largest) + 1, 4)
    cubes = [
        s for s in itertools.combinations_with_replacement(steps, 3) if all(a <= b for a, b in zip(s, chip.largest))
    ]
    return [*SMALL, *sorted(cubes, key=lambda s: (math.prod(s), s))]


def peak_flops(device_kind: str) -> float | None:
    """bf16 FLOP/s of one jax device of that kind by data sheet; None where it is not known, as of a CPU."""
    for chip in TPUS.values():
        if device_kind == chip.kind:
            return chip.bf16 / chip.devices
    return next((rate for name, rate in gpus.BF16.items() if re.search(rf"\b{name}\b", device_kind)), None)


def rings(chip: Chip, shape: tuple, spans: tuple) -> float:
    """Links by which data enters the worst placed chip of a group.

    The group spans `spans` chips of each dimension of a slice of `shape`. A dimension that is spanned whole and closes
    gives two links, one that is a line gives its end one, one that is not spanned none.
    """
    links = 0
    for span, whole in zip(spans, shape):
        if span < 2:
            continue
        # two dimensions close at one length alone, three at its multiples
        closes = whole == chip.closes if chip.dims == 2 else whole % chip.closes == 0
        links += 2 if span == whole and closes else 1
    return links


def _spelled(name: str, shape: tuple) -> str:
    return f"{name}:{'x'.join(map(str, shape))}"
