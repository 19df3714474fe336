"""What a folder of plans says together: a table in Markdown and a chart of scaling. `python benchmarks/plans.py
benchmarks/plans`."""

from __future__ import annotations

import json
import math
import pathlib
import sys

from blip_jax.demo.report import charts
from blip_jax.demo.report.markup import escape
from blip_jax.plan.plan import gib

HEAD = """# Plans

What the compiler makes of the step of a config on TPUs and GPUs that were not at hand; each row is a JSON file here,
made by `blip-jax plan` ([make.sh](make.sh) has the commands). Memory is what a device needs of what the compiler lets
a program have, on a GPU of the 75 % that jax takes. Times are lower bounds, every unit at its data sheet's rate and all
at once; `memory` counts the traffic of a program that a TPU's run would fuse more (compiled at -O0) and whose attention
a GPU's would make by cuDNN, so images/s is given as bounded by compute and interconnect, too. Nothing here was measured
on a TPU or a GPU.
"""
STYLE = (
    "svg{background:#fdfdfb;font-family:system-ui,sans-serif}text{fill:#5c6166;font-size:11px}"
    ".end{text-anchor:end}.middle{text-anchor:middle}"
    ".axis{stroke:#5c6166;fill:none}.grid{stroke:#dcdcd6;fill:none}.line{fill:none;stroke-width:1.8}"
)
COLOURS = {"v5e": "#1b5e9b", "v5p": "#c2500a", "v6e": "#2c7a3f", "v4": "#7d3c98", "v7x": "#8a6a00"}


def read(folder) -> dict[str, dict]:
    """Plans by name. ValueError: the folder holds none."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(pathlib.Path(folder).glob("*.json"))
    }
    if not found:
        raise ValueError(f"{folder} holds no plan: write some there with blip-jax plan ... --out={folder}/NAME.json")
    return {name: plan["best"] if "tried" in plan else plan for name, plan in found.items() if plan.get("best", True)}


def without_memory(plan: dict) -> tuple[float, str]:
    """(images/s by compute and interconnect alone, which of the two bounds the slowest program)."""
    bound = lambda row: max(("compute", "interconnect"), key=lambda name: row["seconds"].get(name, 0.0))
    rows = plan["programs"]
    slowest = max(rows, key=lambda row: row["seconds"][bound(row)])
    return rows[0]["images"] / sum(row["seconds"][bound(row)] for row in rows), bound(slowest)


def markdown(plans: dict[str, dict]) -> str:
    """A row for each plan: memory, the three times, images/s, what bounds."""
    lines = [
        HEAD,
        "| plan | on | mesh | a device | remat | needs | of | compute, memory, interconnect ms | images/s a chip, in "
        "all "
        "| bound | images/s and bound without memory traffic | compiled in s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, plan in plans.items():
        rows, model = plan["programs"], plan["config"].get("model", {})
        most = max(rows, key=lambda row: row.get("needed", row["known"]))
        units = lambda row: ", ".join(
            f"{1e3 * row['seconds'].get(k, math.nan):.1f}" for k in ("compute", "memory", "interconnect")
        )
        times, mesh = " + ".join(map(units, rows)), " × ".join(str(n) for n in plan["mesh"].values())
        needs = gib(most.get("needed", most["known"])) + (" **too much**" if plan["fits"] is False else "")
        rate, bound = without_memory(plan)
        speed = f"{plan['images_per_s_per_chip']:,.0f}, {plan['images_per_s']:,.0f}" if "images_per_s" in plan else "–"
        slowest = max(rows, key=lambda row: row["best_seconds"])["bound"]
        lines.append(
            f"| {name} | {plan['topology']} | {mesh} | {rows[0]['images'] // plan['devices']} | "
            f"{model.get('remat', '–')} | {needs} | {gib(most['usable'])} | {times} | {speed} | {slowest} | "
            f"{rate:,.0f}, {bound} | {sum(row.get('compile_seconds', 0.0) for row in rows):.0f} |"
        )
    return "\n".join(lines) + "\n"


def scaling(plans: dict[str, dict]) -> str:
    """An SVG of images/s per chip, by compute and interconnect, against the number of chips, a line for each TPU.

    A point that is a ring is bound by interconnect.

    plans: those of one training step; each config's batch a device is told apart by the name up to the last "-".
    """
    series: dict = {}
    for name, plan in plans.items():
        rate, bound = without_memory(plan)
        series.setdefault(name.rpartition("-")[0], []).append(
            (math.log2(plan["chips"]), rate / plan["chips"] / 1000, bound)
        )
    every = [p for points in series.values() for p in points]
    if not every:
        raise ValueError("no plan to draw: their names begin with scaling-")
    top = max(y for _, y, _ in every)
    plot = charts.Plot(charts.span(x for x, _, _ in every), (0.0, charts.rounded(0.0, top)[1]))
    body, told = [f"<style>{STYLE}</style>", plot.frame("chips, as a power of two", "1000 images/s a chip")], []
    for name, points in sorted(series.items()):
        points.sort()
        colour = next((c for kind, c in COLOURS.items() if kind in name), "#4d5358")
        dash = ' stroke-dasharray="5 3"' if "paper" in name else ""
        body.append(f'<path class="line" stroke="{colour}"{dash} d="{plot.path([(x, y) for x, y, _ in points])}"/>')
        filled = {"compute": colour, "interconnect": "#fdfdfb"}
        body += [
            f'<circle cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="3" stroke="{colour}" fill="{filled[bound]}"/>'
            for x, y, bound in points
        ]
        # below its line, or above
        x, y = plot.x(points[-1][0]), plot.y(points[-1][1]) + (16 if "paper" in name else -7)
        body.append(f'<text class="end" x="{x:.1f}" y="{y:.1f}">{escape(name.removeprefix("scaling-"))}</text>')
        told.append(f"{name}: " + ", ".join(f"{2**x:.0f} chips {1000 * y:.0f} ({bound})" for x, y, bound in points))
    return charts.svg(
        "scaling", "images/s a chip at best, by compute and interconnect", "; ".join(told), "".join(body)
    ).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def main(folder: str) -> None:
    """Writes README.md into a folder of plans, and scaling.svg beside it where plans are named scaling-TPU-CHIPS."""
    plans, place = read(folder), pathlib.Path(folder)
    (place / "README.md").write_text(markdown(plans), encoding="utf-8")
    if series := {name: plan for name, plan in plans.items() if name.startswith("scaling-")}:
        (place.parent / "scaling.svg").write_text(scaling(series) + "\n", encoding="utf-8")
    print(f"{len(plans)} plans: {place / 'README.md'}")


if __name__ == "__main__":
    main(sys.argv[1])
