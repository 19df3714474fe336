"""Vision transformer of BLIP (paper section 3.1; timm's ViT with pre-LN, eps 1e-6, no pooling), and what the towers of
BLIP-2 share with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.models.layers import gpu, stack
from blip_jax.models.layers.attention import HeadedAttention, Mlp, attention
from blip_jax.models.layers.dense import DenseGeneral
from blip_jax.models.layers.norm import LayerNorm, gelu
from blip_jax.parallel.sharding import constrain

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, RGB in [0, 1]
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def normalize_pixels(img):
    """u8[...,img_h,img_w,3] RGB -> f32 of the same shape, CLIP mean and standard deviation."""
    return (img.astype(jnp.float32) / 255.0 - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)


def each_frame(vit: Callable, img, deterministic: bool):
    """Tokens [B,P,D] of pictures f32[B,S,S,3]; of videos f32[B,R,S,S,3] those of all frames, one frame behind the
    other, [B,R*P,D] (BLIP paper, section 5.6)."""
    tok = vit(img.reshape(-1, *img.shape[-3:]), deterministic=deterministic)
    return tok.reshape(len(img), -1, tok.shape[-1])


def resize_pos_embed(table, positions: int, align_corners: bool = False):
    """Position table [1+n*n, D] -> f32[positions, D], bicubic as torch's `interpolate` (a = -0.75, edge clamp, no
    antialias).

    align_corners: whether the centres of the corner patches stay in place (CLIP's rule), else their outer edges.
    The class position is kept; grids are square (reference: interpolate_pos_embed of BLIP and of LAVIS). ValueError if
    either is not.
    """
    table = np.asarray(table, np.float32)
    n, m = int((len(table) - 1) ** 0.5), int((positions - 1) ** 0.5)
    if n * n + 1 != len(table) or m * m + 1 != positions:
        raise ValueError(f"position table of {len(table)} rows to {positions}: both must be 1 + a square")
    if n == m:
        return table
    w = _cubic_matrix(n, m, align_corners)
    grid = np.einsum("yi,xj,ijD->yxD", w, w, table[1:].reshape(n, n, -1).astype(np.float64))
    return np.concatenate([table[:1], grid.reshape(m * m, -1).astype(np.float32)])


def _cubic_matrix(n: int, m: int, align_corners: bool) -> np.ndarray:
    """f64[m,n]: row o holds the weights of the n inputs for output o, out-of-range taps clamped to the edge."""
    w = np.zeros((m, n))
    a = -0.75
    for o in range(m):
        source = o * (n - 1) / max(m - 1, 1) if align_corners else (o + 0.5) * n / m - 0.5
        first = int(np.floor(source))
        for tap in range(-1, 3):
            x = abs(source - first - tap)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            w[o, min(max(first + tap, 0), n - 1)] += near if x <= 1 else far if x < 2 else 0.0
    return w


def torch_uniform(fan_in: int):
    """torch's default initialiser of linear and convolution layers: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Traits(NamedTuple):
    """What all towers of a kind have in common, besides their sizes."""

    eps: float = 1e-6  # of every LayerNorm
    activation: Callable = gelu
    key_bias: bool = True
    patch_bias: bool = True
    ln_pre: bool = False  # a LayerNorm before the blocks
    ln_post: bool = True  # and one behind them
    align_corners: bool = False  # how its position table is resized


class Block(nn.Module):
    """Pre-LN block with stochastic depth: x += DP(attn(ln1(x))); x += DP(mlp(ln2(x)))."""

    width: int
    heads: int
    mlp: int
    init_std: float
    drops: bool  # whether stochastic depth is active
    dtype: Any
    traits: Traits = Traits()
    kept: bool = False  # whether the tokens are a result of their own, which a scan stacks

    @nn.compact
    def __call__(self, x, rate):
        eps = self.traits.eps
        attn = HeadedAttention(self.width, self.heads, self.init_std, self.dtype, self.traits.key_bias, name="attn")
        h = LayerNorm(eps, self.dtype, name="ln1")(x)
        x = x + self._drop_path(attn.project_out(attention(attn.project_q(h), *attn.project_kv(h))), rate)
        h = LayerNorm(eps, self.dtype, name="ln2")(x)
        mlp = Mlp(self.mlp, self.init_std, self.dtype, self.traits.activation, name="mlp")
        x = x + self._drop_path(mlp(h), rate)
        return x, x if self.kept else None

    def _drop_path(self, y, rate):
        """Drops the whole branch of an example with probability `rate`, else scales it by 1 / (1 - rate)."""
        if not self.drops:
            return y
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - rate, (y.shape[0], 1, 1))
        return jnp.where(keep, y / (1.0 - rate).astype(y.dtype), 0)


