"""BLIP-2's second stage, and its captioners: a frozen language model goes on from what the queries found (BLIP-2 paper,
section 3.2).

OPT learns the caption behind text.prompt; T5 reads the beginning of a caption, or text.prompt, and writes the rest.
What is trained follows from optim.freeze: the Q-Former, its queries, ln_vision and the projection, in fine-tuning the
tower too (reference: section 4).
"""

from __future__ import annotations

import functools

import numpy as np

from blip_jax import losses
from blip_jax.data import pairs
from blip_jax.models import flops as counts
from blip_jax.models.blip2_llm import Blip2Llm
from blip_jax.models.build import Start
from blip_jax.tasks import blip2_stage1, captioned, step

START = Start(blip2_stage1.of_bert, new=r"llm_proj/.*")  # of a first stage or, without it, of BERT
BEST, eval_data, evaluate, curve = captioned.BEST, captioned.eval_data, captioned.evaluate, captioned.curve
table, submission, samples = captioned.table, captioned.submission, captioned.samples
passes = captioned.passes


def check(cfg, tokenizer=None) -> list[str]:
    out = step.group_problems(cfg, least=1)
    if not cfg.model.get("llm"):
        return ["model has no llm but objective is blip2_stage2: let the config begin with config.blip2(llm=...)"]
    if cfg.text.buckets:
        out.append(f"text.buckets is {cfg.text.buckets}: the second stage has one length, text.max_len; leave it empty")
    return out + captioned.problems(cfg) + (_prompt_problems(cfg, tokenizer) if tokenizer else [])


def _prompt_problems(cfg, tokenizer) -> list[str]:
    n, T = _prompt_length(tokenizer, cfg.text.prompt.strip()), cfg.text.max_len
    if n + 2 <= T:
        return []
    return [
        f"text.prompt={cfg.text.prompt!r} takes {n} of text.max_len={T} tokens: shorten it, or set text.max_len to "
        f"{n + 2} at the very least"
    ]


def build(cfg) -> Blip2Llm:
    return Blip2Llm.from_config(cfg.model, frozen=blip2_stage1.FROZEN in tuple(cfg.optim.freeze))


def example(record: dict, rng: np.random.Generator, cfg, tokenizer) -> dict:
    """One of the record's captions: {"img": bytes, "ids": i32[T], "txt_mask": bool[T], ...}.

    With OPT ids are prompt, caption and end, of which "lm_mask" bool[T] are learned; without a prompt the first id too,
    as in the original. With T5 ids are what is read, and "out_ids" i32[T], "out_mask" bool[T] what is written.
    """
    (caption, notes), prompt = pairs.caption(record, rng, cfg), cfg.text.prompt.strip()
    row, T = {"img": record["image"], "notes": notes}, cfg.text.max_len
    if cfg.model.llm.kind == "t5":
        read, write = (prompt, caption) if prompt else _halves(caption, rng)
        (ids, mask), (out_ids, out_mask) = (tokenizer.encode([text], T) for text in (read, write))
        return row | {"ids": ids[0], "txt_mask": mask[0], "out_ids": out_ids[0], "out_mask": out_mask[0]}
    ids, mask = tokenizer.encode([f"{prompt} {caption}".strip() + "\n"], T)
    hidden = _prompt_length(tokenizer, prompt) if prompt else 0
    return row | {"ids": ids[0], "txt_mask": mask[0], "lm_mask": mask[0] & (np.arange(T) >= hidden)}


def _halves(caption: str, rng: np.random.Generator) -> tuple[str, str]:
    """The caption cut behind one of its words, from the first to the middle one, each as likely (reference: section
    4.2); one of a single word has nothing before it."""
    words = caption.split(" ")
    at = int(rng.integers(1, len(words) // 2 + 1)) if len(words) > 1 else 0
    return " ".join(words[:at]), " ".join(words[at:])


@functools.lru_cache
def _prompt_length(tokenizer, prompt: str) -> int:
    return int(tokenizer.lengths([prompt], 1 << 20)[0])


def shapes(cfg) -> dict:
    B, T = cfg.train.batch, cfg.text.max_len
    more = {"lm_mask": ((B, T), bool)}
    if cfg.model.llm.kind == "t5":
        more = {"out_ids": ((B, T), np.int32), "out_mask": ((B, T), bool)}
    return pairs.shapes(cfg) | more


def loss(model, cfg, params, extra, batch: dict, keys: step.Keys):
    """The mean negative log-likelihood of what the language model is to write, of one (micro-)batch.

    batch: img f32[B,S,S,3] normalised, and the arrays of `example`; with "question" i32[B,T'] and "question_mask" for a
    Q-Former that reads one. Returns loss f32[], (metrics, {}). A mean over the
    tokens of each group of loss.group_size examples, then over groups: what the original's devices averaged.
    """
    apply = functools.partial(model.apply, {"params": params})
    streams = step.dropout_streams(keys.dropout, ("vit", "qformer", "llm"))
    img_tok = apply(batch["img"], method="encode_image", deterministic=False, rngs=streams["vit"])
    question = [batch[name] for name in ("question", "question_mask") if name in batch]
    soft = apply(img_tok, *question, method="soft_prompt", deterministic=False, rngs=streams["qformer"])
    apart = (batch["out_ids"], batch["out_mask"]) if model.writes_answers_apart else ()
    logits = apply(
        soft,
        batch["ids"],
        batch["txt_mask"],
        *apart,
        method="target_logits",
        deterministic=False,
        rngs=streams["llm"],
    )
    return of_tokens(cfg, model, logits, *(apart or (batch["ids"], batch["lm_mask"])))


def of_tokens(cfg, model, logits, targets, mask):
    """The loss of a language model and its metrics: of logits f32[B,T,Vp] for the targets i32[B,T] that mask bool[B,T]
    keeps."""
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
    freeze = tuple(cfg.optim.freeze)
    return counts.blip2_stage2_step(
        cfg, T, frozen=blip2_stage1.FROZEN in freeze, llm_frozen=any(regex.startswith("llm/") for regex in freeze)
    )
