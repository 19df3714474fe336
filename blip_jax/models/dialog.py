"""Visual dialog: does an answer continue a dialog about a picture? One text encoder reads the picture's caption alone,
and the dialog with the picture and the caption's states before its eyes (BLIP paper, section 5.5, figure 5c)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from blip_jax.models.base import Base
from blip_jax.models.text.cache import images_of
from blip_jax.models.vision.vit import torch_uniform


class BlipDialog(Base):
    """BLIP's model of Visual Dialog as methods on arrays; parameters vit, med, itm_head.

    Cross-attention reads image tokens and, behind them, the caption's states of the same text encoder: both have its
    width.
    """

    def setup(self):
        self.vit = self.tower()
        self.med = self.text(kv_width=self.vit_sizes["width"], decoder=False)
        uniform = torch_uniform(self.med_sizes["width"])
        self.itm_head = nn.Dense(2, precision="highest", kernel_init=uniform, bias_init=uniform)

    def __call__(self, img, ids, txt_mask):
        """Runs every branch once, the text as caption and as dialog, so that `init` creates every parameter."""
        states = self.encode_caption(ids, txt_mask)
        return self.match(ids, txt_mask, *self.seen(self.encode_image(img), states, txt_mask))

    def encode_caption(self, ids, txt_mask, *, deterministic: bool = True):
        """States [B,C,D] of captions ids i32[B,C] with [CLS] first, bool[B,C]; the picture is not looked at."""
        return self.med(ids, txt_mask, deterministic=deterministic)

    def seen(self, img_tok, states, txt_mask):
        """What every text about a picture looks at: keys and values of all layers, each [L,B,P+C,N,H], and which of
        them count, bool[B,P+C], of img_tok [B,P,D] and `encode_caption`'s states [B,C,D] with the captions' mask."""
        kv = self.med.image_kv(jnp.concatenate([img_tok, states], axis=1))
        return kv, jnp.concatenate([jnp.ones(img_tok.shape[:2], bool), txt_mask], axis=1)

    def match(self, ids, txt_mask, kv, kv_mask, *, deterministic: bool = True):
        """Logits f32[B*G,2] (column 1: the last answer is the right one) of dialogs ids i32[B*G,T], row b*G + g about
        picture b, given `seen` of B pictures. Position 0 is set to [ENC]."""
        img_idx = (None,) * (ids.shape[0] // images_of(kv))
        txt_tok = self.med(
            ids.at[:, 0].set(self.enc_id),
            txt_mask,
            kv=kv,
            kv_mask=kv_mask,
            img_idx=img_idx,
            first_only=True,
            deterministic=deterministic,
        )
        return self.itm_head(txt_tok[:, 0].astype(jnp.float32))
