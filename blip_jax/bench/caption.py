"""Images captioned per second on the CPU, `blip-jax bench caption`: ours, transformers' and the original's way of
decoding.

All sides have the same random weights, pictures and settings: nucleus sampling of exactly `tokens` new tokens after a
prompt of four. They take turns within each round; figures are medians over the rounds. The original's way is our
decoder, but it projects the image keys and values again for every token and every caption.
"""

from __future__ import annotations

import functools
import statistics
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax import config
from blip_jax.bench import throughput
from blip_jax.inference import programs
from blip_jax.inference.programs import encode_pixels
from blip_jax.models import flops
from blip_jax.models.blip import Blip
from blip_jax.models.layers.dense import rounded
from blip_jax.train import state as train_state

EOS, PAD = 3, 0  # where a vocabulary of this project has them; EOS is never drawn
# largest difference of logits between ours and the peer, whose deviation is about 1
LIMIT = {"float32": 1e-3, "bfloat16": 0.25}


class Settings(NamedTuple):
    """What is measured. Every combination of img_sizes (pixels), dtypes and captions (per image); the rest holds
    for all."""

    size: str = "base"  # a size of blip_jax.config
    img_sizes: tuple = (224, 384)
    dtypes: tuple = ("float32", "bfloat16")
    captions: tuple = (1, 4)
    batch: int = 8  # images
    tokens: int = 20  # new tokens per caption
    rounds: int = 3
    threads: int = 2
    against: str = ""  # "transformers", or "" for ours alone
    trace: str = ""  # folder for a profile of ours


