"""BLIP-2's first stage: image tower, Q-Former, projections and matching head (BLIP-2 paper, section 3.1)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from blip_jax.models.blip import unit
from blip_jax.models.layers.norm import LayerNorm
from blip_jax.models.text import cache as caches
from blip_jax.models.text.cache import images_of
from blip_jax.models.text.qformer import QFormer
from blip_jax.models.vision.towers import tower
from blip_jax.models.vision.vit import torch_uniform


def begin(model: nn.Module, **qformer) -> None:
    """What both stages begin with, in the `setup` of their models: vit, ln_vision, query_tokens, qformer.

    qformer: what the Q-Former is told besides its sizes.
    """
    model.vit = tower(
        model.vit_sizes,
        img_size=model.img_size,
        init_std=model.init_std,
        drop_path=model.drop_path,
        remat=model.remat,
        dtype=model.dtype,
    )
    model.ln_vision = LayerNorm(model.vision_eps, model.dtype)
    sizes = dict(model.qformer_sizes)
    shape = sizes.pop("queries"), sizes["width"]
    model.query_tokens = model.param("query_tokens", nn.initializers.normal(model.init_std), shape)
    model.qformer = QFormer(
        **sizes,
        kv_width=model.vit_sizes["width"],
        init_std=model.init_std,
        dropout=model.dropout,
        remat=model.remat,
        dtype=model.dtype,
        **qformer,
    )


def tokens_of(model: nn.Module, img, deterministic: bool):
    """Normalised pixels f32[B,S,S,3] -> img_tok [B,P,D], behind ln_vision, of a model that `begin` has set up."""
    img_tok = model.vit(img, deterministic=deterministic or model.frozen)
    return model.ln_vision(jax.lax.stop_gradient(img_tok) if model.frozen else img_tok)


class Seen(NamedTuple):
    """What text passes need of B images: keys and values of the cross-attentions [L/2,B,P,N,H], and those that the
    queries have in every self-attention once they looked [L,B,Q,N,H]."""

    image: Any
    queries: Any


class Blip2(nn.Module):
    """All parts of the first stage as methods on arrays, named as `Blip`'s; parameters vit, ln_vision, query_tokens,
    qformer, vision_proj, text_proj, itm_head, temp.

    [DEC] is the last id of the vocabulary. With `frozen` the tower runs as in evaluation and has no gradient.
    """

    vit_sizes: Any
    qformer_sizes: Any
    img_size: int
    embed_dim: int
    vision_eps: float = 1e-5
    frozen: bool = False
    init_std: float = 0.02
    drop_path: float = 0.0
    dropout: float = 0.1
    remat: str = "none"
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, model, *, frozen: bool = False) -> Blip2:
        """Builds from `cfg.model` of `config.blip2`."""
        return cls(
            FrozenDict(model.vit),
            FrozenDict(model.qformer),
            model.img_size,
            model.embed_dim,
            model.vision_eps,
            frozen,
            model.init_std,
            model.drop_path,
            model.dropout,
            model.remat,
            jnp.dtype(model.dtype),
        )

    def setup(self):
        begin(self)
        init = torch_uniform(self.qformer_sizes["width"])
        dense = lambda n: nn.Dense(n, precision="highest", kernel_init=init, bias_init=init)
        self.vision_proj, self.text_proj, self.itm_head = dense(self.embed_dim), dense(self.embed_dim), dense(2)
        self.temp = self.param("temp", nn.initializers.constant(0.07), ())

    @property
    def dec_id(self) -> int:
        return self.qformer_sizes["vocab_size"] - 1

    def __call__(self, img, ids, txt_mask):
        """Runs every branch once, so that `init` creates every parameter."""
        qry, kv = self.look(self.encode_image(img))
        text = self.encode_text(ids, txt_mask), self.match(ids, txt_mask, kv), self.lm_logits(ids, txt_mask, kv)
        return self.project_queries(qry), *text

    def encode_image(self, img, *, deterministic: bool = True):
        """Normalised pixels f32[B,S,S,3] -> img_tok [B,P,D], behind ln_vision"""
        return tokens_of(self, img, deterministic)

    def look(self, img_tok, *, deterministic: bool = True):
        """img_tok [B,P,D] -> what the queries found, qry [B,Q,W], and `Seen` for every text pass over these images"""
        image = self.qformer.image_kv(img_tok)
        qry, queries = self.qformer.look(self.query_tokens, image, deterministic=deterministic)
        return qry, Seen(image, queries)

    def image_kv(self, img_tok) -> Seen:
        """`look`'s keys and values."""
        return self.look(img_tok)[1]

    def match_kv(self, img_tok) -> Seen:
        """Keys and values that `match` takes, without the pass of the queries alone that texts are written behind."""
        return Seen(self.qformer.image_kv(img_tok), None)

    def project_queries(self, qry):
        """qry [B,Q,W] -> img_emb f32[B,Q,E], each of unit norm"""
        return unit(self.vision_proj(qry.astype(jnp.float32)))

    def project_image(self, img_tok):
        """img_tok [B,P,D] -> img_emb f32[B,Q,E], each of unit norm"""
        return self.project_queries(self.look(img_tok)[0])

    def encode_text(self, ids, txt_mask, *, deterministic: bool = True):
        """ids i32[B,T] starting with [CLS], txt_mask bool[B,T] -> txt_tok [B,T,W], txt_emb f32[B,E] of unit norm"""
        txt_tok = self.qformer.read(ids, txt_mask, deterministic=deterministic)
        return txt_tok, unit(self.text_proj(txt_tok[:, 0].astype(jnp.float32)))

    def similarity(self, img_emb, txt_emb):
        """The largest cosine of an image's queries with a text, f32[B,C] of B images with C texts: img_emb f32[B,Q,E],
        txt_emb f32[C,E]; f32[B,G] of each with G of its own, f32[B,G,E].

        Of arrays of NumPy, which stay on the host, or of jax.
        """
        if txt_emb.ndim == 3:
            return (img_emb[:, None] * txt_emb[:, :, None]).sum(-1).max(-1)
        maximum = np.maximum if isinstance(img_emb, np.ndarray) else jnp.maximum
        with jax.default_matmul_precision("highest"):  # a query at a time: all at once would be Q times the result
            return functools.reduce(maximum, (img_emb[:, q] @ txt_emb.T for q in range(img_emb.shape[1])))

    def join(self, ids, txt_mask, kv, *, img_idx: tuple | None = None, deterministic: bool = True):
        """States of the queries that see image and text, [B*G,Q,W] of ids i32[B*G,T] against B images.

        Row b*G + g is a text for image b, or for the image that img_idx[g] names (`grouped_cross_attention`).
        """
        if img_idx is None:
            img_idx = (None,) * (ids.shape[0] // images_of(kv))
        given = self.query_tokens, ids, txt_mask, kv.image
        return self.qformer.join(*given, img_idx=img_idx, deterministic=deterministic)[0]

    def match(
        self,
        ids,
        txt_mask,
        kv,
        *,
        img_idx: tuple | None = None,
        first_id: int | None = None,
        deterministic: bool = True,
    ):
        """Matching logits f32[B*G,2] (column 1: the text belongs to the image), the mean over the queries of `join`.

        Position 0 stays [CLS]; `first_id` puts another id there.
        """
        ids = ids if first_id is None else ids.at[:, 0].set(first_id)
        qry = self.join(ids, txt_mask, kv, img_idx=img_idx, deterministic=deterministic)
        return self.itm_head(qry.astype(jnp.float32)).mean(axis=1)

    def lm_logits(self, ids, txt_mask, kv, *, deterministic: bool = True):
        """Next-token logits f32[B,T-1,Vp] of ids i32[B,T], one text per image; position 0 is set to [DEC]."""
        ids = ids.at[:, 0].set(self.dec_id)[:, :-1]
        txt_tok = self.qformer.write(ids, txt_mask[:, :-1], kv.queries, deterministic=deterministic)
        return self.qformer.lm_logits(txt_tok)

    def empty_cache(self, rows: int, length: int):
        """Self-attention cache of `rows` texts of at most `length` tokens, for `extend`."""
        return caches.empty(self.qformer_sizes, rows, length, self.dtype)

    def extend(self, ids, start, cache, kv):
        """Cached decoding: (next-token logits f32[R,Vp] after the last of ids i32[R,t], cache).

        ids are positions start..start+t-1 of R = B*n texts, rows b*n+i for image b; [DEC] is the caller's. Works
        without dropout.
        """
        txt_tok, cache = self.qformer.extend(ids, start, cache, kv.queries)
        return self.qformer.lm_logits(txt_tok[:, -1:])[:, 0], cache
