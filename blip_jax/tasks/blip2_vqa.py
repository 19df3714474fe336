"""Visual question answering with BLIP-2: a frozen language model answers behind a prompt with the question, which the
Q-Former reads too, so that the queries look for what is asked (BLIP-2 paper, section 4.3; reference: InstructBLIP's
wiring, additions, section C).

OPT learns the answer and its end behind the prompt, T5 writes the answer. Of several answers of people one is drawn, as
likely as people gave it, so that the mean loss weighs them as BLIP's VQA does. What is trained follows from
optim.freeze: in the paper all but the language model.
"""

from __future__ import annotations

import collections

import jax
import numpy as np
from ml_collections import ConfigDict

from blip_jax.data.evaluation import EvalRows
from blip_jax.data.source import BadRecord
from blip_jax.data.text.clean import clean_question, plain_text, too_long
from blip_jax.data.text.tokenizers import WithQuestions
from blip_jax.decode import limits
from blip_jax.inference import language
from blip_jax.inference.batching import Pass, Runner, at_most
from blip_jax.inference.programs import Method
from blip_jax.models import flops as counts
from blip_jax.models.blip2_llm import Blip2Llm
from blip_jax.tasks import blip2_stage1, blip2_stage2, step, vqa

START = blip2_stage2.START  # a first stage has the Q-Former's words, which a second stage's file lacks
loss, table = blip2_stage2.loss, vqa.table
BEGINS_FROM = "both stages of BLIP-2, its tower and its language model"


def leaves() -> ConfigDict:
    """c.task of this objective."""
    c = ConfigDict()
    c.answer_len = 16  # tokens of an answer with its end; longer ones are cut, and noted
    c.beams = 5  # evaluation
    c.max_length = 10  # evaluation: new tokens
    c.length_penalty = 0.0  # evaluation: of scores; LAVIS's of zero-shot answers are 0 with OPT and -1 with T5
    return c


def check(cfg, tokenizer=None) -> list[str]:
    out, task = step.group_problems(cfg, least=1), cfg.task
    if not cfg.model.get("llm"):
        return ["model has no llm but objective is blip2_vqa: let the config begin with config.blip2(llm=...)"]
    if cfg.text.buckets:
        out.append(f"text.buckets is {cfg.text.buckets}: questions have one length, text.max_len; leave it empty")
    for name, least in (("answer_len", 2), ("beams", 1), ("max_length", 1)):
        if task[name] < least:
            out.append(f"task.{name} is {task[name]}: it must be at least {least}")
    if "{}" not in cfg.text.prompt:
        out.append(
            f"text.prompt is {cfg.text.prompt!r}: put {{}} where the question belongs, as 'Question: {{}} Answer:'"
        )
    if cfg.text.question and "{}" not in cfg.text.question:
        out.append(f"text.question is {cfg.text.question!r}: put {{}} where the question belongs, or leave it empty")
    if cfg.text.max_len > cfg.model.qformer.positions:
        out.append(
            f"text.max_len is {cfg.text.max_len} but the Q-Former has model.qformer.positions = "
            f"{cfg.model.qformer.positions}: lower the first"
        )
    own = cfg.model.qformer.queries + cfg.text.max_len + task.answer_len
    if cfg.model.llm.kind == "opt" and own > cfg.model.llm.positions:
        out.append(
            f"queries, text.max_len and task.answer_len are {own} positions together, but OPT has model.llm.positions "
            f"= {cfg.model.llm.positions}: lower either"
        )
    if out or tokenizer is None:
        return out
    if not isinstance(tokenizer, WithQuestions):
        return [
            f"text.vocab={cfg.text.vocab} names the language model's vocabulary alone: add, behind a comma, BERT's for "
            "the Q-Former"
        ]
    entries = tokenizer.questions.vocab_size - 1  # with [DEC], without [ENC]
    if entries != cfg.model.qformer.vocab_size:
        out.append(
            f"model.qformer.vocab_size is {cfg.model.qformer.vocab_size}, but {tokenizer.questions.path} has {entries} "
            f"entries with [DEC]: set model.qformer.vocab_size={entries}, or name another one behind the comma"
        )
    room = cfg.text.max_len - int(tokenizer.lengths([cfg.text.prompt.replace("{}", "")], 1 << 20)[0])
    if room < 1:
        out.append(
            f"text.prompt={cfg.text.prompt!r} takes all of text.max_len={cfg.text.max_len} tokens: raise text.max_len, "
            "or shorten the prompt"
        )
    return out


