"""The training loop. `fit` is the only one: every task runs through it, and running it again resumes.

Order: maybe save, maybe evaluate, next batch, step, maybe log. So an evaluation that is stopped or fails costs nothing
but itself. The number of steps done, with the `Order` of the examples since the batch last changed, is the whole data
position; a checkpoint is the state, these and the running sums of the current log interval.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import time
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from blip_jax import checkpoint, lock, tasks, trees
from blip_jax.console import plain, revision, say
from blip_jax.convert import read
from blip_jax.data.batches import TrainData
from blip_jax.data.order import Order
from blip_jax.data.source import expand
from blip_jax.data.text import tokenizers
from blip_jax.inference.batching import placed
from blip_jax.inference.load import Loaded, read_for
from blip_jax.models import initial
from blip_jax.parallel import processes, sharding
from blip_jax.parallel.interrupt import Interrupt, Stopped
from blip_jax.tasks import step as steps
from blip_jax.train import kept, metrics, optim, start
from blip_jax.train import state as train_state
from blip_jax.train.summary import bucket_report, describe, ending

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the system says of a disk that takes no more


class NonFiniteLoss(RuntimeError):
    """A loss or gradient became infinite or not a number; the message names the step and what remains."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that stays the same while a run trains."""

    cfg: ConfigDict
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    task: ModuleType  # of blip_jax.tasks: model, rows, loss, evaluation
    tokenizer: Any  # of data.text, of the config's kind

    model: Any  # of blip_jax.models
    tx: optax.GradientTransformation
    lr: Callable  # step -> f32[]
    epoch_steps: int
    shapes: train_state.TrainState  # with ShapeDtypeStruct leaves
    shardings: train_state.TrainState  # with Sharding leaves

    data: TrainData
    eval_data: Any | None  # what task.evaluate reads; None: nothing is evaluated
    rows: np.ndarray  # positions in a micro-batch that this process makes, i64
    first: np.ndarray  # whether it is the first process that does, bool

    def counting(self, order: Order) -> Run:
        """The run with the epochs that have passed as `order` counts them."""
        tx, lr = optim.make(self.cfg, self.epoch_steps, order.ahead(self.epoch_steps))
        return dataclasses.replace(self, tx=tx, lr=lr)


class At(NamedTuple):
    """Where a run stands when the loop begins: a checkpoint's data entry, and what the log already holds."""

    step: int  # steps done
    crc: int  # this process's part of the checksum of the examples seen
    sums: dict | None  # running sums of the log interval; None: empty
    order: Order  # the examples, since the batch last changed
    evaluated: frozenset[int]  # steps with an evaluation row
    frozen: dict | None  # how checkpoints refer to the frozen parameters, which they do not hold


def fit(cfg, workdir) -> dict:
    """Trains `cfg` to `cfg.train.steps` in the folder `workdir`, resuming from its newest checkpoint if there is one.

    Writes checkpoints/, metrics.jsonl, tb/, config.json, start.txt, skipped.jsonl and a copy of the vocabulary.
    SIGTERM, or SIGINT once, finishes the step, saves and returns; an evaluation ends after its batch and is made again
    later. Returns {"step", "stopped", "log": last row, "eval": last evaluation}; step 0 where it was stopped before it
    began.
    ValueError: the config, the data or the checkpoint in `workdir` do not fit, or another run holds it; raised before
    anything compiles. NonFiniteLoss: the step is named and the last good checkpoint is kept. OSError: a checkpoint or a
    log cannot be written.
    """
    try:
        return _fit(cfg, workdir)
    except Stopped:
        if jax.process_count() > 1:
            raise  # this process alone, which the others may wait for: they end with it
        say("stopped by a signal before the first step; run the same command again")
        return {"step": 0, "stopped": True}
    except OSError as e:
        if e.errno not in FULL:
            raise
        what = f"writing in {workdir} failed: {os.strerror(e.errno)}"
        raise OSError(f"{what}; make room, then {_go_on(pathlib.Path(workdir))}") from e


