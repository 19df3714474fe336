"""The dense layers of all models, and the one product of matrices behind them."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from blip_jax import trees
from blip_jax.models.layers.cpu import Turned, as_bits, dot_general, platform, single_cpu
from blip_jax.parallel import sharding
from blip_jax.parallel.collectives import summed_in_parts, words_summed_in_parts


def _promoted(*arrays, dtype=None, inexact=True):
    """flax's promotion, after `as_bits` is undone; what is `Turned` stays as it is."""

    def back(x):
        if x is None or isinstance(x, Turned):
            return None
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x

    found = promote_dtype(*map(back, arrays), dtype=dtype, inexact=inexact)
    return [x if isinstance(x, Turned) else y for x, y in zip(arrays, found)]


def _layer(kind, *args, embed: int = 0, **kwargs):
    """A layer of flax; `embed`: whether the width of the model is what its kernel [in, out] takes in (0) or gives
    (1)."""
    return kind(*args, dot_general=functools.partial(_product, embed=embed), promote_dtype=_promoted, **kwargs)


def _product(x, kernel, dimension_numbers, precision=None, *, embed: int):
    """`dot_general` with a kernel of which fsdp may split dimension `embed`; then both are made matrices (see
    `collectives.summed_in_parts`)."""
    if isinstance(kernel, Turned):
        return kernel.product(x, dimension_numbers)
    if not sharding.splits("embed"):
        return dot_general(x, kernel, dimension_numbers, precision)
    (taken, of_kernel), _ = dimension_numbers
    lead = [d for d in range(x.ndim) if d not in taken]
    rows = jnp.transpose(x, (*lead, *taken)).reshape(*(x.shape[d] for d in lead), -1)
    matrix = summed_in_parts(kernel.reshape(rows.shape[-1], -1), embed)
    y = dot_general(rows, matrix, (((rows.ndim - 1,), (0,)), ((), ())), precision)
    return y.reshape(*rows.shape[:-1], *kernel.shape[len(of_kernel) :])


Dense = functools.partial(_layer, nn.Dense)
DenseGeneral = functools.partial(_layer, nn.DenseGeneral)


TEXT_MODELS = ("med", "qformer", "llm")  # beginnings of the paths of parameters in stacks of text layers


def rounds(path: str) -> bool:
    """Whether the layers round the parameter at `path` to the dtype of the computation whenever they use it: the
    matrices of vit and of the text models; T5's biases of positions are no matrix.

    Rounded once beforehand they give the same results, bit for bit.
    """
    matrix = path.endswith(("/kernel", "/embedding")) and not path.endswith("rel_bias/embedding")
    return path.startswith(("vit/", *TEXT_MODELS)) and matrix


def rounded(params: dict, dtype) -> dict:
    """Parameters with all that `rounds` in `dtype`; on CPUs the ViT's stacked kernels as `as_bits` has them, the
    text layers apart."""
    out = trees.nest((path, x.astype(dtype) if rounds(path) else x) for path, x in trees.paths(params))
    return text_layers_apart(stacked_as_bits(out)) if platform() == "cpu" else out


def rounded_once(params: dict, dtype) -> dict:
    """Parameters with the text models' that `rounds` in `dtype`, each where it lies: for training, where several passes
    use them.

    Their gradients then meet in `dtype`, before they are summed over the devices: once a step, not once for every pass.
    On CPUs the ViT's stacked kernels that are in bfloat16 already, which are frozen, are as `as_bits` has them.
    """

    def keep(path, x):
        x = sharding.constrain(x.astype(dtype), *sharding.logical_dims(path, x.ndim))
        return words_summed_in_parts(x) if path.endswith("word/embedding") and sharding.splits("embed") else x

    out = trees.nest(
        (path, keep(path, x) if rounds(path) and path.startswith(TEXT_MODELS) else x) for path, x in trees.paths(params)
    )
    return stacked_as_bits(out) if platform() == "cpu" else out


def stacked_as_bits(params: dict) -> dict:
    """`as_bits` of the kernels that a scan slices, of a model that has a ViT."""
    if "vit" not in params:
        return params
    return params | {"vit": params["vit"] | {"blocks": as_bits(params["vit"]["blocks"])}}


def in_text_stack(path: str) -> bool:
    """Whether the parameter at `path` is one of a stack of text layers."""
    return path.startswith(TEXT_MODELS) and "/blocks/" in path


def turns(path: str) -> int:
    """How many dimensions of the language model's kernel at `path` are summed over; 0: it is no such kernel."""
    if not (path.startswith("llm/") and path.endswith("/kernel")):
        return 0
    return 2 if path.endswith("/out/kernel") else 1


def text_layers_apart(params: dict) -> dict:
    """Parameters with the stacks of text layers cut into their layers on a single CPU (see `models.layers.stack`):
    once, where a program would do it in every call and a loop over tokens for every token."""
    if not single_cpu():
        return params

    def cut(part):
        return {
            name: apart(x) if name == "blocks" else cut(x) if isinstance(x, dict) else x for name, x in part.items()
        }

    return {name: cut(part) if name.startswith(TEXT_MODELS) else part for name, part in params.items()}


def apart(stack) -> tuple:
    """A stack, of arrays [L,...] or tuples of L of them, as a tuple of its L layers' trees, cut once, where it is not
    one already."""
    if is_apart(stack):
        return stack
    leaves, tree = jax.tree.flatten(stack, is_leaf=lambda x: type(x) is tuple)
    cut = (x if type(x) is tuple else _cut(x) for x in leaves)
    return tuple(map(tree.unflatten, zip(*cut, strict=True)))


def is_apart(stack) -> bool:
    """Whether a stack is in the form of `apart`."""
    return type(stack) is tuple  # a NamedTuple of arrays is a stack


def joined(layers: tuple):
    """L arrays -> [L,...]"""
    return _joined(layers) if jnp.issubdtype(layers[0].dtype, jnp.floating) else jnp.stack(layers)


def _cut(x) -> tuple:
    """[L,...] -> L arrays; the gradient is joined at once, where jax would add up L arrays [L,...] of zeros but
    for a layer."""
    return _cut_with_gradient(x) if jnp.issubdtype(x.dtype, jnp.floating) else tuple(x[i] for i in range(len(x)))


@jax.custom_vjp
def _cut_with_gradient(x):
    bits = _as_bits(x)
    return tuple(_from_bits(bits[i], x.dtype) for i in range(len(x)))


@jax.custom_vjp
def _joined(layers):
    return _from_bits(jnp.stack([_as_bits(x) for x in layers]), layers[0].dtype)


# Bits have no gradient, so each of the two is given the other.
_cut_with_gradient.defvjp(lambda x: (_cut_with_gradient(x), None), lambda _, layers: (_joined(layers),))
_joined.defvjp(lambda layers: (_joined(layers), None), lambda _, stack: (_cut_with_gradient(stack),))


def _as_bits(x):
    """bfloat16 as its bits (see `as_bits`)."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(x, dtype):
    return jax.lax.bitcast_convert_type(x, dtype) if dtype == jnp.bfloat16 else x
