"""T5's SentencePiece: ids as Hugging Face's `tokenizers` and the bare `sentencepiece` package give them, from either
file, and files that are broken."""

import base64
import concurrent.futures
import functools
import io
import json
import math
import os
import pathlib
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece as package
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Peer
from tokenizers import models, normalizers, pre_tokenizers
from world.pieces import write_pieces

from blip_jax.data.scenes.world import vocab_captions
from blip_jax.data.text import sentencepiece
from blip_jax.data.text.clean import tidy
from blip_jax.data.text.sentencepiece import SENTINELS, SPACE, Tokenizer

CAPTIONS = [*vocab_captions(200), "Ünïcödé ｆｕｌｌ ﬁ ligature, it's 3.5!", "漢字 かな"]
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -3.0), (f"{SPACE}a", -2.0), ("b", -3.0), ("ab", -1.0)]
KINDS = {"<pad>": 3, "</s>": 3, "<unk>": 2}
ODD = [
    "  a  red circle ",
    "ﬁ ｆｕｌｌ　ｗ",
    "zzz é e\u0301 漢",
    "tab\tnew\nline",
    "a\u00a0b",
    "ﷺ",
    "x\u200by",
    "½ №",
]
# where Hugging Face's tokenizer differs from the bare package, or Unicode's white space from Python's or the table's
ODDER = [
    "e\u0301\u0302 ﬁ\u0301 e\u0323\u0302",
    "\u1112\u1161\u11ab ｶﾞ",
    "a\u0085b\u000bc\u000cd\u001ce",
    "\u2028a\u2029b\u3000c\u1680d\u202fe\ufefff\u200dg",
    "a▁b ▁c▁▁ d▁ ▁",
    "\0a\0 b\0",
    "a <pad></s> <unk> <extra_id_0> ▁</s>",
    "a\r\nb",
]


def varint(n):
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def field(number, value):
    """A field of a protobuf message: an int, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def characters(tree=(), texts=b"ab\0b\0"):
    """A table of characters that makes "ab" of x, and "b" of é. tree: units of the double array to change, by place."""
    units = np.zeros(768, "<u4")

    def lead(at, to, label, leaf=0):
        units[at] = (at ^ to) << 10 | leaf << 8 | label

    lead(0, 256, 0)
    lead(256 ^ 0x78, 512, 0x78, leaf=1)
    lead(256 ^ 0xC3, 520, 0xC3)
    lead(520 ^ 0xA9, 513, 0xA9, leaf=1)
    units[512:514] = 1 << 31, 1 << 31 | 3
    for at, unit in dict(tree).items():
        units[at] = unit
    return struct.pack("<I", units.nbytes) + units.tobytes() + texts


def model_file(path, pieces=PIECES, table=b"", kind=1, kinds=KINDS, trainer=b"", normalizer=b""):
    """A spiece.model."""
    found = b""
    for piece, score in pieces:
        body = field(1, piece.encode()) + b"\x15" + struct.pack("<f", score)
        found += field(1, body + (field(3, kinds[piece]) if piece in kinds else b""))
    normalizer += field(2, table) if table else b""
    path.write_bytes(found + field(2, field(3, kind) + trainer) + (field(3, normalizer) if normalizer else b""))
    return path


def json_file(path, pieces=PIECES, normalizer=None, **model):
    """A tokenizer.json, with the sentinels in its model, as FlanT5's."""
    vocab = [list(x) for x in pieces] + [[x, 0.0] for x in SENTINELS]
    model = {"type": "Unigram", "unk_id": 2, "vocab": vocab} | model
    path.write_text(json.dumps({"normalizer": normalizer, "model": model}), encoding="utf-8")
    return path


@functools.cache
def scores(path):
    return np.array([score for _, score in sentencepiece._from_model(path, "").pieces])


def real(tok, text, max_len=60):
    ids, mask = tok.encode([text], max_len)
    assert mask[0].sum() == tok.lengths([text], max_len)[0]
    return ids[0][mask[0]].tolist()


