"""BERT as initial weights of the MED: its names, the rows of the new tokens, the token-type row that it always adds."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from blip_jax.convert.apply import as_float32
from blip_jax.convert.wrappers import Renamed
from blip_jax.data.text.wordpiece import EXTRA
from blip_jax.models.text.med import padded_vocab

WORDS = "bert.embeddings.word_embeddings.weight"
TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"


def names(tensors: Mapping) -> Mapping:
    """BERT's tensors under one set of names; others as they are.

    Its files come with and without `bert.` before the names, and with TensorFlow's names of LayerNorm's parameters.
    """
    if not any(name.removeprefix("bert.").startswith("embeddings.word_embeddings") for name in tensors):
        return tensors

    def rename(name):
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        return name if name.startswith(("bert.", "cls.")) else f"bert.{name}"

    back = {rename(name): name for name in tensors}
    return Renamed(tensors, back) if len(back) == len(tensors) else tensors  # two of one name: left as they are


def token_types(tensors: Mapping) -> int | None:
    """Rows of the token-type table, None where there is none."""
    return tensors[TOKEN_TYPES].shape[0] if TOKEN_TYPES in tensors and tensors[TOKEN_TYPES].shape else None


def settle_token_types(med: dict, tensors: Mapping, drop: bool, notes: list[str]) -> None:
    """Adds row 0 of the token-type table, which BERT adds to every token of a single text, to each position's row.

    MED has no token types, and the original BLIP dropped the row. drop: so does this. ValueError: no table of the
    model's width.
    """
    if TOKEN_TYPES not in tensors:
        return
    table, positions = as_float32(tensors[TOKEN_TYPES]), med["embed"]["pos"]["embedding"]
    if table.ndim != 2 or not len(table) or table.shape[1] != positions.shape[1] or not np.isfinite(table).all():
        raise ValueError(f"misshapen: {TOKEN_TYPES} is {list(table.shape)}, or not finite")
    if drop:
        notes.append("the token-type row that BERT adds to every token is dropped, as by the original BLIP")
        return
    med["embed"]["pos"]["embedding"] = positions + table[0]
    notes.append("the token-type row that BERT adds to every token went into the position table")


def add_tokens(med: dict, size: int, notes: list[str]) -> int:
    """Appends the rows of [DEC] and [ENC] to BERT's word table and to the head's bias; returns the new size.

    The rows of the table are N(0, 0.02), those of the bias zeros.
    """
    grown, table = size + len(EXTRA), med["embed"]["word"]["embedding"]
    rows = np.zeros((padded_vocab(grown), table.shape[1]), np.float32)
    rows[:size] = table[:size]
    rows[size:grown] = np.random.default_rng(0).normal(0.0, 0.02, (len(EXTRA), table.shape[1]))
    med["embed"]["word"]["embedding"] = rows
    if "lm_head" in med:
        bias = np.zeros(padded_vocab(grown), np.float32)
        bias[:size] = med["lm_head"]["bias"][:size]
        med["lm_head"]["bias"] = bias
    notes.append(f"the word table grew from {size} to {grown} rows: {' and '.join(EXTRA)}, random with deviation 0.02")
    return grown
