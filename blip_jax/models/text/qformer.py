"""Q-Former: learned queries and a text in one BERT-style transformer (BLIP-2 paper, section 3.1; reference: LAVIS's
Qformer.py).

Queries and text share every self-attention. In every second layer, from the first one on, the queries alone look at the
image; queries and text have feed-forwards of their own. Who sees whom is the mask of each pass: `look` (queries),
`read` (text), `join` (both, in all directions), `write` (the text after the queries, causal). Queries never see the
text that `write` predicts, so what it needs of them are their keys and values in every layer, which `look` leaves.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip_jax.models.layers import stack
from blip_jax.models.layers.attention import Mlp, attention, prefixed_attention
from blip_jax.models.layers.norm import Dropout, LayerNorm
from blip_jax.models.text import cache as caches
from blip_jax.models.text import med
from blip_jax.models.text.cache import KeysAndValues, opened
from blip_jax.models.text.med import EPS, LmHead, PostNormAttention
from blip_jax.parallel.sharding import constrain

CROSS_EVERY = 2  # layers from one cross-attention to the next


class Embed(med.Embed):
    """MED's embedding, whose LayerNorm and dropout the queries share; they have no positions."""

    text: bool = True  # whether there are words at all

    def setup(self):
        if self.text:
            super().setup()
        else:
            self.ln, self.drop = LayerNorm(EPS, self.dtype), Dropout(self.dropout)

    def queries(self, tokens, rows: int, deterministic: bool):
        """tokens f32[Q,D] -> [rows,Q,D]"""
        x = jnp.broadcast_to(self.ln(tokens), (rows, *tokens.shape))
        return constrain(self.drop(x, deterministic=deterministic), "act_batch", None, "act_embed")


class SelfAttention(PostNormAttention):
    """Self-attention that hands on its keys and values, and may have others before them, those of the queries."""

    def attend(self, x, mask, prefix, deterministic):
        """x [R,T,D], mask bool[R,1,1|T,T] or None, prefix (k, v) of queries [B,Q,N,H] or None -> [R,T,D], (k, v) of x
        [R,T,N,H]"""
        drop = lambda p: self.drop(p, deterministic=deterministic)
        q, own = self.project_q(x), self.project_kv(x)
        y = attention(q, *own, mask, drop) if prefix is None else prefixed_attention(q, prefix, *own, mask, drop)
        return self.closed(x, y, deterministic), own

    def extend(self, x, cache, layer, start, prefix):
        """`PostNormAttention.cached_attention` behind a prefix."""
        k, v, seen, cache = self.cached(x, cache, layer, start)
        return self.closed(x, prefixed_attention(self.project_q(x), prefix, k, v, seen), True), cache


class QFormerLayer(nn.Module):
    """Self-attention over both, and a feed-forward for each; all closed by residual and LayerNorm.

    What goes through is a pair (queries [R,Q,D], text [R,T,D]), of which one may be None.
    """

    width: int
    heads: int
    mlp_width: int
    init_std: float
    text: bool
    dropout: float
    dtype: Any

    def setup(self):
        self.self_attn = SelfAttention(self.width, self.heads, self.init_std, self.dtype, dropout=self.dropout)
        mlp = lambda: (Mlp(self.mlp_width, self.init_std, self.dtype), LayerNorm(EPS, self.dtype))
        self.query_mlp, self.query_mlp_ln = mlp()
        if self.text:
            self.mlp, self.mlp_ln = mlp()
        self.drop = Dropout(self.dropout)

    def __call__(self, x):
        """Runs every part once, so that `init` creates every parameter: x [1,1,D]."""
        return self.attend((x, x if self.text else None), None, None, None, True)[0]

    def attend(self, x, mask, prefix, look, deterministic):
        """(queries, text) -> (queries, text), and the keys and values of all of them (k, v), each [R,Q+T,N,H].

        look: cross-attention of the queries, which comes between, or None.
        """
        (qry, txt), own = self._self_attention(x, mask, prefix, deterministic)
        qry = qry if look is None else look(qry)

        def closed(x, mlp, ln):
            return ln(x + self.drop(mlp(x), deterministic=deterministic))

        qry = None if qry is None else closed(qry, self.query_mlp, self.query_mlp_ln)
        txt = None if txt is None else closed(txt, self.mlp, self.mlp_ln)
        return (qry, txt), own

    def _self_attention(self, x, mask, prefix, deterministic):
        qry, txt = x
        if qry is None or txt is None:
            y, own = self.self_attn.attend(txt if qry is None else qry, mask, prefix, deterministic)
            return ((None, y) if qry is None else (y, None)), own
        y, own = self.self_attn.attend(jnp.concatenate(x, axis=1), mask, prefix, deterministic)
        return jnp.split(y, [qry.shape[1]], axis=1), own

    def extend(self, x, cache, layer, start, prefix):
        """Text [R,t,D] behind the queries whose keys and values are `prefix` -> ([R,t,D], cache)"""
        x, cache = self.self_attn.extend(x, cache, layer, start, opened(prefix, self.dtype))
        return self.mlp_ln(x + self.mlp(x)), cache


