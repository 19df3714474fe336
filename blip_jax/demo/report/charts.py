"""Charts as inline SVG without scripts; colours come from the page's style sheet, every coordinate is finite."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from blip_jax.demo.report.markup import escape, number

WIDTH, HEIGHT = 360, 220  # of a panel's view box, in units that are about pixels
LEFT, RIGHT, TOP, BOTTOM = 44, 16, 10, 36  # margins around the plot

Points = Sequence[tuple[float, float]]


def tick_step(low: float, high: float) -> float:
    """1, 2 or 5 times a power of ten, such that about five of it lie between low < high."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    return power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)


def ticks(low: float, high: float) -> list[float]:
    """The multiples of `tick_step` within [low, high]; low < high."""
    step = tick_step(low, high)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def rounded(low: float, high: float) -> tuple[float, float]:
    """The smallest range from tick to tick that holds low < high."""
    step = tick_step(low, high)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def span(values: Iterable[float]) -> tuple[float, float]:
    """(lowest, highest) of finite values, widened where they are all (nearly) the same; (0, 1) of none."""
    values = list(values)
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, 1e-200):
        pad = size / 10 if size > 1e-200 else 0.5
        return low - pad, high + pad
    return low, high


def running_mean(points: Points, width: int) -> list[tuple[float, float]]:
    """Each value replaced by the mean of the `width` values around it, of fewer at both ends."""
    values = [y for _, y in points]
    before, after = (width - 1) // 2, width // 2
    windows = (values[max(0, i - before) : i + after + 1] for i in range(len(values)))
    return [(x, sum(w) / len(w)) for (x, _), w in zip(points, windows)]


def finite(points: Points) -> list[tuple[float, float]]:
    """Those points both of whose coordinates are finite."""
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]


class Plot:
    """The map from data to a panel's view box, and the frame with ticks and axis names around it."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], height: int = HEIGHT):
        self.x_range, self.y_range, self.height = x, y, height

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * (value - low) / (high - low)

    def path(self, points: Points) -> str:
        """SVG path data of a polyline; "" of none. A single point becomes a dot when the line has round caps."""
        if not points:
            return ""
        points = list(points) + list(points[:1]) * (len(points) == 1)
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def frame(self, x_name: str, y_name: str = "", y_text=None) -> str:
        """Grid lines, tick labels and names; `y_text` writes a tick of the y axis, else it is written as a number."""
        foot, right = self.height - BOTTOM, WIDTH - RIGHT
        x_ticks, y_ticks = ticks(*self.x_range), ticks(*self.y_range)
        parts = [f'<path class="axis" d="M{LEFT} {foot}H{right}"/>']
        for value, label in zip(y_ticks, _labels(y_ticks, y_text)):
            y = self.y(value)
            parts.append(
                f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
                f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{label}</text>'
            )
        for value, label in zip(x_ticks, _labels(x_ticks)):
            x = self.x(value)
            parts.append(
                f'<path class="axis" d="M{x:.1f} {foot}v4"/>'
                f'<text class="middle" x="{x:.1f}" y="{foot + 16}">{label}</text>'
            )
        parts.append(
            f'<text class="middle name" x="{(LEFT + right) / 2}" y="{self.height - 4}">{escape(x_name)}</text>'
        )
        middle = (TOP + foot) / 2
        if y_name:
            turned = f'transform="translate(11 {middle}) rotate(-90)"'
            parts.append(f'<text class="middle name" {turned}>{escape(y_name)}</text>')
        return "".join(parts)


def _labels(values: list[float], text=None) -> list[str]:
    if text:
        return [escape(text(v)) for v in values]
    step = values[1] - values[0] if len(values) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if digits > 5:  # a learning rate, say; written out there is no room for it
        return [f"{v:.1e}" if abs(v) > step / 2 else "0" for v in values]
    return [number(v, digits) for v in values]


def svg(name: str, title: str, description: str, body: str, height: int = HEIGHT) -> str:
    """The element around `body`; `name` makes its ids unique within the page."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
        f"{body}</svg>"
    )


def lines(name: str, title: str, series: list[tuple[int, str, Points]], x_name: str = "step") -> str:
    """Lines of several runs on one pair of axes.

    series: (number of a line style of the style sheet, run, its points (x, y) in order). Points that are not finite are
    left out, and long lines are drawn as a `running_mean`; see `smoothing`.
    """
    series = [(style, run, finite(points)) for style, run, points in series]
    drawn = [(style, running_mean(points, smoothing(points))) for style, _, points in series]
    every = [p for _, points in drawn for p in points]
    plot = Plot(span(x for x, _ in every), rounded(*span(y for _, y in every)))
    paths = "".join(f'<path class="line s{style}" d="{plot.path(points)}"/>' for style, points in drawn if points)
    told = [
        f"{run}: {number(p[0][1], 3)} at {number(p[0][0])}, {number(p[-1][1], 3)} at {number(p[-1][0])}"
        for _, run, p in series
        if p
    ]
    body = plot.frame(x_name) + paths if every else _nothing()
    return svg(name, title, "; ".join(told) or "no values", body)


