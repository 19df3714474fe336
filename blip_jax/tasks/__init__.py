"""What is trained and how it is scored: one module per task, named by `config.objective`, of plain functions.

Every task has

  check(cfg, tokenizer=None)            problems of the config, each with its remedy; tokenizer: once it is read
  build(cfg)                            the model

one that is trained

  example(record, rng, cfg, tokenizer)  one row of a batch, numpy: pictures as bytes, which the pipeline decodes and
                                        augments under the same name, arrays, and "notes", what is irregular about the
                                        record though it is used. BadRecord where the record cannot be used
  shapes(cfg)                           {name: (shape, dtype)} of a global batch
  loss(model, cfg, params, extra, batch, keys)
                                        of one micro-batch: f32[], (metrics, found); pictures arrive normalised; keys:
                                        `step.Keys`; metrics named loss_... are its parts, and are measured on data.eval
                                        as well
  flops(cfg, T=None)                    {part: FLOPs of one example, ..., "step": of the training step}; T: text
                                        positions

and one that is not

  INSTEAD                               what to do instead of training it

One whose texts may be cut into buckets (text.buckets) also has

  text(record, rng, cfg)                (the text that decides the length, notes), with the draws that `example` makes

one whose batches consist of more groups than those of loss.group_size

  batch_unit(cfg)                       the number that the examples of every batch must be a multiple of

one with settings of its own

  leaves()                              them, with their defaults: a config of this objective has c.task = leaves()

one that carries more than parameters from step to step (`step.make_step` says when each is called)

  extra(cfg, params, key)               what it carries at the start: a tree of arrays, or None
  before(cfg, state, epoch_steps)       (trained parameters, extra) that the losses of this step see, of a TrainState
  after(cfg, extra, found)              what it carries on; found: what the losses returned, of all micro-batches in one

one that can be evaluated

  eval_data(cfg, tokenizer, skipped_path)
                                        what `evaluate` reads, from cfg.data.eval
  evaluate(loaded, data, mesh)          {metric: number}, and maybe "predictions", JSON rows, and "scores", arrays by
                                        name; loaded: model, params, cfg, tokenizer, origin
  curve(loaded, data, mesh)             as `evaluate`, while a run trains, where that takes too long then
  passes(cfg, model, unit)              `inference.batching.Pass`es: the programs that `evaluate` runs, for plans of it;
                                        unit: devices that rows are shared out over
  BEST                                  names of numbers of `curve`, or of `evaluate`, whose sum says which
                                        checkpoint of a run is the best (train.keep_best)
  samples(loaded, data, mesh)           (record, what the model says of it) of what `eval_data` gives, in order, for
                                        people to look at; where it says something
  table(result)                         `evaluate`'s numbers as text
  submission(result, cfg)               (file name, text) that a server takes, where there is one. ValueError: what
                                        was asked is not answered as a whole, and nothing is written

and one whose model is not that of pre-training may start from a checkpoint of it by

  START                                 models.build.Start: what its parameters start from

one that fine-tunes what others have trained

  BEGINS_FROM                           in words, what its train.init_from should name: anything else is said

There is no list of tasks: a module in this folder that is not in SHARED is one, and so is a file that `bring` names.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pathlib
import pkgutil
import sys
from types import ModuleType

from blip_jax import config

SHARED = (
    "captioned",
    "contrast",
    "momentum",
    "step",
    "two_stage",
)  # what several tasks have in common, no tasks themselves
_brought: set[str] = set()  # names of tasks that lie elsewhere and are loaded


def bring(file: str | os.PathLike) -> str:
    """Makes a Python file anywhere a task, under the file's name, and returns that name, for `config.objective`.

    A config's file that holds its own task says `c.objective = tasks.bring(__file__)`. The settings that a run leaves
    in its workdir hold the name alone, so reading them never runs a file: whoever reads them brings it first. Of a file
    in this folder it is the name, and nothing else happens.
    ValueError: a task of this name is here already, from another file.
    """
    path = pathlib.Path(file).resolve()
    name = f"{__name__}.{path.stem}"
    if path.parent == pathlib.Path(__file__).resolve().parent:
        return path.stem
    if path.stem in _brought and sys.modules[name].__file__ == str(path):
        return path.stem
    if path.stem in (*names(), *SHARED):
        raise ValueError(f"{file}: there is a task {path.stem} already: give the file another name")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or not path.stem.isidentifier():
        raise ValueError(f"{file}: a Python file with a name of letters, digits and _ was expected")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    _brought.add(path.stem)
    return path.stem


def names() -> list[str]:
    """Every task there is."""
    here = {module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED}
    return sorted(here | _brought)


def unknown(objective: str) -> str:
    """What is wrong with an objective that no task has the name of."""
    file = f"{objective}.py" if objective.isidentifier() else "FILE.py"
    return (
        f"objective is {objective!r}: choose one of {', '.join(names())}; of a task of your own, whose file no workdir "
        f"runs by itself, give --config={file}, and the flags that the run had, or in Python "
        f"blip_jax.tasks.bring({file!r})"
    )


def of(cfg) -> ModuleType:
    """The module of `cfg.objective`. ValueError: there is no such task."""
    if cfg.objective not in names():
        raise ValueError(unknown(cfg.objective))
    return importlib.import_module(f"{__name__}.{cfg.objective}")


def trained(cfg) -> ModuleType:
    """The module of `cfg.objective`, which is trained. ValueError: it is evaluated alone, or there is none."""
    if instead := getattr(of(cfg), "INSTEAD", ""):
        raise ValueError(f"objective {cfg.objective} is evaluated, not trained: {instead}")
    return of(cfg)


def numbers(result: dict) -> dict:
    """The numbers of an evaluation's result, without what they were computed from."""
    return {name: value for name, value in result.items() if name not in ("predictions", "scores")}


def build(cfg):
    """The model of `cfg.objective` with the sizes of `cfg.model`. ValueError: no such objective."""
    return of(cfg).build(cfg)


def validate(cfg, tokenizer=None, process_count: int = 1, device_count: int = 1) -> None:
    """Checks a resolved config before anything compiles: what every run needs, and what its task asks of it.

    tokenizer: of `cfg.text.vocab`, or None where it is not read yet. ValueError: one that lists every problem with its
    remedy.
    """
    found = functools.partial(config.problems, cfg, tokenizer and tokenizer.vocab_size, process_count, device_count)
    if cfg.objective not in names():
        config.refuse([*found(), unknown(cfg.objective)])
    task = of(cfg)
    problems = found(trained=not hasattr(task, "INSTEAD"))
    leaves = task.leaves() if hasattr(task, "leaves") else {}
    if set(cfg.task) != set(leaves):
        what = f"set c.task = leaves() of {task.__name__}" if leaves else "leave c.task empty"
        config.refuse(
            [
                *problems,
                f"task holds {sorted(cfg.task)}, but of objective {cfg.objective} it is {sorted(leaves)}: {what}",
            ]
        )
    config.refuse(problems + _best_problems(cfg, task) + task.check(cfg, tokenizer))


def _best_problems(cfg, task: ModuleType) -> list[str]:
    if not cfg.train.keep_best:
        return []
    if not hasattr(task, "BEST"):
        return [
            f"train.keep_best is set, but objective {cfg.objective} has no rule for which checkpoint is the best, its "
            "last is used: set train.keep_best=False"
        ]
    return [] if len(cfg.data.eval) else ["train.keep_best is set, but data.eval is empty: nothing says which is best"]
