"""First stage of BLIP-2: the Q-Former learns from a frozen image tower by ITC, ITM and image-grounded text generation
(BLIP-2 paper, section 3.1; reference: LAVIS's blip2_qformer). With image ids it is the fine-tuning on retrieval.
"""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from blip_jax import losses
from blip_jax.data import pairs
from blip_jax.data.evaluation import EvalData
from blip_jax.inference.batching import Pass
from blip_jax.models import flops as counts
from blip_jax.models.blip2 import Blip2
from blip_jax.models.build import Start
from blip_jax.tasks import contrast, retrieval, step, two_stage

text, eval_data, table = pairs.text, retrieval.eval_data, retrieval.table
BEST = retrieval.BEST
STREAMS = ("vit", "queries", "text", "match", "decoder")  # of dropout
NEW = "ln_vision/.*|query_tokens|qformer/cross/.*|(vision_proj|text_proj|itm_head)/.*|temp"  # what BERT does not have
NEGATIVES = ("masked", "floored")
FROZEN = "vit/.*"  # what optim.freeze holds where the tower is frozen


def of_bert(path: str) -> str:
    """Path of what a parameter of the Q-Former starts from in BERT, which is read as a MED: the queries' feed-forwards
    from copies of the text's (reference: LAVIS)."""
    return re.sub("^qformer/", "med/", path).replace("/query_mlp", "/mlp")


START = Start(of_bert, new=NEW)


def leaves() -> ConfigDict:
    """The settings that only this task has."""
    c = ConfigDict()
    # hard negatives are drawn by: masked, the softmax over all but the positives (LAVIS since July 2023) | floored, the
    # softmax over all, plus 1e-4, without the positives (before; the published checkpoints)
    c.negatives = "masked"
    # texts of the same image are positives of each other, in ITC with soft targets, and no negatives in ITM: for
    # fine-tuning on retrieval
    c.image_ids = False
    # examples whose tokens the language modelling loss is first averaged over, one GPU's in the original: 105 of 1680;
    # 0: all of the batch
    c.lm_group = 0
    # whether the columns of ITC have a gradient, too: in the original what is gathered from several GPUs has none, on a
    # single one without torch.distributed it has
    c.columns_train = False
    c.itg = True  # image-grounded text generation; False: ITC and ITM alone (BLIP-2 paper, table 6)
    c.eval_len = 35  # text positions in evaluation
    return c


def check(cfg, tokenizer=None) -> list[str]:
    if "qformer" not in cfg.model or len(cfg.model.llm):
        return ["model is not of BLIP-2's first stage: let the config begin with config.blip2('eva_g'), without llm"]
    out, model, task = contrast.check(cfg) + pairs.bucket_problems(cfg), cfg.model, cfg.task
    if cfg.loss.momentum:
        out.append("loss.momentum is True but BLIP-2 has no momentum encoder: set loss.momentum=False")
    if model.qformer.layers % 2:
        out.append(
            f"model.qformer.layers is {model.qformer.layers}: every second layer looks at the image, so that they are "
            f"even: set {model.qformer.layers + 1}"
        )
    if model.qformer.queries < 1:
        out.append(f"model.qformer.queries is {model.qformer.queries}: it must be at least 1, as 32 of the paper")
    if task.negatives not in NEGATIVES:
        out.append(f"task.negatives is {task.negatives!r}: choose one of {', '.join(NEGATIVES)}")
    if not 3 <= task.eval_len <= model.qformer.positions:
        out.append(
            f"task.eval_len is {task.eval_len}: it must be at least 3 and at most model.qformer.positions = "
            f"{model.qformer.positions}"
        )
    micro = cfg.train.batch // max(cfg.optim.accumulate, 1)
    if task.lm_group < 0 or task.lm_group and micro % task.lm_group:
        near = [d for d in range(1, micro + 1) if micro % d == 0]
        out.append(
            f"task.lm_group is {task.lm_group}: it must divide the micro-batch of {micro} examples, as "
            f"{min(near, key=lambda d: abs(d - task.lm_group))}, or be 0 for all of it"
        )
    return out


def build(cfg) -> Blip2:
    return Blip2.from_config(cfg.model, frozen=FROZEN in tuple(cfg.optim.freeze))


def example(record: dict, rng: np.random.Generator, cfg, tokenizer) -> dict:
    """{"img": bytes, "ids": i32[T], "txt_mask": bool[T]} of one of the record's captions, with task.image_ids also
    "image_id": i64[].
    """
    row = pairs.example(record, rng, cfg, tokenizer)
    names = ("img", "ids", "txt_mask", "notes", *("image_id",) * cfg.task.image_ids)
    return {name: row[name] for name in names}


def shapes(cfg) -> dict:
    ids = {"image_id": ((cfg.train.batch,), np.int32)} if cfg.task.image_ids else {}
    return pairs.shapes(cfg) | ids


def batch_unit(cfg) -> int:
    return math.lcm(max(cfg.loss.group_size, 1), max(cfg.task.lm_group, 1))


