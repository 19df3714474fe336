"""What a vision tower keeps for its gradient when it is traced for GPUs."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models.layers import gpu
from blip_jax.models.vision.vit import Vit

DEPTH, B, P, HIDDEN = 3, 2, 5, 40
IMG = np.random.default_rng(0).normal(size=(B, 16, 16, 3)).astype(np.float32)


@pytest.fixture
def graded(monkeypatch):
    """dtype, for_gpus -> a tower's parameters and the gradient of a loss by them, traced for GPUs or not."""

    def make(dtype, for_gpus):
        monkeypatch.setattr(gpu, "traced_for", lambda: for_gpus)
        tower = Vit(width=16, depth=DEPTH, heads=2, mlp=HIDDEN, patch=8, img_size=16, init_std=0.5, dtype=dtype)
        loss = lambda params: jnp.sum(jnp.sin(tower.apply(params, IMG)).astype(jnp.float32))
        return tower.init(jax.random.key(0), IMG), jax.grad(loss)

    return make


def equations(jaxpr):
    """All of a program, of the programs in it too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def kept(program) -> list[tuple]:
    """Shapes of what the loop over the blocks leaves for the gradient's."""
    forward = next(eqn for eqn in program if eqn.primitive.name == "scan")
    return [x.aval.shape for x in forward.outvars]


def test_norms_and_gelu_are_made_again(graded):
    found = {}
    for for_gpus in (False, True):
        params, grad = graded(jnp.float32, for_gpus)
        found[for_gpus] = kept(equations(jax.make_jaxpr(grad)(params).jaxpr)), grad(params)
    (plain, plain_grads), (ours, our_grads) = found[False], found[True]
    assert plain.count((DEPTH, B, P, HIDDEN)) == 2 and ours.count((DEPTH, B, P, HIDDEN)) == 1
    tokens = (DEPTH, B, P, 16)
    assert plain.count(tokens) > ours.count(tokens)
    for a, b in zip(jax.tree.leaves(our_grads), jax.tree.leaves(plain_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_cudnn_is_not_run_again(graded, monkeypatch):
    """It stands in as a primitive of jax's name, one of whose results is for its gradient alone."""
    primitive = jax.extend.core.Primitive("dot_product_attention_fwd_wrapper")
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda q, k, v: (q, q.update(shape=q.shape[:1])))

    @jax.custom_vjp
    def cudnn(*inputs):
        return primitive.bind(*inputs)[0]

    def forward(*inputs):
        y, statistics = primitive.bind(*inputs)
        return y, (*inputs, statistics)

    cudnn.defvjp(forward, lambda kept, g: tuple(g * kept[3][:, None, None, None] for _ in range(3)))
    params, grad = graded(jnp.bfloat16, True)
    monkeypatch.setattr(gpu, "applies", lambda q, k, v: True)
    monkeypatch.setattr(gpu, "attention", cudnn)
    program = jax.make_jaxpr(grad)(params).jaxpr
    assert sum(eqn.primitive is primitive for eqn in equations(program)) == 1
