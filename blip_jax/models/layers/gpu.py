"""What GPUs have otherwise. Attention by cuDNN on NVIDIA's: scores and probabilities [B,N,T,S] are never written to
memory; and norms as their compiler is quick with."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from blip_jax.models.layers.cpu import platform

NAME = "cuDNN"
LEAST = {"queries": 48, "keys": 128}  # of shorter ones the scores are small, and a kernel's tile is mostly empty
cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def applies(q, k, v) -> bool:
    """Whether `attention` takes these, q [B,T,N,H] and k, v [B,S,N,H], and is worth it: in bfloat16 or float16, heads
    as cuDNN has them, sequences long enough."""
    (_, T, _, H), S = q.shape, k.shape[1]
    return (
        q.dtype == k.dtype == v.dtype
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and H % 8 == 0
        and H <= 128
        and T >= LEAST["queries"]
        and S >= LEAST["keys"]
        and available()
    )


def available() -> bool:
    """Whether the program is traced for GPUs, and those of this process are NVIDIA's with such kernels (Ampere and
    later). For devices that are only described, as to a compiler, nothing can be said: False."""
    return traced_for() and _nvidia()


def traced_for() -> bool:
    """Whether the program is traced for GPUs."""
    return platform() in ("gpu", "cuda")


def by_rows(norm: Callable, x):
    """norm(x) of a function over the last axis; for GPUs [...,D] as a matrix [R,D] and back.

    XLA tries tilings of every dimension in the kernel of a norm and what is around it: in [B,T,D] many times those of
    [R,D], a third of the time that a transformer's layer takes to compile, for the same kernels.
    """
    if x.ndim < 3 or not traced_for():
        return norm(x)
    return norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)


@functools.cache
def _nvidia() -> bool:
    device = jax.local_devices()[0]
    cuda = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    return cuda and float(device.compute_capability) >= 8


def attention(q, k, v):
    """Scaled dot-product attention, all keys seen, of one device: q [B,T,N,H]; k, v [B,S,N,H] -> [B,T,N,H].

    Odd lengths, as 197 and 577, get a position of zeros: jax takes no odd ones where there is a gradient. A key that
    was added is not looked at; what a query that was added gives is cut off.
    """
    B, T, S = len(q), q.shape[1], k.shape[1]
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) if x.shape[1] % 2 else x
    lengths = {"key_value_seq_lengths": jnp.full(B, S, jnp.int32)} if S % 2 else {}
    return cudnn(even(q), even(k), even(v), **lengths)[:, :T]
