"""BLIP-2 with ViT-g and OPT-2.7B really runs on a CPU, beside transformers:

  python benchmarks/blip2_fullsize.py weights DIR          # random weights in bfloat16, 7.7 GB, written once
  python benchmarks/blip2_fullsize.py run DIR --image=photo.jpg --rounds=3 --out=FILE.json
  python benchmarks/blip2_fullsize.py side ours DIR --image=photo.jpg     # one side alone, as a round has it
  python benchmarks/blip2_fullsize.py lower                # stage 1 with ViT-g traced and lowered, not run

A round is one process of each side after the other, so that no more than one model is in memory: it loads the folder,
does each piece of work once to warm up (ours compiles) and then `--times` times, and says the median. The work: one
caption and four captions of a picture, nucleus sampling of 20 tokens, and an answer of 10 tokens by 5 beams.
transformers must find our caption as likely as we do before anything counts. Needs `pip install -e ".[peers]"` and
8 GB of memory beside the file cache.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from blip_jax import config, tasks, trees
from blip_jax.console import say
from blip_jax.convert import hf_blip2, hf_blip2_config, language_models
from blip_jax.convert.source import Source
from blip_jax.data.scenes.world import vocab_captions
from blip_jax.data.text.bpe import train_bpe
from blip_jax.models import initial
from blip_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD

FAMILY, TOKENS, ANSWER, BEAMS, CAPTIONS = "blip2_opt", 20, 10, 5, (1, 4)
PROMPT, QUESTION = "a photo of", "Question: what is in the picture? Answer:"
AGREEMENT = 0.05  # of a token's log-probability, the mean difference that bfloat16 may make
BLOCK = 1 << 22  # random numbers that are drawn, and repeated
WORDS = 2000  # of the byte-level vocabulary, whose words mean nothing to random weights
JOBS = [f"caption/{n}" for n in CAPTIONS] + ["answer"]


# --- weights ----------------------------------------------------------------------------------------------------------
def settings(tower: str = "eva_g", qformer: str = "base", llm: str = "opt_2.7b"):
    """The config of the model, with the last norm as transformers has it."""
    cfg = config.blip2(tower, qformer, llm).unlock()
    cfg.model.update(vision_eps=hf_blip2_config.BLOCK_EPS)
    return cfg


def write_weights(folder: pathlib.Path, cfg) -> None:
    """A Hugging Face folder of random bfloat16 weights of the size of `cfg`: matrices of deviation 0.02, norms that do
    nothing, biases of zero."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = jax.eval_shape(lambda key: initial.init_params(cfg, tasks.build(cfg), key), jax.random.key(0))
    like = trees.nest((path, np.broadcast_to(np.float32(0), x.shape)) for path, x in trees.paths(shapes))
    source = Source(FAMILY, {"params": like}, cfg, None, [])
    block = (0.02 * np.random.default_rng(0).standard_normal(BLOCK, np.float32)).astype(jax.numpy.bfloat16)

    def drawn() -> Iterator[tuple[str, np.ndarray]]:
        start = 0
        for name, x in hf_blip2.tensors(FAMILY, source):
            if x.ndim < 2:
                norm = name.endswith("weight")
                yield name, np.full(x.shape, norm, jax.numpy.bfloat16)
                continue
            start = (start + 7919) % BLOCK  # so that layers differ
            yield name, np.resize(np.roll(block, start), x.shape)

    hf_blip2.save_shards(folder, drawn())
    image = min(language_models.IMAGE_TOKENS["opt"], cfg.model.llm.vocab_size - 1)
    said = hf_blip2_config.model_json(FAMILY, cfg.model, {"image_token_index": image}) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    train_bpe(list(vocab_captions(WORDS)), min(WORDS, cfg.model.llm.vocab_size), folder / "vocab.json")


# --- one side ---------------------------------------------------------------------------------------------------------
def ours(folder: pathlib.Path, image: pathlib.Path) -> tuple[dict[str, Callable], Callable]:
    """{job: call -> text}, and a call that gives what the other side checks."""
    import blip_jax

    model = blip_jax.from_pretrained(folder, dtype="bfloat16")
    how = dict(method="nucleus", min_length=TOKENS, max_length=TOKENS, repetition_penalty=1.0, prompt=PROMPT)
    jobs = {f"caption/{n}": lambda n=n: model.caption(image, n, **how) for n in CAPTIONS}
    question = QUESTION.removeprefix("Question: ").removesuffix(" Answer:")
    jobs["answer"] = lambda: model.answer(
        image, question, beams=BEAMS, min_length=ANSWER, max_length=ANSWER, length_penalty=1.0
    )

    def check() -> dict:
        """The prompt and a text, as ids, and how likely the text is."""
        ids, text = (model.tokenizer.encode([t], 64) for t in (PROMPT, " a red star and a blue ring on the left\n"))
        ids, text = ids[0][ids[1]], text[0][text[1]][1:]
        return {"prompt": ids.tolist(), "text": text.tolist(), "log_prob": likelihood(model, image, ids, text)}

    return jobs, check


