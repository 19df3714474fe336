"""The sections that only the report of BLIP-2 in miniature has, as those of sections.py."""

from __future__ import annotations

from blip_jax.demo.report import paper
from blip_jax.demo.report.markup import Series, across, escape, number, percent, picture
from blip_jax.demo.report.sections import chip, in_percent, recalls, relations, section

PARTS = {"colours": "colours right", "objects": "objects right", "whole": "wholly true"}  # of a caption, as truth.PARTS


def tiles(results: dict) -> list[tuple[str, str]]:
    """Of `sections.glance`: captions with the first stage and without it, recall without ITG and with it."""
    rows, mean = (
        results.get("captioners", ()),
        {r["itg"]: r["metrics"]["r_mean"] for r in results.get("objectives", ())},
    )
    out = []
    if len(rows) > 1:
        shares = f"{percent(rows[1]['objects'])} → {percent(rows[0]['objects'])}"
        out.append((shares, "captions with the right objects, without the first stage and with it"))
    if len(mean) > 1:
        out.append((f"{number(mean[False], 1)} → {number(mean[True], 1)}", "mean recall in %, without ITG and with it"))
    return out


def captioners(results: dict) -> str:
    rows = results.get("captioners")
    if not rows:
        return ""
    shares = [Series(what, in_percent([r[part] for r in rows])) for part, what in PARTS.items()]
    shown = across(
        "Captions, with the first stage and without it", "", [r["name"] for r in rows], [("captions, %", shares)]
    )
    return section(
        "captioners",
        "With the first stage and without it",
        "<p>The second stage, for as many steps on the same pictures, tower and language model: from a Q-Former that "
        "has been through the first stage, and from one that has not. Captions of unseen pictures are checked against "
        "the truth: whether the colours that a caption names are there, whether the objects are, colour and shape, and "
        "whether all holds that it says. The last column are the first one’s captions, each with another picture: what "
        "is right by chance.</p>",
        f'<div class="beside">{shown}{relations(results, "figure 5")}</div>',
        '<p class="note">In the paper’s figure 5 both language models answer questions far worse without the first '
        "stage. The run without it has had fewer steps in all.</p>",
    )


def objectives(results: dict) -> str:
    rows = results.get("objectives")
    if not rows:
        return ""
    by_cosine = Series("mean of all, by cosine", [r["metrics"].get("itc_r_mean") for r in rows], best=max)
    published = [
        Series(f"COCO {way}@1", [paper.OBJECTIVES[r["itg"]][i] for r in rows]) for i, way in enumerate(("TR", "IR"))
    ]
    shown = across(
        "Recall with ITG and without it",
        "first stage",
        ["ITC + ITM + ITG" if r["itg"] else "ITC + ITM" for r in rows],
        [*recalls([{"metrics": r["metrics"]} for r in rows]), ("both ways, %", [by_cosine]), ("the paper", published)],
    )
    return section(
        "objectives",
        "What the generation of texts adds to retrieval",
        "<p>The first stage with its three objectives, and without image-grounded text generation (ITG), for as many "
        "steps; retrieval among unseen pictures, the nearest re-ranked by the matching head.</p>",
        f'<div class="beside">{shown}{relations(results, "table 6")}</div>',
        '<p class="note">The paper’s rows are its table 6, COCO after fine-tuning with these objectives: compare their '
        "order, not the numbers. Best of a row in bold.</p>",
    )


def captions(results: dict) -> str:
    rows = results.get("captions")
    if not rows:
        return ""
    cards = []
    for row in rows:
        told = "".join(map(_caption, row["texts"]))
        alt = f"Picture with the caption “{row['texts'][0]['text']}”"
        cards.append(f'<article class="card">{picture(row["image"], alt)}<div>{told}</div></article>')
    return section(
        "captions",
        "Pictures and their captions",
        "<p>The first unseen pictures. Whether a caption is true, all of it, is known of this world.</p>",
        f'<div class="cards">{"".join(cards)}</div>',
    )


def _caption(row: dict) -> str:
    mark = chip("✓ true", "true") if row["true"] else chip("✕ false", "false")
    return f"<p><small>{escape(row['by'])}</small> {mark}{escape(row['text']) or '(empty)'}</p>"


ALL = (captioners, objectives, captions)  # in the order of the page
