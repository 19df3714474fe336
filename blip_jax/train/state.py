"""The train state: one pytree that holds all that a step changes."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from blip_jax import tasks, trees
from blip_jax.models import initial


@flax.struct.dataclass
class TrainState:
    """step i32[]; params trained, frozen (nested dicts, disjoint leaves); opt of optax; rng root key.

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


def init_params(cfg, model, key):
    """Random parameters of `model` as nested dict; pure (use under jax.jit with out_shardings, or jax.eval_shape)."""
    size, T = cfg.model.img_size, min(8, cfg.text.max_len)
    img, ids = jnp.zeros((1, size, size, 3)), jnp.zeros((1, T), jnp.int32)  # only their shapes count
    shapes = jax.eval_shape(lambda: model.init(key, img, ids, jnp.ones((1, T), bool))["params"])
    return initial.parameters(shapes, key, std=cfg.model.init_std, pos_std=cfg.model.vit.pos_std)


def create(cfg, model, tx, key, params=None) -> TrainState:
    """Fresh state. `params`: start from these instead of random ones; what the task carries besides starts from
    the parameters."""
    params_key, extra_key, rng = jax.random.split(key, 3)
    params = init_params(cfg, model, params_key) if params is None else params
    trained, frozen = trees.split(params, cfg.optim.freeze)
    task = tasks.of(cfg)
    extra = task.extra(cfg, params, extra_key) if hasattr(task, "extra") else None
    return TrainState(jnp.zeros((), jnp.int32), trained, frozen, tx.init(trained), extra, rng)
