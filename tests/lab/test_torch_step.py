"""The PyTorch step that ours is timed against computes what the original computes: goldens of one step and of three."""

import functools
import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from blip_jax import config

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[peers]'")
import against_torch  # noqa: E402
import torch_step  # noqa: E402

from blip_jax.bench import train  # noqa: E402

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "blip"


def golden(name):
    """(config of the golden's sizes, its inputs and outputs)"""
    s = json.loads((GOLDEN / name / "meta.json").read_text())["config"]
    cfg = config.base("tiny")
    with cfg.unlocked():
        cfg.model.vit.update(width=s["vw"], depth=s["vdepth"], heads=s["vheads"], mlp=4 * s["vw"], patch=s["patch"])
        cfg.model.med.update(
            width=s["tw"], layers=s["tl"], heads=s["th"], mlp=s["ti"], positions=s["pos"], vocab_size=s["vocab"]
        )
        cfg.model.update(img_size=s["img"], embed_dim=s["embed"], dropout=0.0, dtype="float32")
        cfg.loss.update(queue=s["queue"])
        cfg.text.max_len, cfg.train.batch = s["L"], s["B"]
    return cfg, np.load(GOLDEN / name / "io.npz")


@functools.cache
def weights():
    return {
        k: x
        for k, x in load_file(GOLDEN / "pretrain" / "weights.safetensors").items()
        if not k.endswith("position_ids")
    }


def arguments(io, suffix=""):
    """(batch, draw) of a golden; `draw` gives its negatives and keeps the weights that it was shown."""
    shown, answers = [], [torch.from_numpy(io[f"neg_{side}_idx{suffix}"]) for side in ("image", "text")]

    def draw(w):
        shown.append(w.numpy())
        return answers[len(shown) - 1]

    return (
        (io["image" + suffix].transpose(0, 2, 3, 1), io["input_ids" + suffix], io["attention_mask" + suffix] > 0),
        draw,
        shown,
    )


def test_losses_gradients_and_weights_are_the_goldens():
    cfg, io = golden("pretrain")
    step = torch_step.Step(cfg, weights())
    batch, draw, shown = arguments(io)
    losses, _ = step.gradients(step.batch(*batch), float(io["alpha"]), draw)
    for name, x in losses.items():
        assert abs(x.item() - float(io[name])) <= 1e-5, name
    np.testing.assert_allclose(shown, [io["weights_t2i"], io["weights_i2t"]], rtol=0, atol=1e-5)
    found = dict(step.net.named_parameters())
    names = [k.removeprefix("grad/") for k in io.files if k.startswith("grad/")]
    assert set(names) == {name for name, p in found.items() if p.requires_grad}
    for name in names:
        want, have = io["grad/" + name], found[name].grad.numpy()
        if name.endswith("key.bias"):  # exactly zero: what is stored is rounding noise
            assert max(np.abs(want).max(), np.abs(have).max()) < 1e-5
        else:
            np.testing.assert_allclose(have, want, rtol=0, atol=1e-4 * np.abs(want).max(), err_msg=name)


def test_three_steps_move_momentum_queue_and_parameters_as_the_golden():
    cfg, io = golden("pretrain_3steps")
    step = torch_step.Step(cfg, weights())
    for i in range(3):
        batch, draw, _ = arguments(io, str(i))
        losses = step(step.batch(*batch), alpha=0.1 * i, lr=1e-3, draw=draw)
        np.testing.assert_allclose(
            [float(losses[n]) for n in ("loss_itc", "loss_itm", "loss_lm")], io["losses"][i], rtol=0, atol=1e-5
        )
    state = step.net.state_dict()
    for name in (
        "image_queue",
        "text_queue",
        "queue_ptr",
        "visual_encoder_m.cls_token",
        "text_proj_m.weight",
        "text_proj.weight",
    ):
        np.testing.assert_allclose(state[name].numpy(), io["after/" + name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "leaf, value",
    [
        ("loss.group_size", 2),
        ("loss.smoothing_over", "all"),
        ("objective", "caption"),
        ("loss.queue", 0),
        ("optim.accumulate", 2),
    ],
)
def test_a_config_that_the_originals_step_cannot_run_is_refused(leaf, value):
    cfg, _ = golden("pretrain")
    with cfg.unlocked():
        cfg.update_from_flattened_dict({leaf: value})
    with pytest.raises(ValueError, match=leaf):
        against_torch.check([cfg], train.Settings())
