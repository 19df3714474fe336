"""One function per section of the report: a part of the results -> HTML, "" where that part is missing or empty."""

from __future__ import annotations

from blip_jax.demo.report import charts, paper
from blip_jax.demo.report.markup import Column, bar, duration, escape, number, percent, picture, table
from blip_jax.demo.report.style import STYLES

METRICS = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10", "r_mean")
LOSSES = {
    "loss_itc": "Contrast of images and texts (ITC)",
    "loss_itm": "Image-text matching (ITM)",
    "loss_lm": "Language modelling (LM)",
    "loss": "Sum of the losses",
}
CORPORA = {
    (False, False): "neither",
    (False, True): "filter only",
    (True, False): "captioner only",
    (True, True): "both",
}
NOISE_OF = {"": "the whole corpus", "web_": "web texts", "synthetic_": "synthetic texts"}  # prefixes of before, after
SCALE = (
    "The paper’s columns are ViT-B on 14 million real images, COCO after fine-tuning and Flickr30K zero-shot: compare "
    "the order of the rows, not the numbers. TR: image to text; IR: text to image."
)


def section(name: str, title: str, *parts: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def facts(results: dict) -> str:
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in results.get("facts", ()))
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def glance(results: dict) -> str:
    """The few numbers to look at first, as far as they are there."""
    noise, mean = results.get("noise", {}), r_means(results.get("table1", ()))
    tiles = []
    if mean.get("neither") is not None and mean.get("both") is not None:
        tiles.append(
            (
                f"{number(mean['neither'], 1)} → {number(mean['both'], 1)}",
                "mean recall in %, on the corpus as it came and on the bootstrapped one",
            )
        )
    if noise.get("before") is not None and noise.get("after") is not None:
        tiles.append(
            (f"{percent(noise['before'])} → {percent(noise['after'])}", "false texts in the corpus, before and after")
        )
    if noise.get("auc") is not None:
        tiles.append((number(noise["auc"], 3), "area under the filter’s ROC curve, against the truth"))
    if results.get("phases"):
        tiles.append((duration(sum(s for _, s in results["phases"])), "all phases together"))
    text = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in tiles)
    return f'<div class="tiles">{text}</div>' if text else ""


# --- the tables -------------------------------------------------------------------------------------------------------
def _recalls(rows: list[dict]) -> list[Column]:
    columns = []
    for side, group in (("txt", "image to text"), ("img", "text to image")):
        columns += [
            Column(group, f"R@{k}", [r["metrics"].get(f"{side}_r{k}") for r in rows], best=max) for k in (1, 5, 10)
        ]
    return [*columns, Column("both ways", "mean", [r["metrics"].get("r_mean") for r in rows], best=max)]


def _in_percent(shares: list) -> list:
    return [None if s is None else 100 * s for s in shares]


def table1(results: dict) -> str:
    rows = results.get("table1")
    if not rows:
        return ""
    pairs = [(bool(r["captioner"]), bool(r["filter"])) for r in rows]
    columns = [Column("corpus", name, [r.get(name) for r in rows], 0) for name in ("images", "texts")]
    columns.append(Column("corpus", "false, %", _in_percent([r.get("noise") for r in rows]), best=min))
    columns += _recalls(rows)
    columns += [
        Column(f"paper: {data}", name, [paper.TABLE1[p][i] for p in pairs], best=max)
        for i, (data, name) in enumerate(paper.COLUMNS)
    ]
    return section(
        "corpora",
        "Four corpora, equal steps",
        "<p>The same model, pre-trained afresh for the same number of steps on the corpus as it came, on what the "
        "filter kept of it, on web and synthetic texts unfiltered, and on both kinds filtered. Recall in %; false "
        "texts counted against the truth.</p>",
        table("Four corpora: recall here and in the paper", "CapFilt", [CORPORA[p] for p in pairs], columns),
        order(rows),
        f'<p class="note">{SCALE} Best of a column in bold.</p>',
    )


def r_means(rows) -> dict[str, float | None]:
    """Name of a corpus -> its mean recall."""
    return {CORPORA[bool(r["captioner"]), bool(r["filter"])]: r["metrics"].get("r_mean") for r in rows}


def order(rows: list[dict]) -> str:
    """Says whether mean recall comes in the paper's order; "" unless it is known of each of the four corpora, once."""
    mean = r_means(rows)
    if len(rows) != len(CORPORA) or len(mean) != len(CORPORA) or None in mean.values():
        return ""
    agrees = all(mean["both"] >= mean[either] >= mean["neither"] for either in ("filter only", "captioner only"))
    ranked = ", ".join(f"{name} {number(value, 1)}" for name, value in sorted(mean.items(), key=lambda item: -item[1]))
    verdict = "This is the paper’s order" if agrees else "This is not the paper’s order"
    return (
        f'<p class="verdict {"good" if agrees else "bad"}">{"✓" if agrees else "✕"} Mean recall: {ranked}. '
        f"<b>{verdict}</b>: both ≥ either ≥ neither.</p>"
    )