def build(cfg) -> Blip2Llm:
    frozen = blip2_stage1.FROZEN in tuple(cfg.optim.freeze)
    return Blip2Llm.from_config(cfg.model, questions=True, frozen=frozen)


# --- training ---------------------------------------------------------------------------------------------------------
def example(record: dict, rng: np.random.Generator, cfg, tokenizer) -> dict:
    """A question and one of its answers: `question`'s arrays, and with T5 "out_ids" i32[U], "out_mask" bool[U], U =
    task.answer_len; with OPT ids i32[T+U] are prompt, answer and end, of which "lm_mask" bool[T+U] are learned.

    BadRecord: no answer is known.
    """
    given = collections.Counter(record["answers"])
    if not given:
        raise BadRecord(record["key"], "question without an answer")
    texts, people = list(given), np.array(list(given.values()), np.float64)
    answer, broken = plain_text(texts[int(rng.choice(len(texts), p=people / people.sum()))])
    row, U = question(record, cfg, tokenizer, pad_left=False), cfg.task.answer_len
    row["notes"] += broken
    opt = cfg.model.llm.kind == "opt"
    written = f" {answer}\n" if opt else answer
    tokens = int(tokenizer.lengths([written], 1 << 20)[0]) - opt  # without the "</s>" before a text of OPT's
    if tokens > U:
        row["notes"].append(f"long answer: {tokens} tokens, of which {U} are kept")
    if not opt:
        ids, mask = tokenizer.encode([written], U)
        return row | {"out_ids": ids[0], "out_mask": mask[0]}
    hidden = int(row["txt_mask"].sum())
    ids, mask = np.full(cfg.text.max_len + U, tokenizer.pad, np.int32), np.zeros(cfg.text.max_len + U, bool)
    (found,), (real,) = tokenizer.encode([written], U + 1)
    both = np.concatenate([row["ids"][:hidden], found[real][1:]])
    ids[: len(both)], mask[: len(both)] = both, True
    return row | {"ids": ids, "txt_mask": mask, "lm_mask": mask & (np.arange(len(ids)) >= hidden)}


def question(record: dict, cfg, tokenizer, *, pad_left: bool = True) -> dict:
    """{"img": bytes, "ids": i32[T], "txt_mask": bool[T], "question": i32[T], "question_mask": bool[T], "notes"}: what
    the language model reads, and what the Q-Former does, T = text.max_len.

    Of a question that is too long the last words are left out, so that the prompt is whole. pad_left: of OPT, where it
    is to go on from the prompt.
    """
    written, broken = plain_text(record["question"])
    words, T = clean_question(written).split(" "), cfg.text.max_len
    notes = ["long question, cut"] if too_long(written) else []
    prompt = lambda: cfg.text.prompt.replace("{}", " ".join(words))
    while len(words) > 1 and tokenizer.lengths([prompt()], 1 << 20)[0] > T:
        words.pop()
        notes = ["long question, cut"]
    how = {"pad_left": pad_left} if cfg.model.llm.kind == "opt" else {}
    (ids,), (mask,) = tokenizer.encode([prompt()], T, **how)
    asked = cfg.text.question.replace("{}", " ".join(words)) or prompt()
    (own,), (own_mask,) = tokenizer.questions.encode([asked], T, keep_end=True)
    row = {"img": record["image"], "ids": ids, "txt_mask": mask, "notes": broken + notes}
    return row | {"question": own, "question_mask": own_mask}


