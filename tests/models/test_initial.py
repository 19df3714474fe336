"""Initial parameters: the distributions that the modules name, keys by path, the same numbers on every mesh."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax import config, trees
from blip_jax.models import initial
from blip_jax.parallel import sharding
from blip_jax.tasks import build


@functools.cache
def made(objective, key=0):
    """(config, model, parameters by path)"""
    cfg = config.base("tiny")
    with cfg.unlocked():
        cfg.objective = objective
        cfg.model.update(img_size=16)
    return (
        cfg,
        build(cfg),
        dict(trees.paths(jax.jit(lambda: initial.init_params(cfg, build(cfg), jax.random.key(key)))())),
    )


@pytest.mark.parametrize("objective", ["pretrain", "vqa", "nlvr"])
def test_distributions_are_those_of_the_modules(objective):
    cfg, model, ours = made(objective)
    img, ids = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 8), jnp.int32)
    theirs = jax.jit(lambda key: model.init(key, img, ids, jnp.ones((1, 8), bool)))(jax.random.key(1))["params"]
    for path, x in trees.paths(theirs):
        assert ours[path].shape == x.shape and ours[path].dtype == x.dtype, path
        if not np.ptp(x):
            np.testing.assert_array_equal(ours[path], x, err_msg=path)
            continue
        assert not np.array_equal(ours[path], x)
        if x.size < 16:  # of the matching head's two biases the deviation says nothing
            assert abs(ours[path]).max() <= cfg.model.med.width**-0.5
            continue
        spread = 6 / np.sqrt(x.size)  # six standard errors, about
        assert (
            abs(np.log(ours[path].std() / x.std())) < spread and abs(ours[path].mean() - x.mean()) < spread * x.std()
        ), path
        if x.size > 100 and abs(x).max() < 1.8 * x.std():  # uniform
            assert abs(ours[path]).max() <= np.sqrt(3) * x.std() * (1 + spread), path


def test_every_number_is_its_own():
    ours = made("pretrain")[2]
    numbers = np.concatenate(
        [np.ravel(x[..., :7]) for path, x in ours.items() if path.endswith("kernel") and x.ndim > 2]
    )
    assert len(np.unique(numbers)) > 0.99 * numbers.size  # float32 has few enough numbers for some to meet
    assert not np.array_equal(ours["vit/blocks/attn/q/kernel"][0], ours["vit/blocks/attn/q/kernel"][1])


def test_a_parameter_does_not_depend_on_the_others():
    whole, captioner = made("pretrain")[2], made("caption")[2]
    assert len(captioner) < len(whole)
    for path, x in captioner.items():
        np.testing.assert_array_equal(x, whole[path], err_msg=path)
    other = made("pretrain", 1)[2]
    assert not np.array_equal(other["vit/cls"], whole["vit/cls"])


def test_a_mesh_changes_nothing():
    cfg, model, alone = made("pretrain")
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    create = lambda key: initial.init_params(cfg, model, key)
    with jax.set_mesh(mesh):
        where = sharding.shardings_for(jax.eval_shape(create, jax.random.key(0)), mesh)
        split = jax.jit(create, out_shardings=where)(jax.random.key(0))
    for path, x in trees.paths(split):
        # the same bits are drawn; a compiler rounds erf as it likes
        np.testing.assert_allclose(x, alone[path], rtol=5e-7, err_msg=path)


def test_a_path_without_a_row_is_an_error():
    with pytest.raises(ValueError, match="no row of ROWS .* matches vit/blocks/gate: add one"):
        initial.parameters(
            {"vit": {"blocks": {"gate": jax.ShapeDtypeStruct((3,), jnp.float32)}}},
            jax.random.key(0),
            std=1.0,
            pos_std=1.0,
        )


def test_equal_models_are_traced_once_and_those_that_cannot_be_compared_each_time():
    traced = []

    class Own(nn.Module):
        """A model of one's own, whose list of widths has no hash."""

        widths: list | tuple

        @nn.compact
        def __call__(self, img, ids, mask):
            traced.append(self.widths)
            return nn.Dense(self.widths[0], name="itm_head")(img.mean((1, 2)))

    cfg = config.base("tiny")
    for widths, times in (((3,), 1), ([3], 2)):
        traced.clear()
        for _ in range(2):
            shapes = jax.eval_shape(lambda: initial.init_params(cfg, Own(widths), jax.random.key(0)))
            assert shapes["itm_head"]["kernel"].shape == (3, 3)
        assert len(traced) == times
