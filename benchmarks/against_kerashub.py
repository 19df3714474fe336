"""BLIP-2 beside KerasHub's on its JAX backend, on one device, with the same small random weights:

  python benchmarks/against_kerashub.py --llm=opt,t5 --captions=1,4 --batch=4 --rounds=5 --out=kerashub.json

The weights go through a Hugging Face folder, which KerasHub converts by itself. Logits of both must agree within 1e-4
in float32 before anything is timed; then both, in `--dtype`, take turns within each round: captions of a batch of
pictures by nucleus sampling, from pixels to ids, all of the same length. The seconds of the first call, in which each
is compiled, stand beside the times; the compile cache is off. Needs `pip install -e ".[kerashub]"`, in an environment
of its own, as it brings TensorFlow, which is not used here.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

os.environ["KERAS_BACKEND"] = "jax"  # read when keras is imported

import jax
import numpy as np

from blip_jax import config, tasks, trees
from blip_jax.console import revision, say
from blip_jax.convert import hf_blip2, hf_blip2_config
from blip_jax.convert.source import Source
from blip_jax.inference import language, programs
from blip_jax.inference.batching import placed
from blip_jax.models import initial
from blip_jax.models.vision.vit import normalize_pixels
from blip_jax.parallel import sharding

LOGITS = 1e-4  # largest difference, of logits whose deviation is about 1
FAMILIES = {"opt": "blip2_opt", "t5": "blip2_t5"}
PROMPT = 6  # tokens
SIZES = {  # of tower, Q-Former and language model: width, layers, heads, mlp; pixels, patch; words
    "small": dict(vit=(384, 8, 6, 1536), qformer=(256, 6, 4, 1024), llm=(512, 8, 8, 2048), img=(112, 14), words=8192),
    "tiny": dict(vit=(48, 2, 2, 96), qformer=(32, 2, 4, 64), llm=(32, 2, 4, 64), img=(16, 8), words=256),
}


# --- the model --------------------------------------------------------------------------------------------------------
def settings(size: str, llm: str):
    """The config of a model, with the last norm as transformers and KerasHub have it."""
    s, cfg = SIZES[size], config.blip2("eva_tiny", "tiny", "opt_tiny" if llm == "opt" else "flant5_tiny").unlock()
    named = lambda values, *names: dict(zip(names, values))
    cfg.model.update(img_size=s["img"][0], vision_eps=hf_blip2_config.BLOCK_EPS, dtype="float32")
    cfg.model.vit.update(named(s["vit"], "width", "depth", "heads", "mlp"), patch=s["img"][1])
    cfg.model.qformer.update(named(s["qformer"], "width", "layers", "heads", "mlp"))
    cfg.model.llm.update(named(s["llm"], "width", "layers", "heads", "mlp"), vocab_size=s["words"])
    width, _, heads, _ = s["llm"]
    cfg.model.llm.update({"embed_width": width} if llm == "opt" else {"head_dim": width // heads})
    return cfg


def parameters(cfg) -> dict:
    """Random NumPy f32: matrices of a deviation at which pictures and words matter."""
    shapes = jax.eval_shape(lambda key: initial.init_params(cfg, tasks.build(cfg), key), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple) -> np.ndarray:
        if path.endswith("scale"):
            return np.ones(shape, np.float32)
        fan_in = shape[-1] if path.endswith("embedding") or len(shape) < 2 else np.prod(shape) / shape[-1] / 4
        return (rng.standard_normal(shape) / max(fan_in, 16) ** 0.5).astype(np.float32)

    return trees.nest((path, draw(path, x.shape)) for path, x in trees.paths(shapes))


class Ours:
    """Our model with these parameters on the first device, computing in `dtype`."""

    def __init__(self, cfg, params: dict, dtype: str):
        cfg = cfg.copy_and_resolve_references()
        cfg.model.dtype = dtype
        self.model, self.mesh = tasks.build(cfg), sharding.mesh_of((1, 1, 1), jax.devices()[:1])
        self.params = placed(jax.tree.map(np.copy, params), self.mesh, dtype)

    def logits(self, img, ids, out_ids) -> np.ndarray:
        """f32[B,T,V] of the next token of ids (OPT) or out_ids (T5)."""

        def run(params, img, *texts):
            apply = lambda *args, method: self.model.apply({"params": params}, *args, method=method)
            soft = apply(apply(normalize_pixels(img), method="encode_image"), method="soft_prompt")
            return apply(soft, *texts, method="target_logits")

        texts = [ids, np.ones(ids.shape, bool)]
        texts += [out_ids, np.ones(out_ids.shape, bool)] if self.model.writes_answers_apart else []
        with jax.set_mesh(self.mesh):
            return np.asarray(jax.jit(run)(self.params, img, *texts))

    def job(self, img, ids, n: int, tokens: int) -> Callable:
        """A call that makes n texts of `tokens` tokens of each picture."""
        how = programs.Method(n=n, repetition_penalty=1.0, min_length=1 + tokens, max_length=1 + tokens)
        program = jax.jit(language.generating(self.model, how, language.Ids(0, 3, 1)))
        keys = np.stack([programs.example_key(str(i), 0) for i in range(len(img))])

        def run() -> np.ndarray:
            with jax.set_mesh(self.mesh):
                made = program(self.params, img, keys, ids, np.ones(ids.shape, bool))
            return np.asarray(made["ids"])[:, :, 1:].reshape(len(img) * n, -1)

        return run


class Theirs:
    """KerasHub's model of a Hugging Face folder, in `dtype`."""

    def __init__(self, folder: pathlib.Path, llm: str, dtype: str):
        import keras_hub

        self.hub, self.llm = keras_hub, llm
        backbone = keras_hub.models.BLIP2Backbone.from_preset(str(folder), dtype=dtype)
        kind = keras_hub.models.BLIP2CausalLM if llm == "opt" else keras_hub.models.BLIP2Seq2SeqLM
        self.net = kind(preprocessor=None, backbone=backbone)

    def inputs(self, img, ids, more: int, out_ids=None) -> dict:
        """What the model takes: normalised pixels, ids, and masks; room for `more` tokens."""
        ones = np.ones(ids.shape, np.int32)
        room = lambda x, value: np.pad(x, ((0, 0), (0, more)), constant_values=value)
        pixels = np.asarray(normalize_pixels(img))
        if self.llm == "opt":
            return {"images": pixels, "token_ids": room(ids, 1), "padding_mask": room(ones, 0)}
        start = np.zeros((len(ids), 1), np.int32) if out_ids is None else np.pad(out_ids[:, :-1], ((0, 0), (1, 0)))
        first = {"images": pixels, "encoder_token_ids": ids, "encoder_padding_mask": ones}
        return first | {"decoder_token_ids": room(start, 0), "decoder_padding_mask": room(np.ones_like(start), 0)}

    def logits(self, img, ids, out_ids) -> np.ndarray:
        """As `Ours.logits`; of OPT from the second token on."""
        found = np.asarray(self.net.predict_on_batch(self.inputs(img, ids, 0, out_ids)))
        return found[:, :-1] if self.llm == "opt" else found

    def job(self, img, ids, n: int, tokens: int) -> Callable:
        """As `Ours.job`; each text of a picture is a row of its batch, as it has no other way."""
        self.net.compile(sampler=self.hub.samplers.TopPSampler(p=0.9, k=50, seed=0))
        run = self.net.make_generate_function()
        given = self.inputs(np.repeat(img, n, axis=0), np.repeat(ids, n, axis=0), tokens)
        name = "token_ids" if self.llm == "opt" else "decoder_token_ids"
        return lambda: np.asarray(run(given, stop_token_ids=None)[name])[:, -tokens:]


