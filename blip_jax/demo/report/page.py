"""The report as one HTML file that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import re

from blip_jax import buckets
from blip_jax.demo.report import blip2, sections, style, tasks
from blip_jax.demo.report.markup import escape

# what each part may hold, and what each of its rows must; a part that is not named here is plain text or pairs
# (name, value)
NOISE = {
    "before",
    "after",
    "web_before",
    "web_after",
    "synthetic_before",
    "synthetic_after",
    "rows",
    "threshold",
    "precision",
    "recall",
    "auc",
    "auc_wrong",
    "roc",
    "hist",
    "decided",
}
ROWS = {
    "table1": ({"captioner", "filter", "metrics"}, {"images", "texts", "noise"}),
    "table2": ({"method", "metrics"}, {"noise_removed", "true"}),
    "relations": ({"table", "what", "larger", "smaller", "difference", "error", "verdict"}, set()),
    "gallery": (
        {"image", "web", "web_kept", "synthetic", "synthetic_kept"},
        {"web_itm", "web_true", "synthetic_itm", "synthetic_true"},
    ),
    "retrieval": ({"query", "images"}, set()),
    "captioners": ({"name", *blip2.PARTS}, set()),
    "objectives": ({"itg", "metrics"}, set()),
    "captions": ({"image", "texts"}, set()),
    "answered": ({"kind", "questions", "accuracy", "commonest"}, {"error"}),
    "question_cards": ({"image", "asked"}, set()),
    "compared": ({"kind", "examples", "accuracy"}, {"consistency", "error"}),
    "pair_cards": ({"images", "sentence", "answer", "right"}, set()),
    "described": ({"name", *tasks.TRUE}, {*tasks.METRICS}),
    "continued": ({"name", "mean", "mrr"}, {*tasks.RANKED, "error"}),
    "turns": ({"kind", "rounds", "mrr", "frequent"}, set()),
    "dialog_cards": ({"image", "caption", "rounds"}, set()),
}
PAPERS = """Made by blip_jax. The papers: Li, Li, Xiong, Hoi, BLIP: Bootstrapping Language-Image Pre-training for
Unified Vision-Language Understanding and Generation, 2022; Li, Li, Savarese, Hoi, BLIP-2: Bootstrapping Language-Image
Pre-training with Frozen Image Encoders and Large Language Models, 2023."""
PARTS = {"title", "intro", "facts", "curves", "noise", "phases", "described_note", *ROWS}


def write(path, results: dict) -> None:
    """Writes the report of `results` to the file `path`, whole or not at all; its folder is made.

    Every part of `results` may be missing, and its section is then left out; within a row a value may be None.
      title, intro: str; facts: [(label, value)]; phases: [(name, seconds)]
      table1: [{"captioner": bool, "filter": bool, "images": int, "texts": int, "noise": share of its texts that are
          false, "metrics": result of eval.retrieval, in percent}], one row per corpus
      table2: [{"method": "none" | "beam" | "nucleus", "noise_removed": share of the synthetic texts dropped, "true":
          share of the synthetic texts that are true, "metrics": as above}]
      relations: [{"table": 1 | 2 of the paper, or "figure 5" | "table 6" of BLIP-2's, "what": what is compared,
          "larger", "smaller": names of corpora or runs, in the paper, "difference": here, in points, "error": of it,
          "verdict": "holds" | "undecided" | "reversed"}]
      noise: {"before", "after", and the same with "web_" or "synthetic_" in front: share of texts that are false;
          "rows": [(kind of noise, texts, share dropped)]; "threshold": least ITM probability that is kept;
          "precision": share of the kept texts that are true; "recall": share of the true texts that are kept;
          "roc": [(share of false texts kept, share of true texts kept)]; "auc": area under it;
          "auc_wrong": the same for clean web captions against captions of other pictures;
          "decided": {"web" and "synthetic": {"share_dropped", "false_dropped", "false_kept": shares, "difference" of
          the latter two, "error" of that, "verdict": as above}};
          "hist": {"edges": [n + 1 ITM probabilities], "true": [n counts], "false": [n counts]}}
      gallery: [{"image": PNG or JPEG bytes, "web": str, "web_kept": bool, "web_itm": probability, "web_true": bool, and
          the same four of "synthetic"}]
      retrieval: [{"query": str, "images": [{"image": bytes, "right": bool, "score": float}], the best first}]
      captioners, of BLIP-2: [{"name": str, "colours", "objects", "whole": shares of captions, as demo.truth.hits}]
      objectives, of its first stage: [{"itg": bool, "metrics": as above}]
      captions: [{"image": bytes, "texts": [{"by": name of a captioner, "text": str, "true": bool}]}]
      answered, of the tasks, the first row of all: [{"kind": of question, "questions": int, "accuracy", "commonest":
          that of the commonest answer, "error": of the first, all in percent}]
      question_cards: [{"image": bytes, "asked": [{"question", "answer", "truth": str, "right": bool}]}]
      compared, the first row of all: [{"kind": of sentence, "examples": int, "accuracy", "consistency", "error": in
          percent}]
      pair_cards: [{"images": [bytes, bytes], "sentence": str, "answer": bool, "right": bool}]
      described, the first row the model's: [{"name": str, "CIDEr" and other scores: fractions, and the three of
          captioners}]; described_note: str
      continued, the first row the model's: [{"name": of an order, "mrr", "r@1", "r@5", "r@10", "ndcg", "error" of mrr:
          fractions, "mean": rank}]
      turns: [{"kind": of question, "rounds": int, "mrr", "frequent": of the order by frequency, fractions}]
      dialog_cards: [{"image": bytes, "caption": str, "rounds": [{"question", "answer", "first": what the model has
          first, all str, "true": whether that is true, "rank": int}]}]
      curves: {run: {"loss_itc" | "loss_itm" | "loss_lm" | any name: [(step, value)] in order of steps}}
    Shares and probabilities are 0 ... 1. Raises ValueError that names every part that is unknown or lacks something.
    """
    put(path, page(results))


def put(path, text: str) -> None:
    """Writes a page to the file `path`, local or on a bucket, whole or not at all; its folder is made."""
    buckets.write(buckets.of(path), text.encode("utf-8", "xmlcharrefreplace"))


def page(results: dict) -> str:
    """The text of the file that `write` makes."""
    check(results)
    title = escape(results.get("title") or "CapFilt, the paper in miniature")
    intro = f'<p class="lead">{escape(results["intro"])}</p>' if results.get("intro") else ""
    tiles = tasks.tiles(results) + blip2.tiles(results)
    head = f"{intro}{sections.glance(results, tiles)}{sections.facts(results)}"
    return document(title, head, [part(results) for part in (*tasks.ALL, *blip2.ALL, *sections.ALL)], PAPERS)


def document(title: str, head: str, body: list[str], foot: str) -> str:
    """A whole page. title, head, foot: HTML, as are the sections of `body`, of which empty ones are left out; the links
    to them follow the head."""
    body = [text for text in body if text]
    links = [re.search(r'id="(\w+)"><h2>(.*?)</h2>', text).groups() for text in body]
    nav = "".join(f'<a href="#{name}">{heading}</a>' for name, heading in links)
    nav = f'<nav aria-label="Contents">{nav}</nav>' if len(links) > 1 else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style.sheet()}</style>
</head>
<body>
<header><h1>{title}</h1>{head}{nav}</header>
<main>
{chr(10).join(body)}
</main>
<footer><p>{foot}</p></footer>
</body>
</html>
"""


def check(results: dict) -> None:
    """Raises ValueError that lists every unknown name and every missing one."""
    problems = [f"{name!r} is no part of a report" for name in sorted(results.keys() - PARTS)]
    problems += [f"noise has an unknown {name!r}" for name in sorted(results.get("noise", {}).keys() - NOISE)]
    for part, (needed, optional) in ROWS.items():
        for i, row in enumerate(results.get(part, ())):
            problems += [f"{part}[{i}] lacks {name!r}" for name in sorted(needed - row.keys())]
            problems += [f"{part}[{i}] has an unknown {name!r}" for name in sorted(row.keys() - needed - optional)]
    if problems:
        raise ValueError(f"results: {'; '.join(problems)}. The parts are {', '.join(sorted(PARTS))}; see report.write")