def table2(results: dict) -> str:
    rows = results.get("table2")
    if not rows:
        return ""
    columns = [
        Column("synthetic texts, %", "dropped", _in_percent([r.get("noise_removed") for r in rows])),
        Column("synthetic texts, %", "true", _in_percent([r.get("true") for r in rows])),
        *_recalls(rows),
        Column("the paper", "dropped, %", _in_percent([paper.NOISE_REMOVED.get(r["method"]) for r in rows]), 0),
    ]
    return section(
        "decoding",
        "Nucleus sampling against beam search",
        "<p>How the captioner chooses its words: the likeliest sentence (beam) or a sample of the likely ones "
        "(nucleus). A sample errs more often, and says more that is new.</p>",
        table("Decoding: noise and recall", "captions by", [escape(r["method"]) for r in rows], columns),
        '<p class="note">In the paper the filter drops more of the nucleus captions than of the beam captions, and '
        "the model "
        "trained on nucleus captions is the better one downstream. Its images are real and its captioner is "
        "full-sized.</p>",
    )


# --- noise ------------------------------------------------------------------------------------------------------------
def noise(results: dict) -> str:
    part = results.get("noise")
    if not part:
        return ""
    plots = []
    if part.get("roc"):
        plots.append(
            _figure(
                charts.roc("roc", "ROC curve of the filter", part["roc"], part.get("auc")),
                "The filter as a judge of true and false, at every threshold. Dashed: chance.",
            )
        )
    if part.get("hist"):
        hist = part["hist"]
        drawn = charts.histogram(
            "scores",
            "Matching probability of true and false texts",
            hist["edges"],
            hist["true"],
            hist["false"],
            part.get("threshold"),
        )
        plots.append(_figure(drawn, "What the filter gives to texts that are true (up) and false (down)."))
    drawn = f'<div class="plots">{"".join(plots)}</div>' if plots else ""
    return section("noise", "Noise before and after", _before_after(part), _filter_numbers(part), drawn, _kinds(part))


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _before_after(part: dict) -> str:
    rows = []
    for prefix, name in NOISE_OF.items():
        for when in ("before", "after"):
            share = part.get(prefix + when)
            if share is not None:
                rows.append(f"<div><span>{name}, {when}</span>{bar(share, when)}<b>{percent(share)}</b></div>")
    return f'<p>False texts as a share of all:</p><div class="bars">{"".join(rows)}</div>' if rows else ""


def _filter_numbers(part: dict) -> str:
    told = []
    if part.get("precision") is not None:
        told.append(f"of the texts it kept, <b>{percent(part['precision'])}</b> are true (precision)")
    if part.get("recall") is not None:
        told.append(f"of the true texts, it kept <b>{percent(part['recall'])}</b> (recall)")
    if part.get("auc_wrong") is not None:
        told.append(
            f"the area under its ROC curve is <b>{number(part['auc_wrong'], 3)}</b> for clean web captions against "
            "captions of other pictures"
        )
    if not told:
        return ""
    threshold = part.get("threshold")
    at = "" if threshold is None else f", which keeps a text from a matching probability of {number(threshold, 2)}"
    return f"<p>The filter{at}: {'; '.join(told)}.</p>"


def _kinds(part: dict) -> str:
    rows = part.get("rows")
    if not rows:
        return ""
    columns = [
        Column("", "texts", [count for _, count, _ in rows], 0),
        Column("", "dropped, %", _in_percent([share for _, _, share in rows])),
    ]
    names = [f"{escape(str(kind).replace('_', ' '))}{bar(share)}" for kind, _, share in rows]
    return (
        '<h3>By kind of noise</h3><div class="narrow">'
        + table("Share dropped by kind of noise", "kind", names, columns)
        + "</div>"
    )


# --- pictures ---------------------------------------------------------------------------------------------------------
def gallery(results: dict) -> str:
    rows = results.get("gallery")
    if not rows:
        return ""
    cards = []
    for row in rows:
        texts = "".join(_decision(row, source) for source in ("web", "synthetic"))
        alt = f"Picture with the web text “{row['web']}”"
        cards.append(f'<article class="card">{picture(row["image"], alt)}<div>{texts}</div></article>')
    return section(
        "gallery",
        "Pictures, texts and decisions",
        "<p>T<sub>w</sub> is the text from the web, T<sub>s</sub> the captioner’s. The filter’s decision, its matching "
        "probability, and whether the text is true; pictures of every combination of decisions in turn. <span "
        'class="kept">✓ accepted</span>, <span class="dropped">✕ <del>rejected</del></span>; <em>mistaken</em> marks '
        "a decision against the truth.</p>",
        f'<div class="cards">{"".join(cards)}</div>',
    )


