"""Text: OPT's byte-level BPE through the `tokenizers` library, from a vocab.json with its merges.txt or a
tokenizer.json."""

from __future__ import annotations

import functools
import json
import pathlib
import zlib
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from blip_jax import buckets
from blip_jax.data.text.clean import plain_text, tidy

BEGIN, PAD = "</s>", "<pad>"  # OPT begins a text with what ends one elsewhere
SPECIAL = ("<s>", PAD, BEGIN, "<unk>")  # ids 0 to 3 of OPT's vocabulary; no text gives them
MAX_BYTES = 1 << 26  # of a file; OPT's have 1 MB each
# settings of a tokenizer.json's model that change what comes out, and what they are for OPT
PLAIN = {
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (None, False),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}


class Tokenizer:
    """OPT's byte-level BPE: no text is unknown to it.

    Attributes: path, vocab_size and the ids bos ("</s>", before every text), pad and newline, by which BLIP-2's texts
    end. A model may have more rows than `vocab_size`, as OPT has.

    `path` is a vocab.json, beside which lies its merges.txt, or a tokenizer.json. Of the latter the model alone counts:
    tokens that others add to it, as the "<image>" of Hugging Face's BLIP-2, are never in a text. Text is only text:
    "</s>" inside a caption is not the special token.

    Raises ValueError for files that are neither, that lack a special token or a byte, whose ids are not 0, 1, 2, ...,
    or that are of another kind of BPE.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = path = buckets.fetched(path, "merges.txt")
        vocab, merges = _read(path)
        where = f"text.vocab={str(path)!r}"
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"{where}: the ids of its {len(vocab)} tokens are not 0 to {len(vocab) - 1}")
        missing = [token for token in (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())) if token not in vocab]
        if missing:
            raise ValueError(
                f"{where} lacks {len(missing)} tokens that OPT has, such as {missing[:3]}: give OPT's vocab.json with "
                "its merges.txt, or its tokenizer.json"
            )
        try:
            self._tok = _byte_level(models.BPE(vocab, merges))
        except BaseException as e:  # the library raises plain Exceptions, and panics, which are none
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            raise ValueError(f"{where}: its merges do not fit its tokens ({str(e)[:200]})") from None
        self._merges, self.vocab_size = merges, len(vocab)
        self.bos, self.pad = vocab[BEGIN], vocab[PAD]
        self._hidden = {vocab[token] for token in SPECIAL}
        (self.newline,) = self._tok.encode("\n").ids

    @functools.cached_property
    def crc(self) -> int:
        """Checksum of all (id, token) pairs and of the merges: the same for two files that mean one vocabulary, however
        they write it down."""
        lines = [f"{i} {token}" for i, token in sorted((i, token) for token, i in self._tok.get_vocab().items())]
        lines += [f"{a} {b}" for a, b in self._merges]
        return zlib.crc32("\n".join(lines).encode())

    def encode(self, texts: list[str], max_len: int, *, pad_left: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """ids i32[n,T], mask bool[n,T] (True = real): "</s> ...", cut at the right to T = `max_len` and padded, at the
        right or the left. A text's end, "\\n", is the caller's to write, and is lost where the text is cut."""
        if max_len < 1:
            raise ValueError(f"max_len={max_len} leaves no room for {BEGIN}: give 1 or more")
        ids = np.full((len(texts), max_len), self.pad, np.int32)
        mask = np.zeros((len(texts), max_len), bool)
        for i, found in enumerate(self._tok.encode_batch_fast(texts)):
            row = [self.bos, *found.ids][:max_len]
            at = slice(max_len - len(row), None) if pad_left else slice(len(row))
            ids[i, at], mask[i, at] = row, True
        return ids, mask

    def save(self, path: pathlib.Path) -> None:
        """Writes a tokenizer.json that means this vocabulary."""
        self._tok.save(str(path))

    def lengths(self, texts: list[str], max_len: int) -> np.ndarray:
        """i32[n]: how many positions `encode` fills for each text."""
        return np.minimum([1 + len(e) for e in self._tok.encode_batch_fast(texts)], max_len).astype(np.int32)

    def decode(self, ids) -> str:
        """The text of one row of ids i32[T], without special tokens and space around it, tidied as the original does
        (transformers 4.33.2)."""
        kept = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in self._hidden]
        return tidy(self._tok.decode(kept)).strip()


def _byte_level(model: models.BPE) -> _Tokenizer:
    tok = _Tokenizer(model)
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    return tok


def _read(path: pathlib.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens with their ids, and the merges in their order."""
    where, content = f"text.vocab={str(path)!r}", _json(path)
    if isinstance(content.get("model"), dict):
        if foreign := _foreign(content):
            raise ValueError(f"{where} has {'; '.join(foreign[:3])}: texts are OPT's byte-level BPE here")
        vocab, merges = content["model"].get("vocab"), content["model"].get("merges")
        added = content.get("added_tokens") or ()
    else:
        vocab, merges, added = content, _lines(path.with_name("merges.txt")), ()
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"{where} does not give each token an id: give a vocab.json or tokenizer.json")
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in _listed(merges)]
    if bad := [pair for pair in pairs if len(pair) != 2 or not all(isinstance(x, str) and x for x in pair)]:
        raise ValueError(f"{where}: {len(bad)} of its merges are not two tokens, such as {str(bad[0])[:60]}")
    broken = [token for token in vocab if not _encodes(token)]
    if broken:
        raise ValueError(f"{where} holds {len(broken)} tokens with broken characters, such as {broken[0]!a:.60}")
    # a tokenizer.json may keep OPT's special tokens apart
    apart = [(token.get("content"), token.get("id")) for token in _listed(added) if isinstance(token, dict)]
    special = {token: i for token, i in apart if token in SPECIAL and token not in vocab and type(i) is int}
    return vocab | special, pairs


