"""Visual dialog as a task: texts of a round, the loss against the original's parts, evaluation on any mesh, a run from
pre-training.
"""

import functools
import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from world import dialogs
from world.golden import folder
from world.runs import begun, leaves, rows

from blip_jax import checkpoint, config, tasks, trees
from blip_jax.convert.apply import from_torch, to_torch
from blip_jax.data.formats import open_source
from blip_jax.data.source import BadRecord
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.eval import visdial
from blip_jax.inference.load import Loaded
from blip_jax.models import flops, initial
from blip_jax.models.blip import Blip
from blip_jax.models.build import fit
from blip_jax.models.layers import stack
from blip_jax.models.vqa import BlipVqa
from blip_jax.parallel import sharding
from blip_jax.tasks import dialog
from blip_jax.tasks.step import Keys
from blip_jax.train import evaluation, loop

GOLDEN = folder("blip/visdial")


# --- the loss ---------------------------------------------------------------------------------------------------------
@functools.cache
def golden():
    """(config, model, parameters, batch, arrays of the original)"""
    meta, io = json.loads((GOLDEN / "meta.json").read_text()), np.load(GOLDEN / "io.npz")
    s, cfg = meta["config"], config.base("tiny")
    with cfg.unlocked():
        cfg.objective, cfg.task = "dialog", dialog.leaves()
        cfg.model.vit.update(width=s["vw"], depth=s["vdepth"], heads=s["vheads"], mlp=4 * s["vw"], patch=s["patch"])
        cfg.model.med.update(
            width=s["tw"], layers=s["tl"], heads=s["th"], mlp=s["ti"], positions=s["pos"], vocab_size=s["vocab"]
        )
        cfg.model.update(img_size=s["img"], dropout=0.0, dtype="float32")
    tensors = load_file(GOLDEN / "weights.safetensors")
    params = from_torch("dialog", tensors, heads=dict(vit=s["vheads"], med=s["th"]))["params"]
    B, K = io["labels"].shape
    batch = {
        "img": jnp.asarray(io["image"]).transpose(0, 2, 3, 1),
        "caption_ids": jnp.asarray(io["context_ids"], jnp.int32),
        "caption_mask": jnp.asarray(io["context_mask"] > 0),
        "ids": jnp.asarray(io["text_ids"].reshape(B, K, -1), jnp.int32),
        "txt_mask": jnp.asarray(io["text_mask"].reshape(B, K, -1) > 0),
        "label": jnp.asarray(io["labels"] > 0),
    }
    model = dialog.build(cfg)
    assert model.enc_id == meta["tokens"]["enc"]
    return cfg, model, jax.tree.map(jnp.asarray, params), batch, io


def apply_of(model, params):
    return functools.partial(model.apply, {"params": params})


def test_golden_dialog_task_loss_states_scores_and_every_gradient():
    cfg, model, params, batch, io = golden()
    keys = Keys(jax.random.key(0), jax.random.key(1), 0)

    @jax.jit
    def step(params):
        out = jax.value_and_grad(lambda p: dialog.loss(model, cfg, p, None, batch, keys), has_aux=True)(params)
        caption = batch["caption_ids"], batch["caption_mask"]
        apply = apply_of(model, params)
        return out, apply(*caption, method="encode_caption"), dialog.logits(apply, batch, None)

    with stack.looped():  # the layers one by one: test_golden_blip.py
        ((loss, (metrics, found)), grads), states, logits = step(params)
    np.testing.assert_allclose(loss, io["loss"], atol=1e-5)
    np.testing.assert_allclose(states, io["context_states"], atol=1e-5)
    np.testing.assert_allclose(logits, io["logits"], atol=1e-5)
    np.testing.assert_allclose(logits[..., 1], io["scores"], atol=1e-5)
    np.testing.assert_array_equal(visdial.ranks(np.asarray(logits[..., 1])), io["ranks"])
    assert float(metrics["loss"]) == float(loss) and found == {}
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(io["logits"].argmax(-1) == io["labels"]))
    first = np.take_along_axis(io["labels"], io["scores"].argmax(-1)[:, None], axis=1)
    assert float(metrics["first"]) == pytest.approx(first.mean())

    grads = to_torch("dialog", {"params": jax.tree.map(np.asarray, grads)}, vocab_size=cfg.model.med.vocab_size)
    names = [name for name in io.files if name.startswith("grad/")]
    assert {name[len("grad/") :] for name in names} >= {name for name in grads if "position_ids" not in name}
    for name in names:
        key, theirs = name[len("grad/") :], io[name]
        largest = np.abs(theirs).max()
        if key.endswith("key.bias"):  # its exact gradient is zero
            assert largest < 1e-5 and np.abs(grads[key]).max() < 1e-5, key
        else:
            np.testing.assert_allclose(grads[key], theirs, rtol=0, atol=1e-4 * largest, err_msg=key)


