"""Attention by jax's splash kernel, which is for TPUs: in Pallas' interpreter it gives what the plain one gives, values
and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models.layers import tpu
from blip_jax.models.layers.attention import attention, implementation
from blip_jax.parallel import sharding


@pytest.fixture
def given(monkeypatch):
    """Lengths of queries and keys that the kernel was made for, once programs are for TPUs; of small blocks."""
    seen, made = [], tpu.kernel

    def interpreted(T, S):
        seen.append((T, S))
        return made(T, S, interpret=True)

    monkeypatch.setattr(tpu, "kernel", interpreted)
    monkeypatch.setattr(tpu, "platform", lambda: "tpu")
    monkeypatch.setattr(tpu, "BLOCK", (256, 128))
    return seen


def arrays(T, S, B=1, N=2, H=8, dtype=jnp.float32):
    rng = np.random.default_rng(T + S)
    shapes = (B, T, N, H), (B, S, N, H), (B, S, N, H), (B, T, N, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def graded(f, g, *inputs):
    y, back = jax.vjp(f, *inputs)
    return y, *back(g)


@pytest.mark.parametrize("T, S", [(100, 130), (256, 256), (150, 300)])
def test_values_and_gradients_are_the_plain_ones(T, S, given):
    """One block of padded lengths; of lengths that are whole; several blocks of keys, whose parts of a gradient are
    added up."""
    *inputs, g = arrays(T, S)
    ours = graded(tpu.attention, g, *inputs)
    plain = graded(attention, g, *inputs)  # in float32, which the kernel does not take
    assert given == [{100: (128, 256), 256: (256, 256), 150: (256, 384)}[T]]
    for a, b in zip(ours, plain):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_one_is(given, monkeypatch):
    *inputs, g = arrays(150, 200, H=16, dtype=jnp.bfloat16)
    exact = graded(attention, *(x.astype(jnp.float32) for x in (g, *inputs)))
    plain = graded(lambda *x: attention(*x), g, *inputs)  # too short for the kernel
    assert not given
    monkeypatch.setattr(tpu, "LEAST", 128)
    ours = graded(lambda *x: attention(*x), g, *inputs)
    assert given
    far = lambda x, y: float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y))
    for a, b, c in zip(ours, plain, exact):
        assert a.dtype == jnp.bfloat16 and far(a, c) <= 1.25 * far(b, c) < 0.004


def calls(given, q, k, v, **how):
    given.clear()
    jax.eval_shape(lambda q, k, v: attention(q, k, v, **how), q, k, v)
    return len(given)


def test_the_kernel_takes_what_it_can_and_what_pays(given, monkeypatch):
    of = lambda T=577, S=577, N=12, H=64, dtype=jnp.bfloat16: [
        jax.ShapeDtypeStruct((2, n, N, H), dtype) for n in (T, S, S)
    ]
    assert calls(given, *of()) and calls(given, *of(901, 901)) and calls(given, *of(H=88)) and calls(given, *of(1601))
    assert not calls(given, *of(dtype=jnp.float32)) and not calls(given, *of(197, 197)) and not calls(given, *of(60))
    assert not calls(given, *of(), mask=jnp.ones((1, 1, 1, 577), bool)) and not calls(given, *of(), drop=lambda p: p)
    assert implementation(*of()) == "by jax's splash kernel, which writes no scores"
    monkeypatch.undo()
    assert not tpu.applies(*of()) and implementation(*of()) == "plain", "this is no TPU"


def test_each_device_computes_its_own_rows_and_heads(given, monkeypatch):
    monkeypatch.setattr(tpu, "LEAST", 4)
    mesh = sharding.mesh_of((2, 2, 2), jax.devices()[:8])
    q, k, v, _ = arrays(5, 7, B=8, N=4, dtype=jnp.bfloat16)
    plain = attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    with jax.set_mesh(mesh):
        out = jax.jit(lambda *x: attention(*x))(q, k, v)
        assert given and out.sharding.shard_shape(out.shape) == (2, 5, 2, 8)
        np.testing.assert_allclose(out.astype(jnp.float32), plain, rtol=0, atol=0.02)
        assert not calls(given, q[:7], k[:7], v[:7]) and not calls(given, *(x[:, :, :3] for x in (q, k, v)))


def test_where_the_compiler_splits_arrays_attention_is_plain(given, monkeypatch):
    """As in CapFilt where a place on the data axis is several devices: the TPU's compiler refuses to split a kernel."""
    monkeypatch.setattr(tpu, "LEAST", 4)
    q, *_ = arrays(5, 7, B=8, N=4, dtype=jnp.bfloat16)
    for shape, kernels in (((2, 1, 2), 0), ((4, 1, 1), 1)):
        mesh = sharding.mesh_of(shape, jax.devices()[:4])
        place = jax.sharding.PartitionSpec("data")
        with jax.set_mesh(mesh):
            run = jax.shard_map(
                lambda q: attention(q, q, q), in_specs=place, out_specs=place, axis_names={"data"}, check_vma=False
            )
            given.clear()
            jax.eval_shape(jax.jit(run), q)
        assert len(given) == kernels, shape