class CrossLayer(nn.Module):
    """Cross-attention of the queries to the image."""

    width: int
    heads: int
    init_std: float
    dropout: float
    dtype: Any

    def setup(self):
        self.cross_attn = PostNormAttention(self.width, self.heads, self.init_std, self.dtype, dropout=self.dropout)

    def __call__(self, x, seen):
        """Runs every part once, so that `init` creates every parameter: x [1,1,D], seen [1,1,D']."""
        return self.look(x, self.image_kv(seen), (None,), True)

    def look(self, x, kv, img_idx, deterministic):
        return self.cross_attn.cross_attention(x, kv, None, img_idx, deterministic)

    def image_kv(self, img_tok):
        return self.cross_attn.project_kv(img_tok)


class Cross(nn.Module):
    """The cross-attentions of all layers that have one, stacked."""

    width: int
    heads: int
    layers: int
    kv_width: int
    init_std: float
    dropout: float
    dtype: Any

    def setup(self):
        example = jnp.zeros((1, 1, self.width), self.dtype), jnp.zeros((1, 1, self.kv_width), self.dtype)
        self.blocks = stack.parameters(self, self.layer(), self.layers, *example)

    def layer(self) -> CrossLayer:
        return CrossLayer(self.width, self.heads, self.init_std, self.dropout, self.dtype, parent=None)


