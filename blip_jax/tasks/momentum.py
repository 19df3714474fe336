"""Momentum encoder and feature queue (ALBEF / MoCo; paper section 3.2): plain functions on pytrees."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def momentum_params(params):
    """The part of the parameters that has a momentum copy: ViT, text encoder (cross-attention too) and both
    projections.
    """
    med = {name: module for name, module in params["med"].items() if name != "lm_head"}
    med["blocks"] = {name: module for name, module in med["blocks"].items() if name != "self_attn_dec"}
    return {"vit": params["vit"], "med": med, "vision_proj": params["vision_proj"], "text_proj": params["text_proj"]}


def ema(momentum, params, decay: float):
    """decay * momentum + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda m, p: decay * m + (1 - decay) * p, momentum, params)


def init_queue(key, length: int, dim: int, image_ids: bool):
    """Queue of K unit-norm features of either kind: {"img", "txt": f32[K,E], "ptr": i32[], and "image_id": i32[K] of
    -100}.
    """

    def row(key):
        x = jax.random.normal(key, (dim,))
        return x / jnp.linalg.norm(x)

    def rows(key):  # some at a time, so that random bits take little memory
        return jax.lax.map(row, jax.random.split(key, length), batch_size=1024)

    img_key, txt_key = jax.random.split(key)
    queue = {"img": rows(img_key), "txt": rows(txt_key), "ptr": jnp.zeros((), jnp.int32)}
    return queue | ({"image_id": jnp.full((length,), -100, jnp.int32)} if image_ids else {})


def enqueue(queue, new):
    """Writes the B rows of each entry of `new` at ptr and moves it on, modulo K; K must be a multiple of B."""
    put = lambda q, x: jax.lax.dynamic_update_slice_in_dim(q, x.astype(q.dtype), queue["ptr"], axis=0)
    length, rows = queue["img"].shape[0], new["img"].shape[0]
    return {**{k: put(queue[k], x) for k, x in new.items()}, "ptr": (queue["ptr"] + rows) % length}
