"""Language modelling on captions without their pictures: makes the language model that BLIP-2's second stage takes
over, where there is none to be had, as for the world of the demo.

A text of OPT are all captions of a record, in an order that is drawn, each with its end: so it learns, as from the
documents of the web, that what is said goes on from what was said before, and to speak at any position. T5 reads the
beginning of one caption and writes the rest. Sizes of tower and Q-Former in the config are not read.
"""

from __future__ import annotations

import numpy as np

from blip_jax.data import pairs
from blip_jax.models import flops as counts
from blip_jax.models.language import Language
from blip_jax.tasks import blip2_stage2, step


def check(cfg, tokenizer=None) -> list[str]:
    """As the second stage; the prompt, which no picture follows, is empty."""
    out = blip2_stage2.check(cfg, tokenizer)
    if len(cfg.data.eval) and not cfg.eval.loss_examples:
        out.append(
            f"data.eval holds {', '.join(sorted(cfg.data.eval))}, but objective language is evaluated by its loss "
            "alone, and eval.loss_examples is 0: raise it, or leave data.eval empty"
        )
    if cfg.text.prompt:
        out.append(f"text.prompt is {cfg.text.prompt!r} but objective is language: set text.prompt to the empty string")
    return out


def build(cfg) -> Language:
    return Language.from_config(cfg.model)


def example(record: dict, rng: np.random.Generator, cfg, tokenizer) -> dict:
    """Arrays as of `blip2_stage2.example`, without the picture: of OPT all captions, cut to text.max_len."""
    if cfg.model.llm.kind == "t5":
        row = blip2_stage2.example(record, rng, cfg, tokenizer)
        return {name: x for name, x in row.items() if name != "img"}
    found, notes = pairs.captions(record, cfg.text.max_words)
    text = "".join(f"{found[i]}\n" for i in rng.permutation(len(found)))
    ids, mask = tokenizer.encode([text], cfg.text.max_len)
    return {"ids": ids[0], "txt_mask": mask[0], "lm_mask": mask[0], "notes": notes}


def shapes(cfg) -> dict:
    return {name: x for name, x in blip2_stage2.shapes(cfg).items() if name != "img"}


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
    targets = apart or (batch["ids"][:, 1:], batch["lm_mask"][:, 1:])
    return blip2_stage2.of_tokens(cfg, model, logits, *targets)


def flops(cfg, T: int | None = None) -> dict[str, float]:
    llm, T = cfg.model.llm, T or cfg.text.max_len
    parts = {
        "llm": sum(counts.language_model(llm, T, T)),
        "lm_head": T * 2 * llm.get("embed_width", llm.width) * llm.vocab_size,
    }
    return counts.trained(cfg, parts, 0.0)
