"""Visual Dialog (paper section 5.5, figure 5c): which of a hundred answers continues a dialog about a picture?

The paper's code was not published. Known are the forward pass, the batch, the learning rate and the epochs; `leaves`
and `texts_of` say what was chosen here, and why.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from blip_jax import losses
from blip_jax.data.evaluation import EvalRows
from blip_jax.data.source import BadRecord, expand
from blip_jax.data.text.clean import clean_caption, plain_text
from blip_jax.eval import files, visdial
from blip_jax.eval import submission as servers
from blip_jax.inference import programs
from blip_jax.inference.batching import Pass, Runner, at_most
from blip_jax.models import flops as counts
from blip_jax.models import initial
from blip_jax.models.build import Start
from blip_jax.models.dialog import BlipDialog
from blip_jax.parallel import sharding
from blip_jax.tasks import step

BEGINS_FROM = "a pre-training checkpoint, as the paper's model_base.pth"
BEST = ("mrr",)  # the paper does not say how it chose
# All parts are those of pre-training, the matching head too, which a VQA model lacks.
START = Start(new="itm_head/.*")
MULTIPLE = 16  # evaluation's texts are padded to a multiple of it: few programs, little padding


def leaves() -> ConfigDict:
    """c.task of this objective."""
    c = ConfigDict()
    # wrong answers beside the true one, drawn from the other 99 options of one round, drawn too, of a dialog: the
    # paper's batch of 240 is read as 48 dialogs with 5 rows each
    c.negatives = 4
    c.caption_len = 40  # positions of the picture's caption with [CLS] and [SEP]; longer ones are cut, and noted
    # what options are ranked by: logit, that of the right answer, as the author's code does; margin, by how much it
    # exceeds the other one, which orders as the probability does
    c.score = "logit"
    return c


def check(cfg, tokenizer=None) -> list[str]:
    out, task, model = [], cfg.task, cfg.model
    for name, least in (("negatives", 1), ("caption_len", 3)):
        if task[name] < least:
            out.append(f"task.{name} is {task[name]}: it must be at least {least}")
    if task.caption_len > model.med.positions:
        out.append(
            f"task.caption_len is {task.caption_len} but the text model has model.med.positions = "
            f"{model.med.positions}: lower the first"
        )
    if task.score not in ("logit", "margin"):
        out.append(f"task.score is {task.score!r}: choose logit or margin")
    if model.vit.width != model.med.width:
        out.append(
            f"model.vit.width is {model.vit.width} and model.med.width {model.med.width}: image tokens and the "
            "caption's states are looked at side by side, so they must be one; the paper has no such model with ViT-L"
        )
    if cfg.text.max_len < 5:
        out.append(f"text.max_len is {cfg.text.max_len}: a question and an answer need at least 5")
    if cfg.text.buckets:
        out.append(f"text.buckets is {cfg.text.buckets}: dialogs have one length, text.max_len; leave it empty")
    if cfg.text.prompt:
        out.append(
            f"text.prompt is {cfg.text.prompt!r} but objective is dialog, whose texts have none: set text.prompt to "
            "the empty string"
        )
    return out


def build(cfg) -> BlipDialog:
    return BlipDialog.from_config(cfg.model)


# --- texts ------------------------------------------------------------------------------------------------------------
class Texts(NamedTuple):
    """A round's texts as ids; each is its context and one of the endings, some text.max_len positions at most."""

    context: list[int]  # [CLS], earlier rounds and the question, each of these closed by [SEP]
    endings: list[list[int]]  # the options, closed by [SEP]


def tokens(texts: Iterable[str], tokenizer, most: int) -> tuple[dict[str, list[int]], list[str]]:
    """(Ids of each text in lower case, `most` at most with [CLS] and [SEP] but without them; notes)."""
    listed, notes = list(dict.fromkeys(texts)), []
    plain = []
    for text in listed:
        kept, found = plain_text(text)
        plain.append(kept.lower())
        notes += found
    ids, mask = tokenizer.encode(plain, most)
    known = {text: row[real][1:-1].tolist() for text, row, real in zip(listed, ids, mask)}
    return known, list(dict.fromkeys(notes))


