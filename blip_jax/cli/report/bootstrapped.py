"""The page of a CapFilt run: what it kept and dropped, with examples."""

from __future__ import annotations

import json
import pathlib

from blip_jax.capfilt import decisions, settings, summary
from blip_jax.cli.report.page import FOOT, listed
from blip_jax.demo.report.markup import Series, bar, escape, number, percent
from blip_jax.demo.report.page import document
from blip_jax.demo.report.sections import section


def is_one(workdir: pathlib.Path) -> bool:
    """Whether a folder is the output of a finished CapFilt run."""
    return (workdir / summary.FILE).is_file() and (workdir / settings.FILE).is_file()


def page(workdir: pathlib.Path) -> str:
    """The text of the file."""
    found, made = (json.loads((workdir / name).read_text(encoding="utf-8")) for name in (summary.FILE, settings.FILE))
    body = [_counts(found)] + [_texts(source, found[source]) for source in decisions.SOURCES] + [_settings(made)]
    kept = found["kept"]
    tiles = (
        (number(kept["texts"]), "texts kept"),
        (number(found["images"]), "pictures read"),
        (number(found["threshold"], 2), "matching probability from which a text is kept"),
    )
    head = "".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in tiles)
    return document(f"CapFilt: {escape(workdir.name)}", f'<div class="tiles">{head}</div>', body, FOOT)


def _counts(found: dict) -> str:
    parts = [found[source] for source in decisions.SOURCES]
    columns = [
        Series("texts", [p["texts"] for p in parts], 0),
        Series("kept", [p["kept"] for p in parts], 0),
        *(Series(reason, [p["reasons"].get(reason, 0) for p in parts], 0) for reason in decisions.REASONS[1:]),
        Series("distinct words", [p["distinct_words"] for p in parts], 0),
        Series("words of a text", [p["mean_words"] for p in parts], 1),
    ]
    lost = "".join(f"<li>{number(n)} {escape(reason)}</li>" for reason, n in found["unreadable"].items())
    lost = f"<p>Records that could not be read:</p><ul>{lost}</ul>" if lost else ""
    return section("texts", "Texts", listed("Texts by source", decisions.SOURCES, columns), lost)


def _texts(source: str, part: dict) -> str:
    """How the matching probabilities of a source are spread, and some of its texts."""
    counts = part["itm_histogram"]
    top, width = max([*counts, 1]), 1 / len(counts)
    names = [f"{number(i * width, 2)} to {number((i + 1) * width, 2)}" for i in range(len(counts))]
    bars = "".join(f"<div><span>{x}</span>{bar(n / top)}<b>{number(n)}</b></div>" for x, n in zip(names, counts))
    examples = "".join(
        f"<h3>{escape(verdict)}</h3><ul>"
        + "".join(
            f"<li>{escape(row['text'])} <small>match {number(row['itm'], 2)}, {escape(row['key'])}</small></li>"
            for row in rows
        )
        + "</ul>"
        for verdict, rows in part["examples"].items()
        if rows
    )
    share = percent(part["noise_ratio"])
    return section(
        source,
        f"Texts, {source}",
        f"<p>The filter found noise in {share} of them, repetitions apart. Texts by matching probability:</p>",
        f'<div class="bars">{bars}</div>',
        examples,
    )


def _settings(made: dict) -> str:
    return section("settings", "Settings", f'<pre class="scroll">{escape(json.dumps(made, indent=1))}</pre>')
