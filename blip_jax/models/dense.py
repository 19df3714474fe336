"""The dense layers of all models, and the one product of matrices behind them."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip_jax import optim


def dot_general(x, y, dimension_numbers, precision=None, preferred_element_type=None):
    """`jax.lax.dot_general`; on CPUs a bfloat16 product is summed in float32 and then rounded, as TPUs and GPUs do anyway.

    XLA's CPU compiler raises a product of bfloat16 with a bfloat16 result to float32, which takes twice the time of the same
    product with a float32 result. The gradient is that of the plain product: its products stay in bfloat16.
    """
    if preferred_element_type is None and x.dtype == y.dtype == jnp.bfloat16 and _platform() == "cpu":
        return _wide(x, y, dimension_numbers)
    return jax.lax.dot_general(x, y, dimension_numbers, precision=precision, preferred_element_type=preferred_element_type)


Dense = functools.partial(nn.Dense, dot_general=dot_general)
DenseGeneral = functools.partial(nn.DenseGeneral, dot_general=dot_general)


def rounds(path: str) -> bool:
    """Whether the layers round the parameter at `path` to the dtype of the computation whenever they use it: the matrices of vit and med.

    Rounded once beforehand they give the same results, bit for bit.
    """
    return path.startswith(("vit/", "med")) and path.endswith(("/kernel", "/embedding"))


def rounded(params: dict, dtype) -> dict:
    """Parameters with all that `rounds` in `dtype`."""
    return optim.nest((path, x.astype(dtype) if rounds(path) else x) for path, x in optim.paths(params))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _wide(x, y, dimension_numbers):
    return jax.lax.dot_general(x, y, dimension_numbers, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x, y, dimension_numbers):
    return _wide(x, y, dimension_numbers), (x, y)


def _backward(dimension_numbers, operands, cotangent):
    x, y = operands
    (x_cotangent,) = jax.linear_transpose(lambda x: jax.lax.dot_general(x, y, dimension_numbers), x)(cotangent)
    (y_cotangent,) = jax.linear_transpose(lambda y: jax.lax.dot_general(x, y, dimension_numbers), y)(cotangent)
    return x_cotangent, y_cotangent


_wide.defvjp(_forward, _backward)


def _platform() -> str:
    """Of the mesh that the program is traced for (which need not be of this machine), else of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def single_cpu() -> bool:
    """Whether arrays lie whole on one CPU device: without a mesh, on a mesh of one, or inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return _platform() == "cpu" and (mesh.size <= 1 or mesh.manual_axes == mesh.axis_names)
