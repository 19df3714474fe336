"""Image-text retrieval: ITC and ITM fine-tuned on captions with image ids, and the two-stage evaluation (paper section
4.1).
"""

from __future__ import annotations

import functools

import numpy as np

from blip_jax import losses
from blip_jax.data import pairs
from blip_jax.data.evaluation import EvalData
from blip_jax.eval import recall
from blip_jax.models import flops as counts
from blip_jax.models.blip import Blip
from blip_jax.tasks import contrast, step, two_stage

text, table, passes = pairs.text, recall.table, two_stage.passes
BEST = ("r_mean",)  # of the validation split, as the original
BEGINS_FROM = "a pre-training checkpoint, as the paper's model_base.pth"
before, after = contrast.before, contrast.after


def check(cfg, tokenizer=None) -> list[str]:
    return contrast.check(cfg) + pairs.bucket_problems(cfg, smoothed=False)


def build(cfg) -> Blip:
    """BLIP without the text decoder."""
    return Blip.from_config(cfg.model, decoder=False)


def example(record: dict, rng: np.random.Generator, cfg, tokenizer) -> dict:
    """{"img": bytes, "ids": i32[T], "txt_mask": bool[T], "image_id": i64[]} of one of the record's captions."""
    row = pairs.example(record, rng, cfg, tokenizer)
    return {name: row[name] for name in ("img", "ids", "txt_mask", "image_id", "notes")}


def shapes(cfg) -> dict:
    return pairs.shapes(cfg) | {"image_id": ((cfg.train.batch,), np.int32)}


def extra(cfg, params, key) -> dict | None:
    """Momentum copies and queue with the image of each of its features, as `contrast.extra`."""
    return contrast.extra(cfg, params, key, image_ids=True)


def loss(model, cfg, params, extra, batch: dict, keys: step.Keys):
    """ITC with all texts of the same image as positives, plus ITM (reference: BLIP's blip_retrieval).

    batch as in `pretrain.loss`, with image_id i32[B]. Hard negatives come from the online features of the row's group,
    or of the whole batch (loss.negatives); texts of the same image are never negatives. A row that all of these show
    the image of has no negative and is left out of the ITM mean.
    """
    apply = functools.partial(model.apply, {"params": params})
    streams = step.dropout_streams(keys.dropout, contrast.STREAMS)
    encoded = contrast.encode(apply, batch, streams)
    group, drawn_from = cfg.loss.group_size, 0 if cfg.loss.negatives == "batch" else cfg.loss.group_size
    itc = contrast.itc(model, cfg, params, extra, batch, encoded, _same(batch, group), streams)

    img, txt = losses.grouped(encoded.img_emb, drawn_from), losses.grouped(encoded.txt_emb, drawn_from)
    online = {"i2t": losses.similarity(img, txt, params["temp"]), "t2i": losses.similarity(txt, img, params["temp"])}
    neg_img, neg_txt = contrast.negatives(online, _same(batch, drawn_from), 0.0, keys)
    kv = apply(encoded.img_tok, ended=True, method="image_kv")
    itm, itm_acc = contrast.matching(apply, batch, kv, neg_img, neg_txt, drawn_from, streams["match"])

    total = itc.loss + itm
    metrics = {"loss": total, "loss_itc": itc.loss, "loss_itm": itm, "itm_acc": itm_acc, **itc.metrics}
    return total, (metrics, itc.found | ({"image_id": batch["image_id"]} if itc.found else {}))


def _same(batch: dict, group_size: int):
    """bool[G,g,g]: which rows of a group have one image."""
    image_id = losses.grouped(batch["image_id"], group_size)  # G, g
    return image_id[:, :, None] == image_id[:, None, :]


def flops(cfg, T: int | None = None) -> dict[str, float]:
    return counts.retrieval_step(cfg, T=T)


def eval_data(cfg, tokenizer, skipped_path) -> EvalData:
    """Every picture and caption of cfg.data.eval."""
    return EvalData(cfg, tokenizer, cfg.data.eval, skipped_path=skipped_path)


def evaluate(loaded, data: EvalData, mesh) -> dict:
    """Recalls in percent, both ways, with the numbers of images and texts that they are of (`two_stage.evaluate`)."""
    return two_stage.evaluate(loaded.cfg, loaded.model, loaded.params, data, loaded.tokenizer, mesh)
