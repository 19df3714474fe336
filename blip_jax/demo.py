"""`blip-jax demo`: from nothing to a trained, evaluated model on the built-in world, and a table of what came out."""

from __future__ import annotations

import json
import math
import pathlib

from blip_jax import train
from blip_jax.data import scenes, text
from blip_jax.summary import say

VOCAB_SCENES = 20_000  # captions that the vocabulary is trained on


def run(cfg, workdir) -> dict:
    """Trains a vocabulary of `cfg.model.med.vocab_size`, then the config, in `workdir`, and prints the table.

    Run again, it resumes; a finished run only prints its table. Returns `train.fit`'s result.
    """
    workdir = pathlib.Path(workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    if not cfg.text.vocab:
        cfg.text.vocab = str(workdir / "vocab.txt")
        if not pathlib.Path(cfg.text.vocab).exists():
            beside = workdir / "vocab.txt.tmp"
            text.train_vocab(scenes.vocab_captions(VOCAB_SCENES), cfg.model.med.vocab_size - len(text.EXTRA), beside)
            beside.replace(cfg.text.vocab)
            say(f"vocabulary from the captions of {VOCAB_SCENES} scenes: {cfg.text.vocab}")
    out = train.fit(cfg, workdir)
    if out["stopped"]:
        return out
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    say("\n" + summary([r for r in rows if "train/loss" in r], [r for r in rows if "eval/r_mean" in r], workdir))
    return out


def summary(trained: list[dict], evaluated: list[dict], workdir: pathlib.Path) -> str:
    """The table of a finished run from its metrics rows: losses first and last, recalls against chance, images/s."""
    first, last = trained[0], trained[-1]
    names = [n for n in ("train/loss", "train/loss_itc", "train/loss_itm", "train/loss_lm") if n in first]
    lines = [f"{'':14} {'first':>9} {'last':>9}   log rows of steps {first['step']} and {last['step']}"]
    lines += [f"{n.removeprefix('train/'):14} {first[n]:9.3f} {last[n]:9.3f}" for n in names]
    lines.append("")
    result = {n.removeprefix("eval/"): v for n, v in evaluated[-1].items()}
    lines.append(retrieval_table(result))
    rates = sorted(r["train/examples_per_s"] for r in trained if "train/examples_per_s" in r)
    rate = f"{rates[len(rates) // 2]:.1f} images/s in training (median)" if rates else "too few steps for images/s"
    outputs = f"outputs in {workdir}: checkpoints/, metrics.jsonl, tb/, config.json, vocab.txt"
    return "\n".join([*lines, "", rate, outputs])


def retrieval_table(result: dict) -> str:
    """Recalls of both directions in percent, re-ranked and by cosine alone, beside what chance would give."""
    images, texts = result["images"], result["texts"]
    lines = [f"{f'{images} images, {texts} captions':28} {'R@1':>7} {'R@5':>7} {'R@10':>7}"]
    for name, side in (("image to text", "txt"), ("text to image", "img")):
        for suffix, prefix in (("", ""), (", cosine alone", "itc_")):
            numbers = [result[f"{prefix}{side}_r{k}"] for k in (1, 5, 10)]
            lines.append(f"{name + suffix:28} " + " ".join(f"{n:7.1f}" for n in numbers))
        chance = [chance_recall(images, texts, k, side) for k in (1, 5, 10)]
        lines.append(f"{name + ', chance':28} " + " ".join(f"{n:7.1f}" for n in chance))
    return "\n".join(lines)


def chance_recall(images: int, texts: int, k: int, side: str) -> float:
    """R@k in percent of a random order. side "img": one image is right; "txt": texts/images of the texts are right."""
    if side == "img":
        return 100.0 * min(k, images) / images
    right = max(1, round(texts / images))
    return 100.0 * (1 - math.comb(texts - right, min(k, texts)) / math.comb(texts, min(k, texts)))
