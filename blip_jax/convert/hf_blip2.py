"""Hugging Face folders of BLIP-2 and InstructBLIP, both ways: names, weights in shards, vocabularies.

What transformers' classes have otherwise than LAVIS's checkpoints:
  qkv.bias      one of q, k and v, whose middle third is zero; LAVIS has q's and v's
  last norm     ln_vision has the eps of the tower's blocks, 1e-6, where LAVIS has 1e-5: `cfg.model.vision_eps`
  temperature   has no place; a logit_scale, -log(temp), is read and written where there is one
  head          matching has no language modelling head, so that the first stage cannot go on from it
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from safetensors.numpy import save_file

from blip_jax.convert import blip2, hf, hf_blip2_config, hf_config, torch_io, vocabulary
from blip_jax.convert.apply import folded, from_torch, infer, layer_counts, listed, rows, shown, written
from blip_jax.convert.rules.blip2 import HF_BIAS, HF_NAMES, MATCHING, READS_QUESTIONS, TIED, WORDS
from blip_jax.convert.source import Source, dtype_notes, vocab_sizes
from blip_jax.convert.tied import words_and_head
from blip_jax.convert.wrappers import unwrap
from blip_jax.trees import Lazy

QUESTIONS = "qformer_tokenizer"  # folder of InstructBLIP's second vocabulary
TOKENIZERS = ("tokenizer.json", "spiece.model", "vocab.json")  # of a language model
SHARD = 2 << 30  # bytes of a file of weights, from which another begins
SCALE = "logit_scale"


# --- names ------------------------------------------------------------------------------------------------------------
def to_hf(family: str, text: str) -> str:
    """A tensor's name in LAVIS's files, or a message with such names -> with transformers' names."""
    for pattern, new in hf.renaming(HF_NAMES[family]):
        text = pattern.sub(new, text)
    return text


def to_original(family: str, name: str) -> str:
    """The inverse of `to_hf`, of a name."""
    for pattern, new in hf.renaming((theirs, original) for original, theirs in HF_NAMES[family]):
        name = pattern.sub(new, name)
    return name


def _bias(name: str) -> str:
    """Of the bias of q, k and v: what LAVIS's names of q's and v's begin with; "" of another name."""
    original, theirs = HF_BIAS
    begin, end = theirs.split("{i}")
    number = name.removeprefix(begin).removesuffix(end)
    return original.format(i=number) if name.startswith(begin) and name.endswith(end) and number.isdigit() else ""


def under_original_names(family: str, weights: Mapping) -> dict:
    """The tensors under LAVIS's names, nothing read yet but the biases of keys.

    ValueError: biases of keys that are not zero.
    """
    out, keys = {}, []
    for name in weights:
        x = weights[name]
        if (begin := _bias(name)) and len(x.shape) == 1 and x.shape[0] % 3 == 0:
            width = x.shape[0] // 3
            if np.asarray(x)[width : 2 * width].any():
                keys.append(name)
            for i, which in ((0, "q_bias"), (2, "v_bias")):
                read = lambda x=x, i=i, width=width: np.asarray(x)[i * width : (i + 1) * width]
                out[begin + which] = Lazy((width,), x.dtype, read)
        elif name == SCALE:
            read = lambda x=x: np.asarray(np.exp(-np.asarray(x, np.float64)), np.float32).reshape(())
            out["temp"] = Lazy((), np.float32, read)
        else:
            out[to_original(family, name)] = x
    if keys:
        raise ValueError(
            f"the bias of keys, the middle third of {listed(folded(keys))}, is not zero: EVA has none. It changes "
            "nothing that the model computes, as a shift of all scores of a row; set it to zero and save again"
        )
    for copy, original in TIED[family]:
        if copy in out and not copy.startswith("t5_model."):
            out.setdefault(original, out[copy])
    if blip2.t5_prefix(out) == "t5_model.":
        out = words_and_head(out, "t5_model.")
    return out


# --- reading ----------------------------------------------------------------------------------------------------------
def read(folder, heads: Mapping[str, int] | None = None) -> Source:
    """A folder as transformers' `save_pretrained` or the hub leaves it -> Source, whose arrays still lie in it.

    heads: instead of what config.json says. ValueError: no such architecture; fields that the models here do not have,
    or that contradict the weights, listed together; weights that are not complete; a T5 in float16.
    """
    folder = pathlib.Path(folder)
    config, opened = hf.settings(folder, "config.json"), hf.open_weights(folder)
    try:
        weights, notes = unwrap(opened, lambda names: any(name == "query_tokens" for name in names))
        family = hf_blip2_config.family_of(config)
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from None
    try:
        tensors = under_original_names(family, weights)
        blip2.refuse_half(tensors)
        table = rows(family, tensors)
        sizes, layers, kinds = infer(table, tensors), layer_counts(family, tensors), blip2.kinds(family, tensors)
        if missing := [
            what for part, what in blip2.PARTS.items() if part not in ("qformer", *kinds) and _needs(family, part)
        ]:
            raise ValueError(f"the weights have no {' and no '.join(missing)}")
    except ValueError as e:
        raise ValueError(f"{folder}: {to_hf(family, str(e))}") from None
    said = hf_blip2_config.check(config, family, sizes, layers, kinds.get("norm") == "pre")
    if said.problems:
        raise ValueError("\n  ".join([f"{folder / 'config.json'} does not fit:", *shown(said.problems)]))
    notes = [*opened.notes, *notes, *said.notes]
    try:
        counts = blip2.heads(str(folder), sizes, kinds, {}, said.heads | dict(heads or {}), notes)
        state = from_torch(family, tensors, counts, lazy=True)
    except ValueError as e:
        raise ValueError(f"{folder}: {to_hf(family, str(e))}") from None
    cfg = blip2.settings(family, sizes, layers, kinds, counts, said.llm, notes)
    with cfg.unlocked():
        cfg.model.update(said.model)
        given = config.get("qformer_config") or {}
        cfg.model.qformer.vocab_size = sizes.get("V", given.get("vocab_size", cfg.model.qformer.vocab_size))
        cfg.model.qformer.positions = sizes.get("T", given.get("max_position_embeddings", cfg.model.qformer.positions))
    notes += hf_blip2_config.ignored(config, said, family, cfg.model)
    absent = () if "temp" in tensors or family != "blip2_itm" else ("temp",)
    vocab, more = _vocabulary(folder, family, cfg.model)
    own = None
    if family in READS_QUESTIONS and (folder / QUESTIONS).is_dir():
        own, _, found = hf.vocabulary(folder / QUESTIONS, cfg.model.qformer.vocab_size + 1)
        more += found
    notes += more + dtype_notes(tensors)
    return Source(family, state, cfg, vocab, notes, absent, said.kept, questions=own)


def _vocabulary(folder: pathlib.Path, family: str, model) -> tuple[pathlib.Path | None, list[str]]:
    """The folder's vocabulary, of the Q-Former for matching, else of the language model; and notes."""
    if family == "blip2_vision":
        return None, []
    if family in MATCHING:
        vocab, _, notes = hf.vocabulary(folder, model.qformer.vocab_size + 1)
        return vocab, notes
    return tokenizer_of(folder), []


def tokenizer_of(folder: pathlib.Path) -> pathlib.Path | None:
    """The tokenizer of a language model that a folder has."""
    found = [hf.inside(folder, name) for name in TOKENIZERS if os.path.lexists(folder / name)]
    return next(iter(found), None)


def _needs(family: str, part: str) -> bool:
    """Whether a folder of the family has tensors of a part of `blip2.PARTS`."""
    return part == "qformer" or (family != "blip2_text" if part == "vit" else family not in MATCHING)


# --- writing ----------------------------------------------------------------------------------------------------------
FAMILIES = (
    {"blip2": "blip2_itm"} | {f: f for f in MATCHING} | {f: f for f in ("blip2_opt", "blip2_t5", *READS_QUESTIONS)}
)


