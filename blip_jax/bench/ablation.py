"""What each lever of the pre-training step is worth: `python -m blip_jax.bench.ablation --size=base --batch=4`.

The base is the step that trains; every other row is that step with ONE thing done differently, as the PyTorch original
does it or as JAX offers it. The product has no switches for this: what has no leaf in the config is put in its place
here, while the step is traced. All rows start from one state and batch, without dropout, so their metrics must be the
base's; then they take turns. With --topology=v5e:2x2 the rows are compiled for TPUs that need not be here
(`bench/aot.py`), and nothing is run; with --rounds=0 their FLOPs are counted, and nothing is compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import time
from typing import Any, Callable, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip_jax import losses
from blip_jax.bench import throughput, train
from blip_jax.models import blip, flops
from blip_jax.models.blip import Blip
from blip_jax.models.layers import attention, norm
from blip_jax.models.text import med
from blip_jax.models.text.med import Med, PostNormAttention
from blip_jax.models.vision import vit
from blip_jax.parallel import sharding
from blip_jax.parallel.collectives import within_cells
from blip_jax.plan import aot, chips, hlo
from blip_jax.tasks import step as steps
from blip_jax.train import state as train_state
from blip_jax.train.optim import make

LIMIT = 1e-4  # relative difference of a metric from the base's, where the precision is the same and float32
TEXT = 16  # positions of the texts that hold words; the batch is padded to cfg.text.max_len


class Settings(NamedTuple):
    """What is measured."""

    size: str = "small"  # of blip_jax.config
    img_size: int = 224
    batch: int = 4
    dtype: str = "float32"
    rounds: int = 3  # in which all rows take turns; 0: FLOPs alone, nothing is compiled
    threads: int = 0  # on a CPU; 0: all cores
    topology: str = ""  # of TPUs to compile for, as v5e:2x2; "": the devices that are here


class Row(NamedTuple):
    """The step with one thing changed."""

    lever: str
    instead: str  # what is done
    config: tuple = ()  # ((leaf of cfg.model, value), ...)
    patch: Callable = contextlib.nullcontext  # entered while the step is traced
    donate: bool = True
    cut: int = 0  # positions the texts are cut to; 0: none
    same: bool = True  # the arithmetic is that of the base, to rounding of its dtype


BASE = Row("the step", "as it trains")
AGAIN = Row("the step", "the same program, measured again")


class StatesAsKv(Med):
    """MED whose image keys and values are the image's states: each pass projects them for itself."""

    def image_kv(self, img_tok):
        return ((img_tok,),) * self.layers


class ProjectsAgain(PostNormAttention):
    """Cross-attention that projects keys and values for each text group, of the image that the group looks at, as
    the original does."""

    def cross_attention(self, x, kv, kv_mask, img_idx, deterministic):
        queries = self.project_q(x).reshape(len(kv[0]), len(img_idx), x.shape[1], self.heads, -1)
        outs = []
        for g, idx in enumerate(img_idx):
            states = jax.lax.optimization_barrier(kv[0])  # else XLA finds that the groups project the same
            states = states if idx is None else within_cells(states, idx)
            outs.append(attention.attention(queries[:, g], *self.project_kv(states)))
        y = jnp.stack(outs, axis=1).reshape(*x.shape[:2], self.heads, -1)
        return self._close(x, y, deterministic)


class EveryPosition(Med):
    """MED whose last layer computes all positions where only the first is read."""

    def __call__(self, *args, first_only: bool = False, **kwargs):
        return super().__call__(*args, **kwargs)


def three_passes(apply, ids, txt_mask, kv, neg_img, neg_txt, group_size, dropout):
    """`steps._matching` with a pass for each of its three groups."""
    one = functools.partial(apply, method="match", deterministic=False, rngs=dropout("match"))
    of_cell = losses.grouped(neg_img, group_size) % (group_size or len(ids))
    logits = [
        one(ids, txt_mask, kv, img_idx=(None,)),
        one(ids[neg_txt], txt_mask[neg_txt], kv, img_idx=(None,)),
        one(ids, txt_mask, kv, img_idx=(of_cell,)),
    ]
    labels = jnp.repeat(jnp.array([1, 0, 0]), len(ids))
    counted = jnp.concatenate([jnp.ones(len(ids), bool), neg_txt >= 0, neg_img >= 0])
    return losses.itm(jnp.concatenate(logits), labels, counted.astype(jnp.float32))


def repeated_kv(q, k, v, img_idx, drop=None, kv_mask=None):
    """`grouped_cross_attention` that repeats keys and values for each text."""
    repeat = lambda x: jnp.stack([x if i is None else within_cells(x, i) for i in img_idx], 1).reshape(-1, *x.shape[1:])
    return attention.attention(q, repeat(k), repeat(v))


