"""Pieces of HTML as strings: escaped text, numbers, tables, pictures."""

from __future__ import annotations

import base64
import html
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

MEDIA = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}  # first bytes -> media type


def escape(text) -> str:
    """str(text) that no browser takes for markup, also within quotes."""
    return html.escape(str(text), quote=True)


def number(value: float | None, digits: int = 0) -> str:
    """With separated thousands; "–" of None, "nan" and "inf" as they are."""
    return "–" if value is None else f"{value:,.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 in percent, with the sign; "–" of None."""
    return "–" if share is None else f"{100 * share:.{digits}f}\u202f%"


def duration(seconds: float) -> str:
    """ "4.2 s", "3 min 20 s" or "2 h 5 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def picture(data: bytes, alt: str) -> str:
    """An img that carries its PNG or JPEG bytes. Raises ValueError on anything else."""
    media = next((m for head, m in MEDIA.items() if data.startswith(head)), None)
    if media is None:
        raise ValueError(f"picture {alt!r} starts with {bytes(data[:8])!r}; expected the bytes of a PNG or JPEG file")
    return f'<img src="data:{media};base64,{base64.b64encode(data).decode()}" alt="{escape(alt)}">'


class Column(NamedTuple):
    """A column of numbers. group: heading over neighbouring columns; best: max, min or None marks the best in bold."""

    group: str
    label: str
    values: Sequence[float | None]
    digits: int = 1
    best: object = None


def table(label: str, corner: str, names: Sequence[str], columns: Sequence[Column]) -> str:
    """A table with a row per name, in a box that scrolls by itself; `names` are HTML, the rest is escaped.

    Columns that hold nothing but None are left out.
    """
    columns = [c for c in columns if any(v is not None for v in c.values)]
    groups = [(group, list(members)) for group, members in itertools.groupby(columns, lambda c: c.group)]
    first = {id(members[0]) for _, members in groups}

    def css(column: Column) -> str:
        return ' class="first"' if id(column) in first else ""

    over = "".join(
        f'<th class="first" scope="colgroup" colspan="{len(members)}">{escape(g)}</th>' for g, members in groups
    )
    head = "".join(f'<th scope="col"{css(c)}>{escape(c.label)}</th>' for c in columns)
    marked = [_cells(c) for c in columns]
    body = ""
    for i, name in enumerate(names):
        row = "".join(f"<td{css(c)}>{cells[i]}</td>" for c, cells in zip(columns, marked))
        body += f'<tr><th scope="row">{name}</th>{row}</tr>'
    rows = f'<tr><th scope="col" rowspan="2">{escape(corner)}</th>{over}</tr><tr>{head}</tr>'
    if not any(group for group, _ in groups):
        rows = f'<tr><th scope="col">{escape(corner)}</th>{head}</tr>'
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'
        f"<table><thead>{rows}</thead><tbody>{body}</tbody></table></div>"
    )


def _cells(column: Column) -> list[str]:
    """Texts of a column; those that read the same as the best one are bold, unless all of them do."""
    texts = [number(v, column.digits) for v in column.values]
    known = [v for v in column.values if v is not None and math.isfinite(v)]
    if column.best is None or not known:
        return texts
    best = number(column.best(known), column.digits)
    if all(t == best for t in texts):
        return texts
    return [f"<strong>{t}</strong>" if t == best else t for t in texts]


def bar(share: float | None, css: str = "") -> str:
    """A horizontal bar of `share` of its cell, cut to 0 ... 1; decoration beside a number that is written out."""
    width = 100 * min(max(share, 0.0), 1.0) if share is not None and math.isfinite(share) else 0.0
    return f'<span class="bar {css}" aria-hidden="true"><i style="width:{width:.1f}%"></i></span>'
