"""Captioner fine-tuning: the loss word by word, what it trains, and runs that start from a pre-training checkpoint."""

import functools
import shutil

import jax
import numpy as np
import pytest
from world.runs import begun, rows

from blip_jax import checkpoint, config, tasks, trees
from blip_jax.models import initial
from blip_jax.tasks import caption
from blip_jax.tasks.step import Keys
from blip_jax.train import loop, start

B, T, SIZE, VOCAB, PROMPT = 6, 9, 16, 60, 4


def settings(**leaves):
    cfg = config.base("tiny")
    with cfg.unlocked():
        cfg.objective = "caption"
        cfg.model.vit.update(width=32, depth=1, heads=4, mlp=64, patch=8)
        cfg.model.med.update(width=32, layers=1, heads=4, mlp=64, positions=16, vocab_size=VOCAB)
        cfg.model.update(img_size=SIZE, embed_dim=16, dtype="float32", dropout=0.0)
        cfg.text.max_len = T
    cfg.update_from_flattened_dict(leaves)
    return cfg


def make_batch():
    """Texts of 6 to 9 tokens of which the first four are [CLS] and prompt; padding holds ids that must not matter."""
    rng = np.random.default_rng(0)
    txt_mask = np.arange(T) < np.array([6, 7, 8, 9, 6, 9])[:, None]
    return {
        "img": rng.normal(size=(B, SIZE, SIZE, 3)).astype(np.float32),
        "ids": rng.integers(5, 58, (B, T)).astype(np.int32),
        "txt_mask": txt_mask,
        "lm_mask": txt_mask & (np.arange(T) >= PROMPT),
    }


def loss_of(cfg, model):
    """The loss as a compiled function of parameters and batch."""
    keys = Keys(jax.random.key(0), jax.random.key(0), 0)
    return jax.jit(lambda params, batch: caption.loss(model, cfg, params, None, batch, keys))


def word_by_word(logits, batch, over, smoothing=0.1):
    """Torch's label-smoothed cross-entropy with ignored targets, as written in its manual.

    `all` is as torch 1.10 had it.
    """
    nll, smooth, smooth_everywhere = [], [], []
    for b in range(B):
        for t in range(1, T):  # the logits before it predict token t
            row = logits[b, t - 1, :VOCAB].astype(np.float64)
            log_prob = row - row.max() - np.log(np.sum(np.exp(row - row.max())))
            smooth_everywhere.append(-log_prob.mean())
            if PROMPT <= t < batch["txt_mask"][b].sum():
                nll.append(-log_prob[batch["ids"][b, t]])
                smooth.append(-log_prob.mean())
    assert len(nll) == (6 + 7 + 8 + 9 + 6 + 9) - 4 * B
    return (1 - smoothing) * np.mean(nll) + smoothing * np.mean(smooth if over == "valid" else smooth_everywhere)


@pytest.fixture(scope="module")
def captioner():
    """Model, parameters, and the loss with both forms of smoothing.

    The logits differ enough for every term to count.
    """
    cfg = settings()
    model = tasks.build(cfg)
    params = jax.jit(lambda key: initial.init_params(cfg, model, key))(jax.random.key(1))
    losses = {over: loss_of(settings(**{"loss.smoothing_over": over}), model) for over in ("valid", "all")}
    return model, jax.tree.map(lambda x: 3 * x, params), losses


@pytest.mark.parametrize("over", ["valid", "all"])
def test_loss_is_that_of_each_word_after_the_prompt(captioner, over):
    (model, params, losses), batch = captioner, make_batch()

    @jax.jit
    def logits(params, batch):
        apply = functools.partial(model.apply, {"params": params})
        kv = apply(apply(batch["img"], method="encode_image"), method="image_kv")
        return apply(batch["ids"], batch["txt_mask"], kv, method="lm_logits")

    loss, (metrics, features) = losses[over](params, batch)
    assert float(loss) == pytest.approx(word_by_word(np.asarray(logits(params, batch)), batch, over), rel=1e-5)
    assert set(metrics) == {"loss", "loss_lm"} and float(metrics["loss"]) == float(metrics["loss_lm"]) == float(loss)
    assert features == {}


def test_the_two_forms_of_smoothing_and_the_prompt_make_a_difference(captioner):
    (_, params, losses), batch = captioner, make_batch()
    value = lambda over, **change: float(losses[over](params, batch | change)[0])
    valid = value("valid")
    assert abs(valid - value("all")) > 1e-3
    assert abs(valid - value("valid", lm_mask=batch["txt_mask"])) > 1e-3
    other_padding = np.where(batch["txt_mask"], batch["ids"], 7)
    assert value("valid", ids=other_padding) == pytest.approx(valid, rel=1e-6)


