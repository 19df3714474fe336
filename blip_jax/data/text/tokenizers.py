"""The tokenizer of a config: that of the model which reads its texts."""

from __future__ import annotations

import pathlib

from blip_jax.data.text import bpe, sentencepiece, wordpiece

KINDS = {"bert": wordpiece.Tokenizer, "opt": bpe.Tokenizer, "t5": sentencepiece.Tokenizer}


def of(model, path: str | pathlib.Path):
    """The tokenizer in file `path` for a `cfg.model`: BERT's WordPiece, or the kind of its language model.

    ValueError: the file is none of that kind.
    """
    llm = model.get("llm")
    return KINDS[llm.kind if llm else "bert"](path)