def library_attention(implementation, q, k, v, mask=None, drop=None):
    """`attention` by jax.nn; dropout, which is off here, it does not have."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)


def logits_of_all(self, ids, txt_mask, kv, *, deterministic=True):
    """`Blip.lm_logits` that also computes the last position, which predicts nothing."""
    txt_tok = self.med(ids.at[:, 0].set(self.dec_id), txt_mask, kv=kv, causal=True, deterministic=deterministic)
    return self.med.lm_logits(txt_tok)[:, :-1]


def whole_log_softmax(logits, targets, vocab_size):
    """`losses._cross_entropy` from the log-probability of every word."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return nll, -jnp.sum(log_p, axis=-1, where=jnp.arange(log_p.shape[-1]) < vocab_size) / vocab_size


def library_gelu(x):
    """`pointwise.gelu` by jax.nn: erfc, and its gradient keeps four arrays."""
    return jax.nn.gelu(x, approximate=False)


def library_softmax(s, dtype):
    """`pointwise.softmax` with the derivative that jax finds."""
    return jax.nn.softmax(s, axis=-1).astype(dtype)


def derived_layer_norm(x, scale, bias, eps, dtype):
    """`pointwise._layer_norm` with the derivative that jax finds."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (centred * (rstd * scale) + bias).astype(dtype)


def float32_momentum(model, *args):
    """`steps._contrastive` with the momentum pass, all that it runs of the model, in float32."""
    return _CONTRASTIVE(model.clone(dtype=jnp.float32), *args)


_CONTRASTIVE = steps._contrastive


def put(**places) -> Callable:
    """A patch: put(name=(owner, what), ...) sets attributes `name` of owners while it is entered."""

    @contextlib.contextmanager
    def patch():
        with contextlib.ExitStack() as stack:
            for name, changes in places.items():
                for owner, what in changes:
                    stack.enter_context(mock.patch.object(owner, name, what))
            yield

    return patch


def rows(cfg) -> list[Row]:
    """The base, then every lever that this device and dtype have."""
    other = "bfloat16" if cfg.model.dtype == "float32" else "float32"
    library = lambda name: put(
        attention=[(m, functools.partial(library_attention, name)) for m in (attention, vit, med)]
    )
    out = [
        BASE,
        AGAIN,
        Row(
            "image keys and values once",
            "again for each of the four passes",
            patch=put(Med=[(blip, StatesAsKv)], PostNormAttention=[(med, ProjectsAgain)]),
        ),
        Row("one matching pass", "three", patch=put(_matching=[(steps, three_passes)])),
        Row(
            "matching groups share an image's keys",
            "repeated for each text",
            patch=put(grouped_cross_attention=[(med, repeated_kv)]),
        ),
        Row("last matching layer at [ENC] alone", "at all positions", patch=put(Med=[(blip, EveryPosition)])),
        Row("LM head where a word follows", "at all positions", patch=put(lm_logits=[(Blip, logits_of_all)])),
        Row(
            "vocabulary loss from log-sum-exp",
            "from all log-probabilities",
            patch=put(_cross_entropy=[(losses, whole_log_softmax)]),
        ),
        Row("text length by batch", f"here {TEXT} positions, not {cfg.text.max_len}", cut=TEXT),
        Row(
            "pointwise gradients keep little",
            "jax's own",
            patch=put(
                gelu=[(m, library_gelu) for m in (attention, med)],
                softmax=[(attention, library_softmax)],
                _layer_norm=[(norm, derived_layer_norm)],
            ),
        ),
        *(Row("remat: none", remat, config=(("remat", remat),)) for remat in ("dots", "full")),
        Row("ViT scanned", "unrolled", patch=put(scan=[(nn, functools.partial(nn.scan, unroll=cfg.model.vit.depth))])),
        Row("attention: ours", "jax.nn, XLA", patch=library("xla")),
        Row("state donated", "kept", donate=False),
        Row(f"compute in {cfg.model.dtype}", other, config=(("dtype", other),), same=False),
    ]
    if cfg.model.dtype == "bfloat16":
        out.append(
            Row("momentum pass in bfloat16", "float32", patch=put(_contrastive=[(steps, float32_momentum)]), same=False)
        )
        if jax.default_backend() == "gpu":
            out.append(Row("attention: ours", "jax.nn, cuDNN", patch=library("cudnn")))
    return out


def configured(settings: Settings):
    """The paper's pre-training of the size, without dropout; wide enough at the start for pictures to matter."""
    cfg = train.sized(settings.size, "pretrain", settings.img_size, settings.dtype, settings.batch)
    with cfg.unlocked():
        cfg.model.update(dropout=0.0, drop_path=0.0, init_std=0.6 * cfg.model.med.width**-0.5)
    return cfg


