"""OPT's byte-level BPE: ids, paddings, texts and back, two kinds of files, and files that are wrong."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world.golden import folder

from blip_jax.data.text import bpe
from blip_jax.data.text.bpe import SPECIAL, Tokenizer, train_bpe
from blip_jax.data.text.clean import clean_caption, clean_question, plain_text, tidy

CAPTIONS = ["a photo of a dog", "two dogs and a cat's house", "the café naïve dogs\n", "a dog in a photo"] * 5
SIZE = 300


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "vocab.json"
    train_bpe(CAPTIONS, SIZE, path)
    return path


@pytest.fixture(scope="module")
def tok(files):
    return Tokenizer(files)


def vocabulary(files):
    merges = files.with_name("merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    return json.loads(files.read_text(encoding="utf-8")), merges


def as_json(path, files, **changes):
    """The same vocabulary as a tokenizer.json; changes: of its parts, or of its model's as model__name."""
    vocab, merges = vocabulary(files)
    content = {
        "added_tokens": [{"id": SIZE, "content": "<image>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [pair.split(" ") for pair in merges]},
    }
    for name, value in changes.items():
        *part, name = name.split("__")
        (content[part[0]] if part else content)[name] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_ids_frame_and_both_paddings(tok, files):
    vocab, _ = vocabulary(files)
    assert [vocab[token] for token in SPECIAL] == [0, 1, 2, 3] and (tok.bos, tok.pad, tok.vocab_size) == (2, 1, SIZE)
    assert tok.newline == vocab["Ċ"]
    a, dog = vocab["a"], vocab["Ġdog"]
    texts = ["a dog\n", "", "a dog dog dog dog"]
    ids, mask = tok.encode(texts, 5)
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert ids.tolist() == [[2, a, dog, tok.newline, 1], [2, 1, 1, 1, 1], [2, a, dog, dog, dog]]
    left, left_mask = tok.encode(texts, 5, pad_left=True)
    assert left.tolist() == [[1, 2, a, dog, tok.newline], [1, 1, 1, 1, 2], [2, a, dog, dog, dog]]
    for m, x in ((mask, ids), (left_mask, left)):
        np.testing.assert_array_equal(m, x != tok.pad)
    np.testing.assert_array_equal(tok.encode(texts, 5)[0], ids)  # what was asked for before does not count
    np.testing.assert_array_equal(tok.lengths(texts, 5), mask.sum(1))
    with pytest.raises(ValueError, match="max_len=0 leaves no room"):
        tok.encode(["a"], 0)


def test_merges_apply_in_their_order(tmp_path):
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(bpe.pre_tokenizers.ByteLevel.alphabet())])}
    for token in ("bc", "ab", "abc"):
        vocab[token] = len(vocab)
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(vocab))
    pieces = {}
    for merges in ("b c\na b\na bc", "a b\nb c\na bc"):
        path.with_name("merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        one = Tokenizer(path)
        pieces[one.crc] = one.encode(["abc"], 4)[0][0].tolist()
    assert list(pieces.values()) == [[2, vocab["abc"], 1, 1], [2, vocab["ab"], vocab["c"], 1]]


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=60)
def test_any_text_comes_back(tok, text):
    text = plain_text(text)[0]
    ids, mask = tok.encode([text], 200)
    assert mask[0].sum() == tok.lengths([text], 200)[0]
    assert not set(ids[0][1:][mask[0][1:]].tolist()) & {0, 1, 2, 3}
    assert tok.decode(ids[0]) == tidy(text).strip()


def test_special_tokens_in_a_text_are_text_and_decoding_leaves_out_the_real_ones(tok):
    ids = tok.encode(["a </s> <pad> dog\n"], 40)[0][0]
    assert (ids == 2).sum() == 1
    rows = [0, *ids, 3, SIZE, SIZE + 7, -1]  # a model may have more rows than there are tokens
    assert tok.decode(rows) == "a </s> <pad> dog"
    assert tok.decode(tok.encode([" a dog , it 's in ?\n\n"], 40)[0][0]) == "a dog, it's in?"
    half = tok.encode(["é"], 9)[0][0][:2]
    assert tok.decode(half) == "�"


