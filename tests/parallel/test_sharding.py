"""The sharding tables cover every leaf of every preset, split the large ones, and say what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from blip_jax import config
from blip_jax.models.blip import Blip
from blip_jax.parallel import sharding
from blip_jax.parallel.collectives import summed_in_parts, within_cells, words_summed_in_parts
from blip_jax.train import optim
from blip_jax.train import state as train_state


def state_shapes(size):
    cfg = config.base(size)
    with cfg.unlocked():
        cfg.train.steps = 10
        cfg.model.img_size = 16 * cfg.model.vit.patch // 2
    model = Blip.from_config(cfg.model)
    tx, _ = optim.make(cfg, 10)
    return jax.eval_shape(lambda key: train_state.create(cfg, model, tx, key), jax.random.key(0))


def mesh_of(data, fsdp, tensor):
    cfg = config.base().mesh
    with cfg.unlocked():
        cfg.update(data=data, fsdp=fsdp, tensor=tensor)
    return sharding.make_mesh(cfg)


@pytest.mark.parametrize("size", sorted(config.VIT_SIZES))
def test_every_leaf_has_a_row(size):
    shapes = state_shapes(size)
    specs = sharding.shardings_for(shapes, mesh_of(2, 2, 2))
    assert jax.tree.structure(specs) == jax.tree.structure(shapes)


def test_large_on_fsdp_keeps_at_most_two_percent_of_parameters_and_optimiser_whole():
    shapes = state_shapes("large")
    mesh = mesh_of(1, 8, 1)
    for tree in ({"params": shapes.params}, {"opt": shapes.opt}):
        sizes = [
            (x.size, s.is_fully_replicated)
            for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(sharding.shardings_for(tree, mesh)))
        ]
        assert sum(n for n, whole in sizes if whole) <= 0.02 * sum(n for n, _ in sizes)
    assert "kept whole on every device" in sharding.report(shapes, mesh)


def test_kernels_are_split_over_both_axes():
    specs = sharding.shardings_for(state_shapes("base").params, mesh_of(1, 4, 2))
    assert specs["vit"]["blocks"]["attn"]["q"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert specs["med"]["blocks"]["cross_attn"]["out"]["kernel"].spec == P(None, "tensor", None, "fsdp")
    assert specs["med"]["embed"]["word"]["embedding"].spec == P("tensor", "fsdp")


def test_unknown_parameters_and_uneven_dimensions_are_listed_together():
    tree = {
        "vit": {"pos_embed": jax.ShapeDtypeStruct((5, 6), jnp.float32)},
        "mystery": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)},
    }
    with pytest.raises(ValueError) as e:
        sharding.shardings_for(tree, mesh_of(1, 8, 1))
    assert "vit/pos_embed: dimension embed = 6 does not divide by mesh axis fsdp = 8" in str(e.value)
    assert "mystery/kernel" in str(e.value) and "PARAMS" in str(e.value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "mesh, cell, collectives",
    [
        ((8, 1, 1), 4, ""),
        ((8, 1, 1), 8, "all-gather reduce-scatter"),
        ((2, 4, 1), 32, "all-gather reduce-scatter"),
        ((2, 2, 2), 16, "all-gather reduce-scatter"),
        ((8, 1, 1), 2, ""),
    ],
)
def test_rows_drawn_within_cells_of_one_device_or_of_several(mesh, cell, collectives, dtype):
    keys, rows = jax.random.split(jax.random.key(0), 3), 32
    # sums are exact in either dtype
    x, weights = (jax.random.randint(k, (rows, 3, 4, 2), -9, 9).astype(dtype) for k in keys[:2])
    idx = jax.random.randint(keys[2], (rows // cell, cell), 0, cell)

    def weighed(x):
        drawn = within_cells(sharding.constrain(x, "act_batch", None, "act_heads"), idx, None, "act_heads")
        return jnp.sum((drawn * weights).astype(jnp.float32)), drawn

    flat = np.arange(rows) // cell * cell + np.asarray(idx).reshape(-1)
    back = np.zeros(x.shape, np.float32)
    np.add.at(back, flat, np.asarray(weights, np.float32))
    with jax.set_mesh(mesh_of(*mesh)):
        step = jax.jit(jax.value_and_grad(weighed, has_aux=True)).lower(x).compile()
        (_, drawn), gradient = step(x)
    assert (np.asarray(drawn) == np.asarray(x)[flat]).all()
    assert (np.asarray(gradient, np.float32) == back).all()
    kinds = {k for k in ("all-gather", "reduce-scatter", "all-to-all") if f" {k}(" in step.as_text()}
    assert kinds == set(collectives.split())


@pytest.mark.parametrize("embed", [0, 1])
def test_a_kernels_gradient_stays_split_over_both_axes(embed):
    x, w = jnp.arange(64.0).reshape(16, 4) % 7, jnp.arange(32.0).reshape((4, 8) if embed == 0 else (8, 4)) % 5
    split = P("fsdp", "tensor") if embed == 0 else P("tensor", "fsdp")
    with jax.set_mesh(mesh_of(2, 2, 2)):
        inputs = x if embed == 0 else jnp.concatenate([x, x], axis=1)
        loss = lambda w, x: jnp.sum((x @ summed_in_parts(w, embed)) ** 2)
        gradient = jax.jit(jax.grad(loss))(
            jax.device_put(w, split), jax.device_put(inputs, P(("data", "fsdp"), *split[:embed]))
        )
        assert gradient.sharding.spec == split
    np.testing.assert_array_equal(gradient, 2 * inputs.T @ (inputs @ w))


@pytest.mark.parametrize("rows", [24, 12])  # the devices divide the rows, or do not
def test_the_word_tables_gradient_is_the_sum_of_all_its_uses_split_as_the_table_is(rows):
    ids, x = jnp.arange(32).reshape(8, 4) * 7 % rows, jnp.arange(64.0).reshape(8, 8) % 5
    table, split = jnp.arange(rows * 8.0).reshape(rows, 8) % 7, P("tensor", "fsdp")

    def loss(table):
        table = sharding.constrain(words_summed_in_parts(table), "vocab", None)
        return jnp.sum(table[ids] ** 2) + jnp.sum((x @ table.T) ** 2)

    with jax.set_mesh(mesh_of(2, 2, 2)):
        gradient = jax.jit(jax.grad(loss))(jax.device_put(table, split))
        assert gradient.sharding.spec == split
    want = 2 * (x @ table.T).T @ x
    np.testing.assert_array_equal(gradient, want.at[ids].add(2 * table[ids]))


def test_a_cell_cut_unevenly_over_devices_and_fewer_rows_than_devices():
    x, idx = jnp.arange(24.0).reshape(24, 1), jnp.arange(24).reshape(2, 12)[:, ::-1] % 12
    with jax.set_mesh(mesh_of(8, 1, 1)):  # 3 rows a device, cells of 12 and 8
        assert (jax.jit(within_cells)(x, idx) == x.reshape(2, 12, 1)[:, ::-1].reshape(24, 1)).all()
        few = jnp.array([[1, 0, 3, 2]])
        assert (jax.jit(within_cells)(x[:4], few) == x[few[0]]).all()
        idx = jnp.arange(24).reshape(3, 8)[:, ::-1] % 8
        assert (jax.jit(within_cells)(x, idx) == x.reshape(3, 8, 1)[:, ::-1].reshape(24, 1)).all()


def test_a_logical_name_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="no_such_dim"):
        sharding.partition_spec(("embed", "no_such_dim"))


def test_a_mesh_that_does_not_multiply_names_the_devices():
    with pytest.raises(ValueError, match=r"\(3, 1, 1\) does not multiply to the 8 devices"):
        mesh_of(3, 1, 1)
    assert dict(mesh_of(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_initialising_large_never_puts_it_on_one_device():
    """The compiled creation of the state.

    What a device gets and what it needs meanwhile are together far less than the state.
    """
    cfg = config.base("large")
    with cfg.unlocked():
        cfg.train.steps, cfg.model.img_size = 10, 64
        # of twelve that are alike, each of which takes seconds to compile; the ViT's 24 are one stack
        cfg.model.med.layers = 3
    model, (tx, _) = Blip.from_config(cfg.model), optim.make(cfg, 10)
    create = lambda key: train_state.create(cfg, model, tx, key)
    shapes, mesh = jax.eval_shape(create, jax.random.key(0)), mesh_of(1, 8, 1)
    size = lambda tree: sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(create, out_shardings=sharding.shardings_for(shapes, mesh)).lower(jax.random.key(0)).compile()
        )
    memory, whole = compiled.memory_analysis(), size(shapes.extra["queue"])
    assert memory.output_size_in_bytes - whole < 1.02 / 8 * (size(shapes) - whole) < 2**30
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < size(shapes) / 5
    # not even one array of it
    assert memory.temp_size_in_bytes < max(x.size for x in jax.tree.leaves(shapes.params)) * 4
