"""Text: BERT's WordPiece through the `tokenizers` library, from a vocab.txt or a tokenizer.json."""

from __future__ import annotations

import collections
import functools
import json
import logging
import pathlib
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, normalizers, trainers
from tokenizers import Tokenizer as _Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tqdm import tqdm

from blip_jax import buckets
from blip_jax.data.text.clean import plain_text, tidy

log = logging.getLogger(__name__)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
EXTRA = ("[DEC]", "[ENC]")  # begin of a decoded text, begin of an image-grounded text: appended in this order
ALPHABET = 1000  # characters of a trained vocabulary, as in BERT's own
MAX_BYTES = 1 << 26  # of a vocabulary file; that of BERT for 104 languages has 1 MB
# Parts of a tokenizer.json that take time and memory in proportion to a text. Others, such as replacements, which can
# multiply it, or regexes, are of no WordPiece of BERT's kind and are refused.
NORMALIZERS = ("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Strip", "StripAccents")
SPLITTERS = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits")
FRAMES = ("TemplateProcessing", "BertProcessing")
PARTS = 16  # of a sequence of these
MAX_WORD = 200  # characters, the most of max_input_chars_per_word, with whose square the time goes; BERT's has 100
UNREACHABLE = 0.01  # share of entries that a text never gives, above which a vocabulary is of another case
UNKNOWN = 0.1  # share of [UNK] above which it is said
ENOUGH = 50  # tokens seen before that


class Case(NamedTuple):
    """What becomes of capitals and accents."""

    lowercase: bool
    strip_accents: bool


UNCASED, CASED = Case(True, True), Case(False, False)
CASES = (UNCASED, Case(True, False), CASED)


