"""Programs on any number of rows: cut into batches and padded to a few sizes, so that each compiles once per size
and not per call."""

from __future__ import annotations

from typing import Any, Callable

import jax
import numpy as np
from jax.sharding import Mesh

from blip_jax.parallel import sharding


def at_least(n: int, unit: int = 1) -> int:
    """The least unit * 2**i that is n or more."""
    return unit << (-(-n // unit) - 1).bit_length()


def at_most(n: int, unit: int = 1) -> int:
    """The greatest unit * 2**i that is n or less, but `unit` at least."""
    return unit << (max(n // unit, 1).bit_length() - 1)


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    """`rows` with the last one repeated up to `size`."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)]) if len(rows) < size else rows


class Buckets:
    """Runs functions of (params, rows...) over a mesh, usually at most `limit` rows at a time.

    Row b of every argument and result belong together. Programs are jitted once per key. n rows make one batch of
    `at_least` n, or
    several of the same size: nothing is compiled for a remainder.
    """

    def __init__(self, params: dict, mesh: Mesh, limit: int):
        self.params, self.mesh = params, mesh
        self.unit = mesh.shape["data"] * mesh.shape["fsdp"]  # the devices that rows are shared out over
        self.limit = at_most(limit, self.unit)
        self._place = sharding.batch_sharding(mesh)
        self._programs: dict[tuple, Callable] = {}

    def program(self, key: tuple, make: Callable[[], Callable]) -> Callable:
        """make() under jax.jit; made once for each `key`."""
        if key not in self._programs:
            self._programs[key] = jax.jit(make())
        return self._programs[key]

    def compiled(self) -> int:
        """How many programs were compiled so far, over all keys and shapes."""
        return sum(program._cache_size() for program in self._programs.values())

    def map(self, program: Callable, n: int, rows: Callable[[slice], tuple], whole: tuple = (), limit: int = 0) -> Any:
        """What `program` gives for rows 0..n-1, as NumPy arrays; the host prepares a batch while the device works on
        the one before.

        rows: slice -> the arrays of these rows; whole: further arguments, the same every time; limit: most rows at a
        time, 0: the usual.
        """
        size, out, waiting = min(at_most(limit or self.limit, self.unit), at_least(n, self.unit)), [], None
        put = lambda x: jax.device_put(padded(x, size), self._place)
        with jax.set_mesh(self.mesh):
            for start in range(0, n, size):
                made = program(self.params, *map(put, rows(slice(start, min(start + size, n)))), *whole)
                if waiting is not None:
                    out.append(jax.device_get(waiting))
                waiting = made
            out.append(jax.device_get(waiting))
        return jax.tree.map(lambda *x: np.concatenate(x)[:n], *out)