# --- the measurement --------------------------------------------------------------------------------------------------
def case(llm: str, values: argparse.Namespace) -> dict:
    """Agreement, first calls and rounds of one language model. ValueError: the two are not the same model."""
    cfg = settings(values.size, llm)
    params, rng, size = parameters(cfg), np.random.default_rng(1), cfg.model.img_size
    with tempfile.TemporaryDirectory() as folder:
        hf_blip2.write(folder, Source(FAMILIES[llm], {"params": params}, cfg, None, []))
        models = {d: (Ours(cfg, params, d), Theirs(pathlib.Path(folder), llm, d)) for d in {"float32", values.dtype}}
    ours, theirs = models["float32"]
    img = rng.integers(0, 256, (values.batch, size, size, 3)).astype(np.uint8)
    ids, out_ids = (rng.integers(4, cfg.model.llm.vocab_size, (values.batch, PROMPT)).astype(np.int32) for _ in "ab")
    found = {"llm": llm, "logit_difference": agreement(llm, ours, theirs, img, ids, out_ids), "captions": {}}
    say(f"{llm}: logits differ by {found['logit_difference']:.1e}")
    ours, theirs = models[values.dtype]
    for n in values.captions:
        sides = {"ours": ours.job(img, ids, n, values.tokens), "kerashub": theirs.job(img, ids, n, values.tokens)}
        found["captions"][str(n)] = told = {"first_s": {}, "s": {name: [] for name in sides}}
        for name, job in sides.items():
            start, made = time.perf_counter(), job()
            told["first_s"][name] = time.perf_counter() - start
            if made.shape != (values.batch * n, values.tokens):
                raise ValueError(f"{name} made texts {made.shape}, not {values.batch * n} of {values.tokens} tokens")
        for i in range(values.rounds):
            for name, job in list(sides.items())[:: 1 if i % 2 else -1]:
                start = time.perf_counter()
                job()
                told["s"][name].append(time.perf_counter() - start)
        ratios = [b / a for a, b in zip(told["s"]["ours"], told["s"]["kerashub"])]
        told |= {"ours_over": ratios, "median": statistics.median(ratios)}
        rate = {name: values.batch * n / statistics.median(s) for name, s in told["s"].items()}
        say(
            f"{llm}, {n} a picture: ours {rate['ours']:.2f} captions/s, KerasHub {rate['kerashub']:.2f}; ours is "
            f"{told['median']:.2f} times as fast ({', '.join(f'{x:.2f}' for x in ratios)}); first call "
            f"{told['first_s']['ours']:.1f} s and {told['first_s']['kerashub']:.1f} s"
        )
    return found