class OriginalWay:
    """Stands in for the model in `programs.decoder`, and image states [B,P,1,D] for keys and values: they are projected
    again for every token and every caption, as in the original's `generate`, which caches only the self-attention."""

    def __init__(self, model):
        self.model, self.empty_cache = model, model.empty_cache

    def apply(self, variables, ids, start, cache, states, method):
        # else XLA takes it out of the loop
        img_tok, start = jax.lax.optimization_barrier((states[0][1][:, :, 0], start))
        img_tok = jnp.repeat(img_tok, len(ids) // len(img_tok), axis=0)
        kv = self.model.apply(variables, img_tok, method="image_kv")
        return self.model.apply(variables, ids, start, cache, kv, method=method)


class Ours:
    """Our captioner of one image size and dtype, random weights, and its parts, jitted. `params` f32, `weights` in
    the dtype."""

    def __init__(self, size: str, img_size: int, dtype: str):
        cfg = config.base(size)
        cfg.model.update(img_size=img_size, encoder=False, dtype=dtype)
        self.config, self.model = cfg.model, Blip.from_config(cfg.model)
        # as long as "[DEC] a picture of"; the weights are random, so any ids do
        self.prompt = [self.model.dec_id, 5, 6, 7]
        params = jax.jit(lambda: train_state.init_params(cfg, self.model, jax.random.key(0)))()
        gain = 50 / cfg.model.vit.width**0.5  # so that pictures matter: matrices with deviation 0.02 change little
        self.params = jax.tree.map(lambda x: x * gain if x.ndim > 1 else x, params)
        self.weights = rounded(self.params, dtype)
        self.vision = jax.jit(functools.partial(encode_pixels, self.model))
        self.image_kv = jax.jit(lambda p, img_tok: self._apply(p, img_tok, "image_kv"))
        self.logits = jax.jit(self._logits)

    def _apply(self, params, *args):
        return self.model.apply({"params": params}, *args[:-1], method=args[-1])

    def _logits(self, params, img, ids):
        """f32[B,T-1,V], teacher-forced"""
        kv = self._apply(params, encode_pixels(self.model, params, img), "image_kv")
        return self._apply(params, ids, jnp.ones(ids.shape, bool), kv, "lm_logits")[..., : self.config.med.vocab_size]

    def loop(self, method: programs.Method) -> Callable:
        """The token loop: (params, image keys and values, keys) -> {"ids", "log_prob"}"""
        return jax.jit(programs.decoder(self.model, self.prompt, method, eos=EOS, pad=PAD))

    def whole(self, method: programs.Method, original: bool = False) -> Callable:
        """(params, img u8[B,S,S,3], keys u32[B,2]) -> {"ids", "log_prob"}; `original`: keys and values again for
        every token"""
        decode = programs.decoder(
            OriginalWay(self.model) if original else self.model, self.prompt, method, eos=EOS, pad=PAD
        )

        def run(params, img, keys):
            img_tok = encode_pixels(self.model, params, img)
            states = img_tok[:, :, None]
            return decode(params, ((states, states),) if original else self._apply(params, img_tok, "image_kv"), keys)

        return jax.jit(run)


def run(settings: Settings, command: str, out: str = "", say: Callable = print) -> dict:
    """Measures all combinations, says the tables, writes JSON to `out` where given; returns what is in it.

    ValueError: fewer cores than settings.threads, no multiple of the patch, an output folder that does not exist, or a
    peer whose logits or greedy texts differ. Where transformers is not installed the peer is left out, and said so.
    """
    throughput.limit_threads(settings.threads)
    throughput.check_out(out)
    patch = config.VIT_SIZES[settings.size]["patch"]
    if odd := [s for s in settings.img_sizes if s % patch]:
        raise ValueError(f"--img_size={odd[0]}: it must be a multiple of the patch of {patch} pixels")
    peer = _peer(settings, say)
    result = {
        "command": command,
        "workload": "caption",
        "settings": settings._asdict(),
        "peer": "transformers" if peer else None,
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
    """([what `agreement` says], [a `case` for each number of captions]) of one image size and dtype."""
    ours = Ours(settings.size, img_size, dtype)
    img = np.random.default_rng(0).integers(0, 256, (settings.batch, img_size, img_size, 3), np.uint8)
    other, agreed = None, []
    if peer:
        other = peer(ours.config, jax.tree.map(np.asarray, ours.params), dtype, eos=EOS, pad=PAD)
        agreed = [{"img_size": img_size, "dtype": dtype, **agreement(ours, other, img[:2], dtype)}]
        say(f"{img_size} px, {dtype}: {agreed[0]}")
    sides = jobs(settings, ours, other, img)
    first, times = throughput.rounds(sides, settings.rounds, lambda text: say(f"{img_size} px, {dtype}: {text}"))
    if settings.trace:
        with throughput.trace(settings.trace, say):
            throughput.seconds_of(sides[f"ours/{settings.captions[0]}"], throughput.TRACED)
    cases = []
    for n in settings.captions:
        count = flops.caption_image(ours.config, len(ours.prompt), settings.tokens, n)
        found = throughput.figures(times[f"ours/{n}"], settings.batch, count)
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


def agreement(ours: Ours, peer, img: np.ndarray, dtype: str) -> dict:
    """Largest difference of teacher-forced logits; in float32 also whether greedy texts are equal. ValueError if
    they differ."""
    ids = np.random.default_rng(1).integers(5, ours.config.med.vocab_size - 2, (len(img), 12)).astype(np.int32)
    ids[:, 0] = ours.prompt[0]
    a, b = np.asarray(ours.logits(ours.weights, img, ids)), peer.logits(peer.pixels(img), ids)[:, :-1]
    difference = float(np.abs(a - b).max())
    found = {"logit_difference": difference, "limit": LIMIT[dtype]}
    problem = (
        f"logits differ by {difference:.2g}, more than {LIMIT[dtype]:.2g}" if not difference <= LIMIT[dtype] else ""
    )
    if dtype == "float32" and not problem:
        length = len(ours.prompt) + 6
        greedy = programs.Method(top_k=1, min_length=length, max_length=length)
        keys = np.zeros((len(img), 2), np.uint32)
        mine = np.asarray(ours.whole(greedy)(ours.weights, img, keys)["ids"])[:, 0]
        theirs = peer.generate(
            peer.pixels(img), ours.prompt, do_sample=False, repetition_penalty=1.1, max_new_tokens=6, min_new_tokens=6
        )
        same = np.array_equal(mine, theirs)
        found["greedy_ids_equal"] = same
        problem = "" if same else "greedy texts differ although logits agree"
    if problem:
        raise ValueError(f"transformers with our weights is not our model: {problem}; times would not be comparable")
    return found


def jobs(settings: Settings, ours: Ours, peer, img: np.ndarray) -> dict[str, Callable]:
    """What takes turns in a round, in this order: name -> call that returns when the work is done. "/n": n
    captions per image."""
    keys = np.stack([programs.example_key(f"picture {i}", 0) for i in range(len(img))])
    w, length = ours.weights, len(ours.prompt) + settings.tokens
    img_tok = ours.vision(w, img)
    kv = ours.image_kv(w, img_tok)
    wait = lambda f, *args: functools.partial(lambda: jax.block_until_ready(f(*args)))
    out = {"ours vision": wait(ours.vision, w, img), "ours image_kv": wait(ours.image_kv, w, img_tok)}
    if peer:
        pixels = peer.pixels(img)
        states = peer.vision(pixels)
        out["transformers vision"] = lambda: peer.vision(pixels)
    for n in settings.captions:
        method = programs.Method(n=n, min_length=length, max_length=length)
        out[f"ours/{n}"] = wait(ours.whole(method), w, img, keys)
        if peer:
            how = dict(
                do_sample=True,
                top_p=0.9,
                top_k=50,
                repetition_penalty=1.1,
                num_return_sequences=n,
                max_new_tokens=settings.tokens,
                min_new_tokens=settings.tokens,
            )
            rows = states.repeat_interleave(n, dim=0)  # its `generate` repeats the image states before it projects them
            out[f"transformers/{n}"] = functools.partial(_exact, length, peer.generate, pixels, ours.prompt, **how)
        if n == min(settings.captions):  # with more captions it only does the same work more often
            out[f"original/{n}"] = wait(ours.whole(method, original=True), w, img, keys)
        out[f"ours token_loop/{n}"] = wait(ours.loop(method), w, kv, keys)
        if peer:
            out[f"transformers image_kv/{n}"] = functools.partial(peer.image_kv, rows)
            out[f"transformers decode/{n}"] = functools.partial(_exact, length, peer.decode, states, ours.prompt, **how)
    return out


def case(times: dict[str, list], n: int, settings: Settings) -> dict:
    """Figures of n captions per image: images/s, seconds per batch and parts are medians; a ratio is the median over
    rounds of their seconds / ours. The peer's token loop is its decoding less its image keys and values."""
    middle = {name: statistics.median(t) for name, t in times.items()}
    sides = [s for s in ("ours", "transformers", "original") if f"{s}/{n}" in times]
    parts = {
        "ours": {
            "vision": middle["ours vision"],
            "image_kv": middle["ours image_kv"],
            "token_loop": middle[f"ours token_loop/{n}"],
        }
    }
    if "transformers" in sides:
        kv = middle[f"transformers image_kv/{n}"]
        parts["transformers"] = {
            "vision": middle["transformers vision"],
            "image_kv": kv,
            "token_loop": middle[f"transformers decode/{n}"] - kv,
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
    number = lambda c, field, side: f"{c[field][side]:.2f}" if side in c[field] else "-"
    rows = [
        [
            c["img_size"],
            c["dtype"],
            c["captions"],
            *(number(c, "images_per_s", s) for s in ("ours", "transformers", "original")),
            *(number(c, "ours_over", s) for s in ("transformers", "original")),
        ]
        for c in cases
    ]
    head = [
        "px",
        "dtype",
        "captions",
        "ours",
        "transformers",
        "original's way",
        "ours / transformers",
        "ours / original's way",
    ]
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


def _exact(length: int, generate: Callable, *args, **how) -> None:
    """Calls the peer; ValueError if its texts do not have `length` tokens, prompt included."""
    ids = generate(*args, **how)
    if ids.shape[1] != length:
        raise ValueError(
            f"transformers gave texts of {ids.shape[1]} tokens, not {length}: times would not be comparable"
        )


def _peer(settings: Settings, say: Callable) -> Callable | None:
    """The class of the peer, or None where none is wanted or it is not installed."""
    if not settings.against:
        return None
    if settings.against != "transformers":
        raise ValueError(f"--against={settings.against}: the only peer is transformers")
    if not throughput.installed("transformers", ("torch", "transformers"), say):
        return None
    import torch

    from blip_jax.bench.transformers_peer import Peer

    if settings.threads:
        torch.set_num_threads(settings.threads)
    return Peer