def shapes(cfg) -> dict:
    B, S, T, U = cfg.train.batch, cfg.model.img_size, cfg.text.max_len, cfg.task.answer_len
    opt = cfg.model.llm.kind == "opt"
    read = T + U if opt else T
    out = {"img": ((B, S, S, 3), np.uint8), "ids": ((B, read), np.int32), "txt_mask": ((B, read), bool)}
    out |= {"question": ((B, T), np.int32), "question_mask": ((B, T), bool)}
    if opt:
        return out | {"lm_mask": ((B, read), bool)}
    return out | {"out_ids": ((B, U), np.int32), "out_mask": ((B, U), bool)}


def flops(cfg, T: int | None = None) -> dict[str, float]:
    """FLOPs of a training step per question with one answer."""
    T, U, freeze = T or cfg.text.max_len, cfg.task.answer_len, tuple(cfg.optim.freeze)
    frozen, llm_frozen = blip2_stage1.FROZEN in freeze, any(regex.startswith("llm/") for regex in freeze)
    read = T + U if cfg.model.llm.kind == "opt" else T
    return counts.blip2_stage2_step(cfg, read, U=U, question=T, frozen=frozen, llm_frozen=llm_frozen)


# --- evaluation -------------------------------------------------------------------------------------------------------
def eval_data(cfg, tokenizer, skipped_path) -> EvalRows:
    """The questions of cfg.data.eval, with answers of people or without."""
    return EvalRows(cfg, tokenizer, question, cfg.data.eval, skipped_path=skipped_path)


def evaluate(loaded, data: EvalRows, mesh) -> dict:
    """Accuracies and "predictions", as `vqa.evaluate` has them."""
    return vqa.scored(answered(loaded, data, mesh))


def passes(cfg, model, unit: int) -> list[Pass]:
    """What `evaluate` runs, for plans: which ids begin or end an answer does not change what is computed. unit: as of
    `Runner`."""
    B, S, T, task = at_most(cfg.eval.batch, unit), cfg.model.img_size, cfg.text.max_len, cfg.task
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype)
    read = rows(np.int32, T), rows(bool, T)
    program = language.generating(model, method(cfg), language.Ids(0, 1, 2))
    flops = counts.blip2_caption_image(cfg.model, T, task.max_length, task.beams, question=T)
    given = rows(np.uint8, S, S, 3), rows(np.uint32, 2), *read, *read
    return [Pass("answers", program, given, flops, pictures=1, trips=task.max_length - 1)]


def method(cfg) -> Method:
    """How cfg.task has answers made, by beams, lengths being new tokens."""
    task = cfg.task
    how = Method("beam", beams=task.beams, length_penalty=task.length_penalty, repetition_penalty=1.0, rule="lavis")
    return how._replace(**limits.lengths(1, 0, task.max_length))


def submission(result: dict, cfg) -> tuple[str, str]:
    """(file name, content) for the challenge's server, as `vqa.submission`."""
    return vqa.for_server(result, cfg, name="blip2")


def answered(loaded, data: EvalRows, mesh):
    """(record, answer) of each question in order; each question once, whatever fills the last batch."""
    cfg, tokenizer, runner = loaded.cfg, loaded.tokenizer, Runner(mesh)
    size = runner.size(len(data), cfg.eval.batch)
    program = vqa.jitted(language.generating, loaded.model, method(cfg), language.special(loaded.model, tokenizer))
    names = ("img", "keys", "ids", "txt_mask", "question", "question_mask")

    def passes():
        for records, rows in data.batches(size):
            rows["keys"] = np.zeros((len(records), 2), np.uint32)  # beams draw nothing
            yield records, program(loaded.params, *(runner.put(rows[name], size) for name in names))

    with jax.set_mesh(mesh):
        for records, found in runner.fetched(passes()):
            yield from ((record, tokenizer.decode(row[0, 1:]).strip()) for record, row in zip(records, found["ids"]))


samples = answered
