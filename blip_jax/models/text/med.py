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

from blip_jax.models.layers.attention import HeadedAttention, Mlp, attention, grouped_cross_attention
from blip_jax.models.layers.cpu import rows, summed
from blip_jax.models.layers.dense import Dense
from blip_jax.models.layers.norm import LayerNorm, gelu
from blip_jax.parallel.collectives import gathered
from blip_jax.parallel.sharding import constrain

EPS = 1e-12


def padded_vocab(vocab_size: int) -> int:
    """Rows of the stored embedding: the vocabulary rounded up to a multiple of 128."""
    return -(-vocab_size // 128) * 128


def empty_cache(sizes, rows: int, length: int, dtype):
    """The decoder's self-attention cache of `rows` texts of at most `length` tokens, per layer (k, v), each
    [rows,length,N,H] of zeros.

    sizes: `cfg.model.med`.
    """
    zeros = jnp.zeros((rows, length, sizes["heads"], sizes["width"] // sizes["heads"]), dtype)
    return ((zeros, zeros),) * sizes["layers"]


class PostNormAttention(HeadedAttention):
    """Attention with residual and LayerNorm behind it: ln(x + drop(out(attention(x))))."""

    dropout: float = 0.1

    def setup(self):
        super().setup()
        self.ln = LayerNorm(EPS, self.dtype)
        self.drop = nn.Dropout(self.dropout)

    def self_attention(self, x, mask, deterministic, first_only=False):
        """x [B,T,D], mask bool[B,1,1|T,T] -> [B,T,D], or [B,1,D], the first position alone"""
        drop = lambda p: self.drop(p, deterministic=deterministic)
        queries = x[:, :1] if first_only else x
        y = attention(self.project_q(queries), *self.project_kv(x), mask=mask, drop=drop)
        return self._close(queries, y, deterministic)

    def cached_attention(self, x, cache, start):
        """Causal, at positions start..start+t-1: x [R,t,D], cache (k, v) [R,S,N,H] -> ([R,t,D], cache with these t
        in it)."""
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
        cache = tuple(write(old, new) for old, new in zip(cache, self.project_kv(x)))
        seen = jnp.arange(cache[0].shape[1]) <= start + jnp.arange(x.shape[1])[:, None]  # t S
        return self._close(x, attention(self.project_q(x), *cache, mask=seen), True), cache

    def cross_attention(self, x, kv, kv_mask, img_idx, deterministic):
        """x [B*G,T,D], kv of B images, kv_mask and img_idx as in `grouped_cross_attention` -> [B*G,T,D]"""
        drop = lambda p: self.drop(p, deterministic=deterministic)
        y = grouped_cross_attention(self.project_q(x), *kv, img_idx, drop, kv_mask)
        return self._close(x, y, deterministic)

    def _close(self, x, y, deterministic):
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
        block = lambda: PostNormAttention(self.width, self.heads, self.init_std, self.dtype, self.dropout)
        self.cross_attn = block()
        if self.encoder:
            self.self_attn = block()
        if self.decoder:
            self.self_attn_dec = block()
        self.mlp = Mlp(self.mlp_width, self.init_std, self.dtype)
        self.mlp_ln = LayerNorm(EPS, self.dtype)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, x, mask, kv, kv_mask, img_idx, causal: bool, deterministic: bool, first_only: bool):
        x = (self.self_attn_dec if causal else self.self_attn).self_attention(x, mask, deterministic, first_only)
        if kv is not None:
            x = self.cross_attn.cross_attention(x, kv, kv_mask, img_idx, deterministic)
        return self.mlp_ln(x + self.drop(self.mlp(x), deterministic=deterministic))

    def extend(self, x, cache, start, kv, kv_mask, img_idx):
        x, cache = self.self_attn_dec.cached_attention(x, cache, start)
        x = self.cross_attn.cross_attention(x, kv, kv_mask, img_idx, True)
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
        self.drop = nn.Dropout(self.dropout)

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
    """Ids to token states in the three modes of the paper, told apart by `kv` and `causal`."""

    width: int
    layers: int
    heads: int
    mlp: int
    positions: int
    vocab_size: int
    encoder: bool = True
    decoder: bool = True
    init_std: float = 0.02  # BERT's
    dropout: float = 0.1
    dtype: Any = jnp.float32

    def setup(self):
        self.embed = Embed(self.width, self.vocab_size, self.positions, self.init_std, self.dropout, self.dtype)
        for i in range(self.layers):
            layer = MedLayer(
                self.width, self.heads, self.mlp, self.init_std, self.encoder, self.decoder, self.dropout, self.dtype
            )
            setattr(self, f"layer_{i:02d}", layer)
        if self.decoder:
            self.lm_head = LmHead(self.width, self.vocab_size, self.init_std, self.dtype)

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
        T = ids.shape[1]
        mask = txt_mask[:, None, None, :]
        if causal:
            mask = mask & jnp.tril(jnp.ones((T, T), bool))
        x = self.embed(ids, deterministic)
        for i in range(self.layers):
            layer = getattr(self, f"layer_{i:02d}")
            first = first_only and i == self.layers - 1
            x = layer(x, mask, None if kv is None else kv[i], kv_mask, img_idx, causal, deterministic, first)
        return x

    def extend(self, ids, start, cache, kv, img_idx: tuple, kv_mask=None):
        """The decoder on t more tokens, without dropout: (token states [R,t,D], cache), R = B * len(img_idx).

        ids i32[R,t] are positions start..start+t-1 (start i32[], may be traced); cache: per layer (k, v), each
        [R,S,N,H], holds the self-attention of the positions before. The same states as a causal pass over the whole
        text.
        """
        x, new = self.embed(ids, True, start), []
        for i in range(self.layers):
            x, layer_cache = getattr(self, f"layer_{i:02d}").extend(x, cache[i], start, kv[i], kv_mask, img_idx)
            new.append(layer_cache)
        return x, tuple(new)

    def image_kv(self, img_tok):
        """img_tok [B,P,D'] -> per layer (k, v), each [B,P,N,H]: computed once, used by every text pass over these
        images.

        What is attended to need not be an image: D' is whatever width it comes in.
        """
        return tuple(getattr(self, f"layer_{i:02d}").image_kv(img_tok) for i in range(self.layers))

    def lm_logits(self, txt_tok):
        """txt_tok [B,T,D] -> f32[B,T,Vp]; columns from vocab_size on (padding of the stored vocabulary) are
        float32's lowest."""
        return self.lm_head(txt_tok, self.embed.attend)
