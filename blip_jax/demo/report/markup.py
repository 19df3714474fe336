"""Pieces of HTML as strings: escaped text, numbers, tables, pictures."""

from __future__ import annotations

import base64
import html
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


class Series(NamedTuple):
    """Numbers that belong together. best: max, min or None marks the best of them in bold."""

    label: str
    values: Sequence[float | None]
    digits: int = 1
    best: object = None


def table(label: str, corner: str, names: Sequence[str], columns: Sequence[Series]) -> str:
    """A table with a row per name, in a box that scrolls by itself; `names` are HTML, the rest is escaped.

    Columns that hold nothing but None are left out.
    """
    columns = _known(columns)
    head = "".join(f'<th scope="col">{escape(c.label)}</th>' for c in columns)
    marked = [_cells(c) for c in columns]
    body = ""
    for i, name in enumerate(names):
        body += f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cells[i]}</td>" for cells in marked)}</tr>'
    return _boxed(label, f'<tr><th scope="col">{escape(corner)}</th>{head}</tr>', f"<tbody>{body}</tbody>")


def across(label: str, corner: str, names: Sequence[str], groups: Sequence[tuple[str, Sequence[Series]]]) -> str:
    """A table with a column per name and a row per series, which a phone can show whole; all is escaped.

    groups: (heading, series below it). Series that hold nothing but None are left out, and groups without any.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = ""
    for heading, series in groups:
        rows = "".join(
            f'<tr><th scope="row">{escape(s.label)}</th>{"".join(f"<td>{cell}</td>" for cell in _cells(s))}</tr>'
            for s in _known(series)
        )
        over = f'<tr><th class="group" scope="rowgroup" colspan="{len(names) + 1}">{escape(heading)}</th></tr>'
        body += f"<tbody>{over}{rows}</tbody>" if rows else ""
    return _boxed(label, f'<tr><th scope="col">{escape(corner)}</th>{head}</tr>', body, " across")


def _known(series: Sequence[Series]) -> list[Series]:
    return [s for s in series if any(v is not None for v in s.values)]


def _boxed(label: str, head: str, body: str, css: str = "") -> str:
    return (
        f'<div class="scroll{css}" role="region" tabindex="0" aria-label="{escape(label)}">'
        f"<table><thead>{head}</thead>{body}</table></div>"
    )


def _cells(series: Series) -> list[str]:
    """Texts of a series; those that read the same as the best one are bold, unless all of them do."""
    texts = [number(v, series.digits) for v in series.values]
    known = [v for v in series.values if v is not None and math.isfinite(v)]
    if series.best is None or not known:
        return texts
    best = number(series.best(known), series.digits)
    if all(t == best for t in texts):
        return texts
    return [f"<strong>{t}</strong>" if t == best else t for t in texts]


def bar(share: float | None, css: str = "") -> str:
    """A horizontal bar of `share` of its cell, cut to 0 ... 1; decoration beside a number that is written out."""
    width = 100 * min(max(share, 0.0), 1.0) if share is not None and math.isfinite(share) else 0.0
    return f'<span class="bar {css}" aria-hidden="true"><i style="width:{width:.1f}%"></i></span>'