@functools.cache
def world():
    """(model, lively parameters, batch of four pictures with three texts each, its logits)"""
    cfg = config.base("tiny")
    with cfg.unlocked():
        cfg.objective, cfg.task = "dialog", dialog.leaves()
        cfg.model.vit.update(width=32, mlp=64, depth=1)
        cfg.model.update(img_size=16, dtype="float32")
    model, rng = dialog.build(cfg), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(0)))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, jnp.float32), shapes)
    ids = lambda *shape: jnp.asarray(rng.integers(3, 110, shape), jnp.int32)
    real = lambda T, *lengths: jnp.arange(T) < jnp.asarray(lengths)[..., None]
    batch = {
        "img": jnp.asarray(rng.normal(size=(4, 16, 16, 3)), jnp.float32),
        "caption_ids": ids(4, 5),
        "caption_mask": real(5, 3, 5, 2, 4),
        "ids": ids(4, 3, 6),
        "txt_mask": real(6, [6, 3, 4], [5, 6, 6], [2, 4, 3], [6, 6, 5]),
    }
    return model, params, batch, logits_of(model)(params, batch)


@functools.cache
def logits_of(model):
    return jax.jit(lambda params, batch: dialog.logits(apply_of(model, params), batch, None))


def test_mesh_changes_no_logit():
    model, params, batch, want = world()
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    placed = jax.device_put(params, sharding.shardings_for(params, mesh))
    assert not any(x.is_fully_replicated for path, x in trees.paths(placed) if path.endswith("kernel"))
    with jax.set_mesh(mesh):
        got = logits_of(model)(placed, jax.device_put(batch, sharding.batch_sharding(mesh)))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_what_a_text_looks_at():
    """The caption counts where it is real, and so does a text; [ENC] is put before it; pictures and captions are each
    row's own."""
    model, params, batch, want = world()
    run = lambda **other: logits_of(model)(params, batch | other)
    ids, mask = batch["caption_ids"], batch["caption_mask"]
    np.testing.assert_allclose(run(caption_ids=jnp.where(mask, ids, 9)), want, atol=1e-5)
    np.testing.assert_allclose(run(ids=jnp.where(batch["txt_mask"], batch["ids"], 9)), want, atol=1e-5)
    np.testing.assert_array_equal(run(ids=batch["ids"].at[..., 0].set(7)), want)
    other = run(caption_ids=ids.at[1, 1:].set(9))
    assert np.abs(other - want).max(axis=(1, 2))[1] > 1e-4
    np.testing.assert_allclose(other[jnp.array([0, 2, 3])], want[jnp.array([0, 2, 3])], atol=1e-5)
    assert (np.abs(run(img=batch["img"][::-1]) - want).max(axis=(1, 2)) > 1e-4).all()


# --- costs ------------------------------------------------------------------------------------------------------------
@functools.cache
def published():
    """(config, model, shapes of parameters) of the published run with three layers."""
    cfg = config.base("base")
    with cfg.unlocked():
        cfg.objective, cfg.task = "dialog", dialog.leaves()
        cfg.model.img_size, cfg.text.max_len = 384, 256
        cfg.model.vit.depth = cfg.model.med.layers = 3
    model = tasks.build(cfg)
    return cfg, model, jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(0)))


