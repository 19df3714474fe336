"""What a workdir of `blip-jax train` says of its run: settings, log, evaluations, checkpoints. Only read, so that a run
may go on meanwhile."""

from __future__ import annotations

import json
import pathlib
import statistics
from datetime import datetime
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from blip_jax import checkpoint, config, trees
from blip_jax.cli import configs
from blip_jax.console import plain
from blip_jax.train import best

FILES = ("config.json", "metrics.jsonl")
STARTS = {  # how a paragraph of start.txt begins -> what it is called here
    "blip_jax ": "software",
    "parameters: ": "parameters",
    "memory per device: ": "memory per device",
    "FLOPs: ": "FLOPs",
    "one epoch is ": "data",
}


class Difference(NamedTuple):
    """A leaf of the config; None: there is none of this name."""

    leaf: str
    here: Any
    there: Any


class Records(NamedTuple):
    """A run."""

    workdir: pathlib.Path
    cfg: ConfigDict
    rows: list[dict]  # of metrics.jsonl
    start: list[tuple[str, str]]  # (name, value) of what it said at its last start
    differences: list[Difference]
    against: str  # what they are from
    newest: int | None  # checkpoint
    best: best.Best | None
    evaluation: dict  # evaluation.json; {}: there is none

    def series(self, part: str) -> dict[str, list[tuple[int, float]]]:
        """name -> [(step, value)] of the numbers of the rows' `part`, train or eval."""
        out: dict[str, list] = {}
        for row in self.rows:
            for name, value in row.items():
                if name.startswith(f"{part}/") and isinstance(value, (int, float)):
                    out.setdefault(name.removeprefix(f"{part}/"), []).append((row["step"], value))
        return out

    def median(self, name: str) -> float | None:
        values = [row[f"train/{name}"] for row in self.rows if f"train/{name}" in row]
        return statistics.median(values) if values else None

    def seconds(self) -> float | None:
        """From the first row to the last, with whatever lay between two starts."""
        times = [datetime.fromisoformat(row["time"]) for row in self.rows if "time" in row]
        return (times[-1] - times[0]).total_seconds() if len(times) > 1 else None


def read(workdir: pathlib.Path, against: ConfigDict | None = None) -> Records:
    """The run in `workdir`. ValueError: there is none, or a file of it is not what `train` writes.

    against: a config that its settings are compared with; None: the defaults of blip_jax/config/leaves.py.
    """
    if lacking := [name for name in FILES if not (workdir / name).is_file()]:
        raise ValueError(
            f"{workdir} has no {' and no '.join(lacking)}: give the --workdir of `blip-jax train`, after its first log "
            "line, or the --out of a finished `blip-jax capfilt`"
        )
    cfg = configs.load(str(workdir / "config.json"))
    told = workdir / "evaluation.json"
    return Records(
        workdir,
        cfg,
        rows(workdir / "metrics.jsonl"),
        _start(workdir / "start.txt"),
        differences(cfg, against),
        "the defaults" if against is None else "the file",
        checkpoint.newest_complete(workdir),
        best.found(workdir),
        json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {},
    )


def rows(path: pathlib.Path) -> list[dict]:
    """The rows of a log, without the last line where a run is just writing it. ValueError: another one is not JSON."""
    lines, out = path.read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is not JSON: {line[:80]!r}") from None
    return out


def _start(path: pathlib.Path) -> list[tuple[str, str]]:
    """The paragraphs of start.txt that STARTS names, and the one of devices."""
    if not path.is_file():
        return []
    out = []
    for text in path.read_text(encoding="utf-8").split("\n\n"):
        if " devices of kind " in text.partition("\n")[0]:
            out.append(("devices", text))
        out += [(name, text.removeprefix(begins)) for begins, name in STARTS.items() if text.startswith(begins)]
    seen: dict[str, str] = {}
    for name, text in out:  # the tables further down begin like their sums
        seen.setdefault(name, text)
    return list(seen.items())


def differences(cfg: ConfigDict, against: ConfigDict | None) -> list[Difference]:
    """Leaves in which `cfg` differs, in its order, then those that only the other has."""
    there = against
    if there is None:
        there = config.blip2() if "qformer" in cfg.model else config.base()
    here, other = trees.flat(plain(cfg)), trees.flat(plain(there))
    if against is None:  # what a source does not say is no difference
        for part in ("train", "eval"):
            for name, own in cfg.data[part].items():
                other |= trees.flat(plain(config.source(own.kind)), f"data.{part}.{name}.")
    leaves = [*here, *(leaf for leaf in other if leaf not in here)]
    found = (Difference(leaf, here.get(leaf), other.get(leaf)) for leaf in leaves)
    return [d for d in found if d.here != d.there]
