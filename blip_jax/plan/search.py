"""The best mesh, batch per chip and remat policy for a config on a topology.

Cheap bounds first, then the compiler for the most promising.
"""

from __future__ import annotations

import itertools
import time
from typing import Any, NamedTuple

from blip_jax.console import say
from blip_jax.plan import aot, plan, programs

# in the order of what they recompute; a row's share of memory (ViT-B on v5e), a guess until one is compiled
REMAT = {"none": 1.0, "dots": 0.7, "full": 0.45}
START = 64  # rows a device of the first one compiled, from which the others' memory is estimated


class Candidate(NamedTuple):
    """A config with one choice of each, and what is known of it without a compiler."""

    mesh: tuple
    batch: int  # per device
    remat: str
    request: Any
    known: int  # bytes of state and batch on a device

    @property
    def label(self) -> str:
        return f"mesh {self.mesh}, {self.batch} a device, remat {self.remat}"


def candidates(request: plan.Request) -> list[Candidate]:
    """Every choice that the config allows and whose state fits by itself.

    First come those that send least (no tensor axis, little fsdp), then those that recompute least, then those of the
    largest batch, for which the sum of the gradients is spread over the most images.

    Meshes: data x fsdp with fsdp 1, 8 and what a slice has at most, of GPUs all hosts, tensor 1 or 2; batches: the
    config's, and 16 to 256 a device; the queue is cut to whole batches. ValueError: nothing fits.
    """
    topology = request.topology
    own = max(request.cfg.train.batch // topology.devices, 1)
    inside = topology.devices // topology.slices
    meshes = [
        (topology.devices // (f * t), f, t)
        for f, t in itertools.product(sorted({1, min(8, inside), inside}), (1, 2))
        if topology.devices % (f * t) == 0 and (topology.devices // (f * t)) % topology.slices == 0
    ]

    out = []
    for mesh in meshes:
        choices = itertools.product(sorted({own, 16, 32, 64, 128, 256}), REMAT)
        try:  # heads or embedding that do not divide, a group that the batch does not hold: no candidate
            requests = [(batch, remat, _request(request, mesh, batch, remat)) for batch, remat in choices]
            parts = programs.arguments(plan.made(requests[0][2])[0])
        except ValueError as e:
            say(f"search: mesh {mesh} is left out: {str(e).splitlines()[-1].strip()}")
            continue

        # the state is the same for every batch and policy; the batch's own bytes grow with its rows
        state = sum(size for name, size in parts.items() if name != "batch")
        row = parts["batch"] // requests[0][0]
        found = [Candidate(mesh, batch, remat, asked, state + row * batch) for batch, remat, asked in requests]
        out += [c for c in found if c.known < topology.chip.usable]
    if not out:
        raise ValueError(
            f"the state of this config does not fit on {topology} with any mesh: take a larger one or a smaller model"
        )
    return sorted(out, key=lambda c: (c.mesh[2], c.mesh[1], _rank(c), -c.batch))


def _request(request: plan.Request, mesh: tuple, batch: int, remat: str) -> plan.Request:
    cfg = request.cfg.copy_and_resolve_references()
    with cfg.unlocked():
        cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor = mesh
        cfg.train.batch, cfg.model.remat = batch * request.topology.devices * cfg.optim.accumulate, remat
        cfg.loss.queue -= cfg.loss.queue % cfg.train.batch
        if cfg.loss.group_size and cfg.train.batch % cfg.loss.group_size:
            cfg.loss.group_size = batch
    return plan.request(cfg, request.topology, request.workload)


def run(request: plan.Request, tries: int, exact: bool = False, timeout: float = 3600.0) -> dict:
    """Compiles the `tries` most promising candidates.

    Returns {"fits", "tried": rows, "best": the plan of the best that fits, or None}.

    Temporaries grow with the rows of a device: one compiled candidate tells about what all others of its remat policy
    need. The next is the first that should fit; those that would be more than a twentieth too large are left out. In
    the result those that fit come first, the fastest of them first.
    """
    if request.workload != "train":
        raise ValueError(
            f"--search is for training, not for {request.workload}: give --workload=train and a training config"
        )
    if how := aot.missing(request.topology):
        raise ValueError(how + "; what fits cannot be searched without it")

    started = time.monotonic()
    left = candidates(request)
    tried, plans = [], []
    per_row = {}  # remat policy -> bytes of temporaries that a row of a device takes
    say(f"search: {len(left)} candidates whose state fits {request.topology}; the {tries} most promising are compiled")
    while left and len(tried) < tries:
        one = _next(left, per_row, request.topology.chip.usable)
        left.remove(one)
        say(f"search: {len(tried) + 1} of {tries}, {time.monotonic() - started:.0f} s so far: {one.label}")
        made = plan.make(one.request, exact, timeout)

        row = made["programs"][0]
        plans.append(made)
        tried.append(
            {
                "mesh": list(one.mesh),
                "batch_per_device": one.batch,
                "remat": one.remat,
                "fits": made["fits"],
                "needed": row["needed"],
                "usable": row["usable"],
                "images_per_s": made["images_per_s"],
                "bound": row["bound"],
            }
        )
        per_row[one.remat] = (row["needed"] - one.known) / one.batch
        left = [c for c in left if not _too_large(c, one, per_row[one.remat], row["usable"])]
        if made["fits"]:
            left = [c for c in left if not _no_better(c, one)]

    order = sorted(range(len(tried)), key=lambda i: (not tried[i]["fits"], -tried[i]["images_per_s"]))
    fits = bool(order) and tried[order[0]]["fits"]
    return {
        "fits": fits,
        "topology": str(request.topology),
        "tried": [tried[i] for i in order],
        "best": plans[order[0]] if fits else None,
    }


def _rank(c: Candidate) -> int:
    return list(REMAT).index(c.remat)


def _next(left: list[Candidate], per_row: dict[str, float], usable: float) -> Candidate:
    """The first of `left` that should fit, or the one that comes nearest.

    Judged by the bytes of a row in each remat policy compiled so far.
    """
    if not per_row:
        return next((c for c in left if c.batch == START), left[0])

    def needs(c):
        like = c.remat if c.remat in per_row else min(per_row, key=lambda remat: abs(REMAT[remat] - REMAT[c.remat]))
        return c.known + per_row[like] * REMAT[c.remat] / REMAT[like] * c.batch

    return next((c for c in left if needs(c) <= usable), min(left, key=needs))


def _too_large(c: Candidate, tried: Candidate, per_row: float, usable: float) -> bool:
    """Whether `c` would not fit, if a row needs as much as it did in `tried`, which recomputes as much or more."""
    return _rank(c) <= _rank(tried) and c.known + per_row * c.batch > 1.05 * usable


def _no_better(c: Candidate, fits: Candidate) -> bool:
    """Whether `c` does the same as one that fits on a smaller batch or with more recomputation."""
    return c.mesh == fits.mesh and c.batch <= fits.batch and _rank(c) >= _rank(fits)


def table(found: dict) -> str:
    """What was compiled, the best that fits first, and the plan of that one."""
    lines = [f"{'mesh':16} {'a device':>8} {'remat':>6} {'needs':>12} {'of':>12} {'images/s':>10}  bound by"]
    for row in found["tried"]:
        rate = f"{row['images_per_s']:10,.0f}  {row['bound']}" if row["fits"] else f"{'-':>10}  does not fit"
        lines.append(
            f"{str(tuple(row['mesh'])):16} {row['batch_per_device']:8} {row['remat']:>6} {plan.gib(row['needed']):>12} "
            f"{plan.gib(row['usable']):>12} {rate}"
        )
    nothing = "nothing that was compiled fits: raise --tries, take a larger topology or a smaller model"
    end = plan.table(found["best"]) if found["best"] else nothing
    return "\n".join([*lines, "", end])
