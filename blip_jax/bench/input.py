"""Speed and memory of the input pipeline, `blip-jax bench input`.

Pictures of 500x375 pixels are generated, saved as JPEG in BLIP's JSON layout, and read, decoded, cropped, augmented and
tokenised as in training. Measured: images per second of one core and the share of each stage, in processor time of one
thread (other programs do not count); then how the resident memory grows while the real TrainData delivers `examples`
examples.
"""

from __future__ import annotations

import collections
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from blip_jax import config
from blip_jax.bench import throughput
from blip_jax.data import image, pairs
from blip_jax.data.batches import TrainData
from blip_jax.data.formats import open_source
from blip_jax.data.source import Source
from blip_jax.data.text.clean import clean_caption
from blip_jax.data.text.wordpiece import Tokenizer, train_vocab

SIZE = (500, 375)  # pixels, a common size of web photographs
PICTURES = 64  # different files
WARM_UP = 0.2  # share of the examples before memory is first looked at
LIMIT = 50  # MB that memory may grow afterwards
WORDS = "a the dog cat woman man street beach red blue large small with on near holding standing two three old".split()


class Settings(NamedTuple):
    """What is measured."""

    examples: int = 20_000  # of the memory measurement
    timed: int = 500  # examples of the speed measurement
    img_size: int = 224  # pixels
    threads: int = 4  # that decode in the memory measurement


def write_pictures(folder: pathlib.Path) -> pathlib.Path:
    """PICTURES JPEGs with the detail of photographs (about 50 kB) and captions of 12 words. Returns the list."""
    rng, rows = np.random.default_rng(0), []
    for i in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            SIZE, Image.Resampling.BICUBIC
        )
        fine = Image.fromarray(rng.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)).filter(
            ImageFilter.GaussianBlur(1)
        )
        Image.blend(coarse, fine, 0.35).save(folder / f"{i}.jpg", quality=90)
        rows.append({"image": f"{i}.jpg", "caption": " ".join(rng.choice(WORDS, 12))})
    (folder / "list.json").write_text(json.dumps(rows))
    return folder / "list.json"


def stages(source: Source, tokenizer: Tokenizer, cfg, examples: int) -> dict[str, float]:
    """Processor seconds of one thread per example, by stage."""
    spent: collections.Counter = collections.Counter()
    size = cfg.model.img_size
    for i in range(examples):
        rng = np.random.default_rng(i)
        marks = [time.thread_time()]
        record = source[i % len(source)]
        marks.append(time.thread_time())
        picture = image.decode(record["image"], cfg.data.max_pixels)[0]
        marks.append(time.thread_time())
        img = image.train_transform(
            picture, size, rng, scale=cfg.data.crop_scale, flip=cfg.data.flip, randaugment=False
        )
        marks.append(time.thread_time())
        image.rand_augment(img, rng)
        marks.append(time.thread_time())
        tokenizer.encode([clean_caption(record["captions"][0], cfg.text.max_words)], cfg.text.max_len)
        marks.append(time.thread_time())
        spent.update(dict(zip(("read", "decode", "crop+resize", "augment", "tokenise"), np.diff(marks))))
    return {stage: seconds / examples for stage, seconds in spent.items()}


def memory(data: TrainData, examples: int) -> tuple[float, float, float]:
    """Resident MB after the warm-up, and the most seen later, over `examples` examples; and examples per second."""
    steps = max(1, examples // data.local_batch)
    seen, began = [], time.perf_counter()
    with data.batches(0) as batches:
        for step in range(steps):
            next(batches)
            if step + 1 >= WARM_UP * steps:
                seen.append(_resident())
    return seen[0], max(seen), steps * data.local_batch / (time.perf_counter() - began)


def _resident() -> float:
    """Resident memory of this process, MB (Linux)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmRSS: memory is measured on Linux only")


def run(settings: Settings, command: str, out: str = "", say: Callable = print) -> dict:
    """Measures and says both, writes JSON to `out` where given; returns what is in it.

    ValueError: no folder of `out`.
    """
    throughput.check_out(out)
    with tempfile.TemporaryDirectory() as name:
        found = _measure(pathlib.Path(name), settings, say)
    result = {"command": command, "workload": "input", "settings": settings._asdict(), **throughput.about(), **found}
    throughput.write(out, result)
    return result


def _measure(folder: pathlib.Path, settings: Settings, say: Callable) -> dict:
    listing = write_pictures(folder)
    train_vocab(WORDS, 300, folder / "vocab.txt")
    tokenizer = Tokenizer(folder / "vocab.txt")
    cfg = config.base()
    with cfg.unlocked():
        cfg.model.img_size = settings.img_size
        cfg.train.batch = min(64, settings.examples)
        cfg.data.threads = settings.threads
        cfg.data.train.pictures = config.source("json", str(listing))

    spent = stages(open_source("pictures", cfg.data.train.pictures), tokenizer, cfg, settings.timed)
    total = sum(spent.values())
    mean = sum(f.stat().st_size for f in folder.glob("*.jpg")) / PICTURES / 1000
    say(
        f"{SIZE[0]}x{SIZE[1]} JPEG of {mean:.0f} kB -> {settings.img_size}: {1 / total:.0f} images/s per core, "
        f"{settings.timed} examples"
    )
    for stage, seconds in spent.items():
        say(f"  {stage:12s} {1000 * seconds:6.2f} ms  {100 * seconds / total:5.1f} %")

    data = TrainData(cfg, tokenizer, pairs, process_index=0, process_count=1, skipped_path=folder / "skipped.jsonl")
    first, most, rate = memory(data, settings.examples)
    say(
        f"{settings.examples} examples through TrainData, {settings.threads} threads: {rate:.0f} images/s; resident "
        f"{first:.0f} MB after {WARM_UP:.0%}, at most {most:.0f} MB later: grew {most - first:.1f} MB (limit {LIMIT})"
    )
    return {
        "images_per_s_per_core": 1 / total,
        "stage_s": spent,
        "jpeg_kb": mean,
        "images_per_s": rate,
        "resident_mb": [first, most],
        "grew_mb": most - first,
    }
