"""The loss on held-out examples: every task's own, of each example once, and the state stays as it is."""

import functools
import os
import signal
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from world import jitted, mini
from world import language as worlds
from world.runs import rows

from blip_jax import config, tasks
from blip_jax.config import source
from blip_jax.data import image
from blip_jax.data.evaluation import HeldOut
from blip_jax.data.formats import open_source
from blip_jax.data.source import BadRecord
from blip_jax.data.text import tokenizers
from blip_jax.models.vision.vit import normalize_pixels
from blip_jax.parallel import sharding
from blip_jax.tasks import blip2_stage1, blip2_vqa, nlvr, step
from blip_jax.train import evaluation, loop, optim
from blip_jax.train import state as train_state
from blip_jax.train.validation import Validation

PARTS = {
    "pretrain": {"loss_itc", "loss_itm", "loss_lm"},
    "retrieval": {"loss_itc", "loss_itm"},
    "blip2_stage1": {"loss_itc", "loss_itm", "loss_lm"},
    **dict.fromkeys(("caption", "blip2_stage2", "blip2_vqa", "language"), {"loss_lm"}),
    **dict.fromkeys(("vqa", "nlvr", "dialog"), set()),
}
EPOCH, STEP = 4, 3  # steps of an epoch; the step of the state


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return mini.write(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    return worlds.vocabularies(tmp_path_factory.mktemp("vocabularies"))


@pytest.fixture
def settings(tiny_cfg, pictures, vocabularies):
    """objective -> the tiny config of a run of batches of 16, with dropout and held-out examples."""

    def make(objective: str) -> ConfigDict:
        cfg = tiny_cfg
        if objective in mini.SOURCES:
            mini.settings(cfg, objective, pictures)
        elif objective == "blip2_stage1":
            cfg = config.blip2("eva_tiny", "tiny").unlock()
            cfg.task = blip2_stage1.leaves()
        elif objective != "pretrain":
            cfg = worlds.tiny("opt", **{"text.vocab": str(vocabularies["opt"]), "model.llm_dropout": 0.1})
            cfg.objective = objective
        if objective.startswith("blip2") or objective == "language":
            cfg.model.update(img_size=16, embed_dim=16, dtype="float32", dropout=0.1)
            cfg.model.qformer.vocab_size = 119  # of tiny_vocab, with [DEC]
        if objective not in mini.SOURCES:
            with cfg.data.unlocked():
                cfg.data.train.world = cfg.data.eval.world = source("scenes", count=26, size=32, captions=2)
        if objective == "blip2_vqa":
            cfg.text.update(vocab=f"{cfg.text.vocab},{tiny_cfg.text.vocab}", prompt="{}", max_len=16)
            cfg.task = blip2_vqa.leaves()
            files = mini.found(pictures, "vqa", "vqa", "vqa/official/v2_*val2014*.json")
            cfg.data.train = cfg.data.eval = ConfigDict({"mini": files})
        elif "llm" in cfg.model and not len(cfg.model.llm):
            cfg.text.vocab = tiny_cfg.text.vocab
        cfg.optim.freeze = cfg.optim.freeze if objective != "language" else ()
        cfg.data.threads = cfg.data.prefetch = 2
        cfg.train.batch = cfg.eval.loss_examples = 16
        cfg.train.steps = cfg.train.steps or 6
        return cfg

    return make


def state_of(cfg):
    """A state at step STEP whose arrays are random, a different one for each leaf, without compiling."""
    model, rng = tasks.build(cfg), np.random.default_rng(0)
    fresh = lambda: train_state.create(cfg, model, optim.make(cfg, EPOCH)[0], jax.random.key(cfg.seed))

    def leaf(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(cfg.seed)
        made = rng.normal(0, 0.2, x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape)
        return jnp.asarray(made.astype(x.dtype))

    state = jax.tree.map(leaf, jax.eval_shape(fresh)).replace(step=jnp.int32(STEP))
    if "temp" in state.params:
        state.params["temp"] = jnp.float32(0.07)
    return state


def bits(state) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state.replace(rng=jax.random.key_data(state.rng)))]