def loss(model, cfg, params, extra, batch: dict, keys: step.Keys):
    """ITC + ITM, and LM with task.itg, of one (micro-)batch.

    batch: img f32[B,S,S,3] normalised, ids i32[B,T], txt_mask bool[B,T], with task.image_ids image_id i32[B]. A row
    without a negative, whose whole group shows its image, is left out of ITM; "no_negative" counts them, both ways.
    Returns loss f32[], (metrics, {}).
    """
    apply = functools.partial(model.apply, {"params": params})
    streams, ids, txt_mask = step.dropout_streams(keys.dropout, STREAMS), batch["ids"], batch["txt_mask"]
    trains = lambda name: {"deterministic": False, "rngs": streams[name]}
    img_tok = apply(batch["img"], method="encode_image", **trains("vit"))
    qry, kv = apply(img_tok, method="look", **trains("queries"))
    img_emb = apply(qry, method="project_queries")
    _, txt_emb = apply(ids, txt_mask, method="encode_text", **trains("text"))

    same = positives(cfg, batch)
    itc, own = contrastive(cfg, img_emb, txt_emb, params["temp"], same)
    neg_img, neg_txt = contrast.drawn({way: negative_weights(cfg, sim, same) for way, sim in own.items()}, keys)
    itm, itm_acc = contrast.matching(apply, batch, kv, neg_img, neg_txt, cfg.loss.group_size, streams["match"])
    total, metrics = itc + itm, {"loss_itc": itc, "loss_itm": itm, "itm_acc": itm_acc}
    if cfg.task.itg:
        logits = apply(ids, txt_mask, kv, method="lm_logits", **trains("decoder"))
        lm = losses.lm(
            logits,
            ids[:, 1:],
            txt_mask[:, 1:],
            model.qformer_sizes["vocab_size"],
            smoothing=cfg.loss.label_smoothing,
            over=cfg.loss.smoothing_over,
            group_size=cfg.task.lm_group,
        )
        total, metrics = total + lm, metrics | {"loss_lm": lm}
    metrics |= {"loss": total}
    without = jnp.sum(neg_img < 0) + jnp.sum(neg_txt < 0)
    return total, (metrics | {"temp": params["temp"], "no_negative": without.astype(jnp.float32)}, {})


def positives(cfg, batch: dict):
    """bool[G|1,g,g]: which texts of a group belong to which of its images."""
    if not cfg.task.image_ids:
        return jnp.eye(cfg.loss.group_size or len(batch["ids"]), dtype=bool)[None]
    image_id = losses.grouped(batch["image_id"], cfg.loss.group_size)  # G, g
    return image_id[:, :, None] == image_id[:, None, :]


def contrastive(cfg, img_emb, txt_emb, temp, same):
    """ITC f32[] and {"i2t", "t2i"}: f32[G,g,g], scaled similarities; img_emb f32[B,Q,E], txt_emb f32[B,E].

    Each direction trains its own side alone: the columns, which the original gathers from all GPUs, have no gradient,
    the rows' own among them (but see task.columns_train).
    """
    img, txt = (losses.grouped(x, cfg.loss.group_size) for x in (img_emb, txt_emb))
    fixed = (lambda x: x) if cfg.task.columns_train else jax.lax.stop_gradient
    own = {
        "i2t": losses.query_similarity(img, fixed(txt), temp),
        "t2i": losses.query_similarity(fixed(img), txt, temp).swapaxes(1, 2),
    }
    target = losses.smoothed_targets(jnp.broadcast_to(same, own["i2t"].shape), cfg.loss.label_smoothing)
    return losses.itc(own["i2t"], own["t2i"], target, target), own


def negative_weights(cfg, sim, same):
    """f32[G,g,g]: what hard negatives are drawn by."""
    if cfg.task.negatives == "masked":
        return losses.masked_negative_weights(sim, same)
    return losses.hard_negative_weights(sim, same, 1e-4)


def flops(cfg, T: int | None = None) -> dict[str, float]:
    return counts.blip2_stage1_step(cfg, T, frozen=FROZEN in tuple(cfg.optim.freeze), itg=cfg.task.itg)


def evaluate(loaded, data: EvalData, mesh) -> dict:
    """Recalls as `retrieval.evaluate`: ITC's shortlist, re-ranked by the matching logit plus the cosine, texts of
    task.eval_len positions.
    """
    cfg = _evaluated(loaded.cfg)
    return two_stage.evaluate(cfg, loaded.model, loaded.params, data, loaded.tokenizer, mesh)


def passes(cfg, model, unit: int) -> list[Pass]:
    """What `evaluate` runs, as `two_stage.passes`."""
    return two_stage.passes(_evaluated(cfg), model, unit)


def _evaluated(cfg):
    """The config with texts of task.eval_len positions."""
    own = cfg.copy_and_resolve_references().unlock()
    own.text.max_len = own.task.eval_len
    return own.lock()