def trace(cfg, row: Row, mesh, shapes, batch: dict):
    """(the step of a row, traced; GFLOP per pair in it)"""
    cfg = cfg.copy_and_resolve_references()
    with cfg.unlocked():
        cfg.model.update(dict(row.config))
    tx, _ = make(cfg, train.EPOCH_STEPS)
    step = jax.jit(
        steps.make_step(cfg, Blip.from_config(cfg.model), tx, train.EPOCH_STEPS),
        donate_argnums=0 if row.donate else (),
        out_shardings=(sharding.shardings_for(shapes, mesh), None),
    )
    with row.patch():
        traced = step.trace(shapes, cut(batch, row))
    return traced, flops.count_jaxpr(traced.jaxpr) / cfg.train.batch / 1e9


def program(cfg, row: Row, mesh, shapes, batch: dict) -> tuple[Any, dict]:
    """(the compiled step of a row, {"gflop" per pair in the traced program, and of one device "temporary_bytes",
    ...})"""
    traced, gflop = trace(cfg, row, mesh, shapes, batch)
    start = time.perf_counter()
    compiled = traced.lower().compile()
    memory, known = compiled.memory_analysis(), {"compile_s": time.perf_counter() - start}
    if mesh.devices.flat[0].platform == "tpu":  # the schedule of a CPU says nothing of memory traffic
        known["traffic_bytes"] = hlo.traffic(compiled.as_text())
    return compiled, {
        "gflop": gflop,
        "temporary_bytes": memory.temp_size_in_bytes,
        "extra_output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        **known,
    }


def cut(batch: dict, row: Row) -> dict:
    """The batch, or its shapes, with texts cut as the row asks for."""

    def one(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((x.shape[0], row.cut), x.dtype, sharding=x.sharding)
        return x[:, : row.cut]

    return batch if not row.cut else batch | {name: one(batch[name]) for name in ("ids", "txt_mask")}


def check(row: Row, found: dict, base: dict, dtype: str) -> float:
    """The largest relative difference of a row's metrics from the base's. ValueError: it should be the same step
    and is not."""
    off = max(abs(found[name] - base[name]) / max(abs(base[name]), 1e-3) for name in base)
    if row.same and dtype == "float32" and not off <= LIMIT or off != off:
        raise ValueError(
            f"{row.lever}: {row.instead}: its metrics {found} are not those of the base, {base}: it is not the same step, "
            "and its time means nothing"
        )
    return off


def run(settings: Settings, command: str, out: str = "", say: Callable = print, only: list[Row] | None = None) -> dict:
    """Measures all rows (or `only` these; the first is the base), says the table, writes JSON to `out`; returns what is
    in it.

    ValueError: a row that should be the same step has other metrics.
    """
    throughput.limit_threads(settings.threads)
    throughput.check_out(out)
    cfg = configured(settings)
    result = {"command": command, "workload": "ablation", "settings": settings._asdict(), **throughput.about()}
    say(throughput.headline(result, settings.threads))
    if settings.topology:
        topology = chips.topology(settings.topology)
        mesh = aot.tpu_mesh(topology, (topology.devices, 1, 1))
    else:
        mesh = sharding.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        todo, rounds = only or rows(cfg), settings.rounds
        result["rows"] = (
            measure(cfg, mesh, todo, rounds, say)
            if rounds and not settings.topology
            else look(cfg, mesh, todo, bool(settings.topology), say)
        )
    throughput.write(out, result)
    say(table(result["rows"]))
    return result


def state_and_batch(cfg, mesh) -> tuple[Callable, Any, dict]:
    """(create: key -> TrainState, shapes of the state on the mesh, the batch as numpy arrays)"""
    model, (tx, _) = Blip.from_config(cfg.model), make(cfg, train.EPOCH_STEPS)
    create = functools.partial(train_state.create, cfg, model, tx)
    # on the devices of a topology nothing can be computed
    shapes = jax.eval_shape(lambda: create(jax.random.key(cfg.seed)))
    where = sharding.shardings_for(shapes, mesh)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    batch = train.random_batch(cfg, cfg.text.max_len, longest=TEXT)
    return jax.jit(create, out_shardings=where), shapes, {name: batch[name] for name in ("img", "ids", "txt_mask")}


def look(cfg, mesh, todo: list[Row], compiled: bool, say: Callable) -> list[dict]:
    """What is known of each row without running it: FLOPs, and what the compiler makes of it for the devices of
    `mesh`, if `compiled`."""
    _, shapes, batch = state_and_batch(cfg, mesh)
    place = sharding.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in batch.items()}
    found = []
    for row in todo:
        if row is AGAIN:
            continue
        known = (
            program(cfg, row, mesh, shapes, batch)[1]
            if compiled
            else {"gflop": trace(cfg, row, mesh, shapes, batch)[1]}
        )
        say(f"{row.lever}: {row.instead}: " + ", ".join(f"{k} {v:.4g}" for k, v in known.items()))
        found.append({"lever": row.lever, "instead": row.instead, **known})
    return found


