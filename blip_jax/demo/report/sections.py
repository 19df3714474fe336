"""One function per section of the report: a part of the results -> HTML, "" where that part is missing or empty."""

from __future__ import annotations

from blip_jax.demo.report import charts, paper
from blip_jax.demo.report.markup import Series, across, bar, duration, escape, number, percent, picture, table
from blip_jax.demo.report.style import STYLES

LOSSES = {  # name in the log -> (its panel, its column)
    "loss_itc": ("Contrast of images and texts (ITC)", "ITC"),
    "loss_itm": ("Image-text matching (ITM)", "ITM"),
    "loss_lm": ("Language modelling (LM)", "LM"),
    "loss": ("Sum of the losses", "sum"),
}
NOISE_OF = {"": "the whole corpus", "web_": "web texts", "synthetic_": "synthetic texts"}  # prefixes of before, after
KINDS = {  # kind of web text -> (its name, what it is)
    "none": ("clean caption", "says what is in the picture: to drop one is a mistake"),
    "partly": ("partly wrong", "one word of a true caption is changed: a colour, a shape"),
    "wrong": ("wrong", "the caption of another picture"),
    "boilerplate": ("boilerplate", "what stands on every page"),
    "file_name": ("file name", "the name of a picture file"),
    "language": ("another language", "a sentence in another language, of no picture"),
    "empty": ("empty", "no text at all"),
}
VERDICTS = {  # verdict of relations.Relation -> (mark, words, class)
    "holds": ("✓", "as in the paper", "good"),
    "undecided": ("≈", "within the error", "open"),
    "reversed": ("✕", "the other way round", "bad"),
}
SCALE = (
    "The paper’s rows are ViT-B on 14 million real images, COCO after fine-tuning and Flickr30K zero-shot: compare "
    "the order of the columns, not the numbers. TR: image to text; IR: text to image."
)


def section(name: str, title: str, *parts: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def facts(results: dict) -> str:
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in results.get("facts", ()))
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def glance(results: dict, tiles: list[tuple[str, str]]) -> str:
    """The few numbers to look at first, as far as they are there, behind `tiles`, (number, what it is)."""
    noise, mean = results.get("noise", {}), r_means(results.get("table1", ()))
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
        tiles.append((number(noise["auc"], 3), "area under the filter’s ROC curve, over all texts"))
    if results.get("phases"):
        tiles.append((duration(sum(s for _, s in results["phases"])), "all phases together"))
    text = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in tiles)
    return f'<div class="tiles">{text}</div>' if text else ""


# --- the tables -------------------------------------------------------------------------------------------------------
def recalls(rows: list[dict]) -> list[tuple[str, list[Series]]]:
    groups = []
    for side, heading in (("txt", "image to text, %"), ("img", "text to image, %")):
        values = [(k, [r["metrics"].get(f"{side}_r{k}") for r in rows]) for k in (1, 5, 10)]
        groups.append((heading, [Series(f"R@{k}", found, best=max) for k, found in values]))
    mean = Series("mean of all", [r["metrics"].get("r_mean") for r in rows], best=max)
    return [("both ways, %", [mean]), *groups]


def in_percent(shares: list) -> list:
    return [None if s is None else 100 * s for s in shares]


def table1(results: dict) -> str:
    rows = results.get("table1")
    if not rows:
        return ""
    pairs = [(bool(r["captioner"]), bool(r["filter"])) for r in rows]
    corpus = [Series(name, [r.get(name) for r in rows], 0) for name in ("images", "texts")]
    corpus.append(Series("false, %", in_percent([r.get("noise") for r in rows]), best=min))
    published = [
        Series(f"{data} {name}", [paper.TABLE1[p][i] for p in pairs], best=max)
        for i, (data, name) in enumerate(paper.COLUMNS)
    ]
    shown = across(
        "Corpora: recall here and in the paper",
        "CapFilt",
        [paper.NAMES[p] for p in pairs],
        [("corpus", corpus), *recalls(rows), ("the paper", published)],
    )
    return section(
        "corpora",
        "What each corpus is worth",
        "<p>The same model, pre-trained afresh for the same number of steps on each corpus: as it came, what the "
        "filter kept of it, web and synthetic texts unfiltered, both kinds filtered. False texts are counted against "
        "the truth.</p>",
        f'<div class="beside">{shown}{relations(results, 1)}</div>',
        f'<p class="note">{SCALE} Best of a row in bold.</p>',
    )


