"""The training step beside the same step in PyTorch, in one run in which they take turns; torch_step.py is the peer.

Both start from the same parameters, see the same pictures and texts, and their losses must agree before anything is
timed. The peer pads texts to `text.max_len`, as the original does; ours does the same, and with `text.buckets` also
cuts them to each length.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_step

from blip_jax import tasks
from blip_jax.bench import throughput, train
from blip_jax.convert.apply import to_torch
from blip_jax.models import flops
from blip_jax.models.vision.vit import normalize_pixels
from blip_jax.parallel import sharding
from blip_jax.tasks import build
from blip_jax.tasks.step import Keys
from blip_jax.train import state as train_state

LIMIT = {"float32": 1e-4, "bfloat16": 5e-2}  # largest difference of a loss


class Peer:
    """The step in PyTorch, as `blip_jax.bench.train.run` takes a peer. `compiled`: through torch.compile."""

    def __init__(self, name: str, compiled: bool, rounds: int):
        self.name, self.compiled, self.rounds = name, compiled, rounds

    def configs(self, cfgs: list, settings) -> list:
        """The configs on one device. ValueError: what cannot be compared, before anything is built."""
        check(cfgs, settings)
        return [one_device(cfg) for cfg in cfgs]

    def measure(self, cfg, settings, say: Callable) -> dict:
        """The case of one config of `configs`: figures of both sides, and how many times as fast ours is."""
        if settings.threads:
            torch.set_num_threads(settings.threads)
        torch.backends.cuda.matmul.allow_tf32 = True  # as JAX multiplies float32 on a GPU by default
        mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
        share, longest = train.shares(cfg), cfg.text.max_len

        with jax.set_mesh(mesh):
            program = train.Program(cfg, mesh)
            say(train.describe(program))
            peer = stepping(program, self.compiled)
            agreement = agree(program, peer, sorted({min(share), longest}), say)

            whole = train.random_batch(cfg, longest, longest=min(share))  # texts that fit every length
            theirs = peer.batch(whole["img"], whole["ids"], whole["txt_mask"])
            jobs = {self.name: functools.partial(wait, peer, theirs)}
            for T in sorted({*share, longest}, reverse=True):
                jobs[f"ours, {T} positions"] = functools.partial(program.run, program.place(cut(whole, T)))
            _, times = throughput.rounds(jobs, self.rounds, say)

            if settings.trace:
                train.profile(program, train.forever(program.place(whole)), settings.trace, say)
        return figures(program, times, share, self.name, say) | {"agreement": agreement}


def stepping(program: train.Program, compiled: bool) -> torch_step.Step:
    """The PyTorch step that starts from the program's state, on the same device."""
    host = lambda tree: jax.tree.map(np.asarray, tree)
    state = {"params": host(program.state.all_params), "momentum": host(program.state.extra)}
    tensors = to_torch("pretrain", state, vocab_size=program.cfg.model.med.vocab_size, consume=True)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return torch_step.Step(program.cfg, tensors, device, compiled, program.cfg.model.dtype)


def check(cfgs: list, settings) -> None:
    """ValueError: what cannot be compared."""
    if found := [problem for cfg in cfgs for problem in problems(cfg)]:
        raise ValueError(
            "the PyTorch step is the original's on one device, which this config is not: " + "; ".join(found)
        )
    if settings.input != "synthetic":
        raise ValueError(f"--input={settings.input}: both sides take turns on the same batch; leave --input away")
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes: the PyTorch step runs on one device; start one process")
    backend = jax.default_backend()
    if backend not in ("cpu", "gpu"):
        raise ValueError(f"PyTorch must run on the same device, which is a {backend}: use a CPU or a GPU")
    if backend == "gpu" and os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() not in ("0", "false"):
        raise ValueError("JAX has taken most of the GPU's memory for itself: set XLA_PYTHON_CLIENT_PREALLOCATE=false")


def problems(cfg) -> list[str]:
    """What this config asks that the original's step on one device does not do."""
    wanted = {
        "objective": (cfg.objective, "pretrain"),
        "loss.momentum": (cfg.loss.momentum, True),
        "loss.smoothing_over": (cfg.loss.smoothing_over, "valid"),
        "optim.accumulate": (cfg.optim.accumulate, 1),
        "optim.decay_mask": (cfg.optim.decay_mask, "all"),
        "optim.clip": (cfg.optim.clip, 0.0),
        "optim.freeze": (tuple(cfg.optim.freeze), ()),
    }
    found = [f"{name} is {value!r}, must be {want!r}" for name, (value, want) in wanted.items() if value != want]
    if cfg.loss.queue < 1:
        found.append("loss.queue is 0, must be a multiple of the batch")
    if cfg.loss.group_size not in (0, cfg.train.batch):
        found.append(f"loss.group_size is {cfg.loss.group_size}, must be 0 or the batch")
    return found


