"""GELU, LayerNorm, RMSNorm and softmax whose gradients keep little: what jax's own derivatives store is several times
larger; and dropout.

All compute in float32 and return the dtype of their input (or the one asked for). In units of the input's size the
backward pass keeps: GELU 1 (jax: 4), LayerNorm 1 and two numbers a row (jax: 4), RMSNorm 1 and one, softmax its result,
which the product behind it keeps anyway (jax: 1 more).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from blip_jax.models.layers import gpu

KEPT = "kept"


def kept(x):
    """x, marked as what a stack of layers keeps for its gradient (see `models.layers.stack`)."""
    return checkpoint_name(x, KEPT)


@jax.custom_vjp
def gelu(x):
    """x * Phi(x), Phi by erf as torch does (jax.nn.gelu takes erfc, which costs a CPU three times as much)."""
    return (_f32(x) * _phi(_f32(x))).astype(x.dtype)


def _phi(x):
    return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _gelu_back(x, dy):
    x32 = _f32(x)
    density = jnp.exp(-0.5 * x32 * x32) * (2 * math.pi) ** -0.5
    return ((_f32(dy) * (_phi(x32) + x32 * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_back)


@jax.custom_vjp
def quick_gelu(x):
    """x * sigmoid(1.702 x), CLIP's activation."""
    return (_f32(x) * jax.nn.sigmoid(1.702 * _f32(x))).astype(x.dtype)


def _quick_gelu_back(x, dy):
    x32 = _f32(x)
    gate = jax.nn.sigmoid(1.702 * x32)
    return ((_f32(dy) * gate * (1.0 + 1.702 * x32 * (1.0 - gate))).astype(x.dtype),)


quick_gelu.defvjp(lambda x: (quick_gelu(x), x), _quick_gelu_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(s, dtype):
    """Softmax over the last axis of f32 s, in `dtype`; the gradient takes the probabilities as rounded to it."""
    return jax.nn.softmax(s, axis=-1).astype(dtype)


def _softmax_forward(s, dtype):
    p = kept(softmax(s, dtype))
    return p, p


def _softmax_back(dtype, p, dp):
    p, dp = _f32(p), _f32(dp)
    return (p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_back)


class Dropout(nn.Module):
    """Zeros for a share `rate` of the numbers, the others divided by 1 - rate."""

    rate: float

    @nn.compact
    def __call__(self, x, deterministic: bool):
        """[...] -> [...]; not deterministic, it needs rngs={"dropout": key}"""
        if deterministic or not self.rate:
            return x
        mask = kept(jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape))
        return jnp.where(mask, x / (1.0 - self.rate), jnp.zeros_like(x))

    def active(self, deterministic: bool) -> Callable | None:
        """x -> x with zeros, or None where nothing would be dropped."""
        return functools.partial(self, deterministic=False) if self.rate and not deterministic else None


class LayerNorm(nn.Module):
    """Over the last axis, biased variance as mean((x - mean)^2), as torch's. Parameters scale and bias, f32[D];
    the result is in `dtype`."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """[...,D] -> [...,D]"""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return gpu.by_rows(lambda x: _layer_norm(x, scale, bias, self.epsilon, self.dtype), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x, scale, bias, eps, dtype):
    return _layer_norm_forward(x, scale, bias, eps, dtype)[0]


def _layer_norm_forward(x, scale, bias, eps, dtype):
    x32 = _f32(x)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True) + eps)
    y = (x32 - mean) * (rstd * scale) + bias
    return y.astype(dtype), (x, mean, rstd, scale)


def _layer_norm_back(eps, dtype, kept, dy):
    x, mean, rstd, scale = kept
    dy, normed = _f32(dy), (_f32(x) - mean) * rstd
    rows, g = tuple(range(dy.ndim - 1)), dy * scale
    average = lambda y: jnp.mean(y, axis=-1, keepdims=True)
    dx = rstd * (g - average(g) - normed * average(g * normed))
    return (
        dx.astype(x.dtype),
        jnp.sum(dy * normed, axis=rows).astype(scale.dtype),
        jnp.sum(dy, axis=rows).astype(scale.dtype),
    )


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_back)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, as T5's. Parameter scale, f32[D]; the result is in
    `dtype`."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """[...,D] -> [...,D]"""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return gpu.by_rows(lambda x: _rms_norm(x, scale, self.epsilon, self.dtype), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rms_norm(x, scale, eps, dtype):
    return _rms_norm_forward(x, scale, eps, dtype)[0]


def _rms_norm_forward(x, scale, eps, dtype):
    x32 = _f32(x)
    rrms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * rrms * scale).astype(dtype), (x, rrms, scale)


def _rms_norm_back(eps, dtype, kept, dy):
    x, rrms, scale = kept
    dy, normed = _f32(dy), _f32(x) * rrms
    g = dy * scale
    dx = rrms * (g - normed * jnp.mean(g * normed, axis=-1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(dy * normed, axis=tuple(range(dy.ndim - 1))).astype(scale.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_back)


def _f32(x):
    return x.astype(jnp.float32)