def r_means(rows) -> dict[str, float | None]:
    """Name of a corpus -> its mean recall."""
    return {paper.NAMES[bool(r["captioner"]), bool(r["filter"])]: r["metrics"].get("r_mean") for r in rows}


def relations(results: dict, table_of_paper: int | str) -> str:
    """Each order that a table of the paper has, and what came out here; "" where nothing is known of it."""
    rows = [r for r in results.get("relations", ()) if r["table"] == table_of_paper]
    if not rows:
        return ""
    told = []
    for row in rows:
        mark, words, css = VERDICTS[row["verdict"]]
        what = "" if row["what"] == "mean recall" else f" ({escape(row['what'])})"
        told.append(
            f'<li class="{css}"><b>{mark} {escape(row["larger"])} &gt; {escape(row["smaller"])}</b>{what}: here '
            f"{row['difference']:+.1f} ± {number(row['error'], 1)}, <b>{words}</b></li>"
        )
    counts = {name: sum(r["verdict"] == name for r in rows) for name in VERDICTS}
    summary = ", ".join(f"{n} {VERDICTS[name][1]}" for name, n in counts.items() if n)
    return (
        f'<div class="relations"><h3>What the paper orders, and here</h3><p>Of {len(rows)}: {summary}.</p>'
        f"<ul>{''.join(told)}</ul>"
        '<p class="note">In points of mean recall where nothing else is said. ±: 95 % of what other pictures of the '
        "same kind would show, from the differences picture by picture. Another seed, which is another training, "
        "moves the numbers more than that.</p></div>"
    )


