"""Videos as tasks, which nothing trains: retrieval and questions against the originals' numbers, and from files and a
checkpoint to scores, on any mesh."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from world import questions
from world.golden import folder
from world.runs import begun

from blip_jax import config, losses, tasks
from blip_jax.cli import main
from blip_jax.convert.apply import from_torch, to_torch
from blip_jax.data import video
from blip_jax.data.text.clean import clean_question
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.decode.beam import Beam
from blip_jax.eval import recall
from blip_jax.eval import video_qa as scores
from blip_jax.inference import load, programs
from blip_jax.models import flops
from blip_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD
from blip_jax.parallel import sharding
from blip_jax.plan import chips, plan
from blip_jax.tasks import two_stage, video_qa, video_retrieval, vqa
from blip_jax.train import evaluation, loop

HERE = pathlib.Path(__file__).parent.parent
MINI = HERE / "mini"
ANSWERS = MINI / "msrvtt/qa_lavis/qa_ans2label.json"
ATOL, GRAD_TOL = 1e-5, 1e-4  # the second of the largest entry


# --- goldens ----------------------------------------------------------------------------------------------------------
@functools.cache
def golden(name: str, task, family: str):
    """(meta, arrays of the original, config, model, parameters) of a golden case."""
    meta, io = (
        json.loads((folder(f"blip/{name}") / "meta.json").read_text()),
        np.load(folder(f"blip/{name}") / "io.npz"),
    )
    s, cfg = meta["config"], config.base("tiny")
    with cfg.unlocked():
        cfg.objective, cfg.task = name, task.leaves()
        cfg.model.vit.update(width=s["vw"], depth=s["vdepth"], heads=s["vheads"], mlp=4 * s["vw"], patch=s["patch"])
        cfg.model.med.update(
            width=s["tw"], layers=s["tl"], heads=s["th"], mlp=s["ti"], positions=s["pos"], vocab_size=s["vocab"]
        )
        cfg.model.update(img_size=s["img"], embed_dim=s["embed"], dropout=0.0, dtype="float32")
        cfg.task.frames = s["frames"]
    tensors = load_file(folder(f"blip/{name}") / "weights.safetensors")
    params = jax.tree.map(jnp.asarray, from_torch(family, tensors, heads=dict(vit=s["vheads"], med=s["th"]))["params"])
    return meta, io, cfg, task.build(cfg), params


def frames_last(io):
    """Normalised videos f32[B,R,S,S,3]."""
    return np.moveaxis(io["video"], 2, -1)


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=3e-6, atol=ATOL)


class Videos:
    """Stands for an EvalVideos and a Tokenizer: pixels that normalising makes those of the case, texts by number."""

    def __init__(self, io):
        self.img = (frames_last(io) * np.array(PIXEL_STD) + np.array(PIXEL_MEAN)) * 255
        self.ids, self.mask = io["input_ids"].astype(np.int32), io["attention_mask"] > 0
        self.n_images, self.captions = len(self.img), list(range(len(self.ids)))
        self.text_image = np.arange(len(self.ids))

    def image_batches(self, batch):
        for start in range(0, self.n_images, batch):
            img, index = np.zeros((batch, *self.img.shape[1:]), np.float32), np.full(batch, -1)
            found = self.img[start : start + batch]
            img[: len(found)], index[: len(found)] = found, np.arange(start, start + len(found))
            yield {"img": img, "index": index}

    def encode(self, captions, max_len):
        assert max_len == self.ids.shape[1]
        return self.ids[captions], self.mask[captions]


def test_golden_retrieval_of_videos():
    meta, io, cfg, model, params = golden("video_retrieval", video_retrieval, "retrieval")
    data, ks = Videos(io), [int(m[1]) for m in (re.fullmatch(r"score_v2t_k(\d+)", name) for name in io.files) if m]
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    assert ks
    for k in ks:
        own = cfg.copy_and_resolve_references()
        own.text.max_len, own.eval.k, own.eval.batch, own.eval.rerank_texts = data.ids.shape[1], k, 4, 4
        found = two_stage.two_stage_scores(own, model, params, data, data, mesh)
        close(found.cosine, io["sims"])
        close(found.i2t, io[f"score_v2t_k{k}"])
        close(found.t2i.T, io[f"score_t2v_k{k}"])
        ours = recall.video(found.i2t, found.t2i, found.text_image)
        theirs = dict(zip(meta["metrics"], io[f"metrics_k{k}"]))
        assert ours.keys() == theirs.keys()
        # among pairs that are not re-ranked the original's order is an accident
        told = lambda name: k >= data.n_images or name[-1].isdigit() and int(name.split("_r")[1]) <= k
        compared = {name: value for name, value in theirs.items() if told(name)}
        assert compared and {name: ours[name] for name in compared} == pytest.approx(compared)


def asked_of(model, params, io):
    """(what the answer decoder attends to, the questions' states, their mask) of the golden's questions."""
    mask, ids = jnp.asarray(io["question_mask"] > 0), jnp.asarray(io["question_ids"], jnp.int32)
    apply = functools.partial(model.apply, {"params": params})
    img_tok = apply(jnp.asarray(frames_last(io)), method="encode_image")
    states = apply(ids, mask, apply(img_tok, method="image_kv"), method="encode_question")
    return apply(states, method="question_kv"), states, mask


def test_golden_questions_about_videos_states_ranks_and_answers():
    meta, io, _, model, params = golden("video_qa", video_qa, "vqa")
    kv, states, mask = jax.jit(lambda p: asked_of(model, p, io))(params)
    close(states, io["question_states"])
    texts = jnp.asarray(io["candidate_ids"], jnp.int32), jnp.asarray(io["candidate_mask"] > 0)
    for name in (name for name in io.files if name.startswith("rank_")):
        k, over = int(name.rsplit("_k", 1)[1]), "all" if "torch110" in name else "valid"
        best, value = jax.jit(functools.partial(programs.rank_answers, model, k=k, smoothing_over=over))(
            params, *texts, kv, mask
        )
        np.testing.assert_array_equal(best[:, 0], io[name])
        theirs = io["candidate_scores" + "_torch110" * (over == "all")]
        close(value, np.take_along_axis(theirs, np.asarray(best), axis=1))
    ends = {"eos": meta["tokens"]["sep"], "pad": meta["tokens"]["pad"]}
    for name in (name for name in io.files if name.startswith("generate_beam")):
        how = Beam(beams=int(name.removeprefix("generate_beam")), min_length=1, max_length=10)
        # as the original, which here does not mask the padding of questions
        answers = jax.jit(lambda p, how=how: programs.answers(model, p, kv, None, how, 1, **ends)["ids"])(params)
        theirs = io[name]
        np.testing.assert_array_equal(answers[:, 0, : theirs.shape[1]], theirs)
        assert (answers[:, 0, theirs.shape[1] :] == ends["pad"]).all()


def test_golden_loss_and_every_gradient_of_questions_about_videos():
    """What nobody trains here; it shows that the wiring is the original's in every parameter."""
    meta, io, cfg, model, params = golden("video_qa", video_qa, "vqa")
    ids, mask = jnp.asarray(io["answer_ids"], jnp.int32), jnp.asarray(io["answer_mask"] > 0)
    of, V = jnp.asarray(np.repeat(np.arange(len(io["n"])), io["n"])), meta["config"]["vocab"]

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, overs):
        kv, _, asked = asked_of(model, params, io)
        logits = model.apply({"params": params}, ids, mask, kv, asked, of=of, method="lm_logits")
        given = logits, ids[:, 1:], mask[:, 1:], jnp.asarray(io["weights"]), len(io["n"]), V
        both = [losses.answers(*given, smoothing=0.1, over=over) for over in overs]
        return both[0], both

    (_, found), grads = loss(params, ("valid", "all"))
    close(found, np.stack([io["loss"], io["loss_torch110"]]))
    grads = to_torch("vqa", {"params": jax.tree.map(np.asarray, grads)}, vocab_size=V)
    names = [name for name in io.files if name.startswith("grad/")]
    assert names
    for name in names:
        key, theirs = name.removeprefix("grad/"), io[name]
        largest = np.abs(theirs).max()
        if key.endswith("key.bias"):  # its exact gradient is zero
            assert largest < 1e-5 and np.abs(grads[key]).max() < 1e-5, key
        else:
            np.testing.assert_allclose(grads[key], theirs, rtol=0, atol=GRAD_TOL * largest, err_msg=key)


