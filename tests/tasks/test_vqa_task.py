"""VQA as a task: rows of questions and answers, the loss against the original's, readers of both layouts, a run from
pre-training.
"""

import collections
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from world import questions
from world.golden import folder
from world.questions import PEOPLE, QUESTIONS
from world.runs import begun, leaves, rows

from blip_jax import checkpoint, config, tasks, trees
from blip_jax.convert.apply import from_torch, to_torch
from blip_jax.convert.rules.blip import TIED
from blip_jax.data.formats import open_source
from blip_jax.data.source import BadRecord
from blip_jax.data.text.clean import plain_text
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.tasks import video_qa, vqa
from blip_jax.tasks.step import Keys, accumulated
from blip_jax.train import evaluation, loop

GOLDEN = folder("blip/vqa")


# --- the loss ---------------------------------------------------------------------------------------------------------
def golden():
    """(config, model, parameters, batch with a row more than the most answers of a question, arrays of the original)"""
    meta, io = json.loads((GOLDEN / "meta.json").read_text()), np.load(GOLDEN / "io.npz")
    s, cfg = meta["config"], config.base("tiny")
    with cfg.unlocked():
        cfg.objective, cfg.task = "vqa", vqa.leaves()
        cfg.model.vit.update(width=s["vw"], depth=s["vdepth"], heads=s["vheads"], mlp=4 * s["vw"], patch=s["patch"])
        cfg.model.med.update(
            width=s["tw"], layers=s["tl"], heads=s["th"], mlp=s["ti"], positions=s["pos"], vocab_size=s["vocab"]
        )
        cfg.model.update(img_size=s["img"], dropout=0.0, dtype="float32")
        cfg.loss.smoothing_over = "valid"
    tensors = load_file(GOLDEN / "weights.safetensors")
    params = jax.tree.map(jnp.asarray, from_torch("vqa", tensors, heads=dict(vit=s["vheads"], med=s["th"]))["params"])
    n = io["n"].tolist()
    slots = max(n) + 1  # a row more than any question has answers
    ids, mask = (
        np.zeros((len(n), slots, io["answer_ids"].shape[1]), np.int32),
        np.zeros((len(n), slots, io["answer_ids"].shape[1]), bool),
    )
    ids[:, :, 0], mask[:, :, :2] = (
        meta["tokens"]["cls"],
        True,
    )  # rows that fill: [CLS] and one more, as of an empty text
    ids[:, :, 1] = meta["tokens"]["sep"]
    weights, at = np.zeros((len(n), slots), np.float32), 0
    for b, answers in enumerate(n):
        ids[b, :answers], mask[b, :answers] = (
            io["answer_ids"][at : at + answers],
            io["answer_mask"][at : at + answers] > 0,
        )
        weights[b, :answers], at = io["weights"][at : at + answers], at + answers
    batch = {
        "img": jnp.asarray(io["image"]).transpose(0, 2, 3, 1),
        "ids": jnp.asarray(io["question_ids"], jnp.int32),
        "txt_mask": jnp.asarray(io["question_mask"] > 0),
        "answer_ids": jnp.asarray(ids),
        "answer_mask": jnp.asarray(mask),
        "weights": jnp.asarray(weights),
    }
    return cfg, vqa.build(cfg), params, batch, io


def loss_of(cfg, model):
    keys = Keys(jax.random.key(0), jax.random.key(1), 0)
    return lambda params, batch: vqa.loss(model, cfg, params, None, batch, keys)


@functools.cache
def of_golden():
    """((loss, (metrics, found)), gradients) of the golden's batch."""
    cfg, model, params, batch, _ = golden()
    return jax.jit(jax.value_and_grad(loss_of(cfg, model), has_aux=True))(params, batch)


def test_golden_vqa_task_loss_and_every_gradient():
    cfg, model, params, batch, io = golden()
    assert (np.asarray(batch["weights"]) == 0).any()  # some rows fill, and must not count
    (loss, (metrics, found)), grads = of_golden()
    np.testing.assert_allclose(loss, io["loss"], atol=1e-5)
    assert float(metrics["loss"]) == float(loss) and found == {}
    grads = to_torch("vqa", {"params": jax.tree.map(np.asarray, grads)}, vocab_size=cfg.model.med.vocab_size)
    names = [name for name in io.files if name.startswith("grad/")]
    copies = {copy.format(i=i) for copy, _ in TIED["vqa"] for i in range(cfg.model.med.layers)}
    assert {name[len("grad/") :] for name in names} >= {name for name in grads if "position_ids" not in name} - copies
    for name in names:
        key, theirs = name[len("grad/") :], io[name]
        largest = np.abs(theirs).max()
        if key.endswith("key.bias"):  # its exact gradient is zero
            assert largest < 1e-5 and np.abs(grads[key]).max() < 1e-5, key
        else:
            np.testing.assert_allclose(grads[key], theirs, rtol=0, atol=1e-4 * largest, err_msg=key)
    with cfg.unlocked():
        cfg.loss.smoothing_over = "all"
    np.testing.assert_allclose(jax.jit(loss_of(cfg, model))(params, batch)[0], io["loss_torch110"], atol=1e-5)


