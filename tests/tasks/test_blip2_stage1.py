"""BLIP-2's first stage as a task: losses, gradients and steps against LAVIS's, what it draws, what it costs, a run."""

import functools
import re
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from world.golden2 import Case, check_grads, close, given
from world.runs import leaves, rows

from blip_jax import config, losses, tasks, trees
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.models import flops, initial
from blip_jax.models.build import fit
from blip_jax.parallel import sharding
from blip_jax.tasks import blip2_stage1 as task
from blip_jax.tasks import step
from blip_jax.train import evaluation, loop, optim
from blip_jax.train import state as train_state

LOSSES = ("loss_itc", "loss_itm", "loss_lm")


def loss_of(case, cfg, gradients=True):
    """(metrics, gradients by path or None, sampling weights) of the case's batch, with its negatives."""
    model, (trained, frozen) = task.build(cfg), trees.split(case.params(), cfg.optim.freeze)

    def loss(trained, batch, negatives):
        weights = []
        keys = step.Keys(jax.random.key(1), jax.random.key(2), 0, given(negatives, weights))
        total, (metrics, _) = task.loss(model, cfg, trees.merge(trained, frozen), None, batch, keys)
        return total, (metrics, weights)

    if not gradients:
        _, (metrics, weights) = jax.jit(loss)(trained, case.batch(), case.negatives())
        return metrics, None, weights
    given_ = trained, case.batch(), case.negatives()
    (_, (metrics, weights)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(*given_)
    return metrics, dict(trees.paths(grads)), weights


def theirs(case, prefix):
    """path -> the original's array, of every entry of io with the prefix."""
    found = {name[len(prefix) :]: case.io[name] for name in case.io.files if name.startswith(prefix)}
    return case.ours(found)


@pytest.mark.parametrize("name", ["stage1_eva", "stage1_clip"])
def test_golden_losses_and_every_gradient(name):
    case = Case(name)
    metrics, grads, weights = loss_of(case, case.config(**{"task.columns_train": True}))  # as on a single GPU
    for name in LOSSES:
        close(metrics[name], case.io[name], what=name)
    close(weights[0][0], case.io["weights_t2i"])
    close(weights[1][0], case.io["weights_i2t"])
    want = theirs(case, "grad/")
    assert want.keys() == grads.keys()
    check_grads(grads, want)


@pytest.mark.parametrize("name", ["stage1_eva", "stage1_clip"])
def test_golden_losses_with_image_ids(name):
    case = Case(f"{name}_image_id", name)
    metrics, _, weights = loss_of(case, case.config(**{"task.image_ids": True}), gradients=False)
    for name in LOSSES:
        close(metrics[name], case.io[name], what=name)
    image_id = case.io["image_id"]
    assert all((np.asarray(w[0])[image_id[:, None] == image_id] == 0).all() for w in weights)


def test_golden_two_devices_are_one_batch_with_a_mean_of_each_ones_tokens():
    case = Case("stage1_2ranks")
    world, B = case.meta["world"], case.sizes["B"]
    cfg = case.config(**{"train.batch": world * B, "task.lm_group": B})
    metrics, grads, weights = loss_of(case, cfg)
    for name in ("loss", *LOSSES):
        close(metrics[name], case.io[name].mean(), what=name)
    close(weights[0][0], case.io["weights_t2i"].reshape(world * B, -1))
    close(weights[1][0], case.io["weights_i2t"].reshape(world * B, -1))
    check_grads(grads, theirs(case, "grad/"))


# --- steps against the original's -------------------------------------------------------------------------------------
def stepping(case, **leaves):
    """The case's config with its optimiser, and steps in an epoch."""
    hyper = case.meta["hyper"]
    epoch_steps = sum(epoch == 0 for epoch, _ in hyper["steps"])
    cfg = case.config(**leaves)
    cfg.optim.update(
        lr=hyper["init_lr"],
        min_lr=hyper["min_lr"],
        warmup_lr=hyper["warmup_lr"],
        warmup_steps=hyper["warmup_steps"],
        weight_decay=hyper["weight_decay"],
        b1=hyper["betas"][0],
        b2=hyper["betas"][1],
        eps=hyper["eps"],
        schedule="epoch_cosine",
        freeze=("vit/.*",) if case.meta["freeze_vit"] else (),
    )
    cfg.train.steps = hyper["max_epoch"] * epoch_steps
    return cfg, epoch_steps


@pytest.mark.parametrize(
    "name, leaves, tolerance", [("stage1_3steps", {}, 3e-5), ("retrieval_ft_3steps", {"task.image_ids": True}, 5e-5)]
)
def test_golden_steps_of_the_optimiser(name, leaves, tolerance):
    case = Case(name)
    cfg, epoch_steps = stepping(case, **leaves)
    tx, lr = optim.make(cfg, epoch_steps)
    model, (trained, frozen) = task.build(cfg), trees.split(case.params(), cfg.optim.freeze)
    state = train_state.TrainState(jnp.int32(0), trained, frozen, tx.init(trained), None, jax.random.key(0))

    @jax.jit
    def one(state, batch, negatives):
        return step.make_step(cfg, model, tx, epoch_steps, draw=given(negatives, []))(state, batch)

    decays = dict(trees.paths(optim.decay_mask(cfg.optim.decay_mask)(trained)))
    for decay in {group["weight_decay"] for group in case.meta["groups"]}:
        names = [name for group in case.meta["groups"] if group["weight_decay"] == decay for name in group["names"]]
        own = case.ours({name: case.tensors[name] for name in names})
        assert own and all(decays[path] == (decay > 0) for path in own)
    for i in range(len(case.io["lr"])):
        assert float(lr(i)) == pytest.approx(float(case.io["lr"][i]), rel=1e-6)
        state, metrics = one(state, case.batch(i), case.negatives(i))
        for loss in ("loss", *LOSSES):
            close(metrics[loss], case.io[loss][i], what=f"{loss} of step {i}")
    after, want = dict(trees.paths(state.params)), theirs(case, "after/")
    assert want.keys() == after.keys() and float(metrics["no_negative"]) == 0
    for path, x in want.items():
        if not path.endswith("/k/bias"):  # whose gradient is zero but for rounding, which Adam makes a step of
            close(after[path], x, tolerance, path)


def test_image_ids_count_where_the_config_says_so_and_nowhere_else(tiny_vocab):
    """LAVIS took the other loss as soon as a batch had ids, and failed over those that were texts."""
    cfg, tokenizer = tiny(**{"text.vocab": str(tiny_vocab)}), Tokenizer(tiny_vocab)
    record = {"key": "k", "source": "s", "image": b"", "captions": ["a ring"]}
    for by in (False, True):
        cfg.task.image_ids = by
        assert ("image_id" in task.shapes(cfg)) == by
        found = [
            task.example(record | {"image_id": i}, np.random.default_rng(0), cfg, tokenizer) for i in ("coco_1", "2")
        ]
        assert [("image_id" in row) for row in found] == [by, by]
    first, other = (row["image_id"] for row in found)
    again = task.example(record | {"image_id": "coco_1"}, np.random.default_rng(1), cfg, tokenizer)["image_id"]
    assert first == again != other and first.dtype == np.int64
    batch = {"ids": jnp.zeros((3, 8)), "image_id": jnp.asarray([5, 5, 7])}
    assert task.positives(cfg, batch)[0].tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    cfg.task.image_ids = False
    assert task.positives(cfg, batch)[0].tolist() == np.eye(3, dtype=bool).tolist()


# --- what it draws ----------------------------------------------------------------------------------------------------
def test_negatives_are_never_positives_however_far_the_positives_are_ahead():
    """`temp` is not clamped: similarities may be so large that all but the positives underflow in a softmax over
    all."""
    sim = jnp.asarray([[[900.0, 3.0, 1.0, 900.0], [0.0, 0.0, -500.0, 0.0], [1.0, 2.0, 3.0, 4.0], [0.0] * 4]])
    same = jnp.asarray([[[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]]], bool)
    weights = losses.masked_negative_weights(sim, same)[0]
    e = np.exp
    close(weights[0], [0, e(2) / (e(2) + 1), 1 / (e(2) + 1), 0], 1e-6)
    close(weights[1], [0.5, 0, 0, 0.5], 1e-6)
    close(weights[2], np.array([e(1), e(2), 0, e(4)]) / (e(1) + e(2) + e(4)), 1e-6)
    close(weights[3], [0] * 4)
    drawn = [losses.draw_negatives(jax.random.key(i), weights[None]) for i in range(20)]
    assert all(rows[3] == -1 and not np.asarray(same)[0, range(3), rows[:3]].any() for rows in map(np.asarray, drawn))
    cfg = config.blip2("eva_tiny", "tiny").unlock()
    cfg.task = task.leaves()
    close(task.negative_weights(cfg, sim, same)[0], weights)
    cfg.task.negatives = "floored"
    close(task.negative_weights(cfg, sim, same)[0, 2], [*np.array(jax.nn.softmax(sim[0, 2])[:2]) + 1e-4, 0, 0.6440142])


def test_each_direction_of_the_contrastive_loss_trains_its_own_side():
    keys = jax.random.split(jax.random.key(0), 2)
    img, txt = jax.random.normal(keys[0], (4, 3, 5)), jax.random.normal(keys[1], (4, 5))
    cfg, same = tiny(), jnp.eye(4, dtype=bool)[None]

    def one_way(img, txt, way):
        own = task.contrastive(cfg, img, txt, jnp.float32(0.5), same)[1]
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(own[way][0])))

    for way, trained, fixed in (("i2t", 0, 1), ("t2i", 1, 0)):
        grads = jax.grad(one_way, (0, 1))(img, txt, way)
        assert np.abs(grads[trained]).max() > 0.01 and not np.abs(grads[fixed]).any()
    cfg.task.columns_train = True
    assert min(np.abs(x).max() for x in jax.grad(one_way, (0, 1))(img, txt, "i2t")) > 0.01