def _fit(cfg, workdir) -> dict:
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Interrupt(agree=processes.stops))
        stack.enter_context(processes.remedy(lambda: _go_on(pathlib.Path(workdir))))
        stack.enter_context(processes.holding(lock.held(workdir)))
        run = prepare(cfg, workdir)
        stack.enter_context(jax.set_mesh(run.mesh))
        newest = _newest(run.workdir)
        manager = checkpoint.open_dir(run.workdir, cfg.train.keep)
        stack.callback(_closed, run, manager)
        if newest is None:
            found = start.located(run)
            loaded = start.load(run, found)
        else:
            before = check_resume(manager, newest, run)
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
        writer = stack.enter_context(metrics.Writer(run.workdir, jax.process_index() == 0, at.step + 1))
        stop.then = "finishing this step, then saving"
        return _loop(run, state, at, manager, writer, stop)


def _newest(workdir: pathlib.Path) -> int | None:
    """The checkpoint to go on from, as process 0 sees it; says what else is in the folder. ValueError: it is
    incomplete."""
    newest, notes = checkpoint.check_folders(workdir)
    for note in notes:
        say(note)
    return processes.gather(newest)[0]


def _loop(run: Run, state, at: At, manager, writer: metrics.Writer, stop: Interrupt) -> dict:
    cfg, every, last = run.cfg, run.cfg.train, run.cfg.train.steps
    step_fn = _step(run, at.order.ahead(run.epoch_steps))
    batches, compiled = run.data.batches(at.step, at.order), set()
    sums, step, crc = at.sums and metrics.load(at.sums), at.step, at.crc
    out, clock, ahead = {}, metrics.Clock(), None
    with contextlib.closing(batches):
        if cfg.text.buckets and at.step < last:
            say(bucket_report(run, at.step, at.order, batches.text_shares(at.step)))
        while True:
            stopping = stop.here()
            due = step > 0 and (step >= last or every.eval_every > 0 and step % every.eval_every == 0)
            pending = due and bool(run.eval_data) and step not in at.evaluated
            if step > at.step and (step >= last or step % every.save_every == 0 or pending or stopping):
                with clock.paused():
                    _save(run, manager, step, state, sums, crc, at)
            if pending and not stopping:
                with clock.paused(), stop.deferred(f"ending this evaluation, of step {step}, which is saved"):
                    _written(run, manager)  # before memory is filled, and before hours go by
                    try:
                        out["eval"] = _evaluate(run, step, state, sums)
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
            T, compiling = local["ids"].shape[1], contextlib.nullcontext()
            if cfg.text.buckets and T not in compiled:
                say(f"step {step + 1}: compiling the step for texts of {T} positions")
                compiled.add(T)
                compiling = clock.paused()
            with jax.transfer_guard("disallow"), compiling:
                state, values = step_fn(state, batch)
            jax.block_until_ready(ahead or values)  # at most one step is in flight while the next batch is fetched
            sums, ahead = metrics.add(metrics.zeros(values) if sums is None else sums, values), values
            step += 1
            clock.step(waited)
            if step == at.step + 1:
                say(f"step {step}: the first one is done, after {time.perf_counter() - asked:.0f} s")
            if step % every.log_every == 0 or step >= last:
                with _writing(run):
                    manager.check_for_errors()  # of a save that is under way
                out["log"] = _log(run, writer, step, sums, crc, clock, at.order)
                sums = None
    _written(run, manager)
    if at.step < step:
        _reopen(run, step, thoroughly=step >= last)
    stopped = stopping and (step < last or pending)
    say(ending(stopped, step, last, manager.latest_step(), run.workdir / checkpoint.SUBDIR, run.data.counts()))
    return {"step": step, "stopped": stopped, **out}


def _step(run: Run, ahead: int) -> Callable:
    """The jitted step of a run, for every run of this process that has its settings."""

    def make(settings):
        step = steps.make_step(settings, run.model, run.tx, run.epoch_steps, ahead=ahead)
        return jax.jit(step, **steps.jit_arguments(run.shardings, run.mesh))

    return kept.of(run.cfg, make, "step", run.mesh, run.epoch_steps, ahead)


