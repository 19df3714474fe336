"""The page of a run: curves, evaluations, samples, settings."""

from __future__ import annotations

import json
from collections.abc import Iterable

from blip_jax.cli.report.records import Records
from blip_jax.cli.report.samples import Card, Query, Said
from blip_jax.demo.report import charts
from blip_jax.demo.report.markup import Series, across, duration, escape, number, percent, picture, table
from blip_jax.demo.report.page import document
from blip_jax.demo.report.sections import section

FOOT = "Made by <code>blip-jax report</code> of blip_jax."
SPEED = {  # numbers of the log's rows that say how fast it went -> what they are
    "examples_per_s": "examples per second",
    "waiting": "share of the time waiting for data",
    "goodput": "goodput, share of all time in steps",
    "mfu": "MFU",
    "tflops_per_device": "TFLOP/s of a device",
}
COUNTED = ("examples", "examples_crc", "epoch")  # these say where it stands
TRAINED, HELD_OUT = "in training", "on data.eval"  # lines of a panel
COLUMNS = 6  # evaluations in a table, the last ones
SHORT = 60  # characters of a setting's value, in which half of it and an ellipsis stay


def of(run: Records, said: Said) -> str:
    """The text of the file."""
    trained, evaluated = run.series("train"), run.series("eval")
    losses = {name: points for name, points in trained.items() if "loss" in name}
    speed = {title: trained[name] for name, title in SPEED.items() if name in trained}
    rest = [name for name in trained if name not in losses and name not in SPEED and name not in COUNTED]
    held_out = {name: points for name, points in evaluated.items() if name in losses}
    moving = {
        name: points for name, points in evaluated.items() if name not in held_out and len({y for _, y in points}) > 1
    }
    body = [
        panels("losses", "Training curves", losses, legend(held_out), beside=held_out),
        panels("evaluations", "Evaluations while it trained", moving, evaluations(run, evaluated)),
        measured(run),
        cards(said),
        queries(said),
        panels("others", "Learning rate and the rest", {name: trained[name] for name in rest}),
        panels("speed", "How fast it went", speed),
        settings(run),
    ]
    title = escape(f"{run.cfg.objective}: {run.workdir.name}")
    return document(title, tiles(run, losses) + facts(run, said), body, FOOT)


# --- the head ---------------------------------------------------------------------------------------------------------
def tiles(run: Records, losses: dict) -> str:
    """The few numbers to look at first."""
    out = []
    if run.rows:
        out.append((f"{number(run.rows[-1]['step'])} of {number(run.cfg.train.steps)}", "steps"))
    if points := losses.get("loss"):
        out.append((f"{points[0][1]:.3f} → {points[-1][1]:.3f}", "loss, of the first logged row and the last"))
    if run.best:
        out.append((f"{run.best.score:.4g}", f"the best evaluation by the task’s rule, of step {run.best.step}"))
    if (seconds := run.seconds()) is not None:
        out.append((duration(seconds), "from the first row of the log to the last"))
    text = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in out)
    return f'<div class="tiles">{text}</div>' if text else ""


def facts(run: Records, said: Said) -> str:
    found = list(run.start)
    for name in ("goodput", "waiting", "mfu"):
        if (share := run.median(name)) is not None:
            found.append((f"{SPEED[name].split(',')[0]}, median", percent(share)))
    if (speed := run.median("examples_per_s")) is not None:
        found.append(("examples per second, median", number(speed, 1)))
    found.append(("newest checkpoint", "none" if run.newest is None else str(run.newest)))
    if said.origin:
        found.append(("samples by", said.origin))
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in found)
    return f'<dl class="facts">{rows}</dl>'


# --- curves and evaluations -------------------------------------------------------------------------------------------
def panels(name: str, title: str, series: dict, *more: str, beside: dict | None = None) -> str:
    """A panel for each of `series`, name -> [(step, value)], with a second line where `beside` has the name, and `more`
    below; "" of neither.
    """
    drawn = []
    for i, (what, points) in enumerate(series.items()):
        second = [(1, HELD_OUT, beside[what])] if beside and what in beside else []
        line = charts.lines(f"{name}{i}", what, [(0, TRAINED if second else what, points), *second])
        drawn.append(f"<figure>{line}<figcaption>{escape(what)}</figcaption></figure>")
    box = f'<div class="panels">{"".join(drawn)}</div>' if drawn else ""
    return section(name, title, box, *more) if drawn or any(more) else ""


def legend(held_out: dict) -> str:
    """What the two lines of a panel of losses are; "" where there is one."""
    if not held_out:
        return ""
    names = "; ".join(f"{charts.swatch(i)}{what}" for i, what in enumerate((TRAINED, HELD_OUT)))
    return f'<p class="note">{names}, without dropout and augmentation.</p>'


