"""Keys and values that passes over texts share: those of images, and a token loop's of the tokens so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blip_jax.models.layers import stack
from blip_jax.models.layers.cpu import single_cpu
from blip_jax.models.layers.dense import apart, is_apart


class KeysAndValues(NamedTuple):
    """Of B images, or R texts, in all layers, each [L,B,P,N,H]."""

    k: Any
    v: Any


class StoredKeysAndValues(NamedTuple):
    """The same of images as a token loop's products read them: k [L,B,N,H,P], v [L,B,N,P,H], on a single CPU in
    float32 and a layer's for itself, [B,...].

    Else every token would transpose and raise all of it again, and copy it out of its stack.
    """

    k: Any
    v: Any


def images_of(kv) -> int:
    """How many images (or questions) keys and values belong to: any tree of them, stored or not, [L,B,...] or apart."""
    return jax.tree.leaves(kv)[0].shape[-4]


def stored(kv):
    """Keys and values, `KeysAndValues` or a tree of them, for many calls of a text model's `extend`; the layers apart
    where they are no loop (`stack.unrolled`)."""
    return jax.tree.map(_stored, kv, is_leaf=lambda x: isinstance(x, KeysAndValues))


def _stored(kv: KeysAndValues):
    wide = _loop_dtype(kv.k.dtype)
    found = StoredKeysAndValues(jnp.moveaxis(kv.k, 2, -1).astype(wide), jnp.moveaxis(kv.v, 2, 3).astype(wide))
    return jax.lax.optimization_barrier(apart(found) if stack.unrolled() else found)


def opened(kv, dtype):
    """(k, v), each [B,P,N,H], of one layer's part of keys and values, stored or not."""
    k, v = (jnp.moveaxis(kv.k, -1, 1), jnp.moveaxis(kv.v, 2, 1)) if isinstance(kv, StoredKeysAndValues) else kv
    return k.astype(dtype), v.astype(dtype)


def _loop_dtype(dtype):
    """What a token loop keeps keys and values in: a CPU's small products are in float32, and it would raise
    bfloat16 for every token."""
    return jnp.float32 if single_cpu() else dtype


# --- of the tokens so far ---------------------------------------------------------------------------------------------
# `KeysAndValues` [L,R,S,N,H] of R texts of at most S tokens; where layers are no loop (`stack.unrolled`), a tuple of L
# of them with one layer each, of which a layer reads its own where it lies: a part of one array would be copied out of
# it for every token.


def empty(sizes: Mapping, rows: int, length: int, dtype):
    """The cache of `rows` texts of at most `length` tokens, zeros.

    sizes: of the text model, its layers, heads, and head_dim or width; dtype: of the computation.
    """
    heads, layers = sizes["heads"], sizes["layers"]
    head_dim = sizes["head_dim"] if "head_dim" in sizes else sizes["width"] // heads

    def zeros(layers: int) -> KeysAndValues:
        x = jnp.zeros((layers, rows, length, heads, head_dim), _loop_dtype(dtype))
        return KeysAndValues(x, x)

    return tuple(zeros(1) for _ in range(layers)) if stack.unrolled() else zeros(layers)


def length(cache) -> int:
    """S, of how many tokens there is room."""
    return jax.tree.leaves(cache)[0].shape[2]


def filled(cache, made: KeysAndValues):
    """A cache with positions 0..T-1 of all layers, each [L,R,T,N,H]."""
    write = lambda old, new: jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0,) * 5)
    if not is_apart(cache):
        return jax.tree.map(write, cache, made)
    return tuple(jax.tree.map(lambda old, new: write(old, new[None]), *of) for of in zip(cache, apart(made)))


def extended(cache, layer, start, made, dtype):
    """What t more tokens, positions start..start+t-1, attend to in a layer: k, v [R,S,N,H] in `dtype`, and the cache
    with them.

    layer: its number, i32[] or of Python; made: (k, v) of the t tokens there, each [R,t,N,H].
    """
    own, at = (cache[layer], 0) if is_apart(cache) else (cache, layer)

    def write(old, new):
        return jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), (at, 0, start, 0, 0))

    own = KeysAndValues(*map(write, own, made))
    k, v = (jax.lax.dynamic_index_in_dim(x, at, keepdims=False).astype(dtype) for x in own)
    return k, v, (*cache[:layer], own, *cache[layer + 1 :]) if is_apart(cache) else own


def through(body: Callable, x, cache, *stacks):
    """x and the cache through all layers: body(x, cache, i, *parts) -> (x, cache), i the number of the parts."""
    if is_apart(cache):
        for i, parts in enumerate(zip(*map(apart, stacks), strict=True)):
            x, cache = body(x, cache, i, *parts)
        return x, cache

    first = stacks[0]
    numbers = jnp.arange(len(first if is_apart(first) else jax.tree.leaves(first)[0]))
    return stack.through(lambda carry, i, *parts: (body(*carry, i, *parts), None), (x, cache), numbers, *stacks)[0]