def likelihood(model, image, ids: np.ndarray, text: np.ndarray) -> float:
    """Summed log-probability of `text` behind the prompt `ids`."""
    from blip_jax.inference import inputs, language

    img = np.stack([inputs.pixels(image, model.cfg.model.img_size, model.cfg.data.max_pixels)])
    rows = ids[None], np.ones((1, len(ids)), bool), text[None], np.ones((1, len(text)), bool)
    with jax.set_mesh(model.mesh):
        return -float(jax.jit(language.likelihood(model.model))(model.params, img, *rows)["nll"][0, 0])


def transformers(folder: pathlib.Path, image: pathlib.Path, told: dict) -> tuple[dict[str, Callable], Callable]:
    """As `ours`, with the same ids. told: what `ours` gave to check."""
    import torch
    import transformers as library

    from blip_jax.data.text.bpe import Tokenizer
    from blip_jax.inference import inputs

    net = library.Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    img = inputs.pixels(image, net.config.vision_config.image_size, 10**9)[None].astype(np.float32)
    img = ((img / 255.0 - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)).transpose(0, 3, 1, 2)
    pixels, tokenizer = torch.from_numpy(np.ascontiguousarray(img)).to(torch.bfloat16), Tokenizer(folder / "vocab.json")
    queries = [net.config.image_token_index] * net.config.num_query_tokens

    def given(ids) -> dict:
        ids = torch.tensor([queries + list(map(int, ids))])
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def tokens(text: str) -> np.ndarray:
        ids, mask = tokenizer.encode([text], 64)
        return ids[mask]

    fixed = lambda n: {"min_new_tokens": n, "max_new_tokens": n}
    drawn = dict(do_sample=True, top_p=0.9, top_k=50, **fixed(TOKENS))
    jobs = {
        f"caption/{n}": lambda n=n: net.generate(**given(tokens(PROMPT)), num_return_sequences=n, **drawn)
        for n in CAPTIONS
    }
    jobs["answer"] = lambda: net.generate(**given(tokens(QUESTION)), num_beams=BEAMS, **fixed(ANSWER))
    jobs = {name: torch.inference_mode()(job) for name, job in jobs.items()}

    @torch.inference_mode()
    def check() -> dict:
        text = told["text"]
        logits = net(**given([*told["prompt"], *text])).logits[0, -len(text) - 1 : -1].float()
        each = logits.log_softmax(-1)[torch.arange(len(text)), torch.tensor(text)]
        return {**told, "log_prob": float(each.sum())}

    return jobs, check


def side(name: str, folder: pathlib.Path, image: pathlib.Path, times: int, told: dict, wanted: list[str]) -> dict:
    """Seconds to load, of the first time and of each later time of every job; what was checked; peak memory in GB.

    wanted: which jobs.
    """
    start = time.perf_counter()
    jobs, check = ours(folder, image) if name == "ours" else transformers(folder, image, told)
    jobs = {what: job for what, job in jobs.items() if what in wanted}
    out = {"side": name, "load_s": time.perf_counter() - start, "first_s": {}, "s": {}, "cpu_s": {}, "made": {}}
    say(f"{name}: loaded in {out['load_s']:.0f} s, {peak_gb():.2f} GB so far")
    for what, job in jobs.items():
        seconds, cpu = [], []
        for _ in range(1 + times):
            start, used, made = time.perf_counter(), time.process_time(), job()
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
            say(f"{name}: {what} {seconds[-1]:.2f} s, {cpu[-1]:.1f} s of processor; {peak_gb():.2f} GB so far")
        out["first_s"][what], out["s"][what], out["cpu_s"][what] = seconds[0], seconds[1:], cpu
        out["made"][what] = np.asarray(made).shape if name != "ours" else made
    out["checked"] = check()
    out["peak_gb"] = peak_gb()
    return out