def evaluations(run: Records, series: dict) -> str:
    """The last evaluations, and the one of the best checkpoint, side by side."""
    steps = sorted({step for points in series.values() for step, _ in points})
    shown = steps[-COLUMNS:]
    if run.best and run.best.step in steps and run.best.step not in shown:
        shown = [run.best.step, *shown[1:]]
    if not shown:
        return ""
    names = [f"step {step}{' (best)' * bool(run.best and step == run.best.step)}" for step in shown]
    values = {name: dict(points) for name, points in series.items()}
    rows = [_series(name, [at.get(step) for step in shown]) for name, at in values.items()]
    left = f'<p class="note">The last {len(shown)} of {len(steps)} evaluations.</p>' if len(steps) > len(shown) else ""
    return across("Evaluations", "", names, [("on data.eval", rows)]) + left


def measured(run: Records) -> str:
    """What `blip-jax evaluate` left."""
    numbers = {k: v for k, v in run.evaluation.items() if isinstance(v, (int, float))}
    if not numbers:
        return ""
    shown = across("Evaluation", "", ["value"], [("evaluation.json", [_series(k, [v]) for k, v in numbers.items()])])
    where = f"<p>Of checkpoint <code>{escape(run.evaluation.get('checkpoint', 'unknown'))}</code>.</p>"
    return section("measured", "Measured by blip-jax evaluate", where, f'<div class="narrow">{shown}</div>')


def _series(name: str, values: list) -> Series:
    """With no places of whole numbers, four of fractions, two of others."""
    known = [v for v in values if v is not None]
    whole = all(float(v).is_integer() for v in known if isinstance(v, int))
    digits = 0 if whole and all(isinstance(v, int) for v in known) else 4 if all(abs(v) <= 1 for v in known) else 2
    return Series(name, values, digits)


# --- samples ----------------------------------------------------------------------------------------------------------
def cards(said: Said) -> str:
    if said.problem:
        return section("samples", "Samples", f'<p class="note">There are none: {escape(said.problem)}.</p>')
    if not said.cards:
        return ""
    return section(
        "samples",
        "Pictures and what the model says",
        f"<p>The first records of data.eval, by checkpoint <code>{escape(said.origin)}</code>. Bold is the model’s, "
        "below it what people say.</p>",
        f'<div class="cards photos">{"".join(map(_card, said.cards))}</div>',
    )


def _card(card: Card) -> str:
    alt = f"Picture of which the model says “{card.said}”"
    pictures = "".join(picture(data, alt) for data in card.pictures)
    asked = f"<p>{escape(card.asked)}</p>" if card.asked else ""
    people = "".join(f"<small>{escape(text)}</small>" for text in dict.fromkeys(card.people))
    words = f"{asked}<p><b>{escape(card.said) or '(empty)'}</b></p><p>{people}</p>"
    return f'<article class="card"><div>{pictures}</div><div>{words}</div></article>'


def queries(said: Said) -> str:
    if not said.queries:
        return ""
    return section(
        "neighbours",
        "Found by text",
        "<p>The pictures that score highest for a text of data.eval, the best first, among the first of its pictures; "
        "its own has a frame and a ✓. A score is the matching head’s log-odds plus the embeddings’ similarity.</p>",
        f'<div class="queries photos">{"".join(map(_query, said.queries))}</div>',
    )


def _query(query: Query) -> str:
    shots = []
    for rank, (data, right, score) in enumerate(query.found, 1):
        alt = f"{'The right picture' if right else 'Another picture'}, at rank {rank}"
        mark = f"<small>{'✓ ' * right}score {number(score, 2)}</small>"
        shots.append(f'<li class="{"right" if right else "other"}">{picture(data, alt)}{mark}</li>')
    return f'<article class="query"><h3>“{escape(query.text)}”</h3><ol>{"".join(shots)}</ol></article>'


# --- settings ---------------------------------------------------------------------------------------------------------
def settings(run: Records) -> str:
    """Where the config differs, and all of it."""
    whole = escape(json.dumps(json.loads(run.cfg.to_json()), indent=1))
    rows = "".join(
        f'<tr><th scope="row">{escape(d.leaf)}</th>{_cell(d.here)}{_cell(d.there)}</tr>' for d in run.differences
    )
    head = f'<tr><th scope="col">setting</th><th scope="col">here</th><th scope="col">{escape(run.against)}</th></tr>'
    shown = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"
    return section(
        "settings",
        "Settings",
        f"<p>Where they differ from {escape(run.against)}.</p>" if rows else f"<p>Those of {escape(run.against)}.</p>",
        f'<div class="scroll" role="region" tabindex="0" aria-label="Settings">{shown}</div>' if rows else "",
        f'<details><summary>all of them</summary><pre class="scroll">{whole}</pre></details>',
    )


def _cell(value) -> str:
    text = "–" if value is None else json.dumps(value)
    if len(text) > SHORT:
        text = f"{text[: SHORT // 2]} … {text[-SHORT // 2 + 3 :]}"
    return f"<td>{escape(text)}</td>"


def listed(label: str, names: Iterable[str], columns: list[Series]) -> str:
    """A table of text and numbers in a narrow box."""
    return f'<div class="narrow">{table(label, "", [escape(name) for name in names], columns)}</div>'
