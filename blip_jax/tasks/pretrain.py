"""Pre-training of BLIP: ITC, ITM and language modelling on image-text pairs (paper section 3.2)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from blip_jax import losses
from blip_jax.data import pairs
from blip_jax.models import flops as counts
from blip_jax.models.blip import Blip
from blip_jax.tasks import contrast, retrieval, step

text = pairs.text
before, after = contrast.before, contrast.after
eval_data, evaluate, table = retrieval.eval_data, retrieval.evaluate, retrieval.table
passes = retrieval.passes


def check(cfg, tokenizer=None) -> list[str]:
    return contrast.check(cfg) + pairs.bucket_problems(cfg)


def build(cfg) -> Blip:
    return Blip.from_config(cfg.model)


def example(record: dict, rng: np.random.Generator, cfg, tokenizer) -> dict:
    """{"img": bytes, "ids": i32[T], "txt_mask": bool[T]} of one of the record's captions."""
    row = pairs.example(record, rng, cfg, tokenizer)
    return {name: row[name] for name in ("img", "ids", "txt_mask", "notes")}


def shapes(cfg) -> dict:
    return pairs.shapes(cfg)


def extra(cfg, params, key) -> dict | None:
    """Momentum copies and queue, as `contrast.extra`."""
    return contrast.extra(cfg, params, key, image_ids=False)


def loss(model, cfg, params, extra, batch: dict, keys: step.Keys):
    """ITC + ITM + LM of one (micro-)batch.

    batch: img f32[B,S,S,3] normalised, ids i32[B,T], txt_mask bool[B,T]. Returns loss f32[], (metrics, features to
    enqueue).
    """
    apply = functools.partial(model.apply, {"params": params})
    streams, ids, txt_mask = step.dropout_streams(keys.dropout, contrast.STREAMS), batch["ids"], batch["txt_mask"]
    encoded = contrast.encode(apply, batch, streams)
    same = jnp.eye(cfg.loss.group_size or len(ids), dtype=bool)[None]
    itc = contrast.itc(model, cfg, params, extra, batch, encoded, same, streams)
    neg_img, neg_txt = contrast.negatives(itc.own, same, 1e-4, keys)

    kv = apply(encoded.img_tok, ended=True, method="image_kv")  # once, for the three matching groups and the decoder
    itm, itm_acc = contrast.matching(apply, batch, kv, neg_img, neg_txt, cfg.loss.group_size, streams["match"])
    logits = apply(ids, txt_mask, kv, method="lm_logits", deterministic=False, rngs=streams["decoder"])
    lm = losses.lm(
        logits,
        ids[:, 1:],
        txt_mask[:, 1:],
        model.med_sizes["vocab_size"],
        smoothing=cfg.loss.label_smoothing,
        over=cfg.loss.smoothing_over,
        group_size=cfg.loss.group_size,
    )

    total = itc.loss + itm + lm
    metrics = {"loss": total, "loss_itc": itc.loss, "loss_itm": itm, "loss_lm": lm, "itm_acc": itm_acc, **itc.metrics}
    return total, (metrics, itc.found)


def flops(cfg, T: int | None = None) -> dict[str, float]:
    return counts.pretrain_step(cfg, T=T)