# --- a small run ------------------------------------------------------------------------------------------------------
B, T, SIZE = 16, 8, 16


def tiny(**leaves):
    c = config.blip2("eva_tiny", "tiny").unlock()
    c.model.vit.depth = 1
    c.model.update(img_size=SIZE, embed_dim=16, dtype="float32")
    c.text.max_len, c.task = T, task.leaves()
    c.train.update(batch=B, steps=10)
    c.update_from_flattened_dict(leaves)
    return c


def test_cost_of_a_step_is_as_counted_and_a_frozen_tower_has_no_backward():
    """The formula against the products of the step as it is traced; keys of an image once."""
    counted = {}
    for freeze in (("vit/.*",), ()):
        cfg = tiny(**{"optim.freeze": freeze, "model.qformer.vocab_size": 128})  # as many as are stored
        model, (tx, _) = task.build(cfg), optim.make(cfg, 5)
        state = jax.eval_shape(functools.partial(train_state.create, cfg, model, tx), jax.random.key(0))
        batch = {name: jax.ShapeDtypeStruct(*x) for name, x in task.shapes(cfg).items()}
        counted[freeze] = flops.count_function(step.make_step(cfg, model, tx, 5), state, batch) / B
        # on one CPU, where layers are no loop, what the last layer's feed-forward makes of texts that are matched,
        # which nobody reads, has no gradient
        unneeded = 2 * 3 * T * 4 * cfg.model.qformer.width * cfg.model.qformer.mlp
        assert counted[freeze] == pytest.approx(task.flops(cfg)["step"] - unneeded, rel=1e-3)
    whole, pixels = flops.vision(cfg.model)
    assert counted[()] - counted[("vit/.*",)] == pytest.approx(2 * whole - pixels, rel=1e-3)


