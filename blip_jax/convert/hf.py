"""Hugging Face folders of BLIP, both ways: config.json, weights in one file or in shards, vocabulary.

What transformers' classes do otherwise than the models that were trained is settled knowingly:
  text heads      a BlipTextConfig without num_attention_heads has 8, the released models have 12 (hf_config.text_heads)
  eps             of the vision tower: transformers' default is 1e-5, the weights were trained with 1e-6, which ours
                  always has
  first id        its matching and question answering leave [CLS] where training had [ENC]: ours sets [ENC], unless
                  `first_id` is given; a folder says nothing about it
  [DEC], [ENC]    its vocabularies may lack them; they are the last two ids, as here
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping

from safetensors.numpy import save_file

from blip_jax.convert import foreign, hf_config, torch_io
from blip_jax.convert.apply import MAX_TENSORS, from_torch, infer, layer_counts, rows, shown, to_torch
from blip_jax.convert.rules.blip import HF_NAMES
from blip_jax.convert.rules.families import TIED, WORDS
from blip_jax.convert.source import Source, dtype_notes, make_config
from blip_jax.convert.wrappers import unwrap
from blip_jax.data.text.wordpiece import Case, Tokenizer

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
VOCABULARIES = ("vocab.txt", "tokenizer.json")


# --- names ------------------------------------------------------------------------------------------------------------
def renaming(pairs) -> list[tuple[re.Pattern, str]]:
    """(beginning of a name, another), `{i}` a number or several in a message -> patterns and what to put there."""
    layer = lambda name: re.escape(name).replace(r"\{i\}", r"(\d+|\{[\d,i-]+\})")
    return [(re.compile(rf"(?<![\w.]){layer(old)}"), new.replace("{i}", r"\1")) for old, new in pairs]


_TO_HF, _TO_ORIGINAL = renaming(HF_NAMES), renaming((hf, original) for original, hf in HF_NAMES)


def to_hf(text: str) -> str:
    """A tensor's name in the originals' files, or a message with such names -> with transformers' names."""
    for pattern, new in _TO_HF:
        text = pattern.sub(new, text)
    return text


def to_original(name: str) -> str:
    """The inverse of `to_hf`."""
    for pattern, new in _TO_ORIGINAL:
        name = pattern.sub(new, name)
    return name


# --- reading ----------------------------------------------------------------------------------------------------------
def read(folder, heads: Mapping[str, int] | None = None) -> Source:
    """A folder as transformers' `save_pretrained` or the hub leaves it -> Source of family caption, itm or vqa.

    heads: instead of what config.json says. vocab: a file of the folder, one that fits the model before
    others. Notes tell what was taken otherwise than config.json has it.
    ValueError: no such folder or architecture; activations, eps or ids that our models do not have, sizes that the
    weights contradict (listed together); weights that are not complete. No file outside the folder is read.
    """
    folder = pathlib.Path(folder)
    config, opened = settings(folder, "config.json"), open_weights(folder)
    try:
        weights, notes = unwrap(opened, lambda names: any(name.startswith("vision_model.") for name in names))
        family, notes = hf_config.family_of(config, weights), [*opened.notes, *notes]
        tensors, parts = _under_original_names(family, weights), hf_config.parts_of(config)
        sizes, layers = infer(rows(family, tensors), tensors), layer_counts(family, tensors)
    except ValueError as e:
        raise ValueError(f"{folder}: {to_hf(str(e))}") from None
    vocab, tokenizer, more = vocabulary(folder, parts["text_config"]["vocab_size"])
    notes += more
    problems = hf_config.check_values(config, parts, notes)
    if not problems:
        problems = hf_config.check_sizes(parts, sizes, layers) + (
            hf_config.check_ids(parts, tokenizer) if family != "itm" else []
        )
    if problems:
        raise ValueError("\n  ".join([f"{folder / 'config.json'} does not fit:", *shown(problems)]))
    heads = {
        "vit": (heads or {}).get("vit") or parts["vision_config"]["num_attention_heads"],
        "med": (heads or {}).get("med") or hf_config.text_heads(parts, notes),
    }
    try:
        state = from_torch(family, tensors, heads)
    except ValueError as e:
        raise ValueError(f"{folder}: {to_hf(str(e))}") from None
    c = make_config(sizes, layers, heads)
    notes += hf_config.ignored(config, family, c.model, tokenizer) + dtype_notes(tensors)
    return Source(family, state, c, vocab, notes)