# --- settings ---------------------------------------------------------------------------------------------------------
def of_task(cfg, task, name: str, kind: str, path: str, images: str):
    """`cfg` as one of `task` on a file of the mini data sets, three frames of each video."""
    cfg.objective, cfg.task = name, task.leaves()
    cfg.task.frames = 3
    with cfg.data.unlocked():
        cfg.data.train = ConfigDict()
        cfg.data.eval = ConfigDict({"clips": config.source(kind, str(MINI / path), images=str(images))})
    cfg.train.steps = 0
    cfg.eval.update(batch=2, rerank_texts=2, k=2)
    return cfg


def retrieval_of(cfg, images=MINI / "msrvtt"):
    return of_task(cfg, video_retrieval, "video_retrieval", "video_text", "msrvtt/annotation/msrvtt_test.jsonl", images)


def questions_of(cfg, data: str, images=None):
    folder = {"msrvtt": "qa_official", "msvd_qa": "official"}[data]
    cfg = of_task(cfg, video_qa, "video_qa", "video_qa", f"{data}/{folder}/test_qa.json", images or MINI / data)
    cfg.task.max_length, cfg.task.k = 6, 5
    cfg.task.train_answers = str(ANSWERS)
    return cfg


def test_training_is_refused_and_asks_for_nothing_else(tiny_cfg, tmp_path):
    for cfg, model in (
        (retrieval_of(tiny_cfg.copy_and_resolve_references()), "retrieval"),
        (questions_of(tiny_cfg, "msrvtt"), "vqa"),
    ):
        tasks.validate(cfg)
        wanted = f"{cfg.objective} is evaluated, not trained: train objective {model}, and evaluate this one with"
        with pytest.raises(ValueError, match=wanted):
            loop.fit(cfg, tmp_path)
    tiny_cfg.mesh.data = 3
    with pytest.raises(ValueError, match="8 are here"):
        tasks.validate(tiny_cfg, None, 1, 8)


