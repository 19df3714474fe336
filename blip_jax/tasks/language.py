"""Language modelling on captions without their pictures: makes the language model that BLIP-2's second stage takes
over, where there is none to be had, as for the world of the demo.

OPT learns each caption behind its "</s>", and its end; T5 reads the beginning of a caption and writes the rest. Rows
are those of the second stage without the picture, whose sizes in the config are not read.
"""

from __future__ import annotations

import numpy as np

from blip_jax import losses
from blip_jax.models import flops as counts
from blip_jax.models.language import Language
from blip_jax.tasks import blip2_stage2, step

ARRAYS = ("ids", "txt_mask", "lm_mask", "out_ids", "out_mask")  # of a row, as far as the kind of model has them


def check(cfg, tokenizer=None) -> list[str]:
    """As the second stage; the prompt, which no picture follows, is empty."""
    out = blip2_stage2.check(cfg, tokenizer)
    if cfg.text.prompt:
        out.append(f"text.prompt is {cfg.text.prompt!r} but objective is language: set text.prompt to the empty string")
    return out


def build(cfg) -> Language:
    return Language.from_config(cfg.model)


def example(record: dict, rng: np.random.Generator, cfg, tokenizer) -> dict:
    """One of the record's captions, as `blip2_stage2.example` has it, without the picture."""
    row = blip2_stage2.example(record, rng, cfg, tokenizer)
    return {name: row[name] for name in (*ARRAYS, "notes") if name in row}


def shapes(cfg) -> dict:
    found = blip2_stage2.shapes(cfg)
    return {name: found[name] for name in ARRAYS if name in found}


def loss(model, cfg, params, extra, batch: dict, keys: step.Keys):
    """The mean negative log-likelihood of the texts of one (micro-)batch, the arrays of `example`.

    Returns loss f32[], (metrics, {}); a mean over tokens as in the second stage.
    """
    apart = (batch["out_ids"], batch["out_mask"]) if "out_ids" in batch else ()
    logits = model.apply(
        {"params": params},
        batch["ids"],
        batch["txt_mask"],
        *apart,
        method="target_logits",
        deterministic=False,
        rngs={"dropout": keys.dropout},
    )
    targets, mask = apart or (batch["ids"][:, 1:], batch["lm_mask"][:, 1:])
    lm = losses.lm(
        logits,
        targets,
        mask,
        model.llm_sizes["vocab_size"],
        smoothing=0.0,
        over="valid",
        group_size=cfg.loss.group_size,
    )
    return lm, ({"loss": lm, "loss_lm": lm}, {})


def flops(cfg, T: int | None = None) -> dict[str, float]:
    llm, T = cfg.model.llm, T or cfg.text.max_len
    parts = {
        "llm": sum(counts.language_model(llm, T, T)),
        "lm_head": T * 2 * llm.get("embed_width", llm.width) * llm.vocab_size,
    }
    return counts.trained(cfg, parts, 0.0)
