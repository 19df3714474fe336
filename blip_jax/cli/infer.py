"""blip-jax caption | match | localize | answer | features: pictures on the command line go through inference/verbs.py.

Results go to standard output as they come; progress, pictures that cannot be used and the times go to standard error. A
picture that cannot be used does not keep the others from being done; the exit status is then 1.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from blip_jax import buckets
from blip_jax.cli.parse import require, set_flags
from blip_jax.data import paths

LOADED = time.monotonic()  # stands for the start of the process where the system does not tell it
THREADS = 8  # that read pictures
# what counts as a picture in a folder
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
SUFFIXES += (".avif", ".heic", ".heif")
START = 19  # of the fields of /proc/self/stat behind the program's name: start of the process, in ticks since boot


def caption(argv: list[str]) -> int:
    """blip-jax caption."""
    values, own = _flags(
        n=(1, "captions per image"),
        method=("beam", "beam or nucleus"),
        beams=(3, "of beam search"),
        prompt=(None, "what captions continue; default: as trained"),
        min_length=(5, "tokens, the prompt's too"),
        max_length=(20, "tokens, the prompt's too"),
        top_p=(0.9, "of nucleus"),
        top_k=(50, "of nucleus; 0: all"),
        temperature=(1.0, "of nucleus"),
        repetition_penalty=(0.0, "0: 1 with beams, 1.1 with nucleus"),
        length_penalty=(1.0, "of beam search"),
        seed=(0, "of nucleus"),
    )
    files = _parse(values, argv, "images")
    how = own()
    how["repetition_penalty"] = how.get("repetition_penalty") or None
    return _each(
        values,
        files,
        lambda model, images: [{"captions": found} for found in model.caption(images, **how)],
        lambda row: [found["caption"] for found in row["captions"]],
    )


def match(argv: list[str]) -> int:
    """blip-jax match."""
    values, own = _flags(first=("[ENC]", "first token of a text: [ENC] or [CLS]"))
    flags.DEFINE_multi_string("text", None, "a text; repeatable: each image is compared with each", flag_values=values)
    files, how = _parse(values, argv, "images", "text"), own()

    def run(model, images):
        found = model.match(images, values.text, every_pair=True, **how)
        return [
            {
                "matches": [
                    {"text": text, "probability": float(p), "cosine": float(c)}
                    for text, p, c in zip(values.text, ps, cs)
                ]
            }
            for ps, cs in zip(found["probability"], found["cosine"])
        ]

    def lines(row: dict) -> list[str]:
        return [f"probability {m['probability']:.4f}  cosine {m['cosine']:.4f}  {m['text']}" for m in row["matches"]]

    return _each(values, files, run, lines)


def localize(argv: list[str]) -> int:
    """blip-jax localize."""
    values, _ = _flags()
    flags.DEFINE_multi_string("text", None, "a text; repeatable: each is looked for in each image", flag_values=values)
    flags.DEFINE_integer("layer", None, "of the text encoder, from 0; default: 7 of 12", flag_values=values)
    flags.DEFINE_string("out", None, "PNG to write: the maps over the picture, of one picture", flag_values=values)
    files, asked = _parse(values, argv, "images", "text"), values.text
    if values.out and len(files) != 1:
        raise ValueError(f"--out={values.out} is of one picture, and {len(files)} are given: give one, or no --out")
    out = output("--out", values.out, ".png") if values.out else None

    def run(model, images):
        from blip_jax.inference import heat
        from blip_jax.inference.localize import peak

        found = model.localize([img for img in images for _ in asked], asked * len(images), layer=values.layer)
        if out:
            with buckets.whole(out) as file:
                heat.sheet(heat.photograph(files[0], model.cfg.data.max_pixels), found).save(file, "PNG")
        rows = [
            {"text": text, "probability": one["score"], "words": [_at(*row) for row in zip(one["words"], peaks)]}
            for text, one in zip(asked * len(images), found)
            for peaks in [[peak(heat) for heat in one["maps"]]]
        ]
        return [{"texts": rows[i : i + len(asked)]} for i in range(0, len(rows), len(asked))]

    def lines(row: dict) -> list[str]:
        return [
            line
            for one in row["texts"]
            for line in (
                f"probability {one['probability']:.4f}  {one['text']}",
                *(f"x {word['x']:.2f}  y {word['y']:.2f}  {word['word']}" for word in one["words"]),
            )
        ]

    return _each(values, files, run, lines)


def _at(word: str, at: tuple[float, float]) -> dict:
    return {"word": word, "x": at[0], "y": at[1]}


def answer(argv: list[str]) -> int:
    """blip-jax answer."""
    values, own = _flags(
        k=(128, "with --answers: how many are scored in full"),
        beams=(3, "of beam search"),
        min_length=(1, "tokens with the first, [DEC]"),
        max_length=(10, "tokens with the first, [DEC]"),
    )
    flags.DEFINE_string(
        "answers", None, "file of answers to choose from, one a line; default: they are generated", flag_values=values
    )
    flags.DEFINE_multi_string(
        "question", None, "a question; repeatable: each is asked of each image", flag_values=values
    )
    files, how = _parse(values, argv, "images", "question"), own()
    if values.answers:
        lines = buckets.fetched(values.answers).read_text(encoding="utf-8-sig").splitlines()
        how |= {"method": "rank", "answers": [line for line in lines if line.strip()]}
    asked = values.question

    def run(model, images):
        found = model.answer([img for img in images for _ in asked], asked * len(images), **how)
        rows = [{"question": question, **one} for question, one in zip(asked * len(images), found)]
        return [{"answers": rows[i : i + len(asked)]} for i in range(0, len(rows), len(asked))]

    return _each(values, files, run, lambda row: [f"{a['question']} {a['answer']}" for a in row["answers"]])


def features(argv: list[str]) -> int:
    """blip-jax features."""
    values, own = _flags(mode=("", "image, text or multimodal; default: by what is given"))
    flags.DEFINE_string("out", None, "NumPy archive to write", flag_values=values)
    flags.DEFINE_multi_string("text", [], "a text; repeatable: one for all images, or one for each", flag_values=values)
    files, how, texts = _parse(values, argv, "out"), own(), values.text
    if not files and not texts:
        raise ValueError("blip-jax features needs pictures, or texts with --text=..., or both")
    out = output("--out", values.out, ".npz")
    import numpy as np

    work = Work(values, files)
    read = [found for chunk in work.chunks(len(files)) for found in chunk]
    if files and not read:
        return work.end()
    if len(texts) == len(files) > 1:  # the text of a picture that cannot be used goes with it
        texts = [texts[i] for i, _ in read]
    found = work.model.features([img for _, img in read] or None, texts or None, **how)
    labels = {"images": [files[i] for i, _ in read], "texts": texts}
    with buckets.whole(out) as path, path.open("wb") as file:
        np.savez(file, **found, **{name: np.array(x) for name, x in labels.items() if x})
    shapes = {name: list(x.shape) for name, x in found.items()}
    work.row(
        {"out": values.out, "arrays": shapes},
        len(read),
        [f"{values.out}: {name} {shape}" for name, shape in shapes.items()],
    )
    return work.end()


def _each(values, files: list[str], run: Callable, lines: Callable[[dict], list[str]]) -> int:
    """run(model, images) -> a row for each image, said as `lines`, or as JSON. Returns the exit status."""
    work = Work(values, files)
    for chunk in work.chunks(work.model.batch):
        images = [img for _, img in chunk]
        if work.marked:  # as many as before, so that nothing is compiled for the last few
            images += images[-1:] * (work.marked[1] - len(images))
        for (i, _), row in zip(chunk, run(work.model, images)):
            work.row({"image": files[i], **row}, 1, [f"{files[i]}: {line}" for line in lines(row)])
        work.mark()
    return work.end()


class Work:
    """The model of --model and the pictures it is given.

    Says what comes of them, what went wrong, and how long it took.
    """

    def __init__(self, values, files: list[str]):
        from tqdm import tqdm

        from blip_jax.inference.pretrained import from_pretrained

        self.json, self.files = values.json, files
        self.model = from_pretrained(values.model, dtype=values.dtype or None, vocab=values.vocab, batch=values.batch)
        self.bar = tqdm(total=len(files), unit=" images", file=sys.stderr, disable=len(files) <= self.model.batch)
        self.bad = self.done = 0
        self.first = None  # seconds from the start of the process to the first result
        self.marked = None  # (time, images done) after the first chunk, which waited for the compiler

    def chunks(self, size: int) -> Iterator[list[tuple[int, Any]]]:
        """(number of the file, pixels u8[S,S,3]) of those that can be used, at most `size` at a time.

        The next ones are read meanwhile.
        """
        from blip_jax.inference import inputs

        cfg = self.model.cfg

        def read(file: str):
            return inputs.pixels(inputs.Picture(file, file), cfg.model.img_size, cfg.data.max_pixels)

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:

            def start(at: int) -> list[tuple[int, concurrent.futures.Future]]:
                return [(i, pool.submit(read, self.files[i])) for i in range(at, min(at + size, len(self.files)))]

            ahead = start(0)
            while ahead:
                now, ahead = ahead, start(ahead[-1][0] + 1)
                found = ((i, self._result(self.files[i], future)) for i, future in now)
                if chunk := [(i, img) for i, img in found if img is not None]:
                    yield chunk

    def _result(self, file: str, future: concurrent.futures.Future):
        """The pixels, or None for a picture that cannot be used, which is said."""
        try:
            return future.result()
        except ValueError as e:
            self.bad += 1
            self.bar.update()
            self.bar.write(f"error: {e}", file=sys.stderr)
            if self.json:
                self.bar.write(json.dumps({"image": file, "error": str(e)}, ensure_ascii=False), file=sys.stdout)
            return None

    def row(self, row: dict, images: int, lines: list[str]) -> None:
        """Says a result of `images` images: `row` with --json, else `lines`."""
        self.first = self.first or since_start()
        for line in [json.dumps(row, ensure_ascii=False)] if self.json else lines:
            self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()
        self.done += images
        self.bar.update(images)

    def mark(self) -> None:
        self.marked = self.marked or (time.monotonic(), self.done)

    def end(self) -> int:
        """Says the times; returns the exit status."""
        self.bar.close()
        parts = [f"{self.done} images done, {self.bad} could not be used"] if self.files else []
        if self.first:
            parts.append(f"first result {self.first:.1f} s after the start")
        if self.marked and self.done > self.marked[1]:
            parts.append(f"then {(self.done - self.marked[1]) / (time.monotonic() - self.marked[0]):.2f} images/s")
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        parts.append(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB")
        print("; ".join(parts), file=sys.stderr)
        return int(self.bad > 0)


def since_start() -> float:
    """Seconds since the process began; where the system does not tell, since this file was imported."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[START]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.monotonic() - LOADED


