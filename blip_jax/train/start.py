"""What a new run starts from: random parameters, or those of checkpoints, with the momentum copies that converted
ones bring."""

from __future__ import annotations

import math
import pathlib
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from blip_jax import checkpoint, trees
from blip_jax.console import plain, say
from blip_jax.convert import origins, read
from blip_jax.convert.apply import folded
from blip_jax.data.order import Order
from blip_jax.inference.load import read_for
from blip_jax.models import initial
from blip_jax.models.build import Start, fit
from blip_jax.parallel import sharding
from blip_jax.train import kept
from blip_jax.train import state as train_state


def fit_params(loaded: dict, shapes: dict, origin: str, partial: bool = False, start: Start = Start()) -> dict:
    """`models.build.fit`, which see for arguments and errors, saying what did not simply agree; its parameters."""
    fitted = fit(loaded, shapes, origin, start, partial)
    if fitted.resized:
        say(f"{origin}: position table resized from {fitted.resized[0]} to {fitted.resized[1]} positions")
    if fitted.random:
        say(
            f"{origin}: {len(fitted.random)} parameters have no origin in a checkpoint of pre-training and start "
            f"random: "
            f"{', '.join(folded(fitted.random))}"
        )
    if fitted.missing:
        say(
            f"{origin}: {len(fitted.missing)} parameters are not in these initial weights and start random: "
            f"{', '.join(folded(fitted.missing))}"
        )
    if fitted.unused:
        say(
            f"{origin}: {len(fitted.unused)} parameters have no place in this model and are left out: "
            + ", ".join(fitted.unused[:8])
            + (", ..." if len(fitted.unused) > 8 else "")
        )
    return fitted.params


def placed(params: dict, shardings: dict) -> dict:
    """NumPy arrays that every process holds whole, on the devices; takes them out of `params` one by one."""
    arrays, places, out = dict(trees.paths(params)), dict(trees.paths(shardings)), {}
    params.clear()  # each array is let go as soon as the devices have it
    for path in list(arrays):
        x = arrays.pop(path)
        out[path] = jax.make_array_from_callback(x.shape, places[path], lambda index, x=x: x[index])
    return trees.nest(out.items())


def located(run) -> list[tuple[str, pathlib.Path]]:
    """The origins that train.init_from names, each with what is there now, the newest checkpoint of a workdir, say."""
    return [(name, read.locate(name)) for name in origins.names(run.cfg.train.init_from)]


def load(run, found: list | None = None) -> dict | None:
    """Parameters of `train.init_from` fitted to this model, in the dtypes of its state, or None for a random start.
    ValueError: another vocabulary's.

    found: of `located`. Several origins, separated by commas, add up; of a parameter that two of them have, the later
    one's counts.
    """
    found, begins = located(run) if found is None else found, getattr(run.task, "BEGINS_FROM", "")
    if not found:
        if begins:
            say(
                f"WARNING: train.init_from is empty, so that objective {run.cfg.objective} trains random parameters: "
                f"name {begins}"
            )
        return None
    sources = [(origin, read_for(run.cfg, path)) for origin, path in found]
    if begins and (done := [origin for origin, x in sources if x.cfg.objective == run.cfg.objective]):
        say(
            f"WARNING: {', '.join(done)} was trained for objective {run.cfg.objective} before: this run goes on with a "
            f"finished model, where the paper's starts from {begins}"
        )
    given = origins.together(run.cfg, sources)
    for origin, both in given.replaced.items():
        say(f"{origin}: its {len(both)} parameters take the place of the earlier origins': {', '.join(folded(both))}")
    for origin in dict.fromkeys(given.parts.values()) if len(found) > 1 else ():
        say(f"{', '.join(part for part, of in given.parts.items() if of == origin)} from {origin}")
    shapes = trees.merge(run.shapes.params, run.shapes.frozen)
    return fit_params(given.params, shapes, " + ".join(origin for origin, _ in found), given.partial, given.start)


WINDOWS = ("text.buckets", "text.bucket_window", "text.max_len")  # which examples form a batch


