"""The stages of a demo: one after the other, how far they are, how long yet; run again, they go on."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

from blip_jax.console import say


class Stopped(Exception):
    """A signal ended a stage; what it had done is saved."""


class Stage(NamedTuple):
    """A part of a demo that is begun, and gone on with, as a whole."""

    name: str
    cost: float  # about how many seconds it takes on 2 idle CPU cores
    run: Callable[[], None]


def stop_if(out: dict) -> None:
    """Stopped: `out`, what a stage returned, says so."""
    if out.get("stopped"):
        raise Stopped


def through(stages: list[Stage], collect: Callable[[], dict], workdir: pathlib.Path) -> dict | None:
    """Runs or goes on with `stages`, then `collect`.

    Returns what `collect` gave, with "phases", [(name, seconds)]; None where a signal stopped a stage.
    """
    report = Stage("report", 30.0, lambda: None)
    clock = Clock(workdir / "stages.json", [*stages, report])
    try:
        for stage in stages:
            with clock.running(stage):
                stage.run()
    except Stopped:
        say(f"stopped: the same command goes on with this stage, {workdir} has what is done")
        return None
    with clock.running(report):
        results = collect()
    return results | {"phases": list(clock.seconds().items())}


class Clock:
    """Which stage runs, what each has taken over all starts of a demo, and how long the rest may take.

    A stage that ran to its end is looked at again when the demo is run again, and its time is not added to.
    """

    def __init__(self, path: pathlib.Path, stages: list[Stage]):
        self.path, self.stages = path, stages
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._kept = {stage.name: kept.get(stage.name, {"seconds": 0.0, "done": False}) for stage in stages}

    def seconds(self) -> dict[str, float]:
        """Name of a stage -> seconds it took, of those that have begun."""
        return {name: kept["seconds"] for name, kept in self._kept.items() if kept["seconds"]}

    def left(self) -> tuple[float, bool]:
        """(seconds that the stages not done may take, whether that was learnt from stages that are done)"""
        done = [s for s in self.stages if self._kept[s.name]["done"]]
        known, expected = sum(self._kept[s.name]["seconds"] for s in done), sum(s.cost for s in done)
        rest = sum(s.cost for s in self.stages if s not in done)
        return (rest * known / expected, True) if known and expected else (rest, False)

    @contextlib.contextmanager
    def running(self, stage: Stage):
        """Says what begins; adds the time spent inside, unless it was done before."""
        kept, place = self._kept[stage.name], f"stage {self.stages.index(stage) + 1} of {len(self.stages)}"
        if kept["done"]:
            say(f"\n== {place}: {stage.name}; done before")
            yield
            return
        seconds, learnt = self.left()
        minutes = f"about {max(1, round(seconds / 60))} min left"
        say(f"\n== {place}: {stage.name}; {minutes}{'' if learnt else ', if 2 CPU cores are idle'}")
        begun, before = time.perf_counter(), kept["seconds"]
        try:
            yield
            kept["done"] = True
        finally:
            kept["seconds"] = round(before + time.perf_counter() - begun, 1)
            beside = self.path.with_name(self.path.name + ".tmp")
            beside.write_text(json.dumps(self._kept, indent=1) + "\n", encoding="utf-8")
            os.replace(beside, self.path)