@pytest.mark.parametrize(
    "task, leaves, expected",
    [
        ("video_retrieval", {"frames": 0}, "task.frames is 0: it must be at least 1"),
        ("video_qa", {"frames": 0, "k": 0}, "the config has 2 problems"),
        ("video_qa", {"max_length": 41}, "task.max_length is 41 but the text model has model.med.positions = 40"),
    ],
)
def test_settings_that_do_not_fit(tiny_cfg, task, leaves, expected):
    cfg = retrieval_of(tiny_cfg) if task == "video_retrieval" else questions_of(tiny_cfg, "msrvtt")
    cfg.task.update(leaves)
    with pytest.raises(ValueError, match=expected):
        tasks.validate(cfg)


def test_a_plan_of_the_evaluation_has_every_frame(tiny_cfg):
    cfg, chip = retrieval_of(tiny_cfg), chips.topology("v5e:2x2")
    see, _, rerank = plan.made(plan.request(cfg, chip, "evaluate"))
    img, positions = see.args[1], flops.positions(cfg.model, 3)
    assert img.shape == (4, 3, 16, 16, 3) and rerank.args[1].shape == (4, positions, cfg.model.vit.width)
    assert see.flops == flops.count_function(see.function, *see.args)
    with pytest.raises(ValueError, match="video_retrieval is evaluated, not trained"):
        plan.request(cfg, chip, "train")
    cfg = questions_of(tiny_cfg, "msrvtt")
    look, _ = plan.made(plan.request(cfg, chip, "evaluate"))
    assert look.args[1].shape == (4, 3, 16, 16, 3)
    assert look.flops == flops.count_function(look.function, *look.args)