def held_out(cfg, tmp_path) -> HeldOut:
    tokenizer = tokenizers.of_config(cfg)
    return HeldOut(cfg, tokenizer, tasks.of(cfg), cfg.data.eval, skipped_path=tmp_path / "skipped.jsonl")


def measured(cfg, state, tmp_path, devices: int = 1) -> dict:
    """What a validation finds on so many devices."""
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:devices])
    state = jax.device_put(state, sharding.shardings_for(jax.eval_shape(lambda: state), mesh))
    return Validation(held_out(cfg, tmp_path)).losses(cfg, mesh, EPOCH, 0, state)


@pytest.mark.parametrize("objective", PARTS)
def test_every_task_has_its_loss_and_the_state_stays(settings, objective, tmp_path):
    """Of 16 examples, or as many as there are, whatever the root key of the state: what is random is of the seed."""
    cfg = settings(objective)
    tasks.validate(cfg, tokenizers.of_config(cfg), 1, 1)
    state = state_of(cfg)
    before = bits(state)
    found = measured(cfg, state, tmp_path)
    assert found.keys() == {"loss", "loss_examples", *PARTS[objective]} and all(map(np.isfinite, found.values()))
    assert found["loss"] == pytest.approx(sum(found[name] for name in PARTS[objective]) or found["loss"], rel=1e-5)
    assert found["loss_examples"] == {"caption": 8, "dialog": 8, "retrieval": 12}.get(objective, 16)
    assert measured(cfg, state.replace(rng=jax.random.key(7)), tmp_path) == found
    assert bits(state) == before


def test_two_devices_measure_as_one(settings, tmp_path):
    cfg = settings("pretrain")
    state = state_of(cfg)
    assert measured(cfg, state, tmp_path, 2) == pytest.approx(measured(cfg, state, tmp_path), rel=1e-5)


# --- by hand ----------------------------------------------------------------------------------------------------------
def rows_by_hand(cfg) -> list[dict]:
    """The held-out records as rows of a batch: in the order of the seed, what is random of each by its key, pictures as
    evaluation shows them, normalised."""
    tokenizer, task, out = tokenizers.of_config(cfg), tasks.of(cfg), []
    records = [{**r, "source": name} for name, s in sorted(cfg.data.eval.items()) for r in open_source(name, s)]
    for i in np.random.Generator(np.random.Philox(cfg.seed)).permutation(len(records)):
        key = np.array([cfg.seed, zlib.crc32(records[i]["key"].encode())], np.uint64)
        row = task.example(records[i], np.random.Generator(np.random.Philox(key=key)), cfg, tokenizer)
        for name, x in row.items():
            if isinstance(x, bytes):
                pixels = image.eval_transform(image.decode(x, cfg.data.max_pixels)[0], cfg.model.img_size)
                row[name] = normalize_pixels(pixels)
            elif name == "image_id":
                row[name] = x.astype(np.int32)
        out.append({name: x for name, x in row.items() if name != "notes"})
    return out


def batch_of(given: list[dict]) -> dict:
    return {name: jnp.stack([row[name] for row in given]) for name in given[0]}


def log_p(logits, ids) -> np.ndarray:
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[..., None], -1)[..., 0]


def test_of_captions_it_is_the_mean_of_what_words_are_unlikely(settings, tmp_path):
    """Batches of 5 and 3: means over the words of a batch, weighted by its examples; without dropout."""
    cfg = settings("caption")
    cfg.train.batch, cfg.loss.label_smoothing = 5, 0.0
    state, given, total = state_of(cfg), rows_by_hand(cfg), 0.0
    for part in (given[:5], given[5:]):
        batch, apply = batch_of(part), jitted.program(tasks.build(cfg), whole_caption)
        logits = apply(state.params, batch["img"], batch["ids"], batch["txt_mask"])
        total += len(part) * -log_p(logits, batch["ids"][:, 1:])[batch["lm_mask"][:, 1:]].mean()
    assert measured(cfg, state, tmp_path)["loss"] == pytest.approx(total / 8, rel=1e-5)