def figures(program, times: dict[str, list], share: dict[int, float], peer: str, say: Callable) -> dict:
    """The case: seconds and rates of the peer, of ours padded and of ours with buckets, and the ratios within
    rounds."""
    cfg, longest = program.cfg, program.cfg.text.max_len
    one = lambda seconds, count: throughput.figures(seconds, cfg.train.batch, count)
    ours = {T: times[f"ours, {T} positions"] for T in {*share, longest}}
    sides = {
        peer: one(times[peer], flops.pretrain_step(cfg, original=True)["step"]),
        "ours": one(ours[longest], train.step_flops(cfg, longest)),
    }
    texts = {
        T: {"share": share.get(T, 0.0), **program.about[T], **one(ours[T], train.step_flops(cfg, T))}
        for T in sorted(ours)
    }
    if len(cfg.text.buckets):
        mixed = [sum(share[T] * ours[T][i] for T in share) for i in range(len(times[peer]))]
        sides["ours with buckets"] = one(mixed, sum(part * train.step_flops(cfg, T) for T, part in share.items()))
    ratios = {
        name: throughput.ratio(times[peer], found["step_s"]["all"]) for name, found in sides.items() if name != peer
    }
    for name, found in sides.items():
        say(
            f"{name}: {throughput.words(found)}"
            + (f"; {ratios[name]:.2f} times as fast as {peer}" if name in ratios else "")
        )
    return {
        "objective": cfg.objective,
        "dtype": cfg.model.dtype,
        "batch": cfg.train.batch,
        "mesh": dict(program.mesh.shape),
        "peer": peer,
        "sides": sides,
        "ours_over": ratios,
        "texts": texts,
        "state_bytes": train.state_bytes(program.shapes),
    }


def agree(program, peer, Ts: list[int], say: Callable) -> dict:
    """Both sides' losses without dropout on one batch with the same negatives, ours for texts of each of `Ts`
    positions.

    ValueError: one differs by more than LIMIT.
    """
    cfg = copy.deepcopy(program.cfg)
    with cfg.unlocked():
        cfg.model.update(dropout=0.0, drop_path=0.0)
    batch = train.random_batch(cfg, max(Ts), longest=min(Ts))
    theirs = peer.evaluate(peer.batch(batch["img"], batch["ids"], batch["txt_mask"]), cfg.loss.alpha)
    found = {"limit": LIMIT[cfg.model.dtype], "torch": theirs}
    ours = jax.jit(functools.partial(_losses, cfg, build(cfg)))
    for T in Ts:
        mine = {name: float(x) for name, x in ours(program.state, program.place(cut(batch, T))).items()}
        found[f"ours, {T} positions"] = mine
        for name, x in theirs.items():
            if not abs(mine[name] - x) <= found["limit"]:
                raise ValueError(
                    f"the PyTorch step with our parameters is not our step: {name} is {x:.6g}, ours for texts of {T} "
                    f"positions {mine[name]:.6g}; times would not be comparable"
                )
    say(
        f"losses agree within "
        f"{max(abs(found[f'ours, {T} positions'][n] - x) for T in Ts for n, x in theirs.items()):.2g}: "
        + ", ".join(f"{name} {x:.5f}" for name, x in theirs.items())
    )
    return found


def _losses(cfg, model, state: train_state.TrainState, batch: dict) -> dict:
    """Our losses of a batch, each row's negative being the next row's text or image."""

    def following(key, weights, first_row):
        return jnp.roll(jnp.arange(cfg.train.batch, dtype=jnp.int32), -1)

    task = tasks.of(cfg)
    _, extra = task.before(cfg, state, train.EPOCH_STEPS)
    extra |= {"alpha": jnp.float32(cfg.loss.alpha)}
    batch = batch | {"img": normalize_pixels(batch["img"])}
    keys = Keys(jax.random.key(0), jax.random.key(1), 0, following)
    _, (metrics, _) = task.loss(model, cfg, state.all_params, extra, batch, keys)
    return {name: x for name, x in metrics.items() if name.startswith("loss_")}


def cut(batch: dict, T: int) -> dict:
    """The batch with texts of T positions. ValueError: one is longer."""
    if batch["txt_mask"][:, T:].any():
        raise ValueError(f"a text has {batch['txt_mask'].sum(1).max()} positions: it does not fit into {T}")
    return {name: x[:, :T] if name in ("ids", "txt_mask", "lm_mask") else x for name, x in batch.items()}


def one_device(cfg):
    """The config on one device, whatever its mesh."""
    cfg = copy.deepcopy(cfg)
    with cfg.unlocked():
        cfg.mesh.update(data=1, fsdp=1, tensor=1)
    return cfg


def wait(peer: torch_step.Step, batch: tuple) -> None:
    """One step of the peer, until it is done."""
    peer(batch, peer.cfg.loss.alpha, peer.cfg.optim.warmup_lr)
    if peer.device == "cuda":
        torch.cuda.synchronize()
