"""Images captioned per second, `blip-jax bench caption`.

`benchmarks/` sets it beside transformers and the original's way of generating.

Random weights and pictures; nucleus sampling of exactly `tokens` new tokens after a prompt of four, of BLIP-2's
Q-Former after [DEC] alone. All sides have the
same weights, pictures and settings and take turns within each round; figures are medians over the rounds.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from blip_jax import config, tasks
from blip_jax.bench import throughput
from blip_jax.inference import language, programs
from blip_jax.inference.programs import encode_pixels
from blip_jax.models import flops, initial
from blip_jax.models.layers.dense import rounded

EOS, PAD, START = 3, 0, 2  # of a vocabulary; EOS is never drawn, START is where language models begin
BLIP2_IMG_SIZES = (224, 364)  # pixels, of BLIP-2's pre-training and fine-tuning


class Settings(NamedTuple):
    """What is measured: every combination of img_sizes (pixels), dtypes and captions (per image).

    The other settings hold for all of them.
    """

    size: str = "base"  # a size of blip_jax.config
    img_sizes: tuple = (224, 384)
    dtypes: tuple = ("float32", "bfloat16")
    captions: tuple = (1, 4)
    batch: int = 8  # images
    tokens: int = 20  # new tokens per caption
    rounds: int = 3
    threads: int = 2
    trace: str = ""  # folder for a profile of ours
    model: str = ""  # a BLIP-2 of config.BLIP2_MODELS; size is not read then


class Ours:
    """Our captioner of one image size and dtype, with random weights, and its parts, jitted.

    `params` are f32, `weights` are in the dtype. model: as of `Settings`.
    """

    def __init__(self, size: str, img_size: int, dtype: str, model: str = ""):
        cfg = config.blip2(*config.BLIP2_MODELS[model]) if model else config.base(size)
        cfg.objective = cfg.objective if model else "caption"
        cfg.model.update(img_size=img_size, dtype=dtype)
        self._cfg, self.config, self.model = cfg, cfg.model, tasks.build(cfg)
        self.prompted = bool(cfg.model.get("llm"))
        # as long as "[DEC] a picture of", or "a photo of" in a language model's tokens; the weights are random, so any
        # ids do
        self.prompt = [4, 5, 6, 7] if self.prompted else [self.model.dec_id, *([] if model else [5, 6, 7])]
        self.weights = jax.jit(lambda: rounded(self._drawn(), dtype))()
        self.vision = jax.jit(functools.partial(encode_pixels, self.model))
        self.image_kv = jax.jit(self._look)

    @functools.cached_property
    def params(self) -> dict:
        """For peers."""
        return jax.jit(self._drawn)()

    def _drawn(self):
        gain = 50 / self.config.vit.width**0.5  # so that pictures matter: matrices with deviation 0.02 change little
        return initial.magnified(initial.init_params(self._cfg, self.model, jax.random.key(0)), gain)

    def _look(self, params, img_tok):
        """What the token loop reads of images: keys and values, or a language model's soft prompt."""
        return self.model.apply({"params": params}, img_tok, method="soft_prompt" if self.prompted else "image_kv")

    def _decode(self, method: programs.Method) -> Callable:
        if not self.prompted:
            return programs.decoder(self.model, self.prompt, method, eos=EOS, pad=PAD)

        def behind(params, soft, keys):
            apply = functools.partial(self.model.apply, {"params": params})
            ids = np.tile(np.array(self.prompt, np.int32), (len(soft), 1))
            special = language.Ids(START, EOS, PAD)
            return language.behind(apply, soft, ids, np.ones(ids.shape, bool), keys, method, special)

        return behind

    def sampling(self, tokens: int, n: int) -> programs.Method:
        """n texts of exactly `tokens` new tokens."""
        length = tokens + (1 if self.prompted else len(self.prompt))  # language models: behind a start id
        return programs.Method(n=n, min_length=length, max_length=length)

    def image_flops(self, tokens: int, n: int) -> float:
        count = flops.blip2_caption_image if "qformer" in self.config else flops.caption_image
        return count(self.config, len(self.prompt), tokens, n)

    def loop(self, method: programs.Method) -> Callable:
        """The token loop: (params, what `image_kv` made, keys) -> {"ids", "log_prob"}"""
        return jax.jit(self._decode(method))

    def whole(self, method: programs.Method) -> Callable:
        """(params, img u8[B,S,S,3], keys u32[B,2]) -> {"ids", "log_prob"}"""
        decode = self._decode(method)

        def run(params, img, keys):
            return decode(params, self._look(params, encode_pixels(self.model, params, img)), keys)

        return jax.jit(run)


