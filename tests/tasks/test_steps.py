"""Steps on fake devices: the mesh, the micro-batches and the groups change nothing that the maths does not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax import config, losses, tasks
from blip_jax.parallel import sharding
from blip_jax.tasks.step import make_step
from blip_jax.train import optim
from blip_jax.train import state as train_state

B, T, SIZE = 16, 8, 16


def tiny(**leaves):
    cfg = config.base("tiny")
    with cfg.unlocked():
        cfg.model.vit.update(width=32, depth=2, heads=4, mlp=64, patch=8)
        cfg.model.med.update(width=32, layers=1, heads=4, mlp=64, positions=16, vocab_size=60)
        cfg.model.update(img_size=SIZE, embed_dim=16, dtype="float32", dropout=0.1, drop_path=0.2)
        cfg.text.max_len = T
        cfg.loss.queue = 2 * B
        cfg.train.update(batch=B, steps=10)
    cfg.update_from_flattened_dict(leaves)
    return cfg


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, T + 1, B)
    txt_mask = np.arange(T) < lengths[:, None]
    return {
        "img": rng.integers(0, 256, (B, SIZE, SIZE, 3)).astype(np.uint8),
        "ids": rng.integers(5, 58, (B, T)).astype(np.int32),
        "txt_mask": txt_mask,
        "lm_mask": txt_mask & (np.arange(T) >= 2),
        "image_id": rng.integers(0, 6, B).astype(np.int32),
    }


def shaped(batch, accumulate):
    return jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]) if accumulate > 1 else x, batch)


STATES = {}  # what a state depends on here -> the one that a single device makes


def created(cfg):
    """The state that one device makes of a config; several runs start from it, so it is made once."""
    key = (cfg.objective, cfg.loss.momentum, cfg.loss.queue, cfg.optim.freeze)
    if key not in STATES:
        create = functools.partial(train_state.create, cfg, tasks.build(cfg), optim.make(cfg, 5)[0])
        STATES[key] = jax.jit(create)(jax.random.key(0))
    return jax.tree.map(jnp.copy, STATES[key])  # a step takes its buffers


def run(cfg, mesh_shape=(1, 1, 1), see_negatives=False):
    """One step's metrics, drawn negatives, state after it and gradients (from Adam's first moment), all gathered.

    It starts from a state that one device made. A step whose negatives are seen calls Python, so it is not kept in the
    compile cache.
    """
    devices, state = jax.devices()[: int(np.prod(mesh_shape))], created(cfg)
    with cfg.unlocked():
        cfg.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh_shape)))
    mesh, model = sharding.make_mesh(cfg.mesh, devices), tasks.build(cfg)
    tx, _ = optim.make(cfg, 5)

    def draw(key, weights, first_row):
        rows = losses.draw_negatives(key, weights, first_row)
        jax.debug.callback(lambda r: drawn.append(np.asarray(r)), rows)
        return rows

    drawn = []
    with jax.set_mesh(mesh):
        where = sharding.shardings_for(jax.eval_shape(lambda: state), mesh)
        state = jax.device_put(state, where)
        batch = jax.device_put(
            shaped(make_batch(), cfg.optim.accumulate), sharding.batch_sharding(mesh, cfg.optim.accumulate)
        )
        drawing = {"draw": draw} if see_negatives else {}
        step = jax.jit(make_step(cfg, model, tx, 5, **drawing), donate_argnums=0, out_shardings=(where, None))
        state, metrics = step(state, batch)
        jax.effects_barrier()
    grads = jax.tree.map(lambda m: np.asarray(m) / (1 - cfg.optim.b1), state.opt[0].mu)
    return jax.tree.map(float, metrics), sorted(map(tuple, drawn)), state, grads


def assert_same(a, b, tol=1e-5):
    (metrics_a, _, state_a, grads_a), (metrics_b, _, state_b, grads_b) = a, b
    for name in metrics_a:
        assert abs(metrics_a[name] - metrics_b[name]) <= tol * max(1.0, abs(metrics_a[name])), name
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads_a))
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(grads_a), jax.tree.leaves(grads_b)):
        np.testing.assert_allclose(x, y, rtol=0, atol=tol * max(1.0, largest), err_msg=str(path))
    if state_a.extra is not None:
        for x, y in zip(jax.tree.leaves(state_a.extra), jax.tree.leaves(state_b.extra)):
            np.testing.assert_allclose(x, y, rtol=0, atol=tol)


@pytest.fixture(scope="module")
def alone():
    """One device, with and without momentum and queue."""
    without = {"loss.momentum": False, "loss.queue": 0}
    return {True: run(tiny(), see_negatives=True), False: run(tiny(**without), see_negatives=True)}


# each axis and all three together, with and without the queue, but not every pair of them: a step compiles for seconds
@pytest.mark.parametrize("shape, queue", [((8, 1, 1), True), ((1, 8, 1), False), ((2, 2, 2), True)])
def test_mesh_changes_nothing_dropout_on(alone, shape, queue):
    cfg = tiny() if queue else tiny(**{"loss.momentum": False, "loss.queue": 0})
    other = run(cfg, shape, see_negatives=True)
    assert alone[queue][1] == other[1] and len(other[1]) == 2  # the same negative images and texts
    assert_same(alone[queue], other)


def test_a_mesh_makes_the_state_that_one_device_makes():
    cfg = tiny(**{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    create = functools.partial(train_state.create, cfg, tasks.build(cfg), optim.make(cfg, 5)[0])
    where = sharding.shardings_for(jax.eval_shape(create, jax.random.key(0)), sharding.make_mesh(cfg.mesh))
    alone, split = created(tiny()), jax.jit(create, out_shardings=where)(jax.random.key(0))
    for (path, a), b in zip(jax.tree.leaves_with_path(alone), jax.tree.leaves(split), strict=True):
        a, b = (jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=str(path))


def test_micro_batches_equal_groups():
    """With groups as large as a micro-batch, one pass and several make the same update.

    So they drew the same negatives.

    Dropout is off; every loss is a mean of group means either way.
    """
    still = {"model.dropout": 0.0, "model.drop_path": 0.0, "loss.group_size": B // 4}
    assert_same(run(tiny(**still)), run(tiny(**still, **{"optim.accumulate": 4}), (2, 1, 1)))


def test_retrieval_step_on_a_mesh():
    leaves = {"objective": "retrieval", "loss.group_size": 8}
    alone = run(tiny(**leaves))
    assert_same(alone, run(tiny(**leaves), (2, 2, 2)))
    queue = alone[2].extra["queue"]
    np.testing.assert_array_equal(queue["image_id"][:B], make_batch()["image_id"])
    assert (np.asarray(queue["image_id"][B:]) == -100).all() and int(queue["ptr"]) == B


CAPTION = {"objective": "caption"}


def test_caption_step_on_a_mesh():
    alone = run(tiny(**CAPTION), see_negatives=True)
    assert set(alone[0]) == {"loss", "loss_lm", "grad_norm"} and not alone[1]
    assert_same(alone, run(tiny(**CAPTION), (2, 2, 2)))


def test_caption_micro_batches_equal_groups():
    still = {**CAPTION, "model.dropout": 0.0, "model.drop_path": 0.0, "loss.group_size": B // 4}
    assert_same(run(tiny(**still)), run(tiny(**still, **{"optim.accumulate": 4}), (2, 1, 1)))


def test_bfloat16_compute_keeps_float32_state_and_nearly_the_same_losses(alone):
    metrics, _, state, _ = run(tiny(**{"model.dtype": "bfloat16"}))
    exact, _, exact_state, _ = alone[True]
    for name in ("loss_itc", "loss_lm"):  # itm depends on which negatives rounding makes it draw
        assert abs(metrics[name] - exact[name]) < 0.02 * exact[name], name
    assert metrics["loss_lm"] != exact["loss_lm"]
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, exact_state)


def test_frozen_parts_stay_and_have_no_optimiser_state(alone):
    cfg = tiny(**{"optim.freeze": ("vit/.*", "temp")})
    start = created(cfg)
    metrics, _, state, grads = run(cfg)
    assert "vit" not in state.params and "vit" not in grads and set(state.frozen) == {"vit", "temp"}
    for a, b in zip(jax.tree.leaves(start.frozen), jax.tree.leaves(state.frozen)):
        np.testing.assert_array_equal(a, b)
    assert np.abs(start.params["itm_head"]["kernel"] - state.params["itm_head"]["kernel"]).max() > 0
    assert abs(metrics["loss"] - alone[True][0]["loss"]) < 1e-5  # the loss is that of the same parameters
    np.testing.assert_allclose(grads["itm_head"]["kernel"], alone[True][3]["itm_head"]["kernel"], atol=1e-5)