def _flags(**own: tuple[Any, str]) -> tuple[flags.FlagValues, Callable[[], dict]]:
    """The flags of all verbs and those of one, name -> (default, help).

    Also a function that gives the values of the latter, as far as they are on the command line: defaults are the verb's
    own, which for a BLIP-2 are others than those that are shown.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt()  # pictures and flags in any order
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
    shared = {
        "model": (None, "workdir, checkpoint, Hugging Face folder or name"),
        "vocab": ("", "default: what comes with the model"),
        "dtype": ("", "float32 or bfloat16; default: by device"),
        "batch": (0, "images per pass; default: by device"),
    }
    for name, (default, text) in (shared | own).items():
        define.get(type(default), flags.DEFINE_string)(name, default, text, flag_values=values)
    flags.DEFINE_bool("json", False, "results as JSON, one object a line", flag_values=values)
    return values, lambda: {name: getattr(values, name) for name in own if values[name].present}


def _parse(values: flags.FlagValues, argv: list[str], *required: str) -> list[str]:
    """Sets the flags; returns the pictures, those of folders too.

    ValueError: something of `required`, flags or "images", is not given, or a folder holds no picture.
    """
    files = pictures(set_flags(values, argv))
    missing = [f"--{name}" for name in ("model", *required) if name != "images" and not getattr(values, name)]
    if "images" in required and not files:
        missing.append("pictures")
    require(argv[0], missing)
    return files


def output(flag: str, given: str, ending: str):
    """The file to write that a flag names. ValueError: another ending, or a local folder that is not there."""
    path = buckets.of(given, flag)
    if not given.endswith(ending) or not buckets.is_bucket(path) and not path.parent.is_dir():
        raise ValueError(f"{flag}={given}: give a file ending in {ending} in a folder that exists")
    return path


def pictures(given: list[str]) -> list[str]:
    """The files that arguments name: a file itself, of a folder all pictures below it, of a pattern its matches.

    What does not exist stays, to be named with the others that cannot be used. ValueError: a folder without a picture.
    """
    out = []
    for path in given:
        buckets.local(path, "a picture")
        try:
            found = paths.find(path)
        except ValueError:
            found = [path]
        for one in found:
            out += _below(one) if os.path.isdir(one) else [one]
    return out


def _below(folder: str) -> list[str]:
    """The pictures below a folder, sorted, but for hidden ones; what is left out is said."""
    out, others = [], 0
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(files):
            if not name.startswith("."):
                out += [os.path.join(at, name)] * (picture := name.lower().endswith(SUFFIXES))
                others += not picture
    if not out:
        raise ValueError(f"{folder!r} holds no picture ({', '.join(SUFFIXES[:7])}, ...): give another folder, or files")
    left = f"; {others} other files are left out" if others else ""
    print(f"{folder}: {len(out)} pictures{left}", file=sys.stderr)
    return out
