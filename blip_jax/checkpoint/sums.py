"""Checksums of arrays, of JSON and of files.

That of an array is the sum, modulo 2**32, of its elements' bits, each mixed with the place where it stands. Being a sum
it does not depend on how an array is cut into parts: devices of any mesh add up theirs, and nothing is gathered. The
mixing is one to one, so a change of a single element always shows, and any other in all but one of 2**32 cases.
"""

from __future__ import annotations

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from blip_jax.trees import path_name

PLACE, FIRST, SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35  # odd, so that multiplying loses nothing
BLOCK = 2**16  # elements that NumPy mixes at a time: they stay in a core's cache


def of_state(state) -> dict[str, str]:
    """{path: "dtype[dims] checksum"} of a tree of arrays on devices, computed there; random keys as their data."""
    leaves = {path_name(path): stored(x) for path, x in jax.tree.leaves_with_path(state)}
    totals = np.asarray(_totals(list(leaves.values()))) if leaves else ()
    return {path: f"{said(x)} {total:08x}" for (path, x), total in zip(leaves.items(), totals)}


def stored(x) -> jax.Array:
    """An array as a checkpoint keeps it: of a random key its uint32 data."""
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.asarray(x)


@jax.jit
def _totals(arrays: list) -> jax.Array:
    return jnp.stack([_total(x) for x in arrays])


def _total(x) -> jax.Array:
    """Of one array, u32[]."""
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    words = lax.bitcast_convert_type(x, f"uint{min(8 * x.dtype.itemsize, 32)}").astype(jnp.uint32)
    place, step = jnp.zeros(words.shape, jnp.uint32), 1
    for dim in reversed(range(words.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, words.shape, dim) * jnp.uint32(step % 2**32)
        step *= words.shape[dim]
    x = words ^ place * jnp.uint32(PLACE)
    x = (x ^ x >> 16) * jnp.uint32(FIRST)
    x = (x ^ x >> 13) * jnp.uint32(SECOND)
    return jnp.sum(x ^ x >> 16, dtype=jnp.uint32)


def of_array(x: np.ndarray) -> str:
    """The same of a NumPy array, of which no copy is made."""
    x = np.asarray(x, x.dtype.newbyteorder("="))
    bits = x.view(f"u{x.dtype.itemsize}")
    parts = max(x.dtype.itemsize // 4, 1)  # words of 32 bits that an element has
    places = np.arange(BLOCK * parts, dtype=np.uint32) * np.uint32(PLACE)
    mixed, moved = np.empty_like(places), np.empty_like(places)
    total = start = 0
    flags, within = ["external_loop", "buffered", "zerosize_ok"], [["readonly", "contig"]]
    for block in np.nditer(bits, flags, within, order="C", buffersize=BLOCK):
        words = block.view(np.uint32) if parts > 1 else block
        at, more = mixed[: len(words)], moved[: len(words)]
        np.add(places[: len(words)], np.uint32(start * PLACE % 2**32), out=at)
        at ^= words
        at ^= np.right_shift(at, 16, out=more)
        at *= np.uint32(FIRST)
        at ^= np.right_shift(at, 13, out=more)
        at *= np.uint32(SECOND)
        at ^= np.right_shift(at, 16, out=more)
        total += int(at.sum(dtype=np.uint64))
        start += len(words)
    return f"{said(x)} {total % 2**32:08x}"


def said(x) -> str:
    """Dtype and dims of whatever has both, as float32[2,3]."""
    return f"{np.dtype(x.dtype)}[{','.join(map(str, x.shape))}]"


def of_json(x) -> str:
    """Of what JSON keeps of `x`, however it is written."""
    return of_bytes(json.dumps(json.loads(json.dumps(x)), sort_keys=True).encode())


def of_bytes(data: bytes) -> str:
    """crc32."""
    return f"{zlib.crc32(data):08x}"
