"""OPT: a decoder alone, the language model of BLIP-2's second stage (arXiv 2205.01068; BLIP-2 paper, section 3.3).

Soft prompts and words enter as vectors of the embedding's width E, `embed` gives those of words. Learned positions are
counted by the mask, two rows late in their table: a position that is not real has none, whatever lies between real
ones. All sizes but 350m's normalise before a part and once at the end; 350m behind each residual, and it projects its
narrower embedding to the width and back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip_jax.models.layers import stack
from blip_jax.models.layers.attention import HeadedAttention, attention
from blip_jax.models.layers.cpu import rows, summed
from blip_jax.models.layers.dense import Dense
from blip_jax.models.layers.norm import Dropout, LayerNorm
from blip_jax.models.text import cache as caches
from blip_jax.models.text.cache import KeysAndValues
from blip_jax.models.text.med import padded_vocab
from blip_jax.parallel.collectives import gathered
from blip_jax.parallel.sharding import constrain

EPS = 1e-5
OFFSET = 2  # rows of the position table before that of position 0


def positions_of(mask):
    """mask bool[B,T] -> i32[B,T]: how many real positions are before each real one; -1 where it is not real."""
    return jnp.cumsum(mask, axis=1, dtype=jnp.int32) * mask - 1


def after_prompts(extend: Callable, mask, length: int) -> Callable:
    """`Opt.extend` as decode/generate.py takes it, for texts behind prompts.

    Args:
      extend: (ids i32[R,t], slot, cache, positions i32[R,t], key_mask bool[R,S]) -> (logits, cache), a bound
        `Opt.extend`.
      mask: bool[R,T], of the prompts that `prefill` wrote. length: S, of the cache.
    Returns: (ids i32[R,t], start i32[], cache) -> (logits, cache). Token 0 of a text is a start id that is never given:
    what follows it is what `prefill` returned. Token j is in slot T + j - 1, at the position behind the prompt's last.
    """
    T = mask.shape[1]
    key_mask = jnp.pad(mask, ((0, 0), (0, length - T)), constant_values=True)
    first = jnp.sum(mask, axis=1, dtype=jnp.int32)[:, None]

    def extend_text(ids, start, cache):
        positions = first + start - 1 + jnp.arange(ids.shape[1], dtype=jnp.int32)
        return extend(ids, T + start - 1, cache, positions, key_mask)

    return extend_text


class Mlp(nn.Module):
    """fc1, ReLU, fc2: [B,T,D] -> [B,T,D], hidden width F."""

    hidden: int
    init_std: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(self.init_std)
        h = Dense(self.hidden, dtype=self.dtype, kernel_init=init, name="fc1")(x)
        h = jax.nn.relu(constrain(h, "act_batch", None, "act_mlp"))
        y = Dense(x.shape[-1], embed=1, dtype=self.dtype, kernel_init=init, name="fc2")(h)
        return constrain(y, "act_batch", None, "act_embed")


class OptLayer(nn.Module):
    """Self-attention and feed-forward, each with its residual; LayerNorm before the part, or behind the residual."""

    width: int
    heads: int
    mlp_width: int
    pre_norm: bool
    init_std: float
    dropout: float
    dtype: Any

    def setup(self):
        self.ln1, self.ln2 = LayerNorm(EPS, self.dtype), LayerNorm(EPS, self.dtype)
        self.attn = HeadedAttention(self.width, self.heads, self.init_std, self.dtype)
        self.mlp = Mlp(self.mlp_width, self.init_std, self.dtype)
        self.drop = Dropout(self.dropout)

    def __call__(self, x, mask, deterministic: bool):
        """x [B,T,D], mask bool[B,1,T,T] -> ([B,T,D], keys and values, each [B,T,N,H])"""
        made = []

        def attend(h):
            made.append(self.attn.project_kv(h))
            return self.attn.project_out(attention(self.attn.project_q(h), *made[0], mask=mask))

        return self._through(x, attend, deterministic), made[0]

    def extend(self, x, cache, layer, start, mask):
        """Slots start..start+t-1 of a layer: x [R,t,D], mask bool[R,1,t,S] -> ([R,t,D], cache with these t)."""

        def attend(h):
            nonlocal cache
            k, v, cache = caches.extended(cache, layer, start, self.attn.project_kv(h), self.dtype)
            return self.attn.project_out(attention(self.attn.project_q(h), k, v, mask=mask))

        return self._through(x, attend, True), cache

    def _through(self, x, attend, deterministic):
        for ln, part in ((self.ln1, attend), (self.ln2, self.mlp)):
            x = x + self.drop(part(ln(x) if self.pre_norm else x), deterministic=deterministic)
            x = x if self.pre_norm else ln(x)
        return x


class Embed(nn.Module):
    """Tables of words, which are the head's matrix too, and of positions."""

    width: int
    embed_width: int
    vocab_size: int
    positions: int
    init_std: float
    dtype: Any

    def setup(self):
        init = nn.initializers.normal(self.init_std)
        self.word = nn.Embed(padded_vocab(self.vocab_size), self.embed_width, embedding_init=init)
        self.pos = nn.Embed(self.positions + OFFSET, self.width, embedding_init=init)

    def words(self, ids):
        return rows(self._table(), ids)

    def places(self, positions):
        table = gathered(self.pos.embedding.astype(self.dtype), ("patch", "embed"), ("patch", None))
        return rows(table, positions + OFFSET)

    def attend(self, x):
        """x [...,E] -> f32[...,Vp], products with every word's embedding, summed in float32"""
        return summed(x, self._table(), (((x.ndim - 1,), (1,)), ((), ())))

    def _table(self):
        """[Vp,E] in the dtype of the computation, E whole: looked up in a part of E, every row would travel instead of
        the table."""
        return gathered(self.word.embedding.astype(self.dtype), ("vocab", "embed"), ("vocab", None))


