"""Means that stay on the device between logs, and where they are written: metrics.jsonl, TensorBoard and, if a run
asks for it, Weights & Biases."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import pathlib
import secrets
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blip_jax import buckets
from blip_jax.console import say

WANDB_ID = "wandb.txt"  # in a workdir: the name of its run at Weights & Biases


def tensorboard():
    """The module tensorboardX, imported without torch.

    It imports torch where that is installed, for which a run would wait some seconds, and of which scalars need
    nothing. A module that is None in sys.modules cannot be imported, and tensorboardX then does without; a test of the
    training loop says when that changes.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        import tensorboardX
    finally:
        if hidden:
            del sys.modules["torch"]
    return tensorboardX


tensorboardX = tensorboard()


def zeros(names) -> dict:
    """Empty running sums, f32[] each, with the count of steps and the place of the first that was not finite."""
    return {"sum": {name: jnp.float32(0) for name in sorted(names)}, "count": jnp.int32(0), "bad": jnp.int32(0)}


@jax.jit
def add(sums: dict, values: dict) -> dict:
    """`sums` plus one step's values, f32[] each. `bad` stays at the first step, from 1, with a value not finite."""
    count = sums["count"] + 1
    finite = jnp.all(jnp.stack([jnp.isfinite(v) for v in values.values()]))
    return {
        "sum": {name: sums["sum"][name] + values[name].astype(jnp.float32) for name in sums["sum"]},
        "count": count,
        "bad": jnp.where((sums["bad"] == 0) & ~finite, count, sums["bad"]),
    }


def fetch(sums: dict) -> dict:
    """Running sums as plain numbers, which JSON keeps exactly; waits for the device."""
    got = jax.device_get(sums)
    totals = {name: float(v) for name, v in got["sum"].items()}
    return {"sum": totals, "count": int(got["count"]), "bad": int(got["bad"])}


def load(numbers: dict) -> dict:
    """The inverse of `fetch`."""
    return {
        "sum": {name: jnp.float32(v) for name, v in numbers["sum"].items()},
        "count": jnp.int32(numbers["count"]),
        "bad": jnp.int32(numbers["bad"]),
    }


def means(numbers: dict) -> dict[str, float]:
    """Mean of every value over the steps of `fetch`'s numbers."""
    return {name: v / numbers["count"] for name, v in numbers["sum"].items()}


