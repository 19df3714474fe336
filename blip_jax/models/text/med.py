"""MED: one BERT-style transformer as text encoder, image-grounded encoder and image-grounded decoder (BLIP paper,
section 3.1).

Everything is shared between encoder and decoder but the self-attention block: `self_attn` belongs to the encoder,
`self_attn_dec` to the decoder (paper table 3; reference: every leaf whose path holds no "/attention").
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip_jax.models.layers import stack
from blip_jax.models.layers.attention import HeadedAttention, Mlp, attention, grouped_cross_attention
from blip_jax.models.layers.cpu import platform, rows, summed
from blip_jax.models.layers.dense import Dense
from blip_jax.models.layers.norm import Dropout, LayerNorm, gelu
from blip_jax.models.text import cache as caches
from blip_jax.models.text.cache import KeysAndValues, opened
from blip_jax.parallel.collectives import gathered
from blip_jax.parallel.sharding import constrain

EPS = 1e-12


def padded_vocab(vocab_size: int) -> int:
    """Rows of the stored embedding: the vocabulary rounded up to a multiple of 128."""
    return -(-vocab_size // 128) * 128


class PostNormAttention(HeadedAttention):
    """Attention with residual and LayerNorm behind it: ln(x + drop(out(attention(x))))."""

    dropout: float = 0.1

    def setup(self):
        super().setup()
        self.ln = LayerNorm(EPS, self.dtype)
        self.drop = Dropout(self.dropout)

    def self_attention(self, x, mask, deterministic, first_only=False):
        """x [B,T,D], mask bool[B,1,1|T,T] -> [B,T,D], or [B,1,D], the first position alone"""
        queries, drop = x[:, :1] if first_only else x, self.drop.active(deterministic)
        y = attention(self.project_q(queries), *self.project_kv(x), mask=mask, drop=drop)
        return self.closed(queries, y, deterministic)

    def cached_attention(self, x, cache, layer, start):
        """Causal, at positions start..start+t-1 of a layer: x [R,t,D] -> ([R,t,D], cache with these t)."""
        k, v, seen, cache = self.cached(x, cache, layer, start)
        return self.closed(x, attention(self.project_q(x), k, v, mask=seen), True), cache

    def cached(self, x, cache, layer, start):
        """What x [R,t,D] at positions start..start+t-1 attends to in a layer: k, v [R,S,N,H], mask bool[t,S], and the
        cache with these t."""
        k, v, cache = caches.extended(cache, layer, start, self.project_kv(x), self.dtype)
        seen = jnp.arange(k.shape[1]) <= start + jnp.arange(x.shape[1])[:, None]  # t S
        return k, v, seen, cache

    def cross_attention(self, x, kv, kv_mask, img_idx, deterministic):
        """x [B*G,T,D], kv of B images, kv_mask and img_idx as in `grouped_cross_attention` -> [B*G,T,D]"""
        y = grouped_cross_attention(self.project_q(x), *kv, img_idx, self.drop.active(deterministic), kv_mask)
        return self.closed(x, y, deterministic)

    def looking(self, x, kv, nudge):
        """`cross_attention` of one text per image, without dropout, and its probabilities [B,N,T,P], to each of which
        `nudge`, of that shape, is added: where it is 0, the gradient by it is the one by the probabilities."""
        found = []

        def keep(p):
            found.append(p)
            return p + nudge

        y = grouped_cross_attention(self.project_q(x), *kv, (None,), keep)
        return self.closed(x, y, True), found[0]

    def closed(self, x, y, deterministic):
        return self.ln(x + self.drop(self.project_out(y), deterministic=deterministic))


class MedLayer(nn.Module):
    """Self-attention, cross-attention (where there is an image), feed-forward; each closed by residual and
    LayerNorm."""

    width: int
    heads: int
    mlp_width: int
    init_std: float
    encoder: bool  # whether the encoder's own self-attention exists
    decoder: bool  # whether the decoder's own self-attention exists
    dropout: float
    dtype: Any

    def setup(self):
        block = lambda: PostNormAttention(self.width, self.heads, self.init_std, self.dtype, dropout=self.dropout)
        self.cross_attn = block()
        if self.encoder:
            self.self_attn = block()
        if self.decoder:
            self.self_attn_dec = block()
        self.mlp = Mlp(self.mlp_width, self.init_std, self.dtype)
        self.mlp_ln = LayerNorm(EPS, self.dtype)
        self.drop = Dropout(self.dropout)

    def __call__(self, x, seen):
        """Runs every part once, so that `init` creates every parameter: x [1,1,D], seen [1,1,D']."""
        kv = self.cross_attn.project_kv(seen)
        for causal in (False,) * self.encoder + (True,) * self.decoder:
            x = self.attend(x, None, kv, None, (None,), causal, True, False)
        return x

    def attend(self, x, mask, kv, kv_mask, img_idx, causal: bool, deterministic: bool, first_only: bool):
        x = (self.self_attn_dec if causal else self.self_attn).self_attention(x, mask, deterministic, first_only)
        if kv is not None:
            x = self.cross_attn.cross_attention(x, kv, kv_mask, img_idx, deterministic)
        return self.mlp_ln(x + self.drop(self.mlp(x), deterministic=deterministic))

    def look(self, x, mask, kv, nudge):
        """`attend` of one text per image, in both directions, with `looking`."""
        x = self.self_attn.self_attention(x, mask, True)
        x, p = self.cross_attn.looking(x, kv, nudge)
        return self.mlp_ln(x + self.mlp(x)), p

    def extend(self, x, cache, layer, start, kv, kv_mask, img_idx):
        x, cache = self.self_attn_dec.cached_attention(x, cache, layer, start)
        x = self.cross_attn.cross_attention(x, opened(kv, self.dtype), kv_mask, img_idx, True)
        return self.mlp_ln(x + self.mlp(x)), cache

    def image_kv(self, img_tok):
        return self.cross_attn.project_kv(img_tok)


class Embed(nn.Module):
    """Word plus position embedding, LayerNorm, dropout; also the output matrix of the language-modelling head."""

    width: int
    vocab_size: int
    positions: int
    init_std: float
    dropout: float
    dtype: Any

    def setup(self):
        embed = lambda rows: nn.Embed(
            rows, self.width, dtype=self.dtype, embedding_init=nn.initializers.normal(self.init_std)
        )
        self.word, self.pos = embed(padded_vocab(self.vocab_size)), embed(self.positions)
        self.ln = LayerNorm(EPS, self.dtype)
        self.drop = Dropout(self.dropout)

    def __call__(self, ids, deterministic, start=0):
        x = rows(self._words(), ids) + self.pos(start + jnp.arange(ids.shape[1]))
        return constrain(self.drop(self.ln(x), deterministic=deterministic), "act_batch", None, "act_embed")

    def attend(self, x):
        """x [B,T,D] -> f32[B,T,Vp], products with every word's embedding, summed in float32"""
        return summed(x, self._words(), (((2,), (1,)), ((), ())))

    def _words(self):
        """[Vp,D] in the dtype of the computation, D whole: looked up in a part of D, every row would travel
        instead of the table."""
        return gathered(self.word.embedding.astype(self.dtype), ("vocab", "embed"), ("vocab", None))


class LmHead(nn.Module):
    """Dense, GELU, LayerNorm, then the word embedding transposed plus a bias of its own."""

    width: int
    vocab_size: int
    init_std: float
    dtype: Any

    @nn.compact
    def __call__(self, x, attend):
        h = Dense(self.width, dtype=self.dtype, kernel_init=nn.initializers.normal(self.init_std), name="dense")(x)
        h = LayerNorm(EPS, self.dtype, name="ln")(gelu(h))
        bias = self.param("bias", nn.initializers.zeros, (padded_vocab(self.vocab_size),))
        logits = constrain(attend(h) + bias, "act_batch", None, "act_vocab")
        return jnp.where(jnp.arange(bias.size) < self.vocab_size, logits, jnp.finfo(jnp.float32).min)


class Med(nn.Module):
    """Ids to token states in the three modes of the paper, told apart by `kv` and `causal`. Parameters embed,
    blocks (stacked), lm_head."""

    width: int
    layers: int
    heads: int
    mlp: int
    positions: int
    vocab_size: int
    kv_width: int  # of what cross-attention looks at
    encoder: bool = True
    decoder: bool = True
    init_std: float = 0.02  # BERT's
    dropout: float = 0.1
    dtype: Any = jnp.float32

    def setup(self):
        self.embed = Embed(self.width, self.vocab_size, self.positions, self.init_std, self.dropout, self.dtype)
        example = jnp.zeros((1, 1, self.width), self.dtype), jnp.zeros((1, 1, self.kv_width), self.dtype)
        self.blocks = stack.parameters(self, self._layer(), self.layers, *example)
        if self.decoder:
            self.lm_head = LmHead(self.width, self.vocab_size, self.init_std, self.dtype)

    def _layer(self) -> MedLayer:
        return MedLayer(
            self.width,
            self.heads,
            self.mlp,
            self.init_std,
            self.encoder,
            self.decoder,
            self.dropout,
            self.dtype,
            parent=None,
        )

    def __call__(
        self,
        ids,
        txt_mask,
        *,
        kv=None,
        kv_mask=None,
        img_idx: tuple = (None,),
        causal: bool = False,
        first_only: bool = False,
        deterministic: bool = True,
    ):
        """Token states [B,T,D] of ids i32[B,T] with txt_mask bool[B,T] (True = real token).

        kv None: text encoder. kv from `image_kv`: image-grounded, len(img_idx) texts per image; kv_mask: which of an
        image's keys count (see `grouped_cross_attention` for both). causal True: the decoder with its own
        self-attention and a causal mask.
        first_only True: only the first position's state is wanted, [B,1,D], so the last layer computes no other.
        """
        T, layer = ids.shape[1], self._layer()
        mask = txt_mask[:, None, None, :]
        if causal:
            mask = mask & jnp.tril(jnp.ones((T, T), bool))
        keys = None if deterministic or not self.dropout else jax.random.split(self.make_rng("dropout"), self.layers)

        def attend(x, params, kv, key, first_only=False):
            rngs = None if key is None else {"dropout": key}
            x = layer.apply(
                {"params": params},
                x,
                mask,
                kv,
                kv_mask,
                img_idx,
                causal,
                deterministic,
                first_only,
                rngs=rngs,
                method="attend",
            )
            return x, None

        x = self.embed(ids, deterministic)
        with jax.named_scope("blocks"):
            if not first_only and not isinstance(kv, stack.Ended):
                return stack.through(attend, x, self.blocks, kv, keys)[0]
            # With keys and values cut, the last layer is apart in every pass: one cut of the parameters serves all.
            stacks, lasts = zip(*map(stack.ended, (self.blocks, kv, keys)))
            x, _ = stack.through(attend, x, *stacks)
            return attend(x, *lasts, first_only=first_only)[0]

    def look(self, ids, txt_mask, kv, nudge):
        """Token states [B,T,D] of one text per image, as `__call__` has them, and where each token looks.

        The latter are the probabilities of all cross-attentions, [L,B,N,T,P], to which `nudge`, of that shape, is added
        (see `PostNormAttention.looking`).
        """
        layer, mask = self._layer(), txt_mask[:, None, None, :]

        def look(x, params, kv, nudge):
            return layer.apply({"params": params}, x, mask, kv, nudge, method="look")

        with jax.named_scope("blocks"):
            return stack.through(look, self.embed(ids, True), self.blocks, kv, nudge)

    def extend(self, ids, start, cache, kv, img_idx: tuple, kv_mask=None):
        """The decoder on t more tokens, without dropout: (token states [R,t,D], cache), R = B * len(img_idx).

        ids i32[R,t] are positions start..start+t-1 (start i32[], may be traced); cache: `text.cache`'s, holds the
        self-attention of the positions before; kv: of `image_kv` or `stored`. The same states as a causal pass over the
        whole text.
        """
        layer = self._layer()

        def extend(x, cache, i, params, kv):
            return layer.apply({"params": params}, x, cache, i, start, kv, kv_mask, img_idx, method="extend")

        with jax.named_scope("blocks"):
            return caches.through(extend, self.embed(ids, True, start), cache, self.blocks, kv)

    def image_kv(self, img_tok, ended: bool = False):
        """img_tok [B,P,D'] -> `KeysAndValues` [L,B,P,N,H]: computed once, used by every text pass over these images.

        What is attended to need not be an image: D' is `kv_width`. ended: as `stack.Ended`, which passes over whole
        texts take without a copy, but for CPUs, where memory is not what is short.
        """
        layer = self._layer()

        def project(_, params):
            return None, KeysAndValues(*layer.apply({"params": params}, img_tok, method="image_kv"))

        with jax.named_scope("blocks"):
            if not ended or platform() == "cpu":
                return stack.through(project, None, self.blocks)[1]
            blocks, last = stack.ended(self.blocks)
            return stack.Ended(stack.through(project, None, blocks)[1], project(None, last)[1])

    def lm_logits(self, txt_tok):
        """txt_tok [B,T,D] -> f32[B,T,Vp]; columns from vocab_size on (padding of the stored vocabulary) are
        float32's lowest."""
        return self.lm_head(txt_tok, self.embed.attend)