opened = functools.cache(Tokenizer)


@functools.cache
def peer(path):
    """What transformers makes of a spiece.model: Hugging Face's `tokenizers`, where no text gives a special token."""
    found, hidden = sentencepiece._from_model(path, ""), {*sentencepiece.SPECIAL, *SENTINELS}
    pieces = [(f" {piece}" if piece in hidden else piece, score) for piece, score in found.pieces]
    out = Peer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    if found.replacements:
        out.normalizer = normalizers.Precompiled(found.replacements)
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=True)]
    out.pre_tokenizer = pre_tokenizers.Sequence(words)
    return lambda text: out.encode(text).ids


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return Tokenizer(model_file(tmp_path_factory.mktemp("pieces") / "spiece.model"))


@pytest.fixture(scope="module", params=["trained", "plain"])
def either(request, tok):
    """A spiece.model with a table of characters, and one without."""
    return request.getfixturevalue("trained")[0] if request.param == "trained" else tok.path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(path, processor) of a model that the `sentencepiece` package made, as T5's was made."""
    out, path = io.BytesIO(), tmp_path_factory.mktemp("trained") / "spiece.model"
    ids = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    package.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=out, vocab_size=150, **ids, minloglevel=2, hard_vocab_limit=False
    )
    path.write_bytes(out.getvalue())
    return path, package.SentencePieceProcessor(model_file=str(path))


def test_the_end_is_kept_and_padding_is_behind_it(tok):
    assert (tok.pad, tok.eos, tok.unk, tok.vocab_size) == (0, 1, 2, len(PIECES) + 100)
    ids, mask = tok.encode(["ab", "", "a b ab", "  "], 3)
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert ids.tolist() == [[3, 6, 1], [1, 0, 0], [4, 3, 1], [1, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [True] * 3, [True, False, False]]
    assert tok.lengths(["ab", "", "a b ab"], 4).tolist() == [3, 1, 4]
    assert tok.encode(["ab"], 1)[0].tolist() == [[1]]
    with pytest.raises(ValueError, match="max_len=0 leaves no room for </s>"):
        tok.encode(["a"], 0)


def test_special_tokens_and_sentinels_are_text_in_a_text(tok):
    for token in ("</s>", "<pad>", "<unk>", "<extra_id_0>"):
        assert real(tok, f"ab {token}")[:2] == [3, 6] and not {0, tok.vocab_size - 1} & {*real(tok, f"ab {token}")}
        assert real(tok, token).count(1) == 1


def test_decoding_skips_what_is_no_text(tok):
    n = tok.vocab_size
    assert tok.decode([0, 4, 5, 3, 6, 1, 2, n - 1, n - 100, n, n + 27, -1]) == "ab ab"
    assert tok.decode(np.array([1, 0, 0])) == ""
    assert tok.decode([3, 3, 6]) == " ab"  # of the space before the first word, one


def test_pieces_as_the_package_gives_them(trained):
    path, package = trained
    tok = Tokenizer(path)
    assert tok.vocab_size == package.vocab_size() + 100
    for text in CAPTIONS + ODD:
        assert real(tok, text, 200) == [*package.encode(text), 1], text
        back = package.decode([i for i in package.encode(text) if i != tok.unk])
        # of the spaces before the first word the package drops all, Hugging Face's tokenizer one
        assert tok.decode(package.encode(text)).lstrip() == tidy(back), text


@settings(max_examples=200, deadline=None)
@given(st.text("abdeilprstu ,.'-\t  éＡﬁ漢", max_size=30))
def test_any_text_as_the_package(trained, text):
    path, package = trained
    assert real(opened(path), text, 200) == [*package.encode(text), 1]


def test_pieces_as_hugging_faces(either):
    for text in CAPTIONS + ODD + ODDER:
        assert real(opened(either), text, 200) == [*peer(either)(text), 1], ascii(text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20) | st.text("".join(ODDER), max_size=20))