def peak_gb() -> float:
    """The most that the process held, GB of 1e9 bytes, what it read of files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# --- both -------------------------------------------------------------------------------------------------------------
def run(argv: argparse.Namespace) -> dict:
    """Rounds of both sides. ValueError: they do not agree."""
    rounds, told = [], {}
    for i in range(argv.rounds):
        found = {}
        for name in ("ours", "transformers"):
            asked = [sys.executable, __file__, "side", name, str(argv.folder), f"--image={argv.image}"]
            asked += [f"--times={argv.times}", f"--jobs={','.join(argv.jobs)}", f"--told={json.dumps(told)}"]
            lines = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            say("\n".join(lines[:-1]))
            found[name] = json.loads(lines[-1])
            told = found["ours"]["checked"]
        rounds.append(found)
        say(f"round {i + 1} of {argv.rounds}: " + agreement(found))
        say("  times as fast: " + ", ".join(f"{job} {ratio(found, job):.2f}" for job in argv.jobs))
    over = {job: [ratio(found, job) for found in rounds] for job in argv.jobs}
    return {"command": " ".join(["python", *sys.argv]), "rounds": rounds, "ours_over": over}


def ratio(found: dict, job: str) -> float:
    """How many times as fast ours was in a round, of the medians."""
    return statistics.median(found["transformers"]["s"][job]) / statistics.median(found["ours"]["s"][job])


def agreement(found: dict) -> str:
    """How far the two log-probabilities of a text are apart. ValueError: too far."""
    a, b = (found[name]["checked"]["log_prob"] for name in ("ours", "transformers"))
    each = abs(a - b) / len(found["ours"]["checked"]["text"])
    if not each <= AGREEMENT:
        raise ValueError(f"transformers with the same weights is not our model: {a:.3f} and {b:.3f} for one text")
    return f"log-probabilities {a:.3f} and {b:.3f}, {each:.4f} a token apart"


def lower() -> None:
    """Stage 1 with ViT-g, batch 8: shapes, and the step lowered to StableHLO, neither compiled nor run."""
    import fullsize

    from blip_jax.tasks import blip2_stage1

    cfg = config.blip2("eva_g").unlock()
    cfg.task = blip2_stage1.leaves()
    cfg.train.batch, cfg.train.steps = fullsize.BATCH, fullsize.STEPS
    create, step = fullsize.make(cfg)
    shapes = jax.eval_shape(create, jax.random.key(0))
    numbers = {
        n: sum(x.size for x in jax.tree.leaves(p)) for n, p in (("trained", shapes.params), ("frozen", shapes.frozen))
    }
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in tasks.of(cfg).shapes(cfg).items()}
    start = time.perf_counter()
    text = jax.jit(step, donate_argnums=0).trace(shapes, batch).lower().as_text()
    say(f"ViT-g, first stage, batch {cfg.train.batch}: {numbers['trained']:,} trained, {numbers['frozen']:,} frozen")
    say(f"traced and lowered in {time.perf_counter() - start:.1f} s to {text.count(chr(10)):,} lines of StableHLO")


def main(argv: list[str]) -> int:
    """The command line; a mistake is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    of = {name: what.add_parser(name) for name in ("weights", "run", "side", "lower")}
    of["side"].add_argument("name", choices=("ours", "transformers"))
    for name in ("weights", "run", "side"):
        of[name].add_argument("folder", type=pathlib.Path, help="of the weights")
    for name in ("run", "side"):
        of[name].add_argument("--image", type=pathlib.Path, required=True, help="a picture")
        of[name].add_argument("--times", type=int, default=3, help="that each piece of work is done after a first time")
        of[name].add_argument("--jobs", type=lambda x: x.split(","), default=JOBS, help=f"of {', '.join(JOBS)}")
    of["run"].add_argument("--rounds", type=int, default=3)
    of["run"].add_argument("--out", type=pathlib.Path, help="file for all figures as JSON")
    of["side"].add_argument("--told", type=json.loads, default={}, help=argparse.SUPPRESS)
    values = parser.parse_args(argv)
    try:
        if values.what == "weights":
            write_weights(values.folder, settings())
        elif values.what == "lower":
            lower()
        elif values.what == "side":
            found = side(values.name, values.folder, values.image, values.times, values.told, values.jobs)
            print(json.dumps(found, default=str), flush=True)
        else:
            found = run(values)
            if values.out:
                values.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
