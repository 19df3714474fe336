"""What pre-training and retrieval share: the contrastive loss with momentum and queue, hard negatives, the matching
pass.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blip_jax import losses, trees
from blip_jax.parallel.collectives import within_cells
from blip_jax.tasks import step
from blip_jax.tasks.momentum import ema, enqueue, init_queue, momentum_params

TEMP_RANGE = (0.001, 0.5)  # BLIP's stored temperature is clamped to this at the start of every step
STREAMS = ("vit", "text", "match", "decoder", "momentum_vit", "momentum_text")  # of dropout


def check(cfg) -> list[str]:
    """Problems of the settings of momentum, queue, groups and prompt."""
    out, queue, batch = step.group_problems(cfg, least=2), cfg.loss.queue, cfg.train.batch
    if queue > 0 and not cfg.loss.momentum:
        out.append(
            f"loss.queue is {queue} but loss.momentum is False: the queue holds momentum features; "
            "set loss.queue=0 or loss.momentum=True"
        )
    if queue > 0 and batch > 0 and queue % batch:
        below = queue // batch * batch
        near = f"{below} or {below + batch}" if below else f"{batch}"
        out.append(f"loss.queue is {queue}: it must be a multiple of train.batch = {batch}, as {near}, or 0 for none")
    if cfg.loss.negatives not in ("group", "batch"):
        out.append(f"loss.negatives is {cfg.loss.negatives!r}: choose group or batch")
    elif cfg.loss.negatives == "batch" and cfg.objective != "retrieval":
        out.append(
            f"loss.negatives is 'batch' but objective is {cfg.objective}: only retrieval draws hard negatives from "
            "other groups; set loss.negatives=group"
        )
    if cfg.text.prompt:
        out.append(
            f"text.prompt is {cfg.text.prompt!r} but objective is {cfg.objective}: only a captioner is trained "
            "with a prompt; set text.prompt to the empty string"
        )
    return out


def extra(cfg, params, key, image_ids: bool) -> dict | None:
    """{"params": momentum copies, equal to the parameters, "queue": of loss.queue random features or None}; None
    without momentum.
    """
    if not cfg.loss.momentum:
        return None
    queue = init_queue(key, cfg.loss.queue, cfg.model.embed_dim, image_ids) if cfg.loss.queue else None
    return {"params": jax.tree.map(jnp.copy, momentum_params(params)), "queue": queue}


def before(cfg, state, epoch_steps: int):
    """Trained parameters with the temperature clamped; momentum copies moved on with them, and "alpha", the weight of
    the soft targets.
    """
    params = state.params
    if "temp" in params:
        params = dict(params, temp=jnp.clip(params["temp"], *TEMP_RANGE))
    if state.extra is None:
        return params, None
    online = momentum_params(trees.merge(params, state.frozen))
    ramp_steps = max(cfg.loss.alpha_ramp_epochs * epoch_steps, 1e-9)
    return params, {
        "params": ema(state.extra["params"], online, cfg.loss.ema),
        "queue": state.extra["queue"],
        "alpha": cfg.loss.alpha * jnp.minimum(1.0, state.step / ramp_steps),
    }


def after(cfg, extra, found: dict) -> dict | None:
    """Momentum copies, and the queue with the features of the whole batch. All its micro-batches saw it as it stood
    before.
    """
    if extra is None:
        return None
    queue = extra["queue"] if extra["queue"] is None else enqueue(extra["queue"], found)
    return {"params": extra["params"], "queue": queue}


class Encoded(NamedTuple):
    """A batch after the unimodal encoders: img_tok [B,P,D], img_emb and txt_emb f32[B,E] of unit norm."""

    img_tok: jax.Array
    img_emb: jax.Array
    txt_emb: jax.Array


def encode(apply, batch: dict, streams: dict) -> Encoded:
    """Both encoders with dropout; apply: `model.apply` with the parameters."""
    img_tok = apply(batch["img"], method="encode_image", deterministic=False, rngs=streams["vit"])
    img_emb = apply(img_tok, method="project_image")
    _, txt_emb = apply(batch["ids"], batch["txt_mask"], method="encode_text", deterministic=False, rngs=streams["text"])
    return Encoded(img_tok, img_emb, txt_emb)


class Contrast(NamedTuple):
    """The contrastive loss and what it leaves for the rest of the step."""

    loss: jax.Array  # f32[]
    own: dict  # {"i2t", "t2i"}: f32[G,g,g], scaled similarities with the group's own columns, without the queue's
    found: dict  # {"img", "txt"}: f32[B,E], momentum features to enqueue; {} without momentum
    metrics: dict  # alpha and temp, f32[] each


def itc(model, cfg, params, extra, batch: dict, encoded: Encoded, same, streams: dict) -> Contrast:
    """ITC with soft targets (paper section 3.2; ALBEF for the targets).

    same bool[G|1,g,g]: positives among the group's own columns. Columns are momentum features and queue; without a
    momentum encoder (`extra` None) the online features of the group.
    """
    temp = params["temp"]
    img, txt = (losses.grouped(x, cfg.loss.group_size) for x in (encoded.img_emb, encoded.txt_emb))
    if extra is None:
        own = {"i2t": losses.similarity(img, txt, temp), "t2i": losses.similarity(txt, img, temp)}
        target = losses.itc_targets(jnp.broadcast_to(same, own["i2t"].shape), None, 0.0)
        return Contrast(
            losses.itc(own["i2t"], own["t2i"], target, target), own, {}, {"alpha": jnp.zeros(()), "temp": temp}
        )

    found = momentum_features(model, extra["params"] | {"temp": temp}, batch, streams)
    img_m, txt_m = (losses.grouped(found[name], cfg.loss.group_size) for name in ("img", "txt"))
    queue = extra["queue"] or {"img": None, "txt": None}
    own = {"i2t": losses.similarity(img, txt_m, temp), "t2i": losses.similarity(txt, img_m, temp)}
    own_m = {"i2t": losses.similarity(img_m, txt_m, temp), "t2i": losses.similarity(txt_m, img_m, temp)}
    positive = jnp.broadcast_to(same, own["i2t"].shape)

    def joined(own, rows, side):
        # The queue's columns are joined here, for the softmax over all, and nowhere sliced off again: XLA for GPUs
        # refuses a softmax over a slice of a concatenation from batch 128 on.
        if queue[side] is None:
            return own
        return jnp.concatenate([own, losses.queue_similarity(rows, queue[side], temp)], axis=-1)

    sims = {"i2t": joined(own["i2t"], img, "txt"), "t2i": joined(own["t2i"], txt, "img")}
    sims_m = {"i2t": joined(own_m["i2t"], img_m, "txt"), "t2i": joined(own_m["t2i"], txt_m, "img")}
    if queue["img"] is not None:
        in_queue = jnp.zeros((*positive.shape[:2], len(queue["img"])), bool)
        if "image_id" in queue:
            in_queue = losses.grouped(batch["image_id"], cfg.loss.group_size)[..., None] == queue["image_id"]
        positive = jnp.concatenate([positive, in_queue], axis=-1)
    targets = {way: losses.itc_targets(positive, sims_m[way], extra["alpha"]) for way in sims}
    loss = losses.itc(sims["i2t"], sims["t2i"], targets["i2t"], targets["t2i"])
    return Contrast(loss, own, found, {"alpha": extra["alpha"], "temp": temp})


def momentum_features(model, params, batch: dict, streams: dict) -> dict:
    """{"img", "txt"}: f32[B,E] of the momentum encoders, without gradient."""
    apply = functools.partial(model.apply, {"params": params})
    img_tok = apply(batch["img"], method="encode_image", deterministic=False, rngs=streams["momentum_vit"])
    img = apply(img_tok, method="project_image")
    _, txt = apply(
        batch["ids"], batch["txt_mask"], method="encode_text", deterministic=False, rngs=streams["momentum_text"]
    )
    return jax.lax.stop_gradient({"img": img, "txt": txt})


def negatives(own: dict, same, floor: float, keys: step.Keys):
    """A hard negative image for each text and text for each image, i32[B] each, -1: none exists (paper section 3.2,
    ITM).

    own: {"i2t", "t2i"} f32[G,g,g], scaled similarities; same, floor: as in `losses.hard_negative_weights`.
    """
    return drawn({way: losses.hard_negative_weights(sim, same, floor) for way, sim in own.items()}, keys)


def drawn(weights: dict, keys: step.Keys):
    """`negatives` of given weights, {"i2t", "t2i"} f32[G,g,g]."""
    neg_img = keys.draw(jax.random.fold_in(keys.step, 0), weights["t2i"], keys.first_row)
    neg_txt = keys.draw(jax.random.fold_in(keys.step, 1), weights["i2t"], keys.first_row)
    return neg_img, neg_txt


def matching(apply, batch: dict, kv, neg_img, neg_txt, group_size: int, stream: dict):
    """ITM over (image b, text b), (image b, negative text), (negative image, text b), in one pass of 3B rows.

    neg_img, neg_txt: i32[B], each within its row's group, -1 = no negative exists: that row is left out. Returns loss
    f32[], accuracy f32[].
    """
    ids, txt_mask = batch["ids"], batch["txt_mask"]
    B = len(ids)
    # of a row without a negative any other's is taken; it is not counted
    neg_img_of, neg_txt_of = (losses.grouped(i, group_size) % (group_size or B) for i in (neg_img, neg_txt))

    def stack(x):
        return jnp.stack([x, within_cells(x, neg_txt_of), x], axis=1).reshape(3 * B, -1)

    logits = apply(
        stack(ids),
        stack(txt_mask),
        kv,
        img_idx=(None, None, neg_img_of),
        method="match",
        deterministic=False,
        rngs=stream,
    )
    labels = jnp.tile(jnp.array([1, 0, 0]), B)
    counted = jnp.stack([jnp.ones(B, bool), neg_txt >= 0, neg_img >= 0], axis=1).reshape(3 * B)
    return losses.itm(logits, labels, counted.astype(jnp.float32))