class Opt(nn.Module):
    """Vectors to token states and logits. Parameters embed, blocks (stacked), ln_post or project_in and project_out.

    positions: the most real positions of a row; more is a ValueError where a shape shows it.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    positions: int
    vocab_size: int
    embed_width: int
    pre_norm: bool
    init_std: float = 0.02
    dropout: float = 0.1
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        self.tables = Embed(
            self.width,
            self.embed_width,
            self.vocab_size,
            self.positions,
            self.init_std,
            self.dtype,
            name="embed",
        )
        example = jnp.zeros((1, 1, self.width), self.dtype)
        self.blocks = stack.parameters(self, self._layer(), self.layers, example, None, True)
        if self.pre_norm:
            self.ln_post = LayerNorm(EPS, self.dtype)
        if self.embed_width != self.width:
            plain = {"use_bias": False, "dtype": self.dtype, "kernel_init": nn.initializers.normal(self.init_std)}
            self.project_in = Dense(self.width, embed=1, **plain)
            self.project_out = Dense(self.embed_width, **plain)

    def _layer(self) -> OptLayer:
        return OptLayer(
            self.width,
            self.heads,
            self.mlp,
            self.pre_norm,
            self.init_std,
            self.dropout,
            self.dtype,
            parent=None,
        )

    def embed(self, ids):
        """ids i32[B,T] -> [B,T,E]"""
        return constrain(self.tables.words(ids), "act_batch", None, "act_embed")

    def __call__(self, embeds, mask, *, deterministic: bool = True):
        """States [B,T,E], of which `logits` makes what follows each position, each seeing the real ones up to itself.

        embeds [B,T,E]; mask bool[B,T], True = real: others are no keys and take no position. Not deterministic, it
        needs rngs={"dropout": key}, and drops of what is added to the residual, of attention nothing, as the original.
        """
        keys = None if deterministic or not self.dropout else jax.random.split(self.make_rng("dropout"), self.layers)
        return self._whole(embeds, mask, deterministic, keys, keep=False)[0]

    def logits(self, states):
        """[...,E] -> f32[...,Vp]; columns from vocab_size on are float32's lowest. Give it the states that are needed
        alone: the vocabulary is much wider than they are."""
        between = (None,) * (states.ndim - 2)
        logits = constrain(self.tables.attend(states), "act_batch", *between, "act_vocab")
        return jnp.where(jnp.arange(logits.shape[-1]) < self.vocab_size, logits, jnp.finfo(jnp.float32).min)

    def empty_cache(self, rows: int, length: int):
        """The cache of `rows` texts of at most `length` slots, prompts included."""
        sizes = {"layers": self.layers, "heads": self.heads, "width": self.width}
        zeros = caches.empty(sizes, rows, length, self.dtype)
        return jax.tree.map(lambda x: constrain(x, "layers", "act_batch", None, "act_heads", None), zeros)

    def prefill(self, embeds, mask, cache):
        """Prompts, padded on the left or in between: every row's last position is real.

        embeds [B,T,E], mask bool[B,T], cache of `empty_cache(B, S)`, S >= T -> (f32[B,Vp], what follows the last
        position, and the cache with slots 0..T-1 written).
        """
        states, made = self._whole(embeds, mask, True, None, keep=True)
        return self.logits(states[:, -1]), caches.filled(cache, KeysAndValues(*made))

    def extend(self, ids, start, cache, positions, key_mask):
        """(f32[R,Vp], what follows the last of t more tokens, and the cache): see `extend_states`."""
        states, cache = self.extend_states(ids, start, cache, positions, key_mask)
        return self.logits(states[:, -1]), cache

    def extend_states(self, ids, start, cache, positions, key_mask):
        """(states [R,t,E], cache) of t more tokens, without dropout.

        ids i32[R,t] go to slots start..start+t-1 (start i32[], may be traced) and have `positions` i32[R,t], 0 that of
        a row's first real one. key_mask bool[R,S]: slots that are keys where written; False for the prompt's pads. The
        same states as `__call__` over all of it.
        """
        layer, t = self._layer(), ids.shape[1]
        seen = jnp.arange(key_mask.shape[1]) <= start + jnp.arange(t)[:, None]  # t S
        mask = (key_mask[:, None] & seen)[:, None]

        def extend(x, cache, i, params):
            return layer.apply({"params": params}, x, cache, i, start, mask, method="extend")

        x = self._enter(self.embed(ids), positions)
        with jax.named_scope("blocks"):
            x, cache = caches.through(extend, x, cache, self.blocks)
        return self._leave(x), cache

    def _whole(self, embeds, mask, deterministic, keys, keep):
        """(states, keys and values of all layers, each [L,B,T,N,H], if `keep`)"""
        T, layer = mask.shape[1], self._layer()
        if T > self.positions:
            raise ValueError(
                f"embeds have {T} positions, the language model has a table of {self.positions}: shorten the text"
            )
        pairs = mask[:, None, None, :] & jnp.tril(jnp.ones((T, T), bool))

        def attend(x, params, key):
            rngs = None if key is None else {"dropout": key}
            x, made = layer.apply({"params": params}, x, pairs, deterministic, rngs=rngs)
            return x, made if keep else None

        x = self._enter(embeds.astype(self.dtype), positions_of(mask))
        with jax.named_scope("blocks"):
            x, made = stack.through(attend, x, self.blocks, keys, remat=self.remat)
        return self._leave(x), made

    def _enter(self, x, positions):
        x = x if self.embed_width == self.width else self.project_in(x)
        return constrain(x + self.tables.places(positions), "act_batch", None, "act_embed")

    def _leave(self, x):
        x = self.ln_post(x) if self.pre_norm else x
        return x if self.embed_width == self.width else self.project_out(x)