def _listed(x) -> list:
    """A list as it is; of anything else the one thing that is no pair and no token."""
    return list(x) if isinstance(x, list | tuple) else [(x,)]


def _encodes(token: str) -> bool:
    return token.isascii() or not any("\ud800" <= c <= "\udfff" for c in token)


def _json(path: pathlib.Path) -> dict:
    where = f"text.vocab={str(path)!r}"
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is not JSON ({str(e)[:200]}): give a vocab.json or tokenizer.json") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} is not a table of tokens: give a vocab.json or tokenizer.json")
    return content


def _lines(path: pathlib.Path) -> list[str]:
    """The merges of a merges.txt, whose first line may be a comment."""
    lines = _text(path).rstrip("\n").split("\n")
    return [line for line in lines[lines[0].startswith("#version") :] if line]


def _text(path: pathlib.Path) -> str:
    if not path.is_file():
        raise ValueError(
            f"text.vocab: {str(path)!r}: no such file; give OPT's vocab.json with its merges.txt beside it, or its "
            "tokenizer.json"
        )
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"text.vocab: {str(path)!r} has {size} bytes, more than the {MAX_BYTES} that it may have")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"text.vocab: {str(path)!r} is not UTF-8 text ({e})") from None


def _foreign(content: dict) -> list[str]:
    """What a tokenizer.json has that OPT's byte-level BPE has not."""
    model, split = content["model"], content.get("pre_tokenizer")
    if model.get("type", "BPE") != "BPE":
        return [f"a model of type {str(model['type'])[:40]!r}"]
    out = [f"{name} {str(model.get(name))[:40]!r}" for name, plain in PLAIN.items() if model.get(name) not in plain]
    if content.get("normalizer") is not None:
        out.append("a normalizer")
    kind = split.get("type") if isinstance(split, dict) else split
    if kind != "ByteLevel":
        out.append(f"a pre_tokenizer of type {str(kind)[:40]!r}")
    elif split.get("add_prefix_space") is not False or split.get("use_regex", True) is not True:
        out.append("a space before each text, or no splitting into words")
    return out


def train_bpe(captions: Iterable[str], size: int, path: str | pathlib.Path) -> None:
    """Writes a vocab.json of exactly `size` tokens learnt from `captions`, and the merges.txt beside it.

    The same captions give the same files. Ids 0 to 3 are OPT's special tokens; ids that the captions do not fill are
    madeupword0000, ..., as in OPT's own file. ValueError: special tokens and bytes alone need more than `size`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(SPECIAL) + len(alphabet)
    if least > size:
        raise ValueError(f"size={size} is too small: special tokens and single bytes alone need {least}")
    tok = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*SPECIAL, *alphabet], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator((plain_text(caption)[0] for caption in captions), trainer)
    model = json.loads(tok.to_str())["model"]
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    vocab += [f"madeupword{i:04}" for i in range(size - len(vocab))]
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    path = pathlib.Path(path)
    path.write_text(json.dumps({token: i for i, token in enumerate(vocab)}, ensure_ascii=False), encoding="utf-8")
    path.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
