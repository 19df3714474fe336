"""A stack runs as one loop and layer by layer with the same results, gradients included."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models.layers import stack

L, B, D = 3, 2, 5


class Holder(nn.Module):
    """A module with a stack of dense layers."""

    @nn.compact
    def __call__(self, x):
        return stack.parameters(self, nn.Dense(D, parent=None), L, jnp.zeros((1, D)))


def both_ways(monkeypatch, run):
    """Results of run() as a loop, and layer by layer."""
    out = []
    for unrolled in (False, True):
        monkeypatch.setattr(stack, "unrolled", lambda value=unrolled: value)
        out.append(run())
    return out


def random(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loop_and_single_layers_agree(monkeypatch, dtype):
    params = {"kernel": random(L, D, D, dtype=dtype), "bias": random(L, D, dtype=dtype, seed=1)}
    x, keys = random(B, D, dtype=dtype, seed=2), jax.random.split(jax.random.key(0), L)

    def body(x, p, nothing, key):
        assert nothing is None
        noise = jax.random.uniform(key, x.shape, x.dtype)
        return jnp.tanh(x @ p["kernel"] + p["bias"]) * noise, {"seen": x}

    def loss(params, x):
        y, outs = stack.through(body, x, params, None, keys)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(outs["seen"].astype(jnp.float32) ** 2), (y, outs)

    one, other = both_ways(monkeypatch, lambda: jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x))
    assert other[0][1][1]["seen"].shape == (L, B, D)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2e-2 if dtype == "bfloat16" else 1e-6, atol=1e-6)


def test_a_stack_that_is_cut_already_gives_the_same(monkeypatch):
    # whole numbers, whose products float32 has exactly in whatever order a CPU adds them
    params, x = {"kernel": jnp.round(4 * random(L, D, D))}, jnp.round(4 * random(B, D))
    body = lambda x, p: (x @ p["kernel"], None)
    whole, _ = both_ways(monkeypatch, lambda: stack.through(body, x, params)[0])
    monkeypatch.setattr(stack, "unrolled", lambda: True)
    cut = stack.apart(params)
    assert type(cut) is tuple and len(cut) == L
    np.testing.assert_array_equal(stack.through(body, x, cut)[0], whole)
    np.testing.assert_array_equal(stack.last(cut)["kernel"], stack.last(params)["kernel"])
    np.testing.assert_array_equal(stack.part(cut, 1, 3)[0]["kernel"], stack.part(params, 1, 3)["kernel"][0])


def test_each_layer_is_drawn_for_itself_and_given_parameters_are_taken():
    params = Holder().init(jax.random.key(0), jnp.zeros((1, D)))["params"]
    kernel = params["blocks"]["kernel"]
    assert kernel.shape == (L, D, D) and len(np.unique(kernel)) == kernel.size
    given = {"blocks": {"kernel": kernel + 1, "bias": params["blocks"]["bias"]}}
    np.testing.assert_array_equal(Holder().apply({"params": given}, jnp.zeros((1, D)))["kernel"], kernel + 1)


def test_what_is_traced_for_its_shapes_meets_one_layer():
    params, x, met = {"kernel": random(L, D, D)}, random(B, D), []
    shapes = lambda: jax.eval_shape(lambda: stack.through(lambda x, p: (x @ p["kernel"], met.append(x)), x, params)[0])
    whole, apart = shapes(), len(met)
    with stack.looped():
        assert shapes() == whole
    assert apart == L and len(met) == L + 1
    with pytest.raises(KeyError), stack.looped():
        raise KeyError
    assert stack.unrolled()
