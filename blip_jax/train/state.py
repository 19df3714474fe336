"""The train state: one pytree that holds all that a step changes."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from blip_jax import tasks, trees
from blip_jax.models import initial
from blip_jax.models.layers.dense import rounds


@flax.struct.dataclass
class TrainState:
    """step i32[]; params trained, frozen (nested dicts, disjoint leaves); opt of optax; rng root key.

    Trained parameters are float32. Of the frozen ones those that `dense.rounds` are in the dtype of the computation,
    unless they have momentum copies, which are averages in float32.

    extra: what the task carries besides parameters, or None; of the contrastive tasks {"params": momentum copies,
    "queue": {"img", "txt": f32[K,E], "ptr": i32[], ...} or None for K = 0}.
    """

    step: Any
    params: Any
    frozen: Any
    opt: Any
    extra: Any
    rng: Any

    @property
    def all_params(self):
        """Trained and frozen parameters in one nested dict."""
        return trees.merge(self.params, self.frozen)

    @property
    def stored(self) -> TrainState:
        """What a checkpoint holds: everything but the frozen parameters, which it refers to (`convert.origins`)."""
        return self.replace(frozen={})


def create(cfg, model, tx, key, params=None) -> TrainState:
    """Fresh state. `params`: start from these instead of random ones; what the task carries besides starts from
    the parameters."""
    _, extra_key, rng = jax.random.split(key, 3)  # the first is that of the parameters
    params = initial.of_run(cfg, model, key) if params is None else params
    trained, frozen = trees.split(params, cfg.optim.freeze)
    task = tasks.of(cfg)
    extra = task.extra(cfg, params, extra_key) if hasattr(task, "extra") else None

    copied = dict(trees.paths(extra["params"])) if extra else {}
    frozen = trees.nest(
        (path, x.astype(cfg.model.dtype) if rounds(path) and path not in copied else x)
        for path, x in trees.paths(frozen)
    )
    return TrainState(jnp.zeros((), jnp.int32), trained, frozen, tx.init(trained), extra, rng)
