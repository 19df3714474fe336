"""Means that stay on the device between logs, and where they are written: console, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import contextlib
import datetime
import json
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blip_jax import buckets


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


class Writer:
    """Appends rows to `workdir`/metrics.jsonl and `workdir`/tb; nothing where `write` is False (other processes)."""

    def __init__(self, workdir: pathlib.Path, write: bool, purge_step: int):
        self._file = open(buckets.staged(workdir / "metrics.jsonl"), "a", encoding="utf-8") if write else None
        # its thread dies of a full disk, and who puts something into a queue with a limit then waits for ever
        queue = {"purge_step": purge_step, "max_queue": 2**30}
        self._board = tensorboardX.SummaryWriter(str(buckets.staged(workdir / "tb")), **queue) if write else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file:
            with contextlib.suppress(OSError):  # `row` flushes, and says what it could not write
                self._file.close()
                self._board.close()

    def row(self, step: int, prefix: str, values: dict) -> None:
        """One row {"step": step, "time": UTC, prefix/name: value, ...}; numbers go to TensorBoard too."""
        if not self._file:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {"step": step, "time": now} | {f"{prefix}/{name}": value for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)
        self._board.flush()
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