def test_lists_of_answers(tiny_cfg, tmp_path):
    cfg = questions_of(tiny_cfg, "msrvtt")
    cfg.task.train_answers = ""
    assert video_qa.candidates(cfg) == {}
    cfg.task.vqa_answers = str(MINI / "vqa/annotation/answer_list.json")
    cfg.task.train_answers = str(ANSWERS)
    found = video_qa.candidates(cfg)
    assert found["rank_vqa"] == json.loads((MINI / "vqa/annotation/answer_list.json").read_text())
    assert found["rank_train"][:4] == ["bottle", "bowl", "person", "two"]
    rows = [{"question": "?", "answer": text} for text in ("two", " Dog ", "two", "cat", "dog", "dog")]
    for content, expected in (
        (rows, ["dog", "two", "cat"]),
        ([], "holds no answers"),
        ({"a": "b"}, "holds no answers"),
        (["a", 2], "holds no answers"),
    ):
        path = tmp_path / f"{len(str(content))}.json"
        path.write_text(json.dumps(content))
        cfg.task.update(vqa_answers="", train_answers=str(path))
        if isinstance(expected, list):
            assert video_qa.candidates(cfg) == {"rank_train": expected}
        else:
            with pytest.raises(ValueError, match=f"task.train_answers=.*{expected}"):
                video_qa.candidates(cfg)
    cfg.task.train_answers = str(tmp_path / "none.json")
    with pytest.raises(ValueError, match="task.train_answers=.*cannot be read as JSON"):
        video_qa.eval_data(cfg, None, tmp_path / "skipped.jsonl")


def test_accuracy_is_of_the_same_words():
    assert scores.accuracy(["Dog", " two ", "a dog"], ["dog", "two", "dog"]) == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="no answer"):
        scores.accuracy([], [])


