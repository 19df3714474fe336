"""What BLIP's models have in common: the sizes they are built from, the image tower, text models of one size, and the
ids that each begins a text with."""

from __future__ import annotations

from typing import Any, Self

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict

from blip_jax.models.text.med import Med
from blip_jax.models.vision.vit import Vit, each_frame


class Base(nn.Module):
    """An image tower `vit`, and text models of one size.

    [DEC] and [ENC] are the last two ids of the vocabulary, in this order.
    """

    vit_sizes: Any
    med_sizes: Any
    img_size: int
    init_std: float = 0.02
    drop_path: float = 0.0
    dropout: float = 0.1
    remat: str = "none"
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, model, **more) -> Self:
        """Builds from `cfg.model` of blip_jax.config; more: fields that a model has of its own."""
        return cls(
            FrozenDict(model.vit),
            FrozenDict(model.med),
            model.img_size,
            model.init_std,
            model.drop_path,
            model.dropout,
            model.remat,
            jnp.dtype(model.dtype),
            **more,
        )

    @nn.nowrap
    def tower(self) -> Vit:
        """For `setup`."""
        return Vit(
            **self.vit_sizes,
            img_size=self.img_size,
            init_std=self.init_std,
            drop_path=self.drop_path,
            remat=self.remat,
            dtype=self.dtype,
        )

    @nn.nowrap
    def text(self, kind=Med, **parts):
        """A text model of `med_sizes`, for `setup`; parts: what it is told besides."""
        return kind(**self.med_sizes, **parts, init_std=self.init_std, dropout=self.dropout, dtype=self.dtype)

    @property
    def dec_id(self) -> int:
        return self.med_sizes["vocab_size"] - 2

    @property
    def enc_id(self) -> int:
        return self.med_sizes["vocab_size"] - 1

    def encode_image(self, img, *, deterministic: bool = True):
        """Normalised pixels f32[B,S,S,3] -> img_tok [B,P,D], of videos f32[B,R,S,S,3] [B,R*P,D] (`vit.each_frame`)"""
        return each_frame(self.vit, img, deterministic)
