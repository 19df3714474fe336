"""What stays the same while a run trains, found and checked before anything compiles."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from blip_jax import buckets, checkpoint, tasks
from blip_jax.console import say
from blip_jax.data.batches import TrainData
from blip_jax.data.evaluation import HeldOut
from blip_jax.data.order import Order
from blip_jax.data.source import expand
from blip_jax.data.text import tokenizers
from blip_jax.parallel import processes, sharding
from blip_jax.train import kept, metrics, optim
from blip_jax.train import state as train_state
from blip_jax.train.validation import Validation


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
    eval_data: Any | None  # what task.evaluate reads; None: nothing is scored
    validation: Validation | None  # what the loss is measured on; None: nothing
    rows: np.ndarray  # positions in a micro-batch that this process makes, i64
    first: np.ndarray  # whether it is the first process that does, bool

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate."""
        return bool(self.eval_data) or bool(self.validation)

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


def prepare(cfg, workdir) -> Run:
    """Everything that can fail on account of the config, the data or the sizes, without compiling or allocating."""
    tasks.validate(cfg, None, jax.process_count(), jax.device_count())
    task, tokenizer = tasks.trained(cfg), _files(cfg)
    tasks.validate(cfg, tokenizer, jax.process_count(), jax.device_count())
    workdir = buckets.of(workdir, "workdir")
    if cfg.train.wandb:
        metrics.check_wandb(cfg.train.wandb)
    workdir.mkdir(parents=True, exist_ok=True)
    for name, own in tokenizers.parts(tokenizer).items():
        _keep_vocabulary(own, workdir, name)
    mesh = sharding.make_mesh(cfg.mesh)
    rows, first = sharding.rows(mesh, cfg.train.batch // cfg.optim.accumulate)
    data = TrainData(
        cfg,
        tokenizer,
        task,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        rows=rows,
        skipped_path=buckets.staged(workdir / f"skipped{suffix()}.jsonl"),
    )
    eval_data = validation = None
    if len(cfg.data.eval):
        warn_of_shared_files(cfg)
        skipped = lambda name: buckets.staged(workdir / f"skipped-{name}{suffix()}.jsonl")
        if hasattr(task, "evaluate"):
            eval_data = task.eval_data(cfg, tokenizer, skipped("eval"))
        if cfg.eval.loss_examples:
            sources = getattr(eval_data, "sources", cfg.data.eval)  # opened already, where it says so
            validation = Validation(HeldOut(cfg, tokenizer, task, sources, skipped_path=skipped("eval-loss")))
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
        validation=validation,
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


def warn_of_shared_files(cfg) -> None:
    """Says which files of data.eval data.train has, too: numbers on them say nothing about unseen examples."""

    def files(part: str) -> dict[tuple[str, str], str]:
        found = {}
        for name, source in cfg.data[part].items():
            with contextlib.suppress(ValueError):  # evaluation needs no file of training
                paths = expand(name, source) if source.kind not in ("tfds", "scenes") else []
                found |= {(os.path.realpath(path), source.split): name for path in paths}
        return found

    trained = files("train")
    for key, name in files("eval").items():
        if key in trained:
            say(
                f"WARNING: data.eval.{name} has {key[0]}, which data.train.{trained[key]} trains on: numbers on it say "
                "nothing about unseen examples"
            )


def suffix() -> str:
    """What the names of files that each process writes for itself end in."""
    return f"-p{jax.process_index()}" if jax.process_index() else ""


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
        if buckets.is_bucket(copy):
            beside = buckets.staged(copy)
            tokenizer.save(beside)
            buckets.rewritten(beside)
            buckets.sync()
        else:
            beside = copy.with_name(copy.name + ".tmp")
            tokenizer.save(beside)
            beside.replace(copy)
        if kept and kept != copy:
            kept.unlink()


def _means(vocab: pathlib.Path, tokenizer) -> bool:
    """Whether a file is the vocabulary of `tokenizer`; one that cannot be read is not."""
    try:
        return type(tokenizer)(buckets.fetched(vocab)).crc == tokenizer.crc
    except ValueError:
        return False