def test_cost_at_full_size_is_the_least_that_the_maths_needs():
    cfg = config.blip2("eva_g").unlock()
    cfg.task, cfg.loss.group_size = task.leaves(), 100
    for length, least in ((32, 701e9), (12, 646e9)):
        assert task.flops(cfg, T=length)["step"] == pytest.approx(least, rel=0.002)
    parts = task.flops(cfg)
    cfg.task.itg = False  # the texts that are not generated, forward and twice backward
    generated = parts["decoder"] + parts["lm_head"]
    assert parts["step"] - task.flops(cfg)["step"] == pytest.approx(3 * generated) and generated > 0


def test_a_mesh_and_making_layers_again_change_nothing():
    """Loss and gradients of a step with dropout on one device and on eight, split over fsdp and tensor, whose backward
    pass keeps nothing of the layers."""
    rng, results = np.random.default_rng(0), []
    batch = {
        "img": rng.integers(0, 256, (B, SIZE, SIZE, 3)).astype(np.uint8),
        "ids": rng.integers(5, 100, (B, T)).astype(np.int32),
        "txt_mask": np.arange(T) < rng.integers(3, T + 1, B)[:, None],
    }
    for shape, remat in (((1, 1, 1), "none"), ((2, 2, 2), "full")):
        cfg = tiny(**dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), shape)), **{"model.remat": remat})
        model, tx = task.build(cfg), optim.make(cfg, 5)[0]
        if not results:
            start = jax.jit(functools.partial(train_state.create, cfg, model, tx))(jax.random.key(0))
        mesh = sharding.make_mesh(cfg.mesh, jax.devices()[: np.prod(shape)])
        with jax.set_mesh(mesh):
            where = sharding.shardings_for(jax.eval_shape(lambda: start), mesh)
            given_ = jax.device_put(start, where), jax.device_put(batch, sharding.batch_sharding(mesh))
            state, metrics = jax.jit(step.make_step(cfg, model, tx, 5), out_shardings=(where, None))(*given_)
        results.append((jax.tree.map(float, metrics), dict(trees.paths(state.opt[0].mu))))
    (metrics, grads), (others, theirs_) = results
    assert metrics == pytest.approx(others, rel=1e-5) and metrics["no_negative"] == 0
    largest = max(np.abs(g).max() for g in grads.values())
    for path, x in grads.items():
        close(theirs_[path], x, 1e-5 * largest, path)