def texts_of(rounds: Sequence[dict], r: int, cfg, tokenizer) -> tuple[Texts, list[str]]:
    """The texts of rounds[r] with each of its options, and notes: "q1 a1 [SEP] q2 a2 [SEP] ... question [SEP] option
    [SEP]".

    As BERTs read dialogs; the paper says "the entire dialog history" alone. Of a dialog that is too long the oldest
    rounds are left out, the same for all options of the round. Only where an option takes more than half of
    text.max_len is it cut, and the question only to what the longest option leaves. Questions are not cleaned. A round
    of the history without an answer is its question.
    """
    T, history, turn = cfg.text.max_len, rounds[:r], rounds[r]
    said = [(past["question"], past["answer"] or "") for past in history]
    known, notes = tokens([*(x for pair in said for x in pair), turn["question"], *turn["options"]], tokenizer, T)
    question, options = known[turn["question"]], [known[option] for option in turn["options"]]
    half = (T - 3) // 2
    if max(map(len, options)) > half:
        options, notes = [ids[:half] for ids in options], [*notes, "long option, cut"]
    room = T - 3 - max(map(len, options))  # [ENC], [SEP] behind the question, [SEP] behind the option
    if len(question) > room:
        question, notes = question[:room], [*notes, "long question, cut"]
    room -= len(question)

    kept: list[list[int]] = []
    for asked, answer in reversed(said):
        past = [*known[asked], *known[answer], tokenizer.sep]
        if len(past) > room:
            notes.append("long dialog, its oldest rounds are left out")
            break
        kept.append(past)
        room -= len(past)
    context = [tokenizer.cls, *(i for past in reversed(kept) for i in past), *question, tokenizer.sep]
    return Texts(context, [[*ids, tokenizer.sep] for ids in options]), notes


def caption(record: dict, cfg, tokenizer) -> dict:
    """{"img": bytes, "caption_ids": i32[C], "caption_mask": bool[C], "notes"}, C = task.caption_len. An empty caption
    is [CLS] [SEP], and noted."""
    text, notes = plain_text(record["caption"])
    text = clean_caption(text, cfg.text.max_words)
    ids, mask = tokenizer.encode([text], cfg.task.caption_len)
    notes = [*notes, *["empty caption"] * (not text)]
    if tokenizer.lengths([text], cfg.model.med.positions)[0] > cfg.task.caption_len:
        notes.append("long caption, cut")
    return {"img": record["image"], "caption_ids": ids[0], "caption_mask": mask[0], "notes": notes}


# --- training ---------------------------------------------------------------------------------------------------------
def example(record: dict, rng: np.random.Generator, cfg, tokenizer) -> dict:
    """One round of a dialog with its true answer and `task.negatives` others, drawn: K = 1 + that.

    `caption`'s entries and {"ids": i32[K,T], "txt_mask": bool[K,T], "label": bool[K]}, T = text.max_len. A round
    without options or without a true one is history alone. BadRecord: there is no other.
    """
    rounds, n, T = record["rounds"], cfg.task.negatives, cfg.text.max_len
    wrong = [others(turn) for turn in rounds]
    usable = [r for r, found in enumerate(wrong) if len(found) >= n]
    if not usable:
        raise BadRecord(record["key"], f"dialog without a round of a true answer and {n} other options")
    r = usable[int(rng.integers(len(usable)))]
    picked = [rounds[r]["truth"], *rng.choice(wrong[r], n, replace=False)]
    row = caption(record, cfg, tokenizer)
    texts, notes = texts_of(rounds, r, cfg, tokenizer)
    ids, mask = np.full((1 + n, T), tokenizer.pad, np.int32), np.zeros((1 + n, T), bool)
    for k, option in enumerate(picked):
        fill(ids[k], mask[k], texts, option)
    return row | {"ids": ids, "txt_mask": mask, "label": np.arange(1 + n) == 0, "notes": row["notes"] + notes}


def others(turn: dict) -> list[int]:
    """Places of the options that do not say what the true one says; [] where none is known to be true."""
    if turn["truth"] is None:
        return []
    true = turn["options"][turn["truth"]]
    return [i for i, text in enumerate(turn["options"]) if text != true]