def like(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_parameters_are_those_of_pretraining_without_decoder_and_projections():
    cfg, _, shapes = published()
    pretrained = jax.eval_shape(lambda: initial.init_params(cfg, Blip.from_config(cfg.model), jax.random.key(0)))
    left_out = re.compile("self_attn_dec|lm_head|_proj/|^temp$")
    assert {path: x.shape for path, x in trees.paths(shapes)} == {
        path: x.shape for path, x in trees.paths(pretrained) if not left_out.search(path)
    }


@pytest.mark.parametrize("T", [48, 256])
def test_evaluation_costs_what_the_maths_needs(T):
    """Of the published size: states, keys and values of picture and caption once, whatever the texts."""
    cfg, model, params = published()
    C, G = cfg.task.caption_len, 100
    look, match = dialog.compiled(model, cfg.task.score)
    picture = like(jnp.uint8, 1, 384, 384, 3), like(jnp.int32, 1, C), like(bool, 1, C)
    seen = jax.eval_shape(look, params, *picture)
    counted = flops.count_function(look, params, *picture)
    counted += flops.count_function(match, params, seen, like(jnp.int32, 1, G, T), like(bool, 1, G, T))
    assert counted == pytest.approx(sum(flops.dialog(cfg.model, C, T, G).values()), rel=1e-3)


def test_a_training_step_costs_what_the_maths_needs():
    cfg, model, params = published()
    batch = {
        name: like(jnp.float32 if name == "img" else dtype, 2, *shape[1:])
        for name, (shape, dtype) in dialog.shapes(cfg).items()
    }

    def loss(params, batch):
        return dialog.loss(model, cfg, params, None, batch, Keys(jax.random.key(0), jax.random.key(1), 0))[0]

    counted = flops.count_function(jax.grad(loss), params, batch) / 2
    assert counted == pytest.approx(dialog.flops(cfg)["step"], rel=0.01)


# --- texts ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def cfg(tiny_cfg):
    """A tiny model as wide as its texts, 24 positions for a dialog."""
    tiny_cfg.model.vit.update(width=32, mlp=64)
    tiny_cfg.objective, tiny_cfg.task = "dialog", dialog.leaves()
    tiny_cfg.task.update(negatives=2, caption_len=8)
    tiny_cfg.text.max_len = 24
    return tiny_cfg


def turn(question, answer=None, options=(), truth=None, relevance=None):
    return dict(question=question, answer=answer, options=list(options), truth=truth, relevance=relevance)


def record(*rounds, caption="A red star!"):
    return {"key": "k", "image": b"picture", "image_id": "7", "caption": caption, "rounds": list(rounds)}


def words(tokenizer, ids):
    """Ids as words, [SEP] as |, without padding."""
    parts = [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == tokenizer.sep) + 1)]
    return "|".join(parts).strip("|")


def test_a_text_is_history_question_and_option(cfg):
    tokenizer = Tokenizer(cfg.text.vocab)
    rounds = turn("A ring", "RED"), turn("a star"), turn("left", "of", ["blue", "red"], 1)
    texts, notes = dialog.texts_of(rounds, 2, cfg, tokenizer)
    assert texts.context[0] == tokenizer.cls and notes == []
    whole = [np.array(texts.context[1:] + ending) for ending in texts.endings]
    assert [words(tokenizer, ids) for ids in whole] == [f"a ring red|a star|left|{o}" for o in ("blue", "red")]

    cfg.text.max_len = len(texts.context) + len(texts.endings[0])
    assert dialog.texts_of(rounds, 2, cfg, tokenizer)[0].context == texts.context  # it just fits
    cfg.text.max_len -= 1
    shorter, notes = dialog.texts_of(rounds, 2, cfg, tokenizer)
    assert words(tokenizer, np.array(shorter.context[1:])) == "a star|left"
    assert notes == ["long dialog, its oldest rounds are left out"]


