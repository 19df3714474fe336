"""What travels between devices, where XLA's own choice sends more than has to.

Gradients in parts, rows within cells.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from blip_jax.parallel.sharding import AXES, axis_size, constrain, partition_spec


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(x, dims: tuple, whole: tuple):
    """An array of logical dimensions `dims` as `whole` has them.

    Its gradient stays as `whole` has it, for other uses' gradients to be added first.

    `constrain` to `whole` alone would have XLA gather what x was rounded from.
    """
    return constrain(constrain(x, *dims), *whole)


def _gathered_forward(x, dims, whole):
    return gathered(x, dims, whole), None


def _gathered_backward(dims, whole, _, g):
    # split as `dims` at once, the gradients of several uses would be reduced one by one; whole, they are added first
    return (constrain(g, *whole),)


gathered.defvjp(_gathered_forward, _gathered_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def summed_in_parts(matrix, embed: int):
    """A kernel as matrix, whose dimension `embed` is split: each device receives its own part of the gradient alone.

    XLA's TPU compiler sends a product over all rows in parts (reduce-scatter) if the split dimension is the first of
    two; in other forms it may send every device the whole (all-reduce), twice as much.
    """
    return matrix


def _summed_in_parts_forward(matrix, embed):
    return matrix, None


def _summed_in_parts_backward(embed, _, g):
    # transposed where need be, so that the split dimension is the first one: the form that the compiler sends in parts
    g = g if embed == 0 else g.T
    g = jax.lax.with_sharding_constraint(g, P(AXES["embed"], P.UNCONSTRAINED))  # the other one stays split over tensor
    return (g if embed == 0 else g.T,)


summed_in_parts.defvjp(_summed_in_parts_forward, _summed_in_parts_backward)


@jax.custom_vjp
def words_summed_in_parts(table):
    """The word table [V,D], split over fsdp, for all its uses in a step.

    Each device receives its own part of the sum of these uses' gradients alone.

    XLA's TPU compiler scatters this sum (239 * 128 rows) only by rows, over all devices that add to it; the parts are
    then cut anew, along D. Where the devices do not divide the rows (256 and more), each receives the whole sum.
    """
    return table


def _words_forward(table):
    return table, None


@jax.named_scope("word_table")
def _words_backward(_, g):
    adding = AXES["vocab"], *AXES["act_batch"]
    if len(g) % axis_size(jax.sharding.get_abstract_mesh(), adding) == 0:
        # first by rows over all devices that add, as the compiler scatters the sum; then over those that hold one copy
        # of the table, tensor and fsdp, which alone exchange parts for the cut along D that follows
        for axes in (adding, (AXES["vocab"], AXES["embed"])):
            g = jax.lax.with_sharding_constraint(g, P(axes, None))
    return (constrain(g, "vocab", "embed"),)


words_summed_in_parts.defvjp(_words_forward, _words_backward)


def within_cells(x, idx, *dims):
    """x [B,...], idx i32[C,c], B = C*c -> [B,...]: row C*c + j is row idx[C,j] of cell C.

    dims: logical dimensions of x behind the first, which is act_batch; those not named are whole. The devices of a cell
    receive its rows once, and of the gradient only that of their own rows; left to XLA each would receive the gradient
    of the whole cell.
    """
    mesh, axes = jax.sharding.get_abstract_mesh(), AXES["act_batch"]
    devices = 1 if mesh.empty or mesh.manual_axes else axis_size(mesh, axes)
    rows, cell = x.shape[0], idx.shape[1]
    own = rows // devices

    if rows % devices or cell <= own or cell % own:  # cut unevenly, or each cell on one device
        cells = x.reshape(*idx.shape, *x.shape[1:])
        return jax.vmap(lambda cell, i: cell[i])(cells, idx).reshape(x.shape)

    # A cell is the rows of cell // own devices that follow each other: these gather it, and each picks its own rows.
    groups = np.arange(devices).reshape(-1, cell // own).tolist() if cell < rows else None
    spec = partition_spec(("act_batch", *dims))

    def pick(x, i):
        return jax.lax.all_gather(x, axes, axis_index_groups=groups, tiled=True)[i]

    return jax.shard_map(pick, in_specs=(spec, P(axes)), out_specs=spec, check_vma=False)(x, idx.reshape(-1))
