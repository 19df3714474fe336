"""Text: T5's SentencePiece by the `sentencepiece` package, from a spiece.model or a tokenizer.json.

Both files hold pieces with scores (a unigram model, arXiv 1804.10959) and a table of characters to replace, which are
all that is read of them. Whichever it is, the package is handed a model that is written here of pieces and scores that
were checked, and words one by one. Texts are made into words as by Hugging Face's T5TokenizerFast, which the originals
use: by its own reading of the table, which goes by graphemes where the package's goes by characters, and by all that
Unicode calls white space. Where two ways to cut a word are as likely, "lll" as "l" and "ll" or "ll" and "l", the
package, which adds up in float32, may take another one than Hugging Face's.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import pathlib
import re
import shutil
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from sentencepiece import SentencePieceProcessor  # the package: this module is blip_jax.data.text.sentencepiece
from tokenizers import normalizers

from blip_jax import buckets
from blip_jax.data.text.clean import plain_text, tidy

SPACE = "\u2581"  # stands for the space before a word
# a word, and the sign of the space before it where the text has that; words end at Unicode's White_Space, which is
# Python's without four control characters
WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
WORD = re.compile(f"{SPACE}?[^{SPACE}{WHITE}]+|{SPACE}")
SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0 to 2; no text gives them
SENTINELS = tuple(f"<extra_id_{i}>" for i in reversed(range(100)))  # behind all pieces, <extra_id_0> last
MAX_BYTES = 1 << 26  # of a file; T5's have 1 and 2 MB
MAX_PIECE = 200  # characters; T5's have 16 at most. Time goes with them times the text's
MAX_TEXT = 1 << 21  # bytes of all pieces; T5's have 0.2 MB. The package needs minutes for some MB
MAX_REPLACEMENT = 64  # bytes that one character may become; 33 in Unicode's NFKC
MAX_SCORE = 1e6
UNIGRAM = 1  # in a spiece.model, the kind of the model, and of its pieces:
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
# settings of a spiece.model, by the number of their message and their own, as T5 has them
SETTINGS = {
    (2, 24): ("treat_whitespace_as_suffix", False),
    (3, 3): ("add_dummy_prefix", True),
    (3, 4): ("remove_extra_whitespaces", True),
    (3, 5): ("escape_whitespaces", True),
}


class _Vocabulary(NamedTuple):
    pieces: list[tuple[str, float]]  # in the order of their ids
    replacements: bytes  # a compiled table; empty: none


class Tokenizer:
    """T5's SentencePiece.

    Attributes: path, vocab_size (pieces and the 100 sentinels) and the ids pad, eos and unk. A model may have more rows
    than `vocab_size`, as T5 has, 32128 for 32100.

    `path` is a spiece.model or a tokenizer.json. Of the latter the model and its table of characters alone count: what
    others add to it, as the "<image>" of Hugging Face's BLIP-2, is never in a text. Text is only text: "</s>" inside a
    caption is not the special token, nor is "<extra_id_0>".

    Raises ValueError for a file that is neither, whose first pieces are not T5's special ones, that holds pieces twice
    or too long, whose table of characters is broken, or that is of another kind of tokenizer or has other settings.

    Several threads may use one, and it can be pickled.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = path = buckets.fetched(path)
        self._where = f"text.vocab={str(path)!r}"
        found = _read(path, self._where)
        self._pieces = [piece for piece, _ in found.pieces]
        _check(found, self._where)
        tables = [normalizers.Precompiled(found.replacements)] if found.replacements else []
        self._replace = normalizers.Sequence(tables)
        self._package = _package(found.pieces, self._where)
        if SENTINELS[0] not in self._pieces:
            self._pieces += SENTINELS
        self.vocab_size = len(self._pieces)
        self.pad, self.eos, self.unk = range(3)
        hidden = {*SPECIAL, *SENTINELS}
        self._hidden = {i for i, piece in enumerate(self._pieces) if piece in hidden}

    @functools.cached_property
    def crc(self) -> int:
        """Checksum of all (id, piece) pairs: the same for two files that mean one vocabulary, however they write it
        down."""
        return zlib.crc32("\n".join(f"{i} {piece}" for i, piece in enumerate(self._pieces)).encode())

    def encode(self, texts: list[str], max_len: int) -> tuple[np.ndarray, np.ndarray]:
        """ids i32[n,T], mask bool[n,T] (True = real): "... </s>", cut to T = `max_len` and padded, both before the end
        and behind it; an empty text is the end alone."""
        if max_len < 1:
            raise ValueError(f"max_len={max_len} leaves no room for </s>: give 1 or more")
        ids = np.full((len(texts), max_len), self.pad, np.int32)
        mask = np.zeros((len(texts), max_len), bool)
        for i, found in enumerate(self._cut(texts)):
            row = [*found[: max_len - 1], self.eos]
            ids[i, : len(row)], mask[i, : len(row)] = row, True
        return ids, mask

    def save(self, path: pathlib.Path) -> None:
        """Writes a file that means this vocabulary."""
        shutil.copyfile(self.path, path)

    def lengths(self, texts: list[str], max_len: int) -> np.ndarray:
        """i32[n]: how many positions `encode` fills for each text."""
        return np.minimum([len(found) + 1 for found in self._cut(texts)], max_len).astype(np.int32)

    def decode(self, ids) -> str:
        """The text of one row of ids i32[T], without special pieces, sentinels and rows that are no piece, tidied as
        the original does (transformers 4.33.2)."""
        kept = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in self._hidden]
        return tidy("".join(self._pieces[i] for i in kept).replace(SPACE, " ").removeprefix(" "))

    def _cut(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, word by word, as T5TokenizerFast: no piece reaches into the next word, and the sums of
        scores, float32 in the package, stay as small as words are."""
        found = [WORD.findall(self._replace.normalize_str(text)) for text in texts]
        words = [*{*itertools.chain.from_iterable(found)}]
        marked = [word if word.startswith(SPACE) else SPACE + word for word in words]
        ids = dict(zip(words, self._package.encode(marked)))
        return [[i for word in text for i in ids[word]] for text in found]


def _package(pieces: list[tuple[str, float]], where: str) -> SentencePieceProcessor:
    """The package's model of these pieces, which leaves words as they are. ValueError: it refuses them."""
    kinds = {piece: CONTROL for piece in (*SPECIAL, *SENTINELS)} | {"<unk>": UNKNOWN}  # no text gives these
    content = b"".join(
        _field(1, _field(1, piece.encode()) + _field(2, float(score)) + _field(3, kinds.get(piece, NORMAL)))
        for piece, score in pieces
    )
    content += _field(2, _field(3, UNIGRAM)) + _field(3, b"".join(_field(number, False) for number in (3, 4, 5)))
    try:
        return SentencePieceProcessor(model_proto=content, num_threads=1)
    except Exception as e:  # of several kinds
        raise ValueError(f"{where} is a broken vocabulary ({str(e)[:200]}): give T5's spiece.model") from None


def _read(path: pathlib.Path, where: str) -> _Vocabulary:
    if not path.is_file():
        raise ValueError(f"{where}: no such file; give T5's spiece.model or tokenizer.json")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{where} has {size} bytes, more than the {MAX_BYTES} that a vocabulary may have")
    return (_from_json if path.suffix == ".json" else _from_model)(path, where)


def _check(found: _Vocabulary, where: str) -> None:
    """ValueError: what no vocabulary of T5 has."""
    pieces = [piece for piece, _ in found.pieces]
    if tuple(pieces[:3]) != SPECIAL:
        first = [piece[:40] for piece in pieces[:3]]
        raise ValueError(f"{where} begins with {first}, not with {list(SPECIAL)}: give T5's spiece.model")
    if bad := [piece for piece in pieces if not 0 < len(piece) <= MAX_PIECE or plain_text(piece)[1]]:
        raise ValueError(
            f"{where} holds {len(bad)} pieces that are empty, broken or of more than {MAX_PIECE} characters, such as "
            f"{bad[0][:40]!a}"
        )
    if len({*pieces}) < len(pieces):
        raise ValueError(f"{where} holds pieces twice: ids would be ambiguous")
    if (total := len("".join(pieces).encode())) > MAX_TEXT:
        raise ValueError(f"{where} holds pieces of {total} bytes in all, more than the {MAX_TEXT} that a T5's may have")
    if not all(abs(score) < MAX_SCORE for _, score in found.pieces):
        raise ValueError(f"{where} holds scores that are no logarithms of probabilities")
    if SENTINELS[0] in pieces and tuple(pieces[-len(SENTINELS) :]) != SENTINELS:
        raise ValueError(f"{where} does not end with {SENTINELS[0]} to {SENTINELS[-1]}, as a T5's tokens do")
    if table := found.replacements:  # the size of a search tree, the tree, and what it leads to with NULs between
        texts = table[4 + int.from_bytes(table[:4], "little") :] if len(table) > 4 else b""
        if not texts or max(map(len, texts.split(b"\0"))) > MAX_REPLACEMENT:
            raise ValueError(
                f"{where} has a table of characters that is broken, or that makes more than {MAX_REPLACEMENT} bytes of "
                "one character"
            )
        if _leads_outside(table):
            raise ValueError(f"{where} is a broken vocabulary, its table of characters leads outside of itself")


def _leads_outside(table: bytes) -> bool:
    """Whether any text could leave a table of characters. Its tree is a double array of Darts-clone: from place i a
    number leads to i ^ offset ^ the next byte; where it has a leaf, that is at i ^ offset and says where the text is.
    `tokenizers` would find out at such a text alone, and panic."""
    size = int.from_bytes(table[:4], "little")
    try:
        tree, texts = np.frombuffer(table[4 : 4 + size], "<u4"), table[4 + size :]
        texts.decode()
    except ValueError:
        return True
    to = np.arange(len(tree), dtype=np.uint32) ^ (tree >> 10 << (tree >> 6 & 8))
    inner = tree < 1 << 31  # the others are leaves
    inner[:1] = True  # where all texts begin
    if not len(tree) or (to[inner] | 255).max() >= len(tree):
        return True
    at = tree[to[inner & (tree >> 8 & 1 == 1)]] & 0x7FFFFFFF
    begins = np.frombuffer(texts, np.uint8) & 0xC0 != 0x80  # of a character
    return bool(len(at)) and (at.max() >= len(texts) or not begins[at].all())


def _from_json(path: pathlib.Path, where: str) -> _Vocabulary:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is not a tokenizer.json ({str(e)[:200]}): give one, or a spiece.model") from None
    model = content.get("model") if isinstance(content, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, list) or model.get("type", "Unigram") != "Unigram" or model.get("byte_fallback"):
        raise ValueError(f"{where} has no unigram model without bytes, as T5's is: give T5's tokenizer.json")
    for entry in vocab:
        if not (
            isinstance(entry, list)
            and len(entry) == 2
            and isinstance(entry[0], str)
            and isinstance(entry[1], float | int)
        ):
            raise ValueError(f"{where} has {str(entry)[:60]} where a piece and its score belong")
    if model.get("unk_id") != SPECIAL.index("<unk>"):
        raise ValueError(f"{where}: its unknown piece is {str(model.get('unk_id'))[:40]}, not 2 as T5's")
    return _Vocabulary(list(map(tuple, vocab)), _replacements(content.get("normalizer"), where))


def _replacements(normalizer, where: str) -> bytes:
    """The table of characters in a tokenizer.json. Beside it may stand what is done to spaces, where cutting into words
    does the same."""
    parts = normalizer
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        parts = normalizer.get("normalizers")
    parts = parts if isinstance(parts, list) else [] if parts is None else [parts]
    kinds = [part.get("type") if isinstance(part, dict) else part for part in parts]
    tables = [part for part, kind in zip(parts, kinds) if kind == "Precompiled"]
    if len(tables) > 1 or not {"Precompiled", "Strip", "Replace"}.issuperset(map(str, kinds)):
        raise ValueError(f"{where} has a normalizer of {str(kinds)[:60]}, not T5's table of characters alone")
    try:
        return base64.b64decode(tables[0]["precompiled_charsmap"], validate=True) if tables else b""
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where} has a table of characters that is not in base 64") from None