# --- from files and a checkpoint to numbers ---------------------------------------------------------------------------
def test_retrieval_from_files_to_numbers(tiny_cfg, tmp_path, capsys):
    filter_ = begun(tiny_cfg, tmp_path / "filter")
    cfg = retrieval_of(tiny_cfg)
    result = evaluation.evaluate(cfg, tmp_path / "run", str(filter_))
    kept = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert kept.pop("checkpoint").startswith(str(filter_)) and kept == tasks.numbers(result)
    mine = [f"--results={tmp_path / 'run' / 'scores.npz'}", f"--references={cfg.data.eval.clips.path}", "--json"]
    capsys.readouterr()
    assert main.main(["score", "retrieval", *mine]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == {name: kept[name] for name in again} and "vid_mdR" in again
    assert (result["videos"], result["texts"]) == (3, 3) and 1 <= result["vid_mdR"] <= 3
    text = video_retrieval.table(result)
    assert "text to video, cosine alone" in text and f"{result['vid_mdR']:7.1f}" in text
    # the same of one device, whose batches hold other videos together
    cfg.eval.update(batch=3, rerank_texts=3)
    loaded = load.load(filter_, mesh := sharding.make_mesh(cfg.mesh, jax.devices()[:1]))
    data = video_retrieval.eval_data(cfg, loaded.tokenizer, tmp_path / "skipped.jsonl")
    again = video_retrieval.evaluate(loaded._replace(cfg=cfg), data, mesh)
    assert tasks.numbers(again) == pytest.approx(kept)


@pytest.fixture
def answering(tiny_cfg, tmp_path):
    """Workdir with the first checkpoint of a run for questions about pictures."""
    files = questions.write_files(tmp_path)
    cfg = tiny_cfg.copy_and_resolve_references()
    cfg.objective, cfg.task = "vqa", vqa.leaves()
    cfg.task.method, cfg.task.max_length = "generate", 6
    cfg.model.init_std = 0.3  # so that answers depend on video and question
    with cfg.data.unlocked():
        cfg.data.train = ConfigDict({"q": config.source("vqa", str(files / "vqa_train.json"), images=str(files))})
    cfg.data.epoch_examples = 16
    return begun(cfg, tmp_path / "vqa")


@pytest.mark.parametrize("data", ["msrvtt", "msvd_qa"])
def test_answers_from_files_to_numbers(data, answering, tiny_cfg, tmp_path, capsys):
    cfg = questions_of(tiny_cfg, data)
    cfg.task.train_answers = str(tmp_path / "answer_list.json")  # which `answering` left there
    result = evaluation.evaluate(cfg, tmp_path / "run", str(answering))
    path = pathlib.Path(cfg.data.eval.clips.path)
    rows = json.loads(path.read_text())
    told = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert told == result["predictions"] and [row["question_id"] for row in told] == [str(row["id"]) for row in rows]
    assert (result["questions"], result["unanswered"]) == (len(rows), 0)
    assert result["videos"] == len({row["video_id"] for row in rows})
    right = [row["answer"] for row in rows]
    assert result["accuracy"] == scores.accuracy([row["answer"] for row in told], right)
    assert result["rank_train"] == scores.accuracy([row["rank_train"] for row in told], right)
    assert "rank_vqa" not in result and "ranked, training answers" in video_qa.table(result)
    capsys.readouterr()
    mine = [f"--results={tmp_path / 'run' / 'predictions.json'}", f"--references={path}", "--json"]
    assert main.main(["score", "video_qa", *mine]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == {name: result[name] for name in ("accuracy", "rank_train", "questions")}

    # each question by itself, with its video's frames as one picture's, on one device
    loaded = load.load(answering, sharding.make_mesh(cfg.mesh, jax.devices()[:1]))
    model, tokenizer = loaded.model, Tokenizer(cfg.text.vocab)
    how, texts = Beam(beams=3, min_length=1, max_length=6), video_qa.candidates(cfg)["rank_train"]
    encoded = tokenizer.encode(texts, int(tokenizer.lengths(texts, 40).max()))

    @jax.jit
    def alone(params, img, ids, mask, *encoded):
        kv = programs.question_kv(model, params, programs.view(model, "kv")(params, img)["kv"], ids, mask)
        found = programs.answers(model, params, kv, mask, how, 1, eos=tokenizer.sep, pad=tokenizer.pad)["ids"]
        return found[0, 0, 1:], programs.rank_answers(model, params, *encoded, kv, mask, k=5)[0][0, 0]

    source = video_qa.eval_data(cfg, tokenizer, tmp_path / "skipped.jsonl")
    for row, record in zip(told, source.records, strict=True):
        img = video.frames(record["video"], 3, cfg.model.img_size)[0][None]
        asked = tokenizer.encode([clean_question(record["question"])], cfg.text.max_len)
        ids, best = alone(loaded.params, img, *asked, *encoded)
        assert (row["answer"], row["rank_train"]) == (tokenizer.decode(ids), texts[int(best)])
    for name in ("answer", "rank_train"):
        assert len({row[name] for row in told}) > 1, f"nothing told apart by {name}: {told}"


def test_questions_about_a_video_that_cannot_be_read_are_left_out_and_counted(answering, tiny_cfg, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for path in (MINI / "msrvtt" / "videos").iterdir():
        (clips / path.name).write_bytes(b"no video" if path.stem == "video7011" else path.read_bytes())
    cfg = questions_of(tiny_cfg, "msrvtt", clips)
    cfg.task.train_answers = str(tmp_path / "answer_list.json")
    result = evaluation.evaluate(cfg, tmp_path / "run", str(answering))
    assert (result["videos"], result["questions"], result["unanswered"]) == (2, 6, 3)
    assert len(result["predictions"]) == 6 and ", 3 unanswered" in video_qa.table(result)
    lines = (tmp_path / "run" / "skipped-eval.jsonl").read_text().splitlines()
    (told,) = (row for row in map(json.loads, lines) if not row["used"])
    assert told["key"].endswith(":158584") and told["reason"].startswith("broken video")
    for path in clips.iterdir():
        path.write_bytes(b"no video")
    with pytest.raises(ValueError, match="not one of the 3 videos can be read"):
        evaluation.evaluate(cfg, tmp_path / "run", str(answering))