def test_one_vocabulary_in_two_kinds_of_files(tmp_path, files, tok):
    pairs = Tokenizer(as_json(tmp_path / "tokenizer.json", files))
    vocab, merges = vocabulary(files)
    apart = {token: i for token, i in vocab.items() if token not in SPECIAL}
    added = [{"id": vocab[token], "content": token, "special": True} for token in SPECIAL]
    lines = Tokenizer(
        as_json(tmp_path / "other.json", files, model__merges=merges, model__vocab=apart, added_tokens=added)
    )
    for other in (pairs, lines):
        assert (other.crc, other.vocab_size, other.newline) == (tok.crc, tok.vocab_size, tok.newline)
        np.testing.assert_array_equal(other.encode(CAPTIONS, 12)[0], tok.encode(CAPTIONS, 12)[0])
    swapped = vocab | {"a": vocab["b"], "b": vocab["a"]}
    assert Tokenizer(as_json(tmp_path / "swapped.json", files, model__vocab=swapped)).crc != tok.crc


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"model__type": "WordPiece"}, "a model of type 'WordPiece'"),
        ({"model__dropout": 0.5}, "dropout '0.5'"),
        ({"model__byte_fallback": True}, "byte_fallback"),
        ({"normalizer": {"type": "Lowercase"}}, "a normalizer"),
        ({"pre_tokenizer": None}, "a pre_tokenizer of type 'None'"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "a space before each text"),
        ({"model__vocab": {"a": "0"}}, "does not give each token an id"),
        ({"model__vocab": ["a"]}, "does not give each token an id"),
        ({"model__vocab": {token: i for i, token in enumerate(SPECIAL)}}, "lacks 256 tokens"),
        ({"model__merges": None}, "its merges are not two tokens"),
        ({"model__merges": ["a b c"]}, "its merges are not two tokens"),
        ({"model__merges": [["a", 7]]}, "its merges are not two tokens"),
        ({"model__merges": ["q zz"]}, "its merges do not fit its tokens"),
        ({"model__merges": ["\ud800 a"]}, "its merges do not fit its tokens"),
        ({"added_tokens": [{"id": 7, "content": "<s>"}], "model__vocab": {"\ud800": 0}}, "broken characters"),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path, files, changes, told):
    with pytest.raises(ValueError, match=told):
        Tokenizer(as_json(tmp_path / "tokenizer.json", files, **changes))


def test_files_that_are_wrong(tmp_path, files, monkeypatch):
    vocab, _ = vocabulary(files)
    path = tmp_path / "vocab.json"

    def wrong(content, told):
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        with pytest.raises(ValueError, match=told):
            Tokenizer(path)

    with pytest.raises(ValueError, match=r"vocab\.json'?: no such file; give OPT's"):
        Tokenizer(path)
    wrong(vocab, r"merges\.txt'?: no such file")
    path.with_name("merges.txt").write_bytes(files.with_name("merges.txt").read_bytes())
    Tokenizer(path)
    wrong(vocab | {"more": SIZE + 1}, "are not 0 to 300")
    wrong({token: i for token, i in vocab.items() if i < SIZE - 1} | {"more": 5}, "are not 0 to")
    wrong(b"[1, 2]", "not a table of tokens")
    wrong(b"{" * 200_000, "is not JSON")
    wrong(b"\xff\xfe", "not UTF-8")
    path.write_bytes(files.read_bytes())
    monkeypatch.setattr(bpe, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="more than the 1000 that it may have"):
        Tokenizer(path)


def test_training_gives_the_same_files_in_another_process_and_fills_them(tmp_path, files):
    code = "import sys; from blip_jax.data.text.bpe import train_bpe; train_bpe(eval(sys.argv[1]), 300, sys.argv[2])"
    other = tmp_path / "vocab.json"
    subprocess.run([sys.executable, "-c", code, repr(CAPTIONS), str(other)], check=True)
    for name in ("vocab.json", "merges.txt"):
        assert other.with_name(name).read_bytes() == files.with_name(name).read_bytes()
    train_bpe(["a b"], 263, other)
    assert "madeupword0000" in json.loads(other.read_text(encoding="utf-8")) and Tokenizer(other).vocab_size == 263
    with pytest.raises(ValueError, match="size=259 is too small: special tokens and single bytes alone need 260"):
        train_bpe(CAPTIONS, 259, other)


def test_transformers_gives_the_same_ids(files, tok):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; pip install -e '.[peers]'"
    )
    vocab, merges = vocabulary(files)
    theirs = transformers.GPT2Tokenizer(vocab=vocab, merges=[tuple(pair.split(" ")) for pair in merges])
    texts = ["a photo of a dog\n", "  two   dogs' café, isn't it? 1,000\t漢字\n\n", ""]
    ids, mask = tok.encode(texts, 60)
    for text, row, real in zip(texts, ids, mask):
        assert row[real].tolist() == [tok.bos, *theirs(text)["input_ids"]]


def test_captions_and_questions_are_cleaned_as_by_lavis():
    case = json.loads((folder("blip2/text_and_scores") / "meta.json").read_text(encoding="utf-8"))
    for text, plain, prompted in case["caption"]:
        assert clean_caption(text, 50) == plain and "a photo of " + clean_caption(text, 50) == prompted, text
    for text, plain in case["question"]:
        assert clean_question(text) == plain, text
