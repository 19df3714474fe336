"""The vocabulary of a checkpoint: its own, a given one that means the same, or BERT's."""

from __future__ import annotations

import pathlib
import shutil

from blip_jax.convert.foreign import load
from blip_jax.convert.source import Source
from blip_jax.data.text.wordpiece import EXTRA, Tokenizer

BERT_VOCAB = ("google-bert/bert-base-uncased", "vocab.txt", 30522)  # repository, file, its entries
TOKENIZERS = {"bert": "BERT's WordPiece", "opt": "OPT's byte-level BPE", "t5": "T5's SentencePiece"}
JSON_KINDS = {"WordPiece": "bert", "BPE": "opt", "Unigram": "t5"}  # of a tokenizer.json


def of(source: Source, given: str, origin: str) -> pathlib.Path | None:
    """The vocabulary file, checked against the model and its own; None for a model without text.

    ValueError: none that fits.
    """
    params, model = source.state["params"], source.cfg.model
    if "llm" in params or "llm_proj" in params:
        return _of_language_model(source, given, origin)
    if "med" in params:
        size, added = model.med.vocab_size, EXTRA
    elif "word" in params.get("qformer", {}).get("embed", {}):
        size, added = model.qformer.vocab_size, EXTRA[:1]
    else:
        return None
    path = pathlib.Path(given) if given else source.vocab or _from_hub(size, added)
    tokenizer = Tokenizer(path)
    entries = tokenizer.vocab_size - len(EXTRA) + len(added)
    if entries != size:
        raise ValueError(
            f"{path} has {entries} entries with {' and '.join(added)}, but the model has {size}: give the vocabulary "
            "it was trained with, --vocab=FILE"
        )
    if (tokenizer.dec, tokenizer.enc) != (entries - len(added), entries - len(added) + 1):
        raise ValueError(
            f"{path} numbers {' and '.join(EXTRA)} {tokenizer.dec} and {tokenizer.enc}: they must be the last two "
            f"of {tokenizer.vocab_size}"
        )
    if given and source.vocab and tokenizer.crc != _crc(source.vocab, tokenizer.vocab_size, tokenizer.crc):
        raise ValueError(
            f"{origin} was trained with another vocabulary than {given}: set text.vocab (--vocab) to {source.vocab}, "
            "which came with it"
        )
    return path


def _of_language_model(source: Source, given: str, origin: str) -> pathlib.Path | None:
    """Of a second-stage model: the tokenizer of its language model; None where none is given and none came with it."""
    path = pathlib.Path(given) if given else source.vocab
    if path is None:
        return None
    want, (found, entries) = source.cfg.model.llm.kind, language_model(path)
    if found != want:
        raise ValueError(
            f"{path} is {TOKENIZERS[found]}, but {origin} has a language model {want.upper()}: give "
            f"{TOKENIZERS[want]}, --vocab=FILE"
        )
    if entries > source.cfg.model.llm.vocab_size:
        raise ValueError(
            f"{path} has {entries} entries, but the language model of {origin} has {source.cfg.model.llm.vocab_size}: "
            "give the tokenizer it was trained with, --vocab=FILE"
        )
    return path


def copy(path: pathlib.Path, to: pathlib.Path) -> None:
    """Copies a vocabulary file, and the merges.txt that belongs to OPT's vocab.json."""
    shutil.copyfile(path, to)
    if path.name == "vocab.json" and (merges := path.with_name("merges.txt")).is_file():
        shutil.copyfile(merges, to.with_name(merges.name))


def language_model(path: pathlib.Path) -> tuple[str, int]:
    """Which kind of text model a tokenizer file is for, a key of TOKENIZERS, and its entries, 0 where the file itself
    does not show them. ValueError: no tokenizer file."""
    if path.suffix == ".txt":
        return "bert", 0
    if path.suffix == ".model":
        return "t5", 0
    content = load(path)
    if content and all(type(i) is int for i in content.values()):  # a vocab.json
        return "opt", len(content)
    model = content.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind not in JSON_KINDS:
        raise ValueError(
            f"{path} is no tokenizer.json of {', '.join(JSON_KINDS)}: give a tokenizer.json, OPT's vocab.json, or "
            "T5's spiece.model"
        )
    words = model.get("vocab")
    return JSON_KINDS[kind], len(words) if isinstance(words, (dict, list)) else 0


def _crc(vocab: pathlib.Path, size: int, otherwise: int) -> int:
    """Tokenizer.crc of a file, or `otherwise`.

    The latter where the file does not fit a model of `size` entries, and so is not what it was trained with.
    """
    try:
        own = Tokenizer(vocab)
    except ValueError:
        return otherwise
    return own.crc if own.vocab_size == size else otherwise


def _from_hub(size: int, added) -> pathlib.Path:
    repository, name, words = BERT_VOCAB
    remedy = "give one with --vocab=FILE, a vocab.txt or tokenizer.json"
    if size != words + len(added):
        raise ValueError(
            f"no vocabulary came with the checkpoint, and {size} entries are not those of {repository}: {remedy}"
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(
            f"no vocabulary came with the checkpoint: {remedy}; or pip install 'blip-jax[hub]', which fetches that of "
            f"{repository}"
        ) from None
    for local in (True, False):
        try:
            return pathlib.Path(hf_hub_download(repository, name, local_files_only=local))
        except Exception as e:  # not in the cache, then: no network, no such host, a proxy's page
            reason = e
    raise ValueError(
        f"no vocabulary came with the checkpoint, and {name} of {repository} could not be fetched "
        f"({type(reason).__name__}): {remedy}"
    )