def _from_model(path: pathlib.Path, where: str) -> _Vocabulary:
    """The fields of a SentencePiece ModelProto: 1 pieces (1 text, 2 score, 3 kind), 2 trainer (3 kind of model), 3
    normalizer (2 table of characters); and SETTINGS of the two. Kinds of pieces do not count, as in Hugging Face's."""
    pieces, kinds, settings, table = [], set(), {}, b""
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]))
                kinds.add(("piece", piece.get(3)))
            elif number == 2:
                trainer = dict(_fields(value))
                kinds.add(("model", trainer.get(3, UNIGRAM)))
                settings |= {(2, i): x for i, x in trainer.items()}
            elif number == 3:
                normalizer = dict(_fields(value))
                table = bytes(normalizer.get(2, b""))
                settings |= {(3, i): x for i, x in normalizer.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
        raise ValueError(f"{where} is not a spiece.model ({str(e)[:200]}): give one, or a tokenizer.json") from None
    if ("piece", BYTE) in kinds or {("model", UNIGRAM)} != {kind for kind in kinds if kind[0] == "model"}:
        raise ValueError(f"{where} has no unigram model without bytes, as T5's is: give T5's spiece.model")
    for key, (name, wanted) in SETTINGS.items():
        if settings.get(key, wanted) != wanted:
            raise ValueError(f"{where} has {name}={settings[key]!r}, not {wanted} as T5's: give T5's spiece.model")
    return _Vocabulary(pieces, table)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: numbers as int, all else as bytes. ValueError: it breaks
    off, or holds a field of another kind."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while shift < 64 and at < len(data):
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number breaks off")

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        if size is None and key & 7 != 2:
            raise ValueError(f"a field of kind {key & 7}")
        size = varint() if size is None else size
        if size > len(data) - at:
            raise ValueError("a field breaks off")
        value, at = data[at : at + size], at + size
        yield key >> 3, value


def _field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protobuf message, as `_fields` reads it; a number below 16."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    head, rest, data = (number << 3, value, b"") if isinstance(value, int) else (number << 3 | 2, len(value), value)
    out = [head]
    while rest > 127:
        out.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*out, rest]) + data
