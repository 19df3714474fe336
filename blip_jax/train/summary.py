"""What a run says before it trains: versions, devices, config, parameters, shardings, FLOPs, memory, epochs."""

from __future__ import annotations

import json
import math
import re
import sys

import flax
import jax
import optax
import orbax.checkpoint as ocp

from blip_jax import __version__, trees
from blip_jax.console import plain, revision, say
from blip_jax.parallel import compiler, sharding


def describe(run, newest: int | None) -> None:
    """Says all of it about a `loop.Run`, new (`newest` None) or at checkpoint `newest`, and saves the config."""
    cfg, devices = run.cfg, jax.devices()
    say(
        f"blip_jax {__version__}, revision {revision()}, python {sys.version.split()[0]}, jax {jax.__version__}, "
        f"flax {flax.__version__}, optax {optax.__version__}, orbax {ocp.__version__}"
    )
    say(
        f"{jax.process_count()} processes, {len(devices)} devices of kind {devices[0].device_kind}, "
        f"mesh {dict(run.mesh.shape)}"
    )
    resolved = json.dumps(plain(cfg), indent=2)
    say(f"config {resolved}")
    if jax.process_index() == 0:
        (run.workdir / "config.json").write_text(resolved + "\n", encoding="utf-8")
    say(parameter_table(run.shapes.params, run.shapes.frozen, cfg.model.med.vocab_size))
    say(sharding.report(run.shapes, run.mesh))
    pair = run.task.flops(cfg)["step"]
    say(
        f"FLOPs: {'at most ' if cfg.text.buckets else ''}{pair / 1e9:.2f} G per pair, "
        f"{pair * cfg.train.batch / 1e12:.3f} T per "
        f"step of {cfg.train.batch}"
    )
    say(memory_report(run))
    if options := compiler.options(run.mesh):
        say(
            f"gradients are summed over the slices in parts, by options of the compiler; those that LIBTPU_INIT_ARGS "
            f"names are left to it: "
            f"{', '.join(options)}"
        )
    say(
        f"one epoch is {run.data.epoch_examples} examples = {run.epoch_steps} steps; {cfg.train.steps} steps are "
        f"{cfg.train.steps / run.epoch_steps:.2f} epochs; sources: "
        + ", ".join(f"{name} {len(source)}" for name, source in run.data.sources.items())
    )
    say(
        f"{'new run' if newest is None else f'resumed at step {newest}'}; outputs in {run.workdir}: checkpoints/, "
        "metrics.jsonl, tb/, config.json, skipped.jsonl"
    )


def bucket_report(run, step: int, order, shares: dict[int, float]) -> str:
    """Text lengths of the batches in the window of `step` (shares: T -> share of them) and the FLOPs that follow.

    order: since when there are these windows.
    """
    cfg, pair = run.cfg, {T: run.task.flops(run.cfg, T=T)["step"] for T in shares}
    mean = sum(pair[T] * share for T, share in shares.items())
    first = order.step + (step - order.step) // cfg.text.bucket_window * cfg.text.bucket_window
    lengths = ", ".join(
        f"{T} positions {100 * share:.0f} % ({pair[T] / 1e9:.2f} G per pair)" for T, share in shares.items()
    )
    return (
        f"texts of the batches of steps {first + 1} to {first + cfg.text.bucket_window}: {lengths}; FLOPs: "
        f"{mean / 1e9:.2f} G per pair on average, {mean * cfg.train.batch / 1e12:.3f} T per step"
    )


def parameter_table(trained: dict, frozen: dict, vocab_size: int) -> str:
    """Counts by module, without the padding of the vocabulary; layers of one stack share a row."""
    groups: dict[str, list[int]] = {}
    total = {"trained": 0, "frozen": 0}
    for kind, tree in (("trained", trained), ("frozen", frozen)):
        for path, leaf in trees.paths(tree):
            dims = sharding.logical_dims(path, len(leaf.shape))
            count = math.prod(vocab_size if dim == "vocab" else n for dim, n in zip(dims, leaf.shape))
            name = f"{re.sub(r'[0-9]+', '*', '/'.join(path.split('/')[:2]))} ({kind})"
            groups[name] = [a + b for a, b in zip(groups.get(name, [0, 0]), (1, count))]
            total[kind] += count
    rows = [f"{name:44} {arrays:6} {count:14,}" for name, (arrays, count) in groups.items()]
    head = f"{'parameters':44} {'arrays':>6} {'count':>14}"
    foot = f"total {sum(total.values()):,}: {total['trained']:,} trained, {total['frozen']:,} frozen"
    return "\n".join([head, *rows, foot])


def memory_report(run) -> str:
    """Bytes per device of the state and of the gradients; activations come on top."""

    def local(tree, shardings):
        return sum(
            math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
            for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings))
            if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        )

    state, gradients = local(run.shapes, run.shardings), local(run.shapes.params, run.shardings.params)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    of = f" of {limit / 2**30:.1f} GiB" if limit else ""
    return (
        f"memory per device: state {state / 2**30:.3f} GiB + gradients {gradients / 2**30:.3f} GiB = "
        f"{(state + gradients) / 2**30:.3f} GiB{of}, before activations"
    )
