"""The training loop. `fit` is the only one: every objective runs through it, and running it again resumes.

Order: maybe evaluate, maybe save, next batch, step, maybe log. The number of steps done is the whole data position, so
a checkpoint is the state, that number and the running sums of the current log interval.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import time
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from blip_jax import checkpoint, metrics, optim, sharding, steps, train_state
from blip_jax.config import validate
from blip_jax.convert.apply import folded
from blip_jax.convert.rules import INITIAL
from blip_jax.data.pipeline import EvalData, TrainData
from blip_jax.data.text import Tokenizer
from blip_jax.eval import retrieval
from blip_jax.interrupt import Interrupt
from blip_jax.models.blip import Blip
from blip_jax.models.vit import resize_pos_embed
from blip_jax.summary import describe, plain, revision, say


class NonFiniteLoss(RuntimeError):
    """A loss or gradient became infinite or not a number; the message names the step and what remains."""


class Run(NamedTuple):
    """Everything that stays the same while a run trains."""

    cfg: Any
    workdir: pathlib.Path
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    model: Blip
    tx: optax.GradientTransformation
    lr: Any  # step -> f32[]
    epoch_steps: int
    shapes: Any  # of the state, ShapeDtypeStruct leaves
    shardings: Any  # of the state
    data: TrainData
    eval_data: EvalData | None


class At(NamedTuple):
    """Where a run stands when the loop begins: a checkpoint's data entry, and what the log already holds."""

    step: int  # steps done
    crc: int  # of the keys of the examples seen
    sums: dict | None  # running sums of the log interval; None: empty
    evaluated: frozenset[int]  # steps with an evaluation row


def fit(cfg, workdir) -> dict:
    """Trains `cfg` to `cfg.train.steps` in the folder `workdir`, resuming from its newest checkpoint if there is one.

    Writes checkpoints/, metrics.jsonl, tb/, config.json, skipped.jsonl and a copy of the vocabulary. SIGTERM, or SIGINT
    once, finishes the step, saves and returns. Returns {"step", "stopped", "log": last row, "eval": last evaluation}.
    ValueError: the config, the data or the checkpoint in `workdir` do not fit; raised before anything compiles.
    NonFiniteLoss: the step is named and the last good checkpoint is kept.
    """
    run = prepare(cfg, workdir)
    with contextlib.ExitStack() as stack:
        stop = Interrupt("finishing this step, then saving")
        if jax.process_count() == 1:  # else a signal may reach one of them only, and JAX's coordination service tells all
            stack.enter_context(stop)
        stack.enter_context(jax.set_mesh(run.mesh))
        manager = stack.enter_context(checkpoint.open_dir(run.workdir, cfg.train.keep))
        newest = manager.latest_step()
        loaded = _init_params(run) if newest is None else check_resume(manager, newest, run)
        describe(run, newest)
        if newest is None:
            state, at = _create(run, loaded), At(0, 0, None, frozenset())
        else:
            state, saved = checkpoint.restore(manager, newest, run.shapes, run.shardings)
            at = At(newest, saved["crc"], saved["sums"], frozenset())
        if jax.process_index() == 0:
            rows = metrics.drop_after(run.workdir / "metrics.jsonl", at.step)
            at = at._replace(evaluated=frozenset(r["step"] for r in rows if any(n.startswith("eval/") for n in r)))
        if jax.process_count() > 1:  # all take part in an evaluation or none
            done = multihost_utils.broadcast_one_to_all(np.bool_(at.step in at.evaluated))
            at = at._replace(evaluated=frozenset([at.step] if done else []))
        writer = stack.enter_context(metrics.Writer(run.workdir, jax.process_index() == 0, at.step + 1))
        return _loop(run, state, at, manager, writer, stop)