class Tokenizer:
    """BERT's WordPiece with [DEC] and [ENC].

    Attributes: path, vocab_size, case (a `Case`) and the ids pad, unk, cls, sep, dec, enc.

    `path` is a vocab.txt (one token a line, the line number is the id) or a tokenizer.json. A vocab.txt does not say
    whether it is cased: it is read as uncased, uncased with accents, or cased, the first of which leaves hardly an
    entry that no text could give. Text is only text: "[SEP]" inside a caption is not the special token.

    Raises ValueError for a file that is neither, that lacks a special token, whose ids are not 0, 1, 2, ..., or that
    has parts which BERT's has not.
    """

    def __init__(self, path: str | pathlib.Path):
        path = buckets.fetched(path)
        if not path.is_file():
            raise ValueError(
                f"text.vocab={str(path)!r}: no such file; give a vocab.txt or tokenizer.json, or make one from "
                "your captions with `blip-jax vocab`"
            )
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(
                f"text.vocab={str(path)!r} has {size} bytes, more than the {MAX_BYTES} that a vocabulary may have: "
                "give a vocab.txt or tokenizer.json"
            )
        tok, self.case = _from_json(path) if path.suffix == ".json" else _from_lines(path)
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
        self._hidden = {self.dec, self.enc, *(tok.token_to_id(t) for t in SPECIAL)}
        self._seen = self._unknown = 0
        self._examples, self._said, self._lock = [], False, threading.Lock()

    @functools.cached_property
    def crc(self) -> int:
        """Checksum of all (id, token) pairs and of the case: the same for two files that mean one vocabulary.

        However the files write it down.
        """
        tokens = sorted((i, token) for token, i in self._tok.get_vocab(with_added_tokens=True).items())
        lines = [f"{i} {token}" for i, token in tokens] + [str(tuple(self.case))] * (self.case != UNCASED)
        return zlib.crc32("\n".join(lines).encode())

    def encode(self, texts: list[str], max_len: int, *, keep_end: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """ids i32[n,T], mask bool[n,T] (True = real): "[CLS] ... [SEP]", cut to T = `max_len` and padded.

        keep_end: what is too long loses its beginning. Counts the tokens and how many of them are [UNK], for
        `say_unknown`.
        """
        if max_len < 2:
            raise ValueError(f"max_len={max_len} leaves no room for [CLS] and [SEP]: give 2 or more")
        ids = np.full((len(texts), max_len), self.pad, np.int32)
        mask = np.zeros((len(texts), max_len), bool)
        seen = unknown = 0
        for i, text in enumerate(texts):
            found = self._tok.encode(text)
            row = found.ids
            seen += len(row) - 2
            if n := row.count(self.unk):
                unknown += n
                self._remember(text, found)
            if len(row) > max_len:
                row = [self.cls, *row[len(row) - max_len + 1 :]] if keep_end else [*row[: max_len - 1], self.sep]
            ids[i, : len(row)], mask[i, : len(row)] = row, True
        with self._lock:
            self._seen, self._unknown = self._seen + seen, self._unknown + unknown
        if unknown:
            self.say_unknown(ENOUGH)
        return ids, mask

    def _remember(self, text: str, found) -> None:
        """Keeps a few of the words of a text that are [UNK]."""
        for i, (begin, end) in zip(found.ids, found.offsets) if len(self._examples) < 5 else ():
            word = text[begin : min(end, begin + 20)]
            if i == self.unk and word not in self._examples:
                self._examples.append(word)

    def say_unknown(self, least: int = 1) -> None:
        """Warns, once, if of the tokens encoded until now, `least` or more, too many are [UNK]."""
        with self._lock:
            if self._said or self._seen < least or self._unknown <= UNKNOWN * self._seen:
                return
            self._said = True
        tqdm.write(  # above a bar of progress, if there is one
            f"warning: {self._unknown} of the first {self._seen} tokens are [UNK], words that {self.path} lacks, such "
            f"as {', '.join(map(repr, self._examples[:5]))}: the model cannot tell them apart. Give a vocabulary of "
            "the texts' language, or make one with `blip-jax vocab`",
            file=sys.stderr,
        )

    def save(self, path: pathlib.Path) -> None:
        """Writes a file that means this vocabulary."""
        shutil.copyfile(self.path, path)

    def lengths(self, texts: list[str], max_len: int) -> np.ndarray:
        """i32[n]: how many positions `encode` fills for each text."""
        return np.minimum([len(e) for e in self._tok.encode_batch_fast(texts)], max_len).astype(np.int32)

    def words(self, text: str, max_len: int) -> list[tuple[str, range]]:
        """The words of a text, between white space, with the positions of their pieces in what `encode` gives of it.

        What was cut off is left out.
        """
        found = self._tok.encode(text)
        pieces = list(zip(range(len(found)), found.offsets))[1:-1][: max_len - 2]
        out = []
        for word in re.finditer(r"\S+", text):
            own = [i for i, (begin, _) in pieces if word.start() <= begin < word.end()]
            out += [(word[0], range(own[0], own[-1] + 1))] if own else []
        return out

    def decode(self, ids) -> str:
        """The text of one row of ids i32[T], without special tokens, pieces joined and tidied as the original does."""
        tokens = (self._tok.id_to_token(i) for i in map(int, ids) if i not in self._hidden)
        return tidy(" ".join(token for token in tokens if token is not None).replace(" ##", "").strip())


def _from_lines(path: pathlib.Path) -> tuple[_Tokenizer, Case]:
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
            f"text.vocab={str(path)!r} holds tokens twice, such as {[t[:40] for t in twice[:3]]}: ids would be "
            "ambiguous; remove them"
        )
    _require_special(vocab, path)
    case = _case_of(lines)
    if case == CASED:
        _warn_once(
            f"text.vocab={str(path)!r} holds entries with capitals: it is read as a cased vocabulary, which keeps "
            "capitals and accents. BLIP's cleaning of captions and questions makes them lower-case before"
        )
    return _bert(vocab, case), case


def _case_of(entries: Sequence[str]) -> Case:
    """The first of CASES under which but few entries can never come out of a text."""
    words = [t.removeprefix("##") for t in entries if not (t[:1] == "[" and t[-1:] == "]")]
    odd = [w for w in words if not (w.isascii() and w == w.lower())]
    for case in CASES[:-1]:
        normal = normalizers.BertNormalizer(handle_chinese_chars=False, **case._asdict()).normalize_str
        if sum(normal(w) != w for w in odd) <= UNREACHABLE * len(words):
            return case
    return CASES[-1]


