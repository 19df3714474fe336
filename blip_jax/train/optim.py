"""AdamW with the original's learning-rate schedules, decay masks and frozen parts.

Accumulation over micro-batches is the step's business: what arrives here is the gradient of the whole global batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blip_jax.trees import nest, path_name, paths

SCHEDULES = ("epoch_decay", "epoch_cosine", "cosine", "constant")
DECAY_MASKS = ("all", "weights", "kernels")


def make(cfg, epoch_steps: int, ahead: int = 0) -> tuple[optax.GradientTransformation, Callable]:
    """The optimiser over the trained parameters and its learning rate, f32[] as a function of the step, i32[].

    ahead: as in `schedule`.

    AdamW in torch's order: p <- (1 - lr * weight_decay) p - lr * m_hat / (sqrt(v_hat) + eps). `epoch_steps`: steps in
    one epoch. (BLIP paper, section 4.1: AdamW, weight decay 0.05 on every parameter, no clipping.)
    """
    o = cfg.optim
    lr = schedule(cfg, epoch_steps, ahead)
    adamw = optax.adamw(lr, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=decay_mask(o.decay_mask))
    parts = [optax.clip_by_global_norm(o.clip)] * (o.clip > 0) + [adamw]
    if o.lr_factors:
        parts.append(optax.stateless(lambda updates, params: scaled(updates, o.lr_factors)))
    return (optax.chain(*parts) if len(parts) > 1 else adamw), lr


def scaled(updates: dict, pairs) -> dict:
    """Updates times their `factors`; the decay, which they hold, with them."""
    found = factors(updates, pairs)
    return nest((path, x * jnp.asarray(found[path], x.dtype)) for path, x in paths(updates))


def factors(params: dict, pairs) -> dict[str, np.ndarray]:
    """Path -> factor of its learning rate, f32[] or f32[L,1,...]: of the first (regex, factor) pair that matches it in
    full, else 1.

    params: the trained ones, or their shapes. ValueError: a pattern that matches none, or one factor a layer for
    another number of layers.
    """
    names = [path for path, _ in paths(params)]
    idle = [pattern for pattern, _ in pairs if not any(re.fullmatch(pattern, path) for path in names)]
    if idle:
        raise ValueError(
            f"optim.lr_factors: {idle} match no trained parameter; they must match in full (as 'vit/.*'), and what "
            f"optim.freeze names is not trained; the top-level names are "
            f"{sorted({path.split('/')[0] for path in names})}"
        )
    found = {}
    for path, x in paths(params):
        factor = np.float32(next((f for pattern, f in pairs if re.fullmatch(pattern, path)), 1.0))
        if factor.ndim and (x.ndim < 1 or len(factor) != x.shape[0]):
            raise ValueError(
                f"optim.lr_factors has {len(factor)} factors for {path}, which is {list(x.shape)}: give a number, or "
                f"one for "
                "each layer of a stack"
            )
        found[path] = factor.reshape(-1, *(1,) * (x.ndim - 1)) if factor.ndim else factor
    return found


def schedule(cfg, epoch_steps: int, ahead: int = 0) -> Callable:
    """Learning rate f32[] of the step i32[] whose update it scales, counted from 0; `epoch_steps` > 0.

    ahead: steps by which the epochs that have passed exceed what the steps done make up at this batch, of a run that
    had another one before. With e = (step + ahead) // epoch_steps and E = epochs in the run, rounded up:
    epoch_decay: max(min_lr, lr * decay_rate^e); epoch_cosine: min_lr + (lr - min_lr) (1 + cos(pi e / E)) / 2;
    cosine: the same per step, over the steps after the warm-up; constant: lr.
    Warm-up: min(lr, warmup_lr + (lr - warmup_lr) * step / warmup_steps), for epoch_* only while e = 0, as the original.
    """
    o, steps = cfg.optim, cfg.train.steps
    if o.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule is {o.schedule!r}: choose one of {SCHEDULES}")
    if epoch_steps <= 0:
        raise ValueError(f"epoch_steps is {epoch_steps}, must be positive: the data hold less than one global batch")
    epochs = -(-(steps + ahead) // epoch_steps)

    def cosine(share):
        return o.min_lr + (o.lr - o.min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * share))

    def after_warmup(step, epoch):
        if o.schedule == "epoch_decay":
            return jnp.maximum(o.min_lr, o.lr * jnp.power(jnp.float32(o.decay_rate), epoch))
        if o.schedule == "epoch_cosine":
            return cosine(epoch / epochs)
        if o.schedule == "cosine":
            return cosine(jnp.clip((step - o.warmup_steps) / max(1, steps - o.warmup_steps), 0, 1))
        return jnp.float32(o.lr)

    def lr(step):
        step, epoch = jnp.asarray(step, jnp.int32), (jnp.asarray(step, jnp.int32) + ahead) // epoch_steps
        rate = jnp.asarray(after_warmup(step, epoch), jnp.float32)
        if o.warmup_steps == 0:
            return rate
        ramp = jnp.minimum(o.lr, o.warmup_lr + (o.lr - o.warmup_lr) * step / o.warmup_steps)
        within = (epoch == 0) if o.schedule.startswith("epoch_") else (step < o.warmup_steps)
        return jnp.where(within, ramp, rate).astype(jnp.float32)

    return lr


def decay_mask(name: str) -> Callable | None:
    """Which leaves decay: "all" (None: every one, as BLIP's original), "weights" (as LAVIS: all but biases and the
    scales of norms, so query tokens, tables and temperature too) or "kernels" (leaves named `kernel`, matrices).
    """
    if name not in DECAY_MASKS:
        raise ValueError(f"optim.decay_mask is {name!r}: choose one of {DECAY_MASKS}")
    if name == "all":
        return None

    def mask(params):
        # LAVIS goes by dimensions, and the class token of CLIP alone, whose tower has a norm before it, has one
        still = ("bias", "scale", *("cls",) * ("ln_pre" in params.get("vit", {})))
        leaf = lambda path: path_name(path).split("/")[-1]
        decays = (lambda path: leaf(path) == "kernel") if name == "kernels" else (lambda path: leaf(path) not in still)
        return jax.tree.map_with_path(lambda path, _: decays(path), params)

    return mask
