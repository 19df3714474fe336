"""Images per second of the vision tower, `blip-jax bench encode`, of CapFilt's filter, `blip-jax bench filter`, of
answering by rank, `blip-jax bench rank`, and of a round of Visual Dialog, `blip-jax bench dialog`.

Random weights and pixels; the filter scores `texts` texts of each image by matching and cosine; of `candidates` answers
to a question about each image `k` are scored in full; a dialog has `texts` options, each read with its history.
benchmarks/against.py sets the first two beside transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax import config, tasks
from blip_jax.bench import throughput
from blip_jax.inference import programs
from blip_jax.models import flops, initial
from blip_jax.models.layers.dense import rounded
from blip_jax.parallel import sharding
from blip_jax.tasks import dialog


class Settings(NamedTuple):
    """What is measured. Every combination of img_sizes (pixels) and dtypes; the rest holds for all."""

    workload: str = "encode"  # or "filter", "rank" or "dialog"
    size: str = "base"  # a size of blip_jax.config
    img_sizes: tuple = (224, 384)
    dtypes: tuple = ("float32", "bfloat16")
    batch: int = 8  # images per device
    texts: int = 2  # filter: per image, as CapFilt's, one of the web and one of the captioner; dialog: options
    positions: int = 30  # filter, dialog: of each text; rank: of the question
    caption: int = 40  # dialog: positions of the picture's caption
    candidates: int = 3128  # rank: answers, the published list's
    k: int = 128  # rank: of them scored in full
    answer: int = 8  # rank: positions of the longest answer, [DEC] and [SEP] among them
    rounds: int = 5
    threads: int = 0  # of each side on a CPU; 0: all cores
    trace: str = ""  # folder for a profile


class Ours:
    """The model of one image size and dtype with random weights, and its job.

    `job`: (weights, batch) -> outputs, not yet jitted.
    """

    def __init__(self, settings: Settings, img_size: int, dtype: str):
        cfg = config.base(settings.size)
        cfg.objective = {"rank": "vqa", "dialog": "dialog"}.get(settings.workload, "retrieval")
        cfg.model.update(img_size=img_size, dtype=dtype)
        self.settings, self.config, self.model = settings, cfg.model, tasks.build(cfg)
        params = jax.jit(lambda: initial.init_params(cfg, self.model, jax.random.key(0)))()
        gain = 50 / cfg.model.vit.width**0.5  # so that pictures matter: matrices with deviation 0.02 change little
        self.params = initial.magnified(params, gain)
        self.weights = rounded(self.params, dtype)

    def job(self, weights, batch: dict) -> dict:
        """{"states": [B,P,D]}, {"itm", "itc": f32[B,G]}, {"candidate": i32[B,k], "score": f32[B,k]}, or {"score":
        f32[B,G]}
        """
        if self.settings.workload == "encode":
            return {"states": programs.encode_pixels(self.model, weights, batch["img"])}
        if self.settings.workload == "rank":
            ranked = programs.ranking(self.model, self.settings.k)
            return ranked(weights, batch["img"], batch["ids"], batch["txt_mask"], *map(jnp.asarray, self.answers()))
        if self.settings.workload == "dialog":
            look, match = dialog.programs_of(self.model, dialog.leaves().score)
            seen = look(weights, batch["img"], batch["caption_ids"], batch["caption_mask"])
            return {"score": match(weights, seen, batch["ids"], batch["txt_mask"])}
        seen = programs.view(self.model, "kv", "img_emb")(weights, batch["img"])
        return programs.score(self.model)(weights, seen, batch["ids"], batch["txt_mask"])

    def answers(self) -> tuple[np.ndarray, np.ndarray]:
        """Random candidates i32[C,T] and their mask, of three positions at least."""
        shape, rng = (self.settings.candidates, self.settings.answer), np.random.default_rng(1)
        mask = np.arange(shape[1]) < rng.integers(3, shape[1] + 1, (shape[0], 1))
        ids = rng.integers(5, self.config.med.vocab_size - 2, shape)
        return np.where(mask, ids, 0).astype(np.int32), mask

    def image_flops(self) -> float:
        settings = self.settings
        if settings.workload == "rank":
            return flops.rank_image(self.config, settings.positions, settings.answer, settings.k, settings.candidates)
        if settings.workload == "dialog":
            parts = flops.dialog(self.config, settings.caption, settings.positions, settings.texts)
            return sum(parts.values())
        if settings.workload == "encode":
            return flops.encode_image(self.config)
        return flops.filter_image(self.config, self.settings.positions, self.settings.texts)

    def batch(self, images: int) -> dict[str, np.ndarray]:
        """Uniform pixels u8[B,S,S,3] and random texts of 5 positions at least: for filter and dialog i32[B,G,T], for
        rank a question i32[B,T]; captions i32[B,C] for dialog.
        """
        rng, size, med = np.random.default_rng(0), self.config.img_size, self.config.med
        img = rng.integers(0, 256, (images, size, size, 3), np.uint8)
        if self.settings.workload == "encode":
            return {"img": img}

        def texts(*shape: int) -> tuple[np.ndarray, np.ndarray]:
            mask = np.arange(shape[-1]) < rng.integers(5, shape[-1] + 1, (*shape[:-1], 1))
            return np.where(mask, rng.integers(5, med.vocab_size - 2, shape), 0).astype(np.int32), mask

        several = () if self.settings.workload == "rank" else (self.settings.texts,)
        ids, txt_mask = texts(images, *several, self.settings.positions)
        batch = {"img": img, "ids": ids, "txt_mask": txt_mask}
        if self.settings.workload == "dialog":
            batch["caption_ids"], batch["caption_mask"] = texts(images, self.settings.caption)
        return batch


def run(settings: Settings, command: str, out: str = "", say: Callable = print, peer: Callable | None = None) -> dict:
    """Measures all combinations, says the figures, writes JSON to `out` where given; returns what is in it.

    peer: (settings, `Ours`, batch, job) -> (agreement, {name: job}), another program that does the same on one device;
    it looks at what our `job` gives. ValueError: fewer cores than threads, no multiple of the patch, too few text
    positions, an output folder that does not exist, or a peer whose outputs differ.
    """
    throughput.limit_threads(settings.threads)
    throughput.check_out(out, settings.trace)
    patch, most = config.VIT_SIZES[settings.size]["patch"], config.MED_SIZES[settings.size]["positions"]
    if odd := [s for s in settings.img_sizes if s % patch]:
        raise ValueError(f"--img_size={odd[0]}: it must be a multiple of the patch of {patch} pixels")
    if not 5 <= settings.positions <= most:
        raise ValueError(f"--positions={settings.positions}: texts have 5 to {most}, the positions of this model")
    vit, med = config.VIT_SIZES[settings.size]["width"], config.MED_SIZES[settings.size]["width"]
    if vit != med and settings.workload == "dialog":
        raise ValueError(f"--size={settings.size}: dialogs need one width of image and text, not {vit} and {med}")
    if not 5 <= settings.caption <= most and settings.workload == "dialog":
        raise ValueError(f"--caption={settings.caption}: captions have 5 to {most} positions")
    if not 3 <= settings.answer <= most:
        raise ValueError(f"--answer={settings.answer}: answers have 3 to {most} positions")
    result = {
        "command": command,
        "workload": settings.workload,
        "settings": settings._asdict(),
        **throughput.about(),
        "cases": [],
    }
    say(throughput.headline(result, settings.threads))
    for img_size in settings.img_sizes:
        for dtype in settings.dtypes:
            say(f"{settings.workload}, {img_size} px, {dtype}:")
            result["cases"].append(measure(settings, img_size, dtype, say, peer) | {"memory": throughput.peak_memory()})
            throughput.write(out, result)  # after each, so that a run that is stopped leaves what it has
    return result


def measure(settings: Settings, img_size: int, dtype: str, say: Callable, peer: Callable | None = None) -> dict:
    """The case of one image size and dtype; with a peer on one device, else on all."""
    ours = Ours(settings, img_size, dtype)
    mesh = sharding.make_mesh(config.base().mesh, jax.devices()[:1] if peer else None)
    images, agreed = settings.batch * mesh.size, {}
    batch = ours.batch(images)

    with jax.set_mesh(mesh):
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        args = jax.device_put(ours.weights, whole), jax.device_put(batch, sharding.batch_sharding(mesh))
        program, compile_s = throughput.compiled(jax.jit(ours.job), *args)
        jobs = {"ours": lambda: jax.block_until_ready(program(*args))}
        if peer:
            agreed, others = peer(settings, ours, batch, jobs["ours"])
            say("outputs agree: " + ", ".join(f"{name} within {x:.2g} of its deviation" for name, x in agreed.items()))
            jobs |= others
        _, times = throughput.rounds(jobs, settings.rounds, say)
        if settings.trace:
            with throughput.trace(settings.trace, say):
                throughput.seconds_of(jobs["ours"], throughput.TRACED)

    sides = {name: throughput.figures(t, images, ours.image_flops(), mesh.size) for name, t in times.items()}
    ratios = {name: throughput.ratio(t, times["ours"]) for name, t in times.items() if name != "ours"}
    for name, found in sides.items():
        say(f"{name}: {throughput.words(found)}")
    for name, ratio in ratios.items():
        say(f"ours is {ratio:.2f} times as fast as {name}")
    return {
        "img_size": img_size,
        "dtype": dtype,
        "images": images,
        "mesh": dict(mesh.shape),
        "compile_s": compile_s,
        "sides": sides,
        "ours_over": ratios,
        "agreement": agreed,
    }
