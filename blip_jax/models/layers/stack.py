"""A stack of equal layers: parameters with a leading L, and one body that runs L times, so that a program does not grow
with L.

A stack is a tree of arrays [L,...] (parameters, keys and values), or, as `apart` gives it, a tuple of L trees.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from blip_jax.models.layers.cpu import single_cpu
from blip_jax.models.layers.dense import apart, is_apart, joined
from blip_jax.models.layers.norm import KEPT


def _of_cudnn(primitive, *_, **__) -> bool:
    """Whether it is cuDNN's attention, among whose results is one for its gradient that only jax's own rule sees."""
    return primitive.name.startswith("dot_product_attention_fwd")


# What a loop's backward pass finds, [L,...] of each: results of dense layers and what is marked. The rest, as LayerNorm
# and GELU, is made of these again, as the compiler itself does where layers are not in a loop.
KEEP = functools.reduce(
    jax.checkpoint_policies.save_from_both_policies,
    (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(KEPT),
        _of_cudnn,
    ),
)


# and where model.remat is "full": what each layer is given alone
NOTHING = jax.checkpoint_policies.nothing_saveable


def parameters(module, layer, length: int, *example):
    """The stack `blocks` of a module: parameters of `length` layers, as given, or each leaf [L,...] drawn at once.

    layer: a module without parent; example: arguments of its `__call__`, which runs all its parts once.
    """

    def draw(key):
        return layer.init(key, *example)["params"]

    if module.has_variable("params", "blocks"):
        return module.get_variable("params", "blocks")
    return module.param("blocks", lambda key: jax.vmap(draw)(jax.random.split(key, length)))


_looped = contextvars.ContextVar("looped", default=False)


@contextlib.contextmanager
def looped():
    """Within it layers are one loop wherever they run: for what is traced for its shapes alone, in a time that does not
    grow with L."""
    token = _looped.set(True)
    try:
        yield
    finally:
        _looped.reset(token)


def unrolled() -> bool:
    """Whether layers follow each other in the program instead of being one loop: on a single CPU.

    There a loop copies every parameter of a layer out of its stack for each pass, each gradient and each token (XLA's
    CPU compiler; twice the time of a token's products where few rows share it), and raises a whole stack of bfloat16 to
    float32 first.
    """
    return single_cpu() and not _looped.get()


class Ended(NamedTuple):
    """A stack without its last layer, and that layer's tree."""

    stack: Any
    last: Any


def ended(stack) -> Ended:
    """A stack as `Ended`, if it is not: cut, its arrays are copied. None has None of both."""
    if isinstance(stack, Ended):
        return stack
    if stack is not None and unrolled():
        stack = apart(stack)
    return Ended(part(stack, 0, -1), last(stack))


def through(body: Callable, x, *stacks, remat: str = "none") -> tuple[Any, Any]:
    """x through all layers: body(x, *parts) -> (x, out), with a layer's part of each of `stacks`, None of None.

    remat: "full": the backward pass makes all of a layer again but what it is given. Returns x and the outs, a tree of
    arrays [L,...].
    """
    if not unrolled() and not any(map(is_apart, stacks)):
        policy = NOTHING if remat == "full" else KEEP
        layer = jax.checkpoint(lambda x, parts: body(x, *parts), policy=policy, prevent_cse=False)
        return jax.lax.scan(layer, x, stacks)
    body = jax.checkpoint(body, policy=NOTHING) if remat == "full" else body
    outs, cut = [], [apart(stack) for stack in stacks if stack is not None]
    for parts in zip(*cut, strict=True):
        given = iter(parts)
        x, out = body(x, *(None if stack is None else next(given) for stack in stacks))
        outs.append(out)
    return x, jax.tree.map(lambda *layers: joined(layers), *outs) if outs else None


def pairs(stack):
    """A stack of 2n layers as one of n pairs, for bodies that run two layers (`both`); no copy. None is None."""
    if stack is None:
        return None
    if unrolled() or is_apart(stack):
        layers = apart(stack)
        return tuple(zip(layers[::2], layers[1::2]))
    return jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), stack)


def both(pair) -> tuple:
    """The two layers' parts of a part of `pairs`; their gradients are joined, not added up. None: two of None."""
    if pair is None:
        return None, None
    if type(pair) is tuple:
        return pair
    leaves, tree = jax.tree.flatten(pair)
    halves = [[half.reshape(x.shape[1:]) for half in jax.lax.split(x, (1, 1))] for x in leaves]
    return tuple(map(tree.unflatten, zip(*halves)))


def part(stack, start: int, stop: int):
    """Layers start..stop-1 of a stack, a copy."""
    return stack[start:stop] if is_apart(stack) else jax.tree.map(lambda x: x[start:stop], stack)


def last(stack):
    """The last layer's part of a stack."""
    return stack[-1] if is_apart(stack) else jax.tree.map(lambda x: x[-1], stack)
