"""The training loss of any task on held-out examples, as a run's evaluations report it beside the task's scores.

Examples are those of `data.evaluation.HeldOut`, batches are of the size of the run's micro-batches, so that in-batch
negatives are as many as in training; the last one may be smaller, and has fewer. Nothing is dropped and nothing is
updated: a momentum encoder, queue and the weight of soft targets are those of the state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from blip_jax.console import say
from blip_jax.data.evaluation import HeldOut
from blip_jax.inference.batching import Runner
from blip_jax.tasks import step as steps
from blip_jax.train import kept


@dataclasses.dataclass
class Validation:
    """What a run measures its loss on."""

    data: HeldOut
    told: bool = False  # whether it was said how many examples there are

    def losses(self, cfg, mesh, epoch_steps: int, ahead: int, state) -> dict:
        """{"loss", "loss_itc", ...: means over the batches, weighted by their examples, and "loss_examples": how many}
        of a TrainState, which is only read; {} where no record can be an example, which is said once.

        All processes call it. Between two batches a signal ends it.
        """
        program, runner, size = _program(cfg, mesh, epoch_steps, ahead), Runner(mesh), cfg.train.batch
        size //= cfg.optim.accumulate
        unit = math.lcm(runner.unit, steps.batch_unit(cfg))

        def passes():
            first = 0
            for rows in self.data.whole(size, unit):
                n = len(next(iter(rows.values())))
                batch = {name: runner.put(_small(x), n) for name, x in rows.items()}
                yield n, program(state, batch, np.int32(first))
                first += n

        with jax.set_mesh(mesh):
            found = list(runner.fetched(passes()))
        if not self.told:
            self.told = True
            self._say([n for n, _ in found], size, unit)
        total = sum(n for n, _ in found)
        if not total:
            return {}
        means = {name: sum(n * float(values[name]) for n, values in found) / total for name in found[0][1]}
        return means | {"loss_examples": total}

    def _say(self, sizes: list[int], size: int, unit: int) -> None:
        drawn, total, counts = len(self.data), sum(sizes), self.data.counts()
        unusable = sum(counts["skipped"].values())
        why = [f"{n} as they are no examples to train on ({reason})" for reason, n in counts["skipped"].items()]
        if rest := drawn - total - unusable:
            why.append(f"{rest} that fill no batch, which is of a multiple of {unit}, and 2 at least")
        out = f"; left out: {', '.join(why)}" if why else ""
        if not total:
            say(f"eval/loss is not reported: none of {drawn} records of data.eval can be measured{out}")
            return
        last = f", the last of {sizes[-1]}" if sizes[-1] != sizes[0] else ""
        of = f"batches of {sizes[0]}{last}" if sizes[1:] else f"one batch of {sizes[0]}"
        fewer = f", where training has {size}" if sizes[0] != size else ""
        say(f"eval/loss is of {total} examples of data.eval, in {of}{fewer}{out}")


def _program(cfg, mesh, epoch_steps: int, ahead: int) -> Callable:
    make = lambda settings: jax.jit(steps.make_loss(settings, epoch_steps, ahead))
    return kept.of(cfg, make, "loss", mesh, epoch_steps, ahead)


def _small(x: np.ndarray) -> np.ndarray:
    """Of 64-bit image ids the low 32 bits, as in training."""
    return x.astype(np.int32) if x.dtype == np.int64 else x