def open_weights(folder) -> Mapping:
    """The tensors of a folder under transformers' names, read when asked for; `notes` of them as of `torch_io.Tensors`.

    ValueError: there are none, or shards that do not fit.
    """
    folder = pathlib.Path(folder)
    for name in WEIGHTS:
        if os.path.lexists(folder / name):
            return _shards(folder, name) if name.endswith(".json") else torch_io.open_tensors(inside(folder, name))
    raise ValueError(
        f"{folder} holds no weights, none of {', '.join(WEIGHTS)}: weights of another framework have to be saved with "
        "transformers' save_pretrained first"
    )


class _Named(Mapping):
    """Tensors of several opened files: name -> (file, name in it); notes: those of the files."""

    def __init__(self, places: dict, notes: list[str] = ()):
        self._places, self.notes = places, list(notes)

    def __getitem__(self, name):
        file, inner = self._places[name]
        return file[inner]

    def __iter__(self):
        return iter(self._places)

    def __len__(self):
        return len(self._places)


def _under_original_names(family: str, weights: Mapping) -> Mapping:
    """The tensors under the originals' names; where of two tied tensors only the copy was saved, it stands for both."""
    places = {to_original(name): (weights, name) for name in weights}
    for copy, original in TIED[family]:
        if copy in places:
            places.setdefault(original, places[copy])
    return _Named(places)


def _shards(folder: pathlib.Path, index: str) -> Mapping:
    """The tensors of all shards that an index file names.

    ValueError lists all that is wrong with names, files and keys.
    """
    where = settings(folder, index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(x, str) for x in where.values()):
        raise ValueError(f"{folder / index} has no weight_map of names and shards")
    if len(where) > MAX_TENSORS:
        raise ValueError(f"{folder / index} names {len(where)} tensors: models here have at most {MAX_TENSORS}")
    files = sorted(set(where.values()))
    problems = [
        f"{name!r} is no plain file name ending in .safetensors or .bin"
        for name in files
        if not re.fullmatch(r"\w[\w.-]*\.(safetensors|bin)", name, re.ASCII)
    ]
    problems += [] if problems else [f"{name} is missing" for name in files if not _is_file(folder / name)]
    opened = {} if problems else {name: torch_io.open_tensors(inside(folder, name)) for name in files}
    found: dict[str, list[str]] = {}
    for name, tensors in opened.items():
        for key in tensors:
            found.setdefault(key, []).append(name)
    if opened:
        problems += [f"{key} is in {' and in '.join(names)}" for key, names in found.items() if len(names) > 1]
        problems += [
            f"{key} is in {names[0]}, but not in the index" for key, names in found.items() if key not in where
        ]
        problems += [
            f"{key} should be in {name}, but is not" for key, name in where.items() if name not in found.get(key, ())
        ]
    if problems:
        raise ValueError(f"{folder / index} does not fit:\n  " + "\n  ".join(shown(problems)))
    notes = dict.fromkeys(note for tensors in opened.values() for note in tensors.notes)
    return _Named({key: (opened[name], key) for key, name in where.items()}, notes)


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """folder / name. ValueError: it is a link that leads out of the folder (of the model, in the hub's cache)."""
    path, root = (folder / name).resolve(), folder.resolve()
    # of the hub's cache, links to ../../blobs
    if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
        root = root.parent.parent
    if not path.is_relative_to(root):
        raise ValueError(f"{folder / name} is a link to {path}, out of its folder: copy the file if it belongs there")
    return folder / name


