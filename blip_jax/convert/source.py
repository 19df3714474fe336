"""What a checkpoint of any kind is once it is read, and the settings that its tensors show."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from blip_jax import config
from blip_jax.convert import apply
from blip_jax.convert.rules.blip2 import HALVES, WHOLE
from blip_jax.convert.rules.families import INITIAL, WORDS

PADDED = "word/embedding$|lm_head/bias$|llm/lm_head/kernel$"  # arrays with a row, or a column, for each word
POSITION_IDS = "Qformer.bert.embeddings.position_ids"


class Source(NamedTuple):
    """A checkpoint as read.

    state: {"params": nested numpy, and "momentum" where there is one}; arrays may still lie in the file.

    cfg: `config.base()` with objective, model and texts of this checkpoint, text.vocab "". vocab: file that came with
    it; questions: that of a Q-Former that reads questions, where vocab is the language model's. notes: what was
    ignored, resized, derived. absent: optional torch keys that the file did not have, so that the way back leaves them
    out. kept: fields of a config.json that nothing here needs, but the way back does.
    frozen: parts of the parameters that a run of ours only refers to, which LAVIS's files leave out.
    """

    family: str
    state: dict
    cfg: ConfigDict
    vocab: pathlib.Path | None
    notes: list[str]
    absent: tuple[str, ...] = ()
    kept: Mapping = MappingProxyType({})
    frozen: tuple[str, ...] = ()
    questions: pathlib.Path | None = None


def make_config(sizes: Mapping[str, int], layers: Mapping[str, int], heads: Mapping[str, int]) -> ConfigDict:
    """`config.base()` with the sizes that tensors show (`apply.infer`, `apply.layer_counts`).

    What they do not show stays.
    """
    c = config.base("large" if sizes.get("D") == config.VIT_SIZES["large"]["width"] else "base")
    with c.unlocked():
        if "D" in sizes:
            c.model.vit.update(
                width=sizes["D"], depth=layers["vit"], heads=heads["vit"], mlp=sizes["F"], patch=sizes["p"]
            )
            c.model.img_size = int((sizes["P"] - 1) ** 0.5) * sizes["p"]
        if "W" in sizes:
            c.model.med.update(
                width=sizes["W"],
                layers=layers["med"],
                heads=heads["med"],
                mlp=sizes["M"],
                positions=sizes["T"],
                vocab_size=sizes["V"],
            )
        c.model.embed_dim = sizes.get("E", c.model.embed_dim)
    return c


def vocab_sizes(cfg) -> dict[str, int]:
    """part -> entries of its vocabulary, of all parts that `cfg.model` has."""
    parts = ((name, part) for name, part in cfg.model.items() if isinstance(part, ConfigDict))
    return {name: part.vocab_size for name, part in parts if "vocab_size" in part}


def dtype_notes(tensors: Mapping) -> list[str]:
    other: dict[str, int] = {}
    for x in tensors.values():
        if x.dtype != np.float32 and not np.issubdtype(x.dtype, np.integer):
            other[str(x.dtype)] = other.get(str(x.dtype), 0) + 1
    return [f"{n} tensors in {dtype} became float32" for dtype, n in other.items()]


def official(
    source: Source, consume: bool = False, keep: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> dict[str, np.ndarray]:
    """The state dict of the originals: name -> array; consume, keep: as of `apply.to_torch`.

    ValueError: initial weights, which are no model.
    """
    if source.family in INITIAL:
        raise ValueError(
            f"{WORDS[source.family][0]} (family {source.family}) are no model: they start pre-training, --config.train."
            "init_from, and there is nothing to write back"
        )
    if source.family in HALVES:
        raise ValueError(
            f"LAVIS has no file of {WORDS[source.family][0]} (family {source.family}): write --to=hf or ours"
        )
    params = {name: part for name, part in source.state["params"].items() if name not in source.frozen}
    state = {**source.state, "params": params} if source.frozen else source.state
    tensors = apply.to_torch(source.family, state, vocab_size=vocab_sizes(source.cfg), consume=consume, keep=keep)
    for name, beside in apply.buffers(tensors).items():
        tensors[name] = np.arange(len(tensors[beside]), dtype=np.int64)[None]
    if source.family in WHOLE:  # LAVIS has this buffer also where the table is not
        tensors[POSITION_IDS] = np.arange(source.cfg.model.qformer.positions, dtype=np.int64)[None]
    return {name: x for name, x in tensors.items() if name not in source.absent}
