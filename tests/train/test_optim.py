"""Optimiser: torch's AdamW written out, the original's schedules by hand, decay masks and frozen parts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax import trees
from blip_jax.config import base
from blip_jax.train import optim


def config(**leaves):
    c = base("tiny")
    c.train.steps = 100
    c.optim.update(dict(warmup_steps=0, lr=1e-2, min_lr=1e-4) | leaves)
    return c


def params():
    rng = np.random.default_rng(0)
    return {
        "vit": {"fc": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}, "cls": rng.normal(size=4)},
        "temp": np.float64(0.07),
    }


def torch_adamw(p, grads, lr, b1=0.9, b2=0.999, eps=1e-8, decay=0.05):
    """The update of torch.optim.AdamW in float64, in its order: decay, moments, bias-corrected step."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        p = p * (1 - lr * decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - lr / (1 - b1**t) * m / (np.sqrt(v) / math.sqrt(1 - b2**t) + eps)
    return p


def run(cfg, grads):
    tx, _ = optim.make(cfg, 1000)
    p = jax.tree.map(jnp.float32, params())
    state = tx.init(p)
    for g in grads:
        updates, state = tx.update(jax.tree.map(jnp.float32, g), state, p)
        p = jax.tree.map(jnp.add, p, updates)
    return p


def gradients(n=5):
    rng = np.random.default_rng(1)
    return [jax.tree.map(lambda x: rng.normal(size=np.shape(x)), params()) for _ in range(n)]


@pytest.mark.parametrize(
    "mask, undecayed", [("all", ()), ("weights", ("vit/fc/bias",)), ("kernels", ("vit/fc/bias", "vit/cls", "temp"))]
)
def test_adamw_is_torchs(mask, undecayed):
    grads = gradients()
    got = dict(trees.paths(run(config(schedule="constant", decay_mask=mask), grads)))
    for path, p in trees.paths(params()):
        mine = [dict(trees.paths(g))[path] for g in grads]
        want = torch_adamw(p, mine, 1e-2, decay=0.0 if path in undecayed else 0.05)
        np.testing.assert_allclose(got[path], want, rtol=2e-6, atol=2e-7, err_msg=path)


def test_the_class_token_of_clip_does_not_decay_as_weights():
    """In LAVIS it has one dimension there, in EVA's tower three."""
    eva = {"vit": {"cls": np.zeros(3), "pos_embed": np.zeros((2, 3)), "blocks": {"ln1": {"scale": np.zeros((1, 3))}}}}
    clip = {"vit": eva["vit"] | {"ln_pre": {"scale": np.zeros(3)}}}
    decays = lambda params: dict(trees.paths(optim.decay_mask("weights")(params)))
    assert decays(eva) == {"vit/cls": True, "vit/pos_embed": True, "vit/blocks/ln1/scale": False}
    assert decays(clip) == decays(eva) | {"vit/cls": False, "vit/ln_pre/scale": False}


def test_clipping_is_off_by_default_and_scales_the_whole_gradient():
    grads = gradients(1)
    norm = math.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(grads[0])))
    big = jax.tree.map(lambda x: 1e3 * x, grads[0])
    clipped = run(config(schedule="constant", clip=norm, eps=1.0), [big])
    plain, unclipped = (run(config(schedule="constant", eps=1.0), [g]) for g in (grads[0], big))
    for a, b, c in zip(*map(jax.tree.leaves, (clipped, plain, unclipped))):
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert np.abs(np.asarray(a) - np.asarray(c)).max() > 1e-4


def test_epoch_decay_with_warmup_only_in_the_first_epoch():
    """Reference: lr(e) = max(min, lr 0.9^e); in epoch 0 min(lr, warmup_lr + (lr - warmup_lr) i / warmup_steps)."""
    cfg = config(schedule="epoch_decay", warmup_steps=15, warmup_lr=1e-6, decay_rate=0.9, min_lr=8e-3)
    lr = optim.schedule(cfg, 10)
    want = [1e-6 + (1e-2 - 1e-6) * i / 15 for i in range(10)] + [9e-3] * 10 + [8.1e-3] * 10 + [8e-3] * 10
    np.testing.assert_allclose([lr(i) for i in range(40)], want, rtol=1e-5)
    short = optim.schedule(config(schedule="epoch_decay", warmup_steps=4, warmup_lr=1e-6), 10)
    np.testing.assert_allclose([short(i) for i in (3, 4, 9)], [1e-6 + (1e-2 - 1e-6) * 3 / 4, 1e-2, 1e-2], rtol=1e-5)


