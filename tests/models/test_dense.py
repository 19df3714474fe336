"""The product behind the dense layers: float32 sums of bfloat16 on CPUs, nothing special elsewhere."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from blip_jax import trees
from blip_jax.config import base
from blip_jax.inference import programs
from blip_jax.models import initial
from blip_jax.models.blip import Blip
from blip_jax.models.layers.cpu import Turned, dot_general, einsum, rows, summed
from blip_jax.models.layers.dense import DenseGeneral, rounded, rounded_once

DIMS = (((1,), (0,)), ((), ()))


def operands(dtype):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=s), dtype) for s in ((5, 300), (300, 7)))


def products(f, *args):
    """The result dtypes of all products in f."""
    return re.findall(r":(\w+)\[[\d,]*\] = dot_general", str(jax.make_jaxpr(f)(*args)))


def test_bfloat16_product_on_a_cpu_is_the_float32_sum_rounded_once():
    x, y = operands("bfloat16")
    ours = jax.jit(lambda x, y: dot_general(x, y, DIMS))(x, y)
    assert ours.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    np.testing.assert_array_equal(ours, np.asarray(jnp.asarray(exact, jnp.float32).astype("bfloat16")))
    assert products(lambda x, y: dot_general(x, y, DIMS), x, y) == ["f32"]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_turned_kernel_is_the_same_kernel(rows):
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.integers(-4, 5, shape).astype(jnp.bfloat16)  # whose sums are exact in any order
    for layer, kernel, taken, x in (
        (DenseGeneral((3, 8), dtype=jnp.bfloat16), draw(40, 3, 8), 1, draw(1, rows, 40)),
        (DenseGeneral(40, axis=(-2, -1), embed=1, dtype=jnp.bfloat16), draw(3, 8, 40), 2, draw(1, rows, 3, 8)),
    ):
        turned, bias = Turned.of(kernel, taken, jnp.asarray), draw(*kernel.shape[taken:])
        assert turned.kept.shape == kernel.shape and not np.array_equal(turned.kept, kernel)
        a, b = (jax.jit(layer.apply)({"params": {"kernel": k, "bias": bias}}, x) for k in (kernel, turned))
        assert a.dtype == b.dtype == jnp.bfloat16 and a.shape == b.shape
        np.testing.assert_array_equal(a, b)


def test_a_product_of_one_row_does_not_raise_the_matrix_to_float32():
    x, y = jnp.ones((1, 1, 300), "bfloat16"), jnp.asarray(np.random.default_rng(2).normal(size=(512, 300)), "bfloat16")
    run = jax.jit(lambda x, y: summed(x, y, (((2,), (1,)), ((), ()))))
    assert run.lower(x, y).compile().memory_analysis().temp_size_in_bytes < y.nbytes
    assert run(x, y).shape == (1, 1, 512)
    np.testing.assert_allclose(run(x, y)[0, 0], np.asarray(y, np.float64).sum(1), rtol=1e-4, atol=1e-3)


def test_its_gradient_is_that_of_the_plain_product():
    x, y = operands("bfloat16")
    g = jnp.asarray(np.random.default_rng(1).normal(size=(5, 7)), "bfloat16")
    grads = lambda f: jax.vjp(lambda x, y: f(x, y, DIMS), x, y)[1](g)
    for ours, plain in zip(grads(dot_general), grads(jax.lax.dot_general)):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, plain)
    whole = products(lambda x, y, g: jax.vjp(lambda x, y: dot_general(x, y, DIMS), x, y)[1](g), x, y, g)
    assert whole == ["f32"] * 3  # forward, and the two of the backward pass


@pytest.mark.parametrize("dtype, platform", [("float32", "cpu"), ("bfloat16", "tpu"), ("bfloat16", "gpu")])
def test_other_dtypes_and_platforms_get_the_plain_product(dtype, platform):
    x, y = operands(dtype)
    device = AbstractDevice("some device", None, platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)):
        ours = str(jax.make_jaxpr(lambda x, y: dot_general(x, y, DIMS))(x, y))
        plain = str(jax.make_jaxpr(lambda x, y: jax.lax.dot_general(x, y, DIMS))(x, y))
    assert ours == plain


def test_one_cpu_encodes_few_images_at_a_time_with_the_same_result(monkeypatch):
    cfg = base("tiny")
    cfg.model.img_size = 16
    model, size = Blip.from_config(cfg.model), cfg.model.img_size
    params = jax.jit(lambda: initial.init_params(cfg, model, jax.random.key(0)))()
    img = np.random.default_rng(0).integers(0, 256, (6, size, size, 3), np.uint8)
    P = 1 + (size // cfg.model.vit.patch) ** 2

    def batches():
        """Sizes of the batches that the ViT sees."""
        seen = []
        with monkeypatch.context() as m:
            m.setattr(
                Blip,
                "encode_image",
                lambda self, img, whole=Blip.encode_image: seen.append(len(img)) or whole(self, img),
            )
            jax.eval_shape(lambda: programs.encode_pixels(model, params, img))
        return seen

    encode = lambda params, img: programs.encode_pixels(model, params, img)
    whole = jax.jit(encode)(params, img)
    assert batches() == [6]
    monkeypatch.setattr(programs, "CPU_ROWS", 2 * P + 1)
    assert batches() == [2]
    mesh = jax.make_mesh((2, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        assert batches() == [6]  # split over devices: a loop over images would idle some
    part = jax.shard_map(encode, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    np.testing.assert_allclose(jax.jit(part)(params, img), whole, rtol=0, atol=1e-5)
    few = jax.jit(lambda *args: encode(*args))(params, img)  # traced anew
    np.testing.assert_allclose(few, whole, rtol=0, atol=1e-5)


def test_parameters_rounded_once_give_the_same_bits():
    cfg = base("tiny")
    cfg.model.update(dtype="bfloat16")
    model = Blip.from_config(cfg.model)
    params = jax.jit(lambda: initial.init_params(cfg, model, jax.random.key(0)))()
    once = rounded(params, "bfloat16")
    kept = {trees.path_name(p) for p, x in jax.tree.leaves_with_path(once) if x.dtype == jnp.float32}
    assert all(re.search(r"/(scale|bias)$|_proj/|itm_head/|^temp$|vit/(cls|pos_embed)", p) for p in kept), kept
    rng = np.random.default_rng(0)
    img = jnp.asarray(rng.normal(size=(2, cfg.model.img_size, cfg.model.img_size, 3)), jnp.float32)
    ids = jnp.asarray(rng.integers(5, 100, (2, 7)), jnp.int32)
    call = jax.jit(lambda params: model.apply({"params": params}, img, ids, jnp.ones((2, 7), bool)))
    for a, b in zip(jax.tree.leaves(call(params)), jax.tree.leaves(call(once)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_several_passes_use_rounded_once_gives_the_same_loss_and_gradients():
    cfg = base("tiny")
    cfg.model.update(dtype="bfloat16", dropout=0.0)
    model = Blip.from_config(cfg.model)
    params = jax.jit(lambda: initial.init_params(cfg, model, jax.random.key(0)))()
    rng = np.random.default_rng(0)
    img = jnp.asarray(rng.normal(size=(2, cfg.model.img_size, cfg.model.img_size, 3)), jnp.float32)
    ids, seen = jnp.asarray(rng.integers(5, 100, (2, 7)), jnp.int32), jnp.ones((2, 7), bool)

    def loss(params):
        return sum(
            jnp.sum(jnp.square(x.astype(jnp.float32)))
            for x in jax.tree.leaves(model.apply({"params": params}, img, ids, seen))
        )

    each = jax.jit(jax.value_and_grad(loss))(params)
    once = jax.jit(jax.value_and_grad(lambda p: loss(rounded_once(p, jnp.dtype("bfloat16")))))(params)
    assert each[0] == once[0]
    for (path, a), (_, b) in zip(trees.paths(each[1]), trees.paths(once[1]), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(a - b), 0, atol=2**-8 * np.linalg.norm(a) + 1e-6, err_msg=path)
    assert sum(x.dtype == jnp.bfloat16 for _, x in trees.paths(rounded_once(params, jnp.dtype("bfloat16")))) > 10


def test_rows_of_a_bfloat16_table_are_those_of_plain_indexing_and_so_is_the_gradient():
    table, ids = (
        jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), "bfloat16"),
        jnp.array([[3, 8, 3], [0, 3, 5]]),
    )
    np.testing.assert_array_equal(jax.jit(rows)(table, ids), table[ids])
    loss = lambda f: jax.grad(lambda t: jnp.sum(f(t, ids).astype(jnp.float32) ** 2))(table)
    np.testing.assert_array_equal(loss(rows), loss(lambda t, i: t[i]))


@pytest.mark.parametrize(
    "equation, x, y",
    [
        ("B T N H, B S N H -> B N T S", (2, 3, 4, 5), (2, 6, 4, 5)),
        ("B N T S, B S N H -> B T N H", (2, 4, 3, 6), (2, 6, 4, 5)),
        ("T D, D F -> F T", (3, 5), (5, 7)),
    ],
)
def test_einsum_is_numpys(equation, x, y):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=x).astype(np.float32), rng.normal(size=y).astype(np.float32)
    ours = einsum(equation, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(ours, np.einsum(equation.replace(" ", ""), x, y), rtol=1e-5, atol=1e-6)
