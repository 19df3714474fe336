"""A stack of equal layers: parameters with a leading L, and one body that runs L times, so that a program does not grow
with L.

A stack is a tree of arrays [L,...] (parameters, keys and values), or, as `apart` gives it, a tuple of L trees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from blip_jax.models.layers.cpu import single_cpu


def parameters(module, layer, length: int, *example):
    """The stack `blocks` of a module: parameters of `length` layers, as given, or each leaf [L,...] drawn at once.

    layer: a module without parent; example: arguments of its `__call__`, which runs all its parts once.
    """

    def draw(key):
        return layer.init(key, *example)["params"]

    if module.has_variable("params", "blocks"):
        return module.get_variable("params", "blocks")
    return module.param("blocks", lambda key: jax.vmap(draw)(jax.random.split(key, length)))


def unrolled() -> bool:
    """Whether layers follow each other in the program instead of being one loop: on a single CPU.

    There a loop copies every parameter of a layer out of its stack for each pass, each gradient and each token.
    """
    return single_cpu()


def through(body: Callable, x, *stacks) -> tuple[Any, Any]:
    """x through all layers: body(x, *parts) -> (x, out), with a layer's part of each of `stacks`, None of None.

    Returns x and the outs, a tree of arrays [L,...].
    """
    if not unrolled():
        return jax.lax.scan(lambda x, parts: body(x, *parts), x, stacks)
    outs, cut = [], [apart(stack) for stack in stacks if stack is not None]
    for parts in zip(*cut, strict=True):
        given = iter(parts)
        x, out = body(x, *(None if stack is None else next(given) for stack in stacks))
        outs.append(out)
    return x, jax.tree.map(lambda *layers: _joined(layers), *outs) if outs else None


def part(stack, start: int, stop: int):
    """Layers start..stop-1 of a stack, a copy."""
    return stack[start:stop] if _is_apart(stack) else jax.tree.map(lambda x: x[start:stop], stack)


def last(stack):
    """The last layer's part of a stack."""
    return stack[-1] if _is_apart(stack) else jax.tree.map(lambda x: x[-1], stack)


def apart(stack) -> tuple:
    """A stack as a tuple of its L layers' trees, cut once, where it is not one already."""
    if _is_apart(stack):
        return stack
    leaves, tree = jax.tree.flatten(stack)
    return tuple(map(tree.unflatten, zip(*map(_cut, leaves), strict=True)))


def _is_apart(stack) -> bool:
    return type(stack) is tuple  # a NamedTuple of arrays is a stack


def _cut(x) -> tuple:
    """[L,...] -> L arrays; the gradient is joined at once, where jax would add up L arrays [L,...] of zeros but
    for a layer."""
    return _cut_with_gradient(x) if jnp.issubdtype(x.dtype, jnp.floating) else tuple(x[i] for i in range(len(x)))


@jax.custom_vjp
def _cut_with_gradient(x):
    bits = _as_bits(x)
    return tuple(_from_bits(bits[i], x.dtype) for i in range(len(x)))


_cut_with_gradient.defvjp(lambda x: (_cut_with_gradient(x), None), lambda _, layers: (_joined(layers),))


def _joined(layers):
    """L arrays -> [L,...]"""
    return _from_bits(jnp.stack([_as_bits(x) for x in layers]), layers[0].dtype)


def _as_bits(x):
    """bfloat16 as its bits, which XLA's CPU compiler can cut and join; it would raise all of x to float32."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(x, dtype):
    return jax.lax.bitcast_convert_type(x, dtype) if dtype == jnp.bfloat16 else x
