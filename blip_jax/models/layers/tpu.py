"""What TPUs have otherwise. Attention by jax's splash kernel: scores and probabilities [B,N,T,S] are never written to
memory. Compiled for TPUs and run in Pallas' interpreter; it has never run on a TPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from blip_jax.models.layers.cpu import platform

NAME = "jax's splash kernel"
LEAST = 320  # queries and keys; of fewer, what is padded and copied for the kernel is about as much as scores are
LANES = 128  # a kernel's lengths are multiples of it
BLOCK = 1024, 512  # most keys that lie in a core's fast memory as one piece; of longer sequences the pieces
SCORES = 2**19  # of one piece of queries and one of keys, which are in fast memory several times over


def applies(q, k, v) -> bool:
    """Whether `attention` takes these, q [B,T,N,H] and k, v [B,S,N,H], and is worth it: a program for TPUs, bfloat16,
    long sequences."""
    alike = q.dtype == k.dtype == v.dtype
    return alike and pays(q.shape[1], k.shape[1], q.dtype) and platform() == "tpu" and not _left_to_the_compiler()


def _left_to_the_compiler() -> bool:
    """Whether this is within a `jax.shard_map` of some of the mesh's axes: over the others the compiler splits arrays,
    which it cannot do with such a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.manual_axes) and any(n > 1 and a not in mesh.manual_axes for a, n in mesh.shape.items())


def pays(T: int, S: int, dtype) -> bool:
    """Whether a program for TPUs takes the kernel for T queries and S keys of a dtype."""
    return min(T, S) >= LEAST and jnp.dtype(dtype) == jnp.bfloat16


def flops(T: int, S: int, D: int) -> tuple[float, float]:
    """FLOPs of the kernel, forward and backward, for an example whose heads are D wide together: of the lengths as
    padded two products and five, the plain ones' four and the scores once more."""
    product = 2.0 * padded(T) * padded(S) * D
    return 2 * product, 5 * product


def attention(q, k, v):
    """Scaled dot-product attention, all keys seen, of one device: q [B,T,N,H]; k, v [B,S,N,H] -> [B,T,N,H]."""
    (_, T, _, H), S = q.shape, k.shape[1]
    run = kernel(padded(T), padded(S))
    y = jax.vmap(run, in_axes=(0, 0, 0, None))(_rows(q * H**-0.5), _rows(k), _rows(v), _segments(T, S))
    return y[:, :, :T].swapaxes(1, 2)


def padded(n: int) -> int:
    """The length that a kernel gets of a sequence of n: whole blocks."""
    step = LANES if n <= BLOCK[0] else BLOCK[1]
    return -(-n // step) * step


def kernel(T: int, S: int, interpret: bool = False):
    """jax's kernel for [N,T,H] and [N,S,H] of one example, scores unscaled, and ids of the positions.

    Its backward pass is one kernel, which computes scores once and not twice. Keys lie whole in fast memory where they
    fit, so that each operand is read once. Head widths of less than 128 numbers are padded in memory unless the
    positions are the last dimension: q, k and v are given so.
    """
    # here: it takes as long to import as the rest of the layers
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    keys = _block(S, BLOCK[0])
    queries = _block(T, SCORES // keys)
    sizes = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        use_fused_bwd_kernel=True,
        q_layout=splash.QKVLayout.SEQ_MINOR,
        k_layout=splash.QKVLayout.SEQ_MINOR,
        v_layout=splash.QKVLayout.SEQ_MINOR,
    )
    every = masks.MultiHeadMask([masks.FullMask((T, S))])  # one for all heads
    return splash.make_splash_mha(every, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def _block(n: int, most: int) -> int:
    """The largest multiple of LANES that divides n and is at most `most`."""
    return max(size for size in range(LANES, min(n, most) + 1, LANES) if n % size == 0)


def _rows(x):
    """[B,T,N,H] -> [B,N,T',H], T' as `padded`, zeros behind."""
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded(x.shape[1]) - x.shape[1]), (0, 0)))


def _segments(T: int, S: int):
    """Ids for the kernel: a query sees the keys that have its id, so a key that was added is not looked at; what a
    query that was added gives is cut off. None where no key was added."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    if padded(S) == S:
        return None
    return splash.SegmentIds(jnp.zeros(padded(T), jnp.int32), (jnp.arange(padded(S)) >= S).astype(jnp.int32))
