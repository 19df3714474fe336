"""Checksums of arrays, of JSON and of files.

That of an array is the sum, modulo 2**32, of its elements' bits, each mixed with the place where it stands. Being a sum
it does not depend on how an array is cut into parts: each process adds up what its devices hold, whatever the mesh, and
nothing but sums is exchanged. The mixing is one to one, so a change of a single element always shows, and any other in
all but one of 2**32 cases. All on the host: a program that did it on the devices takes longer to compile than to save.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.parallel import processes
from blip_jax.trees import path_name

PLACE, FIRST, SECOND = (np.uint32(x) for x in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35))  # odd: multiplying loses nothing
BLOCK = 2**16  # words that are mixed at a time: they stay in a core's cache
ROW = 2**8  # words from which a row is long enough for NumPy
DESCRIBING = ("_METADATA", "_sharding", "array_metadatas/*")  # files of a state that are JSON
THREADS = min(os.cpu_count() or 1, 16)  # that compute checksums


def of_state(state) -> dict[str, str]:
    """{path: "dtype[dims] checksum"} of a tree of arrays on devices; of random keys, as their data.

    Of copies one counts. All processes call it together.
    """
    leaves = {path_name(path): stored(x) for path, x in jax.tree.leaves_with_path(state)}
    parts = [(path, shard) for path, x in leaves.items() for shard in x.addressable_shards if shard.replica_id == 0]

    def part(path: str, shard) -> int:
        shape = leaves[path].shape
        return _total(np.asarray(shard.data), shape, [s.indices(n)[0] for s, n in zip(shard.index, shape)])

    own = dict.fromkeys(leaves, 0)
    with ThreadPoolExecutor(THREADS) as pool:
        for (path, _), total in zip(parts, pool.map(part, *zip(*parts))) if parts else ():
            own[path] += total
    totals = [sum(found) for found in zip(*processes.gather(list(own.values())))]
    return {path: f"{said(x)} {total % 2**32:08x}" for (path, x), total in zip(leaves.items(), totals)}


def stored(x) -> jax.Array:
    """An array as a checkpoint keeps it: of a random key its uint32 data."""
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.asarray(x)


def of_array(x: np.ndarray) -> str:
    """The same of a NumPy array."""
    x = np.asarray(x, x.dtype.newbyteorder("="))
    return f"{said(x)} {_total(x, x.shape, [0] * x.ndim):08x}"


def _total(x: np.ndarray, shape: Sequence[int], at: Sequence[int]) -> int:
    """Sum of the part `x` of an array of dims `shape`, in which the first element of `x` stands at `at`."""
    x = np.ascontiguousarray(x)
    width = x.dtype.itemsize // 4 or 1  # words of 32 bits that an element has
    bits = x.view(f"u{min(x.dtype.itemsize, 4)}")  # of 0 dims it becomes 1
    shape, at = (*shape[:-1], (shape or [1])[-1] * width), (*at[:-1], (at or [0])[-1] * width)
    inner = next((d for d in range(len(shape) - 1, -1, -1) if math.prod(bits.shape[d:]) >= ROW), 0)
    rows, columns = (_places(bits.shape[part], at[part], shape, part) for part in (slice(inner), slice(inner, None)))
    bits = bits.reshape(len(rows), len(columns))
    height, total = max(BLOCK // max(len(columns), 1), 1), 0
    mixed, moved = (np.empty((height, min(len(columns), BLOCK)), np.uint32) for _ in range(2))
    for row in range(0, len(rows), height):
        for column in range(0, len(columns), BLOCK):
            words = bits[row : row + height, column : column + BLOCK]
            y, z = (scratch[: words.shape[0], : words.shape[1]] for scratch in (mixed, moved))
            np.add(rows[row : row + height, None], columns[column : column + BLOCK], out=y)
            y ^= words
            y ^= np.right_shift(y, 16, out=z)
            y *= FIRST
            y ^= np.right_shift(y, 13, out=z)
            y *= SECOND
            y ^= np.right_shift(y, 16, out=z)
            total += int(y.sum(dtype=np.uint64))
    return total % 2**32


def _places(sizes: Sequence[int], at: Sequence[int], shape: Sequence[int], part: slice) -> np.ndarray:
    """What some of the dims of an array of dims `shape` add to the place of each element of a part of it, u32."""
    out = np.zeros(1, np.uint32)
    for d, n, first in zip(range(len(shape))[part], sizes, at):
        step = (first + np.arange(n, dtype=np.uint64)) * np.uint64(math.prod(shape[d + 1 :]) % 2**32)
        out = (out[:, None] + step.astype(np.uint32)).reshape(-1)
    return out * PLACE


def said(x) -> str:
    """Dtype and dims of whatever has both, as float32[2,3]."""
    return f"{np.dtype(x.dtype)}[{','.join(map(str, x.shape))}]"


def of_json(x) -> str:
    """Of what JSON keeps of `x`, however it is written."""
    return of_bytes(json.dumps(json.loads(json.dumps(x)), sort_keys=True).encode())


def of_files(state: pathlib.Path) -> dict[str, str]:
    """{path in the state: crc32} of the files in which orbax describes the arrays."""
    found = sorted(path for pattern in DESCRIBING for path in state.glob(pattern))
    return {str(path.relative_to(state)): of_bytes(path.read_bytes()) for path in found}


def of_bytes(data: bytes) -> str:
    """crc32."""
    return f"{zlib.crc32(data):08x}"