def test_epoch_cosine_changes_once_per_epoch():
    lr = optim.schedule(config(schedule="epoch_cosine"), 30)  # 100 steps: 4 epochs, the last one cut
    want = [(1e-2 - 1e-4) * 0.5 * (1 + math.cos(math.pi * e / 4)) + 1e-4 for e in range(4)]
    np.testing.assert_allclose(
        [lr(i) for i in (0, 29, 30, 60, 99)], [want[0], want[0], want[1], want[2], want[3]], rtol=1e-5
    )


def test_cosine_per_step_after_its_warmup_and_constant():
    lr = optim.schedule(config(schedule="cosine", warmup_steps=20, warmup_lr=0.0), 10)
    np.testing.assert_allclose(lr(10), 5e-3, rtol=1e-5)
    np.testing.assert_allclose(lr(20), 1e-2, rtol=1e-5)
    np.testing.assert_allclose(lr(60), (1e-2 + 1e-4) / 2, rtol=1e-5)
    np.testing.assert_allclose(lr(100), 1e-4, rtol=1e-4)
    constant = optim.schedule(config(schedule="constant", warmup_steps=2, warmup_lr=0.0), 10)
    np.testing.assert_allclose([constant(i) for i in (0, 1, 2, 99)], [0, 5e-3, 1e-2, 1e-2], rtol=1e-5)


@pytest.mark.parametrize(
    "leaf, value, epoch_steps", [("schedule", "linear", 10), ("decay_mask", "none", 10), ("schedule", "cosine", 0)]
)
def test_wrong_settings_are_errors(leaf, value, epoch_steps):
    with pytest.raises(ValueError, match="epoch_steps is 0" if epoch_steps == 0 else value):
        optim.make(config(**{leaf: value}), epoch_steps)


def test_split_and_merge_are_inverse():
    p = params()
    trained, frozen = trees.split(p, ("vit/fc/.*", "temp"))
    assert dict(trees.paths(trained)).keys() == {"vit/cls"}
    assert dict(trees.paths(frozen)).keys() == {"vit/fc/kernel", "vit/fc/bias", "temp"}
    back = dict(trees.paths(trees.merge(trained, frozen)))
    assert all(back[path] is leaf for path, leaf in trees.paths(p)) and len(back) == 4
    assert trees.split(p, ()) == (p, {})


def test_split_and_merge_errors():
    with pytest.raises(ValueError, match="'vit/f' .*|vit/f"):
        trees.split(params(), ("temp", "vit/f"))  # matches in full, not a part
    with pytest.raises(ValueError, match="nothing is left to train"):
        trees.split(params(), (".*",))
    with pytest.raises(ValueError, match="share"):
        trees.merge({"a": {"b": 1}}, {"a": {"b": 2}})


def test_factors_scale_the_step_and_its_decay_layer_by_layer():
    grads = gradients()
    fast = dict(trees.paths(run(config(schedule="constant"), grads)))
    mixed = (("vit/fc/kernel", (0.5, 0.25, 1.0, 0.75)), ("vit/.*", 0.1))
    got = dict(trees.paths(run(config(schedule="constant", lr_factors=mixed), grads)))
    for path, p in trees.paths(params()):
        mine = [dict(trees.paths(g))[path] for g in grads]
        if path == "vit/fc/kernel":
            want = np.stack(
                [torch_adamw(p[i], [g[i] for g in mine], 1e-2 * f) for i, f in enumerate((0.5, 0.25, 1.0, 0.75))]
            )
        else:
            want = torch_adamw(p, mine, 1e-3 if path.startswith("vit/") else 1e-2)
        np.testing.assert_allclose(got[path], want, rtol=2e-6, atol=2e-7, err_msg=path)
    np.testing.assert_array_equal(got["temp"], fast["temp"])


def test_factors_that_match_nothing_or_another_number_of_layers_are_errors():
    with pytest.raises(ValueError, match=r"\['vit/f'\] match no trained parameter; they must match in full"):
        optim.factors(params(), (("vit/.*", 0.5), ("vit/f", 0.5)))
    with pytest.raises(
        ValueError, match=r"2 factors for vit/fc/kernel, which is \[4, 3\]: give a number, or one for each layer"
    ):
        optim.factors(params(), (("vit/fc/kernel", (0.5, 0.5)),))
    with pytest.raises(ValueError, match=r"1 factors for temp, which is \[\]"):
        optim.factors(params(), (("temp", (0.5,)),))
