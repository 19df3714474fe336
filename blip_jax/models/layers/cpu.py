"""Products and look-ups of bfloat16 arrays in the forms that XLA's CPU compiler handles well; elsewhere they are
the plain ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax import trees


def dot_general(x, y, dimension_numbers, precision=None, preferred_element_type=None):
    """`jax.lax.dot_general`; on CPUs a bfloat16 product is summed in float32 and then rounded, as TPUs and GPUs do
    anyway.

    XLA's CPU compiler raises a product of bfloat16 with a bfloat16 result to float32, which takes twice the time of the
    same product with a float32 result.
    """
    if preferred_element_type is None and x.dtype == y.dtype == jnp.bfloat16 and platform() == "cpu":
        return summed(x, y, dimension_numbers).astype(x.dtype)
    return jax.lax.dot_general(
        x, y, dimension_numbers, precision=precision, preferred_element_type=preferred_element_type
    )


def einsum(equation: str, x, y, product=dot_general):
    """`jnp.einsum` of two arrays by `product`, which takes what `jax.lax.dot_general` takes: here `dot_general`, or
    `summed` for a float32 result.

    equation: letters apart, as "B T N H, B S N H -> B N T S"; a letter of both sides that is in the result is a batch.
    """
    (of_x, of_y), out = (side.split() for side in equation.split("->")[0].split(",")), equation.split("->")[1].split()
    shared = [d for d in of_x if d in of_y]
    batch, sums = [d for d in shared if d in out], [d for d in shared if d not in out]
    dims = lambda names, letters: tuple(names.index(d) for d in letters)
    numbers = ((dims(of_x, sums), dims(of_y, sums)), (dims(of_x, batch), dims(of_y, batch)))
    made = batch + [d for d in (*of_x, *of_y) if d not in shared]
    return jnp.transpose(product(x, y, numbers), dims(made, out))


def as_bits(params: dict) -> dict:
    """Parameters with every bfloat16 kernel as its bits in uint16, which the dense layers read as well; without
    gradient.

    XLA's CPU compiler cannot slice or gather bfloat16: it raises the whole array to float32, as here the stacked layers
    of a scan.
    """
    bits = lambda path, x: (
        jax.lax.bitcast_convert_type(x, jnp.uint16) if path.endswith("kernel") and x.dtype == jnp.bfloat16 else x
    )
    return trees.nest((path, bits(path, x)) for path, x in trees.paths(params))


@jax.tree_util.register_pytree_node_class
class Turned:
    """A bfloat16 kernel [in..., out...] that lies in memory as [out..., in...], in an array of the kernel's shape.

    XLA's CPU compiler multiplies few rows with a matrix that lies so in a third of the time or less.
    """

    def __init__(self, kept):
        self.kept = kept

    @classmethod
    def of(cls, kernel: np.ndarray, taken: int, put: Callable) -> Turned:
        """kernel: on the host; taken: how many of its dimensions are summed over; put: host array -> device."""
        matrix = kernel.reshape(int(np.prod(kernel.shape[:taken])), -1)
        return cls(put(np.ascontiguousarray(matrix.T).reshape(kernel.shape)))

    def tree_flatten(self):
        return (self.kept,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def product(self, x, dimension_numbers):
        """`dot_general(x, kernel, dimension_numbers)`, where the kernel's first dimensions are summed over."""
        (taken, of_kernel), _ = dimension_numbers
        lead = [d for d in range(x.ndim) if d not in taken]
        made = *(x.shape[d] for d in lead), *self.kept.shape[len(of_kernel) :]
        # A matrix on both sides: for more dimensions the compiler lays a turned-back copy of the kernel beside it.
        x = jnp.transpose(x, (*lead, *taken)).reshape(int(np.prod([x.shape[d] for d in lead])), -1)
        matrix = self.kept.reshape(-1, x.shape[-1])
        return summed(x, matrix, (((1,), (1,)), ((), ()))).astype(x.dtype).reshape(made)


def rows(table, ids):
    """table[ids]: [V,D], i32[...] -> [...,D], on CPUs without raising a bfloat16 table to float32 (see `as_bits`)."""
    return _rows(table, ids) if table.dtype == jnp.bfloat16 and platform() == "cpu" else table[ids]


@jax.custom_vjp
def _rows(table, ids):
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(table, jnp.uint16)[ids], jnp.bfloat16)


_rows.defvjp(
    lambda table, ids: (_rows(table, ids), (table, ids)),
    lambda kept, g: (jnp.zeros_like(kept[0]).at[kept[1]].add(g), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def summed(x, y, dimension_numbers):
    """`jax.lax.dot_general` of x and y of one dtype with a float32 result.

    The products of its gradient are in that dtype (jax's own would multiply a float32 with a bfloat16 matrix).
    """
    ((x_sums, _), (batch, _)), one = dimension_numbers, x.dtype == jnp.bfloat16 and platform() == "cpu"
    one &= not batch and len(x_sums) == 1 == y.ndim - 1 and x.size == x.shape[x_sums[0]]
    if one and x_sums[0] == x.ndim - 1:  # one row: a product of a vector, for which a CPU raises the matrix to float32
        two = jnp.concatenate([x.reshape(1, -1)] * 2)
        y = jax.lax.dot_general(two, y, (((1,), dimension_numbers[0][1]), ((), ())), preferred_element_type=jnp.float32)
        return y[:1].reshape(*x.shape[:-1], -1)
    return jax.lax.dot_general(x, y, dimension_numbers, preferred_element_type=jnp.float32)


def _forward(x, y, dimension_numbers):
    return summed(x, y, dimension_numbers), (x, y)


def _backward(dimension_numbers, operands, cotangent):
    (x, y), ((x_sums, y_sums), (x_batch, y_batch)) = operands, dimension_numbers
    x_free = [d for d in range(x.ndim) if d not in (*x_sums, *x_batch)]
    y_free = [d for d in range(y.ndim) if d not in (*y_sums, *y_batch)]
    batch, cotangent = range(len(x_batch)), cotangent.astype(x.dtype)
    of_x = range(len(batch), len(batch) + len(x_free))
    of_y = range(of_x.stop, cotangent.ndim)
    # XLA's CPU compiler has no batched ones with a transposed side
    product = jax.lax.dot_general if batch else dot_general
    # dimensions: batch, free in x, summed in the order of y's
    dx = product(cotangent, y, ((of_y, y_free), (batch, y_batch)))
    dy = product(cotangent, x, ((of_x, x_free), (batch, x_batch)))
    x_dims = [*x_batch, *x_free, *(x_sums[i] for i in np.argsort(y_sums))]
    y_dims = [*y_batch, *y_free, *(y_sums[i] for i in np.argsort(x_sums))]
    return jnp.transpose(dx, np.argsort(x_dims)), jnp.transpose(dy, np.argsort(y_dims))


summed.defvjp(_forward, _backward)


def platform() -> str:
    """Of the mesh that the program is traced for (which need not be of this machine), else of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def single_cpu() -> bool:
    """Whether arrays lie whole on one CPU device: without a mesh, on a mesh of one, or inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and (mesh.size <= 1 or mesh.manual_axes == mesh.axis_names)