def table2(results: dict) -> str:
    rows = results.get("table2")
    if not rows:
        return ""
    texts = [
        Series("dropped", in_percent([r.get("noise_removed") for r in rows])),
        Series("true", in_percent([r.get("true") for r in rows])),
    ]
    published = [Series("dropped, %", in_percent([paper.NOISE_REMOVED.get(r["method"]) for r in rows]), 0)]
    shown = across(
        "Decoding: noise and recall",
        "captions by",
        [r["method"] for r in rows],
        [("synthetic texts, %", texts), *recalls(rows), ("the paper", published)],
    )
    return section(
        "decoding",
        "Nucleus sampling against beam search",
        "<p>How the captioner chooses its words: the likeliest sentence (beam) or a sample of the likely ones "
        "(nucleus). A sample errs more often, and says more that is new. None: the corpus as it came.</p>",
        f'<div class="beside">{shown}{relations(results, 2)}</div>',
        '<p class="note">In the paper the filter drops more of the nucleus captions than of the beam captions, and '
        "the model trained on nucleus captions is the better one downstream. Its images are real and its captioner is "
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
    return section(
        "noise",
        "Noise before and after",
        _before_after(part),
        _cleaner(part),
        _filter_numbers(part),
        drawn,
        _kinds(part),
    )


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
    if part.get("auc") is not None:
        told.append(f"the area under its ROC curve is <b>{number(part['auc'], 3)}</b> over all texts")
    if part.get("auc_wrong") is not None:
        told.append(
            f"it is <b>{number(part['auc_wrong'], 3)}</b> where that is easy, clean web captions against captions of "
            "other pictures"
        )
    if not told:
        return ""
    threshold = part.get("threshold")
    at = "" if threshold is None else f", which keeps a text from a matching probability of {number(threshold, 2)}"
    return f"<p>The filter{at}: {'; '.join(told)}.</p>"


def _cleaner(part: dict) -> str:
    """Whether the filter made either kind of text cleaner, in words."""
    told = []
    for source, name in (("web", "web texts"), ("synthetic", "synthetic texts")):
        found = part.get("decided", {}).get(source)
        if found is None or found["share_dropped"] is None or found["difference"] is None:
            continue
        words = {
            "holds": "so it made them cleaner",
            "undecided": "a difference within its error, so it did not make them cleaner",
            "reversed": "so it dropped more true ones than chance would",
        }[found["verdict"]]
        told.append(
            f"Of the {name} the filter dropped {percent(found['share_dropped'])}. Of those that it dropped "
            f"{percent(found['false_dropped'])} are false, of those that it kept {percent(found['false_kept'])} "
            f"({100 * found['difference']:+.1f} ± {100 * found['error']:.1f} points), {words}."
        )
    return f"<p>{' '.join(told)}</p>" if told else ""


def _kinds(part: dict) -> str:
    rows = part.get("rows")
    if not rows:
        return ""
    columns = [
        Series("texts", [count for _, count, _ in rows], 0),
        Series("dropped, %", in_percent([share for _, _, share in rows])),
    ]
    names = []
    for kind, _, share in rows:
        name, what = KINDS.get(kind, (str(kind).replace("_", " "), ""))
        names.append(f"{escape(name)}{f'<small>{escape(what)}</small>' if what else ''}{bar(share)}")
    return (
        '<h3>Web texts by kind</h3><div class="narrow">'
        + table("Share dropped by kind of web text", "kind", names, columns)
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
        "<p>T<sub>w</sub> is the text from the web, T<sub>s</sub> the captioner’s. Two marks stand before each: the "
        "truth, known of this world, and the filter’s decision with its matching probability. "
        '<span class="chip true">✓ true</span> or <span class="chip false">✕ false</span> says whether all of the '
        'text holds of the picture; <span class="chip">kept</span> or <span class="chip"><del>dropped</del></span> '
        "what the filter did; <em>mistaken</em> that this was wrong. Pictures of every combination of decisions in "
        "turn.</p>",
        f'<div class="cards">{"".join(cards)}</div>',
    )


def _decision(row: dict, source: str) -> str:
    kept, true, text = bool(row[f"{source}_kept"]), row.get(f"{source}_true"), str(row[source])
    shown = escape(text) if text.strip() else "(empty)"
    marks = "" if true is None else chip("✓ true" if true else "✕ false", "true" if true else "false")
    marks += chip("kept") if kept else chip("<del>dropped</del>")
    told = []
    if row.get(f"{source}_itm") is not None:
        told.append(f"match {number(row[f'{source}_itm'], 2)}")
    if true is not None and bool(true) != kept:
        told.append("<em>mistaken</em>")
    small = f"<small>{' · '.join(told)}</small>" if told else ""
    words = shown if kept else f"<del>{shown}</del>"
    return f'<p><b class="who">T<sub>{source[0]}</sub></b> {marks}{words}{small}</p>'


def chip(words: str, css: str = "") -> str:
    return f'<span class="{f"chip {css}".strip()}">{words}</span> '


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
                f"<small>{mark}score {number(found.get('score'), 2)}</small></li>"
            )
        blocks.append(f'<article class="query"><h3>“{escape(row["query"])}”</h3><ol>{"".join(shots)}</ol></article>')
    return section(
        "retrieval",
        "Found by text",
        "<p>The pictures that score highest for a caption, the best first; the one that it was written for has a "
        "frame and a ✓. A score is the matching head’s log-odds that they belong together plus the cosine of their "
        "embeddings: above 0 a match is the likelier.</p>",
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
        title = LOSSES.get(name, (name,))[0]
        panels.append(_figure(charts.lines(f"curve{i}", title, series), title))
    last = [Series(LOSSES.get(n, (n,))[-1], [_last(series.get(n)) for series in runs.values()], 3) for n in names]
    names = [f"{charts.swatch(style[run])}{escape(run)}" for run in runs]
    legend = table("Last values of the training curves", "last values", names, last)
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