class QFormer(nn.Module):
    """The passes of the Q-Former. Parameters embed, blocks [L,...], cross/blocks [L/2,...], lm_head.

    Without `text` (second stage of BLIP-2) there are only the queries' parts; without `head` (InstructBLIP) no
    language-modelling head. `layers` is even. tokens: the learned queries, f32[Q,D], which belong to the model.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    positions: int
    vocab_size: int
    kv_width: int  # of the image's positions
    text: bool = True
    head: bool = True
    init_std: float = 0.02  # BERT's
    dropout: float = 0.1
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        vocab = self.width, self.vocab_size
        self.embed = Embed(*vocab, self.positions, self.init_std, self.dropout, self.dtype, text=self.text)
        self.blocks = stack.parameters(self, self._layer(), self.layers, jnp.zeros((1, 1, self.width), self.dtype))
        self.cross = Cross(
            self.width,
            self.heads,
            self.layers // CROSS_EVERY,
            self.kv_width,
            self.init_std,
            self.dropout,
            self.dtype,
        )
        if self.text and self.head:
            self.lm_head = LmHead(*vocab, self.init_std, self.dtype)

    def _layer(self) -> QFormerLayer:
        sizes = self.width, self.heads, self.mlp, self.init_std
        return QFormerLayer(*sizes, self.text, self.dropout, self.dtype, parent=None)

    def image_kv(self, img_tok) -> KeysAndValues:
        """img_tok [B,P,D'] -> keys and values of all cross-attentions [L/2,B,P,N,H], for every pass over the images"""
        layer = self.cross.layer()

        def project(_, params):
            return None, KeysAndValues(*layer.apply({"params": params}, img_tok, method="image_kv"))

        with jax.named_scope("blocks"):
            return stack.through(project, None, self.cross.blocks)[1]

    def look(self, tokens, kv, *, deterministic: bool = True):
        """Queries at the images of `kv` (`image_kv`), alone: (their states qry [B,Q,D], their keys and values in every
        self-attention [L,B,Q,N,H])."""
        x = self.embed.queries(tokens, kv.k.shape[1], deterministic), None
        (qry, _), own = self._through(x, None, None, kv, (None,), deterministic)
        return qry, own

    def read(self, ids, txt_mask, *, deterministic: bool = True):
        """ids i32[B,T], txt_mask bool[B,T] (True = real token) -> txt_tok [B,T,D], the text alone, in both
        directions"""
        x = None, self.embed(ids, deterministic)
        return self._through(x, txt_mask[:, None, None], None, None, (None,), deterministic)[0][1]

    def join(self, tokens, ids, txt_mask, kv, *, img_idx: tuple = (None,), deterministic: bool = True):
        """Queries and a text that see each other: states of the queries [R,Q,D] and of the text [R,T,D].

        ids i32[R,T], txt_mask bool[R,T], R = B * len(img_idx): len(img_idx) texts for each of the B images of `kv`,
        each with a pass of the queries of its own, at the image that img_idx names (`grouped_cross_attention`).
        """
        x = self.embed.queries(tokens, len(ids), deterministic), self.embed(ids, deterministic)
        mask = jnp.pad(txt_mask, ((0, 0), (len(tokens), 0)), constant_values=True)[:, None, None]
        return self._through(x, mask, None, kv, img_idx, deterministic)[0]

    def write(self, ids, txt_mask, seen, *, deterministic: bool = True):
        """Causal states of a text behind the queries of its image: txt_tok [R,T,D].

        ids i32[R,T], txt_mask bool[R,T], row b*n + i for image b; seen: the queries' keys and values of `look`.
        """
        T = ids.shape[1]
        mask = txt_mask[:, None, None] & jnp.tril(jnp.ones((T, T), bool))
        x = None, self.embed(ids, deterministic)
        return self._through(x, mask, seen, None, (None,), deterministic)[0][1]

    def _through(self, x, mask, seen, kv, img_idx, deterministic):
        """(queries, text) through all layers: (queries, text), and of queries alone their keys and values
        [L,R,Q,N,H]."""
        layer, cross = self._layer(), self.cross.layer()
        pairs, keys, alone = self.layers // CROSS_EVERY, None, x[1] is None
        if self.dropout and not deterministic:
            keys = jax.random.split(self.make_rng("dropout"), (pairs, 3))

        def body(x, blocks, crossing, prefixes, kv, keys):
            rngs = [None] * 3 if keys is None else [{"dropout": key} for key in keys]

            def look(qry):
                given = qry, kv, img_idx, deterministic
                return cross.apply({"params": crossing}, *given, rngs=rngs[2], method="look")

            layers = zip(stack.both(blocks), stack.both(prefixes), (None if kv is None else look, None), rngs)
            own = []
            for params, prefix, crosses, rng in layers:
                given = x, mask, prefix, crosses, deterministic
                x, found = layer.apply({"params": params}, *given, rngs=rng, method="attend")
                own.append(KeysAndValues(*found))
            return x, jax.tree.map(lambda *pair: jnp.stack(pair), *own) if alone else None

        with jax.named_scope("blocks"):
            stacks = stack.pairs(self.blocks), None if kv is None else self.cross.blocks, stack.pairs(seen), kv, keys
            x, own = stack.through(body, x, *stacks, remat=self.remat)
        return x, jax.tree.map(lambda y: y.reshape(self.layers, *y.shape[2:]), own)

    def extend(self, ids, start, cache, seen):
        """`write` on t more tokens, without dropout: (token states [R,t,D], cache).

        ids i32[R,t] are positions start..start+t-1 (start i32[], may be traced); cache: `text.cache`'s, holds the
        self-attention of the positions before; seen: the queries' keys and values of B images, as `look`
        leaves them or `cache.stored`, R = B * texts of each.
        """
        layer = self._layer()

        def extend(x, cache, i, blocks, prefixes):
            for j, (params, prefix) in enumerate(zip(stack.both(blocks), stack.both(prefixes))):
                args = x, cache, CROSS_EVERY * i + j, start, prefix
                x, cache = layer.apply({"params": params}, *args, method="extend")
            return x, cache

        with jax.named_scope("blocks"):
            given = self.embed(ids, True, start), cache
            return caches.through(extend, *given, stack.pairs(self.blocks), stack.pairs(seen))

    def lm_logits(self, txt_tok):
        """txt_tok [B,T,D] -> f32[B,T,Vp]; columns from vocab_size on (padding of the stored vocabulary) are
        float32's lowest."""
        return self.lm_head(txt_tok, self.embed.attend)
