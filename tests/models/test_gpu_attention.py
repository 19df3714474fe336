"""Attention by cuDNN, which no CPU has: what it is given, when, and what becomes of its result. A stand-in computes the
plain attention of what it is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models.layers import gpu
from blip_jax.models.layers.attention import attention
from blip_jax.models.text.med import PostNormAttention
from blip_jax.parallel import sharding


@pytest.fixture
def given(monkeypatch):
    """Shapes of the queries and keys that cuDNN's stand-in was given, once there is a GPU."""
    seen = []

    def stand_in(q, k, v, key_value_seq_lengths=None):
        seen.append((q.shape, k.shape))
        assert not q.shape[1] % 2 and not k.shape[1] % 2, "refused by jax 0.11.2 where there is a gradient"
        S = len(k[0]) if key_value_seq_lengths is None else key_value_seq_lengths[:, None, None, None]
        s = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
        p = jax.nn.softmax(jnp.where(jnp.arange(len(k[0])) < S, s, -jnp.inf).astype(jnp.float32))
        return jnp.einsum("bnts,bsnh->btnh", p.astype(v.dtype), v)

    monkeypatch.setattr(gpu, "cudnn", stand_in)
    monkeypatch.setattr(gpu, "available", lambda: True)
    return seen


def arrays(T, S, B=2, N=2, H=8, dtype=jnp.float32):
    rng = np.random.default_rng(T + S)
    shapes = (B, T, N, H), (B, S, N, H), (B, S, N, H), (B, T, N, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("T, S", [(5, 7), (4, 7), (3, 6)])
def test_odd_lengths_are_padded_and_neither_values_nor_gradients_know_it(T, S, given):
    *inputs, g = arrays(T, S)
    graded = lambda f: jax.jit(lambda g, *inputs: (lambda y, back: (y, back(g)))(*jax.vjp(f, *inputs)))(g, *inputs)
    # the second is the plain one for float32, which cuDNN does not take
    (ours, our_grads), (plain, plain_grads) = graded(gpu.attention), graded(attention)
    assert given == [((2, T + T % 2, 2, 8), (2, S + S % 2, 2, 8))]
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-6)
    for a, b in zip(our_grads, plain_grads):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def calls(given, q, k, v, **how):
    given.clear()
    jax.eval_shape(lambda q, k, v: attention(q, k, v, **how), q, k, v)
    return len(given)


def test_cudnn_takes_what_it_can_and_what_pays(given, monkeypatch):
    of = lambda T=197, S=197, N=12, H=64, dtype=jnp.bfloat16: [
        jax.ShapeDtypeStruct((2, n, N, H), dtype) for n in (T, S, S)
    ]
    assert calls(given, *of()) and calls(given, *of(577, 577, 16, dtype=jnp.float16)) and calls(given, *of(60, 577))
    assert not calls(given, *of(dtype=jnp.float32))
    assert not calls(given, *of(H=20)) and not calls(given, *of(H=136)) and calls(given, *of(H=88))
    assert not calls(given, *of(T=1)) and not calls(given, *of(S=30))
    assert not calls(given, *of(), mask=jnp.ones((1, 1, 1, 197), bool)) and not calls(given, *of(), drop=lambda p: p)
    monkeypatch.undo()
    assert not gpu.available() and not gpu.applies(*of()), "there is no GPU"


def test_text_attention_drops_probabilities_in_training_alone(given, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", {"queries": 4, "keys": 4})
    x = jnp.zeros((2, 6, 16), jnp.bfloat16)
    for dropout, deterministic, expected in ((0.1, True, 1), (0.1, False, 0), (0.0, False, 1)):
        layer = PostNormAttention(16, 2, 0.02, jnp.bfloat16, dropout=dropout)
        run = lambda x: layer.init_with_output(
            {"params": jax.random.key(0), "dropout": jax.random.key(1)},
            x,
            None,
            deterministic,
            method="self_attention",
        )
        given.clear()
        jax.eval_shape(run, x)
        assert len(given) == expected, (dropout, deterministic)


def test_each_device_computes_its_own_rows_and_heads(given, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", {"queries": 4, "keys": 4})
    mesh = sharding.mesh_of((2, 2, 2), jax.devices()[:8])
    q, k, v, _ = arrays(5, 7, B=8, N=4, dtype=jnp.bfloat16)
    plain = attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    with jax.set_mesh(mesh):
        out = jax.jit(attention)(q, k, v)
        rows, heads = (sharding.axis_size(mesh, sharding.AXES[name]) for name in ("act_batch", "act_heads"))
        assert given == [((8 // rows, 6, 4 // heads, 8), (8 // rows, 8, 4 // heads, 8))] and heads == 2
        np.testing.assert_allclose(out.astype(jnp.float32), plain, rtol=0, atol=0.02)
        assert not calls(given, q[:7], k[:7], v[:7]) and not calls(given, *(x[:, :, :3] for x in (q, k, v)))