@functools.cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def _bert(vocab: dict[str, int] | None = None, case: Case = UNCASED) -> _Tokenizer:
    """BERT's WordPiece; without a vocabulary, one that can be trained.

    The library's own class has no `encode_special_tokens` and no trainer to choose: what it builds is taken out as it
    would be saved.
    """
    return _Tokenizer.from_str(BertWordPieceTokenizer(vocab, **case._asdict()).to_str())


def _from_json(path: pathlib.Path) -> tuple[_Tokenizer, Case]:
    where = f"text.vocab={str(path)!r}"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is not a tokenizer.json ({e}): give one, or a vocab.txt") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{where} is not a tokenizer.json, which has a model: give one, or a vocab.txt")
    if foreign := _foreign(content):
        raise ValueError(
            f"{where} has {'; '.join(foreign[:3])}: texts are BERT's WordPiece here; give a vocab.txt or "
            "tokenizer.json of that kind"
        )
    # only what was checked reaches the library
    names = ("version", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")
    try:
        tok = _Tokenizer.from_str(json.dumps({name: content.get(name) for name in names}))
        vocab = tok.get_vocab(with_added_tokens=True)
    except BaseException as e:  # the library raises plain Exceptions, and panics, which are none
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise ValueError(f"{where} is not a tokenizer.json ({str(e)[:200]}): give one, or a vocab.txt") from None
    _require_special(vocab, path)
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(
            f"{where}: the ids of its {len(vocab)} tokens are not 0 to {len(vocab) - 1}: give the vocab.txt"
        )
    return tok, _case_in(content.get("normalizer"))


def _parts(part, inner: str) -> list:
    """The parts of a `Sequence` in a tokenizer.json, or the part itself; none of null."""
    if isinstance(part, dict) and part.get("type") == "Sequence" and isinstance(part.get(inner), list):
        return part[inner]
    return [] if part is None else [part]


def _foreign(content: dict) -> list[str]:
    """What a tokenizer.json has that BERT's WordPiece has not."""
    out, model = [], content["model"]
    kind = model.get("type", "WordPiece" if "max_input_chars_per_word" in model else None)
    if kind != "WordPiece":
        return [f"a model of type {str(kind)[:40]!r}"]
    for name, want in (("unk_token", "[UNK]"), ("continuing_subword_prefix", "##")):
        if model.get(name) != want:
            out.append(f"{name} {str(model.get(name))[:40]!r} where BERT has {want!r}")
    longest = model.get("max_input_chars_per_word")
    if type(longest) is not int or not 0 < longest <= MAX_WORD:
        out.append(f"max_input_chars_per_word {str(longest)[:40]}, not from 1 to {MAX_WORD} (BERT's is 100)")
    for name, inner, known in (
        ("normalizer", "normalizers", NORMALIZERS),
        ("pre_tokenizer", "pretokenizers", SPLITTERS),
        ("post_processor", "processors", FRAMES),
    ):
        parts = _parts(content.get(name), inner)
        other = [p for p in parts if not isinstance(p, dict) or p.get("type") not in known]
        out += [f"a {name} of type {str(p.get('type') if isinstance(p, dict) else p)[:40]!r}" for p in other[:1]]
        out += [f"a {name} of {len(parts)} parts, more than {PARTS}"] * (len(parts) > PARTS)
        for frame in (p["single"] for p in parts if isinstance(p, dict) and isinstance(p.get("single"), list)):
            if sum(isinstance(piece, dict) and "Sequence" in piece for piece in frame) != 1:
                out.append(f"a {name} of {len(frame)} pieces that does not have the text once")
    return out


def _case_in(normalizer) -> Case:
    """The case of a normalizer of a tokenizer.json."""
    case = CASED
    for part in _parts(normalizer, "normalizers"):
        lowercase = part["type"] == "Lowercase" or bool(part.get("lowercase"))
        strips = part["type"] == "StripAccents" or (lowercase if (s := part.get("strip_accents")) is None else bool(s))
        case = Case(case.lowercase or lowercase, case.strip_accents or (strips and part["type"] != "Lowercase"))
    return case


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
