"""What the parameters of a run come from: origins that add up, and the reference that stands for frozen parameters in a
checkpoint.

A checkpoint does not hold parameters that never change (`optim.freeze`): BLIP-2 would write a language model each time.
It refers to them under "frozen" of its data:

  origins   of train.init_from, in order: {"given": as it was named, "at": absolute path, or name on the hub, "beside":
            path from the workdir, which stays right where both move together}
  random    settings of the random numbers that parameters without origin are
  leaves    {path: {"dtype", "shape", "crc"}}, as the state has them: rounded to the dtype of the computation, the
            position table resized

`read.frozen` restores them.
"""

from __future__ import annotations

import os
import pathlib
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from blip_jax import buckets, tasks, trees
from blip_jax.convert.rules.families import INITIAL
from blip_jax.convert.source import Source
from blip_jax.models import initial
from blip_jax.models.build import Start, fit
from blip_jax.parallel import sharding

REMEDY = (
    "put back what was there; or, if it only moved, name where it lies now with train.init_from, to go on training, or "
    "lay a link to it where it was"
)
SHOWN = 5  # parameters that differ, of which a message names so many


class Together(NamedTuple):
    """Parameters of several origins as one."""

    params: dict  # nested NumPy
    start: Start  # how those of the model are found among them
    partial: bool  # whether some may be missing: all origins are initial weights
    replaced: dict[str, list[str]]  # origin -> paths of which an earlier one has parameters, too
    parts: dict[str, str]  # part, a top-level name of the parameters -> the last origin that has some of it


def names(init_from: str) -> list[str]:
    """The origins that train.init_from names, separated by commas; one within the name of what exists separates
    nothing."""
    out, parts = [], init_from.split(",")
    while parts:
        joined = (",".join(parts[:n]) for n in range(len(parts), 0, -1))  # the longest that exists
        name = next((name for text in joined for name in (text, text.strip()) if name and _exists(name)), parts[0])
        del parts[: name.count(",") + 1]
        out += [name if _exists(name) else name.strip()] * bool(name.strip())
    return out


def _exists(path: str) -> bool:
    try:
        return buckets.of(path).exists() if buckets.is_bucket(path) else pathlib.Path(path).exists()
    except OSError:  # a name too long
        return False


def together(cfg, sources: Sequence[tuple[str, Source]]) -> Together:
    """What (name, checkpoint as read) give a run of `cfg`; of a parameter that two of them have, the later one's
    counts."""
    params, replaced, parts = {}, {}, {}
    for name, source in sources:
        new = dict(trees.paths(source.state["params"]))
        parts |= {path.split("/")[0]: name for path in new}
        if both := sorted(new.keys() & params.keys()):
            replaced[name] = both
        params |= new
    # a checkpoint of this very task fits as it is; else the task may say what its parameters start from
    whole = [source for _, source in sources if source.family not in INITIAL] or [source for _, source in sources]
    own = {source.cfg.objective for source in whole} == {cfg.objective}
    start = Start() if own else getattr(tasks.of(cfg), "START", Start())
    partial = all(source.family in INITIAL for _, source in sources)
    return Together(trees.nest(params.items()), start, partial, replaced, parts)


# --- references -------------------------------------------------------------------------------------------------------
def origin(given: str, found: pathlib.Path, workdir: pathlib.Path) -> dict:
    """How a checkpoint in `workdir` names an origin, of which `read.locate` found that path."""
    if buckets.is_bucket(given) or buckets.is_bucket(workdir):  # one has no path from the other
        return {"given": given, "at": str(buckets.spelled(found)) if _exists(given) else given}
    if not pathlib.Path(given).exists():
        return {"given": given, "at": given}  # a name on the hub, whose cache may be emptied
    return {"given": given, "at": str(found), "beside": os.path.relpath(found, workdir)}


def place(origin: dict, workdir: pathlib.Path) -> str:
    """Where an origin of a checkpoint in `workdir` is to be read: where it was, else as far from the workdir as it
    was."""
    if "beside" not in origin:
        return origin["at"]
    beside = workdir / origin.get("beside", "")
    moved = not pathlib.Path(origin["at"]).exists() and beside.exists()
    return os.path.normpath(beside) if moved else origin["at"]


def random_settings(cfg) -> dict:
    """What decides the numbers that a new run of `cfg` draws."""
    return {"seed": cfg.seed, "init_std": cfg.model.init_std, "pos_std": cfg.model.vit.pos_std}


def leaf(x: np.ndarray) -> dict:
    """{"dtype", "shape", "crc": crc32 of the bytes in C order} of an array."""
    raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return {"dtype": str(x.dtype), "shape": list(x.shape), "crc": f"{zlib.crc32(raw):08x}"}


def summary(leaves: dict) -> str:
    """Number of `leaves` and one checksum of them all."""
    lines = (f"{path} {_said(leaves[path])}\n" for path in sorted(leaves))
    return f"{len(leaves)} parameters, checksum {zlib.crc32(''.join(lines).encode()):08x}"


def described(params: dict, leaves: dict) -> dict:
    """`leaf` of each of nested NumPy arrays, rounded to the dtype that `leaves` say; one at a time."""
    return {path: leaf(np.asarray(x, jax.numpy.dtype(leaves[path]["dtype"]))) for path, x in trees.paths(params)}


def differences(leaves: dict, found: dict) -> list[str]:
    """Lines that name the parameters in which leaves and those found differ, and the two checksums of each."""
    other = [path for path in sorted(leaves) if leaves[path] != found[path]]
    more = [f"... and {len(other) - SHOWN} more"] if len(other) > SHOWN else []
    return [f"{path}: expected {_said(leaves[path])}, found {_said(found[path])}" for path in other[:SHOWN]] + more


def _said(leaf: dict) -> str:
    return f"{leaf['dtype']}{leaf['shape']} {leaf['crc']}"


# --- restoring --------------------------------------------------------------------------------------------------------
def restored(reference: dict, cfg, sources: Sequence[tuple[str, Source]], name: str) -> dict:
    """The parameters that a checkpoint of `cfg` refers to, nested NumPy f32, of its origins as read; not checked.

    name: of the origins, for messages. ValueError: they hold another model.
    """
    leaves, found = reference["leaves"], {}
    if sources:
        given = together(cfg, sources)
        shapes = {path: jax.ShapeDtypeStruct(tuple(leaf["shape"]), np.float32) for path, leaf in leaves.items()}
        fitted = fit(given.params, trees.nest(shapes.items()), name, given.start, given.partial)
        found = dict(trees.paths(fitted.params))
    found |= drawn(cfg, reference["random"], leaves.keys() - found.keys())
    return trees.nest(found.items())


def drawn(cfg, random: dict, paths: Iterable[str]) -> dict[str, np.ndarray]:
    """Random parameters as a new run of `cfg` draws them, of these paths; each process draws all for itself."""
    paths, cfg = list(paths), cfg.copy_and_resolve_references().unlock()
    if not paths:
        return {}
    cfg.model.init_std, cfg.model.vit.pos_std = random["init_std"], random["pos_std"]
    model, mesh = tasks.build(cfg), sharding.mesh_of((1, 1, 1), jax.local_devices()[:1])

    def draw():
        every = dict(trees.paths(initial.of_run(cfg, model, jax.random.key(random["seed"]))))
        return {path: every[path] for path in paths}

    with jax.set_mesh(mesh):  # not that of a run, which may reach over other processes
        return jax.device_get(jax.jit(draw, out_shardings=NamedSharding(mesh, PartitionSpec()))())