def _reopen(run: Run, step: int, thoroughly: bool) -> None:
    """checkpoint.Damaged: checkpoint `step`, just saved, is not there or cannot be read back as it was saved.

    thoroughly: read all of it, each process a share; else, where a signal leaves little time, only look that it is
    there: restoring it will verify it.
    """
    folder, own, count = run.workdir / checkpoint.SUBDIR / str(step), jax.process_index(), jax.process_count()
    lost = [f"{name} is missing" for name in checkpoint.missing(folder)]
    found = checkpoint.damage(folder, own, count) if thoroughly else lost
    if every := sorted({line for part in processes.gather(found) for line in part}):
        raise checkpoint.Damaged(folder, every)


def prepare(cfg, workdir) -> Run:
    """Everything that can fail on account of the config, the data or the sizes, without compiling or allocating."""
    tasks.validate(cfg, None, jax.process_count(), jax.device_count())
    tokenizer = _files(cfg)
    tasks.validate(cfg, tokenizer, jax.process_count(), jax.device_count())
    workdir = pathlib.Path(workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    for name, own in tokenizers.parts(tokenizer).items():
        _keep_vocabulary(own, workdir, name)
    mesh, task = sharding.make_mesh(cfg.mesh), tasks.of(cfg)
    rows, first = sharding.rows(mesh, cfg.train.batch // cfg.optim.accumulate)
    data = TrainData(
        cfg,
        tokenizer,
        task,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        rows=rows,
        skipped_path=workdir / f"skipped{_suffix()}.jsonl",
    )
    eval_data = None
    if len(cfg.data.eval):
        eval_data = task.eval_data(cfg, tokenizer, workdir / f"skipped-eval{_suffix()}.jsonl")
    processes.agree(
        cfg, workdir, vocabulary=tokenizer.crc, records={name: len(source) for name, source in data.sources.items()}
    )
    epoch_steps = data.epoch_examples // cfg.train.batch
    if epoch_steps == 0:
        raise ValueError(
            f"an epoch has {data.epoch_examples} examples, fewer than train.batch = {cfg.train.batch}: "
            "lower train.batch, or set data.epoch_examples to what the schedule should call an epoch"
        )
    model = task.build(cfg)
    tx, lr = optim.make(cfg, epoch_steps)
    fresh = lambda settings: jax.eval_shape(lambda: train_state.create(settings, model, tx, jax.random.key(cfg.seed)))
    shapes = kept.of(cfg, fresh, "shapes")
    shardings = sharding.shardings_for(shapes, mesh)
    optim.factors(shapes.params, cfg.optim.lr_factors)  # wrong ones are found now, not when the step compiles
    return Run(
        cfg=cfg,
        workdir=workdir,
        mesh=mesh,
        task=task,
        tokenizer=tokenizer,
        model=model,
        tx=tx,
        lr=lr,
        epoch_steps=epoch_steps,
        shapes=shapes,
        shardings=shardings,
        data=data,
        eval_data=eval_data,
        rows=rows,
        first=first,
    )


def _files(cfg):
    """The tokenizer of a config. ValueError: every file that is missing, of vocabulary and data, before any is read."""
    problems, tokenizer = [], None
    try:
        tokenizer = tokenizers.of_config(cfg)
    except ValueError as e:
        problems.append(str(e))
    for name, source in (*cfg.data.train.items(), *cfg.data.eval.items()):
        try:
            if isinstance(source, ConfigDict) and source.kind not in ("tfds", "scenes"):
                expand(name, source)
        except ValueError as e:
            problems.append(str(e))
    if problems:
        several = f"{len(problems)} things that the config names cannot be had:\n  " if problems[1:] else ""
        raise ValueError(several + "\n  ".join(problems))
    return tokenizer


def _suffix() -> str:
    """What the names of files that each process writes for itself end in."""
    return f"-p{jax.process_index()}" if jax.process_index() else ""


def _go_on(workdir: pathlib.Path) -> str:
    """What to do when another process is gone."""
    newest = checkpoint.newest_complete(workdir)
    what = "begin anew, as there is no checkpoint yet" if newest is None else f"go on from checkpoint {newest}"
    return f"run the same command again to {what} in {workdir}"


def evaluate(cfg, workdir, path="") -> dict:
    """What the task measures on `cfg.data.eval` with the newest checkpoint of `workdir`, or with `path`.

    path: a workdir, a checkpoint folder, a .pth, a Hugging Face folder or a name on its hub, whose parameters are
    fitted to cfg.model. The numbers go to `workdir`/evaluation.json with the checkpoint's name.
    ValueError: no checkpoint, another model's or vocabulary's, no evaluation source.
    """
    if not len(cfg.data.eval):
        raise ValueError("data.eval is empty: add a source to the config, c.data.eval.name = source(kind, path)")
    origin = read.locate(path) if path else checkpoint.newest(workdir)
    tokenizer = tokenizers.of_config(cfg)
    tasks.validate(cfg, tokenizer, jax.process_count(), jax.device_count())
    workdir = pathlib.Path(workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    mesh, task = sharding.make_mesh(cfg.mesh), tasks.of(cfg)
    model = task.build(cfg)
    shapes = jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(cfg.seed)))
    data = task.eval_data(cfg, tokenizer, workdir / f"skipped-eval{_suffix()}.jsonl")
    processes.agree(cfg, workdir, vocabulary=tokenizer.crc, checkpoint=origin.name, examples=len(data))
    params = start.fit_params(read_for(cfg, origin).state["params"], shapes, str(origin))
    say(f"evaluating {origin} on {len(data)} examples")
    params = placed(params, mesh, cfg.model.dtype)
    result = task.evaluate(Loaded(model, params, cfg, tokenizer, str(origin)), data, mesh)
    _write_result(workdir, task, cfg, result, str(origin))
    return result


def _write_result(workdir: pathlib.Path, task, cfg, result: dict, checkpoint: str) -> None:
    """evaluation.json with the numbers, predictions.json, and what a server wants, as far as the task has them."""
    if jax.process_index() != 0:
        return
    numbers = {"checkpoint": checkpoint} | {name: value for name, value in result.items() if name != "predictions"}
    files = [("evaluation.json", json.dumps(numbers, indent=1) + "\n")]
    if "predictions" in result:
        files.append(("predictions.json", json.dumps(result["predictions"], indent=1) + "\n"))
    if hasattr(task, "submission"):
        try:
            files.append(task.submission(result, cfg))
        except ValueError as e:
            say(f"nothing is written for a server: {e}")
    for name, text in files:  # whole or not at all
        beside = workdir / f"{name}.tmp"
        beside.write_text(text, encoding="utf-8")
        beside.replace(workdir / name)


def check_resume(manager, step: int, run: Run) -> dict:
    """Says which settings changed since checkpoint `step`; returns those that wrote it, by path. ValueError: they
    changed the model or the optimiser."""
    folder = run.workdir / checkpoint.SUBDIR / str(step)
    before, now = trees.flat(checkpoint.load_config(folder)), trees.flat(plain(run.cfg))
    changed = [
        f"{name}: {before.get(name, 'absent')!r} -> {now.get(name, 'absent')!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    try:
        reference = checkpoint.load_data(folder).get("frozen") or {"leaves": {}}
        elsewhere = {f"frozen/{path}": tuple(leaf["shape"]) for path, leaf in reference["leaves"].items()}
        checkpoint.check_same(manager, step, run.shapes, elsewhere)
    except checkpoint.Damaged:
        raise
    except ValueError as e:
        listing = "\n  ".join(changed) or "none"
        raise ValueError(f"{e}\nsettings that changed since it was written:\n  {listing}") from None
    say(f"resuming from checkpoint {step}; settings changed since: {'; '.join(changed) or 'none'}")
    return before


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
    return sum(zlib.crc32(f"{i} {key}".encode()) for i, key, counts in zip(at, keys, own) if counts)


def _total(crc: int) -> int:
    """The checksum of the examples seen by all processes, 32 bits."""
    return sum(processes.gather(crc)) % 2**32


def _log(run: Run, writer, step: int, sums: dict, crc: int, clock: metrics.Clock, order: Order) -> dict:
    """Writes and returns the means since the last log. NonFiniteLoss: one of these steps had a value not finite."""
    numbers = _finite(run, step, sums)
    row = {
        **metrics.means(numbers),
        "lr": float(run.lr(step - 1)),
        "epoch": order.epochs(step, run.epoch_steps),
        "examples": order.examples(step, run.cfg.train.batch),
        "examples_crc": _total(crc),
    }
    timing, measured = "", clock.take()
    if measured:
        rate, waiting = measured
        left = (run.cfg.train.steps - step) / rate
        row |= {"examples_per_s": rate * run.cfg.train.batch, "waiting": waiting}
        timing = (
            f"  {row['examples_per_s']:.1f} examples/s  eta {int(left // 3600)}:{int(left % 3600 // 60):02}:"
            f"{int(left % 60):02}  waiting {100 * waiting:.0f} %"
        )
    writer.row(step, "train", row)
    losses = "  ".join(f"{name} {row[name]:.4f}" for name in sorted(numbers["sum"], key=lambda n: ("loss" not in n, n)))
    say(f"step {step}/{run.cfg.train.steps}  {losses}  lr {row['lr']:.3e}{timing}")
    return row


def _save(run: Run, manager, step: int, state, sums: dict | None, crc: int, at: At) -> None:
    numbers = _finite(run, step, sums)
    data = {"step": step, "crc": _total(crc), "sums": numbers, "revision": revision()}
    data |= {
        "order": at.order._asdict(),
        "examples": at.order.examples(step, run.cfg.train.batch),
        "epoch": at.order.epochs(step, run.epoch_steps),
    }
    data |= {"frozen": at.frozen} if at.frozen else {}
    with _writing(run):
        checkpoint.save(manager, step, state.stored, data, plain(run.cfg))
    say(f"step {step}: saving checkpoint")


@contextlib.contextmanager
def _writing(run: Run):
    """OSError, in one line, for anything that goes wrong while checkpoints are written."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as e:  # tensorstore's are ValueErrors
        folder = run.workdir / checkpoint.SUBDIR
        raise OSError(
            f"writing a checkpoint in {folder} failed: {checkpoint.short(e)}; make room, then {_go_on(run.workdir)}"
        ) from e


def _closed(run: Run, manager) -> None:
    """Closes the checkpoints, which waits for those begun."""
    with _writing(run):
        manager.close()


def _written(run: Run, manager) -> None:
    """Waits until the checkpoints begun are complete."""
    with _writing(run):
        manager.wait_until_finished()


def _finite(run: Run, step: int, sums: dict | None) -> dict | None:
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


def _evaluate(run: Run, step: int, state, sums: dict | None) -> dict:
    _finite(run, step, sums)
    loaded = Loaded(run.model, state.all_params, run.cfg, run.tokenizer, f"step {step}")
    result = run.task.evaluate(loaded, run.eval_data, run.mesh)
    result.pop("predictions", None)
    say(f"{run.cfg.objective}: " + "  ".join(f"{name} {value:.2f}" for name, value in result.items()))
    return result


def _keep_vocabulary(tokenizer, workdir: pathlib.Path, name: str) -> None:
    """Copies a vocabulary into the workdir; ValueError where checkpoints there were trained with another."""
    kept, copy = (checkpoint.vocabulary(workdir, like, name) for like in ("", tokenizer.path))
    if kept and _means(kept, tokenizer):
        return
    if kept and any((workdir / checkpoint.SUBDIR).glob("[0-9]*/state")):
        raise ValueError(
            f"text.vocab is {tokenizer.path}, but this workdir was trained with another vocabulary, kept in "
            f"{kept}: set text.vocab={kept} or use another workdir"
        )
    if jax.process_index() == 0:
        beside = copy.with_name(copy.name + ".tmp")
        tokenizer.save(beside)
        beside.replace(copy)
        if kept and kept != copy:
            kept.unlink()


def _means(vocab: pathlib.Path, tokenizer) -> bool:
    """Whether a file is the vocabulary of `tokenizer`; one that cannot be read is not."""
    try:
        return type(tokenizer)(vocab).crc == tokenizer.crc
    except ValueError:
        return False