def run(settings: Settings, command: str, out: str = "", say: Callable = print, peer: Callable | None = None) -> dict:
    """Measures all combinations, says the tables, writes JSON to `out` where given; returns what is in it.

    peer: (settings, `Ours`, img, dtype) -> (agreement, further `jobs`), other programs that do the same. ValueError:
    fewer cores than settings.threads, no multiple of the patch, an output folder that does not exist, or a peer whose
    captions are not ours.
    """
    throughput.limit_threads(settings.threads)
    throughput.check_out(out, settings.trace)
    tower = config.TOWER_SIZES[config.BLIP2_MODELS[settings.model][0]] if settings.model else None
    patch = (tower or config.VIT_SIZES[settings.size])["patch"]
    if odd := [s for s in settings.img_sizes if s % patch]:
        raise ValueError(f"--img_size={odd[0]}: it must be a multiple of the patch of {patch} pixels")
    result = {
        "command": command,
        "workload": "caption",
        "settings": settings._asdict(),
        **throughput.about(),
        "agreement": [],
        "cases": [],
    }
    say(throughput.headline(result, settings.threads))
    for img_size in settings.img_sizes:
        for dtype in settings.dtypes:
            agreement, cases = measure(settings, img_size, dtype, peer, say)
            result["agreement"] += agreement
            result["cases"] += cases
            throughput.write(out, result)  # after each, so that a run that is stopped leaves what it has
    say(table(result["cases"]))
    say(parts_table(result["cases"]))
    return result


def measure(settings: Settings, img_size: int, dtype: str, peer: Callable | None, say: Callable) -> tuple[list, list]:
    """One image size and dtype: ([how far the peer agrees, if there is one], [a `case` per number of captions])."""
    ours = Ours(settings.size, img_size, dtype, settings.model)
    img = np.random.default_rng(0).integers(0, 256, (settings.batch, img_size, img_size, 3), np.uint8)
    sides, agreed = jobs(settings, ours, img), []
    if peer:
        found, others = peer(settings, ours, img, dtype)
        sides |= others
        agreed = [{"img_size": img_size, "dtype": dtype, **found}]
        say(f"{img_size} px, {dtype}: {agreed[0]}")
    first, times = throughput.rounds(sides, settings.rounds, lambda text: say(f"{img_size} px, {dtype}: {text}"))
    if settings.trace:
        with throughput.trace(settings.trace, say):
            throughput.seconds_of(sides[f"ours/{settings.captions[0]}"], throughput.TRACED)
    cases = []
    for n in settings.captions:
        found = throughput.figures(times[f"ours/{n}"], settings.batch, ours.image_flops(settings.tokens, n))
        say(f"{img_size} px, {dtype}, captions {n}: {throughput.words(found)}")
        cases.append(
            case(times, n, settings)
            | {
                "img_size": img_size,
                "dtype": dtype,
                "ours": found,
                "memory": throughput.peak_memory(),
                "compile_s": first[f"ours/{n}"] - found["step_s"]["p50"],
            }
        )
    return agreed, cases