def write(folder, source: Source) -> None:
    """Writes what transformers' `from_pretrained` loads: config.json, weights (f32) in shards, settings of pictures.

    No more than a shard and an array of ours are in memory. ValueError: a part is missing, or transformers has no class
    for it.
    """
    family, model, folder = FAMILIES.get(source.family), source.cfg.model, pathlib.Path(folder)
    if not family:
        raise ValueError(f"transformers' BLIP-2 has no class for {WORDS[source.family][0]} (family {source.family})")
    params = source.state["params"]
    if missing := [what for part, what in blip2.PARTS.items() if part not in params and _needs(family, part)]:
        raise ValueError(
            f"a Hugging Face folder needs all parts, and there is no {' and no '.join(missing)}: name what holds them "
            "behind IN, separated by commas, as stage2.pth,eva_vit_g.pth,opt-2.7b/"
        )
    if model.vit.kind != "eva":
        raise ValueError("transformers' BLIP-2 has no CLIP image encoder: only .pth (--to=official) holds this model")
    if "project_in" in params.get("llm", {}):
        raise ValueError(
            "transformers' BLIP-2 does not work with OPT-350m, whose word embedding is narrower than its layers"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_shards(folder, tensors(family, source))
    processor = "InstructBlipProcessor" if family in READS_QUESTIONS else "Blip2Processor"
    settings = {
        "config.json": hf_blip2_config.model_json(family, model, source.kept),
        "preprocessor_config.json": hf_config.pixels_json(model.img_size) | {"processor_class": processor},
        "processor_config.json": {
            "num_query_tokens": model.qformer.queries,
            "processor_class": processor,
        },
    }
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    names = {".json": "tokenizer.json", ".model": "spiece.model", ".txt": "vocab.txt"}
    if source.vocab is not None:
        merges = source.vocab.with_name("merges.txt").is_file()
        name = "vocab.json" if source.vocab.name == "vocab.json" and merges else names[source.vocab.suffix]
        vocabulary.copy(source.vocab, folder / name)
    if source.questions is not None:
        (folder / QUESTIONS).mkdir()
        vocabulary.copy(source.questions, folder / QUESTIONS / names[source.questions.suffix])
    if source.family == "blip2":
        source.notes.append("the language modelling head is left out: transformers' class has no place for it")
    if model.vision_eps != hf_blip2_config.BLOCK_EPS:
        source.notes.append(
            f"transformers' last norm of the image encoder has the eps {hf_blip2_config.BLOCK_EPS:g}, here it is "
            f"{model.vision_eps:g}: states differ by about 5e-6"
        )


def tensors(family: str, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """(transformers' name, array) of all tensors that its class saves, one after the other."""
    waiting: dict[str, np.ndarray] = {}
    for name, x in written(family, source.state, vocab_size=vocab_sizes(source.cfg)):
        if name.endswith("attn.q_bias"):
            waiting[name.removesuffix("q_bias")] = x
        elif name.endswith("attn.v_bias"):
            begin = name.removesuffix("v_bias")
            number = begin.split(".")[-3]
            yield HF_BIAS[1].format(i=number), np.concatenate([waiting.pop(begin), np.zeros_like(x), x])
        elif name == "temp":
            if "temp" not in source.absent:  # in float64, from which the very same temperature comes back
                yield SCALE, np.asarray(-math.log(float(x)), np.float64)
        else:
            yield to_hf(family, name), x


def save_shards(folder: pathlib.Path, named: Iterable[tuple[str, np.ndarray]], limit: int = 0) -> None:
    """Writes tensors as they come: model.safetensors, or several files of about `limit` bytes (0: SHARD) and an
    index."""
    shards, shard, size, total, where = [], {}, 0, 0, {}

    def flush():
        path = folder / f"shard-{len(shards)}.tmp"
        with torch_io.writing(path):
            save_file(shard, path, metadata={"format": "pt"})
        shards.append(path)
        shard.clear()

    for name, x in named:
        if shard and size + x.nbytes > (limit or SHARD):
            flush()
            size = 0
        shard[name], where[name] = x, len(shards)
        size, total = size + x.nbytes, total + x.nbytes
    flush()
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
        return
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for path, name in zip(shards, files):
        path.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: files[i] for name, i in where.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