def test_a_question_is_whole_and_only_a_text_that_cannot_fit_is_cut(cfg):
    tokenizer = Tokenizer(cfg.text.vocab)
    assert tokenizer.lengths(["a " * 60], 99)[0] == 62
    cfg.text.max_len = 80
    texts, notes = dialog.texts_of([turn("a " * 60, "a", ["a"], 0)], 0, cfg, tokenizer)
    assert len(texts.context) == 62 and notes == []  # no cleaning to fifty words
    cfg.text.max_len = 24
    rounds = turn("a", "a"), turn("a " * 60, "a", ["a", "a " * 30], 0)
    texts, notes = dialog.texts_of(rounds, 1, cfg, tokenizer)
    assert notes == ["long option, cut", "long question, cut", "long dialog, its oldest rounds are left out"]
    assert [len(texts.context) + len(ending) for ending in texts.endings] == [15, 24]
    assert all(ending[-1] == tokenizer.sep for ending in texts.endings)


def test_a_row_has_the_true_answer_and_others_of_one_round(cfg):
    tokenizer, seen = Tokenizer(cfg.text.vocab), set()
    options = ["red", "blue", "ring", "blue", "star"]  # of which two read as the true one
    history, asked = turn("a ring", "a star"), turn("left", "blue", options, 1)
    for seed in range(30):
        row = dialog.example(record(history, asked), np.random.default_rng(seed), cfg, tokenizer)
        assert row["img"] == b"picture" and row["notes"] == [] and row["label"].tolist() == [True, False, False]
        texts = [words(tokenizer, ids[mask][1:]) for ids, mask in zip(row["ids"], row["txt_mask"])]
        assert all(text.startswith("a ring a star|left|") for text in texts)
        answers = [text.rsplit("|", 1)[1] for text in texts]
        assert answers[0] == "blue" and len(set(answers)) == 3
        seen |= set(answers[1:])
    assert seen == {"red", "ring", "star"}
    assert words(tokenizer, row["caption_ids"][row["caption_mask"]][1:]) == "a red star"
    shapes = dialog.shapes(cfg)
    assert {name: (row[name].shape, row[name].dtype) for name in shapes if name != "img"} == {
        name: (shape[1:], np.dtype(dtype)) for name, (shape, dtype) in shapes.items() if name != "img"
    }


def test_what_is_odd_about_a_dialog(cfg):
    tokenizer, rng = Tokenizer(cfg.text.vocab), np.random.default_rng(0)
    some = ["red", "blue", "ring"]
    odd = [turn("a", "red"), turn("a", None, some), turn("a", "red", some[:2], 0), turn("a", "red", ["red"] * 9, 0)]
    for rounds in odd:  # without options, without a true one, with too few others
        with pytest.raises(BadRecord, match="dialog without a round of a true answer and 2 other options"):
            dialog.example(record(rounds), rng, cfg, tokenizer)
    empty = dialog.example(record(turn("", "red", some, 0), caption=" . "), rng, cfg, tokenizer)
    assert empty["notes"] == ["empty caption"] and empty["caption_mask"].sum() == 2
    broken = record(turn("a \0", "red", ["\ud800", *some], 1), caption="red " * 20)
    notes = ["long caption, cut", "NUL characters removed", "broken characters replaced"]
    assert dialog.example(broken, rng, cfg, tokenizer)["notes"] == notes
    with pytest.raises(BadRecord, match="dialog without a round that has options"):
        dialog.dialog(record(turn("a", "red")), cfg, tokenizer)
    with pytest.raises(BadRecord, match="round with 3 options and the relevance of 2"):
        dialog.dialog(record(turn("a", "red", some, 0, [1.0, 0.0])), cfg, tokenizer)


def test_options_are_ranked_by_a_logit_or_by_the_margin():
    logits = np.array([[[0.0, 1.0], [3.0, 2.0]]])
    assert dialog.scores_of(logits, "logit").tolist() == [[1.0, 2.0]]
    assert dialog.scores_of(logits, "margin").tolist() == [[1.0, -1.0]]


def test_options_that_read_the_same_are_scored_once(cfg):
    row = dialog.dialog(record(turn("a", "red", ["red", "Red", "blue", "red"], 1)), cfg, Tokenizer(cfg.text.vocab))
    (asked,) = row["asked"].item()
    assert asked.number == 1 and asked.which == [0, 0, 1, 0] and len(asked.texts.endings) == 2