def jobs(settings: Settings, ours: Ours, img: np.ndarray) -> dict[str, Callable]:
    """What takes turns in a round, in this order: name -> call that returns when the work is done.

    "side/n" is a side's whole work for n captions per image, "side part" and "side part/n" are parts of it.
    """
    keys = keys_of(img)
    img_tok = ours.vision(ours.weights, img)
    kv = ours.image_kv(ours.weights, img_tok)
    out = {
        "ours vision": waiting(ours.vision, ours.weights, img),
        "ours image_kv": waiting(ours.image_kv, ours.weights, img_tok),
    }
    for n in settings.captions:
        out[f"ours/{n}"] = waiting(ours.whole(sampling(settings, ours, n)), ours.weights, img, keys)
        out[f"ours token_loop/{n}"] = waiting(ours.loop(sampling(settings, ours, n)), ours.weights, kv, keys)
    return out


def keys_of(img: np.ndarray) -> np.ndarray:
    """u32[B,2]: the random key of each picture."""
    return np.stack([programs.example_key(f"picture {i}", 0) for i in range(len(img))])


def sampling(settings: Settings, ours: Ours, n: int) -> programs.Method:
    """n captions per image of exactly `settings.tokens` new tokens."""
    return ours.sampling(settings.tokens, n)


def waiting(function: Callable, *args) -> Callable:
    """A call that returns when the work is done."""
    return lambda: jax.block_until_ready(function(*args))


def case(times: dict[str, list], n: int, settings: Settings) -> dict:
    """Figures of n captions per image: images/s, seconds per batch and of its parts, medians over the rounds.

    A ratio is the median over rounds of a side's seconds / ours. A side that has no token loop apart from its image
    keys and values has "decode", which holds both.
    """
    middle = {name: statistics.median(t) for name, t in times.items()}
    sides = [name.removesuffix(f"/{n}") for name in times if name.endswith(f"/{n}") and " " not in name]
    parts = {}
    for side in sides:
        if f"{side} vision" not in middle:
            continue
        kv = middle.get(f"{side} image_kv", middle.get(f"{side} image_kv/{n}"))
        loop = middle.get(f"{side} token_loop/{n}")
        parts[side] = {
            "vision": middle[f"{side} vision"],
            "image_kv": kv,
            "token_loop": middle[f"{side} decode/{n}"] - kv if loop is None else loop,
        }

    ratio = lambda side: throughput.ratio(times[f"{side}/{n}"], times[f"ours/{n}"])
    return {
        "captions": n,
        "seconds": {s: times[f"{s}/{n}"] for s in sides},
        "images_per_s": {s: settings.batch / middle[f"{s}/{n}"] for s in sides},
        "ours_over": {s: ratio(s) for s in sides if s != "ours"},
        "part_seconds": parts,
    }


def table(cases: list[dict]) -> str:
    """Images per second of each side and how many times as fast ours is."""
    sides = list(dict.fromkeys(s for c in cases for s in c["images_per_s"]))

    def number(c: dict, field: str, side: str) -> str:
        return f"{c[field][side]:.2f}" if side in c[field] else "-"

    rows = [
        [
            c["img_size"],
            c["dtype"],
            c["captions"],
            *(number(c, "images_per_s", s) for s in sides),
            *(number(c, "ours_over", s) for s in sides[1:]),
        ]
        for c in cases
    ]
    head = ["px", "dtype", "captions", *sides, *(f"ours / {s}" for s in sides[1:])]
    return "\nimages/s\n" + throughput.markdown(head, rows)


def parts_table(cases: list[dict]) -> str:
    """Seconds per batch of the parts of each side."""
    rows = [
        [
            c["img_size"],
            c["dtype"],
            c["captions"],
            side,
            *(f"{part[p]:.3f}" for p in ("vision", "image_kv", "token_loop")),
        ]
        for c in cases
        for side, part in c["part_seconds"].items()
    ]
    head = ["px", "dtype", "captions", "side", "vision tower", "image keys/values", "token loop"]
    return "\nseconds per batch\n" + throughput.markdown(head, rows)
