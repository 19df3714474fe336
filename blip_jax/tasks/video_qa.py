"""Zero-shot questions about videos, MSRVTT-QA and MSVD-QA (paper section 5.6, table 11): a model fine-tuned for
questions about pictures, measured as it is. Nothing is trained.

Every frame goes through the ViT by itself, and the question encoder looks at the tokens of all frames, one frame behind
the other. The authors published no code; their word is that answers are generated (salesforce/BLIP issue 65). Others
rank given answers, those of VQA or those of the data set's training questions: each list that is named is ranked
beside. A video is encoded once for all of its questions.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from blip_jax.data.evaluation import EvalVideos
from blip_jax.data.text.clean import clean_question, plain_text
from blip_jax.decode.beam import Beam
from blip_jax.eval import video_qa as scores
from blip_jax.inference import programs
from blip_jax.inference.batching import Pass, Runner
from blip_jax.models import flops as counts
from blip_jax.models import initial
from blip_jax.models.vqa import BlipVqa
from blip_jax.parallel import sharding
from blip_jax.tasks import two_stage, vqa

INSTEAD = "train objective vqa, and evaluate this one with --checkpoint"
build = vqa.build
LISTS = {"rank_vqa": "vqa_answers", "rank_train": "train_answers"}  # what is reported -> the leaf that names the list


def leaves() -> ConfigDict:
    """c.task of this objective."""
    c = ConfigDict()
    c.frames = 16  # of a video, at equal distances from the first on (`data.video.places`)
    c.beams = 3  # of generated answers
    c.max_length = 10  # of these, tokens with [DEC]
    # answers that are ranked besides, "" for none: VQA's, a JSON list, and those of the data set's training questions,
    # a JSON list, LAVIS's qa_ans2label.json, or the questions themselves, train_qa.json
    c.vqa_answers = ""
    c.train_answers = ""
    c.k = 128  # candidates with the likeliest first token, which are scored in full
    return c


def check(cfg, tokenizer=None) -> list[str]:
    out, task = [], cfg.task
    for name, least in (("frames", 1), ("beams", 1), ("max_length", 2), ("k", 1)):
        if task[name] < least:
            out.append(f"task.{name} is {task[name]}: it must be at least {least}")
    if task.max_length > cfg.model.med.positions:
        out.append(
            f"task.max_length is {task.max_length} but the text model has model.med.positions = "
            f"{cfg.model.med.positions}: lower the first"
        )
    if cfg.text.prompt:
        out.append(
            f"text.prompt is {cfg.text.prompt!r} but objective is video_qa, whose texts have none: set text.prompt to "
            "the empty string"
        )
    return out


def eval_data(cfg, tokenizer, skipped_path) -> EvalVideos:
    """The questions of cfg.data.eval with their videos. ValueError: a list of answers cannot be read."""
    candidates(cfg)
    asked = functools.partial(question, cfg=cfg, tokenizer=tokenizer)
    return EvalVideos(cfg, cfg.data.eval, asked, cfg.task.frames, skipped_path=skipped_path)


def question(record: dict, cfg, tokenizer) -> tuple[list[str], list[str]]:
    """The cleaned question of a record, alone in a list, and notes."""
    written, notes = plain_text(record["question"])
    text = clean_question(written)
    if tokenizer.lengths([text], cfg.model.med.positions)[0] > cfg.text.max_len:
        notes.append("long question, cut")
    return [text], notes


def evaluate(loaded, data: EvalVideos, mesh) -> dict:
    """Accuracies in percent (`eval.video_qa.accuracy`): "accuracy" of generated answers, "rank_vqa" and "rank_train" of
    ranked ones where their lists are named.

    With "videos" and "questions", how many could be read and were answered, and "unanswered" questions, of the others.
    "predictions": [{"question_id", "answer", and the ranked ones}], of those that were answered.
    """
    found = answered(loaded, data, mesh)
    done = [i for i, answers in enumerate(found) if answers]
    right = [data.records[i]["answer"] for i in done]
    accuracies = {name: scores.accuracy([found[i][name] for i in done], right) for name in found[done[0]]}
    return {
        "videos": len({int(data.text_image[i]) for i in done}),
        "questions": len(done),
        "unanswered": len(found) - len(done),
        **{"accuracy" if name == "answer" else name: value for name, value in accuracies.items()},
        "predictions": [{"question_id": data.records[i]["question_id"]} | found[i] for i in done],
    }


def answered(loaded, data: EvalVideos, mesh) -> list[dict[str, str]]:
    """{"answer", "rank_vqa", "rank_train"} to each question, the latter where their lists are named; {} where its video
    cannot be read. ValueError: not one can be.

    A pass takes eval.batch videos and up to eval.rerank_texts questions of each; keys and values of a video are
    computed once. Rows that only fill a shape repeat a question, and their answers are dropped.
    """
    cfg, tokenizer, runner = loaded.cfg, loaded.tokenizer, Runner(mesh)
    size, group = two_stage.batch_of(cfg, runner.unit), cfg.eval.rerank_texts
    ids, txt_mask = tokenizer.encode(data.captions, cfg.text.max_len)
    first = np.searchsorted(data.text_image, np.arange(data.n_images + 1))  # question of each video
    lists = candidates(cfg)
    view, answer = compiled(loaded.model, vqa.beam(cfg.task), cfg.task.k, tuple(lists), tokenizer.sep, tokenizer.pad)
    encoded = {name: _encoded(texts, tokenizer, cfg) for name, texts in lists.items()}
    hidden = jax.process_index() != 0
    batches = tqdm(
        data.image_batches(size), desc="videos", total=math.ceil(data.n_images / size), unit="batch", disable=hidden
    )

    def passes():
        for batch in batches:
            at = batch["index"]
            asked = np.where(at < 0, 0, first[at + 1] - first[at])
            kv = view(loaded.params, runner.put(batch["img"], size))["kv"] if asked.any() else None
            for begin in range(0, asked.max(), group):
                places = begin + np.arange(group)
                real = places < asked[:, None]  # B G
                rows = np.where(real, first[at][:, None] + places, 0)
                given = (runner.put(x[rows], size) for x in (ids, txt_mask))
                yield (rows, real), answer(loaded.params, kv, *given, encoded)

    found: list[dict[str, str]] = [{} for _ in data.captions]
    with jax.set_mesh(mesh):
        for (rows, real), out in runner.fetched(passes()):
            for b, g in zip(*np.nonzero(real)):
                found[rows[b, g]] = {"answer": tokenizer.decode(out["answer"][b, g, 1:])}
                found[rows[b, g]] |= {name: texts[out[name][b, g]] for name, texts in lists.items()}
    if not any(found):
        raise ValueError(f"evaluation: not one of the {data.n_images} videos can be read; see skipped.jsonl, data.eval")
    return found


def passes(cfg, model, unit: int) -> list[Pass]:
    """What `evaluate` runs, for plans, which read no list of answers: each is counted as `vqa.listed`. unit: as of
    `Runner`."""
    B, G, T, R, task = two_stage.batch_of(cfg, unit), cfg.eval.rerank_texts, cfg.text.max_len, cfg.task.frames, cfg.task
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype)
    img = rows(np.uint8, R, cfg.model.img_size, cfg.model.img_size, 3)
    view, lists, new = programs.view(model, "kv"), ranked(cfg), task.max_length - 1
    params = jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(0)))
    kv = jax.eval_shape(view, params, img)["kv"]

    look = R * counts.encode_image(cfg.model) + counts.image_kv(cfg.model, R)
    each = counts.question(cfg.model, T, R) + counts.generated(cfg.model, T, new, task.beams)
    each += len(lists) * counts.ranked(cfg.model, T, vqa.LONGEST, min(task.k, vqa.LISTED))
    split, whole = sharding.partition_spec(("act_batch",)), sharding.partition_spec(())
    return [
        Pass("encode videos", view, (img,), look, pictures=R, stays=True),
        Pass(
            "answers",
            answering(model, vqa.beam(task), task.k, lists, eos=2, pad=0),
            (kv, rows(np.int32, G, T), rows(bool, G, T), {name: vqa.listed() for name in lists}),
            G * each,
            trips=new - 1,
            specs=(programs.KV, split, split, whole),
        ),
    ]


@functools.cache
def compiled(
    model: BlipVqa, how: Beam, k: int, lists: tuple[str, ...], eos: int, pad: int
) -> tuple[Callable, Callable]:
    """The programs of a model, kept from one evaluation to the next: `programs.view` for keys and values, and
    `answering`."""
    return jax.jit(programs.view(model, "kv")), jax.jit(answering(model, how, k, lists, eos=eos, pad=pad))


def answering(model: BlipVqa, how: Beam, k: int, lists: tuple[str, ...], *, eos: int, pad: int) -> Callable:
    """(params, keys and values of B videos, ids i32[B,G,T], txt_mask bool[B,G,T], {list: (ids i32[C,U], mask
    bool[C,U])}) -> {"answer": i32[B,G,L], list: i32[B,G], the best of its candidates}: G questions about each video.
    """

    def answer(params, kv, ids, txt_mask, encoded):
        B, G, T = ids.shape
        ids, txt_mask = ids.reshape(B * G, T), txt_mask.reshape(B * G, T)
        asked = programs.question_kv(model, params, kv, ids, txt_mask)
        found = programs.answers(model, params, asked, txt_mask, how, 1, eos=eos, pad=pad)["ids"]
        out = {"answer": found[:, 0].reshape(B, G, -1)}
        for name in lists:
            best, _ = programs.rank_answers(model, params, *encoded[name], asked, txt_mask, k=k)
            out[name] = best[:, 0].reshape(B, G)
        return out

    return answer


def candidates(cfg) -> dict[str, list[str]]:
    """The lists that are ranked, by the names of LISTS. ValueError: one cannot be read, or is empty."""
    return {name: _read(LISTS[name], cfg.task[LISTS[name]]) for name in ranked(cfg)}


def ranked(cfg) -> tuple[str, ...]:
    """Which of LISTS are ranked: those that cfg.task names."""
    return tuple(name for name, leaf in LISTS.items() if cfg.task[leaf])


@functools.cache
def _read(leaf: str, path: str) -> list[str]:
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"task.{leaf}={path} cannot be read as JSON ({e}): give a list of answers, or ''") from e
    if isinstance(content, dict) and all(isinstance(n, int) for n in content.values()):
        content = sorted(content, key=content.get)  # LAVIS's, answer -> number
    if isinstance(content, list) and all(
        isinstance(row, dict) and isinstance(row.get("answer"), str) for row in content
    ):
        content = scores.candidates(row["answer"] for row in content)
    if not isinstance(content, list) or not content or not all(isinstance(text, str) for text in content):
        raise ValueError(
            f"task.{leaf}={path} holds no answers: give a JSON list of texts, qa_ans2label.json, or rows with `answer`"
        )
    return content


def _encoded(texts: list[str], tokenizer, cfg) -> tuple[np.ndarray, np.ndarray]:
    """(ids i32[C,U], mask bool[C,U]), U the positions of the longest."""
    return tokenizer.encode(texts, int(tokenizer.lengths(texts, cfg.model.med.positions).max()))


def table(result: dict) -> str:
    """The accuracies, a line each."""
    head = f"{result['questions']} questions about {result['videos']} videos"
    head += f", {result['unanswered']} unanswered" if result["unanswered"] else ""
    names = {"accuracy": "generated", "rank_vqa": "ranked, VQA's answers", "rank_train": "ranked, training answers"}
    return "\n".join([head, *(f"{what:30} {result[name]:8.2f}" for name, what in names.items() if name in result)])
