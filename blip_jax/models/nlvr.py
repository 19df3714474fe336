"""NLVR2: is a sentence true of two images? One text encoder whose layers look at both (paper section 5.4, figure 5)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip_jax.models.base import Base
from blip_jax.models.layers import stack
from blip_jax.models.layers.attention import HeadedAttention, Mlp, attention
from blip_jax.models.layers.dense import Dense
from blip_jax.models.layers.norm import Dropout, LayerNorm
from blip_jax.models.text.med import EPS, Embed, PostNormAttention
from blip_jax.models.vision.vit import torch_uniform

FIRST_MERGE = 6  # layers before this one average what they saw in the two images, from it on a dense layer merges it


class TwinLayer(nn.Module):
    """Self-attention, a cross-attention for each image under one residual and LayerNorm, feed-forward.

    What it saw in the two images is averaged, or joined by the dense layer that it is given.
    """

    width: int
    heads: int
    mlp_width: int
    init_std: float
    dropout: float
    dtype: Any

    def setup(self):
        cross = lambda: HeadedAttention(self.width, self.heads, self.init_std, self.dtype)
        self.self_attn = PostNormAttention(self.width, self.heads, self.init_std, self.dtype, dropout=self.dropout)
        self.cross_attn0, self.cross_attn1 = cross(), cross()
        self.cross_ln, self.mlp_ln = LayerNorm(EPS, self.dtype), LayerNorm(EPS, self.dtype)
        self.mlp = Mlp(self.mlp_width, self.init_std, self.dtype)
        self.drop = Dropout(self.dropout)

    def __call__(self, x, mask, img_tok0, img_tok1, merge=None, deterministic: bool = True, first_only: bool = False):
        """x [B,T,D], mask bool[B,1,1,T], img_tok0/1 [B,P,D'], merge: [B,T,2D] -> [B,T,D] or None -> [B,T,D], or
        [B,1,D]"""
        drop = lambda y: self.drop(y, deterministic=deterministic)
        x = self.self_attn.self_attention(x, mask, deterministic, first_only)
        seen0, seen1 = (
            a.project_out(attention(a.project_q(x), *a.project_kv(tok), drop=self.drop.active(deterministic)))
            for a, tok in ((self.cross_attn0, img_tok0), (self.cross_attn1, img_tok1))
        )
        both = (seen0 + seen1) / 2 if merge is None else merge(jnp.concatenate([seen0, seen1], axis=-1))
        x = self.cross_ln(x + drop(both))
        return self.mlp_ln(x + drop(self.mlp(x)))


class Merge(nn.Module):
    """The dense layers that join what the last text layers saw in the two images. Parameters blocks (stacked)."""

    layers: int
    width: int
    init_std: float
    dtype: Any

    def setup(self):
        self.blocks = stack.parameters(self, self._layer(), self.layers, jnp.zeros((1, 1, 2 * self.width), self.dtype))

    def _layer(self):
        return Dense(self.width, dtype=self.dtype, kernel_init=nn.initializers.normal(self.init_std), parent=None)

    def join(self, params, x):
        """[B,T,2D] -> [B,T,D] with the parameters of one layer"""
        return self._layer().apply({"params": params}, x)


class TwinMed(nn.Module):
    """Ids to token states, grounded in two images; sizes as `Med`. Parameters embed, blocks (stacked),
    merge/blocks (of the last layers)."""

    width: int
    layers: int
    heads: int
    mlp: int
    positions: int
    vocab_size: int
    kv_width: int
    init_std: float = 0.02
    dropout: float = 0.1
    dtype: Any = jnp.float32

    def setup(self):
        self.embed = Embed(self.width, self.vocab_size, self.positions, self.init_std, self.dropout, self.dtype)
        x, img_tok = jnp.zeros((1, 1, self.width), self.dtype), jnp.zeros((1, 1, self.kv_width), self.dtype)
        self.blocks = stack.parameters(self, self._layer(), self.layers, x, None, img_tok, img_tok)
        if self.layers > FIRST_MERGE:
            self.merge = Merge(self.layers - FIRST_MERGE, self.width, self.init_std, self.dtype)

    def _layer(self) -> TwinLayer:
        return TwinLayer(self.width, self.heads, self.mlp, self.init_std, self.dropout, self.dtype, parent=None)

    def __call__(self, ids, txt_mask, img_tok0, img_tok1, *, deterministic: bool = True):
        """State of the first position [B,1,D]: ids i32[B,T], txt_mask bool[B,T] (True = real token), img_tok0/1
        [B,P,D']."""
        mask, layer, last = txt_mask[:, None, None, :], self._layer(), self.layers - 1
        keys = None if deterministic or not self.dropout else jax.random.split(self.make_rng("dropout"), self.layers)
        merges = self.merge.blocks if self.layers > FIRST_MERGE else None

        def attend(x, params, key, merge, first_only=False):
            rngs, join = (
                None if key is None else {"dropout": key},
                None if merge is None else functools.partial(self.merge.join, merge),
            )
            return layer.apply(
                {"params": params}, x, mask, img_tok0, img_tok1, join, deterministic, first_only, rngs=rngs
            ), None

        def through(x, start, stop, merges):
            return stack.through(
                attend, x, stack.part(self.blocks, start, stop), stack.part(keys, start, stop), merges
            )[0]

        x = self.embed(ids, deterministic)
        with jax.named_scope("blocks"):
            x = through(x, 0, min(last, FIRST_MERGE), None)
            if last > FIRST_MERGE:
                x = through(x, FIRST_MERGE, last, stack.part(merges, 0, last - FIRST_MERGE))
            return attend(x, *map(stack.last, (self.blocks, keys, merges)), first_only=True)[0]


class Head(nn.Module):
    """dense, ReLU, out: [B,D] -> f32[B,2], in float32"""

    @nn.compact
    def __call__(self, x):
        uniform = torch_uniform(x.shape[-1])
        dense = lambda n, name: nn.Dense(n, precision="highest", kernel_init=uniform, bias_init=uniform, name=name)
        return dense(2, "out")(jax.nn.relu(dense(x.shape[-1], "dense")(x.astype(jnp.float32))))


class BlipNlvr(Base):
    """BLIP's NLVR2 model as methods on arrays; parameters vit, med (twin cross-attention), cls_head."""

    def setup(self):
        self.vit = self.tower()
        self.med = self.text(TwinMed, kv_width=self.vit_sizes["width"])
        self.cls_head = Head()

    def __call__(self, img, ids, txt_mask):
        """Classifies each text with its image as both images, so that `init` creates every parameter."""
        img_tok = self.encode_image(img)
        return self.classify(ids, txt_mask, img_tok, img_tok)

    def classify(self, ids, txt_mask, img_tok0, img_tok1, *, first_id: int | None = None, deterministic: bool = True):
        """Logits f32[B,2] (column 1: the text is true) of ids i32[B,T] given the left and the right image, img_tok
        [B,P,D].

        Position 0 is set to [ENC], as in training; `first_id` puts another id there.
        """
        ids = ids.at[:, 0].set(self.enc_id if first_id is None else first_id)
        return self.cls_head(self.med(ids, txt_mask, img_tok0, img_tok1, deterministic=deterministic)[:, 0])
