"""The training step that all tasks share: micro-batches, gradient, update. What a task adds are its own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blip_jax import losses, tasks, trees
from blip_jax.models.layers import dense
from blip_jax.models.vision.vit import normalize_pixels
from blip_jax.parallel import compiler

RATES = ("dropout", "drop_path", "llm_dropout")  # leaves of cfg.model by which a model drops something


class Keys(NamedTuple):
    """The randomness of one micro-batch."""

    dropout: Any  # key of this micro-batch
    step: Any  # key of the step, for what is drawn row by row however the batch is cut
    first_row: Any  # i32[], of this micro-batch within the step's batch
    draw: Callable = losses.draw_negatives  # chooses the hard negatives


def make_step(cfg, model, tx, epoch_steps: int, draw: Callable = losses.draw_negatives, ahead: int = 0):
    """The train step of `cfg.objective`: (TrainState, batch) -> (TrainState, metrics); to be jitted with the state
    donated.

    batch: the task's `shapes`, pictures u8 (or normalised f32); with optim.accumulate = A > 1 every array is [A, B/A,
    ...] and each of the A micro-batches is a batch of its own. The task's `before` is called once, then its `loss` for
    each micro-batch with what that returned, then `after` once with what all of them found. metrics: f32[] each. `draw`
    chooses the hard negatives. ahead: steps that are added where epochs are counted (`optim.schedule`).
    """
    task, accumulate = tasks.of(cfg), cfg.optim.accumulate

    def step(state, batch):
        counted = state.replace(step=state.step + ahead) if ahead else state
        params, extra = task.before(cfg, counted, epoch_steps) if hasattr(task, "before") else (state.params, None)
        dropout_key, draw_key = jax.random.split(jax.random.fold_in(state.rng, state.step))
        rows = cfg.train.batch // accumulate

        def micro(a, batch):
            batch = normalized(batch)
            keys = Keys(jax.random.fold_in(dropout_key, a), draw_key, a * rows, draw)

            def of_trained(trained):
                used = dense.rounded_once(trees.merge(trained, state.frozen), model.dtype)
                return task.loss(model, cfg, used, extra, batch, keys)

            (_, (metrics, found)), grads = jax.value_and_grad(of_trained, has_aux=True)(params)
            return grads, metrics, found

        grads, metrics, found = accumulated(micro, batch, accumulate)
        updates, opt = tx.update(grads, state.opt, params)
        extra = task.after(cfg, extra, found) if hasattr(task, "after") else None
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        if cfg.text.buckets:
            metrics |= {"text_positions": jnp.float32(batch["ids"].shape[-1])}
        return state.replace(
            step=state.step + 1, params=optax.apply_updates(params, updates), opt=opt, extra=extra
        ), metrics

    return step


def normalized(batch: dict) -> dict:
    """A batch whose pictures u8 are normalised, f32."""
    return {name: normalize_pixels(x) if x.dtype == jnp.uint8 else x for name, x in batch.items()}


def make_loss(cfg, epoch_steps: int, ahead: int = 0):
    """The loss of `cfg.objective` without a step: (TrainState, batch, first) -> {"loss", "loss_itc", ...: f32[]}, its
    parts those metrics of the task that are named so; to be jitted.

    batch: as of `make_step`, of any number of rows, one batch; first i32[]: number of its first row, from which hard
    negatives are drawn, with keys that depend on the seed alone. Nothing is dropped. Of a task with a momentum encoder
    its parameters and queue are those of the state, `before` moves nothing. epoch_steps, ahead: as of `make_step`.
    """
    cfg = cfg.copy_and_resolve_references().unlock()
    cfg.model.update({name: 0.0 for name in cfg.model if name in RATES})
    cfg.loss.ema = 1.0
    task = tasks.of(cfg.lock())
    model = task.build(cfg)

    def loss(state, batch, first):
        state = state.replace(step=state.step + ahead)
        params, extra = task.before(cfg, state, epoch_steps) if hasattr(task, "before") else (state.params, None)
        used = dense.rounded_once(trees.merge(params, state.frozen), model.dtype)
        key = jax.random.key(cfg.seed)
        total, (metrics, _) = task.loss(model, cfg, used, extra, normalized(batch), Keys(key, key, first))
        return {"loss": total} | {name: value for name, value in metrics.items() if name.startswith("loss_")}

    return loss


def batch_unit(cfg) -> int:
    """The number of examples that every batch of `cfg.objective` must be a multiple of, its groups' being whole."""
    task = tasks.of(cfg)
    return task.batch_unit(cfg) if hasattr(task, "batch_unit") else max(cfg.loss.group_size, 1)


def jit_arguments(shardings, mesh) -> dict:
    """What `jax.jit` of a train step on a mesh is told: the state, of these shardings, is donated; the compiler's
    options of the mesh.
    """
    return {"donate_argnums": 0, "out_shardings": (shardings, None), "compiler_options": compiler.options(mesh)}


def accumulated(micro: Callable, batch: dict, accumulate: int):
    """Mean gradients and metrics of the micro-batches, and what they found in arrays with one leading [B]."""
    if accumulate == 1:
        return micro(0, batch)

    def body(total, item):
        a, micro_batch = item
        grads, metrics, found = micro(a, micro_batch)
        return jax.tree.map(lambda t, x: t + x / accumulate, total, (grads, metrics)), found

    shapes = jax.eval_shape(micro, 0, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[:2])
    (grads, metrics), found = jax.lax.scan(body, zeros, (jnp.arange(accumulate), batch))
    return grads, metrics, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def dropout_streams(key, names: tuple[str, ...]) -> dict[str, dict]:
    """A random stream for each named pass: name -> the `rngs` of flax's apply."""
    return {name: {"dropout": k} for name, k in zip(names, jax.random.split(key, len(names)))}


def group_problems(cfg, least: int) -> list[str]:
    """What is wrong with loss.group_size; least: examples that a group needs, two where another's is the negative."""
    group, accumulate = cfg.loss.group_size, cfg.optim.accumulate
    if accumulate < 1 or cfg.train.batch < 1 or cfg.train.batch % accumulate:
        return []  # said already
    micro = cfg.train.batch // accumulate
    if micro < least:
        return [
            f"train.batch / optim.accumulate is {micro}: a micro-batch needs 2 examples, one for the other's "
            "negative; raise train.batch"
        ]
    if group > 0 and (micro % group or group < least):
        valid = [d for d in range(least, micro + 1) if micro % d == 0]
        near = [d for d in valid if d < group][-1:] + [d for d in valid if d > group][:1]
        return [
            f"loss.group_size is {group}: it must be at least {least} and divide the micro-batch of {micro} examples, "
            f"as {' or '.join(map(str, near))}, or be 0 for all of it"
        ]
    return []