class Vit(nn.Module):
    """Pixels to tokens. Parameters: cls, pos_embed, patch_embed, blocks (stacked over depth), and by its traits ln_pre
    and ln_post."""

    traits = Traits()  # of the kind: no field

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    img_size: int
    pos_std: float = 0.02
    init_std: float = 0.02  # timm's normal is cut at +-2, 100 deviations away
    drop_path: float = 0.0
    remat: str = "none"
    dtype: Any = jnp.float32

    def __call__(self, img, *, deterministic: bool = True):
        """Normalised pixels f32[B,S,S,3], S = img_size -> img_tok [B,P,D] in `dtype`, P = 1 + (S/patch)^2, [CLS] first.

        With deterministic=False and drop_path > 0 it needs rngs={"dropout": key}. ValueError for another image size.
        """
        return self._run(img, deterministic, kept=False)[0]

    def after_blocks(self, img):
        """Normalised pixels f32[B,S,S,3] -> [L,B,P,D], the tokens that each block gives, no block dropped."""
        return self._run(img, deterministic=True, kept=True)[1]

    @nn.compact
    def _run(self, img, deterministic: bool, kept: bool):
        traits = self.traits
        x = constrain(self._embed(img), "act_batch", None, "act_embed")
        if traits.ln_pre:
            x = LayerNorm(traits.eps, self.dtype, name="ln_pre")(x)

        # without one a loop keeps all that its gradient's parts ask for, as GELU's result beside its input, and the
        # compiler for GPUs leaves it at that
        policy = (stack.KEEP if gpu.traced_for() else None) if self.remat == "none" else REMAT[self.remat]
        block = Block if policy is None else nn.remat(Block, policy=policy, prevent_cse=False)
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=self.depth
        )
        drops = not deterministic and self.drop_path > 0
        rates = jnp.linspace(0.0, self.drop_path, self.depth)
        sizes = self.width, self.heads, self.mlp, self.init_std
        x, each = blocks(*sizes, drops, self.dtype, traits, kept, name="blocks")(x, rates)
        return LayerNorm(traits.eps, self.dtype, name="ln_post")(x) if traits.ln_post else x, each

    def _embed(self, img):
        """Pixels -> [B,P,D], [CLS] and patches with their positions."""
        B, n, p = img.shape[0], self.img_size // self.patch, self.patch
        if img.shape[1:] != (self.img_size, self.img_size, 3):
            raise ValueError(
                f"images of {img.shape[1:]} given to a {type(self).__name__} built for ({self.img_size}, "
                f"{self.img_size}, 3): set model.img_size and resize the position table with resize_pos_embed"
            )
        patches = img.reshape(B, n, p, n, p, 3)
        embed = DenseGeneral(
            self.width,
            axis=(2, 4, 5),
            embed=1,
            use_bias=self.traits.patch_bias,
            dtype=self.dtype,
            kernel_init=torch_uniform(p * p * 3),
            bias_init=torch_uniform(p * p * 3),
            name="patch_embed",
        )
        x = embed(patches).reshape(B, n * n, self.width)
        cls = self.param("cls", nn.initializers.normal(self.init_std), (self.width,)).astype(self.dtype)
        pos = self.param("pos_embed", nn.initializers.normal(self.pos_std), (1 + n * n, self.width)).astype(self.dtype)
        return jnp.concatenate([jnp.broadcast_to(cls, (B, 1, self.width)), x], axis=1) + pos