def test_it_starts_from_bert_and_a_tower_the_queries_feed_forwards_as_copies():
    cfg = tiny()
    shapes = jax.eval_shape(lambda: initial.init_params(cfg, task.build(cfg), jax.random.key(0)))
    fill = lambda path, x: np.full(x.shape, zlib.crc32(path.encode()) % 1000, np.float32)
    own = dict(trees.paths(shapes))
    lacks = re.compile(f"{task.NEW}|qformer/blocks/query_mlp.*")
    bert = {path.replace("qformer/", "med/"): x for path, x in own.items() if not lacks.fullmatch(path)}
    files = trees.nest((path, fill(path, x)) for path, x in bert.items())
    fitted = fit(files, shapes, "bert + tower", task.START, partial=True)
    assert not fitted.missing and set(fitted.random) == {path for path in own if re.fullmatch(task.NEW, path)}
    found = dict(trees.paths(fitted.params))
    assert found["vit/pos_embed"].flat[0] == zlib.crc32(b"vit/pos_embed") % 1000
    for twin in ("mlp/fc1/kernel", "mlp_ln/scale"):
        np.testing.assert_array_equal(found[f"qformer/blocks/query_{twin}"], found[f"qformer/blocks/{twin}"])
    first = trees.nest((path, fill(path, x)) for path, x in own.items())  # of a first stage all as it is
    same = dict(trees.paths(fit(first, shapes, "first stage", task.START).params))
    assert same.keys() == own.keys()
    assert all(x.flat[0] == zlib.crc32(path.encode()) % 1000 for path, x in same.items() if x.size)


@pytest.mark.parametrize(
    "leaves, expected",
    [
        ({"task.negatives": "hard"}, "task.negatives is 'hard': choose one of masked, floored"),
        ({"model.qformer.layers": 3}, "every second layer looks at the image, so that they are even: set 4"),
        ({"model.qformer.queries": 0}, "it must be at least 1, as 32 of the paper"),
        ({"task.lm_group": 5}, "task.lm_group is 5: it must divide the micro-batch of 16 examples, as 4,"),
        ({"task.eval_len": 90}, "at most model.qformer.positions = 40"),
        ({"loss.momentum": True}, "BLIP-2 has no momentum encoder: set loss.momentum=False"),
        ({"model.qformer.vocab_size": 118}, "has 119 entries with [DEC]: set model.qformer.vocab_size=119"),
        ({"model.qformer.positions": 7}, "text.max_len is 8 but the text model has model.qformer.positions = 7"),
    ],
)
def test_settings_that_do_not_fit(tiny_vocab, leaves, expected):
    cfg = tiny(**{"text.vocab": str(tiny_vocab), **leaves})
    with cfg.data.unlocked():
        cfg.data.train.world = config.source("scenes", count=64, size=32)
    with pytest.raises(ValueError, match="the config has") as found:
        tasks.validate(cfg, Tokenizer(tiny_vocab))
    assert expected in str(found.value)


def test_a_config_of_another_model_is_told_where_to_begin():
    assert "config.blip2('eva_g')" in task.check(config.base("tiny"))[0]


def test_a_run_on_scenes_resumes_bit_for_bit_and_is_evaluated(tiny_vocab, tmp_path, capsys):
    cfg = tiny(**{"text.vocab": str(tiny_vocab), "task.eval_len": 14, "eval.k": 4, "task.image_ids": True})
    with cfg.data.unlocked():
        cfg.data.train.world = config.source("scenes", count=64, size=32)
        cfg.data.eval.world = config.source("scenes", count=8, size=32, seed=1)
    cfg.data.threads = cfg.data.prefetch = 2
    cfg.train.update(steps=2, log_every=1, save_every=1)
    cfg.eval.loss_examples = 0
    out = loop.fit(cfg, tmp_path / "run")
    assert out["eval"]["images"] == 8 and np.isfinite(out["log"]["loss"])
    assert "frozen" in capsys.readouterr().out
    saved = leaves(tmp_path / "run")
    assert "query_tokens" in saved and "vit/pos_embed" not in saved

    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "2")
    assert loop.fit(cfg, tmp_path / "cut")["step"] == 2
    assert leaves(tmp_path / "cut") == saved and rows(tmp_path / "cut") == rows(tmp_path / "run")
    assert evaluation.evaluate(cfg, tmp_path / "run") == out["eval"]
