"""T5 v1.1, the encoder-decoder that FlanT5 is (arXiv 1910.10683 and 2210.11416), as BLIP-2's language model.

Pre-norm layers without biases, attention without scaling, positions as learnt biases of the self-attention's products
that all layers of a stack share, a gated feed-forward, an output matrix of its own. The residual stream is float32,
whatever the layers compute in: it grows to thousands, and the original's is so as well, as its queries are float32.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.models.layers import stack
from blip_jax.models.layers.attention import HeadedAttention, attention, grouped_cross_attention
from blip_jax.models.layers.cpu import rows, summed
from blip_jax.models.layers.dense import Dense, DenseGeneral
from blip_jax.models.layers.norm import Dropout, RMSNorm, gelu
from blip_jax.models.text import cache as caches
from blip_jax.models.text.cache import KeysAndValues, images_of, opened
from blip_jax.models.text.med import padded_vocab
from blip_jax.parallel.collectives import gathered
from blip_jax.parallel.sharding import constrain

EPS = 1e-6
# of the feed-forward's gate: the exact one is what BLIP-2 runs FlanT5 with, that by tanh what FlanT5 was trained with
ACTIVATIONS = {"gelu": gelu, "gelu_new": lambda x: nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)}


def near_buckets(count: int, max_distance: int) -> np.ndarray:
    """i32[max_distance+1]: which of `count` buckets a distance belongs to; larger ones belong to the last.

    Half of the buckets are one distance each, the others grow with its logarithm. In float32, as the original: a
    distance at the edge of two buckets would be in the other one else.
    """
    exact = count // 2
    distance = np.arange(max_distance + 1)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    grown = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(count - exact)
    far = np.minimum(exact + grown.astype(np.int32), count - 1)
    return np.where(distance < exact, distance, far).astype(np.int32)


class RelativeBias(nn.Module):
    """A learnt number for every head and bucket of distances between a query and a key."""

    buckets: int
    max_distance: int
    heads: int
    init_std: float
    causal: bool  # whether keys are never behind their query; else half of the buckets are for keys that are

    @nn.compact
    def __call__(self, queries, keys):
        """Positions i32[T] and i32[S] -> f32[N,T,S]"""
        table = self.param("embedding", nn.initializers.normal(self.init_std), (self.buckets, self.heads))
        behind = keys - queries[:, None]  # T S
        count = self.buckets if self.causal else self.buckets // 2
        distance = jnp.maximum(-behind, 0) if self.causal else jnp.abs(behind)
        bucket = jnp.asarray(near_buckets(count, self.max_distance))[jnp.minimum(distance, self.max_distance)]
        bucket = bucket if self.causal else bucket + count * (behind > 0)
        return constrain(jnp.transpose(table.astype(jnp.float32)[bucket], (2, 0, 1)), "act_heads", None, None)


class T5Attention(HeadedAttention):
    """Attention of T5, without biases and without scaling; heads need not make up the width."""

    head_dim: int = 64
    dropout: float = 0.0

    def setup(self):
        dense = dict(use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.normal(self.init_std))
        headed = lambda: DenseGeneral((self.heads, self.head_dim), **dense)
        self.q, self.k, self.v = headed(), headed(), headed()
        self.out = DenseGeneral(self.width, axis=(-2, -1), embed=1, **dense)
        self.drop = Dropout(self.dropout)

    def self_attention(self, x, mask, bias, deterministic):
        """x [B,T,D], mask bool[B,1,1|T,T], bias f32[N,T,T] -> [B,T,D]"""
        drop = lambda p: self.drop(p, deterministic=deterministic)
        y = attention(self.project_q(x), *self.project_kv(x), mask=mask, drop=drop, scale=1.0, bias=bias)
        return self.project_out(y)

    def cached_attention(self, x, cache, layer, start, bias):
        """Causal, at positions start..start+t-1 of a layer: x [R,t,D], bias f32[N,t,S] -> ([R,t,D], cache with these
        t)."""
        k, v, cache = caches.extended(cache, layer, start, self.project_kv(x), self.dtype)
        seen = jnp.arange(k.shape[1]) <= start + jnp.arange(x.shape[1])[:, None]  # t S
        return self.project_out(attention(self.project_q(x), k, v, mask=seen, scale=1.0, bias=bias)), cache

    def cross_attention(self, x, kv, kv_mask, deterministic):
        """x [B*G,T,D], kv of B encoded texts, kv_mask bool[B,S] -> [B*G,T,D]: row b*G + g looks at text b"""
        drop = lambda p: self.drop(p, deterministic=deterministic)
        groups = (None,) * (len(x) // len(kv[0]))
        return self.project_out(grouped_cross_attention(self.project_q(x), *kv, groups, drop, kv_mask, scale=1.0))


class GatedMlp(nn.Module):
    """wo(act(wi_0 x) * wi_1 x): [B,T,D] -> [B,T,D], hidden width F."""

    hidden: int
    act: str
    init_std: float
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, deterministic):
        dense = dict(use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.normal(self.init_std))
        inner = lambda name: constrain(Dense(self.hidden, name=name, **dense)(x), "act_batch", None, "act_mlp")
        h = ACTIVATIONS[self.act](inner("wi_0")) * inner("wi_1")
        h = Dropout(self.dropout)(h, deterministic=deterministic)
        return constrain(Dense(x.shape[-1], embed=1, name="wo", **dense)(h), "act_batch", None, "act_embed")


class T5Layer(nn.Module):
    """Self-attention, in a decoder cross-attention, feed-forward; each x + drop(f(ln(x)))."""

    width: int
    heads: int
    head_dim: int
    mlp_width: int
    act: str
    init_std: float
    decoder: bool
    dropout: float
    dtype: Any

    def setup(self):
        norm = lambda: RMSNorm(EPS, self.dtype)
        block = lambda: T5Attention(
            self.width, self.heads, self.init_std, self.dtype, head_dim=self.head_dim, dropout=self.dropout
        )
        self.ln1, self.attn, self.ln2 = norm(), block(), norm()
        if self.decoder:
            self.cross_attn, self.ln3 = block(), norm()
        self.mlp = GatedMlp(self.mlp_width, self.act, self.init_std, self.dropout, self.dtype)
        self.drop = Dropout(self.dropout)

    def __call__(self, x):
        """Runs every part once, so that `init` creates every parameter: x [1,1,D]."""
        return self.run(x, None, None, self.cross_kv(x) if self.decoder else None, None, True)

    def run(self, x, mask, bias, kv, kv_mask, deterministic):
        y = self.attn.self_attention(self.ln1(x), mask, bias, deterministic)
        return self._close(self._add(x, y, deterministic), kv, kv_mask, deterministic)

    def extend(self, x, cache, layer, start, bias, kv, kv_mask):
        y, cache = self.attn.cached_attention(self.ln1(x), cache, layer, start, bias)
        return self._close(self._add(x, y, True), opened(kv, self.dtype), kv_mask, True), cache

    def cross_kv(self, states):
        return self.cross_attn.project_kv(states)

    def _close(self, x, kv, kv_mask, deterministic):
        """What follows the self-attention."""
        ln = self.ln2
        if self.decoder:
            y = self.cross_attn.cross_attention(ln(x), kv, kv_mask, deterministic)
            x, ln = self._add(x, y, deterministic), self.ln3
        return self._add(x, self.mlp(ln(x), deterministic), deterministic)

    def _add(self, x, y, deterministic):
        return x + self.drop(y, deterministic=deterministic).astype(x.dtype)


class T5Stack(nn.Module):
    """All layers of the encoder or of the decoder, behind them a norm. Parameters rel_bias, blocks (stacked),
    ln_post."""

    width: int
    layers: int
    heads: int
    head_dim: int
    mlp_width: int
    buckets: int
    max_distance: int
    act: str
    init_std: float
    decoder: bool
    dropout: float
    remat: str
    dtype: Any

    def setup(self):
        self.rel_bias = RelativeBias(self.buckets, self.max_distance, self.heads, self.init_std, self.decoder)
        self.blocks = stack.parameters(self, self._layer(), self.layers, jnp.zeros((1, 1, self.width)))
        self.ln_post = RMSNorm(EPS, self.dtype)
        self.drop = Dropout(self.dropout)

    def _layer(self) -> T5Layer:
        return T5Layer(
            self.width,
            self.heads,
            self.head_dim,
            self.mlp_width,
            self.act,
            self.init_std,
            self.decoder,
            self.dropout,
            self.dtype,
            parent=None,
        )

    def __call__(self, x, mask, kv, kv_mask, deterministic):
        """x [B,T,D], mask bool[B,T] -> [B,T,D]; kv, kv_mask: what a decoder looks at, else None"""
        layer, places = self._layer(), jnp.arange(x.shape[1])
        bias, mask = self.rel_bias(places, places), mask[:, None, None, :]
        if self.decoder:
            mask = mask & (places <= places[:, None])
        keys = None if deterministic or not self.dropout else jax.random.split(self.make_rng("dropout"), self.layers)

        def run(x, params, kv, key):
            rngs, kv = None if key is None else {"dropout": key}, None if kv is None else opened(kv, self.dtype)
            args = x, mask, bias, kv, kv_mask, deterministic
            return layer.apply({"params": params}, *args, rngs=rngs, method="run"), None

        x = self.drop(x.astype(jnp.float32), deterministic=deterministic)
        with jax.named_scope("blocks"):
            x, _ = stack.through(run, x, self.blocks, kv, keys, remat=self.remat)
        return self.drop(self.ln_post(x), deterministic=deterministic)

    def extend(self, x, start, cache, kv, kv_mask):
        """x [R,t,D] at positions start..start+t-1 -> ([R,t,D], cache)"""
        layer = self._layer()
        bias = self.rel_bias(start + jnp.arange(x.shape[1]), jnp.arange(caches.length(cache)))

        def extend(x, cache, i, params, kv):
            return layer.apply({"params": params}, x, cache, i, start, bias, kv, kv_mask, method="extend")

        with jax.named_scope("blocks"):
            x, cache = caches.through(extend, x.astype(jnp.float32), cache, self.blocks, kv)
        return self.ln_post(x), cache

    def cross_kv(self, states):
        layer = self._layer()

        def project(_, params):
            return None, KeysAndValues(*layer.apply({"params": params}, states, method="cross_kv"))

        with jax.named_scope("blocks"):
            return stack.through(project, None, self.blocks)[1]


class Words(nn.Module):
    """The word embedding of encoder and decoder."""

    width: int
    vocab_size: int
    init_std: float
    dtype: Any

    def setup(self):
        init = nn.initializers.normal(self.init_std)
        self.word = nn.Embed(padded_vocab(self.vocab_size), self.width, dtype=self.dtype, embedding_init=init)

    def __call__(self, ids):
        # [Vp,D], D whole: looked up in a part of D, every row would travel instead of the table
        table = gathered(self.word.embedding.astype(self.dtype), ("vocab", "embed"), ("vocab", None))
        return constrain(rows(table, ids), "act_batch", None, "act_embed")


class LmHead(nn.Module):
    """The output matrix, apart from the word embedding."""

    width: int
    vocab_size: int
    init_std: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """[...,D] -> f32[...,Vp], summed in float32"""
        shape = (self.width, padded_vocab(self.vocab_size))
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), shape)
        kernel = gathered(kernel.astype(self.dtype), ("embed", "vocab"), (None, "vocab"))
        logits = summed(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        logits = constrain(logits, "act_batch", *[None] * (x.ndim - 2), "act_vocab")
        return jnp.where(jnp.arange(shape[1]) < self.vocab_size, logits, jnp.finfo(jnp.float32).min)


class T5(nn.Module):
    """Embeddings of a text to encode, and ids of one to decode, to scores of the next id. Parameters embed, lm_head,
    encoder, decoder.

    The decoder starts with id 0, which is part of its text. Texts of the decoder are rows b*G + g: G of them look at
    encoded text b, whose keys and values are not repeated.

    ValueError: sizes or settings that make no T5.
    """

    width: int
    layers: int  # of the encoder
    heads: int
    head_dim: int
    mlp: int
    vocab_size: int
    buckets: int = 32
    max_distance: int = 128
    decoder_layers: int = 0  # 0: as many as the encoder has
    act: str = "gelu"  # a key of ACTIVATIONS
    init_std: float = 0.02
    dropout: float = 0.1
    remat: str = "none"
    dtype: Any = jnp.float32

    def __post_init__(self):
        if jnp.dtype(self.dtype) == jnp.float16:
            raise ValueError("dtype is float16, in which T5 overflows: compute it in bfloat16 or float32")
        if self.act not in ACTIVATIONS:
            raise ValueError(f"act is {self.act!r}: choose one of {', '.join(ACTIVATIONS)}")
        if self.buckets < 4 or self.buckets % 2 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"buckets is {self.buckets} and max_distance {self.max_distance}: give an even number of buckets, 4 or "
                "more, and a distance of more than half of it, as 32 and 128"
            )
        super().__post_init__()

    def setup(self):
        def layers(count, decoder):
            sizes = (self.width, count, self.heads, self.head_dim, self.mlp, self.buckets, self.max_distance, self.act)
            return T5Stack(*sizes, self.init_std, decoder, self.dropout, self.remat, self.dtype)

        self.embedding = Words(self.width, self.vocab_size, self.init_std, self.dtype, name="embed")
        self.encoder = layers(self.layers, False)
        self.decoder = layers(self._decoder_layers, True)
        self.lm_head = LmHead(self.width, self.vocab_size, self.init_std, self.dtype)

    @property
    def _decoder_layers(self) -> int:
        return self.decoder_layers or self.layers

    def __call__(self, ids, mask, out_ids, out_mask, *, deterministic: bool = True):
        """f32[B,T,Vp]: scores of what follows each of out_ids i32[B,T], of the encoded text ids i32[B,S]; masks bool,
        True = a real token."""
        kv = self.cross_kv(self.encode(self.embed(ids), mask, deterministic=deterministic))
        return self.logits(self.decode(out_ids, out_mask, kv, mask, deterministic=deterministic))

    def target_logits(self, embeds, mask, out_ids, out_mask, *, deterministic: bool = True):
        """f32[R,U,Vp]: scores of each of out_ids i32[R,U] before it is read, behind the start id, 0; embeds [B,S,D] and
        mask bool[B,S]: what the encoder reads. The rest as of `decode`."""
        kv = self.cross_kv(self.encode(embeds, mask, deterministic=deterministic))
        before = jnp.pad(out_ids[:, :-1], ((0, 0), (1, 0)))
        return self.logits(self.decode(before, out_mask, kv, mask, deterministic=deterministic))

    def embed(self, ids):
        """Ids of words i32[B,T] -> [B,T,D]"""
        return self.embedding(ids)

    def encode(self, embeds, mask, *, deterministic: bool = True):
        """embeds [B,S,D], mask bool[B,S] (True = real; padding may stand anywhere) -> states [B,S,D]."""
        return self.encoder(embeds, mask, None, None, deterministic)

    def cross_kv(self, states):
        """Encoder states [B,S,D] -> `KeysAndValues` [L,B,S,N,H]: computed once, used by every text that looks at
        them."""
        return self.decoder.cross_kv(states)

    def decode(self, ids, mask, kv, kv_mask, *, deterministic: bool = True):
        """Decoder states [R,T,D] of whole texts ids i32[R,T], each seeing itself up to each position.

        mask bool[R,T], True = real token; kv: of `cross_kv`, of B encoded texts; kv_mask bool[B,S], theirs. ValueError:
        R is no multiple of B.
        """
        _grouped(ids, kv)
        return self.decoder(self.embed(ids), mask, kv, kv_mask, deterministic)

    def logits(self, states):
        """Decoder states [...,D] -> f32[...,Vp]; columns from vocab_size on (padding of the stored vocabulary) are
        float32's lowest."""
        return self.lm_head(states)

    @nn.nowrap
    def empty_cache(self, rows: int, length: int):
        """The decoder's self-attention cache of `rows` texts of at most `length` tokens."""
        sizes = {"layers": self._decoder_layers, "heads": self.heads, "head_dim": self.head_dim}
        return caches.empty(sizes, rows, length, self.dtype)

    def extend(self, ids, start, cache, kv, kv_mask):
        """The decoder on t more tokens, without dropout: (f32[R,Vp], scores of what follows the last one, cache).

        ids i32[R,t] are positions start..start+t-1 (start i32[], may be traced); cache: of `empty_cache` or the last
        call; kv: of `cross_kv` or `cache.stored` of it, of B encoded texts; kv_mask bool[B,S]. ValueError: R is no
        multiple of B.
        """
        _grouped(ids, kv)
        states, cache = self.decoder.extend(self.embed(ids), start, cache, kv, kv_mask)
        return self.logits(states[:, -1]), cache


def _grouped(ids, kv) -> None:
    if len(ids) % images_of(kv):
        raise ValueError(
            f"{len(ids)} texts look at {images_of(kv)} encoded ones: give as many texts for each, one's behind another"
        )
