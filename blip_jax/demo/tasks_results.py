"""What the four tasks in miniature found: from the folders of their stages (tasks.py) to what their report shows.

Beside every number stands what one gets without looking at the picture.
"""

from __future__ import annotations

import collections
import json
import math
import pathlib
from collections.abc import Callable

import numpy as np

from blip_jax.config import source
from blip_jax.console import say
from blip_jax.data.formats import open_source
from blip_jax.data.scenes import crowd, dialogs, official, questions, sentences
from blip_jax.demo import relations, truth
from blip_jax.demo.results import curves_of, facts_of, rows_of
from blip_jax.eval import captions, java, nlvr, visdial, vqa

BEST = ("caption", "nlvr", "dialog")  # fine-tunings whose best checkpoint is used, as in the paper
APART = 1000  # of the seeds of two demos, whose worlds have one for each split
ALL = "all"
CAPTIONER, OTHERS, ONE, PERSON = (
    "captioner", "captions of other pictures", "one caption for all", "another true caption",
)  # fmt: skip
MODEL, SAME, FREQUENT, RANDOM = (
    "model", "frequent answers to the same question", "frequent answers", "random order",
)  # fmt: skip
METRICS = ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L")
RANKED = ("mrr", *(f"r@{k}" for k in visdial.RECALLS), "mean", "ndcg")
PICTURES, PAIRS, DIALOGS = 12, 12, 4  # shown of each
TRIES = 20  # orders that are drawn where answers are equally frequent


def seed_of(cfg, split: str) -> int:
    """Of the world of a split."""
    return APART * cfg.seed + list(official.COCO).index(split)


def sources(workdir: pathlib.Path, name: str, split: str) -> dict:
    """`cfg.data`'s sources of a split for the run in folder `name`."""
    at = official.paths(workdir / "data", split)
    kind, path, images = {
        "vqa": ("vqa", at.vqa, at.vqa_images),
        "nlvr": ("nlvr", at.nlvr2, at.nlvr2_images),
        "dialog": ("visdial", at.visdial, at.visdial_images),
    }.get(name, ("json", at.captions, at.coco))
    return {split: source(kind, path, images=images)}


def collect(cfg, workdir: pathlib.Path) -> dict:
    """The `results` of report.write but for its phases, from what the stages of tasks.py left in `workdir`."""
    command = f"blip-jax demo tasks --workdir={workdir.name}"
    return {
        "title": "Four tasks on a world that knows the truth",
        "intro": (
            "Small pictures of one to three coloured shapes, some of them alike, are written out as the files that "
            "COCO, VQA, NLVR2 and Visual Dialog publish. A BLIP is pre-trained on the captions and fine-tuned for each "
            "task, for pairs of pictures from the model of the questions; what is shown are pictures that no stage has "
            "seen, scored by the official rules. Beside it stands what one gets without looking at the picture."
        ),
        "facts": facts_of(cfg, command, "pre-training"),
        **_described(cfg, workdir),
        **_answered(workdir),
        **_compared(cfg, workdir),
        **_continued(cfg, workdir),
        "curves": _curves(workdir),
    }


def table(results: dict) -> str:
    """The numbers for the console."""
    lines = [f"{'captions':40} {'CIDEr':>8} {'wholly true':>12}"]
    for row in results["described"]:
        cider = "-" if row["CIDEr"] is None else f"{row['CIDEr']:.3f}"
        lines.append(f"{row['name']:40} {cider:>8} {100 * row['whole']:10.1f} %")
    lines += ["", f"{'questions':40} {'accuracy':>8} {'commonest answer':>17} {'of':>6}"]
    for row in results["answered"]:
        lines.append(f"{row['kind']:40} {row['accuracy']:8.1f} {row['commonest']:17.1f} {row['questions']:6d}")
    lines += ["", f"{'sentences about two pictures':40} {'accuracy':>8} {'chance':>17} {'of':>6}"]
    lines += [f"{r['kind']:40} {r['accuracy']:8.1f} {50.0:17.1f} {r['examples']:6d}" for r in results["compared"]]
    lines += ["", f"{'dialogs':40} {'MRR':>8} {'R@1':>8} {'NDCG':>8}"]
    for row in results["continued"]:
        ndcg = "-" if row["ndcg"] is None else f"{100 * row['ndcg']:.1f}"
        lines.append(f"{row['name']:40} {100 * row['mrr']:8.1f} {100 * row['r@1']:8.1f} {ndcg:>8}")
    lines.append(f"{sum(s for _, s in results['phases']):.0f} s in all")
    return "\n".join(lines)


