"""The best checkpoint of a run by its task's rule, beside the newest ones: `workdir`/best, a workdir of its own.

Whatever takes a workdir takes it. It is made of the files of checkpoints/STEP, by links where the file system has them,
so that it costs no writing, and stays when train.keep newer ones have removed that one. Its score lies within it and
comes back with it when a run goes on. A folder appears under its number when it is complete, and only then is the one
before removed: a process killed at any moment leaves one or the other. On a bucket, where nothing is linked or renamed,
its objects are copied there, and last the mark that makes a checkpoint complete; there a process that is killed while
it writes the number that is kept already, which only a run that went back does, leaves none. It has written the
checkpoint itself, and no row yet, so that the run, when it goes on, evaluates it again and keeps it.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
from typing import NamedTuple

import jax
from etils import epath

from blip_jax import buckets, checkpoint, lock
from blip_jax.console import say
from blip_jax.train import saving
from blip_jax.train.run import Run

SCORE = "score.json"  # in the checkpoint's folder


class Best(NamedTuple):
    """What is kept."""

    step: int
    score: float  # the sum of the numbers that the task's BEST names


def found(workdir) -> Best | None:
    """The best checkpoint that `workdir` keeps, None where there is none."""
    for step, folder in checkpoint.folders(buckets.of(workdir) / checkpoint.BEST).items():
        if not checkpoint.missing(folder) and (folder / SCORE).is_file():
            return Best(step, json.loads((folder / SCORE).read_text(encoding="utf-8"))["score"])
    return None


def keep(run: Run, step: int, result: dict) -> None:
    """Keeps checkpoint `step`, which is complete, if its evaluation `result` is better than that of the one kept.

    Process 0 does, whichever call it. Of equal ones the earlier stays.
    """
    if jax.process_index() != 0:
        return
    names = run.task.BEST
    if lacking := [name for name in names if not math.isfinite(result.get(name, math.nan))]:
        say(f"step {step}: not compared with the best, as the evaluation has no {' and no '.join(lacking)}")
        return
    score, before = sum(result[name] for name in names), found(run.workdir)
    what = f"{' + '.join(names)} {score:.4f}"
    if before and before.score >= score:
        say(f"step {step}: {what}; the best is still step {before.step} with {before.score:.4f}")
        return
    folder = run.workdir / checkpoint.BEST
    with saving.writing(run):
        _put(run.workdir, folder, step, {"score": score, "of": {name: result[name] for name in names}})
    say(f"step {step}: {what}, the best so far, kept in {folder}")


def _put(workdir: pathlib.Path | epath.Path, best: pathlib.Path | epath.Path, step: int, score: dict) -> None:
    """Makes checkpoint `step` of `workdir` the only one of `best`."""
    if buckets.is_bucket(best):
        return _put_on_bucket(workdir, best, step, score)
    parent = best / checkpoint.SUBDIR
    shutil.rmtree(parent / "next", ignore_errors=True)  # of a process that was killed
    parent.mkdir(parents=True, exist_ok=True)
    for path in (workdir / "config.json", *map(pathlib.Path, checkpoint.vocabularies(workdir))):
        if path.is_file():
            shutil.copy2(path, best / path.name)
    shutil.copytree(workdir / checkpoint.SUBDIR / str(step), parent / "next", copy_function=_link)
    (parent / "next" / SCORE).write_text(json.dumps(score) + "\n", encoding="utf-8")
    shutil.rmtree(parent / str(step), ignore_errors=True)  # of a run that went on from an earlier one
    (parent / "next").rename(parent / str(step))
    for path in parent.iterdir():
        if path.name != str(step):
            shutil.rmtree(path)


def _put_on_bucket(workdir: epath.Path, best: epath.Path, step: int, score: dict) -> None:
    """As `_put`."""
    parent, mark = best / checkpoint.SUBDIR, checkpoint.COMMITTED
    for path in (workdir / "config.json", *checkpoint.vocabularies(workdir)):
        if path.is_file():
            (best / path.name).write_bytes(path.read_bytes())
    buckets.remove(parent / str(step), mark)  # of a run that went on from an earlier one
    buckets.copy_within(workdir / checkpoint.SUBDIR / str(step), parent / str(step), but=mark)
    (parent / str(step) / SCORE).write_text(json.dumps(score) + "\n")
    (parent / str(step) / mark).write_text("")
    for path in parent.iterdir():
        if path.name != str(step):
            buckets.remove(path, mark)


def _link(source: str, target: str) -> None:
    """The same file under another name, or a copy where a file system has no links."""
    try:
        os.link(source, target)
    except OSError as e:
        if e.errno not in lock.NO_LINKS:
            raise
        shutil.copy2(source, target)