def order(run, newest: int, before: dict) -> Order:
    """Which examples come after checkpoint `newest`, written with the settings `before`, by path; says where they go on
    if the batch or the windows have changed.

    ValueError: settings that no run can have had.
    """
    folder = checkpoint.folders(run.workdir)[newest]
    saved, now = checkpoint.load_data(folder), trees.flat(plain(run.cfg))
    was = {name: before.get(name, now[name]) for name in ("train.batch", "data.epoch_examples", *WINDOWS)}
    windows = {name.removeprefix("text."): was[name] for name in WINDOWS}
    try:
        old = Order(**saved["order"])._replace(left=tuple(saved["order"]["left"])) if "order" in saved else Order()
        # of a checkpoint that did not count, all steps had its batch
        steps = max((was["data.epoch_examples"] or run.data.epoch_examples) // was["train.batch"], 1)
        epoch = saved.get("epoch", newest / steps)
        same = was["train.batch"] == now["train.batch"] and (
            all(was[name] == now[name] for name in WINDOWS) or not was["text.buckets"] and not now["text.buckets"]
        )
        if same and math.isclose(old.epochs(newest, run.epoch_steps), epoch, rel_tol=1e-9):
            return old
        left, following = run.data.unseen(newest, old, batch=was["train.batch"], **windows)
    except (TypeError, ValueError, ArithmeticError, LookupError) as e:
        raise ValueError(
            f"checkpoint {folder} does not say which examples it has seen ({type(e).__name__}: {e}): its settings or "
            "its data entry were changed; put them back, or begin anew in another workdir with train.init_from"
        ) from e
    new = Order(newest, following, left, epoch)
    what = [f"{name}: {was[name]} -> {now[name]}" for name in ("train.batch", *WINDOWS) if was[name] != now[name]]
    say(
        f"{', '.join(what) or 'the length of an epoch changed'}: {new.examples(newest, 0)} examples, {epoch:.4g} "
        f"epochs, were seen; it goes on with example {new.number(0)}"
        + (f", the first of {len(left)} that were left of a window of texts" if left else "")
    )
    return new


def aligned(run, state):
    """The state with the queues' place a multiple of the batch, as it must be when that has changed: enqueuing never
    wraps in the middle of one."""
    queue = (state.extra or {}).get("queue")
    if not queue or not (over := int(queue["ptr"]) % run.cfg.train.batch):
        return state
    ptr = np.int32((int(queue["ptr"]) - over + run.cfg.train.batch) % len(queue["img"]))
    moved = placed({"ptr": ptr}, {"ptr": run.shardings.extra["queue"]["ptr"]})
    return state.replace(extra=state.extra | {"queue": queue | moved})


class Frozen(NamedTuple):
    """Frozen parameters of a run that goes on: NumPy arrays as the state has them, and the reference to write from now
    on."""

    params: dict
    reference: dict | None


def load_frozen(run, newest: int) -> Frozen:
    """The frozen parameters of checkpoint `newest`, from their origin, which train.init_from may name anew if it moved.

    ValueError: `read.frozen`; an origin in the workdir itself, whose checkpoints come and go.
    """
    folder = checkpoint.folders(run.workdir)[newest]
    reference = checkpoint.load_data(folder).get("frozen")
    if not reference:
        return Frozen({}, None)
    named = origins.names(run.cfg.train.init_from)
    moved = named if named != [origin["given"] for origin in reference["origins"]] else []
    found = located(run) if moved else []
    if inside := [name for name, path in found if path.is_relative_to(run.workdir)]:
        raise ValueError(
            f"train.init_from is {inside[0]}, a checkpoint of this run itself, and frozen parameters are not in its "
            "checkpoints: name the origin they came from, or leave train.init_from as it was"
        )
    if moved:
        reference = reference | {"origins": [origins.origin(name, path, run.workdir) for name, path in found]}
    params = dict(trees.paths(read.frozen(folder, moved)))
    names = " + ".join(origin["at"] for origin in reference["origins"]) or "their seed"
    say(f"frozen parameters restored from {names}: {origins.summary(reference['leaves'])}")
    used = {path: np.asarray(params.pop(path), x.dtype) for path, x in trees.paths(run.shapes.frozen)}
    if any(str(x.dtype) != reference["leaves"][path]["dtype"] for path, x in used.items()):  # model.dtype changed
        reference = reference | {"leaves": {path: origins.leaf(x) for path, x in used.items()}}
    return Frozen(trees.nest(used.items()), reference)


def reference(run, state, found: list) -> dict | None:
    """How the checkpoints of a new run refer to the frozen parameters of its state, which came from what `located`
    found; None where there are none.
    """
    if not state.frozen:
        return None

    def whole(x):
        everywhere = NamedSharding(run.mesh, PartitionSpec())
        return np.asarray(x if x.is_fully_addressable else jax.jit(lambda x: x, out_shardings=everywhere)(x))

    return {
        "origins": [origins.origin(name, path, run.workdir) for name, path in found],
        "random": origins.random_settings(run.cfg),
        "leaves": {path: origins.leaf(whole(x)) for path, x in trees.paths(state.frozen)},
    }


def _momentum_of(run, origin: str) -> dict:
    """{"params", "queue"}, as far as they are there, that a checkpoint of others brings, converted or not; {} for
    a run of ours."""
    at = read.locate(origin)
    if (at / "state").is_dir() and not checkpoint.load_data(at).get("converted"):
        return {}
    return read_for(run.cfg, at, momentum=True).state.get("momentum", {})


def create(run, loaded: dict | None):
    """A new state on the mesh; with `loaded`, which is emptied, parameters and momentum copies start from it."""
    key = jax.random.key(run.cfg.seed)
    if loaded is None:

        def make(settings):
            fresh = lambda key: train_state.create(settings, run.model, run.tx, key)
            return jax.jit(fresh, out_shardings=run.shardings)

        return kept.of(run.cfg, make, "create", run.mesh)(key)
    say(f"parameters start from {run.cfg.train.init_from}")
    lacking = (
        dict(trees.paths(trees.merge(run.shapes.params, run.shapes.frozen))).keys() - dict(trees.paths(loaded)).keys()
    )

    def fitted(key, params):
        if lacking:
            fresh = dict(trees.paths(initial.of_run(run.cfg, run.model, key)))
            params = trees.merge(params, trees.nest((path, fresh[path]) for path in lacking))
        return train_state.create(run.cfg, run.model, run.tx, key, params)

    # donated: the state takes over the arrays, and no parameter is on the devices twice
    make = jax.jit(fitted, out_shardings=run.shardings, donate_argnums=1)
    state = make(key, placed(loaded, sharding.shardings_for(loaded, run.mesh)))
    momentum = _init_momentum(run)
    if momentum:
        extra = {name: x | momentum[name] if name in momentum else x for name, x in state.extra.items()}
        state = state.replace(extra=jax.device_put(extra, run.shardings.extra))
    return state


def _init_momentum(run) -> dict | None:
    """Momentum copies and queue of a converted `train.init_from`, as far as this config has a place for them, else
    None.

    What a run of ours left continues by resuming that run; a converted checkpoint can only be begun from.
    """
    want, named = run.shapes.extra, origins.names(run.cfg.train.init_from)
    found = [(origin, momentum) for origin in named if (momentum := _momentum_of(run, origin))] if want else []
    if not found:
        return None
    out, (origin, momentum) = {}, found[-1]
    if momentum.get("params"):
        say(f"{origin}: the momentum encoder starts from its momentum encoder")
        out["params"] = fit_params(momentum["params"], want["params"], f"momentum encoder of {origin}")
    if momentum.get("queue") and want["queue"]:
        have, need = momentum["queue"], want["queue"]
        if have["img"].shape != need["img"].shape:
            say(
                f"{origin}: its queues are of {len(have['img'])} features, loss.queue is {len(need['img'])}: they "
                f"start anew"
            )
        else:
            out["queue"] = {name: np.asarray(have[name]).astype(x.dtype) for name, x in need.items() if name in have}
            # of pre-training: as the original, from the beginning, of no image
            if "image_id" in need and "image_id" not in have:
                del out["queue"]["ptr"]
            else:  # enqueuing never wraps in the middle of a batch
                out["queue"]["ptr"] -= out["queue"]["ptr"] % run.cfg.train.batch
            say(f"{origin}: the queues start from its {len(have['img'])} features")
    return out


def check_resume(manager, step: int, run) -> dict:
    """Says which settings changed since checkpoint `step`; returns those that wrote it, by path. ValueError: they
    changed the model or the optimiser."""
    folder = run.workdir / checkpoint.SUBDIR / str(step)
    before, now = trees.flat(checkpoint.load_config(folder)), trees.flat(plain(run.cfg))
    changed = [
        f"{name}: {before.get(name, 'absent')!r} -> {now.get(name, 'absent')!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    try:
        reference = checkpoint.load_data(folder).get("frozen") or {"leaves": {}}
        elsewhere = {f"frozen/{path}": tuple(leaf["shape"]) for path, leaf in reference["leaves"].items()}
        checkpoint.check_same(manager, step, run.shapes, elsewhere)
    except checkpoint.Damaged:
        raise
    except ValueError as e:
        listing = "\n  ".join(changed) or "none"
        raise ValueError(f"{e}\nsettings that changed since it was written:\n  {listing}") from None
    say(f"resuming from checkpoint {step}; settings changed since: {'; '.join(changed) or 'none'}")
    return before
