"""Visual question answering (paper section 5.3, figure 5a): every answer that people gave is a target, weighed by how
many gave it.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from blip_jax import losses
from blip_jax.console import say
from blip_jax.data.evaluation import EvalRows
from blip_jax.data.formats import open_source
from blip_jax.data.formats.vqa import Questions
from blip_jax.data.source import BadRecord, expand
from blip_jax.data.text.clean import clean_question, plain_text, too_long
from blip_jax.decode.beam import Beam
from blip_jax.eval import submission as servers
from blip_jax.eval import vqa
from blip_jax.inference import programs
from blip_jax.inference.batching import Pass, Runner, at_most
from blip_jax.models import flops as counts
from blip_jax.models.build import Start
from blip_jax.models.vqa import BlipVqa
from blip_jax.parallel import sharding
from blip_jax.tasks import step

BEGINS_FROM = "a pre-training checkpoint, as the paper's model_base_capfilt_large.pth"
OFTEN = 9  # questions whose majority gives an answer that a made list holds
LISTED, LONGEST = 3128, 8  # answers of the published list; positions that plans give the longest, with [DEC] and [SEP]
# Both text models start as the shared one of pre-training. Where image and text widths differ the decoder, which looks
# at question states, has keys and values of another shape; these start random, as in the original.
START = Start(lambda path: path.replace("med_dec/", "med/"), misfit="med_dec/.*/cross_attn/[kv]/kernel")


def leaves() -> ConfigDict:
    """c.task of this objective."""
    c = ConfigDict()
    # rows of the decoder for each question; of more different answers the rarest are left out, and noted
    c.answers = 10
    c.answer_len = 16  # positions of an answer with [DEC] and [SEP]; longer ones are cut, and noted
    # of the one answer of a question from Visual Genome; the ten people's answers of VQA weigh 1 together
    c.vg_weight = 0.2
    c.method = "rank"  # how evaluation answers: rank (the best of a list) | generate (beam search)
    # rank: JSON list of the candidates; "", or a file that is not there: what the majority of people answered to 9
    # questions of data.train or more, in the common form of the official accuracy, by which VQA v2's train and val give
    # some 3,100
    c.answer_list = ""
    c.k = 128  # rank: candidates with the likeliest first token, which are scored in full
    c.beams = 3  # generate
    c.max_length = 10  # generate: tokens with [DEC]
    return c


def check(cfg, tokenizer=None) -> list[str]:
    out, task = [], cfg.task
    for name, least in (("answers", 1), ("answer_len", 3), ("k", 1), ("beams", 1), ("max_length", 2)):
        if task[name] < least:
            out.append(f"task.{name} is {task[name]}: it must be at least {least}")
    for name in ("answer_len", "max_length"):
        if task[name] > cfg.model.med.positions:
            out.append(
                f"task.{name} is {task[name]} but the text model has model.med.positions = "
                f"{cfg.model.med.positions}: lower the first"
            )
    if not 0 < task.vg_weight <= 1:
        out.append(f"task.vg_weight is {task.vg_weight}: it must be more than 0 and at most 1")
    if task.method not in ("rank", "generate"):
        out.append(f"task.method is {task.method!r}: choose rank or generate")
    if task.method == "rank" and len(cfg.data.eval) and not task.answer_list and not len(cfg.data.train):
        out.append(
            "task.answer_list is empty, and there is no data.train to make one from: give the JSON list of candidates, "
            "or set task.method=generate"
        )
    if cfg.text.prompt:
        out.append(
            f"text.prompt is {cfg.text.prompt!r} but objective is vqa, whose texts have none: set text.prompt to "
            "the empty string"
        )
    return out


def build(cfg) -> BlipVqa:
    return BlipVqa.from_config(cfg.model)


# --- training ---------------------------------------------------------------------------------------------------------
def example(record: dict, rng: np.random.Generator, cfg, tokenizer) -> dict:
    """A question with its different answers: A = task.answers rows of Ta = task.answer_len positions.

    {"img": bytes, "ids": i32[T], "txt_mask": bool[T], "answer_ids": i32[A,Ta], "answer_mask": bool[A,Ta], "weights":
    f32[A], "notes"}; rows that only fill have weight 0. BadRecord: no answer is known.
    """
    given = collections.Counter(record["answers"])  # raw: "A dog" and "a dog" are two answers
    if not given:
        raise BadRecord(record["key"], "question without an answer")
    task, notes = cfg.task, []
    kept, people = given.most_common(task.answers), given.total()
    if len(kept) < len(given):
        notes.append(f"too many answers: {len(given)}, of which the {len(given) - len(kept)} rarest are left out")
    texts = []
    for answer, _ in kept:
        text, found = plain_text(answer)
        texts.append(text)
        notes += found
    longest = int(tokenizer.lengths(texts, cfg.model.med.positions).max())
    if longest > task.answer_len:
        notes.append(f"long answer: {longest} positions, of which {task.answer_len} are kept")

    whole = task.vg_weight if record["dataset"] == "vg" else 1.0
    weights = np.zeros(task.answers, np.float32)
    weights[: len(kept)] = [whole * n / people for _, n in kept]
    ids, mask = tokenizer.encode(texts + [""] * (task.answers - len(texts)), task.answer_len)
    row = question(record, cfg, tokenizer)
    return row | {"answer_ids": ids, "answer_mask": mask, "weights": weights, "notes": row["notes"] + notes}


def question(record: dict, cfg, tokenizer) -> dict:
    """{"img": bytes, "ids": i32[T], "txt_mask": bool[T], "notes"} of a record's picture and question, T =
    text.max_len.
    """
    written, notes = plain_text(record["question"])
    text = clean_question(written)
    ids, mask = tokenizer.encode([text], cfg.text.max_len)
    if too_long(written) or tokenizer.lengths([text], cfg.model.med.positions)[0] > cfg.text.max_len:
        notes.append("long question, cut")
    return {"img": record["image"], "ids": ids[0], "txt_mask": mask[0], "notes": notes}


def shapes(cfg) -> dict:
    B, S, T, A, Ta = cfg.train.batch, cfg.model.img_size, cfg.text.max_len, cfg.task.answers, cfg.task.answer_len
    return {
        "img": ((B, S, S, 3), np.uint8),
        "ids": ((B, T), np.int32),
        "txt_mask": ((B, T), bool),
        "answer_ids": ((B, A, Ta), np.int32),
        "answer_mask": ((B, A, Ta), bool),
        "weights": ((B, A), np.float32),
    }


def loss(model, cfg, params, extra, batch: dict, keys: step.Keys):
    """The weighted sum of the answers' cross-entropies over the number of questions (`losses.answers`).

    batch: as `shapes`, img f32[B,S,S,3] normalised. Returns loss f32[], (metrics, {}).
    """
    apply = functools.partial(model.apply, {"params": params})
    streams = step.dropout_streams(keys.dropout, ("vit", "question", "answer"))
    txt_mask, (B, A, Ta) = batch["txt_mask"], batch["answer_ids"].shape
    img_tok = apply(batch["img"], method="encode_image", deterministic=False, rngs=streams["vit"])
    states = apply(
        batch["ids"],
        txt_mask,
        apply(img_tok, method="image_kv"),
        method="encode_question",
        deterministic=False,
        rngs=streams["question"],
    )

    # row b * A + a is answer a of question b: keys and values of a question serve all of its answers
    ids, mask = (batch[name].reshape(B * A, Ta) for name in ("answer_ids", "answer_mask"))
    kv = apply(states, method="question_kv")
    logits = apply(ids, mask, kv, txt_mask, method="lm_logits", deterministic=False, rngs=streams["answer"])
    total = losses.answers(
        logits,
        ids[:, 1:],
        mask[:, 1:],
        batch["weights"].reshape(-1),
        B,
        model.med_sizes["vocab_size"],
        smoothing=cfg.loss.label_smoothing,
        over=cfg.loss.smoothing_over,
    )
    return total, ({"loss": total}, {})


def flops(cfg, T: int | None = None) -> dict[str, float]:
    """FLOPs of a training step per question with its rows of answers; those that only fill count, as they are
    computed.
    """
    model, med = cfg.model, cfg.model.med
    T, A = T or cfg.text.max_len, cfg.task.answers
    Ta = cfg.task.answer_len - 1  # the last position predicts nothing
    return counts.trained(
        cfg,
        {
            "vision": counts.vision(model)[0],
            "image_kv": counts.image_kv(model),
            "question": counts.text(model, T, True),
            "question_kv": med.layers * 2 * T * med.width * 2 * med.width,
            "decoder": A * med.layers * counts.text_layer(med, Ta, Ta, T),
            "lm_head": A * Ta * counts.lm_head(med),
        },
    )


# --- evaluation -------------------------------------------------------------------------------------------------------
def eval_data(cfg, tokenizer, skipped_path) -> EvalRows:
    """The questions of cfg.data.eval, with answers of people or without. ValueError: the list of answers cannot be
    read.
    """
    if cfg.task.method == "rank":
        candidates(cfg)
    return EvalRows(cfg, tokenizer, question, cfg.data.eval, skipped_path=skipped_path)


def evaluate(loaded, data: EvalRows, mesh) -> dict:
    """Official accuracies in percent (`eval.vqa.score`) over the questions with answers, and the number of questions.

    "predictions" holds them all: [{"question_id", "answer"}], the form that the challenge's server takes.
    """
    return scored(answered(loaded, data, mesh))


def scored(answers) -> dict:
    """`evaluate`'s numbers of (record, answer)s; a question without a number, or with one that another has, is known by
    its key."""
    given, known = {}, {}
    for record, answer in answers:
        number = record["question_id"]
        number = record["key"] if number is None or number in given else number
        given[number] = answer
        if record["answers"]:
            known[number] = record
    scores = vqa.score(given, known) if known else {}
    return {
        "questions": len(given),
        **scores,
        "predictions": [{"question_id": n, "answer": a} for n, a in given.items()],
    }


def answered(loaded, data: EvalRows, mesh):
    """(record, answer) of each question in order; each question once, whatever fills the last batch."""
    task, tokenizer, runner = loaded.cfg.task, loaded.tokenizer, Runner(mesh)
    size = runner.size(len(data), loaded.cfg.eval.batch)
    if task.method == "generate":
        how = beam(task)
        program, whole = jitted(programs.answering, loaded.model, how, 1, eos=tokenizer.sep, pad=tokenizer.pad), ()
    else:
        texts = candidates(loaded.cfg)
        longest = int(tokenizer.lengths(texts, loaded.cfg.model.med.positions).max())
        program = jitted(programs.ranking, loaded.model, min(task.k, len(texts)))
        whole = tokenizer.encode(texts, longest)

    def passes():
        for records, rows in data.batches(size):
            yield (
                records,
                program(loaded.params, *(runner.put(rows[name], size) for name in ("img", "ids", "txt_mask")), *whole),
            )

    with jax.set_mesh(mesh):
        for records, found in runner.fetched(passes()):
            for b, record in enumerate(records):
                if task.method == "generate":
                    yield record, tokenizer.decode(found["ids"][b, 0, 1:])
                else:
                    yield record, texts[found["candidate"][b, 0]]


samples = answered


def passes(cfg, model, unit: int) -> list[Pass]:
    """What `evaluate` runs, for plans, which read no list of answers: it is counted as `listed`. unit: as of
    `Runner`."""
    B, S, T, task = at_most(cfg.eval.batch, unit), cfg.model.img_size, cfg.text.max_len, cfg.task
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype)
    given = rows(np.uint8, S, S, 3), rows(np.int32, T), rows(bool, T)
    flops = counts.encode_image(cfg.model) + counts.image_kv(cfg.model) + counts.question(cfg.model, T)
    if task.method == "generate":
        program, new = programs.answering(model, beam(task), 1, eos=2, pad=0), task.max_length - 1
        flops += counts.generated(cfg.model, T, new, task.beams)
        return [Pass("answers", program, given, flops, pictures=1, trips=new - 1)]
    k = min(task.k, LISTED)
    split, whole = sharding.partition_spec(("act_batch",)), sharding.partition_spec(())
    specs, flops = (split,) * len(given) + (whole,) * 2, flops + counts.ranked(cfg.model, T, LONGEST, k)
    return [Pass("answers", programs.ranking(model, k), (*given, *listed()), flops, pictures=1, specs=specs)]


def listed() -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """A list of answers as plans count it: ids i32[C,U] and their mask, bool."""
    return tuple(jax.ShapeDtypeStruct((LISTED, LONGEST), dtype) for dtype in (np.int32, bool))


def beam(task) -> Beam:
    """How a task, `cfg.task`, has answers generated."""
    return Beam(beams=task.beams, min_length=1, max_length=task.max_length)


@functools.cache
def jitted(make: Callable, *args, **how) -> Callable:
    """The jitted program make(*args, **how), kept from one evaluation of a run to the next."""
    return jax.jit(make(*args, **how))


def candidates(cfg) -> list[str]:
    """The answers that are ranked: those of cfg.task.answer_list, or, where it is "" or a file that is not there, made
    from the questions of cfg.data.train (`eval.vqa.common_answers`), and said. ValueError: the file is no list of
    texts, or none is frequent.
    """
    path = cfg.task.answer_list
    if not path or not os.path.exists(path) and len(cfg.data.train):
        missing = f"{path} is not there" if path else "empty"
        sources = tuple((name, source.to_json()) for name, source in sorted(cfg.data.train.items()))
        return list(made_from(sources, missing))
    try:
        texts = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as e:
        raise ValueError(f"task.answer_list {path} cannot be read as JSON ({e}): give a list of answers") from e
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"task.answer_list {path} is no JSON list of texts")
    return texts


@functools.cache
def made_from(sources: tuple[tuple[str, str], ...], missing: str) -> tuple[str, ...]:
    """The frequent answers of sources, (name, config.source as JSON) each, Visual Genome's left out. missing: why there
    is no list.
    """
    opened = [open_source(name, ConfigDict(json.loads(source))) for name, source in sources]
    rows = [row for source in opened if isinstance(source, Questions) for row in source.rows()]
    asked = [row["answer"] for row in rows if row["dataset"] != "vg" and "answer" in row]
    texts = vqa.common_answers(asked, OFTEN)
    if not texts:
        raise ValueError(
            f"task.answer_list: {missing}, and no answer is the majority's to {OFTEN} of the {len(asked)} questions of "
            "data.train: give the JSON list of candidates, or set task.method=generate"
        )
    say(
        f"task.answer_list: {missing}; {len(texts)} answers are ranked, the majority's to {OFTEN} or more of the "
        f"{len(asked)} questions of data.train in the common form; the published models ranked 3128"
    )
    return tuple(texts)


def table(result: dict) -> str:
    """The accuracies, a line each."""
    rows = [f"{name:40} {value:8.2f}" for name, value in result.items() if name not in ("questions", "predictions")]
    return "\n".join([f"{result['questions']} questions", *rows])


def submission(result: dict, cfg) -> tuple[str, str]:
    """(file name, content) for the challenge's server. ValueError: it would not be every question of data.eval once."""
    return for_server(result, cfg, candidates(cfg) if cfg.task.method == "rank" else ())


def for_server(result: dict, cfg, answers=(), name: str = "blip") -> tuple[str, str]:
    """As `submission`; answers: those that were ranked; name: of the model, in the file's."""
    asked = [path for name, source in cfg.data.eval.items() for path in expand(name, source)]
    return servers.vqa(result["predictions"], asked, answers, name)