@example("\x85a\x1c\x1fb\u180e")
def test_any_text_as_hugging_faces(either, text):
    """The same ids, or, as "lll" may be "l" and "ll" or "ll" and "l", ids that are exactly as likely."""
    found, theirs = real(opened(either), text, 200)[:-1], peer(either)(text)
    assert found == theirs or math.fsum(scores(either)[found]) == math.fsum(scores(either)[theirs])


def test_long_texts(either):
    """The package adds up in float32 and may cut a word of 100,000 characters otherwise, but not worse."""
    letters = np.random.default_rng(0).choice([*"abcdeilprst"], 100_000)
    for text in ("".join(letters), " ".join("".join(letters[i : i + 5]) for i in range(0, len(letters), 5))):
        found, theirs = real(opened(either), text, 100_001)[:-1], peer(either)(text)
        assert scores(either)[found].sum() == pytest.approx(scores(either)[theirs].sum(), rel=1e-6)
        assert opened(either).decode(found) == opened(either).decode(theirs) != ""


def test_threads_and_copies(trained):
    one = Tokenizer(trained[0])
    wanted = one.encode(CAPTIONS, 40)[0].tolist()
    copy = pickle.loads(pickle.dumps(one))
    assert (copy.encode(CAPTIONS, 40)[0].tolist(), copy.crc) == (wanted, one.crc)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: one.encode(CAPTIONS, 40)[0].tolist(), range(32)))
    assert all(ids == wanted for ids in found)


def test_one_vocabulary_in_two_files(tmp_path, trained, tok):
    path, _ = trained
    found = sentencepiece._from_model(path, "")
    spaces = [{"type": "Strip"}, {"type": "Replace"}]
    table = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(found.replacements).decode()}
    one = Tokenizer(path)
    for i, normalizer in enumerate((table, {"type": "Sequence", "normalizers": [table, *spaces]})):
        other = Tokenizer(json_file(tmp_path / f"{i}.json", found.pieces, normalizer))
        assert (one.crc, one.vocab_size) == (other.crc, other.vocab_size)
        assert all(real(one, text) == real(other, text) for text in CAPTIONS)
    assert tok.crc == Tokenizer(json_file(tmp_path / "plain.json")).crc != one.crc
    swapped = [*PIECES[:-2], *PIECES[:-3:-1]]
    assert tok.crc != Tokenizer(json_file(tmp_path / "swapped.json", swapped)).crc


def test_a_vocabulary_for_tests(tmp_path):
    for size in (180, 400):
        write_pieces(CAPTIONS, size, tmp_path / "tokenizer.json")
        tok = Tokenizer(tmp_path / "tokenizer.json")
        assert tok.vocab_size == size
        assert [tok.decode(tok.encode([text], 200)[0][0]) for text in CAPTIONS] == CAPTIONS
    with pytest.raises(ValueError, match="size=120"):
        write_pieces(CAPTIONS, 120, tmp_path / "tokenizer.json")


def changed(**changes):
    """PIECES with others in the place of some, by number."""
    return [changes.get(f"_{i}", x) for i, x in enumerate(PIECES)]


