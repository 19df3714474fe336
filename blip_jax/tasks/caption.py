"""Captioning: language modelling alone (captioner fine-tuning; reference: BLIP's blip_decoder). No encoder, momentum or
negatives. Scored by the captions that it makes.
"""

from __future__ import annotations

import functools

import numpy as np

from blip_jax import losses
from blip_jax.data import pairs
from blip_jax.models import flops as counts
from blip_jax.models.blip import Blip
from blip_jax.tasks import captioned, step

text, BEST = pairs.text, captioned.BEST
eval_data, evaluate, curve = captioned.eval_data, captioned.evaluate, captioned.curve
table, submission, samples = captioned.table, captioned.submission, captioned.samples
passes = captioned.passes
BEGINS_FROM = "a pre-training checkpoint, as the paper's model_base_capfilt_large.pth"


def check(cfg, tokenizer=None) -> list[str]:
    out = step.group_problems(cfg, least=1) + pairs.bucket_problems(cfg)
    prompt = cfg.text.prompt
    if prompt and not prompt.endswith(" "):
        out.append(f"text.prompt is {prompt!r}: end it with a space, or its last word runs into the caption's first")
    least = 1 + pairs.prompt_length(tokenizer, prompt) if tokenizer else 1
    out += captioned.problems(cfg, least, cfg.model.med.positions)
    return out + (pairs.prompt_problems(cfg, tokenizer) if tokenizer else [])


def build(cfg) -> Blip:
    """BLIP without text encoder, projections, matching head and temperature."""
    return Blip.from_config(cfg.model, encoder=False)


def example(record: dict, rng: np.random.Generator, cfg, tokenizer) -> dict:
    """{"img": bytes, "ids": i32[T], "txt_mask", "lm_mask": bool[T]} of one of the record's captions after the
    prompt.
    """
    row = pairs.example(record, rng, cfg, tokenizer)
    return {name: row[name] for name in ("img", "ids", "txt_mask", "lm_mask", "notes")}


def shapes(cfg) -> dict:
    return pairs.shapes(cfg) | {"lm_mask": ((cfg.train.batch, cfg.text.max_len), bool)}


def loss(model, cfg, params, extra, batch: dict, keys: step.Keys):
    """LM of one (micro-)batch.

    batch: img f32[B,S,S,3] normalised, ids i32[B,T], txt_mask, lm_mask bool[B,T]; only positions of lm_mask are scored,
    which leaves out the prompt. Returns loss f32[], (metrics, {}).
    """
    apply = functools.partial(model.apply, {"params": params})
    streams, ids = step.dropout_streams(keys.dropout, ("vit", "decoder")), batch["ids"]
    img_tok = apply(batch["img"], method="encode_image", deterministic=False, rngs=streams["vit"])
    kv = apply(img_tok, ended=True, method="image_kv")
    logits = apply(ids, batch["txt_mask"], kv, method="lm_logits", deterministic=False, rngs=streams["decoder"])
    lm = losses.lm(
        logits,
        ids[:, 1:],
        batch["lm_mask"][:, 1:],
        model.med_sizes["vocab_size"],
        smoothing=cfg.loss.label_smoothing,
        over=cfg.loss.smoothing_over,
        group_size=cfg.loss.group_size,
    )
    return lm, ({"loss": lm, "loss_lm": lm}, {})


def flops(cfg, T: int | None = None) -> dict[str, float]:
    return counts.caption_step(cfg, T=T)