def test_groups_hold_every_text_once_the_shortest_first(cfg):
    tokenizer = Tokenizer(cfg.text.vocab)
    cfg.text.max_len = 40
    long = record(turn("a " * 9, "a", ["a", "a " * 9]), turn("a", "a", ["a", "of", "a a"]))
    found = [dialog.dialog(r, cfg, tokenizer)["asked"].item() for r in (record(turn("a", "a", ["a"])), long)]
    seen, lengths = [], []
    for at, ids, mask in dialog.groups(found, 2, 40, tokenizer.pad):
        assert ids.shape == mask.shape == (2, 2, ids.shape[-1]) and ids.shape[-1] in (16, 32, 40)
        for b, own in enumerate(at):
            for g, (n, j, k) in enumerate(own):
                texts = found[b][j].texts
                assert ids[b, g][mask[b, g]].tolist() == texts.context + texts.endings[k] and mask[b, g].sum() == n
                seen.append((b, j, k))
                lengths += [n] * b
        assert mask.any(-1).all()
    assert sorted(seen) == [(0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1), (1, 1, 2)]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"task.score": "softmax"}, "task.score is 'softmax': choose logit or margin"),
        ({"task.negatives": 0}, "task.negatives is 0: it must be at least 1"),
        ({"task.caption_len": 99}, "task.caption_len is 99 but the text model has model.med.positions = 40"),
        ({"model.vit.width": 48, "model.vit.mlp": 96}, "model.vit.width is 48 and model.med.width 32"),
        ({"text.buckets": (12, 24)}, "dialogs have one length"),
        ({"text.prompt": "a "}, "whose texts have none"),
    ],
)
def test_settings_that_do_not_fit(cfg, changes, expected):
    tasks.validate(cfg)
    cfg.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=re.escape(expected)):
        tasks.validate(cfg)


# --- start ------------------------------------------------------------------------------------------------------------
def test_a_start_from_pretraining_lacks_nothing_and_one_from_questions_the_matching_head(cfg):
    shapes = lambda model: jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(0)))
    zeros = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape, np.float32), tree)
    own = shapes(dialog.build(cfg))
    head = ["itm_head/bias", "itm_head/kernel"]
    for model, random in ((Blip, []), (BlipVqa, head)):
        fitted = fit(zeros(shapes(model.from_config(cfg.model))), own, "here", dialog.START)
        assert sorted(fitted.random) == random and not fitted.missing
    captioner = shapes(Blip.from_config(cfg.model, encoder=False))
    with pytest.raises(ValueError, match="med/blocks/self_attn/q/kernel is missing"):
        fit(zeros(captioner), own, "here", dialog.START)


# --- runs -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return dialogs.write_files(tmp_path_factory.mktemp("visdial"))


def source(files, pattern):
    return config.source("visdial", str(files / pattern), images=str(files))


def read(path):
    return json.loads(path.read_text())


def test_a_run_starts_from_pretraining_is_stopped_resumes_and_is_evaluated(cfg, files, tmp_path, capsys, monkeypatch):
    cfg.objective, cfg.task = "pretrain", ConfigDict()
    pretrained = begun(cfg, tmp_path / "pretrained")
    before = dict(trees.paths(checkpoint.load_params(pretrained)))
    cfg.objective, cfg.task, cfg.train.init_from, cfg.model.img_size = "dialog", dialog.leaves(), str(pretrained), 32
    cfg.task.update(negatives=2, caption_len=8)
    with cfg.data.unlocked():
        cfg.data.train = ConfigDict({"visdial": source(files, "visdial_1.0_train.json")})
        cfg.data.eval = ConfigDict({"val": source(files, "visdial_1.0_val*.json")})
    cfg.data.epoch_examples, cfg.text.max_len = 16, 16  # one length, hence one program
    cfg.train.update(batch=8, steps=3, log_every=1, save_every=1)
    cfg.eval.update(batch=2, rerank_texts=4)
    out = loop.fit(cfg, tmp_path / "run")
    said = capsys.readouterr().out
    for part in ("position table resized from 5 to 17", "have no place in this model and are left out: ", "FLOPs: "):
        assert part in said, part
    assert "start random" not in said and "dialog: dialogs 3.00  rounds 6.00  r@1 " in said
    after = dict(trees.paths(checkpoint.load_params(tmp_path / "run" / "checkpoints" / "1")))
    for path, x in after.items():
        if path != "vit/pos_embed":
            assert np.abs(x - before[path]).max() < 0.01, path  # one step in the warm-up

    place, calls = loop.to_devices, []

    def stopping(*args):
        calls.append(len(calls))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return place(*args)

    with monkeypatch.context() as m:
        m.setattr(loop, "to_devices", stopping)
        stopped = loop.fit(cfg, tmp_path / "cut")
    assert stopped["stopped"] and stopped["step"] < 3 and not (tmp_path / "cut" / "checkpoints" / "3").exists()
    assert loop.fit(cfg, tmp_path / "cut")["step"] == 3
    assert leaves(tmp_path / "cut") == leaves(tmp_path / "run") and rows(tmp_path / "cut") == rows(tmp_path / "run")
    check_evaluation(cfg, files, tmp_path / "run", out["eval"], capsys)