def smoothing(points: Points) -> int:
    """How many values the drawn line averages at each point: 1, so none, below 40 points."""
    return max(1, len(points) // 20)


def _nothing() -> str:
    return f'<text class="middle" x="{WIDTH / 2}" y="{HEIGHT / 2}">no values</text>'


def roc(name: str, title: str, points: Points, auc: float | None = None) -> str:
    """The curve of (false positive rate, true positive rate) over the diagonal of chance; `auc` is written into it."""
    height, points = 320, sorted(finite(points))
    plot = Plot((0.0, 1.0), (0.0, 1.0), height)
    area = plot.path([(0, 0), *points, (1, 1), (1, 0)])
    label = "" if auc is None else f"AUC {number(auc, 3)}"
    body = [
        plot.frame("false texts kept", "true texts kept"),
        f'<path class="chance" d="{plot.path([(0, 0), (1, 1)])}"/>',
    ]
    if points:
        body.append(f'<path class="area" d="{area}Z"/><path class="line s0" d="{plot.path(points)}"/>')
    body.append(f'<text class="big end" x="{WIDTH - RIGHT - 12}" y="{plot.y(0.08):.1f}">{label}</text>')
    return svg(name, title, label or "ROC curve", "".join(body), height)


def histogram(
    name: str,
    title: str,
    edges: Sequence[float],
    true: Sequence[int],
    false: Sequence[int],
    threshold: float | None = None,
) -> str:
    """Scores of true texts upwards and of false texts downwards, each as a share of its own kind.

    edges: len(true) + 1 ascending numbers. Raises ValueError where the lengths do not fit.
    """
    if not len(edges) == len(true) + 1 == len(false) + 1:
        raise ValueError(
            f"noise.hist: {len(edges)} edges for {len(true)} counts of true and {len(false)} of false texts; "
            "it needs one edge more than counts, and as many counts of either"
        )

    height = 320
    up, down = ([n / (sum(counts) or 1) for n in counts] for counts in (true, false))
    top = max([*up, *down, 1e-3]) * 1.12
    plot = Plot((edges[0], edges[-1]) if len(edges) > 1 else (0.0, 1.0), (-top, top), height)
    digits = 0 if top > 0.1 else 1
    body = [plot.frame("matching probability", "share of the texts", lambda v: f"{abs(v):.{digits}%}")]

    for kind, shares, sign in (("true", up, 1), ("false", down, -1)):
        for (a, b), share in zip(itertools.pairwise(edges), shares):
            if share:
                x, w = plot.x(a), max(plot.x(b) - plot.x(a) - 1, 0.5)
                y = sorted((plot.y(0), plot.y(sign * share)))
                body.append(
                    f'<rect class="{kind}" x="{x:.1f}" y="{y[0]:.1f}" width="{w:.1f}" height="{y[1] - y[0]:.1f}"/>'
                )
    body.append(f'<path class="axis" d="{plot.path([(plot.x_range[0], 0), (plot.x_range[1], 0)])}"/>')
    right, foot = WIDTH - RIGHT - 8, height - BOTTOM - 12  # the corners that a good filter leaves empty
    body.append(
        f'<text class="kind-true" x="{LEFT + 8}" y="{TOP + 16}">▲ true texts ({number(sum(true))})</text>'
        f'<text class="end kind-false" x="{right}" y="{foot}">▼ false texts ({number(sum(false))})</text>'
    )
    if threshold is not None and plot.x_range[0] <= threshold <= plot.x_range[1]:
        x = plot.x(threshold)
        body.append(
            f'<path class="threshold" d="M{x:.1f} {TOP}V{height - BOTTOM}"/>'
            f'<text class="end" x="{x - 6:.1f}" y="{TOP + 36}">keep from {number(threshold, 2)}</text>'
        )
    return svg(name, title, f"{sum(true)} true and {sum(false)} false texts", "".join(body), height)


def swatch(style: int) -> str:
    """A short piece of a line for a legend; says nothing to a screen reader."""
    return f'<svg class="swatch" viewBox="0 0 30 10" aria-hidden="true"><path class="line s{style}" d="M2 5H28"/></svg>'
