"""Losses against plain numpy, negatives against their distribution, queue and momentum by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax import losses
from blip_jax.tasks import momentum


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_itc_with_queue_soft_targets_and_groups_against_loops(rng):
    B, g, E, K, temp, alpha = 6, 3, 5, 4, 0.1, 0.3
    unit = lambda *shape: (lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True))(rng.normal(size=shape))
    img, txt, img_m, txt_m, img_q, txt_q = unit(B, E), unit(B, E), unit(B, E), unit(B, E), unit(K, E), unit(K, E)
    expected = []
    for a, a_m, cols, queue in ((img, img_m, txt_m, txt_q), (txt, txt_m, img_m, img_q)):
        for b in range(B):
            group = slice(b // g * g, b // g * g + g)
            candidates = np.concatenate([cols[group], queue])
            target = alpha * softmax(a_m[b] @ candidates.T / temp) + (1 - alpha) * (np.arange(g + K) == b % g)
            expected.append(-(target * np.log(softmax(a[b] @ candidates.T / temp))).sum())
    G = lambda x: losses.grouped(jnp.asarray(x), g)
    sims = [
        jnp.concatenate([losses.similarity(G(a), G(c), temp), losses.queue_similarity(G(a), jnp.asarray(q), temp)], -1)
        for a, c, q in ((img, txt_m, txt_q), (txt, img_m, img_q), (img_m, txt_m, txt_q), (txt_m, img_m, img_q))
    ]
    positive = jnp.broadcast_to(jnp.eye(g, g + K, dtype=bool), sims[0].shape)
    ours = losses.itc(*sims[:2], *(losses.itc_targets(positive, s, alpha) for s in sims[2:]))
    np.testing.assert_allclose(ours, np.mean(expected), rtol=1e-5)


def test_itc_targets_share_several_positives_and_pass_no_gradient(rng):
    positive = jnp.asarray([[[True, True, False], [False, True, False]]])
    np.testing.assert_allclose(losses.itc_targets(positive, None, 0.4), [[[0.5, 0.5, 0], [0, 1, 0]]])
    sim = jnp.asarray(rng.normal(size=(1, 2, 3)), jnp.float32)
    assert not np.any(jax.grad(lambda s: (losses.itc_targets(positive, s, 0.4) * sim).sum())(sim))


def test_hard_negatives_follow_their_weights_and_never_take_a_positive(rng):
    sim = jnp.asarray(rng.normal(size=(2, 4, 4)), jnp.float32)
    positive = jnp.broadcast_to(jnp.eye(4, dtype=bool), sim.shape)
    weights = losses.hard_negative_weights(sim, positive, 1e-4)
    expected = np.where(positive, 0, softmax(np.asarray(sim)) + 1e-4)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    draws = np.asarray(
        jax.jit(jax.vmap(lambda k: losses.draw_negatives(k, weights)))(jax.random.split(jax.random.key(0), 4000))
    )
    assert (draws // 4 == np.arange(8) // 4).all()  # within the row's group
    for row in range(8):
        p = expected.reshape(8, 4)[row] / expected.reshape(8, 4)[row].sum()
        count = np.bincount(draws[:, row] % 4, minlength=4)
        assert count[row % 4] == 0
        kept = p > 0
        chi2 = ((count[kept] - 4000 * p[kept]) ** 2 / (4000 * p[kept])).sum()
        assert chi2 < 18.4  # chance 1e-4 at 2 degrees of freedom


def test_negatives_belong_to_the_row_not_to_the_batch():
    weights = jnp.ones((2, 4, 4))
    whole = losses.draw_negatives(jax.random.key(3), weights)
    second_half = losses.draw_negatives(jax.random.key(3), weights[1:], first_row=4)
    np.testing.assert_array_equal(whole[4:] - 4, second_half)


def test_a_row_of_positives_alone_has_no_negative_and_no_weight_in_itm():
    weights = jnp.asarray([[[0.0, 0.0], [1.0, 0.0]]])
    np.testing.assert_array_equal(losses.draw_negatives(jax.random.key(0), weights), [-1, 0])
    logits, labels = jnp.asarray([[2.0, 0.0], [0.0, 1.0]]), jnp.asarray([0, 0])
    loss, accuracy = losses.itm(logits, labels, jnp.asarray([1.0, 0.0]))
    np.testing.assert_allclose(loss, np.log1p(np.exp(-2.0)), rtol=1e-6)
    assert accuracy == 1.0


@pytest.mark.parametrize("over", ["valid", "all"])
@pytest.mark.parametrize("group_size", [0, 2])
def test_lm_forms_against_loops_with_padded_vocabulary(rng, over, group_size):
    B, T, V, pad, s = 4, 5, 7, 9, 0.1
    logits = rng.normal(size=(B, T, pad)).astype(np.float32)
    logits[..., V:] = np.finfo(np.float32).min
    targets, mask = rng.integers(0, V, (B, T)), np.arange(T) < np.array([5, 2, 3, 4])[:, None]
    logp = np.log(softmax(logits[..., :V].astype(np.float64)))
    nll, smooth = -np.take_along_axis(logp, targets[..., None], -1)[..., 0], -logp.mean(-1)
    means = []
    for rows in np.split(np.arange(B), B // (group_size or B)):
        m = mask[rows]
        smooth_mean = smooth[rows][m].mean() if over == "valid" else smooth[rows].mean()
        means.append((1 - s) * nll[rows][m].mean() + s * smooth_mean)
    ours = losses.lm(
        jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(mask), V, smoothing=s, over=over, group_size=group_size
    )
    np.testing.assert_allclose(ours, np.mean(means), rtol=1e-5)


def test_queue_fills_in_order_and_wraps():
    queue = momentum.init_queue(jax.random.key(0), 6, 2, image_ids=True)
    np.testing.assert_allclose(np.linalg.norm(queue["img"], axis=-1), 1, rtol=1e-6)
    assert np.abs(queue["img"] - queue["txt"]).max() > 0.1 and (queue["image_id"] == -100).all()
    for step in range(4):  # the fourth batch of two lands on the first
        rows = jnp.full((2, 2), step, jnp.float32)
        queue = momentum.enqueue(queue, {"img": rows, "txt": -rows, "image_id": jnp.full(2, step)})
    np.testing.assert_array_equal(queue["img"][:, 0], [3, 3, 1, 1, 2, 2])
    np.testing.assert_array_equal(queue["txt"][:, 0], [-3, -3, -1, -1, -2, -2])
    np.testing.assert_array_equal(queue["image_id"], [3, 3, 1, 1, 2, 2])
    assert int(queue["ptr"]) == 2


def test_momentum_copies_hold_no_decoder():
    layer = {"self_attn": 1, "self_attn_dec": 2, "cross_attn": 3, "mlp": 4}
    params = {
        "vit": 1,
        "med": {"embed": 2, "blocks": layer, "lm_head": 3},
        "vision_proj": 4,
        "text_proj": 5,
        "itm_head": 6,
        "temp": 7,
    }
    kept = momentum.momentum_params(params)
    assert kept == {
        "vit": 1,
        "med": {"embed": 2, "blocks": {"self_attn": 1, "cross_attn": 3, "mlp": 4}},
        "vision_proj": 4,
        "text_proj": 5,
    }
    assert momentum.ema({"a": 2.0}, {"a": 4.0}, 0.75) == {"a": 2.5}