def test_a_captioner_has_the_vit_and_the_decoder_and_nothing_else(captioner):
    params = captioner[1]
    assert set(params) == {"vit", "med"} and set(params["med"]) == {"embed", "blocks", "lm_head"}
    assert set(params["med"]["blocks"]) == {"cross_attn", "self_attn_dec", "mlp", "mlp_ln"}


def test_gradients_reach_the_vit_and_the_decoder_alone():
    """Of a pre-training model, whose text encoder, projections, matching head and temperature play no part."""
    cfg = settings(objective="pretrain")
    model = tasks.build(cfg)
    params = jax.jit(lambda key: initial.init_params(cfg, model, key))(jax.random.key(1))
    grads = dict(trees.paths(jax.jit(jax.grad(loss_of(cfg, model), has_aux=True))(params, make_batch())[0]))
    still = {path for path, g in grads.items() if not np.any(g)}
    heads = ("vision_proj", "text_proj", "itm_head", "temp")
    encoder = {path for path in grads if path.split("/")[0] in heads or "/self_attn/" in path}
    assert len(encoder) == 17 and still == encoder


# --- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pretrained")


@pytest.fixture
def pretrained(tiny_cfg, folder):
    """Workdir with the first checkpoint of a pre-training run, made by the first test that needs it."""
    tiny_cfg.train.steps = 2
    return folder / "run" if (folder / "run").exists() else begun(tiny_cfg, folder / "run")


def fine_tuning(tiny_cfg, objective, pretrained):
    """`tiny_cfg` as the captioner or filter that starts from `pretrained` at twice the image size."""
    tiny_cfg.objective, tiny_cfg.model.img_size, tiny_cfg.train.init_from = objective, 32, str(pretrained)
    if objective == "caption":
        tiny_cfg.text.prompt, tiny_cfg.text.max_len = "a picture of ", 14
    return tiny_cfg


def test_a_captioner_starts_from_pretraining_trains_and_resumes(tiny_cfg, pretrained, tmp_path, capsys):
    before = dict(trees.paths(checkpoint.load_params(pretrained)))
    cfg = fine_tuning(tiny_cfg, "caption", pretrained)
    cfg.train.log_every = cfg.train.save_every = 1
    assert loop.fit(cfg, tmp_path / "run")["step"] == 2
    said = capsys.readouterr().out
    for part in (
        "position table resized from 5 to 17",
        "have no place in this model and are left out: itm_head/bias",
        "parameters start from",
        "FLOPs: ",
        "loss_lm",
    ):
        assert part in said, part
    first, second = rows(tmp_path / "run")
    assert {k for k in first if "loss" in k} == {"train/loss", "train/loss_lm"} and "train/temp" not in first
    assert first["train/loss"] == first["train/loss_lm"] > 0

    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "2")  # as a kill in the second step would have left it
    assert loop.fit(cfg, tmp_path / "cut")["step"] == 2
    assert "resumed at step 1" in capsys.readouterr().out
    assert rows(tmp_path / "cut") == [first, second]
    whole, resumed = (dict(trees.paths(checkpoint.load_params(tmp_path / name))) for name in ("run", "cut"))
    assert whole.keys() == resumed.keys() < before.keys()
    for path, x in whole.items():
        np.testing.assert_array_equal(x, resumed[path], err_msg=path)
        if path != "vit/pos_embed":  # two steps in the warm-up move nothing far from where pre-training left it
            assert np.abs(x - before[path]).max() < 0.01, path


def test_a_filter_starts_from_pretraining_at_another_image_size(tiny_cfg, pretrained, tmp_path):
    before = dict(trees.paths(checkpoint.load_params(pretrained)))
    run = loop.prepare(fine_tuning(tiny_cfg, "retrieval", pretrained), tmp_path / "run")
    with jax.set_mesh(run.mesh):
        state = jax.device_get(start.create(run, start.load(run)))
    after = dict(trees.paths(state.params))
    assert state.extra["params"]["vit"]["pos_embed"].shape == after["vit/pos_embed"].shape == (17, 48)
    assert {path for path in before if path not in after} == {
        path for path in before if path.startswith("med/lm_head") or "self_attn_dec" in path
    }
    for path in after:
        if path != "vit/pos_embed":
            np.testing.assert_array_equal(after[path], before[path], err_msg=path)


def test_parameters_of_another_vocabulary_are_refused(tiny_cfg, pretrained, tmp_path):
    words = open(tiny_cfg.text.vocab).read().rstrip("\n").split("\n")
    (tmp_path / "other.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]) + "\n")
    cfg = fine_tuning(tiny_cfg, "caption", pretrained)
    cfg.text.vocab = str(tmp_path / "other.txt")
    said = f"another vocabulary than .*other.txt: set text.vocab .--vocab. to {pretrained / 'vocab.txt'}"
    with pytest.raises(ValueError, match=f"trained with {said}"):
        loop.fit(cfg, tmp_path / "run")