def _test(workdir: pathlib.Path, name: str):
    """The source of the test split, and what was predicted of it."""
    found = json.loads((workdir / f"{name}-test" / "predictions.json").read_text(encoding="utf-8"))
    return open_source("test", sources(workdir, name, "test")["test"]), found


def error_of(values) -> float | None:
    """Half the 95 % interval of a mean, from the number of what it is a mean of; None of a single one."""
    values = np.asarray(values, np.float64)
    return float(relations.SIGMAS * values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


# --- captions ---------------------------------------------------------------------------------------------------------
def _described(cfg, workdir: pathlib.Path) -> dict:
    """Captions against five of the world's for each picture, and whether they are true."""
    source, found = _test(workdir, "caption")
    seed, size, n = seed_of(cfg, "test"), cfg.model.img_size, len(source)
    references = {i: source.captions_of(i) for i in range(n)}
    told = {row["image_id"] - 1: row["caption"] for row in found}
    train = json.loads(pathlib.Path(official.paths(workdir / "data", "train").captions).read_text(encoding="utf-8"))
    most = collections.Counter(a["caption"] for a in train["annotations"]).most_common(1)[0][0]
    texts = {
        CAPTIONER: told,
        OTHERS: {i: references[(i + 1) % n][0] for i in range(n)},
        ONE: dict.fromkeys(range(n), most),
        PERSON: {i: crowd.captions(seed, i, size, len(references[i]) + 1)[-1] for i in range(n)},
    }
    scenes = [crowd.scene(seed, i, size) for i in range(n)]
    scores, note = scores_of(texts, references)
    hits = {name: truth.hits(scenes, [own[i] for i in range(n)]) for name, own in texts.items()}
    rows = [
        {
            "name": name,
            **{metric: scores[name].get(metric) for metric in METRICS},
            **{part: float(each.mean()) for part, each in hits[name].items()},
        }
        for name in texts
    ]
    shown = [
        {
            "image": source[i]["image"],
            "texts": [{"by": CAPTIONER, "text": told[i], "true": bool(hits[CAPTIONER][truth.WHOLE][i])}],
        }
        for i in range(min(PICTURES, n))
    ]
    return {"described": rows, "described_note": note, "captions": shown}


def scores_of(texts: dict[str, dict[int, str]], references: dict[int, list[str]]) -> tuple[dict[str, dict], str]:
    """(Name -> metrics of its captions of the same pictures, as far as they can be computed here; what there is to say
    about it)"""
    try:
        java.folder()
    except ValueError as e:
        say(f"captions are not scored: {e}")
        return {name: {} for name in texts}, "Not scored: pycocoevalcap is not installed."
    note = ""
    try:
        java.find()
    except ValueError as e:
        say(f"captions are scored approximately: {e}")
        note = "Approximate: without Java, so words are not cut exactly as by the official program."
    told = {(name, i): text for name, own in texts.items() for i, text in own.items()}
    people = {(name, i): references[i] for name, i in told}
    groups = {name: [(name, i) for i in own] for name, own in texts.items()}
    found = captions.by_group(told, people, groups, approximate=bool(note))
    plain = lambda corpus: {name.removeprefix(captions.MARK): value for name, value in corpus.items()}
    return {name: plain(scores.corpus) for name, scores in found.items()}, note


# --- questions --------------------------------------------------------------------------------------------------------
def _answered(workdir: pathlib.Path) -> dict:
    """Official accuracies by kind of question, beside those of the answer that is the commonest of its kind."""
    source, found = _test(workdir, "vqa")
    records = {record["question_id"]: record for record in (source[i] for i in range(len(source)))}
    given = {row["question_id"]: row["answer"] for row in found}
    before = _annotations(workdir, "train")
    counts: dict[str, collections.Counter] = {kind: collections.Counter() for kind in questions.ASKED}
    for a in before:
        counts[a["question_type"]][a["multiple_choice_answer"]] += 1
    common = {kind: own.most_common(1)[0][0] for kind, own in counts.items() if own}
    blind = {number: common.get(record["question_type"], "") for number, record in records.items()}
    groups = {ALL: records}
    for kind in questions.ASKED:
        groups[kind] = {number: r for number, r in records.items() if r["question_type"] == kind}
    rows = []
    for kind, own in groups.items():
        if own:
            each = [100 * vqa.accuracy(given[number], r["answers"]) for number, r in own.items()]
            accuracy, commonest = (vqa.score(answers, own)["accuracy"] for answers in (given, blind))
            rows.append({"kind": kind, "questions": len(own), "accuracy": accuracy, "commonest": commonest,
                         "error": error_of(each)})  # fmt: skip
    return {"answered": rows, "question_cards": _question_cards(workdir, records, given)}


def _annotations(workdir: pathlib.Path, split: str) -> list[dict]:
    file = workdir / "data" / "vqa" / f"v2_mscoco_{official.COCO[split]}_annotations.json"
    return json.loads(file.read_text(encoding="utf-8"))["annotations"]


def _question_cards(workdir: pathlib.Path, records: dict, given: dict) -> list[dict]:
    """The first pictures with all their questions."""
    said = {a["question_id"]: a["multiple_choice_answer"] for a in _annotations(workdir, "test")}
    cards: dict[str, dict] = {}
    for number, record in records.items():
        if record["image_id"] not in cards and len(cards) == PICTURES:
            break
        card = cards.setdefault(record["image_id"], {"image": record["image"], "asked": []})
        right = vqa.accuracy(given[number], record["answers"]) > 0.5
        asked = {"question": record["question"], "answer": given[number], "truth": said[number], "right": right}
        card["asked"].append(asked)
    return list(cards.values())


# --- pairs of pictures ------------------------------------------------------------------------------------------------
def _compared(cfg, workdir: pathlib.Path) -> dict:
    """Accuracy and consistency by kind of sentence."""
    source, found = _test(workdir, "nlvr")
    given = {row["identifier"]: row["label"] for row in found}
    records = [source[i] for i in range(len(source))]
    seed, size = seed_of(cfg, "test"), cfg.model.img_size
    kinds = [sentences.sentence(seed, i, size)[0].kind for i in range(len(records) // sentences.PAIRS)]
    of = lambda record: kinds[int(record["identifier"].split("-")[1])]
    rows = []
    for kind in (ALL, *sentences.KINDS):
        own = [record for record in records if kind in (ALL, of(record))]
        if own:
            triples = [(given[r["identifier"]], r["label"], r["group"]) for r in own]
            right = [100.0 * (a == b) for a, b, _ in triples]
            rows.append({"kind": kind, "examples": len(own), **nlvr.score(*zip(*triples)), "error": error_of(right)})
    cards = [
        {
            "images": r["images"],
            "sentence": r["sentence"],
            "answer": given[r["identifier"]],
            "right": given[r["identifier"]] == r["label"],
        }
        for r in records[:PAIRS]
    ]
    return {"compared": rows, "pair_cards": cards}


# --- dialogs ----------------------------------------------------------------------------------------------------------
def _continued(cfg, workdir: pathlib.Path) -> dict:
    """Visual Dialog's numbers, and the model's by kind of question, beside orders that do not look at the picture."""
    source, found = _test(workdir, "dialog")
    records = {int(r["image_id"]): r for r in (source[i] for i in range(len(source)))}
    seed, size = seed_of(cfg, "test"), cfg.model.img_size
    kinds = {
        number: [turn.question.kind for turn in dialogs.dialog(seed, number - 1, size).rounds] for number in records
    }
    ranks = {(row["image_id"], row["round_id"]): row["ranks"] for row in found}
    turns = {key: records[key[0]]["rounds"][key[1] - 1] for key in ranks}
    scores = {MODEL: {key: -np.array(own) for key, own in ranks.items()}}
    scored = json.loads((workdir / "dialog-test" / "evaluation.json").read_text(encoding="utf-8"))
    rows = [{"name": MODEL, **{name: scored[name] for name in RANKED}}]
    for name, of in orders_of(workdir).items():
        orders = [{key: in_order(of, turn, n, key) for key, turn in turns.items()} for n in range(TRIES)]
        rows.append({"name": name, **_ranked(orders, turns)})
        scores[name] = orders[0]
    by_kind = []
    for kind in questions.ASKED:
        own = [key for key in turns if kinds[key[0]][key[1] - 1] == kind]
        if own:
            mrr = lambda name, own=own: float(np.mean([_reciprocal(scores[name][key], turns[key]) for key in own]))
            by_kind.append({"kind": kind, "rounds": len(own), "mrr": mrr(MODEL), "frequent": mrr(SAME)})
    each = [_reciprocal(scores[MODEL][key], turn) for key, turn in turns.items()]
    rows[0]["error"] = error_of(each)
    return {"continued": rows, "turns": by_kind, "dialog_cards": _dialog_cards(records, ranks)}


def _ranked(orders: list[dict], turns: dict) -> dict:
    """The numbers of one or several orders, their mean."""
    found = []
    for order in orders:
        own = visdial.sparse([(order[key], turn["truth"]) for key, turn in turns.items()])
        found.append(own | visdial.dense([(order[key], turn["relevance"]) for key, turn in turns.items()]))
    return {name: float(np.mean([one[name] for one in found])) for name in RANKED}


def _reciprocal(scores, turn: dict) -> float:
    return 1 / visdial.truth_rank(scores, turn["truth"])[0]


def orders_of(workdir: pathlib.Path) -> dict[str, Callable[[str, str], tuple]]:
    """Name of an order -> (question, option) -> what it is ordered by, from the training dialogs alone."""
    content = json.loads(pathlib.Path(official.paths(workdir / "data", "train").visdial).read_text(encoding="utf-8"))
    data = content["data"]
    said = [
        (data["questions"][turn["question"]], data["answers"][turn["answer"]])
        for row in data["dialogs"]
        for turn in row["dialog"]
    ]
    whole, same = collections.Counter(answer for _, answer in said), collections.Counter(said)
    return {
        SAME: lambda question, option: (same[question, option], whole[option]),
        FREQUENT: lambda _, option: (whole[option],),
        RANDOM: lambda *_: (),
    }


def in_order(of: Callable, turn: dict, n: int, key: tuple[int, int]) -> np.ndarray:
    """Scores of a round's options: the larger the better; equal ones in an order that is drawn for the n-th time."""
    drawn = np.random.default_rng((n, *key)).permutation(len(turn["options"])).tolist()
    by = [(*of(turn["question"], option), place) for option, place in zip(turn["options"], drawn)]
    scores = np.empty(len(by))
    scores[sorted(range(len(by)), key=by.__getitem__)] = np.arange(len(by))
    return scores


def _dialog_cards(records: dict, ranks: dict) -> list[dict]:
    """The first dialogs; of each round what the model would have said."""
    cards = []
    for number, record in list(records.items())[:DIALOGS]:
        rounds = []
        for n, turn in enumerate(record["rounds"], 1):
            own = ranks[number, n]
            first = own.index(1)
            rounds.append({
                "question": turn["question"], "answer": turn["answer"], "first": turn["options"][first],
                "true": turn["relevance"][first] > 0, "rank": own[turn["truth"]],
            })  # fmt: skip
        cards.append({"image": record["image"], "caption": record["caption"], "rounds": rounds})
    return cards


def _curves(workdir: pathlib.Path) -> dict:
    """Losses of all trainings; those of a fine-tuning have a panel of their own."""
    titles = {"vqa": "questions", "nlvr": "pairs of pictures", "dialog": "dialogs"}
    logs = {name: rows_of(workdir / name) for name in ("pretrain", "caption", *titles)}
    of = lambda name: [(row["step"], row["train/loss"]) for row in logs[name] if "train/loss" in row]
    return {
        "pre-training": curves_of(logs["pretrain"]),
        "captions": curves_of(logs["caption"]),
        **{title: {f"Loss of {title}": of(name)} for name, title in titles.items()},
    }
