"""A checkpoint measured by its task, apart from a run."""

from __future__ import annotations

import io
import json
import pathlib

import jax
import numpy as np

from blip_jax import buckets, checkpoint, tasks
from blip_jax.console import say
from blip_jax.convert import read
from blip_jax.data.text import tokenizers
from blip_jax.inference.batching import placed
from blip_jax.inference.load import Loaded, read_for
from blip_jax.models import initial
from blip_jax.parallel import processes, sharding
from blip_jax.train import start
from blip_jax.train.run import suffix, warn_of_shared_files


def evaluate(cfg, workdir, path="") -> dict:
    """What the task measures on `cfg.data.eval` with the newest checkpoint of `workdir`, or with `path`.

    path: a workdir, a checkpoint folder, a .pth, a Hugging Face folder or a name on its hub, whose parameters are
    fitted to cfg.model. The numbers go to `workdir`/evaluation.json with the checkpoint's name; arrays of scores, which
    are not returned, to scores.npz.
    ValueError: no checkpoint, another model's or vocabulary's, no evaluation source.
    """
    try:
        return _evaluate(cfg, workdir, path)
    finally:
        buckets.settle()


def _evaluate(cfg, workdir, path) -> dict:
    if not hasattr(tasks.of(cfg), "evaluate"):
        raise ValueError(f"objective {cfg.objective} has no scores: its eval/loss is in the log of its run")
    if not len(cfg.data.eval):
        raise ValueError("data.eval is empty: add a source to the config, c.data.eval.name = source(kind, path)")
    origin = read.locate(path) if path else checkpoint.newest(workdir)
    tokenizer = tokenizers.of_config(cfg)
    tasks.validate(cfg, tokenizer, jax.process_count(), jax.device_count())
    workdir = buckets.of(workdir, "workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    mesh, task = sharding.make_mesh(cfg.mesh), tasks.of(cfg)
    model = task.build(cfg)
    shapes = jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(cfg.seed)))
    warn_of_shared_files(cfg)
    data = task.eval_data(cfg, tokenizer, buckets.staged(workdir / f"skipped-eval{suffix()}.jsonl"))
    processes.agree(cfg, workdir, vocabulary=tokenizer.crc, checkpoint=origin.name, examples=len(data))
    params = start.fit_params(read_for(cfg, origin).state["params"], shapes, str(origin))
    origin = str(buckets.spelled(origin))
    say(f"evaluating {origin} on {len(data)} examples")
    params = placed(params, mesh, cfg.model.dtype)
    result = task.evaluate(Loaded(model, params, cfg, tokenizer, origin), data, mesh)
    _write_result(workdir, task, cfg, result, origin)
    return {name: value for name, value in result.items() if name != "scores"}


def _write_result(workdir: pathlib.Path, task, cfg, result: dict, checkpoint: str) -> None:
    """evaluation.json with the numbers, predictions.json, scores.npz, and what a server wants, as far as the task has
    them.
    """
    if jax.process_index() != 0:
        return
    numbers = {"checkpoint": checkpoint} | tasks.numbers(result)
    files: list[tuple[str, str | bytes]] = [("evaluation.json", json.dumps(numbers, indent=1) + "\n")]
    if "predictions" in result:
        files.append(("predictions.json", json.dumps(result["predictions"], indent=1) + "\n"))
    if "scores" in result:
        np.savez(whole := io.BytesIO(), **result["scores"])
        files.append(("scores.npz", whole.getvalue()))
    if hasattr(task, "submission"):
        try:
            files.append(task.submission(result, cfg))
        except ValueError as e:
            say(f"nothing is written for a server: {e}")
    for name, content in files:  # whole or not at all
        buckets.write(workdir / name, content)