def fill(ids: np.ndarray, mask: np.ndarray, texts: Texts, option: int) -> None:
    """Writes the text of an option into a row i32[T] and its mask bool[T]."""
    text = texts.context + texts.endings[option]
    ids[: len(text)], mask[: len(text)] = text, True


def shapes(cfg) -> dict:
    B, S, T = cfg.train.batch, cfg.model.img_size, cfg.text.max_len
    C, K = cfg.task.caption_len, 1 + cfg.task.negatives
    return {
        "img": ((B, S, S, 3), np.uint8),
        "caption_ids": ((B, C), np.int32),
        "caption_mask": ((B, C), bool),
        "ids": ((B, K, T), np.int32),
        "txt_mask": ((B, K, T), bool),
        "label": ((B, K), bool),
    }


def logits(apply, batch: dict, streams: dict | None):
    """f32[B,K,2] of a batch as `shapes`, pictures f32 normalised; streams: of dropout, or None for none."""
    names = ("vit", "caption", "dialog")
    how = {name: {"deterministic": streams is None, "rngs": streams and streams[name]} for name in names}
    img_tok = apply(batch["img"], method="encode_image", **how["vit"])
    read = batch["caption_ids"], batch["caption_mask"]
    kv, kv_mask = apply(img_tok, apply(*read, method="encode_caption", **how["caption"]), read[1], method="seen")
    B, K, T = batch["ids"].shape
    texts = (batch[name].reshape(B * K, T) for name in ("ids", "txt_mask"))
    return apply(*texts, kv, kv_mask, method="match", **how["dialog"]).reshape(B, K, 2)


def loss(model, cfg, params, extra, batch: dict, keys: step.Keys):
    """Cross-entropy of right and wrong over all rows; batch: as `shapes`, pictures f32 normalised.

    Returns loss f32[], (metrics, {}); "first": share of dialogs whose true answer scores highest of its rows.
    """
    apply, label = functools.partial(model.apply, {"params": params}), batch["label"]
    found = logits(apply, batch, step.dropout_streams(keys.dropout, ("vit", "caption", "dialog")))
    total, accuracy = losses.itm(found.reshape(-1, 2), label.reshape(-1).astype(jnp.int32))
    first = jnp.mean(jnp.take_along_axis(label, found[..., 1].argmax(-1)[:, None], axis=1))
    return total, ({"loss": total, "accuracy": accuracy, "first": first}, {})


def flops(cfg, T: int | None = None) -> dict[str, float]:
    """FLOPs of a training step per dialog with its rows."""
    parts = counts.dialog(cfg.model, cfg.task.caption_len, T or cfg.text.max_len, 1 + cfg.task.negatives)
    return counts.trained(cfg, parts)


# --- evaluation -------------------------------------------------------------------------------------------------------
class Asked(NamedTuple):
    """A round with options."""

    number: int  # from 1
    texts: Texts  # each different one once, so that options that read the same score the same
    which: list[int]  # of the texts, each option's


def dialog(record: dict, cfg, tokenizer) -> dict:
    """`caption`'s entries and "asked", a list of `Asked` as one object: dialogs have different numbers of them.

    BadRecord: no round has options, or not every option of one has its relevance.
    """
    row, rounds, asked = caption(record, cfg, tokenizer), record["rounds"], []
    for r, turn in enumerate(rounds):
        if not turn["options"]:
            continue
        n, relevance = len(turn["options"]), turn["relevance"]
        if relevance is not None and len(relevance) != n:
            raise BadRecord(record["key"], f"round with {n} options and the relevance of {len(relevance)}")
        texts, notes = texts_of(rounds, r, cfg, tokenizer)
        different = {ending: k for k, ending in enumerate(dict.fromkeys(map(tuple, texts.endings)))}
        which = [different[tuple(ending)] for ending in texts.endings]
        asked.append(Asked(r + 1, texts._replace(endings=[list(ending) for ending in different]), which))
        row["notes"] = list(dict.fromkeys(row["notes"] + notes))
    if not asked:
        raise BadRecord(record["key"], "dialog without a round that has options")
    boxed = np.empty((), object)
    boxed[()] = asked
    return row | {"asked": boxed}


def eval_data(cfg, tokenizer, skipped_path) -> EvalRows:
    """The dialogs of cfg.data.eval, with true answers or without."""
    return EvalRows(cfg, tokenizer, dialog, cfg.data.eval, skipped_path=skipped_path)


def passes(cfg, model, unit: int) -> list[Pass]:
    """What `evaluate` runs, for plans; texts count at text.max_len, though `groups` pads most of them to less. unit: as
    of `Runner`."""
    B, G, T, C = at_most(cfg.eval.batch, unit), cfg.eval.rerank_texts, cfg.text.max_len, cfg.task.caption_len
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype)
    size, (look, match) = cfg.model.img_size, programs_of(model, cfg.task.score)
    picture = rows(np.uint8, size, size, 3), rows(np.int32, C), rows(bool, C)
    params = jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(0)))
    seen = jax.eval_shape(look, params, *picture)

    parts, split = counts.dialog(cfg.model, C, T, G), sharding.partition_spec(("act_batch",))
    own = sum(parts[name] for name in ("dialog", "head"))
    read = seen, rows(np.int32, G, T), rows(bool, G, T)
    return [
        Pass("encode images", look, picture, sum(parts.values()) - own, pictures=1, stays=True),
        Pass("match", match, read, own, specs=((programs.KV, split), split, split)),
    ]


@functools.cache
def compiled(model, score: str):
    """Those of `programs_of`, jitted, kept from one evaluation of a run to the next."""
    return tuple(map(jax.jit, programs_of(model, score)))


def programs_of(model, score: str):
    """(look, match), not jitted.

    look: (params, img u8[B,S,S,3], captions i32[B,C], bool[B,C]) -> `BlipDialog.seen`. match: (params, that, texts
    i32[B,G,T], bool[B,G,T]) -> f32[B,G], as task.score has it.
    """

    def look(params, img, ids, mask):
        apply = functools.partial(model.apply, {"params": params})
        img_tok = programs.encode_pixels(model, params, img)
        return apply(img_tok, apply(ids, mask, method="encode_caption"), mask, method="seen")

    def match(params, seen, ids, mask):
        B, G, T = ids.shape
        texts = (x.reshape(B * G, T) for x in (ids, mask))
        found = model.apply({"params": params}, *texts, *seen, method="match")
        return scores_of(found.reshape(B, G, 2), score)

    return look, match


def scores_of(logits, score: str):
    """What options are ranked by, as task.score has it: f32[..., 2] -> f32[...]"""
    return logits[..., 1] - logits[..., 0] if score == "margin" else logits[..., 1]