def measure(cfg, mesh, todo: list[Row], rounds: int, say: Callable) -> list[dict]:
    """What is known of each row: counts of its program, difference of its metrics, seconds of its steps."""
    create, shapes, batch = state_and_batch(cfg, mesh)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))

    ready, found, state = [], [], None
    for row in todo:
        state = None  # or there are two of them
        if row is AGAIN:
            compiled, known = ready[0][0], {}
        else:
            compiled, known = program(cfg, row, mesh, shapes, batch)
            jax.clear_caches()  # what was traced is not needed again; memory still grows by some 0.7 GB a row for ViT-B
        state = create(jax.random.key(cfg.seed))
        state = state.replace(step=state.step + 2 * train.EPOCH_STEPS)  # where soft targets have their full weight
        state, metrics = compiled(state, cut(batch, row))
        metrics = {k: float(v) for k, v in metrics.items()}
        off = check(row, metrics, found[0]["metrics"] if found else metrics, cfg.model.dtype)
        found.append(
            {
                "lever": row.lever,
                "instead": row.instead,
                **known,
                "metrics": metrics,
                "difference": off,
                "same": row.same,
                "seconds": [],
                "cpu_seconds": [],
            }
        )
        ready.append((compiled, cut(batch, row)))
        say(
            f"{row.lever}: {row.instead}: "
            + ", ".join(f"{k} {v:.4g}" for k, v in known.items())
            + f"; differs by {off:.1e}"
        )
    for i in range(rounds):
        for (compiled, own), known in zip(ready, found):
            wall, cpu = time.perf_counter(), time.process_time()
            state, _ = jax.block_until_ready(compiled(state, own))
            known["seconds"].append(time.perf_counter() - wall)
            known["cpu_seconds"].append(time.process_time() - cpu)
        say(f"round {i + 1} of {rounds}: " + ", ".join(f"{k['seconds'][-1]:.3g}" for k in found) + " s")
    return found


def table(found: list[dict]) -> str:
    """Each row against the base: FLOPs, memory, and time and metrics where it was run."""
    base = found[0]
    amounts = {
        "gflop": ("GFLOP a pair", 1.0),
        "temporary_bytes": ("temporaries GB", 1e9),
        "traffic_bytes": ("memory traffic GB", 1e9),
    }
    amounts = {name: of for name, of in amounts.items() if name in base}
    times = {
        name: title
        for name, title in (("seconds", "time / base"), ("cpu_seconds", "CPU time / base"))
        if base.get(name)
    }

    def cells(row):
        of_base = [
            f"{row[name] / unit:.4g} ({row[name] / base[name]:.2f})" if name in row else "-"
            for name, (_, unit) in amounts.items()
        ]
        median = lambda name: statistics.median(a / b for a, b in zip(row[name], base[name], strict=True))
        return [
            row["lever"],
            row["instead"],
            *of_base,
            *(f"{median(name):.2f}" for name in times),
            *([f"{row['difference']:.0e}"] if "difference" in row else []),
        ]

    head = [
        "lever",
        "instead",
        *(title for title, _ in amounts.values()),
        *times.values(),
        *(["metrics differ"] if "difference" in base else []),
    ]
    return throughput.markdown(head, [cells(row) for row in found])


def main(argv: list[str]) -> None:
    """The command line."""
    default, parser = Settings(), argparse.ArgumentParser(prog="python -m blip_jax.bench.ablation")
    for name, kind in (
        ("size", str),
        ("img_size", int),
        ("batch", int),
        ("dtype", str),
        ("rounds", int),
        ("threads", int),
        ("topology", str),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(default, name))
    parser.add_argument("--out", default="", help="JSON file to write")
    args = vars(parser.parse_args(argv))
    out = args.pop("out")
    needed = aot.environment_of_compiler()
    if args["topology"] and not needed.items() <= os.environ.items():  # libtpu reads it before jax starts
        if not aot.installed():
            raise ValueError(aot.MISSING)
        os.execve(sys.executable, [sys.executable, "-m", "blip_jax.bench.ablation", *argv], os.environ | needed)
    run(Settings(**args), " ".join(["python -m blip_jax.bench.ablation", *argv]), out)


if __name__ == "__main__":
    main(sys.argv[1:])
