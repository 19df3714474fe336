"""What tensors of others are, by their names alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from blip_jax.convert import bert, blip2, towers
from blip_jax.convert.wrappers import unwrap

MARKS = (  # family -> a tensor that only it has, or only it and those above it; first match wins
    ("augreg", r"Transformer/encoderblock_\d+/.*"),
    ("nlvr", r"text_encoder\..*\.crossattention\.self0\..*"),
    ("pretrain", r"(text_encoder|itm_head|\w+_m)\..*", r"text_decoder\..*", r"(itm_head|text_proj|\w+_m)\..*"),
    ("vqa", r"text_encoder\..*", r"text_decoder\..*"),
    ("caption", r"text_decoder\..*"),
    ("retrieval", r"text_encoder\..*", r"temp|idx_queue|\w+_m\..*"),
    ("itm", r"text_encoder\..*", r"(text_proj|vision_proj)\..*"),
    ("dialog", r"text_encoder\..*", r"itm_head\..*"),
    ("features", r"text_encoder\..*"),
    ("instruct_opt", r"Qformer\.bert\.embeddings\.word_embeddings\..*", r"opt_proj\..*"),
    ("blip2_opt", r"Qformer\..*", r"opt_proj\..*"),
    ("instruct_t5", r"Qformer\.bert\.embeddings\.word_embeddings\..*", r"t5_proj\..*"),
    ("blip2_t5", r"Qformer\..*", r"t5_proj\..*"),
    ("blip2", r"Qformer\..*", r"temp|Qformer\.cls\..*"),
    ("blip2_itm", r"Qformer\..*", r"(itm_head|text_proj|vision_proj)\..*"),
    ("eva", r"blocks\.\d+\.attn\.q_bias"),
    ("clip", r"transformer\.resblocks\..*", "class_embedding"),
    ("opt", r"model\.decoder\.layers\..*"),
    ("t5", r"(encoder|decoder)\.block\.\d+\.layer\.0\.SelfAttention\..*"),
    ("deit", r"blocks\.\d+\.attn\.qkv\..*"),
    ("bert", r"bert\.encoder\.layer\..*"),
)


def find_family(names) -> str:
    """The family that tensors of these names belong to, "" if they look like none."""
    names = list(names)
    for family, *patterns in MARKS:
        if all(any(re.fullmatch(pattern, name) for name in names) for pattern in patterns):
            return family
    return ""


def plain_names(tensors: Mapping, origin: str) -> tuple[Mapping, list[str]]:
    """Tensors under the originals' names, and notes: without the names of wrappers, those of BERT in one form."""
    try:
        tensors, notes = unwrap(tensors, lambda names: bool(find_family(bert.names(dict.fromkeys(names)))))
    except ValueError as e:
        raise ValueError(f"{origin}: {e}") from None
    tensors = bert.names(tensors)
    if find_family(tensors) in ("", "eva", "clip") and towers.find(tensors):
        _, tensors, more = towers.penultimate(tensors, blip2.depth(tensors))
        notes += more
    return tensors, notes