def drop_after(path: pathlib.Path, step: int) -> list[dict]:
    """Rows of a metrics.jsonl up to `step`, after removing later ones and a torn last line from the file atomically."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is not JSON: {line[:80]!r}; repair or remove it") from None
    kept = [row for row in rows if row["step"] <= step]
    buckets.write(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def check_wandb(project: str) -> None:
    """ValueError: `project`, of train.wandb, names none, or what sends rows to it is not installed."""
    if project.count("/") > 1 or not all(project.split("/")):
        raise ValueError(f"train.wandb is {project!r}: give PROJECT or ENTITY/PROJECT of Weights & Biases, or nothing")
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"train.wandb is {project!r}, and Weights & Biases needs wandb, which is not installed: pip install "
            "'blip-jax[wandb]', or set train.wandb=''; metrics.jsonl and tb/ have every row"
        )


class Wandb:
    """Rows for Weights & Biases: a workdir is one run there, however often it goes on.

    Steps that a killed process had logged and that are made again are sent again; they are the same, and each row has
    its step as a number, `step`, by which W&B draws all others. What goes wrong after the start is said once, and the
    training goes on without.
    """

    def __init__(self, project: str, workdir: pathlib.Path, settings: dict):
        """project: as `check_wandb` has it; settings: shown there as the run's. ValueError: it is not taken, as nobody
        is logged in, say."""
        import wandb

        entity, _, name = project.rpartition("/")
        file = workdir / WANDB_ID
        if not file.exists():
            buckets.write(file, secrets.token_hex(8) + "\n")
        place = {"project": name, "entity": entity or None, "id": file.read_text().strip(), "resume": "allow"}
        if not buckets.is_bucket(workdir):  # else where W&B itself would put its files
            place["dir"] = str(workdir)
        try:
            own = wandb.Settings(console="off")  # which prints what `say` does
            self._run = wandb.init(**place, name=workdir.name, config=settings, settings=own)
            self._run.define_metric("*", step_metric="step")
        except (wandb.Error, OSError) as e:
            raise ValueError(
                f"train.wandb is {project!r}, but Weights & Biases cannot be used: {_line(e)}; log in with "
                "`wandb login`, set WANDB_MODE=offline, which keeps the rows for `wandb sync`, or train.wandb=''"
            ) from e

    def row(self, row: dict[str, float]) -> None:
        self._trying(lambda: self._run.log(row))

    def close(self, failed: bool) -> None:
        self._trying(lambda: self._run.finish(exit_code=int(failed)))

    def _trying(self, what: Callable[[], None]) -> None:
        if self._run is None:
            return
        try:
            what()
        except Exception as e:  # whatever it is, of a service that is no part of the training
            self._run = None
            say(f"WARNING: Weights & Biases gets no more rows: {type(e).__name__}: {_line(e)}")


def _line(e: Exception) -> str:
    return " ".join(str(e).split())[:300]


class Writer:
    """Appends rows to `workdir`/metrics.jsonl and `workdir`/tb, and sends them to `wandb`, where there is one; nothing
    where `write` is False (other processes)."""

    def __init__(self, workdir: pathlib.Path, write: bool, purge_step: int, wandb: Wandb | None = None):
        self._wandb = wandb
        self._file = open(buckets.staged(workdir / "metrics.jsonl"), "a", encoding="utf-8") if write else None
        # its thread dies of a full disk, and who puts something into a queue with a limit then waits for ever
        queue = {"purge_step": purge_step, "max_queue": 2**30}
        self._board = tensorboardX.SummaryWriter(str(buckets.staged(workdir / "tb")), **queue) if write else None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self._file:
            with contextlib.suppress(OSError):  # `row` flushes, and says what it could not write
                self._file.close()
                self._board.close()
        if self._wandb:
            self._wandb.close(failed=kind is not None)

    def row(self, step: int, prefix: str, values: dict) -> None:
        """One row {"step": step, "time": UTC, prefix/name: value, ...}; numbers go to TensorBoard and W&B, too."""
        if not self._file:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {"step": step, "time": now} | {f"{prefix}/{name}": value for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        for name in numbers.keys() - {"step"}:
            self._board.add_scalar(name, numbers[name], step)
        self._board.flush()
        if self._wandb:
            self._wandb.row(numbers)
        buckets.sync(every=buckets.EVERY)


class Speed(NamedTuple):
    """Since the last log, without pauses."""

    steps: float  # per second
    waiting: float  # share of the time in which a step waited for its batch
    flops: float  # per second, of all devices
    goodput: float  # share of all time since the loop began that went into steps, the rest into what `Clock` leaves out


class Clock:
    """How fast steps are, without the first step, which compiles, and pauses."""

    def __init__(self):
        self._since: float | None = None  # running since then; None: before the first step is done
        self._steps, self._spent, self._waited, self._flops = 0, 0.0, 0.0, 0.0
        self._began, self._useful = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def paused(self):
        """Time inside does not count."""
        if self._since is not None:
            self._spent += time.perf_counter() - self._since
        yield
        if self._since is not None:
            self._since = time.perf_counter()

    def step(self, waited: float, flops: float = 0.0) -> None:
        """One more step of so many FLOPs, which waited so many seconds for its batch."""
        if self._since is None:
            self._since = time.perf_counter()
        else:
            self._steps, self._waited, self._flops = self._steps + 1, self._waited + waited, self._flops + flops

    def take(self) -> Speed | None:
        """Since the last call; None if no step was counted."""
        if not self._steps:
            return None
        now = time.perf_counter()
        spent = max(self._spent + now - self._since, 1e-9)
        self._useful += spent
        share = self._useful / max(now - self._began, self._useful)
        out = Speed(self._steps / spent, self._waited / spent, self._flops / spent, share)
        self._since, self._steps, self._spent, self._waited, self._flops = now, 0, 0.0, 0.0, 0.0
        return out
