"""Checkpoints of a run: written beside its steps, looked at again, and the values that forbid them."""

from __future__ import annotations

import contextlib
import pathlib

import jax

from blip_jax import buckets, checkpoint
from blip_jax.console import plain, revision, say
from blip_jax.parallel import processes
from blip_jax.train import metrics
from blip_jax.train.run import At, Run


class NonFiniteLoss(RuntimeError):
    """A loss or gradient became infinite or not a number; the message names the step and what remains."""


def save(run: Run, manager, step: int, state, sums: dict | None, crc: int, at: At) -> None:
    """Begins to write checkpoint `step`: the state, where the data stand, and the sums of the current log interval."""
    numbers = finite(run, step, sums)
    data = {"step": step, "crc": total(crc), "sums": numbers, "revision": revision()}
    data |= {
        "order": at.order._asdict(),
        "examples": at.order.examples(step, run.cfg.train.batch),
        "epoch": at.order.epochs(step, run.epoch_steps),
    }
    data |= {"frozen": at.frozen} if at.frozen else {}
    with writing(run):
        buckets.sync()  # first: rows that a checkpoint is of are not made again
        checkpoint.save(manager, step, state.stored, data, plain(run.cfg))
    say(f"step {step}: saving checkpoint")


@contextlib.contextmanager
def writing(run: Run):
    """OSError, in one line, for anything that goes wrong while checkpoints are written."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as e:  # tensorstore's are ValueErrors
        folder = run.workdir / checkpoint.SUBDIR
        raise OSError(
            f"writing a checkpoint in {folder} failed: {checkpoint.short(e)}; make room, then {go_on(run.workdir)}"
        ) from e


def closed(run: Run, manager) -> None:
    """Closes the checkpoints, which waits for those begun."""
    with writing(run):
        manager.close()


def written(run: Run, manager) -> None:
    """Waits until the checkpoints begun are complete."""
    with writing(run):
        manager.wait_until_finished()


def finite(run: Run, step: int, sums: dict | None) -> dict | None:
    """The running sums as plain numbers, None if there are none. NonFiniteLoss: a value among them was not finite."""
    numbers = None if sums is None else metrics.fetch(sums)
    if numbers and numbers["bad"]:
        bad = step - numbers["count"] + numbers["bad"]
        newest = checkpoint.newest_complete(run.workdir)
        saved = (
            f"nothing after it was saved, checkpoint {newest} in {run.workdir / checkpoint.SUBDIR} is of before it"
            if newest is not None
            else "nothing was saved yet"
        )
        again = "run again to resume from it" if newest is not None else "run again to begin anew"
        raise NonFiniteLoss(
            f"step {bad}: a loss or the gradient norm is not finite; {saved}; lower optim.lr, set optim.clip, or use "
            f"model.dtype=float32, and {again}"
        )
    return numbers


def reopen(run: Run, step: int, thoroughly: bool) -> None:
    """checkpoint.Damaged: checkpoint `step`, just saved, is not there or cannot be read back as it was saved.

    thoroughly: read all of it, each process a share; else, where a signal leaves little time, only look that it is
    there: restoring it will verify it.
    """
    folder, own, count = run.workdir / checkpoint.SUBDIR / str(step), jax.process_index(), jax.process_count()
    lost = [f"{name} is missing" for name in checkpoint.missing(folder)]
    found = checkpoint.damage(folder, own, count) if thoroughly else lost
    if every := sorted({line for part in processes.gather(found) for line in part}):
        raise checkpoint.Damaged(folder, every)


def total(crc: int) -> int:
    """The checksum of the examples seen by all processes, 32 bits."""
    return sum(processes.gather(crc)) % 2**32


def go_on(workdir: pathlib.Path) -> str:
    """What to do when another process is gone."""
    newest = checkpoint.newest_complete(workdir)
    what = "begin anew, as there is no checkpoint yet" if newest is None else f"go on from checkpoint {newest}"
    return f"run the same command again to {what} in {workdir}"
