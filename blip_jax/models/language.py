"""A language model alone: what BLIP-2's second stage takes over, learnt from texts without pictures."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict

from blip_jax.models.blip2_llm import language_model


class Language(nn.Module):
    """OPT or T5 as `Blip2Llm` has it; parameters llm."""

    llm_sizes: Any
    init_std: float = 0.02
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, model) -> Language:
        """Builds from `cfg.model` of `config.blip2`, with a language model; its other parts are not read."""
        return cls(FrozenDict(model.llm), model.init_std, model.llm_dropout, jnp.dtype(model.dtype))

    def setup(self):
        self.llm = language_model(self.llm_sizes, init_std=self.init_std, dropout=self.dropout, dtype=self.dtype)

    def __call__(self, img, ids, txt_mask):
        """Runs every branch once, so that `init` creates every parameter; there is none for pictures."""
        return self.target_logits(ids, txt_mask, *((ids, txt_mask) if self.llm_sizes["kind"] == "t5" else ()))

    def target_logits(self, ids, txt_mask, out_ids=None, out_mask=None, *, deterministic: bool = True):
        """What the model says of each token before it is read.

        OPT: f32[B,T-1,Vp], of ids i32[B,T] behind the first (txt_mask bool[B,T], padded on the right). T5:
        f32[B,U,Vp], of each of out_ids i32[B,U] (out_mask bool[B,U]), with ids what it reads.
        """
        embeds = self.llm.embed(ids)
        if out_ids is None:
            return self.llm.logits(self.llm(embeds, txt_mask, deterministic=deterministic)[:, :-1])
        return self.llm.target_logits(embeds, txt_mask, out_ids, out_mask, deterministic=deterministic)