def check_evaluation(cfg, files, run, known, capsys):
    """A run that is evaluated apart gives the numbers it had, the server's file, and on one device the same."""
    found = evaluation.evaluate(cfg, run)
    ranks = found.pop("predictions")
    assert found == known and found["without_relevance"] == 1 and {"r@1", "r@5", "r@10", "mean", "mrr"} < found.keys()
    assert 1 <= found["mean"] <= 6 and 0 < found["ndcg"] <= 1
    assert read(run / "visdial_blip_ranks.json") == read(run / "predictions.json") == ranks
    assert [(row["image_id"], row["round_id"]) for row in ranks] == [(n, r) for n in (11, 12, 13) for r in (1, 2)]
    assert all(sorted(row["ranks"]) == [1, 2, 3, 4, 5, 6] for row in ranks)
    assert "dialogs, 6 rounds with options" in dialog.table(found)

    params, tokenizer = checkpoint.load_params(checkpoint.newest(run)), Tokenizer(cfg.text.vocab)
    scores = {}
    for devices, batch, texts in ((8, 2, 4), (1, 1, 100)):
        cfg.eval.update(batch=batch, rerank_texts=texts)
        mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:devices])
        placed = jax.device_put(params, sharding.shardings_for(params, mesh))
        data = dialog.eval_data(cfg, tokenizer, run / "skipped.jsonl")
        loaded = Loaded(dialog.build(cfg), placed, cfg, tokenizer, "here")
        scores[devices] = [
            (record["key"], number, own)
            for record, rounds in dialog.answered(loaded, data, mesh)
            for number, own in rounds
        ]
    for (key, number, a), (other, same, b) in zip(scores[8], scores[1], strict=True):
        assert (key, number) == (other, same) and len(a) == 6
        np.testing.assert_allclose(a, b, atol=1e-5)
    at = {(key.rsplit(":", 1)[1], number): own for key, number, own in scores[8]}
    options = open_source("val", cfg.data.eval.val)[1]["rounds"][1]["options"]
    alike = [i for i, text in enumerate(options) if text.lower() == "yes"]
    assert len(alike) == 2 and at["12", 2][alike[0]] == at["12", 2][alike[1]]

    cfg.eval.update(batch=2, rerank_texts=4)
    cfg.data.eval.val.path, cfg.eval.limit = str(files / "visdial_1.0_test.json"), 0
    test = evaluation.evaluate(cfg, run)
    assert test.keys() == {"dialogs", "rounds", "predictions"} and capsys.readouterr()
    assert [(row["image_id"], row["round_id"]) for row in read(run / "visdial_blip_ranks.json")] == [(21, 2), (22, 1)]
    cfg.eval.limit = 1
    (run / "visdial_blip_ranks.json").unlink()
    evaluation.evaluate(cfg, run)
    assert "nothing is written for a server: the predictions: 1 of 2 rounds have" in capsys.readouterr().out
    assert not (run / "visdial_blip_ranks.json").exists()