def groups(dialogs: Sequence[Sequence[Asked]], size: int, longest: int, pad: int) -> Iterator[tuple]:
    """The texts of B dialogs, `size` of each at a time, the shortest first, so that those of a group are about as long.

    Yields (which they are: for each dialog a list of (length, place of its Asked, of the text), ids i32[B,size,T], mask
    bool[B,size,T]), T a multiple of MULTIPLE, or `longest`. Rows that only fill have one position.
    """
    rows = [
        sorted(
            (len(asked.texts.context) + len(ending), j, k)
            for j, asked in enumerate(own)
            for k, ending in enumerate(asked.texts.endings)
        )
        for own in dialogs
    ]
    for first in range(0, max(map(len, rows)), size):
        at = [own[first : first + size] for own in rows]
        T = min(-(-max(n for own in at for n, *_ in own) // MULTIPLE) * MULTIPLE, longest)
        ids, mask = np.full((len(at), size, T), pad, np.int32), np.zeros((len(at), size, T), bool)
        mask[..., 0] = True
        for b, own in enumerate(at):
            for g, (_, j, k) in enumerate(own):
                fill(ids[b, g], mask[b, g], dialogs[b][j].texts, k)
        yield at, ids, mask


def answered(loaded, data: EvalRows, mesh) -> Iterator[tuple[dict, list[tuple[int, np.ndarray]]]]:
    """(record, [(number of a round, f32 score of each of its options), ...]) of each dialog in order.

    States, keys and values of a picture and its caption are computed once for all rounds and options. A text is scored
    with the same numbers whatever stands beside it, up to rounding. ValueError: a score is not finite.
    """
    cfg, runner = loaded.cfg, Runner(mesh)
    look, match = compiled(loaded.model, cfg.task.score)
    size, pad = runner.size(len(data), cfg.eval.batch), loaded.tokenizer.pad

    def passes():
        for records, rows in data.batches(size):
            put = lambda name, rows=rows: runner.put(rows[name], size)
            seen = look(loaded.params, *map(put, ("img", "caption_ids", "caption_mask")))
            dialogs = rows["asked"].tolist()
            scores = [[np.zeros(len(asked.texts.endings), np.float32) for asked in own] for own in dialogs]
            whole = list(groups(dialogs, cfg.eval.rerank_texts, cfg.text.max_len, pad))
            for at, ids, mask in whole:
                done = records if at is whole[-1][0] else []
                yield (
                    (done, dialogs, scores, at),
                    match(loaded.params, seen, runner.put(ids, size), runner.put(mask, size)),
                )

    bar = tqdm(total=len(data), desc="dialogs", unit="dialog", disable=jax.process_index() != 0, mininterval=1.0)
    with jax.set_mesh(mesh), bar:
        for (done, dialogs, scores, at), found in runner.fetched(passes()):
            if not np.isfinite(found).all():
                raise ValueError(
                    "evaluation of dialogs: scores are not finite: the parameters hold NaN or infinity, or model.dtype "
                    "overflows; evaluate an earlier checkpoint or use float32"
                )
            for b, own in enumerate(at):
                for g, (_, j, k) in enumerate(own):
                    scores[b][j][k] = found[b, g]
            for record, own, mine in zip(done, dialogs, scores):
                yield record, [(asked.number, x[asked.which]) for asked, x in zip(own, mine)]
            bar.update(len(done))


def evaluate(loaded, data: EvalRows, mesh) -> dict:
    """Visual Dialog's numbers (`eval.visdial`), recalls, MRR and NDCG as fractions: over the rounds with a true answer,
    and over those with the relevance of options; and the numbers of dialogs and of rounds with options.

    "predictions" holds the ranks of these, [{"image_id", "round_id", "ranks"}], the form that the challenge's server
    takes.
    """
    known, people, predictions, dialogs = [], [], [], 0
    for record, rounds in answered(loaded, data, mesh):
        dialogs += 1
        for number, scores in rounds:
            turn, ranks = record["rounds"][number - 1], visdial.ranks(scores).tolist()
            predictions.append({"image_id": int(record["image_id"]), "round_id": number, "ranks": ranks})
            if turn["truth"] is not None:
                known.append((scores, turn["truth"]))
            if turn["relevance"] is not None:
                people.append((scores, turn["relevance"]))
    out = {"dialogs": dialogs, "rounds": len(predictions)}
    out |= visdial.sparse(known) if known else {}
    out |= visdial.dense(people) if any(any(relevance) for _, relevance in people) else {}
    return {**out, "predictions": predictions}


def table(result: dict) -> str:
    """The numbers, a line each."""
    whole = ("dialogs", "rounds", "ties", "without_relevance")
    rows = [f"{name:20} {value:8.4f}" for name, value in result.items() if name not in (*whole, "predictions")]
    rows += [f"{name:20} {result[name]:8d}" for name in whole[2:] if name in result]
    return "\n".join([f"{result['dialogs']} dialogs, {result['rounds']} rounds with options", *rows])


def submission(result: dict, cfg) -> tuple[str, str]:
    """(file name, content) for the challenge's server. ValueError: it would not be every round of data.eval that has
    options once, or they are of several files.
    """
    named = [path for name, source in cfg.data.eval.items() for path in expand(name, source)]
    asked = [path for path in named if not isinstance(files.content(path), list)]  # dense annotations are lists
    if len(asked) != 1:
        raise ValueError(f"data.eval has {len(asked)} files of dialogs: the server takes the ranks of one")
    ranks = {(row["image_id"], row["round_id"]): row["ranks"] for row in result["predictions"]}
    return servers.visdial(ranks, asked[0])