@pytest.mark.parametrize("write", [model_file, json_file])
@pytest.mark.parametrize(
    "pieces, message",
    [
        (PIECES[1:], r"begins with \['</s>', '<unk>', '▁'\], not with"),
        ([], r"begins with \[(\]|'<extra_id_99>')"),
        (changed(_5=("ab", -1.0)), "holds pieces twice"),
        (changed(_5=("x" * 201, -1.0)), "1 pieces that are empty, broken or of more than 200 characters"),
        (changed(_5=("", -1.0)), "1 pieces that are empty"),
        (changed(_5=("b", float("nan"))), "scores that are no logarithms"),
        (changed(_5=("b", -float("inf"))), "scores that are no logarithms"),
        (changed(_5=("<extra_id_99>", 0.0)), "does not end with <extra_id_99> to <extra_id_0>|holds pieces twice"),
    ],
)
def test_vocabularies_that_are_not_t5s(tmp_path, write, pieces, message):
    path = write(tmp_path / ("a.json" if write is json_file else "a.model"), pieces)
    with pytest.raises(ValueError, match=message) as e:
        Tokenizer(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(kind=2), "no unigram model without bytes"),
        (dict(kinds=KINDS | {"b": 6}), "no unigram model without bytes"),
        (dict(table=b"\0\0"), "table of characters that is broken"),
        (dict(table=b"\0\0\0\0" + b"x" * 65 + b"\0"), "makes more than 64 bytes of one character"),
        (dict(table=b"\xff" * 4 + b"x"), "table of characters that is broken"),
        (dict(table=characters({0: 768 << 10})), "leads outside of itself"),
        (dict(table=characters({0: 1 << 31 | 768 << 10})), "leads outside of itself"),
        (dict(table=characters({300: 4 << 10 | 1 << 9})), "leads outside of itself"),
        (dict(table=characters({513: 1 << 31 | 5})), "leads outside of itself"),
        (dict(table=characters(texts="é\0".encode())), "leads outside of itself"),
        (dict(table=characters({513: 1 << 31 | 1}, texts="é\0".encode())), "leads outside of itself"),
        (dict(table=characters(texts=b"ab\0\xff\0")), "leads outside of itself"),
        (dict(table=b"\0\0\0\0a\0"), "leads outside of itself"),
        (dict(table=b"\2\0\0\0aaa\0"), "leads outside of itself"),
        (dict(normalizer=field(3, 0)), "add_dummy_prefix=0, not True as T5's"),
        (dict(normalizer=field(4, 0)), "remove_extra_whitespaces=0, not True as T5's"),
        (dict(normalizer=field(5, 0)), "escape_whitespaces=0, not True as T5's"),
        (dict(trainer=field(24, 1)), "treat_whitespace_as_suffix=1, not False as T5's"),
        (dict(pieces=PIECES[:3]), "broken vocabulary .*no pieces"),
    ],
)
def test_models_of_another_kind(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(model_file(tmp_path / "a.model", **changes))


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "no unigram model"),
        ("{", "is not a tokenizer.json"),
        ("[" * 100_000, "is not a tokenizer.json"),
        ('{"model": {"type": "BPE", "vocab": []}}', "no unigram model"),
        ('{"model": {"type": "Unigram", "vocab": {"a": 1}}}', "no unigram model"),
        ('{"model": {"type": "Unigram", "vocab": [["a"]]}}', r"\['a'\] where a piece and its score belong"),
        ('{"model": {"vocab": [["a", "b"]]}}', "where a piece and its score belong"),
        ('{"model": {"vocab": [["<pad>", 0]], "unk_id": 1}}', "its unknown piece is 1, not 2"),
        ('{"model": {"vocab": [["<pad>", 0]], "unk_id": 2}}', "begins with"),
    ],
)
def test_broken_json(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer(path)


@pytest.mark.parametrize(
    "normalizer, message",
    [
        ({"type": "Lowercase"}, "not T5's table of characters alone"),
        ("NFC", "not T5's table of characters alone"),
        ({"type": "Precompiled", "precompiled_charsmap": "?"}, "not in base 64"),
        ({"type": "Precompiled"}, "not in base 64"),
        ({"type": "Sequence", "normalizers": [{"type": "Precompiled"}] * 2}, "not T5's table of characters alone"),
        ({"type": "Sequence", "normalizers": [{"type": "Append"}]}, "not T5's table of characters alone"),
    ],
)
def test_normalizers_that_t5_has_not(tmp_path, normalizer, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(json_file(tmp_path / "a.json", normalizer=normalizer))


def test_huge_numbers_surrogates_and_large_files(tmp_path, monkeypatch):
    path = json_file(tmp_path / "a.json")
    for was, now, message in (
        ("-3.0", "1" + "0" * 400, "no logarithms"),
        ('"b"', r'"\ud800"', "empty, broken"),
    ):
        path.write_text(json_file(path).read_text().replace(was, now))
        with pytest.raises(ValueError, match=message):
            Tokenizer(path)
    monkeypatch.setattr(sentencepiece, "MAX_TEXT", 20)
    with pytest.raises(ValueError, match="holds pieces of 24 bytes in all, more than the 20"):
        Tokenizer(model_file(tmp_path / "a.model"))
    for name in ("a.json", "a.model"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, sentencepiece.MAX_BYTES + 1)
        with pytest.raises(ValueError, match=f"has {sentencepiece.MAX_BYTES + 1} bytes, more than"):
            Tokenizer(tmp_path / name)
    with pytest.raises(ValueError, match="no such file; give T5's spiece.model or tokenizer.json"):
        Tokenizer(tmp_path / "none.model")


def test_a_model_that_breaks_off_or_is_none(tmp_path):
    whole, path = model_file(tmp_path / "a.model").read_bytes(), tmp_path / "b.model"
    rng = np.random.default_rng(0)
    cut = [whole[:n] for n in range(0, len(whole), 7)]
    others = [b"hello", b"\xff" * 40, rng.bytes(2000), b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x0b\x0c"]
    for content in cut + others:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="text.vocab="):
            Tokenizer(path)


def test_a_table_of_characters(tmp_path):
    assert real(Tokenizer(model_file(tmp_path / "a.model", table=characters())), "xé a") == [3, 6, 5, 4, 1]


FUZZ = r"""
import pathlib, sys
import numpy as np
from blip_jax.data.text.sentencepiece import Tokenizer

path = pathlib.Path(sys.argv[1])
whole, table = path.read_bytes(), slice(*map(int, sys.argv[2:]))
rng, opened, refused = np.random.default_rng(0), 0, 0
texts = ["x\u00e9\u00c3\0 </s>\u2581" * 9, "".join(map(chr, [*range(0x1000), *range(0xFF00, 0x10100)]))]
for i in range(400):
    content = bytearray(whole)
    for _ in range(rng.choice([1, 2, 20])):
        at = rng.integers(*((table.start, table.stop) if i % 2 else (0, len(content))))
        new = rng.choice([0, 255, 127, 128, rng.integers(256)], int(rng.choice([1, 4]))).astype(np.uint8).tobytes()
        content[at : at + len(new)] = new if i % 5 else b""
    path.write_bytes(content)
    try:
        tok = Tokenizer(path)
    except ValueError as e:
        refused += "text.vocab=" in str(e) and "\n" not in str(e)
        continue
    ids, _ = tok.encode(texts, 9999)
    opened += 0 <= ids.min() and ids.max() < tok.vocab_size
print(opened, refused)
"""


def test_whatever_is_changed_in_a_model_is_refused_or_encodes(tmp_path):
    """No fault of the process, and nothing that the libraries themselves say."""
    table = characters()
    path = model_file(tmp_path / "a.model", table=table)
    begin = path.read_bytes().index(table)
    command = [sys.executable, "-c", FUZZ, path, str(begin), str(begin + len(table))]
    ran = subprocess.run(command, cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")
    opened, refused = map(int, ran.stdout.split())
    assert opened + refused == 400 and min(opened, refused) > 50


def test_a_broken_tree_of_characters_is_said_and_no_panic(tmp_path, trained):
    """Whatever the numbers in the tree are, a text is encoded or refused."""
    path, _ = trained
    found, refused = sentencepiece._from_model(path, ""), 0
    size = int.from_bytes(found.replacements[:4], "little")
    rng = np.random.default_rng(0)
    for _ in range(5):
        tree = rng.bytes(size)
        table = found.replacements[:4] + tree + found.replacements[4 + size :]
        try:
            Tokenizer(model_file(tmp_path / "a.model", table=table)).encode(CAPTIONS[-20:], 30)
        except ValueError as e:
            refused += "is a broken vocabulary" in str(e)
    assert refused
