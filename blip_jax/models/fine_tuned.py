"""What BLIP's models of a fine-tuning task have in common: the sizes they are built from, and the image tower."""

from __future__ import annotations

from typing import Any, Self

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict

from blip_jax.models.vision.vit import Vit


class FineTuned(nn.Module):
    """An image tower, and text models of one size."""

    vit_sizes: Any
    med_sizes: Any
    img_size: int
    init_std: float = 0.02
    drop_path: float = 0.0
    dropout: float = 0.1
    remat: str = "none"
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, model) -> Self:
        """Builds from `cfg.model` of blip_jax.config."""
        return cls(
            FrozenDict(model.vit),
            FrozenDict(model.med),
            model.img_size,
            model.init_std,
            model.drop_path,
            model.dropout,
            model.remat,
            jnp.dtype(model.dtype),
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