def agreement(llm: str, ours: Ours, theirs: Theirs, img, ids, out_ids) -> float:
    """Largest difference of logits. ValueError: more than LOGITS."""
    a, b = ours.logits(img, ids, out_ids), theirs.logits(img, ids, out_ids)
    a = (a[:, 1:] if llm == "opt" else a)[..., : b.shape[-1]]
    difference = float(np.abs(a - b).max())
    if not difference <= LOGITS:
        raise ValueError(f"KerasHub with our weights is not our model: logits differ by {difference:.2g}")
    return difference


def main(argv: list[str]) -> int:
    """The command line; a mistake is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser.add_argument("--llm", type=several(str), default=["opt", "t5"], help="opt, t5, or both with a comma")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of what is timed")
    parser.add_argument("--captions", type=several(int), default=[1, 4], help="of a picture")
    parser.add_argument("--batch", type=int, default=4, help="pictures")
    parser.add_argument("--tokens", type=int, default=20, help="of a caption")
    parser.add_argument("--rounds", type=int, default=5, help="in which both take turns")
    parser.add_argument("--out", type=pathlib.Path, help="file for all figures as JSON")
    values = parser.parse_args(argv)
    try:
        if unknown := [llm for llm in values.llm if llm not in FAMILIES]:
            raise ValueError(f"--llm names {', '.join(unknown)}: choose of {', '.join(FAMILIES)}")
        import keras
        import keras_hub

        jax.config.update("jax_enable_compilation_cache", False)
        cases = [case(llm, values) for llm in values.llm]
        versions = {"jax": jax.__version__, "keras": keras.__version__, "keras_hub": keras_hub.__version__}
        found = {"command": " ".join(["python", *sys.argv]), "revision": revision(), "cores": os.cpu_count()}
        found |= {"device": jax.devices()[0].device_kind, "versions": versions, "cases": cases}
        if values.out:
            values.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
