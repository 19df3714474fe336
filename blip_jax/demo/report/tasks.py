"""The sections that only the report of the four tasks in miniature has, as those of sections.py."""

from __future__ import annotations

from collections.abc import Iterable

from blip_jax.demo.report.markup import Series, across, escape, number, percent, picture, table
from blip_jax.demo.report.sections import chip, in_percent, section

METRICS = {"CIDEr": "CIDEr", "Bleu_4": "BLEU@4", "METEOR": "METEOR", "ROUGE_L": "ROUGE-L"}
TRUE = {"colours": "colours right", "objects": "objects right", "whole": "wholly true"}  # parts as of demo.truth
RANKED = {"mrr": "MRR", "r@1": "R@1", "r@5": "R@5", "r@10": "R@10", "ndcg": "NDCG"}


def tiles(results: dict) -> list[tuple[str, str]]:
    """Of `sections.glance`: the number of each task."""
    out = []
    if rows := results.get("answered"):
        out.append((percent(rows[0]["accuracy"] / 100), "accuracy of answers (VQA) to questions that pictures decide"))
    if rows := results.get("compared"):
        out.append((percent(rows[0]["accuracy"] / 100), "of sentences about two pictures judged right (as in NLVR2)"))
    if (rows := results.get("described")) and rows[0]["CIDEr"] is not None:
        out.append((number(100 * rows[0]["CIDEr"], 1), "CIDEr × 100 of captions"))
    if rows := results.get("continued"):
        out.append((number(100 * rows[0]["mrr"], 1), "mean reciprocal rank × 100 of the answer among a hundred"))
    return out


def answered(results: dict) -> str:
    rows = results.get("answered")
    if not rows:
        return ""
    columns = [
        Series("accuracy, %", [r["accuracy"] for r in rows]),
        Series("±", [r.get("error") for r in rows]),
        Series("commonest answer, %", [r["commonest"] for r in rows]),
        Series("questions", [r["questions"] for r in rows], 0),
    ]
    shown = table("Accuracy by kind of question", "question", [escape(r["kind"]) for r in rows], columns)
    return section(
        "questions",
        "Questions about a picture",
        "<p>Every question is one that the picture decides. Ten people answered it, mostly alike; accuracy is VQA’s "
        "official one, a full point where three of them gave the answer. Answers are the best of a list that the "
        "training questions give. Beside it: the answer that is the commonest to this kind of question, whatever the "
        "picture.</p>",
        shown,
        _cards(results.get("question_cards", ()), _question_card),
    )


def compared(results: dict) -> str:
    rows = results.get("compared")
    if not rows:
        return ""
    columns = [
        Series("accuracy, %", [r["accuracy"] for r in rows]),
        Series("±", [r.get("error") for r in rows]),
        Series("consistency, %", [r.get("consistency") for r in rows]),
        Series("pairs", [r["examples"] for r in rows], 0),
    ]
    shown = table("Accuracy by kind of sentence", "sentence", [escape(r["kind"]) for r in rows], columns)
    return section(
        "pairs",
        "Sentences about two pictures",
        "<p>Is the sentence true of the pair? Each is shown with four pairs, true of two and false of two, so that "
        "guessing gives 50 %. Consistency is the share of sentences that are judged right of all their pairs, of "
        "which guessing gives 6 %.</p>",
        shown,
        _cards(results.get("pair_cards", ()), _pair_card, "pairs"),
    )


def described(results: dict) -> str:
    rows = results.get("described")
    if not rows:
        return ""
    scores = [Series(label, in_percent([r.get(name) for r in rows])) for name, label in METRICS.items()]
    true = [Series(label, in_percent([r[part] for r in rows])) for part, label in TRUE.items()]
    note = results.get("described_note", "")
    return section(
        "described",
        "Captions",
        "<p>Captions by beam search, against five of the world’s own of each picture. Beside them: captions of other "
        "pictures, the commonest caption for all, and one more true caption of the picture itself, which is what "
        "somebody gets who sees all and words it otherwise. The world knows which captions are true.</p>",
        across("Scores of captions", "", [r["name"] for r in rows], [("scores × 100", scores), ("of all, %", true)]),
        f'<p class="note">{escape(note)}</p>' if note else "",
    )


def continued(results: dict) -> str:
    rows = results.get("continued")
    if not rows:
        return ""
    columns = [Series(label, in_percent([r.get(name) for r in rows])) for name, label in RANKED.items()]
    columns.append(Series("mean rank", [r["mean"] for r in rows]))
    shown = table("Ranks of the true answer", "order", [escape(r["name"]) for r in rows], columns)
    return section(
        "dialogs",
        "Dialogs",
        "<p>Which of a hundred answers was given next? An answer in other words is as true, and NDCG counts it; the "
        "other numbers ask for the very one, which the manner of earlier answers tells. Beside it: orders by how often "
        "an answer is given in the training dialogs, to the same question or at all, and by chance.</p>",
        shown,
        _turns(results.get("turns", ())),
        _cards(results.get("dialog_cards", ()), _dialog_card, "wide"),
    )


def _turns(rows) -> str:
    if not rows:
        return ""
    columns = [
        Series("MRR", in_percent([r["mrr"] for r in rows])),
        Series("by frequency", in_percent([r["frequent"] for r in rows])),
        Series("rounds", [r["rounds"] for r in rows], 0),
    ]
    return table("Mean reciprocal rank by kind of question", "question", [escape(r["kind"]) for r in rows], columns)


# --- cards ------------------------------------------------------------------------------------------------------------
def _cards(rows, card, css: str = "") -> str:
    return f'<div class="{f"cards {css}".strip()}">{"".join(map(card, rows))}</div>' if rows else ""


def _card(images: str, lines: Iterable[str]) -> str:
    return f'<article class="card">{images}<div>{"".join(f"<p>{line}</p>" for line in lines)}</div></article>'


def _mark(right: bool) -> str:
    return chip("✓ right", "true") if right else chip("✕ wrong", "false")


def _question_card(row: dict) -> str:
    lines = []
    for asked in row["asked"]:
        answer, known = escape(asked["answer"]), escape(asked["truth"])
        lines.append(
            f"{_mark(asked['right'])}{escape(asked['question'])} <b>{answer}</b>"
            + ("" if asked["right"] else f" <small>it is {known}</small>")
        )
    return _card(picture(row["image"], "Picture that is asked about"), lines)


def _pair_card(row: dict) -> str:
    two = "".join(picture(image, f"{side} picture") for image, side in zip(row["images"], ("Left", "Right")))
    said = "true" if row["answer"] else "false"
    line = f"{_mark(row['right'])}“{escape(row['sentence'])}” <b>{said}</b>"
    return _card(f'<div class="two">{two}</div>', [line])


def _dialog_card(row: dict) -> str:
    lines = [f"<small>caption</small> {escape(row['caption'])}"]
    for turn in row["rounds"]:
        first = "" if turn["rank"] == 1 else f" <small>first here: {escape(turn['first'])}</small>"
        mark = "true" if turn["rank"] == 1 else "" if turn["true"] else "false"
        rank, question, answer = f"rank {turn['rank']}", escape(turn["question"]), escape(turn["answer"])
        lines.append(f"{chip(rank, mark)}{question} <b>{answer}</b>{first}")
    return _card(picture(row["image"], "Picture that is talked about"), lines)


ALL = (answered, compared, described, continued)  # in the order of the page
