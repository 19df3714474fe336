"""Programs over rows in passes, and parameters put on the devices array by array."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from blip_jax import config, tasks, trees
from blip_jax.inference.batching import Runner, placed
from blip_jax.models import initial
from blip_jax.models.layers.cpu import Turned
from blip_jax.parallel import sharding
from blip_jax.parallel.interrupt import Interrupt, Stopped


def test_a_signal_ends_it_between_two_passes():
    run, passes = Runner(sharding.make_mesh(ConfigDict({"data": 8, "fsdp": 1, "tensor": 1}))), []
    stop = Interrupt("ending it")

    def rows(at):
        passes.append(at.start)
        if passes == [0, 8, 16]:
            os.kill(os.getpid(), signal.SIGTERM)
        return (np.arange(at.start, at.stop),)

    def double(params, x):
        return 2 * x

    with stop, pytest.raises(Stopped):
        run.map(double, {}, 50, rows, size=8)
    assert stop.asked and passes == [0, 8, 16]
    np.testing.assert_array_equal(run.map(double, {}, 50, rows, size=8), 2 * np.arange(50))


@pytest.mark.parametrize("llm", ["opt_tiny", "flant5_tiny"])
def test_a_file_is_read_a_layer_at_a_time_and_the_model_stays_the_same(llm):
    cfg = config.blip2("eva_tiny", "tiny", llm).unlock()
    cfg.model.update(img_size=16, dtype="bfloat16")
    model, rng, held, most = tasks.build(cfg), np.random.default_rng(0), [], []
    shapes = jax.eval_shape(lambda key: initial.init_params(cfg, model, key), jax.random.key(0))
    params = trees.nest((path, rng.normal(0, 0.1, x.shape).astype(np.float32)) for path, x in trees.paths(shapes))

    def later(path, x):
        def row(i):
            held.append(path)
            return x[i]

        def whole():
            most.append(path)
            return x

        return trees.Lazy(x.shape, x.dtype, whole, row if "/blocks/" in path else None)

    mesh = sharding.mesh_of((1, 1, 1), jax.devices()[:1])
    lazy = trees.nest((path, later(path, x)) for path, x in trees.paths(params))
    found = placed(lazy, mesh, "bfloat16")
    assert lazy == {} and not any("/blocks/" in path for path in most)
    assert len(held) == sum(len(x) for path, x in trees.paths(params) if "/blocks/" in path), "each layer once"
    kernels = jax.tree.leaves(found["llm"], is_leaf=lambda x: isinstance(x, Turned))
    assert any(isinstance(x, Turned) for x in kernels)

    def logits(params, img, ids):
        apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
        mask = jnp.ones(ids.shape, bool)
        return apply(apply(apply(img, method="encode_image"), method="soft_prompt"), ids, mask, 3, method="begin")[0]

    img, ids = rng.normal(size=(1, 16, 16, 3)).astype(np.float32), np.array([[5, 6, 7]], np.int32)
    with jax.set_mesh(mesh):
        run = jax.jit(logits)
        # the same products of the same numbers, 0.04 large; summed in another order, one may round otherwise
        np.testing.assert_allclose(run(found, img, ids), run(params, img, ids), atol=1e-3)
