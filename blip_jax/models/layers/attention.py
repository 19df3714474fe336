"""Attention on plain arrays and the projections around it. Masks are bool, True = keep."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip_jax.models.layers import gpu, tpu
from blip_jax.models.layers.cpu import einsum, summed
from blip_jax.models.layers.dense import Dense, DenseGeneral
from blip_jax.models.layers.norm import gelu, kept, softmax
from blip_jax.parallel.collectives import within_cells
from blip_jax.parallel.sharding import AXES, axis_size, constrain, partition_spec


def attention(q, k, v, mask=None, drop: Callable | None = None, *, scale: float | None = None, bias=None):
    """Dot-product attention, softmax in float32.

    Args:
      q: [B,T,N,H]; k, v: [B,S,N,H].
      mask: bool, broadcastable to [B,N,T,S], True = attend; None = all.
      drop: applied to the probabilities [B,N,T,S]; None = nothing.
      scale: of the products; None = H ** -0.5.
      bias: f32, broadcastable to [B,N,T,S], added to the products; None = nothing.
    Returns: [B,T,N,H] in the dtype of v. A row whose mask is all False attends uniformly.

    Without mask, drop, scale and bias long sequences are cuDNN's on NVIDIA's GPUs, and on TPUs jax's splash kernel's:
    the same to rounding.
    """
    if mask is None and drop is None and bias is None and scale is None and (kernel := _kernel(q, k, v)):
        return kept(_on_each_device(kernel.attention, q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = einsum("B T N H, B S N H -> B N T S", q if scale == 1.0 else q * scale, k, summed)
    if bias is not None:
        s = s + bias
    if mask is not None:
        s = jnp.where(mask, s, jnp.finfo(jnp.float32).min)
    p = softmax(s, v.dtype)
    p = p if drop is None else drop(p)
    return kept(einsum("B N T S, B S N H -> B T N H", p, v))


def implementation(q, k, v) -> str:
    """What `attention` of these arrays, or of their shapes and dtypes, is computed by where nothing is said beside."""
    kernel = _kernel(q, k, v)
    return f"by {kernel.NAME}, which writes no scores" if kernel else "plain"


def _kernel(q, k, v) -> ModuleType | None:
    """The module with attention that writes no scores to memory for these arrays, if any: where whole rows and heads
    lie on each device of the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = (q.shape[0], "act_batch"), (q.shape[2], "act_heads")
    if _split(mesh) and any(size % axis_size(mesh, AXES[dim]) for size, dim in sizes):
        return None
    return next((module for module in (gpu, tpu) if module.applies(q, k, v)), None)


def _on_each_device(attend: Callable, q, k, v):
    """attend(q, k, v), on a mesh of each device's own rows and heads."""
    if not _split(jax.sharding.get_abstract_mesh()):
        return attend(q, k, v)
    spec = partition_spec(("act_batch", None, "act_heads", None))
    return jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def _split(mesh) -> bool:
    """Whether arrays are split over devices here: not without a mesh, on one device, or inside `jax.shard_map`."""
    return not mesh.empty and mesh.size > 1 and not mesh.manual_axes


def prefixed_attention(q, prefix, k, v, mask=None, drop: Callable | None = None):
    """`attention` to keys that n rows of q share, and behind them to each row's own; the shared are never repeated.

    Args:
      q: [B*n,T,N,H], row b*n + i; prefix: (k, v), each [B,Q,N,H], all of them attended to; k, v: [B*n,S,N,H].
      mask: of the own keys, bool, broadcastable to [B*n,N,T,S]; None = all.
      drop: applied to the probabilities [B*n,N,T,Q+S]; None = nothing.
    Returns: [B*n,T,N,H] in the dtype of v.
    """
    (R, T, N, H), (B, Q) = q.shape, prefix[0].shape[:2]
    n = R // B
    q = q * H**-0.5
    shared = einsum("B T N H, B S N H -> B N T S", q.reshape(B, n * T, N, H), prefix[0], summed)
    shared = shared.reshape(B, N, n, T, Q).swapaxes(1, 2).reshape(R, N, T, Q)
    own = einsum("B T N H, B S N H -> B N T S", q, k, summed)
    if mask is not None:
        own = jnp.where(mask, own, jnp.finfo(jnp.float32).min)
    p = softmax(jnp.concatenate([shared, own], axis=-1), v.dtype)
    p = p if drop is None else drop(p)
    shared = p[..., :Q].reshape(B, n, N, T, Q).swapaxes(1, 2).reshape(B, N, n * T, Q)
    y = einsum("B N T S, B S N H -> B T N H", shared, prefix[1], summed).reshape(R, T, N, H)
    return kept((y + einsum("B N T S, B S N H -> B T N H", p[..., Q:], v, summed)).astype(v.dtype))


