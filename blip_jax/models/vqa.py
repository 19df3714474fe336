"""Visual question answering: a question encoder that looks at the image, an answer decoder that looks at the
question's states."""

from __future__ import annotations

import jax

from blip_jax.models.base import Base
from blip_jax.models.text import cache as caches
from blip_jax.models.text.cache import images_of


class BlipVqa(Base):
    """BLIP's VQA model as methods on arrays; parameters vit, med (question encoder), med_dec (answer decoder), nothing
    shared.

    Cross-attention of med reads image tokens, that of med_dec question states, [B,S,D] of med's width. Masks of
    questions are the caller's choice: None lets padding be attended to, as the original does when it generates; it
    masks it in training and ranking.
    """

    def setup(self):
        self.vit = self.tower()
        self.med = self.text(kv_width=self.vit_sizes["width"], decoder=False)
        self.med_dec = self.text(kv_width=self.med_sizes["width"], encoder=False)

    def __call__(self, img, ids, txt_mask):
        """Runs every branch once, with the text as question and as answer, so that `init` creates every parameter."""
        states = self.encode_question(ids, txt_mask, self.image_kv(self.encode_image(img)))
        return self.lm_logits(ids, txt_mask, self.question_kv(states), txt_mask)

    def image_kv(self, img_tok):
        """img_tok [B,P,D] -> keys and values of all layers of the question encoder, each [L,B,P,N,H]"""
        return self.med.image_kv(img_tok)

    def encode_question(self, ids, txt_mask, kv, *, first_id: int | None = None, deterministic: bool = True):
        """States [B*G,S,D] of G questions per image, ids i32[B*G,S] row b*G + g, given `image_kv` of B images.

        Position 0 is set to [ENC], as in training; `first_id` puts another id there (transformers leaves [CLS]).
        """
        img_idx = (None,) * (ids.shape[0] // images_of(kv))
        ids = ids.at[:, 0].set(self.enc_id if first_id is None else first_id)
        return self.med(ids, txt_mask, kv=kv, img_idx=img_idx, deterministic=deterministic)

    def question_kv(self, states):
        """Question states [B,S,D] -> keys and values of all layers of the answer decoder, each [L,B,S,N,H]"""
        return self.med_dec.image_kv(states)

    def lm_logits(self, ids, txt_mask, kv, kv_mask=None, *, of=None, deterministic: bool = True):
        """Next-token logits f32[A,T-1,Vp] of answers ids i32[A,T]; position 0 is set to [DEC].

        Args:
          kv: `question_kv` of B questions; kv_mask: bool[B,S], their real tokens, or None: padding is attended to as
            well.
          of: i32[A], which question each answer belongs to; None: A = B*G, row b*G + g answers question b.
        """
        if of is not None:
            kv, kv_mask = jax.tree.map(lambda x: x[:, of], kv), None if kv_mask is None else kv_mask[of]
        img_idx = (None,) * (ids.shape[0] // images_of(kv))
        ids = ids.at[:, 0].set(self.dec_id)[:, :-1]
        txt_tok = self.med_dec(
            ids, txt_mask[:, :-1], kv=kv, kv_mask=kv_mask, img_idx=img_idx, causal=True, deterministic=deterministic
        )
        return self.med_dec.lm_logits(txt_tok)

    def empty_cache(self, rows: int, length: int):
        """Self-attention cache of `rows` answers of at most `length` tokens, for `extend`."""
        return caches.empty(self.med_sizes, rows, length, self.dtype)

    def extend(self, ids, start, cache, kv, kv_mask=None):
        """Cached decoding, as `Blip.extend`, with `question_kv` of B questions and kv_mask as in `lm_logits`."""
        answers = ids.shape[0] // images_of(kv)
        txt_tok, cache = self.med_dec.extend(ids, start, cache, kv, (None,) * answers, kv_mask)
        return self.med_dec.lm_logits(txt_tok[:, -1:])[:, 0], cache
