"""Speed of the training step of any objective, `blip-jax bench train`; benchmarks/against.py sets it beside PyTorch.

Input is synthetic, batches of random pixels and ids that lie on the devices already and texts as long as COCO's, or
real: the config's own data, read while the step before runs. With `text.buckets` synthetic batches of each length are
timed apart, and the figure of all weighs the lengths by their share of the batches.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from blip_jax import config, console, tasks, trees
from blip_jax.bench import throughput
from blip_jax.console import plain
from blip_jax.data import windows
from blip_jax.data.batches import TEXT as TEXT_ENTRIES
from blip_jax.data.batches import TrainData
from blip_jax.data.text import tokenizers
from blip_jax.models import flops
from blip_jax.parallel import sharding
from blip_jax.tasks.step import jit_arguments, make_step
from blip_jax.train import optim
from blip_jax.train import state as train_state
from blip_jax.train.loop import to_devices

EPOCH_STEPS = 1000  # of the schedules
WINDOWS = 16  # that the shares of text lengths are taken from
# positions of texts, where the originals have another number than pre-training
TEXT = {"retrieval": 35, "caption": 40, "vqa": 35, "nlvr": 64, "dialog": 256}
WARM_UP = 2  # steps after a program is compiled that do not count

# positions -> captions: what 1151 captions of about 240 images of COCO's validation and test splits take in BERT's word
# pieces with [CLS] and [SEP], after the original's cleaning. 13.0 on average; half take at most 12, 1 in 70 more than
# 20.
COCO = {
    9: 5,
    10: 127,
    11: 211,
    12: 234,
    13: 186,
    14: 148,
    15: 94,
    16: 59,
    17: 33,
    18: 18,
    19: 10,
    20: 10,
    21: 5,
    22: 1,
    23: 1,
    25: 4,
    26: 2,
    28: 1,
    29: 1,
    30: 1,
}


class Settings(NamedTuple):
    """How it is measured; what is measured is a config."""

    steps: int = 10  # of each text length, without a peer
    threads: int = 0  # of each side on a CPU; 0: all cores
    input: str = "synthetic"  # or "real"
    trace: str = ""  # folder for a profile


def sized(size: str, objective: str, img_size: int, dtype: str, batch: int, buckets: tuple = (), model: str = ""):
    """A config that needs no data: the paper's training of an objective on a model of a size.

    model: of config.BLIP2_MODELS, whose stage is trained whatever size and objective are.
    """
    cfg = config.blip2(*config.BLIP2_MODELS[model]) if model else config.base(size)
    with cfg.unlocked():
        cfg.objective = cfg.objective if model else objective
        task = tasks.trained(cfg)
        if hasattr(task, "leaves"):
            cfg.task = task.leaves()
        cfg.model.update(img_size=img_size, dtype=dtype)
        positions = min(TEXT.get(cfg.objective, cfg.text.max_len), config.text_side(cfg.model).positions)
        cfg.text.update(max_len=positions, buckets=buckets, vocab="of random ids")
        cfg.data.train.random = config.source("scenes", count=1)  # never opened
        cfg.train.update(batch=batch, steps=EPOCH_STEPS)
        cfg.loss.queue -= cfg.loss.queue % batch if batch > 0 else 0
    return cfg


class Program:
    """The training step of a config on a mesh, with its state; compiled once for each text length."""

    def __init__(self, cfg, mesh):
        self.cfg, self.mesh, self.model = cfg, mesh, tasks.build(cfg)
        self.tx, self.lr = optim.make(cfg, EPOCH_STEPS)
        create = functools.partial(train_state.create, cfg, self.model, self.tx)
        self.shapes = jax.eval_shape(create, jax.random.key(cfg.seed))
        self.shardings = sharding.shardings_for(self.shapes, mesh)
        self.create = jax.jit(create, out_shardings=self.shardings)
        self.state = self.create(jax.random.key(cfg.seed))
        self.step = jax.jit(make_step(cfg, self.model, self.tx, EPOCH_STEPS), **jit_arguments(self.shardings, mesh))
        self.compiled: dict[int, Any] = {}  # text positions -> program
        self.about: dict[int, dict] = {}  # ... -> what is known of it

    def place(self, batch: dict) -> dict:
        """A whole batch of numpy arrays, the same in every process, on the mesh."""
        A, place = self.cfg.optim.accumulate, sharding.batch_sharding(self.mesh, self.cfg.optim.accumulate)
        return {
            name: jax.device_put(x.reshape(A, -1, *x.shape[1:]) if A > 1 else x, place) for name, x in batch.items()
        }

    def program(self, batch: dict):
        """The step for batches like this one, compiled if it is not yet."""
        T = batch["ids"].shape[-1] if "ids" in batch else self.cfg.text.max_len
        if T not in self.compiled:
            start = time.perf_counter()
            traced = self.step.trace(self.state, batch)
            self.compiled[T] = traced.lower().compile()
            seconds, memory = time.perf_counter() - start, self.compiled[T].memory_analysis()
            self.about[T] = {
                "compile_s": seconds,
                "gflop_per_image": step_flops(self.cfg, T) / 1e9,
                "traced_gflop_per_image": flops.count_jaxpr(traced.jaxpr) / self.cfg.train.batch / 1e9,
                "temporary_bytes": memory.temp_size_in_bytes if memory else None,
            }
        return self.compiled[T]

    def run(self, batch: dict) -> dict:
        """One step; waits for it and returns its metrics."""
        self.state, metrics = self.program(batch)(self.state, batch)
        return jax.block_until_ready(metrics)

    def timed(self, batches: Iterator[dict], n: int) -> list[dict]:
        """n steps, one behind another as in training: {"seconds", "waited" for the batch, "T"} of each.

        A step that compiles, and the WARM_UP steps after it, are taken but not counted.
        """
        out, cold, ahead, mark = [], WARM_UP, None, time.perf_counter()
        while len(out) < n:
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            T = batch["ids"].shape[-1] if "ids" in batch else self.cfg.text.max_len
            cold = WARM_UP + 1 if T not in self.compiled else cold
            self.state, values = self.program(batch)(self.state, batch)
            jax.block_until_ready(ahead or values)  # at most one step is in flight while the next batch is fetched
            ahead, before, mark = values, mark, time.perf_counter()
            if cold:
                cold -= 1
            else:
                out.append({"seconds": mark - before, "waited": waited, "T": T})
        values = jax.device_get(ahead)
        if not np.isfinite(values["loss"]):
            raise ValueError(f"the step gave a loss of {values['loss']}: its time would not be that of training")
        return out


def step_flops(cfg, T: int) -> float:
    """FLOPs per pair of the step for texts of T positions."""
    return tasks.of(cfg).flops(cfg, T=T)["step"]


def coco(rng: np.random.Generator, n: int) -> np.ndarray:
    """i64[n]: text positions drawn from COCO."""
    counts = np.array(list(COCO.values()))
    return rng.choice(list(COCO), size=n, p=counts / counts.sum())


def shares(cfg) -> dict[int, float]:
    """T -> share of the batches that are so long: of COCO-like texts, in windows of `text.bucket_window` batches."""
    if not len(cfg.text.buckets):
        return {cfg.text.max_len: 1.0}
    rng, Ts = np.random.default_rng(cfg.seed), []
    for _ in range(WINDOWS):
        texts = np.minimum(coco(rng, cfg.text.bucket_window * cfg.train.batch), cfg.text.max_len)
        Ts += windows.cut(texts, cfg.train.batch, cfg.text.buckets)[1].tolist()
    return {T: Ts.count(T) / len(Ts) for T in sorted(set(Ts))}


def random_batch(cfg, T: int, longest: int | None = None) -> dict[str, np.ndarray]:
    """A global batch as the task's `shapes` say: uniform pixels, random ids in texts of T positions.

    At most `longest` positions of a text are real.

    Texts are i32 arrays whose last dimension is positions, masks bool ones; numbers of examples count up, weights are
    equal.
    """
    rng = np.random.default_rng(cfg.seed)
    real = np.clip(coco(rng, cfg.train.batch), 3, longest or T)
    out = {}
    for name, (shape, dtype) in tasks.of(cfg).shapes(cfg).items():
        kind, is_text = np.dtype(dtype), len(shape) > 1
        if shape[-1] == cfg.text.max_len and name in TEXT_ENTRIES:
            shape = (*shape[:-1], T)
        if is_text:
            mask = np.broadcast_to(np.arange(shape[-1]) < real.reshape(-1, *(1,) * (len(shape) - 1)), shape)

        if kind == np.uint8:
            out[name] = rng.integers(0, 256, shape).astype(np.uint8)
        elif kind == np.bool_:
            out[name] = np.array(mask) if is_text else rng.integers(0, 2, shape).astype(bool)
        elif kind == np.int32:
            tokens = rng.integers(5, config.text_side(cfg.model).vocab_size - 2, shape)
            out[name] = (np.where(mask, tokens, 0) if is_text else np.arange(len(tokens))).astype(np.int32)
        else:
            out[name] = np.full(shape, 1 / shape[-1], dtype)
    return out


def run(
    cfgs: list, settings: Settings, command: str, out: str = "", say: Callable = console.say, peer: Any = None
) -> dict:
    """Measures the training step of each config, says it, writes JSON to `out` where given; returns what is in it.

    A peer does the same step on one device: peer.configs(cfgs, settings) are ours as both run them, and peer.measure
    takes the place of `measure`. ValueError: the config does not fit the devices, real input that is not there, fewer
    cores than threads, an output folder that does not exist, or a peer that is not the same model.
    """
    throughput.limit_threads(settings.threads)
    throughput.check_out(out, settings.trace)
    cfgs = peer.configs(cfgs, settings) if peer else cfgs
    for cfg in cfgs:
        tasks.validate(cfg, None, jax.process_count(), 1 if peer else jax.device_count())
    result = {
        "command": command,
        "workload": "train",
        "settings": settings._asdict(),
        **throughput.about(),
        "cases": [],
    }
    say(throughput.headline(result, settings.threads))
    if note := throughput.memory_note():
        say(note)
    for cfg in cfgs:
        case = (peer.measure if peer else measure)(cfg, settings, say)
        result["cases"].append(case | {"memory": throughput.peak_memory(), "config": plain(cfg)})
        throughput.write(out, result)  # after each, so that a run that is stopped leaves what it has
    return result


def measure(cfg, settings: Settings, say: Callable) -> dict:
    """The case of one config: figures of each text length and of all."""
    mesh = sharding.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        program = Program(cfg, mesh)
        say(describe(program))
        with _batches(program, settings) as streams:
            seen, share = [], {}
            for part, batches in streams:
                found = program.timed(batches, settings.steps)
                seen += found
                share |= {T: part for T in {s["T"] for s in found}} if part else {}
            if settings.trace:
                profile(program, streams[-1][1], settings.trace, say)
    return figures(program, seen, share, say)


@contextlib.contextmanager
def _batches(program: Program, settings: Settings):
    """What is fed: [(share of the batches, iterator of batches on the mesh)], one for each text length.

    For real data one, whose share is None.
    """
    cfg = program.cfg
    if settings.input == "synthetic":
        share = shares(cfg)
        yield [(part, forever(program.place(random_batch(cfg, T)))) for T, part in share.items()]
        return
    tokenizer = tokenizers.of_config(cfg)
    tasks.validate(cfg, tokenizer, jax.process_count(), jax.device_count())
    with tempfile.TemporaryDirectory() as folder:
        micro = cfg.train.batch // cfg.optim.accumulate
        rows, _ = sharding.rows(program.mesh, micro)
        data = TrainData(
            cfg,
            tokenizer,
            tasks.of(cfg),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            rows=rows,
            skipped_path=pathlib.Path(folder) / "skipped.jsonl",
        )
        with contextlib.closing(data.batches(0)) as batches:
            yield [(None, (to_devices(x, program.mesh, cfg.optim.accumulate, rows, micro) for x in batches))]


def forever(batch: dict) -> Iterator[dict]:
    """The same batch again and again."""
    while True:
        yield batch


def profile(program: Program, batches: Iterator[dict], folder: str, say: Callable) -> None:
    """A trace of a few steps."""
    program.timed(batches, 1)  # whatever has to be compiled
    with throughput.trace(folder, say):
        for _ in range(throughput.TRACED):
            program.run(next(batches))


def figures(program: Program, seen: list[dict], share: dict[int, float], say: Callable) -> dict:
    """The case: `throughput.figures` of each text length, and of all, weighed by `share` (empty: as they came)."""
    cfg, devices, texts = program.cfg, program.mesh.size, {}
    for T in sorted({s["T"] for s in seen}):
        own = [s["seconds"] for s in seen if s["T"] == T]
        texts[T] = {
            "share": share.get(T, len(own) / len(seen)),
            **program.about[T],
            **throughput.figures(own, cfg.train.batch, step_flops(cfg, T), devices),
        }
        say(
            f"texts of {T} positions, {100 * texts[T]['share']:.0f} % of the batches: {throughput.words(texts[T])}; "
            f"compiled in {texts[T]['compile_s']:.1f} s"
        )
    step = sum(t["share"] * statistics.mean(t["step_s"]["all"]) for t in texts.values())
    total = throughput.rates(
        cfg.train.batch / step, sum(t["share"] * step_flops(cfg, T) for T, t in texts.items()), devices
    )
    waiting = sum(s["waited"] for s in seen) / sum(s["seconds"] for s in seen)
    say(f"all: {throughput.rate_words(total)}; waiting for data {100 * waiting:.1f} % of the time")
    return {
        "objective": cfg.objective,
        "dtype": cfg.model.dtype,
        "batch": cfg.train.batch,
        "mesh": dict(program.mesh.shape),
        "texts": texts,
        **total,
        "waiting": waiting,
        "state_bytes": state_bytes(program.shapes),
    }


def describe(program: Program) -> str:
    """Sizes of the run in one line."""
    cfg = program.cfg
    trained, frozen = (
        sum(x.size for _, x in trees.paths(tree)) for tree in (program.shapes.params, program.shapes.frozen)
    )
    v, llm = cfg.model.vit, cfg.model.get("llm")
    behind = f", {llm.kind.upper()} of {llm.layers} layers and width {llm.width}" if llm else ""
    held = f", {frozen:,} of them frozen" if frozen else ""
    return (
        f"{cfg.objective}, ViT of {v.depth} layers and width {v.width}{behind}, {cfg.model.img_size} px, batch "
        f"{cfg.train.batch}, texts of at most {cfg.text.max_len} positions, {cfg.model.dtype}, mesh "
        f"{dict(program.mesh.shape)}; {trained + frozen:,} parameters{held}, state "
        f"{state_bytes(program.shapes) / 1e9:.2f} GB"
    )


def state_bytes(tree) -> int:
    """Bytes of all arrays of a state, random keys left out."""
    return sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )
