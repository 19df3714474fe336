"""What a CapFilt run is made of: its config checked, and OUT/capfilt.json on record."""

from __future__ import annotations

import json
import os
import pathlib
import re

import jax
from ml_collections import ConfigDict

from blip_jax import __version__, buckets
from blip_jax.capfilt import shards
from blip_jax.config import capfilt
from blip_jax.console import plain, revision
from blip_jax.decode import limits
from blip_jax.inference.programs import MOST_BEAMS, MOST_SAMPLED, Method
from blip_jax.trees import flat

FILE = "capfilt.json"
# what may differ between two starts of one run: places and speed, nothing that changes a result
NOT_COMPARED = re.compile(
    r"written_by|(captioner|filter)\.path|settings\.(captioner|filter|text\.(captioner_)?vocab)|"
    r"settings\.data\.(threads|prefetch|max_bad_share|sources\.[^.]+\.(path|images|weight|cache))"
)
RANGES = {  # leaf -> (least, most, what that is)
    **dict.fromkeys(("threshold", "data.max_bad_share", "method.top_p"), (0, 1, "between 0 and 1")),
    **dict.fromkeys(
        (
            "device_batch",
            "shard_examples",
            "text.max_words",
            "data.max_pixels",
            "data.threads",
            "data.prefetch",
            "mesh.fsdp",
            "mesh.tensor",
        ),
        (1, float("inf"), "at least 1"),
    ),
    "method.n": (1, MOST_SAMPLED, f"between 1 and {MOST_SAMPLED}"),
    "method.beams": (1, MOST_BEAMS, f"between 1 and {MOST_BEAMS}"),
    "method.length_penalty": (-10, 10, "between -10 and 10"),
    **dict.fromkeys(("seed", "method.top_k", "method.min_length"), (0, float("inf"), "not negative")),
    **dict.fromkeys(("method.temperature", "method.repetition_penalty"), (1e-6, float("inf"), "positive")),
}


def validate(cfg: ConfigDict) -> None:
    """Checks a config of `config.capfilt` before anything is read. ValueError: one that lists every problem."""
    leaves = flat(plain(cfg))
    out = [
        f"{path} is {leaves[path]}: it must be {what}"
        for path, (least, most, what) in RANGES.items()
        if not least <= leaves[path] <= most
    ]
    out += [
        f"{name} is empty: give a workdir, a checkpoint, a Hugging Face folder or a name on its hub"
        for name in ("captioner", "filter")
        if not cfg[name]
    ]
    if cfg.dtype not in ("", "bfloat16", "float32"):
        out.append(f"dtype is {cfg.dtype!r}: choose bfloat16, float32, or '' for what each model was trained with")
    method = cfg.method
    if method.kind not in ("nucleus", "beam"):
        out.append(f"method.kind is {method.kind!r}: choose nucleus or beam")
    if method.kind == "beam" and method.n > method.beams:
        out.append(
            f"method.n is {method.n}: beam search with method.beams = {method.beams} gives at most so many captions; "
            "raise method.beams"
        )
    if method.max_length < method.min_length:
        out.append(
            f"method.max_length is {method.max_length}: it must be at least method.min_length = {method.min_length}"
        )
    if not len(cfg.data.sources):
        out.append("data.sources is empty: add a source, c.data.sources.name = source(kind, path)")
    if out:
        raise ValueError(
            f"the config has {len(out)} problem{'s' * (len(out) > 1)}:\n" + "\n".join(f"  {p}" for p in out)
        )


def method_of(cfg: ConfigDict) -> Method:
    """cfg.method as `programs.captioner` takes it."""
    return Method(**cfg.method)


def method_of_language_model(cfg: ConfigDict) -> Method:
    """cfg.method as `language.captioner` takes it: lengths are new tokens, beams are scored as LAVIS does."""
    how = cfg.method
    return Method(**how)._replace(rule="lavis", **limits.lengths(1, how.min_length, how.max_length))


def on_record(cfg: ConfigDict, captioner: dict, judge: dict, vocabulary: int, lengths: dict[str, int]) -> dict:
    """What OUT/capfilt.json says: settings, checkpoints, vocabulary, records of each source. Paths are made absolute.

    captioner, judge: {"path", "crc32"} of the checkpoints, of a captioner with other words than the filter also its
    own "vocabulary"; vocabulary: Tokenizer.crc of the filter.
    """
    settings = plain(cfg)
    for src in settings["data"]["sources"].values():
        for leaf in ("path", "images"):
            if src[leaf] and src["kind"] != "tfds" and not buckets.is_bucket(src[leaf]):
                src[leaf] = os.path.abspath(src[leaf])
    return {
        "written_by": f"blip_jax {__version__}, revision {revision()}, jax {jax.__version__}",
        "settings": settings,
        "captioner": captioner,
        "filter": judge,
        "vocabulary": vocabulary,
        "records": lengths,
    }


def settle(out: pathlib.Path, record: dict) -> None:
    """Writes OUT/capfilt.json, or compares with what is there.

    ValueError: `out` holds a run with other settings, listed.
    """
    if not (out / FILE).exists():
        # one process makes it, the others compare
        shards.put(out, FILE, json.dumps(record, indent=1) + "\n", keep=True)
    # a leaf that there was none of when it was begun had what is its default now
    before = {f"settings.{leaf}": value for leaf, value in flat(plain(capfilt())).items()} | flat(read(out))
    now = flat(record)
    changed = [
        f"  {name}: {before.get(name, 'absent')!r} there, {now.get(name, 'absent')!r} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not NOT_COMPARED.fullmatch(name)
    ]
    if changed:
        raise ValueError(
            "\n".join(
                [
                    f"{out} holds a CapFilt run with other settings:",
                    *changed,
                    "give another --out, or the settings it was begun with",
                ]
            )
        )


def read(out: pathlib.Path) -> dict:
    """OUT/capfilt.json. ValueError: there is none."""
    path = out / FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read ({e}): give the folder of a `blip-jax capfilt` run") from e
