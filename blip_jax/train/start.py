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
from blip_jax.models.vision.vit import resize_pos_embed
from blip_jax.parallel import sharding
from blip_jax.train import state as train_state


def fit_params(loaded: dict, shapes: dict, origin: str, partial: bool = False) -> dict:
    """Parameters of another run as this model's: the ViT's position table is resized, anything else must agree.

    Leaves that this model has no place for (the decoder, when fine-tuning for retrieval) are left out and named, with
    `partial` those that are missing from `loaded`, too. ValueError: every parameter that is missing (without `partial`)
    or has another shape.
    """
    found, out, problems, missing = dict(trees.paths(loaded)), {}, [], []
    for path, want in trees.paths(shapes):
        have = found.pop(path, None)
        if have is None:
            missing.append(path)
            continue
        if path == "vit/pos_embed" and have.shape != want.shape and have.shape[-1] == want.shape[-1]:
            say(f"{origin}: position table resized from {have.shape[0]} to {want.shape[0]} positions")
            have = resize_pos_embed(have, want.shape[0])
        if have.shape != want.shape:
            problems.append(f"{path} is {list(have.shape)}, this config needs {list(want.shape)}")
        out[path] = np.asarray(have, want.dtype)
    problems += [] if partial else [f"{path} is missing" for path in missing]
    if problems:
        raise ValueError(
            "\n  ".join(
                [
                    f"{origin} holds another model:",
                    *problems[:20],
                    *([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []),
                    "give the model.* settings it was trained with, or another checkpoint",
                ]
            )
        )
    if missing:
        say(
            f"{origin}: {len(missing)} parameters are not in these initial weights and start random: {', '.join(folded(missing))}"
        )
    if found:
        say(
            f"{origin}: {len(found)} parameters have no place in this model and are left out: "
            + ", ".join(sorted(found)[:8])
            + (", ..." if len(found) > 8 else "")
        )
    return trees.nest(out.items())


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
    origins, loaded, partial = _origins(run), {}, True
    if not origins:
        return None
    for origin in origins:
        found = read_for(run.cfg, origin)
        partial = partial and found.family in INITIAL
        new = dict(trees.paths(found.state["params"]))
        if both := sorted(new.keys() & loaded.keys()):
            say(
                f"{origin}: its {len(both)} parameters take the place of the earlier origins': {', '.join(folded(both))}"
            )
        loaded |= new
    return fit_params(
        trees.nest(loaded.items()), trees.merge(run.shapes.params, run.shapes.frozen), " + ".join(origins), partial
    )


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
        momentum = {name: x | momentum[name] if name in momentum else x for name, x in state.momentum.items()}
        state = state.replace(momentum=jax.device_put(momentum, run.shardings.momentum))
    return state


def _init_momentum(run) -> dict | None:
    """Momentum copies and queue of a converted `train.init_from`, as far as this config has a place for them, else
    None.

    What a run of ours left continues by resuming that run; a converted checkpoint can only be begun from.
    """
    want = run.shapes.momentum
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
                f"{origin}: its queues are of {len(have['img'])} features, loss.queue is {len(need['img'])}: they start anew"
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
