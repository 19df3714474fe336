"""What a new run starts from: random parameters, or those of checkpoints, with the momentum copies that converted
ones bring."""

from __future__ import annotations

import jax
import numpy as np

from blip_jax import checkpoint, trees
from blip_jax.console import say
from blip_jax.convert import read
from blip_jax.convert.apply import folded
from blip_jax.convert.rules.blip import INITIAL
from blip_jax.inference.load import read_for
from blip_jax.models.build import Start, fit
from blip_jax.parallel import sharding
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
    """Numpy arrays that every process holds whole, on the devices."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]), params, shardings
    )


def load(run) -> dict | None:
    """Parameters of `train.init_from` fitted to this model, or None for a random start. ValueError: another
    vocabulary's.

    Several origins, separated by commas, add up; of a parameter that two of them have, the later one's counts.
    """
    origins, loaded, partial, kinds = _origins(run), {}, True, set()
    if not origins:
        return None
    for origin in origins:
        found = read_for(run.cfg, origin)
        partial = partial and found.family in INITIAL
        kinds.add(found.cfg.objective)
        new = dict(trees.paths(found.state["params"]))
        if both := sorted(new.keys() & loaded.keys()):
            say(
                f"{origin}: its {len(both)} parameters take the place of the earlier origins': "
                f"{', '.join(folded(both))}"
            )
        loaded |= new
    # a checkpoint of this very task fits as it is; else the task may say what its parameters start from
    own = kinds == {run.cfg.objective}
    begin = Start() if own else getattr(run.task, "START", Start())
    shapes = trees.merge(run.shapes.params, run.shapes.frozen)
    return fit_params(trees.nest(loaded.items()), shapes, " + ".join(origins), partial, begin)


def _origins(run) -> list[str]:
    return [origin.strip() for origin in run.cfg.train.init_from.split(",") if origin.strip()]


def _momentum_of(run, origin: str) -> dict:
    """{"params", "queue"}, as far as they are there, that a checkpoint of others brings, converted or not; {} for
    a run of ours."""
    at = read.locate(origin)
    if (at / "state").is_dir() and not checkpoint.load_data(at).get("converted"):
        return {}
    return read_for(run.cfg, at, momentum=True).state.get("momentum", {})


def create(run, loaded: dict | None):
    """A new state on the mesh; with `loaded`, parameters and momentum copies start from it."""
    key = jax.random.key(run.cfg.seed)
    if loaded is None:
        return jax.jit(lambda key: train_state.create(run.cfg, run.model, run.tx, key), out_shardings=run.shardings)(
            key
        )
    say(f"parameters start from {run.cfg.train.init_from}")
    lacking = (
        dict(trees.paths(trees.merge(run.shapes.params, run.shapes.frozen))).keys() - dict(trees.paths(loaded)).keys()
    )

    def fitted(key, params):
        if lacking:
            fresh = dict(trees.paths(train_state.init_params(run.cfg, run.model, jax.random.split(key, 3)[0])))
            params = trees.merge(params, trees.nest((path, fresh[path]) for path in lacking))
        return train_state.create(run.cfg, run.model, run.tx, key, params)

    make = jax.jit(fitted, out_shardings=run.shardings)
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
    want = run.shapes.extra
    found = [(origin, momentum) for origin in _origins(run) if (momentum := _momentum_of(run, origin))] if want else []
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
