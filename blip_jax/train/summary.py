"""What a run says before it trains: versions, devices, config, parameters, shardings, FLOPs, memory, epochs."""

from __future__ import annotations

import json
import math
import sys

import flax
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from clu import parameter_overview

from blip_jax import __version__, config, trees
from blip_jax.console import plain, revision, say
from blip_jax.models import flops
from blip_jax.models.layers.attention import implementation
from blip_jax.parallel import compiler, sharding


def describe(run, newest: int | None) -> None:
    """Says what a `run.Run` is, new (`newest` None) or at checkpoint `newest`, on less than a screen.

    The long tables, every setting, parameter and array, go to start.txt in the workdir, the settings to config.json.
    """
    cfg, devices = run.cfg, jax.devices()
    resolved = json.dumps(plain(cfg), indent=2)
    parameters = parameter_table(run.shapes.params, run.shapes.frozen, config.text_side(cfg.model).vocab_size)
    arrays = sharding.report(run.shapes, run.mesh)
    pair = run.task.flops(cfg)["step"]
    lines = [
        f"blip_jax {__version__}, revision {revision()}, python {sys.version.split()[0]}, jax {jax.__version__}, "
        f"flax {flax.__version__}, optax {optax.__version__}, orbax {ocp.__version__}",
        f"{jax.process_count()} processes, {len(devices)} devices of kind {devices[0].device_kind}, "
        f"mesh {dict(run.mesh.shape)}",
        _settings(cfg),
        f"parameters: {_last(parameters)}",
        f"arrays: {_last(arrays)}",
        memory_report(run),
        _attention(run),
        f"FLOPs: {'at most ' if cfg.text.buckets else ''}{pair / 1e9:.2f} G per pair, "
        f"{pair * cfg.train.batch / 1e12:.3f} T per step of {cfg.train.batch}",
        f"one epoch is {run.data.epoch_examples} examples = {run.epoch_steps} steps; {cfg.train.steps} steps are "
        f"{cfg.train.steps / run.epoch_steps:.2f} epochs; sources: "
        + ", ".join(f"{name} {len(source)}" for name, source in run.data.sources.items()),
    ]
    if options := compiler.options(run.mesh):
        lines.append(
            "gradients are summed over the slices in parts, by options of the compiler; those that LIBTPU_INIT_ARGS "
            f"names are left to it: {', '.join(options)}"
        )
    lines.append(
        f"{'new run' if newest is None else f'resumed at step {newest}'}; outputs in {run.workdir}: checkpoints/, "
        "metrics.jsonl, tb/, config.json (every setting), start.txt (every parameter and array), skipped.jsonl "
        "(records that cannot be used)"
    )
    if (newest or 0) < cfg.train.steps:
        lines.append(f"the first step compiles, which takes a while; then a line every {cfg.train.log_every} steps")
    say("\n".join(lines))
    if jax.process_index() == 0:
        whole = [*lines, f"config {resolved}", parameters, arrays]
        (run.workdir / "config.json").write_text(resolved + "\n", encoding="utf-8")
        (run.workdir / "start.txt").write_text("\n\n".join(whole) + "\n", encoding="utf-8")


def _settings(cfg) -> str:
    """The settings that one looks for first, in a line."""
    m, text = cfg.model, config.text_side(cfg.model).sizes
    return (
        f"{cfg.objective}: ViT {m.vit.depth} x {m.vit.width}, patch {m.vit.patch}, {m.img_size} px; text "
        f"{text.layers} x {text.width}, {cfg.text.max_len} tokens; {m.dtype}; batch {cfg.train.batch}, "
        f"{cfg.train.steps} steps, learning rate {cfg.optim.lr:g}, {cfg.optim.schedule}, seed {cfg.seed}"
    )


def _attention(run) -> str:
    """How the vision tower's attention is computed on the devices of the run."""
    cfg, vit = run.cfg, run.cfg.model.vit
    rows, positions = cfg.train.batch // cfg.optim.accumulate, flops.positions(cfg.model)
    x = jax.ShapeDtypeStruct((rows, positions, vit.heads, vit.width // vit.heads), jnp.dtype(cfg.model.dtype))
    with jax.set_mesh(run.mesh):
        return f"attention of a picture's {positions} positions: {implementation(x, x, x)}"


def _last(table: str) -> str:
    """The last line of a table, its sum."""
    return table.rpartition("\n")[2]


def ending(stopped: bool, step: int, last: int, newest: int | None, folder, counts: dict) -> str:
    """What a run says when it ends at `step` of `last`, or is stopped there; counts: of TrainData."""
    skipped = counts["skipped"]
    reasons = ": " + ", ".join(f"{reason} {n}" for reason, n in sorted(skipped.items())) if skipped else ""
    examples = f"{counts['read']} records read, {sum(skipped.values())} skipped{reasons}"
    how = "stopped by a signal" if stopped else "done"
    again = "; the same command goes on from there" if stopped else ""
    return f"{how} at step {step} of {last}; checkpoint {newest} in {folder}; {examples}{again}"


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
    """Name, shape, dtype and size of every parameter array, trained and frozen, and their sums; a vocabulary's as long
    as it is, without the rows that pad it."""

    def real(path: str, leaf) -> jax.ShapeDtypeStruct:
        dims = sharding.logical_dims(path, len(leaf.shape))
        shape = tuple(vocab_size if dim == "vocab" else n for dim, n in zip(dims, leaf.shape))
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    kinds = {
        kind: {path: real(path, leaf) for path, leaf in trees.paths(tree)}
        for kind, tree in (("trained", trained), ("frozen", frozen))
    }
    counts = {kind: int(parameter_overview.count_parameters(arrays)) for kind, arrays in kinds.items()}
    table = parameter_overview.get_parameter_overview(kinds, include_stats=False).rpartition("\nTotal")[0]
    total = f"total {sum(counts.values()):,}: {counts['trained']:,} trained, {counts['frozen']:,} frozen"
    return f"{table}\n{total}"


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
