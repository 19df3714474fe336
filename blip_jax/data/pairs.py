"""Image-text pairs: what the tasks that learn from captions make of a record."""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from blip_jax.data.source import BadRecord
from blip_jax.data.text.clean import clean_caption, plain_text


def captions(record: dict, max_words: int) -> tuple[list[str], list[str]]:
    """The non-empty cleaned captions of a record, and notes. BadRecord when there is none."""
    out, notes = [], []
    for caption in record["captions"]:
        caption, found = plain_text(caption)
        notes += found
        if caption.count(" ") > 10 * max_words:
            notes.append(f"long caption, cut to {max_words} words")
        out.append(clean_caption(caption, max_words))
    out = [c for c in out if any(letter.isprintable() and not letter.isspace() for letter in c)]
    if not out:
        raise BadRecord(record["key"], "empty caption")
    return out, list(dict.fromkeys(notes))


def text(record: dict, rng: np.random.Generator, cfg) -> tuple[str, list[str]]:
    """One of the record's captions after cfg.text.prompt, and notes. BadRecord: it has none."""
    found, notes = caption(record, rng, cfg)
    return cfg.text.prompt + found, notes


def caption(record: dict, rng: np.random.Generator, cfg) -> tuple[str, list[str]]:
    """One of the record's captions, cleaned, and notes. BadRecord: it has none."""
    found, notes = captions(record, cfg.text.max_words)
    return found[int(rng.integers(len(found)))], notes


def example(record: dict, rng: np.random.Generator, cfg, tokenizer) -> dict:
    """{"img": bytes, "ids": i32[T], "txt_mask", "lm_mask": bool[T], "image_id": i64[], "notes"}; T is cfg.text.max_len.

    The text begins with cfg.text.prompt; lm_mask is txt_mask without [CLS] and the prompt.
    """
    written, notes = text(record, rng, cfg)
    ids, mask = tokenizer.encode([written], cfg.text.max_len)
    scored = mask[0] & (np.arange(cfg.text.max_len) >= prompt_length(tokenizer, cfg.text.prompt))
    return {
        "img": record["image"],
        "ids": ids[0],
        "txt_mask": mask[0],
        "lm_mask": scored,
        "image_id": number(record["source"], record["image_id"]),
        "notes": notes,
    }


def shapes(cfg) -> dict:
    """{name: (shape, dtype)} of pictures, ids and their mask in a global batch."""
    B, S, T = cfg.train.batch, cfg.model.img_size, cfg.text.max_len
    return {"img": ((B, S, S, 3), np.uint8), "ids": ((B, T), np.int32), "txt_mask": ((B, T), bool)}


def number(source: str, image_id: str) -> np.int64:
    """A stable number for an image: the same image of the same source has the same in every run."""
    name = f"{source}\0{image_id}".encode("utf-8", "surrogatepass")
    return np.int64(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True))


@functools.lru_cache
def prompt_length(tokenizer, prompt: str) -> int:
    """Positions of [CLS] and the prompt."""
    return int(tokenizer.lengths([prompt], 1 << 20)[0]) - 1


def prompt_problems(cfg, tokenizer) -> list[str]:
    """The prompt leaves no room for a word and [SEP]."""
    n, T = prompt_length(tokenizer, cfg.text.prompt), min((cfg.text.max_len, *cfg.text.buckets))
    if n + 2 <= T:
        return []
    leaf = "text.max_len" if T == cfg.text.max_len else "the shortest of text.buckets"
    return [
        f"text.prompt={cfg.text.prompt!r} takes {n} of {leaf}={T} positions with [CLS], so that no word fits "
        f"before [SEP]: set {leaf} to {n + 2} at the very least, or shorten the prompt"
    ]


def bucket_problems(cfg, smoothed: bool = True) -> list[str]:
    """What text.buckets asks of the loss; smoothed: it has a label-smoothed language modelling part."""
    if not cfg.text.buckets or not smoothed or cfg.loss.smoothing_over != "all":
        return []
    return [
        "loss.smoothing_over is 'all' but text.buckets is set: that mean takes in the padding, of which there is "
        "less in a "
        "bucket, so the loss would be another one; set loss.smoothing_over='valid' or text.buckets=()"
    ]
