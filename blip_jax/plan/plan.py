"""What a config would need and reach on a TPU slice or on hosts of GPUs, before anyone rents them.

Memory, FLOPs, collectives, and the best time of a step.

The analytic part (state and batch on each device, FLOPs, their time at the chip's peak, bytes of gradients) comes from
the sizes and the sharding tables. The rest, temporaries and traffic and collectives, is what the chip's compiler makes
of the real step (`aot`). Times are lower bounds: every unit at its data sheet's rate, compute, memory and interconnect
at once.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from blip_jax import buckets, tasks
from blip_jax.capfilt import settings
from blip_jax.console import plain, say
from blip_jax.parallel import sharding
from blip_jax.plan import aot, chips, gpus, hlo, programs
from blip_jax.plan.reasons import reason

BIG = 2**20  # bytes a step from which a collective is listed by itself
LIMIT = 0.02  # share by which traced and analytic FLOPs may differ
CAVEAT = (
    "compiled at -O0, which is several times faster: temporaries may be some 15 % low, memory traffic is high, as "
    "less is fused; --exact compiles as a run does"
)


class Words(NamedTuple):
    """What a plan calls things."""

    chip: str
    compiler: str
    wires: tuple  # inside a slice or a host, and between them


TPU = Words("chip", "TPU compiler", ("in slice", "between"))
GPU = Words("GPU", "GPU compiler", ("NVLink", "network"))


class Request(NamedTuple):
    """What is planned. captioner, judge: configs of the models of a CapFilt run, None else."""

    cfg: Any
    topology: chips.Topology | gpus.Hosts
    workload: str  # train | evaluate | capfilt
    captioner: Any = None
    judge: Any = None

    @property
    def mesh(self) -> tuple:
        return mesh_shape(self.cfg, self.topology)


def request(cfg, topology: chips.Topology | gpus.Hosts, workload: str = "", captioner=None, judge=None) -> Request:
    """A checked request.

    ValueError: all that does not fit, the mesh, the batch, the slices, each with the nearest that does.
    """
    is_capfilt = "captioner" in cfg
    workload = workload or ("capfilt" if is_capfilt else "train")
    if is_capfilt != (workload == "capfilt"):
        raise ValueError(
            f"workload {workload} with a config of {'CapFilt' if is_capfilt else 'training'}: choose "
            + ("capfilt" if is_capfilt else "train or evaluate")
        )
    if is_capfilt:
        lacking = [
            flag
            for flag, c, part in (("--captioner", captioner, "decoder"), ("--filter", judge, "encoder"))
            if c is None or not getattr(tasks.build(c), part, False)
        ]
        if lacking:
            raise ValueError(
                f"a plan of CapFilt needs {' and '.join(lacking)}: the config of the training that makes the model "
                "(with a decoder for the captioner, with an encoder for the filter), as "
                "--captioner=configs/caption_coco.py:vitl --filter=configs/retrieval_coco.py:vitl"
            )
        settings.validate(cfg)
        if topology.devices % (cfg.mesh.fsdp * cfg.mesh.tensor):
            raise ValueError(
                f"mesh.fsdp * mesh.tensor is {cfg.mesh.fsdp} * {cfg.mesh.tensor}: it must divide the "
                f"{topology.devices} devices of the topology"
            )
        return Request(cfg, topology, workload, captioner, judge)
    own = cfg.copy_and_resolve_references().unlock()
    own.text.vocab = own.text.vocab or "sizes suffice"
    tasks.validate(own, None, 1, topology.devices)
    if workload == "train":
        tasks.trained(own)
    sharding.inside_slice(mesh_shape(cfg, topology), topology.slices)
    return Request(cfg, topology, workload)


def mesh_shape(cfg, topology: chips.Topology | gpus.Hosts) -> tuple:
    """(data, fsdp, tensor) of a valid `cfg.mesh` on the devices of a topology; CapFilt's data axis is what is left."""
    shape = [cfg.mesh[axis] if axis in cfg.mesh else -1 for axis in sharding.MESH]
    known = math.prod(n for n in shape if n > 0)
    return tuple(topology.devices // known if n == -1 else n for n in shape)


def made(request: Request, mesh=None) -> list[programs.Program]:
    """The programs of a request on `mesh`, by default an abstract one of the request's shape."""
    platform, kind = request.topology.platform, request.topology.chip.kind
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    types = (AxisType.Auto,) * 3
    mesh = mesh or AbstractMesh(request.mesh, sharding.MESH, axis_types=types, abstract_device=device)
    models = [c for c in (request.captioner, request.judge) if c is not None]
    return getattr(programs, request.workload)(request.cfg, mesh, *models)


def make(request: Request, exact: bool = False, timeout: float = 3600.0) -> dict:
    """The whole plan as a plain dict: what `table` prints and `save` writes.

    Without the compiler, its analytic part; "fits" is then False where the state alone is too much, and else None.
    """
    topology, parts = request.topology, made(request)
    out = {
        "config": plain(request.cfg),
        "workload": request.workload,
        "topology": str(topology),
        "chips": topology.chips,
        "devices": topology.devices,
        "mesh": dict(zip(sharding.MESH, request.mesh)),
        "compiler": "none",
        "programs": [analytic(p, request) for p in parts],
    }
    if topology.platform == "gpu":
        out["memory_fraction"] = topology.chip.fraction
    if how := aot.missing(topology):
        out["note"] = how + "; this is the analytic part alone"
        return finished(out, request)
    say(
        f"compiling {', '.join(p.name for p in parts)} for {topology}, {topology.devices} devices, mesh "
        f"{request.mesh}: some minutes"
    )
    found = aot.compile_programs(_wanted(request), exact, timeout)["programs"]
    out["compiler"] = aot.compiler_of(topology, exact)
    if topology.platform == "gpu":
        out["note"] = gpus.CAVEAT
    elif not exact:
        out["note"] = CAVEAT
    for row, result in zip(out["programs"], found):
        merge(row, result, topology)
    return finished(out, request)


def _wanted(request: Request) -> dict:
    configs = {"config": request.cfg, "captioner": request.captioner, "filter": request.judge}
    topology = request.topology
    return {
        "topology": topology.one,
        "slices": topology.slices,
        "hosts": topology.hosts,
        "mesh": list(request.mesh),
        "workload": request.workload,
    } | {name: plain(c) for name, c in configs.items() if c is not None}


def analytic(program: programs.Program, request: Request) -> dict:
    """What is known of a program without a compiler, per device."""
    topology, chip, parts = request.topology, request.topology.chip, programs.arguments(program)
    flops, again = program.flops / topology.devices, program.recomputed / topology.devices
    gradients = 0
    if program.name == programs.TRAINING:  # summed over devices in the dtype of the computation
        width = jax.numpy.dtype(request.cfg.model.dtype).itemsize
        gradients = sum(x.size * width for x in jax.tree.leaves(program.parts["parameters"]))
    reduced = hlo.travels("all-reduce", gradients, topology.devices)
    return {
        "name": program.name,
        "images": program.images,
        "flops": flops,
        "recomputed_flops": again,
        "memory": {k: v for k, v in parts.items() if v},
        "gradient_bytes": reduced,
        "seconds": {"compute": (flops + again) / (chip.bf16 / chip.devices)},
        "usable": chip.usable,
        "known": sum(parts.values()),
    }


def merge(row: dict, found: dict, topology: chips.Topology | gpus.Hosts) -> None:
    """Adds what the compiler found to a row of `analytic`."""
    chip = topology.chip
    row["traced_flops"] = found["traced_flops"] / topology.devices
    row["flops_agree"] = abs(row["traced_flops"] / (row["flops"] + row["recomputed_flops"]) - 1) <= LIMIT
    row["compile_seconds"] = found["seconds"]
    if "needed" in found:
        row["needed"] = found["needed"] + row["known"]
        row["fits"] = False
        return
    shown = sum(v for k, v in row["memory"].items() if k != "other model's parameters")
    row["memory"] |= {
        "padding of these": max(found["arguments"] - shown, 0),
        "activations and temporaries": found["temporaries"],
        "results": found["results"],
        "code": found["code"],
    }
    row["needed"] = sum(row["memory"].values())
    row["fits"] = row["needed"] <= chip.usable
    row["bytes"] = found["bytes"]
    row["collectives"] = _grouped([_timed(c, chip, row["name"] == programs.TRAINING) for c in found["collectives"]])
    row["seconds"] |= {
        "memory": found["bytes"] / (chip.hbm_rate / chip.devices),
        "interconnect": sum(c["seconds"] for c in row["collectives"]),
    }


def _timed(c: dict, chip: chips.Chip | gpus.Gpu, trains: bool = True) -> dict:
    """A collective, of a program that trains or does not, with what moves, and why.

    Also the bytes that a device receives a step, and the seconds that takes at the links' rate.
    """
    what, why = reason(c["kind"], c["op"], c["axis"], "gpu" if isinstance(chip, gpus.Gpu) else "tpu", trains)
    inside = c["devices"] // c["slices"]
    ici = hlo.travels(c["kind"], c["bytes"], inside) * c["count"]
    dcn = hlo.travels(c["kind"], c["bytes"] / max(inside, 1), c["slices"]) * c["count"]
    rate = c["links"] * chip.link / chip.devices or chip.on_chip
    return c | {
        "moves": what,
        "why": why,
        "ici": ici,
        "dcn": dcn,
        "seconds": chip.together(ici / rate, dcn / (chip.dcn / chip.devices)),
    }


def _grouped(collectives: list[dict]) -> list[dict]:
    """Those of one kind, axis and reason together.

    The largest one's arrays and place in our code, the sums of the rest.
    """
    out: dict = {}
    for c in collectives:
        key = c["kind"], c["axis"], c["moves"], c["why"]
        row = out.setdefault(
            key,
            {k: c[k] for k in ("kind", "axis", "moves", "why", "devices", "links", "arrays", "op")}
            | {"largest": c["bytes"]},
        )
        for name in ("count", "ici", "dcn", "seconds"):
            row[name] = row.get(name, 0) + c[name]
    return sorted(out.values(), key=lambda c: -c["seconds"])


def finished(out: dict, request: Request) -> dict:
    """Adds what follows for the whole: fits, the bound, the best step, images/s, days."""
    rows, topology, chip = out["programs"], request.topology, request.topology.chip
    for row in rows:
        row["bound"] = max(row["seconds"], key=row["seconds"].get)
        row["best_seconds"] = row["seconds"][row["bound"]]
        row["mfu_bound"] = row["flops"] / (chip.bf16 / chip.devices) / row["best_seconds"]
        # what is known without a compiler can be too much, but never shows that a program fits
        row.setdefault("fits", None if row["known"] <= row["usable"] else False)
    verdicts = [r["fits"] for r in rows]
    out |= {"fits": False if False in verdicts else None if None in verdicts else True}
    if request.workload == "evaluate" and len(rows) > 1:  # passes over different things: no single rate
        return out
    seconds, images = sum(r["best_seconds"] for r in rows), rows[0]["images"]
    out |= {
        "best_seconds": seconds,
        "images_per_s": images / seconds,
        "images_per_s_per_chip": images / seconds / topology.chips,
        "mfu_bound": sum(r["mfu_bound"] * r["best_seconds"] for r in rows) / seconds,
    }
    if request.workload == "train":
        out["days"] = request.cfg.train.steps * seconds / 86400
    return out


def save(plan: dict, path) -> None:
    """Writes a plan as JSON."""
    buckets.write(buckets.of(path, "--out"), json.dumps(plan, indent=1) + "\n")


def gib(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**27 else f"{n / 2**20:.2f} MiB"


def table(plan: dict) -> str:
    """The plan as text."""
    words = GPU if "memory_fraction" in plan else TPU
    lines = [
        f"{plan['workload']} on {plan['topology']}: {plan['chips']} {words.chip}s, {plan['devices']} devices, mesh "
        f"{tuple(plan['mesh'].values())} (data, fsdp, tensor); compiler: {plan['compiler']}"
    ]
    for row in plan["programs"]:
        lines += [
            "",
            f"{row['name']}, {row['images']} images a call",
            *_memory_lines(row),
            *_time_lines(row),
            *_collective_lines(row, words),
        ]
    if "images_per_s" in plan:
        lines += ["", _rate_line(plan, words)]
    notes = [plan["note"]] if "note" in plan else []
    if words is GPU:
        notes.append(_share(plan["memory_fraction"]))
    return "\n".join([*lines, _verdict(plan, words), *(f"note: {note}" for note in notes)])


def _share(fraction: float) -> str:
    return (
        f"of a GPU's memory {100 * fraction:.0f} % are counted as a program's, what jax takes at start: "
        f"{gpus.FRACTIONS[0]} of the environment, or {100 * gpus.FRACTION:.0f} %"
    )


def _rate_line(plan: dict, words: Words) -> str:
    rates = f"{plan['images_per_s']:,.0f} images/s, {plan['images_per_s_per_chip']:,.0f} a {words.chip}"
    days = f"; {plan['days']:.2f} days for the config's steps" if "days" in plan else ""
    if plan["compiler"] == "none":  # of three bounds only the one that every step could reach
        return f"by arithmetic alone at most {rates}{days}; memory and interconnect are not counted"
    return f"at best {rates}, MFU at most {100 * plan['mfu_bound']:.0f} %{days}"


def _verdict(plan: dict, words: Words) -> str:
    if plan["fits"] is None:
        left = min(row["usable"] - row["known"] for row in plan["programs"])
        return (
            f"NOT DECIDED: the state fits and leaves {gib(left)} per device; whether the activations fit into that "
            f"only the {words.compiler} says"
        )
    return "it fits" if plan["fits"] else "it does NOT fit"


def _memory_lines(row: dict) -> list[str]:
    lines = [f"  {name:28} {gib(size):>12}" for name, size in row["memory"].items() if size]
    needed, usable = row.get("needed", row["known"]), row["usable"]
    verdict = f"{gib(needed - usable)} too much" if row["fits"] is False else f"{gib(usable - needed)} free"
    if "needed" not in row:
        verdict += ", before activations"
    return [*lines, f"  {'together':28} {gib(needed):>12} of {gib(usable)} per device: {verdict}"]


def _time_lines(row: dict) -> list[str]:
    again = f" and {row['recomputed_flops'] / 1e12:.3f} recomputed or padding" if row["recomputed_flops"] else ""
    lines = [
        f"  {row['flops'] / 1e12:.3f} TFLOP a device by formula{again}"
        + (
            f", {row['traced_flops'] / 1e12:.3f} in the traced "
            f"program{'' if row['flops_agree'] else ': they DIFFER by more than 2 %'}"
            if "traced_flops" in row
            else ""
        )
    ]
    lines += [f"  {row['bytes'] / 1e9:.1f} GB of memory traffic"] if "bytes" in row else []
    times = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in row["seconds"].items())
    return [*lines, f"  at least: {times}; bound by {row['bound']}, {1e3 * row['best_seconds']:.2f} ms"]


def _collective_lines(row: dict, words: Words) -> list[str]:
    if not row.get("collectives"):
        return [f"  gradients: {gib(row['gradient_bytes'])} to receive a step"] if row["gradient_bytes"] else []
    inside, between = words.wires
    lines = [f"  {'collective':18} {'axis':22} {'times':>6} {inside:>12} {between:>12} {'ms':>8}  what, why"]
    big = [c for c in row["collectives"] if c["ici"] + c["dcn"] >= BIG]
    for c in big:
        between = gib(c["dcn"]) if c["dcn"] else "-"
        lines.append(
            f"  {c['kind']:18} {c['axis']:22} {c['count']:6} {gib(c['ici']):>12} {between:>12} "
            f"{1e3 * c['seconds']:8.2f}  {c['moves']} ({c['arrays']}): {c['why']}"
        )
    small = len(row["collectives"]) - len(big)
    return lines + ([f"  and {small} kinds of less than 1 MiB a step"] if small else [])
