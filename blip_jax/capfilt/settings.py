"""What a CapFilt run is made of: its config checked, two models from their checkpoints, and OUT/capfilt.json on
record."""

from __future__ import annotations

import json
import os
import pathlib
import re
import zlib
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from blip_jax import __version__, checkpoint, config, trees
from blip_jax.capfilt import caption, shards
from blip_jax.capfilt.caption import Method
from blip_jax.console import plain, revision, say
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.models.blip import Blip
from blip_jax.trees import flat

FILE = "capfilt.json"
# what may differ between two starts of one run: places and speed, nothing that changes a result
NOT_COMPARED = re.compile(
    r"written_by|(captioner|filter)\.(path|step)|settings\.(captioner|filter)|"
    r"settings\.data\.(threads|prefetch|max_bad_share|sources\.\w+\.(path|images|weight))"
)
RANGES = {  # leaf -> (least, most, what that is)
    **dict.fromkeys(("threshold", "data.max_bad_share", "method.top_p"), (0, 1, "between 0 and 1")),
    **dict.fromkeys(
        (
            "device_batch",
            "shard_examples",
            "method.n",
            "method.beams",
            "text.max_words",
            "data.max_pixels",
            "data.threads",
            "data.prefetch",
        ),
        (1, float("inf"), "at least 1"),
    ),
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
        f"{name} is empty: give a workdir of `blip-jax train` or one of its checkpoint folders"
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


class Part(NamedTuple):
    """The captioner or the filter, from its checkpoint."""

    folder: pathlib.Path  # of the checkpoint
    vocab: pathlib.Path
    max_len: int  # tokens of a text, as it was trained
    prompt: str  # likewise
    model: Blip
    params: dict  # numpy arrays
    crc32: int  # of the parameters

    @property
    def record(self) -> dict:
        return {"path": str(self.folder), "step": self.folder.name, "crc32": self.crc32}


def load(cfg: ConfigDict) -> tuple[Part, Part, Tokenizer]:
    """Captioner, filter and their tokenizer. ValueError: a checkpoint cannot do its work, or their vocabularies
    differ."""
    captioner = _load(cfg, "captioner", "decoder")
    same = checkpoint.newest(cfg.filter) == captioner.folder
    judge = _load(cfg, "filter", "encoder", captioner if same else None)
    if captioner.vocab.read_bytes() != judge.vocab.read_bytes():
        raise ValueError(
            f"captioner and filter have different vocabularies, {captioner.vocab} and {judge.vocab}: fine-tune both "
            "from the same pre-training"
        )
    tokenizer = Tokenizer(captioner.vocab)
    if captioner.prompt != cfg.text.prompt:
        say(
            f"capfilt: captions continue text.prompt={cfg.text.prompt!r}; the captioner was trained with {captioner.prompt!r}"
        )
    prompt, method = len(caption.prompt_ids(tokenizer, cfg.text.prompt)), cfg.method
    room = captioner.model.med_sizes["positions"]
    if not prompt < method.max_length <= room:
        raise ValueError(
            f"method.max_length is {method.max_length}: it must be more than the {prompt} tokens of text.prompt "
            f"with [DEC], and at most the captioner's {room} positions"
        )
    return captioner, judge, tokenizer


def _load(cfg: ConfigDict, name: str, part: str, loaded: Part | None = None) -> Part:
    """The checkpoint cfg[name]; `part` (encoder or decoder) is what it must have. `loaded`: the same one, loaded
    already."""
    folder = checkpoint.newest(cfg[name])
    saved = checkpoint.load_config(folder)
    sizes = config.base().unlock()
    sizes.update({"model": saved["model"]})
    if not sizes.model[part]:
        raise ValueError(
            f"{name} is {folder}, a model without {part} (model.{part}=False, objective {saved['objective']}): give "
            + ("one that was trained to caption" if part == "decoder" else "one that was trained to match texts")
        )
    sizes.model.dtype = cfg.dtype or sizes.model.dtype
    vocab = _vocabulary(folder, saved)
    params = loaded.params if loaded else checkpoint.load_params(folder)
    crc32 = loaded.crc32 if loaded else _crc32(params)
    return Part(
        folder,
        vocab,
        saved["text"]["max_len"],
        saved["text"].get("prompt", ""),
        Blip.from_config(sizes.model),
        params,
        crc32,
    )


def _vocabulary(folder: pathlib.Path, saved: dict) -> pathlib.Path:
    """The vocabulary that a run keeps beside its checkpoints, else the one that its config names."""
    suffix = pathlib.Path(saved["text"]["vocab"]).suffix
    for path in (folder.parent.parent / f"vocab{suffix}", pathlib.Path(saved["text"]["vocab"])):
        if path.is_file():
            return path
    raise ValueError(
        f"{folder} was trained with the vocabulary {saved['text']['vocab']}, which is gone: put it into "
        f"{folder.parent.parent} as vocab{suffix}"
    )


def _crc32(params: dict) -> int:
    crc = 0
    for path, leaf in sorted(trees.paths(params), key=lambda p: p[0]):
        crc = zlib.crc32(np.ascontiguousarray(leaf), zlib.crc32(path.encode(), crc))
    return crc


def method_of(cfg: ConfigDict) -> Method:
    """cfg.method as `caption.captioner` takes it."""
    return Method(**cfg.method)


def on_record(cfg: ConfigDict, captioner: Part, judge: Part, lengths: dict[str, int]) -> dict:
    """What OUT/capfilt.json says: settings, checkpoints, vocabulary, records of each source. Paths are made
    absolute."""
    settings = plain(cfg)
    for src in settings["data"]["sources"].values():
        for leaf in ("path", "images"):
            if src[leaf] and src["kind"] != "tfds":
                src[leaf] = os.path.abspath(src[leaf])
    return {
        "written_by": f"blip_jax {__version__}, revision {revision()}, jax {jax.__version__}",
        "settings": settings,
        "captioner": captioner.record,
        "filter": judge.record,
        "vocabulary": zlib.crc32(captioner.vocab.read_bytes()),
        "records": lengths,
    }


def settle(out: pathlib.Path, record: dict) -> None:
    """Writes OUT/capfilt.json, or compares with what is there. ValueError: `out` holds a run with other settings,
    listed."""
    if not (out / FILE).exists():
        # one process makes it, the others compare
        shards.put(out, FILE, json.dumps(record, indent=1) + "\n", keep=True)
    before, now = flat(read(out)), flat(record)
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
