"""Nested dicts by path: parameters and settings as (path, leaf) pairs and back; leaves that are still to be read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np


class Lazy:
    """An array that is read each time that `numpy.asarray` is called on it, so that a model larger than the memory can
    go from one file to another."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype,
        read: Callable[[], np.ndarray],
        row: Callable[[int], np.ndarray] | None = None,
    ):
        """read: the whole; row: one part of its leading dimension, where that can be read by itself."""
        self.shape, self.dtype, self._read, self._row = tuple(shape), np.dtype(dtype), read, row

    def __array__(self, dtype=None, copy=None):
        if self._row is not None:
            out = np.empty(self.shape, dtype or self.dtype)
            for i in range(len(out)):
                out[i] = self._row(i)
            return out
        x = self._read()
        return x if dtype is None else x.astype(dtype, copy=False)

    def rows(self) -> Iterator[np.ndarray]:
        """The parts of the leading dimension, one after the other."""
        yield from np.asarray(self) if self._row is None else map(self._row, range(self.shape[0]))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)


def flat(tree: dict, prefix: str = "") -> dict:
    """{"a.b": value} of nested dicts."""
    out = {}
    for name, value in tree.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def split(params: dict, patterns: Sequence[str]) -> tuple[dict, dict]:
    """Nested dict -> (trained, frozen); frozen are leaves whose path, as "vit/pos_embed", a pattern matches in full.

    ValueError: a pattern that matches no leaf, or patterns that leave nothing to train.
    """
    leaves = list(paths(params))
    idle = [p for p in patterns if not any(re.fullmatch(p, path) for path, _ in leaves)]
    if idle:
        tops = sorted({path.split("/")[0] for path, _ in leaves})
        raise ValueError(
            f"optim.freeze: {idle} match no parameter path; they must match in full (as 'vit/.*'); "
            f"the top-level names are {tops}"
        )
    frozen = {path for path, _ in leaves if any(re.fullmatch(p, path) for p in patterns)}
    if leaves and len(frozen) == len(leaves):
        raise ValueError(f"optim.freeze: {list(patterns)} freeze every parameter, nothing is left to train: drop some")
    return (
        nest([(path, x) for path, x in leaves if path not in frozen]),
        nest([(path, x) for path, x in leaves if path in frozen]),
    )


def merge(trained: dict, frozen: dict) -> dict:
    """The inverse of `split`. ValueError: a leaf that is in both."""
    first, second = list(paths(trained)), list(paths(frozen))
    both = sorted({p for p, _ in first} & {p for p, _ in second})
    if both:
        raise ValueError(f"trained and frozen parameters share {both[:5]}: every leaf belongs to one of them")
    return nest(sorted(first + second, key=lambda leaf: leaf[0]))


def paths(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(path, leaf) of a nested dict, paths joined by "/"."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def nest(leaves: Iterable[tuple[str, object]]) -> dict:
    """The inverse of `paths`."""
    tree: dict = {}
    for path, leaf in leaves:
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def path_name(path) -> str:
    import jax  # not above: what needs settings alone starts without it

    return jax.tree_util.keystr(path, simple=True, separator="/")
