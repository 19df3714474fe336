"""T5's SentencePiece: ids as the `sentencepiece` package gives them, from either file, and files that are broken."""

import base64
import functools
import io
import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world.pieces import write_pieces

from blip_jax.data.scenes.world import vocab_captions
from blip_jax.data.text import sentencepiece
from blip_jax.data.text.clean import tidy
from blip_jax.data.text.sentencepiece import SENTINELS, SPACE, Tokenizer

CAPTIONS = [*vocab_captions(200), "Ünïcödé ｆｕｌｌ ﬁ ligature, it's 3.5!", "漢字 かな"]
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -3.0), (f"{SPACE}a", -2.0), ("b", -3.0), ("ab", -1.0)]
KINDS = {"<pad>": 3, "</s>": 3, "<unk>": 2}


def varint(n):
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def field(number, value):
    """A field of a protobuf message: an int, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model_file(path, pieces=PIECES, table=b"", kind=1, kinds=KINDS):
    """A spiece.model."""
    found = b""
    for piece, score in pieces:
        body = field(1, piece.encode()) + b"\x15" + struct.pack("<f", score)
        found += field(1, body + (field(3, kinds[piece]) if piece in kinds else b""))
    path.write_bytes(found + field(2, field(3, kind)) + (field(3, field(2, table)) if table else b""))
    return path


def json_file(path, pieces=PIECES, normalizer=None, **model):
    """A tokenizer.json, with the sentinels in its model, as FlanT5's."""
    vocab = [list(x) for x in pieces] + [[x, 0.0] for x in SENTINELS]
    model = {"type": "Unigram", "unk_id": 2, "vocab": vocab} | model
    path.write_text(json.dumps({"normalizer": normalizer, "model": model}), encoding="utf-8")
    return path


def real(tok, text, max_len=60):
    ids, mask = tok.encode([text], max_len)
    assert mask[0].sum() == tok.lengths([text], max_len)[0]
    return ids[0][mask[0]].tolist()


opened = functools.cache(Tokenizer)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return Tokenizer(model_file(tmp_path_factory.mktemp("pieces") / "spiece.model"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(path, processor) of a model that the `sentencepiece` package made, as T5's was made."""
    package = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed; pip install -e '.[test]'")
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
    odd = [
        "  a  red circle ",
        "ﬁ ｆｕｌｌ　ｗ",
        "zzz é e\u0301 漢",
        "tab\tnew\nline",
        "a\u00a0b",
        "ﷺ",
        "x\u200by",
        "½ №",
    ]
    for text in CAPTIONS + odd:
        assert real(tok, text, 200) == [*package.encode(text), 1], text
        back = package.decode([i for i in package.encode(text) if i != tok.unk])
        # of the spaces before the first word the package drops all, Hugging Face's tokenizer one
        assert tok.decode(package.encode(text)).lstrip() == tidy(back), text


@settings(max_examples=200, deadline=None)
@given(st.text("abdeilprstu ,.'-\t  éＡﬁ漢", max_size=30))
def test_any_text_as_the_package(trained, text):
    path, package = trained
    assert real(opened(path), text, 200) == [*package.encode(text), 1]


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


def test_huge_numbers_surrogates_and_large_files(tmp_path):
    path = json_file(tmp_path / "a.json")
    for was, now, message in (
        ("-3.0", "1" + "0" * 400, "no logarithms"),
        ('"b"', r'"\ud800"', "empty, broken"),
    ):
        path.write_text(json_file(path).read_text().replace(was, now))
        with pytest.raises(ValueError, match=message):
            Tokenizer(path)
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
