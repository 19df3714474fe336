"""Which tensors of a T5 checkpoint are its word table and its head, where a file has several names for them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from blip_jax.convert.rules.t5 import HEAD, WORDS


def words_and_head(tensors: Mapping, prefix: str = "") -> dict:
    """A state dict with the word table and the head under one name each, the first of WORDS and HEAD.

    The word table is any of WORDS, which must be equal: encoder and decoder share it. It is never taken from the head,
    which T5 v1.1 has for itself, whatever a config says of tying. Where there is no head, the table is both, and scores
    are not scaled, as FlanT5's never are (the first T5 scales those of a tied head).

    Args: tensors: names -> arrays, or what `numpy.asarray` reads; prefix: of T5's names.
    ValueError: no word table, or tables that differ.
    """
    held = [prefix + name for name in WORDS if prefix + name in tensors]
    if not held:
        raise ValueError(
            f"there is no word table, {', '.join(prefix + name for name in WORDS)}: give a checkpoint that holds one "
            "of them"
        )
    first = np.asarray(tensors[held[0]])
    for name in held[1:]:
        if not np.array_equal(first, np.asarray(tensors[name])):
            raise ValueError(
                f"{held[0]} and {name} differ, but encoder and decoder have one word table: "
                "give the checkpoint of a T5 whose two are equal"
            )
    out = {name: x for name, x in tensors.items() if name not in held}
    return {prefix + WORDS[0]: tensors[held[0]], prefix + HEAD: tensors[held[0]]} | out
