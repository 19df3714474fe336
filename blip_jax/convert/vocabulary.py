"""The vocabulary of a checkpoint: its own, a given one that means the same, or BERT's."""

from __future__ import annotations

import pathlib
import shutil

from blip_jax import buckets
from blip_jax.convert.foreign import load
from blip_jax.convert.rules.blip2 import WHOLE
from blip_jax.convert.source import Source
from blip_jax.data.text import tokenizers
from blip_jax.data.text.wordpiece import EXTRA, Tokenizer

BERT_VOCAB = ("google-bert/bert-base-uncased", "vocab.txt", 30522)  # repository, file, its entries
TOKENIZERS = {"bert": "BERT's WordPiece", "opt": "OPT's byte-level BPE", "t5": "T5's SentencePiece"}
JSON_KINDS = {"WordPiece": "bert", "BPE": "opt", "Unigram": "t5"}  # of a tokenizer.json


def settled(source: Source, given: str, origin: str) -> Source:
    """The source with its vocabularies; given: as of text.vocab, "" for those that came with it.

    ValueError: `of`; a second file for a model that has one vocabulary.
    """
    first, *second = tokenizers.files(given)
    source = source._replace(vocab=of(source, first, origin))
    if not reads_questions(source):
        if second:
            raise ValueError(f"{origin} has one vocabulary, but {given} names two (text.vocab, --vocab): leave one out")
        return source
    own = source.questions
    if second or own:
        own = _of_bert(source, second[0] if second else "", own, origin, "--vocab=FILE,FILE, the second")
    return source._replace(questions=own)


def reads_questions(source: Source) -> bool:
    """Whether the checkpoint has a language model, or the projection to one, and a Q-Former with words."""
    params = source.state["params"]
    return bool({"llm", "llm_proj"} & params.keys()) and "word" in params.get("qformer", {}).get("embed", {})


def of_questions(source: Source) -> pathlib.Path:
    """BERT's, of a Q-Former that reads questions, where none came with it. ValueError: it cannot be had."""
    return _from_hub(source.cfg.model.qformer.vocab_size, EXTRA[:1], "--vocab=FILE,FILE, the second of which is BERT's")


def of(source: Source, given: str, origin: str) -> pathlib.Path | None:
    """The vocabulary file, checked against the model and its own; None for a model without text.

    ValueError: none that fits.
    """
    params = source.state["params"]
    if "llm" in params or "llm_proj" in params:
        return _of_language_model(source, given, origin)
    if "med" in params or "word" in params.get("qformer", {}).get("embed", {}):
        return _of_bert(source, given, source.vocab, origin, "--vocab=FILE")
    return None


def _of_bert(source: Source, given: str, own: pathlib.Path | None, origin: str, flag: str) -> pathlib.Path:
    """BERT's vocabulary, of a MED or a Q-Former. own: that came with the source; flag: what gives another."""
    model = source.cfg.model
    size, added = (model.med.vocab_size, EXTRA) if "med" in model else (model.qformer.vocab_size, EXTRA[:1])
    path = buckets.fetched(given) if given else own or _from_hub(size, added, flag)
    tokenizer = Tokenizer(path)
    entries = tokenizer.vocab_size - len(EXTRA) + len(added)
    if entries != size:
        raise ValueError(
            f"{path} has {entries} entries with {' and '.join(added)}, but the model has {size}: give the vocabulary "
            f"it was trained with, {flag}"
        )
    if (tokenizer.dec, tokenizer.enc) != (entries - len(added), entries - len(added) + 1):
        raise ValueError(
            f"{path} numbers {' and '.join(EXTRA)} {tokenizer.dec} and {tokenizer.enc}: they must be the last two "
            f"of {tokenizer.vocab_size}"
        )
    if given and own and tokenizer.crc != _crc(own, tokenizer.vocab_size, tokenizer.crc):
        raise ValueError(
            f"{origin} was trained with another vocabulary than {given}: set text.vocab (--vocab) to {own}, "
            "which came with it"
        )
    return path


def _of_language_model(source: Source, given: str, origin: str) -> pathlib.Path | None:
    """Of a second-stage model: the tokenizer of its language model; None where none is given and none came with it."""
    path = buckets.fetched(given, "merges.txt") if given else source.vocab
    if path is None:
        return None
    want, (found, entries) = WHOLE.get(source.family, source.family), language_model(path)
    if found != want:
        raise ValueError(
            f"{path} is {TOKENIZERS[found]}, but {origin} has a language model {want.upper()}: give "
            f"{TOKENIZERS[want]}, --vocab=FILE"
        )
    llm = source.cfg.model.llm  # empty where the file has none, and none is published of its width
    if llm and entries > llm.vocab_size:
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


def _from_hub(size: int, added, flag: str) -> pathlib.Path:
    repository, name, words = BERT_VOCAB
    remedy = f"give one with {flag}, a vocab.txt or tokenizer.json"
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