def _is_file(path: pathlib.Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file system takes
        return False


def settings(folder: pathlib.Path, name: str) -> dict:
    """The settings in a JSON file of a folder. ValueError: a link out of it, or as `foreign.load`."""
    return foreign.load(inside(folder, name))


def vocabulary(folder: pathlib.Path, size: int) -> tuple[pathlib.Path | None, Tokenizer | None, list[str]]:
    """The folder's vocabulary of `size` entries with [DEC] and [ENC], its tokenizer, and notes.

    A tokenizer.json says whether it is cased, so it counts where the two differ. If none fits, the first file there.
    """
    found = [inside(folder, name) for name in VOCABULARIES if os.path.lexists(folder / name)]
    fitting, notes = [], []
    for path in found:
        try:
            tokenizer = Tokenizer(path)
        except ValueError as e:
            notes.append(str(e))
            continue
        if tokenizer.vocab_size == size:
            fitting.append((path, tokenizer))
    if not fitting:
        return next(iter(found), None), None, notes
    path, tokenizer = fitting[0] if len({t.crc for _, t in fitting}) == 1 else fitting[-1]
    return path, tokenizer, notes + _case_notes(folder, path, tokenizer)


def _case_notes(folder: pathlib.Path, path: pathlib.Path, tokenizer: Tokenizer) -> list[str]:
    """Where tokenizer_config.json says another case than a vocab.txt shows."""
    name = "tokenizer_config.json"
    if path.suffix == ".json" or not os.path.lexists(folder / name):
        return []
    said = settings(folder, name)
    lowercase, strips = said.get("do_lower_case"), said.get("strip_accents")
    case = Case(*(have if not isinstance(x, bool) else x for have, x in zip(tokenizer.case, (lowercase, strips))))
    if case == tokenizer.case:
        return []
    return [
        f"{name} says do_lower_case {lowercase} and strip_accents {strips}, but {path.name} is read with "
        f"{tokenizer.case.lowercase} and {tokenizer.case.strip_accents}, as its entries are: a tokenizer.json beside "
        "it would count"
    ]


# --- writing ----------------------------------------------------------------------------------------------------------
# family -> that of the class that can hold it
CLASSES = {"caption": "caption", "itm": "itm", "retrieval": "itm", "vqa": "vqa"}


def write(folder, source: Source) -> None:
    """Writes what transformers' `from_pretrained` and AutoProcessor load.

    config.json, model.safetensors (f32), the vocabulary, tokenizer_config.json and preprocessor_config.json. What
    transformers has no place for goes into source.notes. ValueError: a family without a class, or a vocabulary
    that is missing or of another size.
    """
    family, model, folder = CLASSES.get(source.family), source.cfg.model, pathlib.Path(folder)
    if not family:
        halves = "; choose a half with --family=caption or --family=itm" if source.family == "pretrain" else ""
        raise ValueError(
            f"transformers has no class for {WORDS[source.family][0]} (family {source.family}), only "
            f"{', '.join(hf_config.ARCHITECTURES)}{halves}"
        )
    if family == "vqa" and model.vit.width != model.med.width:
        raise ValueError(
            "transformers' BlipForQuestionAnswering works only where vision and text models have one width, not "
            f"{model.vit.width} and {model.med.width}"
        )

    if source.vocab is None:
        raise ValueError("a Hugging Face folder needs a vocabulary: give --vocab=FILE, a vocab.txt or tokenizer.json")
    tokenizer = Tokenizer(source.vocab)
    if tokenizer.vocab_size != model.med.vocab_size:
        raise ValueError(
            f"{source.vocab} has {tokenizer.vocab_size} entries with [DEC] and [ENC], but the model has "
            f"{model.med.vocab_size}: give the vocabulary it was trained with, --vocab=FILE"
        )

    tensors = to_torch(family, source.state, vocab_size=model.med.vocab_size)
    for copy, _ in TIED[family]:  # transformers leaves them out, too
        del tensors[copy]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    with torch_io.writing(path):
        save_file({to_hf(name): x for name, x in tensors.items()}, path, metadata={"format": "pt"})

    settings = {
        "config.json": hf_config.model_json(family, model, sep=tokenizer.sep, pad=tokenizer.pad),
        "tokenizer_config.json": hf_config.tokenizer_json(model.med.positions, tokenizer),
        "preprocessor_config.json": hf_config.pixels_json(model.img_size),
    }
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(source.vocab, folder / VOCABULARIES[source.vocab.suffix == ".json"])
    if source.family == "retrieval":
        source.notes.append(
            "temperature, momentum encoder and queues are left out: transformers' class has no place for them"
        )