def whole_caption(model, img, ids, txt_mask):
    return model.lm_logits(ids, txt_mask, model.image_kv(model.encode_image(img), ended=True))


def test_of_pairs_of_pictures_it_is_the_mean_of_what_labels_are_unlikely(settings, tmp_path):
    cfg = settings("nlvr")
    state, batch = state_of(cfg), batch_of(rows_by_hand(cfg)[:16])
    model = tasks.build(cfg)
    logits = jax.jit(lambda params: nlvr.logits(functools.partial(model.apply, {"params": params}), batch, None))
    want = -log_p(logits(state.params), batch["label"].astype(int)).mean()
    assert measured(cfg, state, tmp_path)["loss"] == pytest.approx(want, rel=1e-5)


def test_momentum_encoder_queue_and_soft_targets_are_those_of_the_state(settings, tmp_path):
    """ITC of one batch, with alpha of step 3 of a ramp of 8."""
    cfg = settings("retrieval")
    state, batch = state_of(cfg), batch_of(rows_by_hand(cfg))
    ids = batch["ids"], batch["txt_mask"]

    model = tasks.build(cfg)
    embedded = lambda params: jitted.apply(model, state.params | params, both_embeddings, batch["img"], *ids)
    (img, txt), (img_m, txt_m) = map(embedded, (state.params, state.extra["params"]))
    queue, temp, alpha = state.extra["queue"], state.params["temp"], 0.4 * STEP / (2 * EPOCH)
    same = batch["image_id"][:, None] == np.concatenate([batch["image_id"], queue["image_id"]])
    total = 0.0
    for own, own_m, columns in ((img, img_m, [txt_m, queue["txt"]]), (txt, txt_m, [img_m, queue["img"]])):
        columns = jnp.concatenate(columns)
        targets = alpha * jax.nn.softmax(own_m @ columns.T / temp) + (1 - alpha) * same / same.sum(-1, keepdims=True)
        total -= (targets * jax.nn.log_softmax(own @ columns.T / temp)).sum(-1).mean() / 2
    assert measured(cfg, state, tmp_path)["loss_itc"] == pytest.approx(float(total), rel=1e-5)


def both_embeddings(model, img, ids, txt_mask):
    return model.project_image(model.encode_image(img)), model.encode_text(ids, txt_mask)[1]


# --- which examples ---------------------------------------------------------------------------------------------------
class Numbers:
    """A task whose rows are the numbers of their records; every third has none."""

    @staticmethod
    def example(record, rng, cfg, tokenizer):
        number = int(record["key"].rpartition("-")[2])
        if number % 3 == 2:
            raise BadRecord(record["key"], "no number: at all")
        return {"n": np.int64(number), "drawn": rng.random(), "notes": []}


def numbers(cfg, tmp_path, count: int, task=Numbers) -> HeldOut:
    with cfg.data.unlocked():
        cfg.data.eval.world = source("scenes", count=count, size=32, seed=1)
    return HeldOut(cfg, None, task, cfg.data.eval, skipped_path=tmp_path / "skipped.jsonl")


