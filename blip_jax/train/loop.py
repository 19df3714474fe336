"""The training loop. `fit` is the only one: every task runs through it, and running it again resumes.

Order: maybe save, maybe evaluate, next batch, step, maybe log. So an evaluation that is stopped or fails costs nothing
but itself. The number of steps done, with the `Order` of the examples since the batch last changed, is the whole data
position; a checkpoint is the state, these and the running sums of the current log interval.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pathlib
import time
import zlib
from collections.abc import Callable

import jax
import numpy as np

from blip_jax import buckets, checkpoint, lock, tasks
from blip_jax.console import plain, say
from blip_jax.data.order import Order
from blip_jax.inference.load import Loaded
from blip_jax.parallel import processes, sharding
from blip_jax.parallel.interrupt import Interrupt, Stopped
from blip_jax.plan.chips import peak_flops
from blip_jax.tasks import step as steps
from blip_jax.train import best, kept, metrics, saving, start
from blip_jax.train.profile import FOLDER, Profile, Steps
from blip_jax.train.run import At, Run, prepare
from blip_jax.train.summary import bucket_report, describe, ending

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the system says of a disk that takes no more


def fit(cfg, workdir, profile: Steps | None = None) -> dict:
    """Trains `cfg` to `cfg.train.steps` in the folder `workdir`, resuming from its newest checkpoint if there is one.

    profile: steps to record into `workdir`/profile.

    Writes checkpoints/, best/, metrics.jsonl, tb/, config.json, start.txt, skipped.jsonl and a copy of the vocabulary,
    and with train.wandb wandb/ and wandb.txt.
    SIGTERM, or SIGINT once, finishes the step, saves and returns; an evaluation ends after its batch and is made again
    later. Returns {"step", "stopped", "log": last row, "eval": last evaluation}; step 0 where it was stopped before it
    began.
    ValueError: the config, the data or the checkpoint in `workdir` do not fit, or another run holds it; raised before
    anything compiles. NonFiniteLoss: the step is named and the last good checkpoint is kept. OSError: a checkpoint or a
    log cannot be written.
    """
    workdir = buckets.of(workdir, "workdir")
    try:
        return _fit(cfg, workdir, profile)
    except Stopped:
        if jax.process_count() > 1:
            raise  # this process alone, which the others may wait for: they end with it
        say("stopped by a signal before the first step; run the same command again")
        return {"step": 0, "stopped": True}
    except OSError as e:
        if e.errno not in FULL:
            raise
        what = f"writing in {workdir} failed: {os.strerror(e.errno)}"
        raise OSError(f"{what}; make room, then {saving.go_on(workdir)}") from e


def _fit(cfg, workdir, profile: Steps | None) -> dict:
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Interrupt(agree=processes.stops))
        stack.enter_context(processes.remedy(lambda: saving.go_on(workdir)))
        stack.enter_context(processes.holding(lock.held(workdir)))
        stack.callback(buckets.settle)
        run = prepare(cfg, workdir)
        stack.enter_context(jax.set_mesh(run.mesh))
        newest = _newest(run.workdir)
        manager = checkpoint.open_dir(run.workdir, cfg.train.keep, cfg.train.keep_every)
        stack.callback(saving.closed, run, manager)
        if newest is None:
            found = start.located(run)
            loaded = start.load(run, found)
        else:
            before = start.check_resume(manager, newest, run)
            order = start.order(run, newest, before)
            run = run.counting(order)
            frozen = start.load_frozen(run, newest)
        describe(run, newest)
        if newest is None:
            state = start.create(run, loaded)
            at = At(0, 0, None, Order(), frozenset(), start.reference(run, state, found))
        else:
            state, saved = checkpoint.restore(manager, newest, run.shapes.stored, run.shardings.stored)
            state = start.aligned(run, state.replace(frozen=start.placed(frozen.params, run.shardings.frozen)))
            crc = saved["crc"] if jax.process_index() == 0 else 0
            at = At(newest, crc, saved["sums"], order, frozenset(), frozen.reference)
        evaluated = []
        if jax.process_index() == 0:
            rows = metrics.drop_after(run.workdir / "metrics.jsonl", at.step)
            evaluated = [r["step"] for r in rows if any(n.startswith("eval/") for n in r)]
        at = at._replace(evaluated=frozenset(processes.gather(evaluated)[0]))  # all take part in an evaluation or none
        writes, wandb = jax.process_index() == 0, None
        if writes and cfg.train.wandb:
            wandb = metrics.Wandb(cfg.train.wandb, run.workdir, plain(cfg))
        writer = stack.enter_context(metrics.Writer(run.workdir, writes, at.step + 1, wandb))
        stop.then = "finishing this step, then saving"
        trace = stack.enter_context(Profile(profile, buckets.staged(run.workdir / FOLDER)))
        return _loop(run, state, at, manager, writer, stop, trace)


def _newest(workdir: pathlib.Path) -> int | None:
    """The checkpoint to go on from, as process 0 sees it; says what else is in the folder. ValueError: it is
    incomplete."""
    newest, notes = checkpoint.check_folders(workdir)
    for note in notes:
        say(note)
    return processes.gather(newest)[0]


def _loop(run: Run, state, at: At, manager, writer: metrics.Writer, stop: Interrupt, trace: Profile) -> dict:
    cfg, every, last = run.cfg, run.cfg.train, run.cfg.train.steps
    step_fn = _step(run, at.order.ahead(run.epoch_steps))
    batches, compiled = run.data.batches(at.step, at.order), set()
    sums, step, crc = at.sums and metrics.load(at.sums), at.step, at.crc
    flops = functools.cache(lambda T: run.task.flops(cfg, T=T)["step"] * every.batch)
    out, clock, ahead = {}, metrics.Clock(), None
    with contextlib.closing(batches):
        if cfg.text.buckets and at.step < last:
            say(bucket_report(run, at.step, at.order, batches.text_shares(at.step)))
        while True:
            stopping = stop.here()
            due = step > 0 and (step >= last or every.eval_every > 0 and step % every.eval_every == 0)
            pending = due and run.evaluates and step not in at.evaluated
            if step > at.step and (step >= last or step % every.save_every == 0 or pending or stopping):
                with clock.paused():
                    saving.save(run, manager, step, state, sums, crc, at)
            if pending and not stopping:
                with clock.paused(), stop.deferred(f"ending this evaluation, of step {step}, which is saved"):
                    saving.written(run, manager)  # before memory is filled, and before hours go by
                    try:
                        out["eval"] = _evaluate(run, at, step, state, sums)
                        if every.keep_best:  # before the row: who is killed here evaluates again
                            best.keep(run, step, out["eval"])
                        writer.row(step, "eval", out["eval"])
                        pending = False
                    except Stopped:
                        stopping = True
            if step >= last or stopping:
                break
            asked = time.perf_counter()
            local = next(batches)
            waited = time.perf_counter() - asked
            crc += _checksum(run, at.order.examples(step, cfg.train.batch), local["key"])
            batch = to_devices(local, run.mesh, cfg.optim.accumulate, run.rows, cfg.train.batch // cfg.optim.accumulate)
            T, compiling = local["ids"].shape[1] if cfg.text.buckets else None, contextlib.nullcontext()
            if T and T not in compiled:
                say(f"step {step + 1}: compiling the step for texts of {T} positions")
                compiled.add(T)
                compiling = clock.paused()
            trace.before(step + 1)
            with jax.transfer_guard("disallow"), compiling:
                state, values = step_fn(state, batch)
            jax.block_until_ready(ahead or values)  # at most one step is in flight while the next batch is fetched
            sums, ahead = metrics.add(metrics.zeros(values) if sums is None else sums, values), values
            step += 1
            trace.after(step, values)
            clock.step(waited, flops(T))
            if step == at.step + 1:
                say(f"step {step}: the first one is done, after {time.perf_counter() - asked:.0f} s")
            if step % every.log_every == 0 or step >= last:
                with saving.writing(run):
                    manager.check_for_errors()  # of a save that is under way
                out["log"] = _log(run, writer, step, sums, crc, clock, at.order)
                sums = None
    saving.written(run, manager)
    if at.step < step:
        saving.reopen(run, step, thoroughly=step >= last)
    stopped = stopping and (step < last or pending)
    say(ending(stopped, step, last, manager.latest_step(), run.workdir / checkpoint.SUBDIR, run.data.counts()))
    return {"step": step, "stopped": stopped, **out}


def _step(run: Run, ahead: int) -> Callable:
    """The jitted step of a run, for every run of this process that has its settings."""

    def make(settings):
        step = steps.make_step(settings, run.model, run.tx, run.epoch_steps, ahead=ahead)
        return jax.jit(step, **steps.jit_arguments(run.shardings, run.mesh))

    return kept.of(run.cfg, make, "step", run.mesh, run.epoch_steps, ahead)


def to_devices(local: dict, mesh, accumulate: int, rows: np.ndarray, micro: int) -> dict:
    """This process's `rows` of a batch as global arrays, [micro, ...] or [A, micro, ...] for A > 1 micro-batches.

    Of 64-bit image ids the low 32 bits stay.
    """
    place, axis = sharding.batch_sharding(mesh, accumulate), int(accumulate > 1)

    def put(x):
        x = x.astype(np.int32) if x.dtype == np.int64 else x
        x = x.reshape(accumulate, -1, *x.shape[1:]) if accumulate > 1 else x

        def part(index):  # of one device, whose rows follow each other
            at = np.searchsorted(rows, index[axis].indices(micro)[:2])
            return x[(slice(None),) * axis + (slice(*at),)]

        return jax.make_array_from_callback((*x.shape[:axis], micro, *x.shape[axis + 1 :]), place, part)

    return {name: put(x) for name, x in local.items() if name != "key"}


def _checksum(run: Run, seen: int, keys: list[str]) -> int:
    """Sum of crc32("number key") over the examples of a batch that no process before this one makes, by number in the
    order in which they are seen; seen: how many were before this batch.

    The sums of all processes add up to the same for any number of them.
    """
    micro = run.cfg.train.batch // run.cfg.optim.accumulate
    at = (seen + np.arange(run.cfg.optim.accumulate)[:, None] * micro + run.rows).ravel()
    own = np.tile(run.first, run.cfg.optim.accumulate)
    return sum(
        zlib.crc32(f"{i} {key}".encode(errors="backslashreplace")) for i, key, counts in zip(at, keys, own) if counts
    )


def _log(run: Run, writer, step: int, sums: dict, crc: int, clock: metrics.Clock, order: Order) -> dict:
    """Writes and returns the means since the last log. NonFiniteLoss: one of these steps had a value not finite."""
    numbers = saving.finite(run, step, sums)
    row = {
        **metrics.means(numbers),
        "lr": float(run.lr(step - 1)),
        "epoch": order.epochs(step, run.epoch_steps),
        "examples": order.examples(step, run.cfg.train.batch),
        "examples_crc": saving.total(crc),
    }
    timing, measured = "", clock.take()
    if measured:
        left = (run.cfg.train.steps - step) / measured.steps
        row |= {"examples_per_s": measured.steps * run.cfg.train.batch, "waiting": measured.waiting}
        row |= {"goodput": measured.goodput, "tflops_per_device": measured.flops / run.mesh.size / 1e12}
        if peak := peak_flops(jax.devices()[0].device_kind):
            row["mfu"] = measured.flops / (run.mesh.size * peak)
        timing = (
            f"  {row['examples_per_s']:.1f} examples/s  eta {int(left // 3600)}:{int(left % 3600 // 60):02}:"
            f"{int(left % 60):02}  waiting {100 * measured.waiting:.0f} %"
        ) + (f"  MFU {100 * row['mfu']:.1f} %" if peak else "")
    writer.row(step, "train", row)
    losses = "  ".join(f"{name} {row[name]:.4f}" for name in sorted(numbers["sum"], key=lambda n: ("loss" not in n, n)))
    say(f"step {step}/{run.cfg.train.steps}  {losses}  lr {row['lr']:.3e}{timing}")
    return row


def _evaluate(run: Run, at: At, step: int, state, sums: dict | None) -> dict:
    """The task's scores, and its loss on held-out examples; a score of such a name, of a task of one's own, stays."""
    saving.finite(run, step, sums)
    scores, losses = {}, {}
    if run.eval_data:
        loaded = Loaded(run.model, state.all_params, run.cfg, run.tokenizer, f"step {step}")
        scores = tasks.numbers(getattr(run.task, "curve", run.task.evaluate)(loaded, run.eval_data, run.mesh))
    if run.validation:
        ahead = at.order.ahead(run.epoch_steps)
        losses = run.validation.losses(run.cfg, run.mesh, run.epoch_steps, ahead, state)
    result = scores | {name: value for name, value in losses.items() if name not in scores}
    say(f"{run.cfg.objective}: " + "  ".join(f"{name} {_number(value)}" for name, value in result.items()))
    return result


def _number(value: float) -> str:
    """With two places, or four where it is a fraction, as those of captions are."""
    return f"{value:.4f}" if 0 < abs(value) < 1 else f"{value:.2f}"
