"""One training step per objective, on global arrays; `make_step` adds what all share: clamp, EMA, accumulation,
update, queue."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from blip_jax import losses, trees
from blip_jax.models.layers import dense
from blip_jax.models.vision.vit import normalize_pixels
from blip_jax.parallel import compiler
from blip_jax.parallel.collectives import within_cells
from blip_jax.tasks.momentum import ema, enqueue, momentum_params

TEMP_RANGE = (0.001, 0.5)  # the stored temperature is clamped to this at the start of every step


def pretrain_loss(model, cfg, params, momentum, batch, alpha, keys, first_row, draw):
    """ITC + ITM + LM of one (micro-)batch (paper section 3.2).

    batch: img f32[B,S,S,3] normalised, ids i32[B,T], txt_mask bool[B,T]. keys: (of this micro-batch's dropout, of the
    step's hard negatives); first_row: of this micro-batch within the step's batch. Returns loss f32[], (metrics,
    features to enqueue).
    """
    apply = functools.partial(model.apply, {"params": params})
    dropout, ids, txt_mask, loss = _dropout_keys(keys[0]), batch["ids"], batch["txt_mask"], cfg.loss
    img_tok = apply(batch["img"], method="encode_image", deterministic=False, rngs=dropout("vit"))
    img_emb = apply(img_tok, method="project_image")
    _, txt_emb = apply(ids, txt_mask, method="encode_text", deterministic=False, rngs=dropout("text"))

    same = jnp.eye(loss.group_size or len(ids), dtype=bool)[None]
    itc, sims, features = _contrastive(
        model, cfg, params["temp"], momentum, batch, img_emb, txt_emb, same, alpha, dropout
    )
    width = same.shape[-1]
    weights_t2i, weights_i2t = (
        losses.hard_negative_weights(s[..., :width], same, 1e-4) for s in (sims["t2i"], sims["i2t"])
    )
    neg_img = draw(jax.random.fold_in(keys[1], 0), weights_t2i, first_row)
    neg_txt = draw(jax.random.fold_in(keys[1], 1), weights_i2t, first_row)

    kv = apply(img_tok, method="image_kv")  # once, for the three matching groups and the decoder
    itm, itm_acc = _matching(apply, ids, txt_mask, kv, neg_img, neg_txt, loss.group_size, dropout)
    logits = apply(ids, txt_mask, kv, method="lm_logits", deterministic=False, rngs=dropout("decoder"))
    lm = losses.lm(
        logits,
        ids[:, 1:],
        txt_mask[:, 1:],
        model.med_sizes["vocab_size"],
        smoothing=loss.label_smoothing,
        over=loss.smoothing_over,
        group_size=loss.group_size,
    )
    metrics = {"loss": itc + itm + lm, "loss_itc": itc, "loss_itm": itm, "loss_lm": lm, "itm_acc": itm_acc}
    return metrics["loss"], (metrics, features)


def retrieval_loss(model, cfg, params, momentum, batch, alpha, keys, first_row, draw):
    """ITC with all texts of the same image as positives, plus ITM (fine-tuning; reference: BLIP's blip_retrieval).

    batch as in `pretrain_loss`, with image_id i32[B]. Hard negatives come from the online features; texts of the same
    image are never negatives. A row whose whole group shows its image has no negative and is left out of the ITM mean.
    """
    apply = functools.partial(model.apply, {"params": params})
    dropout, ids, txt_mask, loss = _dropout_keys(keys[0]), batch["ids"], batch["txt_mask"], cfg.loss
    img_tok = apply(batch["img"], method="encode_image", deterministic=False, rngs=dropout("vit"))
    img_emb = apply(img_tok, method="project_image")
    _, txt_emb = apply(ids, txt_mask, method="encode_text", deterministic=False, rngs=dropout("text"))

    image_id = losses.grouped(batch["image_id"], loss.group_size)  # G, g
    same = image_id[:, :, None] == image_id[:, None, :]
    itc, _, features = _contrastive(model, cfg, params["temp"], momentum, batch, img_emb, txt_emb, same, alpha, dropout)
    img, txt = (losses.grouped(x, loss.group_size) for x in (img_emb, txt_emb))
    neg_img = draw(
        jax.random.fold_in(keys[1], 0),
        losses.hard_negative_weights(losses.similarity(txt, img, None, params["temp"]), same, 0.0),
        first_row,
    )
    neg_txt = draw(
        jax.random.fold_in(keys[1], 1),
        losses.hard_negative_weights(losses.similarity(img, txt, None, params["temp"]), same, 0.0),
        first_row,
    )

    kv = apply(img_tok, method="image_kv")
    itm, itm_acc = _matching(apply, ids, txt_mask, kv, neg_img, neg_txt, loss.group_size, dropout)
    metrics = {"loss": itc + itm, "loss_itc": itc, "loss_itm": itm, "itm_acc": itm_acc}
    return metrics["loss"], (metrics, features | ({"image_id": batch["image_id"]} if features else {}))


def caption_loss(model, cfg, params, momentum, batch, alpha, keys, first_row, draw):
    """LM alone (captioner fine-tuning; reference: BLIP's blip_decoder): the captioner has no encoder, momentum or
    negatives.

    batch: img f32[B,S,S,3] normalised, ids i32[B,T], txt_mask, lm_mask bool[B,T]; only positions of lm_mask are scored,
    which leaves out the prompt. `momentum`, `alpha`, `first_row` and `draw` play no part. Returns loss f32[], (metrics,
    {}).
    """
    apply = functools.partial(model.apply, {"params": params})
    dropout, ids, loss = _dropout_keys(keys[0]), batch["ids"], cfg.loss
    img_tok = apply(batch["img"], method="encode_image", deterministic=False, rngs=dropout("vit"))
    kv = apply(img_tok, method="image_kv")
    logits = apply(ids, batch["txt_mask"], kv, method="lm_logits", deterministic=False, rngs=dropout("decoder"))
    lm = losses.lm(
        logits,
        ids[:, 1:],
        batch["lm_mask"][:, 1:],
        model.med_sizes["vocab_size"],
        smoothing=loss.label_smoothing,
        over=loss.smoothing_over,
        group_size=loss.group_size,
    )
    return lm, ({"loss": lm, "loss_lm": lm}, {})


LOSSES = {"pretrain": pretrain_loss, "retrieval": retrieval_loss, "caption": caption_loss}


def _contrastive(model, cfg, temp, momentum, batch, img_emb, txt_emb, same, alpha, dropout):
    """ITC loss, scaled similarities {"i2t","t2i": f32[G,g,g+K]} and the momentum features {"img","txt": f32[B,E]}.

    same bool[G|1,g,g]: positives among the group's own columns. Columns are momentum features and queue; without a
    momentum encoder the online features of the group (paper section 3.2; ALBEF for the soft targets).
    """
    group = functools.partial(losses.grouped, group_size=cfg.loss.group_size)
    if momentum is None:
        img, txt = group(img_emb), group(txt_emb)
        sims = {"i2t": losses.similarity(img, txt, None, temp), "t2i": losses.similarity(txt, img, None, temp)}
        target = losses.itc_targets(jnp.broadcast_to(same, sims["i2t"].shape), None, alpha)
        return losses.itc(sims["i2t"], sims["t2i"], target, target), sims, {}
    apply_m = functools.partial(model.apply, {"params": momentum["params"] | {"temp": temp}})
    img_tok_m = apply_m(batch["img"], method="encode_image", deterministic=False, rngs=dropout("momentum_vit"))
    img_m = apply_m(img_tok_m, method="project_image")
    _, txt_m = apply_m(
        batch["ids"], batch["txt_mask"], method="encode_text", deterministic=False, rngs=dropout("momentum_text")
    )
    features = jax.lax.stop_gradient({"img": img_m, "txt": txt_m})

    queue = momentum["queue"] or {"img": None, "txt": None}
    cols = {name: group(x) for name, x in features.items()}
    sim = lambda emb, side: losses.similarity(emb, cols[side], queue[side], temp)
    sims = {"i2t": sim(group(img_emb), "txt"), "t2i": sim(group(txt_emb), "img")}
    sims_m = {"i2t": sim(cols["img"], "txt"), "t2i": sim(cols["txt"], "img")}
    positive = jnp.broadcast_to(same, (*sims["i2t"].shape[:2], same.shape[-1]))
    if queue["img"] is not None:
        in_queue = jnp.zeros((*positive.shape[:2], len(queue["img"])), bool)
        if "image_id" in queue:
            in_queue = group(batch["image_id"])[..., None] == queue["image_id"]
        positive = jnp.concatenate([positive, in_queue], axis=-1)
    targets = {k: losses.itc_targets(positive, s, alpha) for k, s in sims_m.items()}
    return losses.itc(sims["i2t"], sims["t2i"], targets["i2t"], targets["t2i"]), sims, features


def _matching(apply, ids, txt_mask, kv, neg_img, neg_txt, group_size, dropout):
    """ITM over (image b, text b), (image b, negative text), (negative image, text b), in one pass of 3B rows.

    neg_img, neg_txt: i32[B], each within its row's group, -1 = no negative exists: that row is left out. Returns loss
    f32[], accuracy f32[].
    """
    B = len(ids)
    # -1: any, not counted
    neg_img_of, neg_txt_of = (losses.grouped(i, group_size) % (group_size or B) for i in (neg_img, neg_txt))
    stack = lambda x: jnp.stack([x, within_cells(x, neg_txt_of), x], axis=1).reshape(3 * B, -1)
    logits = apply(
        stack(ids),
        stack(txt_mask),
        kv,
        img_idx=(None, None, neg_img_of),
        method="match",
        deterministic=False,
        rngs=dropout("match"),
    )
    labels = jnp.tile(jnp.array([1, 0, 0]), B)
    counted = jnp.stack([jnp.ones(B, bool), neg_txt >= 0, neg_img >= 0], axis=1).reshape(3 * B)
    return losses.itm(logits, labels, counted.astype(jnp.float32))


def _dropout_keys(key):
    names = ("vit", "text", "match", "decoder", "momentum_vit", "momentum_text")
    keys = dict(zip(names, jax.random.split(key, len(names))))
    return lambda name: {"dropout": keys[name]}


def make_step(cfg, model, tx, epoch_steps: int, draw=losses.draw_negatives):
    """The train step of `cfg.objective`: (TrainState, batch) -> (TrainState, metrics); to be jitted with the state
    donated.

    batch: img u8 (or normalised f32) [B,S,S,3], ids i32[B,T], txt_mask, lm_mask (captioner) bool[B,T], image_id i32[B];
    with optim.accumulate = A > 1 every array is [A, B/A, ...] and each of the A micro-batches is a batch of its own for
    ITC and ITM, all against the queue as it stood before the step. metrics: f32[] each. `draw` chooses the hard
    negatives.
    """
    loss_fn, accumulate = LOSSES[cfg.objective], cfg.optim.accumulate
    ramp_steps = max(cfg.loss.alpha_ramp_epochs * epoch_steps, 1e-9)

    def step(state, batch):
        params = (
            dict(state.params, temp=jnp.clip(state.params["temp"], *TEMP_RANGE))
            if "temp" in state.params
            else state.params
        )
        momentum, alpha = state.momentum, jnp.zeros(())
        if momentum is not None:  # EMA first, with the parameters as they stand; then the momentum pass uses it
            online = momentum_params(trees.merge(params, state.frozen))
            momentum = momentum | {"params": ema(momentum["params"], online, cfg.loss.ema)}
            alpha = cfg.loss.alpha * jnp.minimum(1.0, state.step / ramp_steps)
        dropout_key, draw_key = jax.random.split(jax.random.fold_in(state.rng, state.step))
        rows = batch["ids"].shape[1 if accumulate > 1 else 0]

        def micro(a, batch):
            if batch["img"].dtype == jnp.uint8:
                batch = batch | {"img": normalize_pixels(batch["img"])}
            keys = jax.random.fold_in(dropout_key, a), draw_key

            def of_trained(trained):
                used = dense.rounded_once(trees.merge(trained, state.frozen), model.dtype)
                return loss_fn(model, cfg, used, momentum, batch, alpha, keys, a * rows, draw)

            (_, (metrics, features)), grads = jax.value_and_grad(of_trained, has_aux=True)(params)
            return grads, metrics, features

        grads, metrics, features = _accumulated(micro, batch, accumulate)
        updates, opt = tx.update(grads, state.opt, params)
        if features and momentum["queue"] is not None:
            momentum = momentum | {"queue": enqueue(momentum["queue"], features)}
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        if cfg.text.buckets:
            metrics |= {"text_positions": jnp.float32(batch["ids"].shape[-1])}
        if model.encoder:
            metrics |= {"alpha": alpha, "temp": trees.merge(params, state.frozen)["temp"]}
        return state.replace(
            step=state.step + 1, params=optax.apply_updates(params, updates), opt=opt, momentum=momentum
        ), metrics

    return step


def jit_arguments(shardings, mesh) -> dict:
    """What `jax.jit` of a train step on a mesh is told: the state, of these shardings, is donated; the compiler's
    options of the mesh."""
    return {"donate_argnums": 0, "out_shardings": (shardings, None), "compiler_options": compiler.options(mesh)}


def _accumulated(micro, batch, accumulate: int):
    """Mean gradients and metrics of the micro-batches, and their features in one [B,E] each."""
    if accumulate == 1:
        return micro(0, batch)

    def body(total, item):
        a, micro_batch = item
        grads, metrics, features = micro(a, micro_batch)
        return jax.tree.map(lambda t, x: t + x / accumulate, total, (grads, metrics)), features

    shapes = jax.eval_shape(micro, 0, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[:2])
    (grads, metrics), features = jax.lax.scan(body, zeros, (jnp.arange(accumulate), batch))
    return grads, metrics, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), features)