def test_each_example_comes_once_and_the_rest_is_a_smaller_batch(tiny_cfg, tmp_path):
    tiny_cfg.eval.loss_examples = 5000
    data = numbers(tiny_cfg, tmp_path, 30)
    passes = [list(data.whole(8, 2)) for _ in range(2)]
    for batches in passes:
        assert [len(batch["n"]) for batch in batches] == [8, 8, 4]
        np.testing.assert_equal(batches, passes[0])
    seen = np.concatenate([batch["n"] for batch in passes[0]])
    assert sorted(seen) == [n for n in range(30) if n % 3 != 2] and list(seen) != sorted(seen)
    assert len(set(np.concatenate([batch["drawn"] for batch in passes[0]]))) == 20
    assert data.counts() == {"read": 50, "skipped": {"no number": 10}, "noted": {}}  # the unusable are tried once
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 10
    assert [len(batch["n"]) for batch in data.whole(8, 8)] == [8, 8]
    assert [len(batch["n"]) for batch in data.whole(19, 1)] == [19]  # one alone has no other to be told from
    assert [len(batch["n"]) for batch in data.whole(1, 1)] == [1] * 20


def test_so_many_are_drawn_of_all_as_is_asked(tiny_cfg, tmp_path):
    tiny_cfg.eval.loss_examples = 6
    [first] = numbers(tiny_cfg, tmp_path, 300).whole(8, 1)
    assert len(first["n"]) <= 6 and max(first["n"]) > 100
    tiny_cfg.seed += 1
    [other] = numbers(tiny_cfg, tmp_path, 300).whole(8, 1)
    assert set(first["n"]) != set(other["n"])
    tiny_cfg.eval.limit = 30
    assert {n for batch in numbers(tiny_cfg, tmp_path, 300).whole(8, 1) for n in batch["n"]} <= set(range(30))


def test_what_has_no_labels_is_said_once_and_not_reported(settings, pictures, tmp_path, capsys):
    cfg = settings("vqa")
    cfg.data.eval.mini.path = str(pictures / "lists/vqa/official/v2_OpenEnded_mscoco_test2015_questions.json")
    mesh, held = sharding.make_mesh(cfg.mesh), Validation(held_out(cfg, tmp_path))
    for _ in range(2):
        assert held.losses(cfg, mesh, EPOCH, 0, None) == {}
    assert capsys.readouterr().out.count("\n") == 1
    held.told = False
    assert held.losses(cfg, mesh, EPOCH, 0, None) == {}
    assert (
        "eval/loss is not reported: none of 16 records of data.eval can be measured; left out: 16 as they are no "
        "examples to train on (question without an answer)"
    ) in capsys.readouterr().out


def test_groups_are_whole(settings):
    cfg = settings("blip2_stage1")
    assert step.batch_unit(cfg) == 1
    cfg.loss.group_size, cfg.task.lm_group = 4, 6
    assert step.batch_unit(cfg) == 12
    cfg.objective = "retrieval"
    assert step.batch_unit(cfg) == 4


# --- runs -------------------------------------------------------------------------------------------------------------
def test_a_run_logs_it_with_the_scores_and_a_signal_within_it_stops_the_evaluation(
    settings, tmp_path, monkeypatch, capsys
):
    cfg = settings("language")
    cfg.train.update(steps=2, log_every=1, save_every=2)
    whole = HeldOut.whole

    def interrupted(*args):
        for batch in whole(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as m:
        m.setattr(HeldOut, "whole", interrupted)
        assert loop.fit(cfg, tmp_path / "run")["stopped"]
    assert "SIGTERM: ending this evaluation, of step 2, which is saved" in capsys.readouterr().out
    out = loop.fit(cfg, tmp_path / "run")
    assert out["eval"].keys() == {"loss", "loss_lm", "loss_examples"} and not out["stopped"]
    said = capsys.readouterr().out
    assert "eval/loss is of 16 examples of data.eval, in one batch of 16" in said
    assert f"language: loss {out['eval']['loss']:.2f}  loss_lm" in said
    [row] = [row for row in rows(tmp_path / "run") if "eval/loss" in row]
    assert row == {"step": 2, **{f"eval/{name}": value for name, value in out["eval"].items()}}
    with pytest.raises(ValueError, match="objective language has no scores: its eval/loss is in the log of its run"):
        evaluation.evaluate(cfg, tmp_path / "run")