def grouped_cross_attention(
    q, k, v, img_idx: tuple, drop: Callable | None = None, kv_mask=None, *, scale: float | None = None
):
    """Attention of G texts per image to that image's keys and values, which are never repeated per text.

    Args:
      q: [B*G,T,N,H], row b*G + g (so that rows stay with their image when B is split over devices); k, v: [B,P,N,H].
      img_idx: one entry per text: None (text g of image b looks at image b), or i32[C,c] with C*c = B (it looks at an
        image of the same cell of c images: text g of image j of cell C looks at the cell's image img_idx[g][C,j]).
          Cells keep a gather on the devices
        that hold them: one cell of all images means that keys and values travel between all devices.
      kv_mask: bool[B,P], True = a key that is attended to; None = all.
      scale: as in `attention`.
    Returns: [B*G,T,N,H]. Groups that look at their own image are folded into one longer query of that image.
    """
    G, (B, _, N, H), T = len(img_idx), k.shape, q.shape[1]
    q = q.reshape(B, G, T, N, H)
    own = [g for g in range(G) if img_idx[g] is None]
    outs: list[Any] = [None] * G
    mask = None if kv_mask is None else kv_mask[:, None, None]
    if own:
        folded = jnp.concatenate([q[:, g] for g in own], axis=1)  # B, len(own)*T, N, H
        for g, o in zip(own, jnp.split(attention(folded, k, v, mask, drop, scale=scale), len(own), axis=1)):
            outs[g] = o
    for g in range(G):
        if img_idx[g] is not None:
            of = lambda x: within_cells(x, img_idx[g], None, "act_heads", None)
            with jax.named_scope("keys"):  # told apart in a compiler's list of collectives
                keys = kept(of(k))
            with jax.named_scope("values"):
                values = kept(of(v))
            seen = None if mask is None else within_cells(mask, img_idx[g])
            outs[g] = attention(q[:, g], keys, values, seen, drop, scale=scale)
    return jnp.stack(outs, axis=1).reshape(B * G, T, N, H)


class HeadedAttention(nn.Module):
    """Projections q, k, v (kernels [D,N,H]) and out ([N,H,D]) around an attention function; the attention itself is a
    function that the caller puts between `project_q`, `project_kv` and `project_out`."""

    width: int
    heads: int
    init_std: float
    dtype: Any
    key_bias: bool = True

    def setup(self):
        init, head_dim = nn.initializers.normal(self.init_std), self.width // self.heads
        headed = lambda bias=True: DenseGeneral(
            (self.heads, head_dim), use_bias=bias, dtype=self.dtype, kernel_init=init
        )
        self.q, self.k, self.v = headed(), headed(self.key_bias), headed()
        self.out = DenseGeneral(self.width, axis=(-2, -1), embed=1, dtype=self.dtype, kernel_init=init)

    def project_q(self, x):
        """[B,T,D] -> [B,T,N,H]"""
        return constrain(self.q(x), "act_batch", None, "act_heads", None)

    def project_kv(self, x):
        """[B,S,D'] -> (k, v), each [B,S,N,H]"""
        pin = lambda y: constrain(y, "act_batch", None, "act_heads", None)
        return pin(self.k(x)), pin(self.v(x))

    def project_out(self, x):
        """[B,T,N,H] -> [B,T,D]"""
        return constrain(self.out(x), "act_batch", None, "act_embed")


class Mlp(nn.Module):
    """fc1, activation (exact-erf GELU), fc2: [B,T,D] -> [B,T,D], hidden width F."""

    hidden: int
    init_std: float
    dtype: Any
    activation: Callable = gelu

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(self.init_std)
        h = Dense(self.hidden, dtype=self.dtype, kernel_init=init, name="fc1")(x)
        h = self.activation(constrain(h, "act_batch", None, "act_mlp"))
        return constrain(
            Dense(x.shape[-1], embed=1, dtype=self.dtype, kernel_init=init, name="fc2")(h),
            "act_batch",
            None,
            "act_embed",
        )
