"""BLIP: vision transformer, MED, projections and matching head (paper section 3; sizes from the config)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip_jax.models.base import Base
from blip_jax.models.text import cache as caches
from blip_jax.models.text.cache import images_of
from blip_jax.models.vision.vit import torch_uniform


class Blip(Base):
    """All parts of BLIP as methods on arrays; parameters vit, med, vision_proj, text_proj, itm_head, temp.

    Without `encoder` (a captioner) only vit and med exist, without `decoder` (retrieval, matching) no lm_logits.
    """

    embed_dim: int = 256
    encoder: bool = True
    decoder: bool = True

    @classmethod
    def from_config(cls, model, *, encoder: bool = True, decoder: bool = True) -> Blip:
        """Builds from `cfg.model` of blip_jax.config; which parts there are follows from the task."""
        return super().from_config(model, embed_dim=model.embed_dim, encoder=encoder, decoder=decoder)

    def setup(self):
        self.vit = self.tower()
        self.med = self.text(kv_width=self.vit_sizes["width"], encoder=self.encoder, decoder=self.decoder)
        if not self.encoder:
            return
        dense = lambda n, fan_in: nn.Dense(
            n, precision="highest", kernel_init=torch_uniform(fan_in), bias_init=torch_uniform(fan_in)
        )
        self.vision_proj = dense(self.embed_dim, self.vit_sizes["width"])
        self.text_proj = dense(self.embed_dim, self.med_sizes["width"])
        self.itm_head = dense(2, self.med_sizes["width"])
        self.temp = self.param("temp", nn.initializers.constant(0.07), ())

    def __call__(self, img, ids, txt_mask):
        """Runs every branch once, so that `init` creates every parameter."""
        img_tok = self.encode_image(img)
        kv = self.image_kv(img_tok)
        out = ()
        if self.encoder:
            out = self.project_image(img_tok), self.encode_text(ids, txt_mask), self.match(ids, txt_mask, kv)
        return (*out, self.lm_logits(ids, txt_mask, kv)) if self.decoder else out

    def project_image(self, img_tok, frames: int = 1):
        """img_tok [B,P,D] -> img_emb f32[B,E], unit norm, from [CLS]; of videos of so many frames [B,frames*P,D]: the
        mean over their projections, before it is scaled to unit norm"""
        cls = img_tok.reshape(len(img_tok), frames, -1, img_tok.shape[-1])[:, :, 0]
        return unit(self.vision_proj(cls.astype(jnp.float32)).mean(axis=1))

    def encode_text(self, ids, txt_mask, *, deterministic: bool = True):
        """ids i32[B,T] starting with [CLS], txt_mask bool[B,T] -> txt_tok [B,T,D], txt_emb f32[B,E] of unit norm"""
        txt_tok = self.med(ids, txt_mask, deterministic=deterministic)
        return txt_tok, unit(self.text_proj(txt_tok[:, 0].astype(jnp.float32)))

    def similarity(self, img_emb, txt_emb):
        """Cosines f32[B,C] of B images with C texts, img_emb f32[B,E], txt_emb f32[C,E]; f32[B,G] of each with G of its
        own, f32[B,G,E].

        Of arrays of NumPy, which stay on the host, or of jax.
        """
        if txt_emb.ndim == 3:
            return (img_emb[:, None] * txt_emb).sum(-1)
        with jax.default_matmul_precision("highest"):
            return img_emb @ txt_emb.T

    def image_kv(self, img_tok, ended: bool = False):
        """img_tok [B,P,D] -> keys and values of all MED layers, each [L,B,P,N,H] (see `Med.image_kv`)"""
        return self.med.image_kv(img_tok, ended)

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
        """Matching logits f32[B*G,2] (column 1: the text belongs to the image) of ids i32[B*G,T] against B images.

        Row b*G + g is a text for image b, or for the image that img_idx[g] names (`grouped_cross_attention`). Position
        0 is set to [ENC], as in training; `first_id` puts another id there (the original's stand-alone ITM class leaves
        [CLS]).
        """
        if img_idx is None:
            img_idx = (None,) * (ids.shape[0] // images_of(kv))
        ids = ids.at[:, 0].set(self.enc_id if first_id is None else first_id)
        txt_tok = self.med(ids, txt_mask, kv=kv, img_idx=img_idx, first_only=True, deterministic=deterministic)
        return self.itm_head(txt_tok[:, 0].astype(jnp.float32))

    def match_looking(self, ids, txt_mask, kv, nudge):
        """`match` of one text per image, ids i32[B,T]: logits f32[B,2], and the probabilities of all cross-attentions
        [L,B,N,T,P], to which `nudge`, of that shape, is added (see `Med.look`)."""
        txt_tok, p = self.med.look(ids.at[:, 0].set(self.enc_id), txt_mask, kv, nudge)
        return self.itm_head(txt_tok[:, 0].astype(jnp.float32)), p

    def lm_logits(self, ids, txt_mask, kv, *, deterministic: bool = True):
        """Next-token logits f32[B,T-1,Vp] of ids i32[B,T], one text per image; position 0 is set to [DEC]."""
        ids = ids.at[:, 0].set(self.dec_id)[:, :-1]
        txt_tok = self.med(ids, txt_mask[:, :-1], kv=kv, causal=True, deterministic=deterministic)
        return self.med.lm_logits(txt_tok)

    def empty_cache(self, rows: int, length: int):
        """Self-attention cache of `rows` texts of at most `length` tokens, for `extend`."""
        return caches.empty(self.med_sizes, rows, length, self.dtype)

    def extend(self, ids, start, cache, kv):
        """Cached decoding: (next-token logits f32[R,Vp] after the last of ids i32[R,t], cache).

        ids are positions start..start+t-1 of R = B*n texts, rows b*n+i for image b; [DEC] is the caller's. Works
        without dropout.
        """
        texts = ids.shape[0] // images_of(kv)
        txt_tok, cache = self.med.extend(ids, start, cache, kv, (None,) * texts)
        return self.med.lm_logits(txt_tok[:, -1:])[:, 0], cache


def unit(x):
    """x f32[B,E] / max(|x|, 1e-12)"""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
