"""VQA with BLIP-2 as a task: its rows, what it costs, and runs that start from both stages, resume, are evaluated and
answer as their verbs do."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from world.convert import same_bits
from world.pieces import write_pieces
from world.questions import PEOPLE, QUESTIONS, write_files
from world.runs import begun, leaves, rows

import blip_jax
from blip_jax import config, tasks, trees
from blip_jax.cli import main
from blip_jax.convert import read, write
from blip_jax.convert.source import official
from blip_jax.data.scenes.world import vocab_captions
from blip_jax.data.source import BadRecord
from blip_jax.data.text import tokenizers
from blip_jax.data.text.bpe import train_bpe
from blip_jax.models import flops, initial
from blip_jax.models.layers.dense import rounded_once
from blip_jax.tasks import blip2_stage1, step
from blip_jax.tasks import blip2_vqa as task
from blip_jax.train import evaluation, loop

KINDS = pytest.mark.parametrize("llm", ["opt", "flant5"])


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory, tiny_vocab):
    """kind -> text.vocab of the tiny language model and the tiny Q-Former."""
    folder, captions = tmp_path_factory.mktemp("llm"), list(vocab_captions(300))
    train_bpe(captions, 300, folder / "vocab.json")
    write_pieces(captions, 140, folder / "pieces.json")
    return {"opt": f"{folder / 'vocab.json'},{tiny_vocab}", "flant5": f"{folder / 'pieces.json'},{tiny_vocab}"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("vqa"))


def tiny(llm, vocab="", **more):
    c = config.blip2("eva_tiny", "tiny", f"{llm}_tiny").unlock()
    c.objective, c.task = "blip2_vqa", task.leaves()
    c.model.update(img_size=16, embed_dim=16, dtype="float32", dropout=0.0, llm_dropout=0.0)
    c.text.update(vocab=vocab, max_len=40, prompt="Question: {} Answer:", question="{}")
    c.task.update(answer_len=6, beams=2, max_length=5)
    c.train.batch, c.optim.freeze = 16, ("llm/.*",)
    c.data.threads = c.data.prefetch = 2
    c.update_from_flattened_dict(more)
    return c


def asked(answers, text="The (ring), left?"):
    return {"key": "7", "image": b"", "question": text, "answers": answers, "dataset": "vqa"}


def real(ids, mask):
    return ids[mask].tolist()


# --- rows -------------------------------------------------------------------------------------------------------------
@KINDS
def test_only_the_answer_and_its_end_are_learned_and_the_q_former_reads_the_question(llm, vocabularies):
    cfg = tiny(llm, vocabularies[llm])
    both = tokenizers.of_config(cfg)
    row = task.example(asked(["two"] * 10), np.random.default_rng(0), cfg, both)
    assert {name: x.shape for name, x in row.items() if name not in ("img", "notes")} == {
        name: shape[1:] for name, (shape, _) in task.shapes(cfg).items() if name != "img"
    }
    if llm == "opt":
        learned, read = row["ids"][row["lm_mask"]], row["ids"][row["txt_mask"] & ~row["lm_mask"]]
        assert learned[-1] == both.newline and both.decode(learned) == "two"
        # the very ids that the whole text has
        whole, mask = both.encode(["Question: the ring, left? Answer: two\n"], len(row["ids"]))
        assert real(row["ids"], row["txt_mask"]) == real(whole[0], mask[0])
    else:
        learned, read = row["out_ids"][row["out_mask"]], row["ids"][row["txt_mask"]]
        assert learned[-1] == read[-1] == both.eos and both.decode(learned) == "two"
    want, mask = both.encode(["Question: the ring, left? Answer:"], 40)
    assert read.tolist() == real(want[0], mask[0])
    want, mask = both.questions.encode(["the ring, left?"], 40)
    assert real(row["question"], row["question_mask"]) == real(want[0], mask[0])
    cfg.text.question = ""  # InstructBLIP's: the same string
    row = task.question(asked([]), cfg, both)
    want, mask = both.questions.encode(["Question: the ring, left? Answer:"], 40)
    assert real(row["question"], row["question_mask"]) == real(want[0], mask[0])
    if llm == "opt":  # from here it goes on
        assert row["txt_mask"][-1] and not row["txt_mask"][0]


def test_answers_are_drawn_as_often_as_people_gave_them(vocabularies):
    cfg = tiny("flant5", vocabularies["flant5"])
    both, seen = tokenizers.of_config(cfg), []
    for seed in range(300):
        row = task.example(asked(["yes"] * 7 + ["no"] * 3), np.random.default_rng(seed), cfg, both)
        seen.append(both.decode(row["out_ids"]))
    assert set(seen) == {"yes", "no"} and abs(seen.count("yes") / 300 - 0.7) < 0.1
    with pytest.raises(BadRecord, match="question without an answer"):
        task.example(asked([]), np.random.default_rng(0), cfg, both)


@KINDS
def test_a_long_question_loses_its_last_words_and_no_part_of_the_prompt(llm, vocabularies):
    cfg = tiny(llm, vocabularies[llm])
    both = tokenizers.of_config(cfg)
    row = task.example(asked(["a red circle " * 5], "red " * 40), np.random.default_rng(0), cfg, both)
    assert row["notes"][0] == "long question, cut" and row["notes"][1].startswith("long answer: ")
    prompt = task.question(asked([], "red " * 40), cfg, both)
    said = both.decode(prompt["ids"])
    # the tiny T5 has no capitals
    assert "uestion: red red" in said and said.endswith("nswer:") and 4 < said.count("red") < 40
    assert both.decode(prompt["ids"]).count("red") == both.questions.decode(prompt["question"]).count("red")


@KINDS
def test_what_cannot_be_encoded_is_replaced_and_noted(llm, vocabularies):
    cfg = tiny(llm, vocabularies[llm])
    row = task.example(asked(["red \ud83d"], "red \ud83d?"), np.random.default_rng(0), cfg, tokenizers.of_config(cfg))
    assert row["notes"].count("broken characters replaced") == 2


@pytest.mark.parametrize(
    "leaves, expected",
    [
        ({"text.prompt": "Question:"}, "text.prompt is 'Question:': put {} where the question belongs"),
        ({"text.question": "what"}, "text.question is 'what': put {}"),
        ({"text.max_len": 41}, "text.max_len is 41 but the Q-Former has model.qformer.positions = 40"),
        ({"task.answer_len": 60}, "are 104 positions together, but OPT has model.llm.positions = 96"),
        ({"task.answer_len": 1}, "task.answer_len is 1: it must be at least 2"),
        ({"text.max_len": 8}, "takes all of text.max_len=8 tokens"),
        ({"text.buckets": (20, 40)}, "text.buckets"),
        ({"loss.group_size": 5}, "loss.group_size"),
        ({"model.qformer.vocab_size": 120}, "model.qformer.vocab_size is 120, but .* has 119 entries with"),
    ],
)
def test_settings_that_do_not_fit(leaves, expected, vocabularies):
    cfg = tiny("opt", vocabularies["opt"])
    with cfg.data.unlocked():
        cfg.data.train.vqa = config.source("vqa", "x.json")
    cfg.train.steps = 1
    both = tokenizers.of_config(cfg)
    tasks.validate(cfg, both)
    cfg.update_from_flattened_dict(leaves)
    with pytest.raises(ValueError, match=expected):
        tasks.validate(cfg, both)


def test_one_vocabulary_where_two_are_due_and_three(vocabularies):
    alone = vocabularies["opt"].split(",")[0]
    cfg = tiny("opt", alone)
    assert "names the language model's vocabulary alone" in task.check(cfg, tokenizers.of_config(cfg))[0]
    cfg.text.vocab = f"{vocabularies['opt']},{alone}"
    with pytest.raises(ValueError, match="names 3 files"):
        tokenizers.of_config(cfg)


# --- what it computes -------------------------------------------------------------------------------------------------
@KINDS
def test_cost_of_a_step_is_as_counted(llm):
    cfg = tiny(llm)
    cfg.model.llm.vocab_size = 384  # a multiple of 128: no row is padding
    model = task.build(cfg)
    shapes = jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(0)))
    trained, frozen = trees.split(shapes, cfg.optim.freeze)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "img" else dtype)
        for name, (shape, dtype) in task.shapes(cfg).items()
    }

    def loss(trained, frozen, batch):
        keys = step.Keys(jax.random.key(1), jax.random.key(2), 0)
        used = rounded_once(trees.merge(trained, frozen), model.dtype)
        return task.loss(model, cfg, used, None, batch, keys)[0]

    counted = flops.count_function(jax.grad(loss), trained, frozen, batch) / cfg.train.batch
    # As in the second stage the trace holds a gradient of the head's matrix that nobody asks for, and lacks those of
    # T5's decoder before it first looks at what was read. Of the last layer, text rows of the Q-Former are not needed.
    parts, m, q = task.flops(cfg), cfg.model.llm, cfg.model.qformer
    T, U = cfg.text.max_len, cfg.task.answer_len
    before = 2 * U * 5 * m.width * m.heads * m.head_dim + 8 * m.heads * m.head_dim * U * U if llm == "flant5" else 0
    unread = 2 * (2 * T * (2 * q.width * q.mlp))  # backward of their feed-forward
    assert counted == pytest.approx(parts["step"] + parts["lm_head"] - before - unread, rel=0.003)


# --- runs -------------------------------------------------------------------------------------------------------------
def stages(cfg, folder):
    """Workdirs of both stages that `cfg` starts from."""
    first, second = (c.copy_and_resolve_references().unlock() for c in (cfg, cfg))
    first.model.llm, first.model.llm_dropout = {}, 0.0
    first.objective, first.task, second.objective, second.task = (
        "blip2_stage1",
        blip2_stage1.leaves(),
        "blip2_stage2",
        {},
    )
    for c, vocab in ((first, cfg.text.vocab.split(",")[1]), (second, cfg.text.vocab.split(",")[0])):
        c.text.update(vocab=vocab, prompt="", max_len=12)
        c.optim.freeze = ("vit/.*",) + (("llm/.*",) if c is second else ())
        c.model.init_std = 0.2
        with c.data.unlocked():
            c.data.train, c.data.eval = ConfigDict(), ConfigDict()
            c.data.train.world = config.source("scenes", count=64, size=32)
        begun(c, folder / c.objective)
    return folder / "blip2_stage1", folder / "blip2_stage2"


@KINDS
def test_a_run_starts_from_both_stages_resumes_is_evaluated_and_answers(llm, vocabularies, files, tmp_path, capsys):
    cfg = tiny(llm, vocabularies[llm], **{"train.steps": 2, "train.log_every": 1, "train.save_every": 1})
    first, second = stages(cfg, tmp_path)
    cfg.model.img_size, cfg.train.init_from = 24, f"{first},{second}"
    given = config.source("vqa", str(files / "v2_*.json"), images=str(files))
    with cfg.data.unlocked():
        cfg.data.train.vqa, cfg.data.eval.vqa = given, given
    cfg.data.epoch_examples = 16
    out = loop.fit(cfg, tmp_path / "run")
    said = capsys.readouterr().out
    for part in ("position table resized from 5 to 10", "have no place in this model", "blip2_vqa: questions 4.00"):
        assert part in said, part
    assert out["eval"]["questions"] == 4 and 0 <= out["eval"]["accuracy"] <= 100
    saved = leaves(tmp_path / "run")
    assert "qformer/embed/word/embedding" in saved and not [path for path in saved if path.startswith("llm/")]

    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "2")
    assert loop.fit(cfg, tmp_path / "cut")["step"] == 2
    assert leaves(tmp_path / "cut") == saved and rows(tmp_path / "cut") == rows(tmp_path / "run")

    own, _ = main.config_of_run(["evaluate", f"--workdir={tmp_path / 'run'}"])  # the settings that it left
    assert json.loads(own.to_json()) == json.loads(cfg.to_json())

    # verbs of the workdir, which brings both vocabularies and its prompts, answer as the evaluation does
    model = blip_jax.from_pretrained(tmp_path / "run", batch=4)
    told = evaluation.evaluate(cfg, tmp_path / "run")["predictions"]
    pictures = [str(files / f"train2014/COCO_train2014_{number % 2:012d}.jpg") for number in PEOPLE]
    found = model.answer(
        pictures, [text.lower() for text in QUESTIONS.values()], beams=2, max_length=5, length_penalty=0
    )
    assert [row["answer"] for row in found] == [row["answer"] for row in told]
    others = model.answer(pictures[0], "what is it?", method="rank", answers=["ring", "star"])
    model.cfg.unlock().text.question = ""
    assert others != model.answer(pictures[0], "what is it?", method="rank", answers=["ring", "star"])

    # a run has a family of its own, by which it is written for others
    kind = cfg.model.llm.kind
    write.convert(tmp_path / "run", tmp_path / "hf", to="hf")
    before, after = (read.read(tmp_path / name) for name in ("run", "hf"))
    assert before.family == after.family == f"instruct_{kind}" and after.questions is not None
    trained, theirs = official(before), official(after)
    same_bits({name: theirs[name] for name in trained}, trained)
