"""Text: the original's cleaning, and BERT's uncased WordPiece through the `tokenizers` library."""

from __future__ import annotations

import collections
import functools
import pathlib
import zlib
from collections.abc import Iterable

import numpy as np
from tokenizers import AddedToken, decoders, trainers
from tokenizers import Tokenizer as _Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from blip_jax.data.text.clean import plain_text

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
EXTRA = ("[DEC]", "[ENC]")  # begin of a decoded text, begin of an image-grounded text: appended in this order
ALPHABET = 1000  # characters of a trained vocabulary, as in BERT's own


class Tokenizer:
    """BERT's uncased WordPiece with [DEC] and [ENC].

    Attributes: path, vocab_size and the ids pad, unk, cls, sep, dec, enc.

    `path` is a vocab.txt (one token a line, the line number is the id) or a tokenizer.json. Text is only text: "[SEP]"
    inside a caption is not the special token. Raises ValueError for a file that is neither or that lacks a special
    token.
    """

    def __init__(self, path: str | pathlib.Path):
        path = pathlib.Path(path)
        if not path.is_file():
            raise ValueError(
                f"text.vocab={str(path)!r}: no such file; give a vocab.txt or tokenizer.json, or make one from "
                "your captions with `blip-jax vocab`"
            )
        tok = _from_json(path) if path.suffix == ".json" else _from_lines(path)
        tok.no_truncation()
        tok.no_padding()
        tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in EXTRA])
        tok.encode_special_tokens = True
        self._tok, self.path = tok, path
        self.vocab_size = tok.get_vocab_size(with_added_tokens=True)
        self.pad, self.unk, self.cls, self.sep = (tok.token_to_id(t) for t in SPECIAL[:4])
        self.dec, self.enc = (tok.token_to_id(t) for t in EXTRA)
        if tok.encode("").ids != [self.cls, self.sep]:
            raise ValueError(
                f"text.vocab={str(path)!r} does not frame a text as [CLS] ... [SEP]: give the vocab.txt instead"
            )

    @functools.cached_property
    def crc(self) -> int:
        """Checksum of all (id, token) pairs: the same for two files that mean one vocabulary.

        However the files write it down.
        """
        tokens = sorted((i, token) for token, i in self._tok.get_vocab(with_added_tokens=True).items())
        return zlib.crc32("\n".join(f"{i} {token}" for i, token in tokens).encode())

    def encode(self, texts: list[str], max_len: int) -> tuple[np.ndarray, np.ndarray]:
        """ids i32[n,T], mask bool[n,T] (True = real): "[CLS] ... [SEP]", cut to T = `max_len` and padded."""
        if max_len < 2:
            raise ValueError(f"max_len={max_len} leaves no room for [CLS] and [SEP]: give 2 or more")
        rows = [self._tok.encode(t).ids for t in texts]
        ids = np.full((len(rows), max_len), self.pad, np.int32)
        mask = np.zeros((len(rows), max_len), bool)
        for i, row in enumerate(rows):
            if len(row) > max_len:
                row = row[: max_len - 1] + [self.sep]
            ids[i, : len(row)], mask[i, : len(row)] = row, True
        return ids, mask

    def lengths(self, texts: list[str], max_len: int) -> np.ndarray:
        """i32[n]: how many positions `encode` fills for each text."""
        return np.minimum([len(e) for e in self._tok.encode_batch_fast(texts)], max_len).astype(np.int32)

    def decode(self, ids) -> str:
        """The text of one row of ids i32[T], without special tokens, pieces joined."""
        return self._tok.decode([int(i) for i in ids], skip_special_tokens=True)


def _from_lines(path: pathlib.Path) -> _Tokenizer:
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as e:
        raise ValueError(
            f"text.vocab={str(path)!r} is not UTF-8 text ({e}): give a vocab.txt with one token a line"
        ) from None
    vocab = {t: i for i, t in enumerate(lines)}
    if len(vocab) < len(lines):
        twice = [t for i, t in enumerate(lines) if vocab[t] != i]
        raise ValueError(
            f"text.vocab={str(path)!r} holds tokens twice, such as {twice[:3]}: ids would be ambiguous; remove them"
        )
    _require_special(vocab, path)
    return _bert(vocab)


def _bert(vocab: dict[str, int] | None = None) -> _Tokenizer:
    """BERT's uncased WordPiece; without a vocabulary, one that can be trained.

    The library's own class has no `encode_special_tokens` and no trainer to choose: what it builds is taken out as it
    would be saved.
    """
    return _Tokenizer.from_str(BertWordPieceTokenizer(vocab, lowercase=True).to_str())


def _from_json(path: pathlib.Path) -> _Tokenizer:
    try:
        tok = _Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises plain Exception
        raise ValueError(f"text.vocab={str(path)!r} is not a tokenizer.json ({e}): give one, or a vocab.txt") from None
    _require_special(tok.get_vocab(with_added_tokens=True), path)
    if tok.decoder is None:
        tok.decoder = decoders.WordPiece()
    return tok


def _require_special(vocab: dict[str, int], path: pathlib.Path) -> None:
    missing = [t for t in SPECIAL if t not in vocab]
    if missing:
        raise ValueError(
            f"text.vocab={str(path)!r} lacks the special tokens {missing}: use BERT's uncased vocabulary, or make "
            "one from your captions with `blip-jax vocab`"
        )


def train_vocab(captions: Iterable[str], size: int, path: str | pathlib.Path) -> None:
    """Writes a vocab.txt of exactly `size` lines learnt from `captions`: BERT's WordPiece, uncased.

    The same captions give the same file. Of the characters, the ALPHABET most frequent ones count. Lines that the
    captions do not fill are [unused0], [unused1], ..., as in BERT's own file. With [DEC] and [ENC] the tokenizer then
    has size + 2 ids. ValueError: the characters alone need more lines than `size`, or there is no text.
    """
    tok = _bert()
    words: collections.Counter = collections.Counter()
    for caption in captions:
        normal = tok.normalizer.normalize_str(plain_text(caption)[0])
        words.update(word for word, _ in tok.pre_tokenizer.pre_tokenize_str(normal))

    letters: collections.Counter = collections.Counter()
    for word, n in words.items():
        letters.update({c: n * word.count(c) for c in set(word)})
    if not letters:
        raise ValueError("captions hold no text: nothing to learn a vocabulary from")
    kept = set(sorted(letters, key=lambda c: (-letters[c], c))[:ALPHABET])
    words = {w: n for w, n in words.items() if kept.issuperset(w)}

    # the trainer numbers pieces that continue a word in hash order, and breaks ties by number: number them beforehand
    pieces = sorted(kept) + sorted({f"##{c}" for w in words for c in w[1:]})
    least = len(SPECIAL) + len(pieces)
    if least > size:
        raise ValueError(f"size={size} is too small: special tokens and single characters alone need {least} lines")
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, min_frequency=2, special_tokens=[*SPECIAL, *pieces], show_progress=False
    )
    tok.train_from_iterator((w for w in sorted(words) for _ in range(words[w])), trainer)
    vocab = tok.get_vocab()
    lines = sorted(vocab, key=vocab.get)
    lines += [f"[unused{i}]" for i in range(size - len(lines))]
    pathlib.Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