def _loop(run: Run, state, at: At, manager, writer: metrics.Writer, stop: Interrupt) -> dict:
    cfg, every, last = run.cfg, run.cfg.train, run.cfg.train.steps
    step_fn = jax.jit(steps.make_step(cfg, run.model, run.tx, run.epoch_steps), donate_argnums=0,
                      out_shardings=(run.shardings, None))
    batches = run.data.batches(at.step)
    sums, step, crc = at.sums and metrics.load(at.sums), at.step, at.crc
    out, clock, ahead = {}, metrics.Clock(), None
    with contextlib.closing(batches):
        while True:
            stopping = manager.reached_preemption(step) if jax.process_count() > 1 else stop.asked
            due = step > 0 and (step >= last or every.eval_every > 0 and step % every.eval_every == 0)
            if due and run.eval_data and not stopping and step not in at.evaluated:
                with clock.paused():
                    out["eval"] = _evaluate(run, step, state, sums)
                    writer.row(step, "eval", out["eval"])
            if step > at.step and (step >= last or step % every.save_every == 0 or stopping):
                with clock.paused():
                    _save(run, manager, step, state, sums, crc)
            if step >= last or stopping:
                break
            asked = time.perf_counter()
            local = next(batches)
            waited = time.perf_counter() - asked
            crc = zlib.crc32("\n".join(local["key"]).encode(), crc)
            batch = _to_devices(local, run.mesh, cfg.optim.accumulate)
            with jax.transfer_guard("disallow"):
                state, values = step_fn(state, batch)
            jax.block_until_ready(ahead or values)  # at most one step is in flight while the next batch is fetched
            sums, ahead = metrics.add(metrics.zeros(values) if sums is None else sums, values), values
            step += 1
            clock.step(waited)
            if step % every.log_every == 0 or step >= last:
                out["log"] = _log(run, writer, step, sums, crc, clock)
                sums = None
    manager.wait_until_finished()
    say(f"{'stopped by a signal' if step < last else 'done'} at step {step} of {last}; "
        f"checkpoint {manager.latest_step()} in {manager.directory}; examples {run.data.counts()}")
    return {"step": step, "stopped": step < last, **out}