def _decision(row: dict, source: str) -> str:
    kept, true, text = bool(row[f"{source}_kept"]), row.get(f"{source}_true"), str(row[source])
    shown = escape(text) if text.strip() else "(empty)"
    told = ["accepted" if kept else "rejected"]
    if row.get(f"{source}_itm") is not None:
        told.append(f"match {number(row[f'{source}_itm'], 2)}")
    if true is not None:
        told.append("true" if true else "false")
        if bool(true) != kept:
            told.append("<em>mistaken</em>")
    line = f"✓ {shown}" if kept else f"✕ <del>{shown}</del>"
    return (
        f'<p class="{"kept" if kept else "dropped"}"><b class="who">T<sub>{source[0]}</sub></b> {line}'
        f"<small>{' · '.join(told)}</small></p>"
    )


def retrieval(results: dict) -> str:
    rows = results.get("retrieval")
    if not rows:
        return ""
    blocks = []
    for row in rows:
        shots = []
        for rank, found in enumerate(row["images"], 1):
            mark = "✓ " if found["right"] else ""
            alt = f"{'The right picture' if found['right'] else 'Another picture'}, at rank {rank}"
            shots.append(
                f'<li class="{"right" if found["right"] else "other"}">{picture(found["image"], alt)}'
                f"<small>{mark}{number(found.get('score'), 2)}</small></li>"
            )
        blocks.append(f'<article class="query"><h3>“{escape(row["query"])}”</h3><ol>{"".join(shots)}</ol></article>')
    return section(
        "retrieval",
        "Found by text",
        "<p>The pictures that score highest for a caption, the best first; the one that it was written for has a "
        "frame and a ✓.</p>",
        f'<div class="queries">{"".join(blocks)}</div>',
    )


# --- training ---------------------------------------------------------------------------------------------------------
def curves(results: dict) -> str:
    """One panel per loss with a line per run, and a legend that is a table of the last values."""
    runs = {run: series for run, series in results.get("curves", {}).items() if series}
    if not runs:
        return ""
    names = sorted({name for series in runs.values() for name in series}, key=lambda n: (_rank(n), n))
    style = {run: i % STYLES for i, run in enumerate(runs)}
    panels = []
    for i, name in enumerate(names):
        series = [(style[run], run, points[name]) for run, points in runs.items() if name in points]
        panels.append(_figure(charts.lines(f"curve{i}", LOSSES.get(name, name), series), LOSSES.get(name, name)))
    last = [
        Column("last value", LOSSES.get(n, n), [_last(series.get(n)) for series in runs.values()], 3) for n in names
    ]
    names = [f"{charts.swatch(style[run])}{escape(run)}" for run in runs]
    legend = table("Last values of the training curves", "run", names, last)
    return section("curves", "Training curves", f'<div class="panels">{"".join(panels)}</div>', legend, _drawn(runs))


def _rank(name: str) -> int:
    return list(LOSSES).index(name) if name in LOSSES else len(LOSSES)


def _last(points) -> float | None:
    return points[-1][1] if points else None


def _drawn(runs: dict) -> str:
    """What the lines leave out, in words."""
    every = [points for series in runs.values() for points in series.values()]
    widest = max((charts.smoothing(charts.finite(points)) for points in every), default=1)
    lost = sum(len(points) - len(charts.finite(points)) for points in every)
    told = [f"The lines are running means, of up to {widest} logged values."] * (widest > 1)
    told += [f"Not finite and so not drawn: {lost} of the values."] * (lost > 0)
    return f'<p class="note">{" ".join(told)}</p>' if told else ""


def phases(results: dict) -> str:
    rows = results.get("phases")
    if not rows:
        return ""
    total = sum(seconds for _, seconds in rows)
    longest = max(seconds for _, seconds in rows) or 1.0
    lines = [f"<div><span>{escape(name)}</span>{bar(s / longest)}<b>{duration(s)}</b></div>" for name, s in rows]
    lines.append(f'<div class="total"><span>total</span><span></span><b>{duration(total)}</b></div>')
    return section("time", "Where the time went", f'<div class="bars">{"".join(lines)}</div>')


ALL = (table1, table2, noise, gallery, retrieval, curves, phases)  # in the order of the page