def test_micro_batches_add_up_to_the_batch():
    """Dropout is off and the sum is over questions, so the mean of two halves is the whole."""
    cfg, model, params, batch, _ = golden()
    loss = loss_of(cfg, model)

    @jax.jit
    def in_halves(params, halves):
        def micro(a, batch):
            (_, (metrics, found)), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
            return grads, metrics, found

        return accumulated(micro, halves, 2)

    (_, (metrics, found)), grads = of_golden()
    parts = in_halves(params, jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch))
    for a, b in zip(jax.tree.leaves((grads, metrics, found)), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_questions_of_two_files_with_one_number_all_count():
    rows = [{"key": f"{name}:1", "question_id": 7, "answers": [name] * 10} for name in ("yes", "no")]
    found = vqa.scored([(row, "yes") for row in rows])
    assert (found["questions"], found["accuracy"]) == (2, 50)
    assert [row["question_id"] for row in found["predictions"]] == [7, "no:1"]


# --- rows -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def cfg(tiny_cfg):
    """VQA on the tiny model, three rows of six positions for the answers of a question."""
    tiny_cfg.objective, tiny_cfg.task = "vqa", vqa.leaves()
    tiny_cfg.task.update(answers=3, answer_len=6, method="generate", max_length=6)
    return tiny_cfg


def asked(answers, dataset="vqa", text="The (ring), left..."):
    return {"key": "7", "image": b"", "question": text, "answers": answers, "dataset": dataset}


def test_a_row_has_each_answer_once_with_its_share(cfg):
    tokenizer = Tokenizer(cfg.text.vocab)
    row = vqa.example(asked(["a ring"] * 6 + ["star"] * 3 + ["A ring"]), np.random.default_rng(0), cfg, tokenizer)
    np.testing.assert_allclose(row["weights"], [0.6, 0.3, 0.1])
    assert [tokenizer.decode(ids[1:]) for ids in row["answer_ids"]] == [
        "a ring",
        "star",
        "a ring",
    ]  # strings as they were given
    assert row["answer_mask"].shape == (3, 6) and row["ids"].shape == (12,) and row["notes"] == []
    np.testing.assert_array_equal(row["ids"], tokenizer.encode(["the ring, left"], 12)[0][0])
    one = vqa.example(asked(["ring"], "vg"), np.random.default_rng(0), cfg, tokenizer)
    np.testing.assert_allclose(one["weights"], [0.2, 0, 0])
    assert (
        one["answer_mask"].sum(1).tolist() == [*tokenizer.lengths(["ring"], 6), 2, 2]
        and one["answer_mask"][:, :2].all()
    )


def test_what_does_not_fit_is_noted(cfg):
    tokenizer = Tokenizer(cfg.text.vocab)
    many = vqa.example(asked(["a star"] * 3 + ["a"] * 2 + ["of"] * 2 + ["the", "red", "left"]), None, cfg, tokenizer)
    np.testing.assert_allclose(many["weights"], [0.3, 0.2, 0.2])
    assert many["notes"] == ["too many answers: 6, of which the 3 rarest are left out"]
    long = vqa.example(asked(["a small red star left of a ring"] * 10), None, cfg, tokenizer)
    whole = tokenizer.lengths(["a small red star left of a ring"], 40)[0]
    assert (
        whole > 6
        and long["notes"] == [f"long answer: {whole} positions, of which 6 are kept"]
        and long["answer_ids"][0, -1] == tokenizer.sep
    )
    wordy = vqa.example(asked(["ring"], text="red " * 20), None, cfg, tokenizer)
    assert wordy["notes"] == ["long question, cut"]
    words = [f"{a}{b}" for a in "abcdef" for b in "0123456789"]  # sixty, of which the original keeps fifty
    cfg.text.max_len = 200
    sixty = vqa.question(asked([], text=" ".join(words)), cfg, tokenizer)
    assert sixty["notes"] == ["long question, cut"]
    np.testing.assert_array_equal(sixty["ids"], tokenizer.encode([" ".join(words[:50])], 200)[0][0])
    assert vqa.question(asked([], text=" ".join(words[:50]) + "?"), cfg, tokenizer)["notes"] == []
    with pytest.raises(BadRecord, match="question without an answer"):
        vqa.example(asked([]), None, cfg, tokenizer)


def test_what_cannot_be_encoded_is_replaced_and_noted(cfg):
    """Half of a pair of surrogates, as of an emoji that was cut, which the tokenizer takes for no text."""
    tokenizer, broken = Tokenizer(cfg.text.vocab), "broken characters replaced"
    star, ring = (plain_text(text)[0] for text in ("a star \ud83d?", "a ring \ud83d"))
    row = vqa.example(asked(["a ring \ud83d"] * 3, text="a star \ud83d?"), None, cfg, tokenizer)
    assert row["notes"] == [broken, broken] and star.isprintable()
    np.testing.assert_array_equal(row["ids"], tokenizer.encode([star], 12)[0][0])
    np.testing.assert_array_equal(row["answer_ids"][:1], tokenizer.encode([ring], 6)[0])
    assert video_qa.question({"question": "a star \ud83d?"}, cfg, tokenizer) == ([star], [broken])


@pytest.mark.parametrize(
    "leaves, expected",
    [
        ({"method": "beam"}, "task.method is 'beam': choose rank or generate"),
        ({"answers": 0}, "task.answers is 0: it must be at least 1"),
        ({"vg_weight": 0.0}, "task.vg_weight is 0.0"),
        ({"answer_len": 99}, "task.answer_len is 99 but the text model has model.med.positions = 40"),
    ],
)
def test_settings_that_do_not_fit(cfg, leaves, expected):
    tasks.validate(cfg)
    cfg.task.update(leaves)
    with pytest.raises(ValueError, match=expected):
        tasks.validate(cfg)


def test_a_config_without_the_leaves_is_told_how_to_get_them(cfg):
    cfg.task = ConfigDict()
    with pytest.raises(
        ValueError,
        match=r"task holds \[\], but of objective vqa it is .*: set c.task = leaves\(\) of blip_jax.tasks.vqa",
    ):
        tasks.validate(cfg)


# --- files ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return questions.write_files(tmp_path_factory.mktemp("vqa"))


def opened(files, pattern):
    return open_source("q", config.source("vqa", str(files / pattern), images=str(files)))


def test_both_layouts_give_the_same_records(files):
    ours, official = opened(files, "vqa_train.json"), opened(files, "v2_*.json")
    assert len(ours) == len(official) == 4
    for i, (a, b) in enumerate(zip((ours[i] for i in range(4)), (official[i] for i in range(4)))):
        assert (b["answer_type"], b["question_type"]) == ("other", "what") and a["answer_type"] == ""
        assert {**a, "answer_type": "other", "question_type": "what", "key": b["key"]} == b
        assert a["answers"] == PEOPLE[a["question_id"]] and a["key"] == f"q:vqa_train.json#{i}:{a['question_id']}"
    without = opened(files, "v2_train2014_questions.json")
    assert without[1]["answers"] == [] and without[1]["question"] == QUESTIONS[2]
    genome = opened(files, "vg_qa.json")
    assert (genome[1]["dataset"], genome[1]["answers"], genome[1]["key"]) == ("vg", ["star"], "q:vg_qa.json#1")


def test_files_that_do_not_belong(files, tmp_path):
    with pytest.raises(ValueError, match="4 annotations are of questions that .* do not ask"):
        opened(files, "v2_*annotations.json")
    (tmp_path / "a.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match="neither a list of questions in BLIP's form nor VQA's official"):
        opened(tmp_path, "a.json")
    (tmp_path / "b.json").write_text(
        '[{"question": 5}, {"question": "ring?", "image": "a.jpg", "answer": ["ring"], "question_id": 9}]'
    )
    source = opened(tmp_path, "b.json")
    for i, reason in enumerate(("malformed row", "file not found|No such file|missing")):
        with pytest.raises(BadRecord, match=reason):
            source[i]


def test_without_a_list_of_answers_one_is_made_and_said(tiny_cfg, files, tmp_path, capsys):
    rows = [{"question_id": n, "question": "?", "image": "x", "answer": ["A ring", "a ring", "no"]} for n in range(9)]
    rows += [{"question_id": n, "question": "?", "image": "x", "answer": ["rare"]} for n in range(10, 18)]
    (tmp_path / "many.json").write_text(
        json.dumps(rows + [{"question": "?", "image": "x", "dataset": "vg", "answer": "rare"}])
    )
    tiny_cfg.objective, tiny_cfg.task = "vqa", vqa.leaves()
    with tiny_cfg.data.unlocked():
        train = {"vqa": config.source("vqa", str(tmp_path / "many.json"), images=str(tmp_path))}
        tiny_cfg.data.train = tiny_cfg.data.eval = ConfigDict(train)
    assert not vqa.check(tiny_cfg) and vqa.candidates(tiny_cfg) == ["ring"]
    assert "1 answers are ranked, the majority's to 9 or more of the 17 questions" in capsys.readouterr().out
    tiny_cfg.task.answer_list = str(tmp_path / "nowhere.json")
    assert vqa.candidates(tiny_cfg) == ["ring"]
    assert "nowhere.json is not there; 1 answers are ranked" in capsys.readouterr().out
    tiny_cfg.task.answer_list = str(files / "answer_list.json")
    assert vqa.candidates(tiny_cfg)[0] == "ring" and len(vqa.candidates(tiny_cfg)) == 6
    tiny_cfg.task.answer_list = str(tmp_path / "marked.json")  # with a byte order mark
    (tmp_path / "marked.json").write_text('["star"]', encoding="utf-8-sig")
    assert vqa.candidates(tiny_cfg) == ["star"]
    with tiny_cfg.data.unlocked():
        tiny_cfg.task.answer_list, tiny_cfg.data.train = "", ConfigDict()
    assert "no data.train to make one from" in vqa.check(tiny_cfg)[0]


# --- runs -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def pretrained(tiny_cfg, tmp_path):
    """Workdir with the first checkpoint of a pre-training run, of a narrow ViT as wide as the texts."""
    tiny_cfg.model.vit.update(width=32, mlp=64)
    return begun(tiny_cfg, tmp_path / "pretrained")


def test_a_run_starts_from_pretraining_resumes_and_is_evaluated(pretrained, tiny_cfg, files, tmp_path, capsys):
    before = dict(trees.paths(checkpoint.load_params(pretrained)))
    cfg = tiny_cfg
    cfg.objective, cfg.task, cfg.train.init_from, cfg.model.img_size = "vqa", vqa.leaves(), str(pretrained), 32
    cfg.task.update(answers=3, answer_len=6, answer_list=str(files / "answer_list.json"), k=3)
    with cfg.data.unlocked():
        cfg.data.train = ConfigDict(
            {
                "vqa": config.source("vqa", str(files / "v2_*.json"), images=str(files), weight=4.0),
                "vg": config.source("vqa", str(files / "vg_qa.json"), images=str(files), weight=2.0),
            }
        )
        cfg.data.eval = ConfigDict({"vqa": config.source("vqa", str(files / "v2_*.json"), images=str(files))})
    cfg.data.epoch_examples = 16
    cfg.train.update(steps=2, log_every=1, save_every=1)
    out = loop.fit(cfg, tmp_path / "run")
    said = capsys.readouterr().out
    for part in (
        "position table resized from 5 to 17",
        "have no place in this model and are left out: itm_head/bias",
        "FLOPs: ",
        "vqa: questions 4.00  accuracy ",
    ):
        assert part in said, part
    assert (
        0 <= out["eval"]["accuracy"] <= 100
        and out["eval"]["questions"] == 4
        and out["eval"]["answer_type/other"] == out["eval"]["accuracy"]
    )
    after = dict(trees.paths(checkpoint.load_params(tmp_path / "run" / "checkpoints" / "1")))
    for path, x in after.items():
        if path != "vit/pos_embed":
            assert np.abs(x - before[path.replace("med_dec/", "med/")]).max() < 0.01, path  # one step in the warm-up

    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "2")
    assert loop.fit(cfg, tmp_path / "cut")["step"] == 2
    assert leaves(tmp_path / "cut") == leaves(tmp_path / "run") and rows(tmp_path / "cut") == rows(tmp_path / "run")

    ranked = evaluation.evaluate(cfg, tmp_path / "run")
    assert {k: v for k, v in ranked.items() if k != "predictions"} == out["eval"]
    told = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert told == json.loads((tmp_path / "run" / "v2_OpenEnded_mscoco_train2014_blip_results.json").read_text())
    assert collections.Counter(row["question_id"] for row in told) == collections.Counter(list(QUESTIONS))
    assert {row["answer"] for row in told} <= set(json.loads((files / "answer_list.json").read_text()))
    cfg.task.method, cfg.eval.limit = "generate", 3
    generated = evaluation.evaluate(cfg, tmp_path / "run")
    assert "nothing is written for a server: the predictions: 1 of 4 questions have" in capsys.readouterr().out
    assert generated["questions"] == 3 and all(isinstance(row["answer"], str) for row in generated["predictions"])