def prepare(cfg, workdir) -> Run:
    """Everything that can fail on account of the config, the data or the sizes, without compiling or allocating."""
    validate(cfg, None, jax.process_count(), jax.device_count())
    tokenizer = Tokenizer(cfg.text.vocab)
    validate(cfg, tokenizer.vocab_size, jax.process_count(), jax.device_count())
    workdir = pathlib.Path(workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    _keep_vocabulary(cfg, workdir)
    mesh = sharding.make_mesh(cfg.mesh)
    me, n = jax.process_index(), jax.process_count()
    suffix = f"-p{me}" if me else ""
    data = TrainData(cfg, tokenizer, process_index=me, process_count=n, skipped_path=workdir / f"skipped{suffix}.jsonl")
    eval_data = None
    if len(cfg.data.eval):
        eval_data = EvalData(cfg, tokenizer, cfg.data.eval, skipped_path=workdir / f"skipped-eval{suffix}.jsonl")
    epoch_steps = data.epoch_examples // cfg.train.batch
    if epoch_steps == 0:
        raise ValueError(f"an epoch has {data.epoch_examples} examples, fewer than train.batch = {cfg.train.batch}: "
                         "lower train.batch, or set data.epoch_examples to what the schedule should call an epoch")
    model = Blip.from_config(cfg.model)
    tx, lr = optim.make(cfg, epoch_steps)
    shapes = jax.eval_shape(lambda: train_state.create(cfg, model, tx, jax.random.key(cfg.seed)))
    shardings = sharding.shardings_for(shapes, mesh)
    return Run(cfg, workdir, tokenizer, mesh, model, tx, lr, epoch_steps, shapes, shardings, data, eval_data)


def evaluate(cfg, workdir, path="") -> dict:
    """Retrieval on `cfg.data.eval` with the newest checkpoint of `workdir`, or the one at `path`; metrics in percent.

    The table goes to `workdir`/retrieval.json with the checkpoint's name.
    ValueError: no checkpoint, another model's, no evaluation source.
    """
    if not len(cfg.data.eval):
        raise ValueError("data.eval is empty: add a source to the config, c.data.eval.name = source(kind, path)")
    folder = checkpoint.newest(path or workdir)
    tokenizer = Tokenizer(cfg.text.vocab)
    validate(cfg, tokenizer.vocab_size, jax.process_count(), jax.device_count())
    workdir = pathlib.Path(workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    mesh, model = sharding.make_mesh(cfg.mesh), Blip.from_config(cfg.model)
    shapes = jax.eval_shape(lambda: train_state.init_params(cfg, model, jax.random.key(cfg.seed)))
    data = EvalData(cfg, tokenizer, cfg.data.eval, skipped_path=workdir / "skipped-eval.jsonl")
    params = jax.device_put(fit_params(checkpoint.load_params(folder), shapes, str(folder)),
                            sharding.shardings_for(shapes, mesh))
    say(f"evaluating {folder} on {data.n_images} images, {len(data.captions)} captions")
    with jax.set_mesh(mesh):
        result = retrieval.evaluate(cfg, model, params, data, tokenizer, mesh)
    result = {"images": data.n_images, "texts": len(data.captions), **result}
    if jax.process_index() == 0:
        text = json.dumps({"checkpoint": str(folder), **result}, indent=1)
        (workdir / "retrieval.json").write_text(text + "\n", encoding="utf-8")
    return result


def fit_params(loaded: dict, shapes: dict, origin: str, partial: bool = False) -> dict:
    """Parameters of another run as this model's: the ViT's position table is resized, anything else must agree.

    Leaves that this model has no place for (the decoder, when fine-tuning for retrieval) are left out and named, with `partial` those
    that are missing from `loaded`, too. ValueError: every parameter that is missing (without `partial`) or has another shape.
    """
    found, out, problems, missing = dict(optim.paths(loaded)), {}, [], []
    for path, want in optim.paths(shapes):
        have = found.pop(path, None)
        if have is None:
            missing.append(path)
            continue
        if path == "vit/pos_embed" and have.shape != want.shape and have.shape[-1] == want.shape[-1]:
            say(f"{origin}: position table resized from {have.shape[0]} to {want.shape[0]} positions")
            have = resize_pos_embed(have, want.shape[0])
        if have.shape != want.shape:
            problems.append(f"{path} is {list(have.shape)}, this config needs {list(want.shape)}")
        out[path] = np.asarray(have, want.dtype)
    problems += [] if partial else [f"{path} is missing" for path in missing]
    if problems:
        raise ValueError("\n  ".join([f"{origin} holds another model:", *problems[:20],
                                      *([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []),
                                      "give the model.* settings it was trained with, or another checkpoint"]))
    if missing:
        say(f"{origin}: {len(missing)} parameters are not in these initial weights and start random: {', '.join(folded(missing))}")
    if found:
        say(f"{origin}: {len(found)} parameters have no place in this model and are left out: "
            + ", ".join(sorted(found)[:8]) + (", ..." if len(found) > 8 else ""))
    return optim.nest(out.items())


def check_resume(manager, step: int, run: Run) -> None:
    """Says which settings changed since checkpoint `step`. ValueError: they changed the model or the optimiser."""
    before, now = _flat(checkpoint.saved_config(manager, step)), _flat(plain(run.cfg))
    changed = [f"{name}: {before.get(name, 'absent')!r} -> {now.get(name, 'absent')!r}"
               for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    try:
        checkpoint.check_same(manager, step, run.shapes)
    except ValueError as e:
        listing = "\n  ".join(changed) or "none"
        raise ValueError(f"{e}\nsettings that changed since it was written:\n  {listing}") from None
    say(f"resuming from checkpoint {step}; settings changed since: {'; '.join(changed) or 'none'}")


def _init_params(run: Run) -> dict | None:
    """Parameters of `train.init_from` fitted to this model, or None for a random start. ValueError: another vocabulary's.

    Several origins, separated by commas, add up; of a parameter that two of them have, the later one's counts.
    """
    origins, vocab, loaded = _origins(run), pathlib.Path(run.cfg.text.vocab), {}
    if not origins:
        return None
    for origin in origins:
        copy = checkpoint.newest(origin).parent.parent / f"vocab{vocab.suffix}"
        if copy.exists() and copy.read_bytes() != vocab.read_bytes():
            raise ValueError(f"text.vocab is {vocab}, but train.init_from={origin} was trained with another vocabulary, kept in "
                             f"{copy}: set text.vocab={copy}")
        new = dict(optim.paths(checkpoint.load_params(origin)))
        if both := sorted(new.keys() & loaded.keys()):
            say(f"{origin}: its {len(both)} parameters take the place of the earlier origins': {', '.join(folded(both))}")
        loaded |= new
    initial = all(_converted(origin).get("family") in INITIAL for origin in origins)
    return fit_params(optim.nest(loaded.items()), optim.merge(run.shapes.params, run.shapes.frozen), " + ".join(origins), initial)


def _origins(run: Run) -> list[str]:
    return [origin.strip() for origin in run.cfg.train.init_from.split(",") if origin.strip()]


def _converted(origin: str) -> dict:
    """What `blip-jax convert` recorded in a checkpoint; {} for one of a run."""
    return checkpoint.load_data(origin).get("converted", {})


def _create(run: Run, loaded: dict | None):
    """A new state on the mesh; with `loaded`, parameters and momentum copies start from it."""
    key = jax.random.key(run.cfg.seed)
    if loaded is None:
        return jax.jit(lambda key: train_state.create(run.cfg, run.model, run.tx, key), out_shardings=run.shardings)(key)
    say(f"parameters start from {run.cfg.train.init_from}")
    lacking = dict(optim.paths(optim.merge(run.shapes.params, run.shapes.frozen))).keys() - dict(optim.paths(loaded)).keys()

    def create(key, params):
        if lacking:
            fresh = dict(optim.paths(train_state.init_params(run.cfg, run.model, jax.random.split(key, 3)[0])))
            params = optim.merge(params, optim.nest((path, fresh[path]) for path in lacking))
        return train_state.create(run.cfg, run.model, run.tx, key, params)

    make = jax.jit(create, out_shardings=run.shardings)
    state = make(key, jax.device_put(loaded, sharding.shardings_for(loaded, run.mesh)))
    momentum = _init_momentum(run)
    if momentum:
        momentum = {name: x | momentum[name] if name in momentum else x for name, x in state.momentum.items()}
        state = state.replace(momentum=jax.device_put(momentum, run.shardings.momentum))
    return state


def _init_momentum(run: Run) -> dict | None:
    """Momentum copies and queue of a converted `train.init_from`, as far as this config has a place for them, else None.

    What a run of ours left continues by resuming that run; a converted checkpoint can only be begun from.
    """
    want = run.shapes.momentum
    origins = [origin for origin in _origins(run) if _converted(origin)]
    momentum = checkpoint.load_momentum(origins[-1]) if want and origins else None
    if not momentum:
        return None
    out, origin = {}, origins[-1]
    if momentum.get("params"):
        say(f"{origin}: the momentum encoder starts from its momentum encoder")
        out["params"] = fit_params(momentum["params"], want["params"], f"momentum encoder of {origin}")
    if momentum.get("queue") and want["queue"]:
        have, need = momentum["queue"], want["queue"]
        if have["img"].shape != need["img"].shape:
            say(f"{origin}: its queues are of {len(have['img'])} features, loss.queue is {len(need['img'])}: they start anew")
        else:
            out["queue"] = {name: np.asarray(have[name]).astype(x.dtype) for name, x in need.items() if name in have}
            if "image_id" in need and "image_id" not in have:  # of pre-training: as the original, from the beginning, of no image
                del out["queue"]["ptr"]
            else:  # enqueuing never wraps in the middle of a batch
                out["queue"]["ptr"] -= out["queue"]["ptr"] % run.cfg.train.batch
            say(f"{origin}: the queues start from its {len(have['img'])} features")
    return out


def _to_devices(local: dict, mesh, accumulate: int) -> dict:
    """This process's rows of a batch as global arrays, [B, ...] or [A, B/A, ...] for A > 1 micro-batches.

    Of 64-bit image ids the low 32 bits stay.
    """
    place = sharding.batch_sharding(mesh, accumulate)

    def put(x):
        x = x.astype(np.int32) if x.dtype == np.int64 else x
        x = x.reshape(accumulate, -1, *x.shape[1:]) if accumulate > 1 else x
        return jax.make_array_from_process_local_data(place, x)

    return {name: put(x) for name, x in local.items() if name != "key"}


def _log(run: Run, writer, step: int, sums: dict, crc: int, clock: metrics.Clock) -> dict:
    """Writes and returns the means since the last log. NonFiniteLoss: one of these steps had a value not finite."""
    numbers = _finite(run, step, sums)
    row = {**metrics.means(numbers), "lr": float(run.lr(step - 1)), "epoch": step / run.epoch_steps,
           "examples": step * run.cfg.train.batch, "examples_crc": crc}
    timing, measured = "", clock.take()
    if measured:
        rate, waiting = measured
        left = (run.cfg.train.steps - step) / rate
        row |= {"examples_per_s": rate * run.cfg.train.batch, "waiting": waiting}
        timing = (f"  {row['examples_per_s']:.1f} examples/s  eta {int(left // 3600)}:{int(left % 3600 // 60):02}:"
                  f"{int(left % 60):02}  waiting {100 * waiting:.0f} %")
    writer.row(step, "train", row)
    losses = "  ".join(f"{name} {row[name]:.4f}" for name in sorted(numbers["sum"], key=lambda n: ("loss" not in n, n)))
    say(f"step {step}/{run.cfg.train.steps}  {losses}  lr {row['lr']:.3e}{timing}")
    return row


def _save(run: Run, manager, step: int, state, sums: dict | None, crc: int) -> None:
    numbers = _finite(run, step, sums)
    checkpoint.save(manager, step, state, {"step": step, "crc": crc, "sums": numbers, "revision": revision()},
                    plain(run.cfg))
    say(f"step {step}: saving checkpoint")


def _finite(run: Run, step: int, sums: dict | None) -> dict | None:
    """The running sums as plain numbers, None if there are none. NonFiniteLoss: a value among them was not finite."""
    numbers = None if sums is None else metrics.fetch(sums)
    if numbers and numbers["bad"]:
        bad = step - numbers["count"] + numbers["bad"]
        raise NonFiniteLoss(f"step {bad}: a loss or the gradient norm is not finite; nothing after it was saved, the "
                            f"newest checkpoint in {run.workdir / checkpoint.SUBDIR} is good; lower optim.lr, set "
                            "optim.clip, or use model.dtype=float32, and run again to resume from it")
    return numbers


def _evaluate(run: Run, step: int, state, sums: dict | None) -> dict:
    _finite(run, step, sums)
    result = retrieval.evaluate(run.cfg, run.model, state.all_params, run.eval_data, run.tokenizer, run.mesh)
    say("retrieval: " + "  ".join(f"{name} {value:.2f}" for name, value in result.items()))
    return {"images": run.eval_data.n_images, "texts": len(run.eval_data.captions), **result}


def _keep_vocabulary(cfg, workdir: pathlib.Path) -> None:
    """Copies the vocabulary into the workdir; ValueError where checkpoints there were trained with another."""
    source = pathlib.Path(cfg.text.vocab)
    copy = workdir / f"vocab{source.suffix}"
    same = copy.exists() and copy.read_bytes() == source.read_bytes()
    if copy.exists() and not same and any((workdir / checkpoint.SUBDIR).glob("[0-9]*/state")):
        raise ValueError(f"text.vocab is {source}, but this workdir was trained with another vocabulary, kept in "
                         f"{copy}: set text.vocab={copy} or use another workdir")
    if not same and jax.process_index() == 0:
        beside = copy.with_name(copy.name + ".tmp")
        shutil.copyfile(source, beside)
        beside.replace(copy)


def _flat(tree: dict, prefix: str = "") -> dict:
    out = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out

