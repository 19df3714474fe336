"""Programs over any number of rows: few static shapes, one batch ahead of the host, split over a mesh.

Rows are padded to these shapes; results are gathered in order.

A program is a function (params, rows...) -> rows. Row b of every argument and result belongs together, and no row
changes another, so that rows can be padded, cut and shared out at will. Parameters lie whole on every device or split
over fsdp and tensor, as `sharding` has them. A mesh may reach over several processes; each of them then gives the same
rows and gets all results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blip_jax import trees
from blip_jax.models.layers.cpu import Turned, single_cpu
from blip_jax.models.layers.dense import in_text_stack, rounds, text_layers_apart, turns
from blip_jax.parallel import interrupt, sharding


def at_least(n: int, unit: int = 1) -> int:
    """The least unit * 2**i that is n or more."""
    return unit << (-(-n // unit) - 1).bit_length()


def at_most(n: int, unit: int = 1) -> int:
    """The greatest unit * 2**i that is n or less, but `unit` at least."""
    return unit << (max(n // unit, 1).bit_length() - 1)


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    """`rows` with the last one repeated up to `size`."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)]) if len(rows) < size else rows


def placed(params: dict, mesh: Mesh, dtype) -> dict:
    """Host arrays that every process holds, as parameters on the devices of `mesh`.

    Takes them out of `params` one by one.

    What every use would round to `dtype`, the transformers' matrices, is rounded here, once. On a single CPU the text
    layers are cut apart (see `text_layers_apart`), and bfloat16 kernels are as its products read them (`layers.cpu`).
    An array that still lies in a file is read a layer at a time. ValueError: `sharding.shardings_for`.
    """
    arrays = dict(trees.paths(params))
    places = dict(trees.paths(sharding.shardings_for(params, mesh)))
    params.clear()  # each array is let go as soon as the devices have it
    with jax.set_mesh(mesh):
        one_cpu = single_cpu()
    out, everywhere = {}, NamedSharding(mesh, P())
    beside_llm = any(path.startswith("llm/") for path in arrays)
    for path in list(arrays):
        x = arrays.pop(path)
        kind = np.dtype(dtype) if rounds(path) else x.dtype
        if one_cpu and in_text_stack(path):
            layers = x.rows() if isinstance(x, trees.Lazy) else np.asarray(x)
            out[path] = tuple(_kept(path, layer, kind, everywhere) for layer in layers)
        elif one_cpu:
            out[path] = _kept(path, np.asarray(x, kind), kind, everywhere, beside_llm)
        else:
            out[path] = _put(np.asarray(x, kind), places[path])
    with jax.set_mesh(mesh):
        return text_layers_apart(trees.nest(out.items()))


def _kept(path: str, x: np.ndarray, kind: np.dtype, place: NamedSharding, beside_llm: bool = False):
    """An array, or a layer of one, as a CPU keeps it. beside_llm: the model has a language model, and a tower so large
    that no program should make a copy of it (`cpu.as_bits`)."""
    x = x.astype(kind, copy=False)
    if kind == jax.numpy.bfloat16 and (taken := turns(path)):
        return Turned.of(x, taken, lambda kernel: _put(kernel, place))
    bits = beside_llm and kind == jax.numpy.bfloat16 and path.startswith("vit/blocks/") and path.endswith("/kernel")
    return _put(x.view(np.uint16) if bits else x, place)


def behind(items: Iterable) -> Iterator:
    """Each item, once the next has been made.

    So what an item started on the devices goes on while the host looks at the one before.
    """
    waiting = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


def alone(function: Callable, mesh: Mesh, args: tuple, out: Any) -> Callable:
    """`function` of (params, rows...) for `jax.jit`: each place on the mesh's data axis works by itself.

    A place has its own part of the rows.

    No place waits for another, and what one computes does not depend on how many there are. args, out: the dimension
    that counts the rows, of each argument behind the parameters and of the result: trees of int, as prefixes of those
    of the arrays. A place is one device, which holds the parameters whole, or the fsdp * tensor devices over which they
    are split.
    """
    single = mesh.size == mesh.shape["data"]
    split = functools.partial(jax.tree.map, lambda dim: P(*[None] * dim, "data"))
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(P(), *split(args)),
        out_specs=split(out),
        check_vma=False,
        axis_names=set(mesh.axis_names) if single else {"data"},
    )


class Pass(NamedTuple):
    """One program of an evaluation and what it is called with, for plans of it (`tasks`)."""

    name: str
    function: Callable  # (params, rows...) -> rows, which the evaluation jits
    rows: tuple  # of trees of jax.ShapeDtypeStruct, those of all devices together
    flops: float  # of a row, by the formulas of models.flops
    pictures: int = 0  # of a row, that the image tower sees
    trips: int = 0  # most iterations of its token loop, 0: it has none
    # how `rows` lie, trees of PartitionSpec as prefixes of theirs; (): all are split along their first dimension
    specs: tuple = ()
    stays: bool = False  # its results stay on the devices as they lie there, for another program


class Runner:
    """Runs programs, made with `jax.jit`, over rows on a mesh of `sharding.make_mesh`."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        # the devices that rows are shared out over: sizes are multiples of their number
        self.unit = mesh.shape["data"] * mesh.shape["fsdp"]
        self._place = sharding.batch_sharding(mesh)

    def put(self, rows: np.ndarray, size: int) -> jax.Array:
        """`rows`, which every process holds, on the devices, each with its part; padded to `size`."""
        return _put(padded(rows, size), self._place)

    def fetched(self, passes: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """(key, NumPy arrays) of each (key, arrays on the devices), one pass behind (see `behind`).

        The key says what the arrays belong to. Between two passes a signal ends it (`interrupt.check`).
        """

        def begun():
            for tag, out in passes:
                yield tag, self._whole(out)
                interrupt.check()

        for tag, out in behind(begun()):
            yield tag, jax.device_get(out)

    def map(
        self,
        program: Callable,
        params: dict,
        n: int,
        rows: Callable[[slice], tuple],
        *,
        size: int,
        whole: tuple = (),
        progress: Callable[[range], Iterable[int]] = iter,
    ) -> Any:
        """What `program` gives for rows 0..n-1, as NumPy arrays.

        rows: slice -> the arrays of these rows; size: rows of a pass; whole: further arguments, the same every time;
        progress: passes on the numbers of the first rows, and may say how far they are.
        """

        def passes():
            for start in progress(range(0, n, size)):
                given = rows(slice(start, min(start + size, n)))
                yield None, program(params, *(self.put(x, size) for x in given), *whole)

        with jax.set_mesh(self.mesh):
            out = [found for _, found in self.fetched(passes())]
        return jax.tree.map(lambda *x: np.concatenate(x)[:n], *out)

    def size(self, n: int, limit: int) -> int:
        """Rows of a pass for n of them, at most about `limit`.

        One pass of `at_least` n, or several of one size, so that nothing is compiled for a remainder and little for
        another n.
        """
        return min(at_most(limit, self.unit), at_least(n, self.unit))

    def _whole(self, out):
        """Arrays of which each process can read all."""
        return _gatherer(self.mesh)(out) if self.mesh.is_multi_process else out


@functools.cache
def _gatherer(mesh: Mesh) -> Callable:
    def gather(out):
        return out

    return jax.jit(gather, out_shardings=NamedSharding(mesh, P()))


def _put(x: np.ndarray, place: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])
