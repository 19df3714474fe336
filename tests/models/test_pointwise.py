"""GELU, LayerNorm, softmax and the product with their own gradients: the values and gradients of jax's, and less
kept for the backward pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from blip_jax.models.layers import gpu
from blip_jax.models.layers.cpu import summed
from blip_jax.models.layers.norm import LayerNorm, RMSNorm, gelu, quick_gelu, softmax

X = np.random.default_rng(0).normal(0, 3, (4, 7, 32)).astype(np.float32)
G = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
jax_gelu = lambda x: jax.nn.gelu(x, approximate=False)
jax_softmax = lambda s: jax.nn.softmax(s, axis=-1)


def norms():
    """(ours, flax's, parameters)"""
    ours, theirs = LayerNorm(1e-6, jnp.float32), nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)
    params = {"params": {"scale": jnp.linspace(0.5, 2, 32), "bias": jnp.linspace(-1, 1, 32)}}
    return ours.apply, theirs.apply, params


def pairs():
    ours, theirs, params = norms()
    return {
        "gelu": (gelu, jax_gelu),
        "quick gelu": (quick_gelu, lambda x: x * jax.nn.sigmoid(1.702 * x)),
        "softmax": (lambda s: softmax(s, jnp.float32), jax_softmax),
        "layer norm": (lambda x: ours(params, x), lambda x: theirs(params, x)),
    }


@pytest.mark.parametrize("name", pairs())
def test_values_and_gradients_are_jaxs(name):
    ours, theirs = (jax.vjp(f, X) for f in pairs()[name])
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=3e-6)
    np.testing.assert_allclose(ours[1](G)[0], theirs[1](G)[0], rtol=0, atol=3e-6)


def test_gelu_is_exact_far_from_zero_and_finite():
    x = np.array([-40.0, -6.0, -1.0, 0.0, 1.0, 6.0, 40.0], np.float32)
    exact = x * special.ndtr(x.astype(np.float64))
    np.testing.assert_allclose(gelu(x), exact, rtol=1e-6, atol=5e-7)
    assert np.isfinite(jax.vmap(jax.grad(gelu))(x)).all()


def test_gelu_of_bfloat16_is_the_exact_one_rounded_once():
    x = jnp.asarray(np.linspace(-8, 8, 4001), jnp.bfloat16)
    exact = np.asarray(x, np.float64) * special.ndtr(np.asarray(x, np.float64))
    off = np.abs(np.asarray(gelu(x), np.float64) - exact)
    # half a unit in the last place of 8 bits; erf's own in the far tail
    assert (off <= 2**-8 * np.abs(exact) + 2e-6).all()


def test_layer_norms_parameters_have_gradients():
    ours, theirs, params = norms()
    a, b = (jax.grad(lambda p: jnp.sum(f(p, X) * G))(params) for f in (ours, theirs))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5), a, b)
    made = LayerNorm(1e-6, jnp.bfloat16).init(jax.random.key(0), X)["params"]
    assert {k: (v.dtype, v.shape, float(v[0])) for k, v in made.items()} == {
        "scale": (jnp.float32, (32,), 1.0),
        "bias": (jnp.float32, (32,), 0.0),
    }


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_gpus_are_given_norms_of_matrices_with_the_same_results(kind, monkeypatch):
    module, x = kind(1e-6, jnp.float32), jnp.asarray(X)
    params = {"params": {"scale": jnp.linspace(0.5, 2, 32), "bias": jnp.linspace(-1, 1, 32)}}
    run = lambda params, x: jnp.sum(module.apply(params, x) * G)
    plain = jax.value_and_grad(run, (0, 1))(params, x)
    assert "f32[28,32]" not in str(jax.make_jaxpr(module.apply)(params, x))
    monkeypatch.setattr(gpu, "platform", lambda: "cuda")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5),
        jax.value_and_grad(run, (0, 1))(params, x),
        plain,
    )
    shapes = str(jax.make_jaxpr(module.apply)(params, x))
    assert "rsqrt" in shapes and "f32[28,32] = mul" in shapes and "f32[4,7,32] = mul" not in shapes
    one = jax.random.normal(jax.random.key(0), (32,))
    np.testing.assert_allclose(module.apply(params, one), module.apply(params, one[None])[0], rtol=1e-6)


def test_results_and_gradients_are_in_the_dtypes_asked_for():
    x = jnp.asarray(X, jnp.bfloat16)
    for f in (gelu, quick_gelu, lambda x: LayerNorm(1e-6, jnp.bfloat16).apply(norms()[2], x)):
        y, back = jax.vjp(f, x)
        assert y.dtype == back(y)[0].dtype == jnp.bfloat16
    p, back = jax.vjp(lambda s: softmax(s, jnp.bfloat16), X)
    assert p.dtype == jnp.bfloat16 and back(p)[0].dtype == jnp.float32


@pytest.mark.parametrize("name", pairs())
def test_one_array_of_the_inputs_size_is_kept(name):
    kept = [x for x in jax.tree.leaves(jax.vjp(pairs()[name][0], X)[1]) if x.size >= X.size]
    assert [x.shape for x in kept] == [X.shape]


@pytest.mark.parametrize(
    "shapes, dims",
    [
        (((5, 3), (3, 4)), (((1,), (0,)), ((), ()))),
        (((2, 6, 3, 4), (2, 5, 3, 4)), (((3,), (3,)), ((0, 2), (0, 2)))),  # attention's scores
        # several sums in another order than their dimensions
        (((2, 3, 4, 5), (5, 7, 4, 2)), (((3, 2), (0, 2)), ((0,), (3,)))),
        (((4, 2, 3, 5), (3, 6, 4)), (((2, 0), (0, 2)), ((), ()))),
    ],
)
def test_gradient_of_a_summed_product_is_the_plain_ones(shapes, dims):
    rng = np.random.default_rng(2)
    x, y = (rng.normal(size=s).astype(np.float32) for s in shapes)
    (ours, back), (plain, plain_back) = (
        jax.vjp(lambda x, y: f(x, y, dims), x, y) for f in (summed, jax.lax.dot_general)
    )
    g = rng.normal(size=plain.shape).astype(np.float32)
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    for a, b in zip(back(g), plain_back(g)):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5)
    in_bf16 = jax.vjp(lambda x, y: summed(x, y, dims), jnp.asarray(x, "bfloat16"), jnp.asarray(y, "bfloat16"))
    assert in_bf16[0].dtype == jnp.float32 and [d.dtype for d in in_bf16[1](g)] == [jnp.bfloat16] * 2
