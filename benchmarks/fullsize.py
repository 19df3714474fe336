"""Full size really runs: `python benchmarks/fullsize.py` prints what it measured and what the formulas say.

ViT-B/16 at 224 pixels takes three real pre-training steps (batch 8, float32, queue 57600, random pixels, texts of
caption length) on the devices there are: some minutes and 12 GB on two CPU cores. ViT-L/16 is traced and lowered, not
run.
"""

from __future__ import annotations

import resource
import time

import jax
import numpy as np

from blip_jax import config, tasks, trees
from blip_jax.models import flops
from blip_jax.parallel import sharding
from blip_jax.tasks.step import make_step
from blip_jax.train import optim
from blip_jax.train import state as train_state

BATCH, STEPS, EPOCH_STEPS = 8, 3, 1000


def full_config(size: str):
    """The paper's pre-training at the given size ("base" or "large") with the small batch and float32 of this run."""
    cfg = config.base(size)
    with cfg.unlocked():
        cfg.model.dtype = "float32"
        cfg.train.batch, cfg.train.steps = BATCH, STEPS
    return cfg


def make(cfg):
    """(create: key -> TrainState, step: (TrainState, batch) -> (TrainState, metrics)), not yet jitted."""
    model = tasks.build(cfg)
    tx, _ = optim.make(cfg, EPOCH_STEPS)
    return lambda key: train_state.create(cfg, model, tx, key), make_step(cfg, model, tx, EPOCH_STEPS)


def parameter_counts(state, vocab_size: int) -> tuple[int, int]:
    """(trainable, total with the momentum copies) numbers of parameters of a TrainState, vocabulary padding left
    out."""

    def count(tree):
        n = 0
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            by_vocab = sharding.logical_dims(trees.path_name(path), x.ndim)[:1] == ("vocab",)
            n += x.size * vocab_size // x.shape[0] if by_vocab else x.size
        return n

    trainable = count(state.params)
    momentum = count(state.extra["params"]) if state.extra else 0
    return trainable, trainable + count(state.frozen) + momentum


def random_batch(cfg, seed: int) -> dict[str, np.ndarray]:
    """A batch of uniform pixels and random ids; 8 to 14 real positions per text, as COCO captions have."""
    rng = np.random.default_rng(seed)
    B, T, size = cfg.train.batch, cfg.text.max_len, cfg.model.img_size
    txt_mask = np.arange(T) < rng.integers(8, 15, (B, 1))
    ids = np.where(txt_mask, rng.integers(1000, cfg.model.med.vocab_size - 2, (B, T)), 0).astype(np.int32)
    return {
        "img": rng.integers(0, 256, (B, size, size, 3)).astype(np.uint8),
        "ids": ids,
        "txt_mask": txt_mask,
        "image_id": np.arange(B, dtype=np.int32),
    }


def _bytes(tree) -> int:
    """Bytes of the arrays of a tree, random keys left out."""
    return sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def _peak_memory() -> str:
    return f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB"


def _shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _say_size(cfg, shapes) -> None:
    trainable, total = parameter_counts(shapes, cfg.model.med.vocab_size)
    print(
        f"parameters: {trainable:,} trainable, {total:,} in all; state {_bytes(shapes) / 1e9:.2f} GB (parameters "
        f"{_bytes(shapes.params) / 1e9:.2f}, optimiser {_bytes(shapes.opt) / 1e9:.2f}, momentum "
        f"{_bytes(shapes.extra) / 1e9:.2f})"
    )


def _say_flops(cfg, traced) -> float:
    """Prints formula and jaxpr count of the traced step; returns FLOPs per step by the formula."""
    count = flops.pretrain_step(cfg)
    traced_pair = flops.count_jaxpr(traced.jaxpr) / cfg.train.batch
    print(
        "forward, GFLOP per pair: "
        + ", ".join(f"{name} {value / 1e9:.2f}" for name, value in count.items() if name != "step")
    )
    print(
        f"step: {count['step'] / 1e9:.1f} GFLOP per pair by the formula, {traced_pair / 1e9:.1f} in the traced program "
        f"({100 * (traced_pair / count['step'] - 1):+.2f} %)"
    )
    return count["step"] * cfg.train.batch


def run_base() -> None:
    """Three real steps of ViT-B/16 at 224; prints counts, memory (GB = 1e9 bytes), times, rates and losses."""
    cfg = full_config("base")
    print(
        f"ViT-B/16, {cfg.model.img_size} px, batch {BATCH}, T {cfg.text.max_len}, {cfg.model.dtype}, queue "
        f"{cfg.loss.queue}; "
        f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    )
    create, step = make(cfg)
    mesh = sharding.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(create, jax.random.key(cfg.seed))
        _say_size(cfg, shapes)
        where = sharding.shardings_for(shapes, mesh)
        state = jax.jit(create, out_shardings=where)(jax.random.key(cfg.seed))
        place = lambda seed: jax.device_put(random_batch(cfg, seed), sharding.batch_sharding(mesh))
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
        traced = jitted.trace(state, place(0))
        step_flops = _say_flops(cfg, traced)
        start = time.perf_counter()
        compiled = traced.lower().compile()
        memory = compiled.memory_analysis()
        print(
            f"compiled in {time.perf_counter() - start:.1f} s: state in and out "
            f"{memory.argument_size_in_bytes / 1e9:.2f} GB, of "
            f"which {memory.alias_size_in_bytes / 1e9:.2f} GB in place, temporaries "
            f"{memory.temp_size_in_bytes / 1e9:.2f} GB; "
            f"{_peak_memory()} so far"
        )
        for i in range(STEPS):
            batch = place(i)
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(compiled(state, batch))
            seconds = time.perf_counter() - start
            print(
                f"step {i}: {seconds:.2f} s, {BATCH / seconds:.3f} pairs/s, {step_flops / seconds / 1e9:.1f} GFLOP/s; "
                + ", ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
            )
            if not all(np.isfinite(float(value)) for value in metrics.values()):
                raise ValueError(f"step {i} gave a metric that is not finite: {metrics}")
    print(_peak_memory())


def lower_large() -> None:
    """Shapes of ViT-L/16 and one step lowered to StableHLO, neither compiled nor run; prints counts and FLOPs."""
    cfg = full_config("large")
    print(f"ViT-L/16, {cfg.model.img_size} px, drop path {cfg.model.drop_path}: shapes and lowering only")
    create, step = make(cfg)
    shapes = jax.eval_shape(create, jax.random.key(cfg.seed))
    _say_size(cfg, shapes)
    traced = jax.jit(step, donate_argnums=0).trace(shapes, _shapes(random_batch(cfg, 0)))
    _say_flops(cfg, traced)
    start = time.perf_counter()
    text = traced.lower().as_text()
    print(f"lowered in {time.perf_counter() - start:.1f} s to {text.count(chr(10)):,} lines of StableHLO")


if __name__ == "__main__":
    run_base()
    lower_large()
