"""Language modelling on captions alone: rows, loss, and what a second stage takes from it."""

import jax
import numpy as np
import pytest
from world import jitted

from blip_jax import config, tasks
from blip_jax.config import source
from blip_jax.data.scenes.world import vocab_captions
from blip_jax.data.text.bpe import Tokenizer, train_bpe
from blip_jax.models import initial
from blip_jax.tasks import language, step


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "vocab.json"
    train_bpe(vocab_captions(300), 300, path)
    return Tokenizer(path)


def small(llm="opt"):
    c = config.blip2("eva_tiny", "tiny", {"opt": "opt_tiny", "t5": "flant5_tiny"}[llm]).unlock()
    c.objective, c.optim.freeze = "language", ()
    c.model.dtype, c.model.llm_dropout = "float32", 0.0
    c.model.init_std = 0.3
    c.text.max_len, c.train.batch, c.train.steps = 12, 3, 4
    c.data.train.world = source("scenes", count=8, size=32)
    return c


def batch_of(cfg, tokenizer):
    texts = ("a red ring", "two blue hearts on a grey background", "a star")
    rows = [
        language.example({"key": "k", "image": b"", "captions": [t]}, np.random.default_rng(0), cfg, tokenizer)
        for t in texts
    ]
    assert all("img" not in row for row in rows)
    found = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "notes"}
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (shape, np.dtype(dtype)) for name, (shape, dtype) in language.shapes(cfg).items()
    }
    return found


def created(cfg, model):
    return jax.jit(lambda key: initial.init_params(cfg, model, key))(jax.random.key(0))


def loss_of(cfg, model, params, batch):
    """What the task's loss returns of a batch."""
    keys = step.Keys(jax.random.key(1), None, 0)
    return jax.jit(lambda params, batch: language.loss(model, cfg, params, None, batch, keys))(params, batch)


def test_each_token_is_told_from_those_before_it_alone(tokenizer):
    """The loss is the mean of -log p of every token behind the first and before the padding; a later word changes no
    earlier one's."""
    cfg = small()
    batch, model = batch_of(cfg, tokenizer), language.build(cfg)
    params = created(cfg, model)
    assert params.keys() == {"llm"}
    logits = np.asarray(jitted.apply(model, params, "target_logits", batch["ids"], batch["txt_mask"]))
    loss, (metrics, found) = loss_of(cfg, model, params, batch)
    p = np.asarray(jax.nn.log_softmax(logits))
    targets, real = batch["ids"][:, 1:], batch["txt_mask"][:, 1:]
    told = np.take_along_axis(p, targets[..., None], -1)[..., 0]
    assert loss == pytest.approx(-told[real].mean(), rel=1e-5) and metrics["loss_lm"] == loss and found == {}

    other = batch["ids"].copy()
    other[:, 5] = (other[:, 5] + 1) % 256
    changed = np.asarray(jitted.apply(model, params, "target_logits", other, batch["txt_mask"]))
    np.testing.assert_allclose(changed[:, :5], logits[:, :5], atol=1e-5)
    assert np.abs(changed[:, 5] - logits[:, 5]).max() > 1e-2


def test_a_text_of_opt_are_all_captions_of_a_record_each_with_its_end(tokenizer):
    cfg, told = small(), ["a red ring", "a star", "two hearts"]
    cfg.text.max_len = 60
    draw = lambda seed: language.example(
        {"key": "k", "image": b"", "captions": told}, np.random.default_rng(seed), cfg, tokenizer
    )
    rows = [draw(seed) for seed in range(12)]
    texts = {tokenizer.decode(row["ids"][row["txt_mask"]]) for row in rows}
    assert len(texts) > 2 and {tuple(sorted(text.split("\n"))) for text in texts} == {tuple(sorted(told))}
    for row in rows:
        last = row["ids"][row["txt_mask"]][-1]
        assert last == tokenizer.newline and (row["lm_mask"] == row["txt_mask"]).all()


def test_t5_writes_behind_what_it_reads():
    cfg, rng = small("t5"), np.random.default_rng(0)
    model, ids = language.build(cfg), rng.integers(3, 140, (2, 3, 6)).astype(np.int32)
    mask = np.arange(6) < np.array([6, 4, 2])[:, None]
    batch = {"ids": ids[0], "txt_mask": mask, "out_ids": ids[1], "out_mask": mask[::-1]}
    params = created(cfg, model)
    say = lambda b: np.asarray(jitted.apply(model, params, "target_logits", *b.values()))
    loss, _ = loss_of(cfg, model, params, batch)
    told = np.take_along_axis(np.asarray(jax.nn.log_softmax(say(batch))), ids[1][..., None], -1)[..., 0]
    assert loss == pytest.approx(-told[mask[::-1]].mean(), rel=1e-5)

    later, read = ids[1].copy(), ids[0].copy()
    later[:, 3] = (later[:, 3] + 1) % 140
    read[:, 0] = (read[:, 0] + 1) % 140
    np.testing.assert_allclose(say(batch | {"out_ids": later})[:, :4], say(batch)[:, :4], atol=1e-5)
    assert np.abs(say(batch | {"ids": read}) - say(batch))[..., :140].max() > 1e-2


def test_its_settings_are_checked(tokenizer):
    cfg = small()
    cfg.text.vocab = str(tokenizer.path)
    tasks.validate(cfg, tokenizer)
    cfg.text.prompt = "a photo of"
    with pytest.raises(ValueError, match="text.prompt is 'a photo of' but objective is language"):
        tasks.validate(cfg, tokenizer)
    cfg.text.prompt, cfg.eval.loss_examples, cfg.data.eval.world = "", 0, source("scenes", count=8, size=32)
    with pytest.raises(ValueError, match="is evaluated by its loss alone, and eval.loss_examples is 0: raise it"):
        tasks.validate(cfg, tokenizer)
    counted = language.flops(small())
    assert counted["step"] == 3 * counted["forward"] == 3 * (counted["llm"] + counted["lm_head"])
