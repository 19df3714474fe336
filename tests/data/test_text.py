import json
import pathlib
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_jax.config import base
from blip_jax.data import pairs
from blip_jax.data.text import wordpiece
from blip_jax.data.text.clean import clean_caption, clean_question, plain_text
from blip_jax.data.text.wordpiece import SPECIAL, Tokenizer, train_vocab
from blip_jax.inference import programs

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data" / "bert-base-uncased-vocab.txt"
WORDS = [
    "a", "pic", "##ture", "picture", "of", "cafe", "don", "'", "t", "un", "##aff", "##able", "漢", "字", "[", "]",
    "sep", ",", "##s", "dog", "b", "##b", "!", "-", "1"
]  # fmt: skip


def write(path, tokens):
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    return write(tmp_path_factory.mktemp("vocab") / "vocab.txt", list(SPECIAL) + WORDS)


@pytest.fixture(scope="module")
def tok(vocab):
    return Tokenizer(vocab)


def real(tok, s, max_len=40):
    ids, mask = tok.encode([s], max_len)
    return ids[0][mask[0]].tolist()


def test_ids_and_frame(tok):
    n = len(SPECIAL) + len(WORDS)
    assert (tok.pad, tok.unk, tok.cls, tok.sep, tok.dec, tok.enc) == (0, 1, 2, 3, n, n + 1)
    assert tok.vocab_size == n + 2
    ids, mask = tok.encode(["a dog", "", "a a a a a a a"], 5)
    dog, a = 5 + WORDS.index("dog"), 5
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert ids.tolist() == [[2, a, dog, 3, 0], [2, 3, 0, 0, 0], [2, a, a, a, 3]]
    assert mask.tolist() == [[True] * 4 + [False], [True] * 2 + [False] * 3, [True] * 5]
    with pytest.raises(ValueError, match="max_len=1"):
        tok.encode(["a"], 1)


# An independent WordPiece: what BERT's uncased tokenizer does to a text, character by character.


def reference(vocab: dict, s: str) -> list[str]:
    out = ""
    for c in s:
        if c in "\0\ufffd" or (unicodedata.category(c).startswith("C") and c not in "\t\n\r"):
            continue
        cjk = any(
            a <= ord(c) <= b for a, b in ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF))
        )
        out += f" {c} " if cjk else " " if c.isspace() else c
    out = "".join(c for c in unicodedata.normalize("NFD", out.lower()) if unicodedata.category(c) != "Mn")
    split = ""
    for c in out:
        ascii_mark = 33 <= ord(c) <= 47 or 58 <= ord(c) <= 64 or 91 <= ord(c) <= 96 or 123 <= ord(c) <= 126
        split += f" {c} " if ascii_mark or unicodedata.category(c).startswith("P") else c
    pieces = []
    for word in split.split():
        found, start = [], 0
        while start < len(word) and len(word) <= 100:
            ends = [e for e in range(len(word), start, -1) if ("##" * (start > 0) + word[start:e]) in vocab]
            if not ends:
                break
            found.append("##" * (start > 0) + word[start : ends[0]])
            start = ends[0]
        pieces += found if start == len(word) and len(word) <= 100 else ["[UNK]"]
    return pieces


CASES = [
    "A Picture of", "pictures", "Café CAFÉ cafe\u0301", "don't", "unaffable dog", "漢字picture", "[SEP] sep", "[CLS]",
    "a\0dog", "pic\u200bture", "a\tdog\na", "😀", "dog😀", "b" * 100, "b" * 101, "a" * 100, "a,,dog!", "ÀÉ", "a-b-1",
    "привет", "\x07a", "\ufffddog", "[DEC] a", "１", "ﬁ"
]  # fmt: skip


@pytest.mark.parametrize("s", CASES)
def test_pieces_as_berts(tok, s):
    vocab = {t: i for i, t in enumerate(list(SPECIAL) + WORDS)}
    assert real(tok, s, 200)[1:-1] == [vocab[p] for p in reference(vocab, s)]


def test_expected_pieces(tok):
    """The cases that the comparison must not get wrong on both sides."""
    ids = lambda *tokens: [(list(SPECIAL) + WORDS).index(t) for t in tokens]
    assert real(tok, "Café")[1:-1] == ids("cafe")
    assert real(tok, "漢字")[1:-1] == ids("漢", "字")
    assert real(tok, "unaffable")[1:-1] == ids("un", "##aff", "##able")
    assert real(tok, "[SEP]")[1:-1] == ids("[", "sep", "]")
    assert real(tok, "a\0 😀")[1:-1] == ids("a", "[UNK]")
    assert real(tok, "b" * 101, 200)[1:-1] == ids("[UNK]")
    assert real(tok, "b" * 100, 200)[1:-1] == ids("b", *["##b"] * 99)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("abcdogpictures ,.'!-[]é漢\t\0😀nfl1"), max_size=40))
def test_any_text_as_berts(tok, s):
    vocab = {t: i for i, t in enumerate(list(SPECIAL) + WORDS)}
    assert real(tok, s, 200)[1:-1] == [vocab[p] for p in reference(vocab, s)]


def test_a_prompt_may_have_more_tokens_than_letters(tmp_path):
    """As in Korean, whose syllables are three letters to BERT."""
    pieces = ["ᄉ", "##ᅡ", "##ᄌ", "##ᅵ", "##ᆫ"]
    tok = Tokenizer(write(tmp_path / "vocab.txt", [*SPECIAL, *pieces]))
    assert programs.prompt_ids(tok, "사진") == [tok.dec, *range(len(SPECIAL), len(SPECIAL) + 5)]
    assert pairs.prompt_length(tok, "사진") == 6


def test_decode(tok):
    ids, _ = tok.encode(["a picture of pictures"], 12)
    assert tok.decode(ids[0]) == "a picture of pictures"
    assert tok.decode([tok.dec, 5, 5 + WORDS.index("dog"), tok.sep, tok.pad]) == "a dog"


def test_tokenizer_json(tmp_path, vocab, tok):
    tok._tok.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer(tmp_path / "tokenizer.json")
    assert (again.vocab_size, again.dec, again.enc, again.sep) == (tok.vocab_size, tok.dec, tok.enc, tok.sep)
    np.testing.assert_array_equal(again.encode(CASES, 30)[0], tok.encode(CASES, 30)[0])


def test_dec_and_enc_that_are_there_keep_their_ids(tmp_path):
    tok = Tokenizer(write(tmp_path / "v.txt", list(SPECIAL) + ["[ENC]", "[DEC]"] + WORDS))
    assert (tok.enc, tok.dec, tok.vocab_size) == (5, 6, 7 + len(WORDS))


@pytest.mark.parametrize(
    "name, content, message",
    [
        (None, None, "no such file.*blip-jax vocab"),
        (
            "v.txt",
            "a\nb\n[UNK]\n[SEP]\n",
            r"lacks the special tokens \['\[PAD\]', '\[CLS\]', '\[MASK\]'\].*blip-jax vocab",
        ),
        ("v.txt", "\n".join(SPECIAL) + "\na\nb\na\n", r"twice, such as \['a'\]"),
        ("t.json", "{}", "not a tokenizer.json"),
        ("t.json", "not json", "not a tokenizer.json"),
    ],
)
def test_wrong_vocabulary(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer(tmp_path / (name or "absent.txt"))


def test_binary_vocabulary(tmp_path):
    (tmp_path / "v.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        Tokenizer(tmp_path / "v.txt")


def test_tokenizer_json_without_the_frame(tmp_path, tok):
    plain = json.loads(tok._tok.to_str())
    plain["post_processor"] = None
    (tmp_path / "t.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"\[CLS\] \.\.\. \[SEP\]"):
        Tokenizer(tmp_path / "t.json")


# --- cleaning


@pytest.mark.parametrize(
    "s, want",
    [
        ('A man, a plan: "Panama" (canal)...  3.5%', "a man, a plan panama canal 3 5%"),
        ("Two-tone; what's up? #1 *star* ~x~", "two-tone what's up? 1 star x"),
        ("tab\there  and\n\nthere\n", "tab\there and there"),
        ("   ", ""),
        ("!!!", ""),
        ("...", ""),
        ("one two three four", "one two three"),
        ("İstanbul ÀB", "i̇stanbul àb"),
    ],
)
def test_clean_caption(s, want):
    assert clean_caption(s, 3 if "four" in s else 30) == want


def test_clean_question():
    assert clean_question("What's #1?  (Really)...  ") == "what's 1?  really"
    assert clean_question("a b c d", 2) == "a b"


def test_plain_text():
    assert plain_text("a\0b\0") == ("ab", ["NUL characters removed"])
    assert plain_text("é😀") == ("é😀", [])
    fixed, notes = plain_text("a\ud83d b")
    assert fixed.encode() and fixed.startswith("a") and fixed.endswith(" b") and notes == ["broken characters replaced"]


# --- training a vocabulary

CAPTIONS = [
    f"a {c} {s} beside the {d} {s}" for c in ("red", "blue") for s in ("circle", "square") for d in ("tall", "small")
]


def test_train_vocab(tmp_path):
    train_vocab(CAPTIONS, 80, tmp_path / "v.txt")
    lines = (tmp_path / "v.txt").read_text().split("\n")
    assert lines[-1] == "" and len(lines) == 81 and lines[:5] == list(SPECIAL) and len(set(lines)) == 81
    tok = Tokenizer(tmp_path / "v.txt")
    assert tok.vocab_size == 82
    ids, mask = tok.encode(CAPTIONS, 40)
    assert not (ids == tok.unk).any()
    assert mask.sum(1).max() <= 2 + 9  # whole words were learnt
    assert [tok.decode(i) for i in ids] == CAPTIONS


def test_train_vocab_is_the_same_in_another_process(tmp_path):
    code = (
        "import sys; from blip_jax.data.text.wordpiece import train_vocab\n"
        "train_vocab(sys.argv[3:], int(sys.argv[2]), sys.argv[1])"
    )
    many = [f"{w} {w[::-1]} {w}s" for c in CAPTIONS for w in c.split()] + CAPTIONS
    for name in "ab":
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name), "70", *many], check=True)
    train_vocab(many, 70, tmp_path / "c")
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == (tmp_path / "c").read_text()


def test_train_vocab_errors(tmp_path):
    with pytest.raises(ValueError, match="size=20 is too small"):
        train_vocab(CAPTIONS, 20, tmp_path / "v")
    with pytest.raises(ValueError, match="no text"):
        train_vocab(["", "\0"], 100, tmp_path / "v")
    assert not (tmp_path / "v").exists()


# --- what decoded text looks like


@pytest.mark.parametrize(
    "pieces, text",
    [
        ("a man ' s dog", "a man's dog"),
        ("it isn ' t here , is it ? no .", "it isn't here, is it? no."),
        ("the dogs ' tails", "the dogs'tails"),  # as there
        ("we ' ve two - they ' re 3 ! ( x )", "we've two - they're 3! ( x )"),
        ("un ##aff ##able", "unaffable"),
        ("a n't b 'm c 's d 've e 're", "an't b'm c's d've e're"),
    ],
)
def test_decoded_text_is_tidied_as_by_transformers_4_15(tmp_path, pieces, text):
    tok = Tokenizer(write(tmp_path / "v.txt", [*SPECIAL, *dict.fromkeys(pieces.split())]))
    ids = [tok._tok.token_to_id(piece) for piece in pieces.split()]
    assert tok.decode([tok.dec, tok.cls, *ids, tok.unk, tok.sep, tok.pad]) == text


# --- capitals and accents

LOWER = "abcdefghijklmnopqrstuvwxyz"


def case_of(tmp_path, *words):
    tok = Tokenizer(write(tmp_path / "v.txt", [*SPECIAL, "[unused0]", *words]))
    return tok, [tok._tok.id_to_token(i) for i in real(tok, " ".join(w for w in words if w[:2] != "##"), 200)[1:-1]]


@pytest.mark.parametrize(
    "words, case",
    [
        (["hund", "uber", "ein", "##s"], (True, True)),
        (["hund", "über", "ein", "##é"], (True, False)),
        (["Hund", "über", "ein", "Straße"], (False, False)),
        (["कुत्ता", "एक"], (True, False)),  # vowel signs, which stripping accents would take
        (["漢", "字", "dog"], (True, True)),
    ],
)
def test_the_case_of_a_vocabulary_is_seen_in_its_entries(tmp_path, words, case):
    tok, found = case_of(tmp_path, *words)
    assert tok.case == case and found == [w for w in words if w[:2] != "##"]


def test_a_few_entries_that_no_text_gives_do_not_make_a_vocabulary_cased(tmp_path):
    words = [f"w{a}{b}" for a in LOWER for b in LOWER]
    assert case_of(tmp_path, *words, "Dog", "ÉA")[0].case == (True, True)


def test_a_cased_vocabulary_is_said_and_is_another_one(tmp_path, caplog):
    cased = Tokenizer(write(tmp_path / "cased.txt", [*SPECIAL, "Hund", "ein"]))
    assert "cased.txt' holds entries with capitals" in caplog.text
    cased._tok.save(str(tmp_path / "cased.json"))
    assert Tokenizer(tmp_path / "cased.json").crc == cased.crc
    same = json.loads(cased._tok.to_str())
    same["normalizer"] |= {"lowercase": True, "strip_accents": None}
    (tmp_path / "uncased.json").write_text(json.dumps(same))
    assert Tokenizer(tmp_path / "uncased.json").crc != cased.crc


def test_one_vocabulary_in_three_files(tmp_path, vocab, tok):
    (tmp_path / "crlf.txt").write_bytes(b"\xef\xbb\xbf" + vocab.read_bytes().replace(b"\n", b"\r\n"))
    tok._tok.save(str(tmp_path / "tokenizer.json"))
    assert tok.crc == Tokenizer(tmp_path / "crlf.txt").crc == Tokenizer(tmp_path / "tokenizer.json").crc


# --- words that a vocabulary lacks


def test_a_share_of_unknown_words_is_said_once_with_examples(vocab, capsys):
    tok = Tokenizer(vocab)
    tok.encode(["a dog"] * 20, 10)  # 40 tokens
    tok.encode(["一只猫"] * 3, 10)  # 9 more, all unknown: too few to tell
    assert capsys.readouterr().err == ""
    tok.encode(["a 一只猫"] * 4, 10)
    (told,) = capsys.readouterr().err.splitlines()
    assert "21 of the first 65 tokens are [UNK]" in told and "'一', '只', '猫'" in told and "blip-jax vocab" in told
    tok.encode(["一只猫"] * 300, 10)
    tok.say_unknown()
    assert capsys.readouterr().err == ""


def test_few_unknown_words_are_not_said_and_a_verb_says_those_of_one_text(vocab, capsys):
    tok = Tokenizer(vocab)
    tok.encode(["a dog a dog a dog a dog a dog"] * 20 + ["一"] * 20, 20)
    tok.say_unknown()
    assert capsys.readouterr().err == ""
    tok = Tokenizer(vocab)
    tok.encode(["。。。", ""], 10)
    tok.say_unknown()
    assert "3 of the first 3 tokens are [UNK]" in capsys.readouterr().err


def test_training_says_unknown_words(tmp_path, capsys):
    train_vocab(["a small dog runs over the green field"] * 5, 60, tmp_path / "v.txt")
    cfg = base("tiny").unlock()
    cfg.text.vocab, cfg.text.max_words, cfg.text.max_len = str(tmp_path / "v.txt"), 30, 12
    tok = Tokenizer(tmp_path / "v.txt")
    for i, caption in enumerate(["一只猫坐在桌子上", "两个孩子踢足球"] * 10):
        record = {"key": f"{i}", "image": b"", "captions": [caption], "image_id": "", "source": "web"}
        pairs.example(record, np.random.default_rng(i), cfg, tok)
    (told,) = capsys.readouterr().err.splitlines()
    assert "tokens are [UNK]" in told and "v.txt lacks" in told


# --- a tokenizer.json that would take time, memory or the process

REGEX = {"Regex": "(?:" * 40 + "a" + ")*" * 40}
SPLIT = {"type": "Split", "pattern": REGEX, "behavior": "Removed", "invert": False}
TEMPLATE = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}


@pytest.mark.parametrize(
    "part, value, told",
    [
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}, "type 'Replace'"),
        (
            "normalizer",
            {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "Prepend", "prepend": "a"}]},
            "type 'Prepend'",
        ),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 1000}, "1000 parts, more than 16"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Sequence"}]}, "type 'Sequence'"),
        ("normalizer", "Lowercase", "type 'Lowercase'"),
        ("pre_tokenizer", SPLIT, "type 'Split'"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [SPLIT]}, "type 'Split'"),
        ("post_processor", {"type": "RobertaProcessing"}, "type 'RobertaProcessing'"),
        (
            "post_processor",
            {"type": "TemplateProcessing", "single": [TEMPLATE[1]] * 999},
            "does not have the text once",
        ),
        ("model", {"type": "BPE"}, "a model of type 'BPE'"),
        ("max", 10**12, "max_input_chars_per_word 1000000000000, not from 1 to 200"),
        ("max", "100", "max_input_chars_per_word 100, not from 1 to 200"),
        ("max", -1, "max_input_chars_per_word -1"),
        ("prefix", "", "continuing_subword_prefix '' where BERT has '##'"),
        ("ids", 4_000_000_000, r"ids of its \d+ tokens are not 0 to"),
        ("added", {"id": 7, "content": "x" * 9, "special": "yes"}, "not a tokenizer.json"),
    ],
)
def test_a_tokenizer_json_with_parts_that_bert_lacks_is_refused(tmp_path, tok, part, value, told):
    content = json.loads(tok._tok.to_str())
    if part in ("max", "prefix"):
        content["model"]["max_input_chars_per_word" if part == "max" else "continuing_subword_prefix"] = value
    elif part == "ids":
        content["model"]["vocab"]["dog"] = value
    elif part == "added":
        content["added_tokens"].append(value)
    else:
        content[part] = value
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=told) as e:
        Tokenizer(tmp_path / "t.json")
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_a_frame_that_repeats_the_text_is_refused(tmp_path, tok):
    content = json.loads(tok._tok.to_str())
    end = {"SpecialToken": {"id": "[SEP]", "type_id": 0}}
    ids = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (("[CLS]", tok.cls), ("[SEP]", tok.sep))}
    frame = {"type": "TemplateProcessing", "pair": [], "special_tokens": ids}
    content["post_processor"] = {**frame, "single": [*TEMPLATE, end]}
    (tmp_path / "t.json").write_text(json.dumps(content))
    assert real(Tokenizer(tmp_path / "t.json"), "a dog") == real(tok, "a dog")
    content["post_processor"] = {**frame, "single": [*TEMPLATE, TEMPLATE[1], end]}
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a post_processor of 4 pieces that does not have the text once"):
        Tokenizer(tmp_path / "t.json")


def test_a_decoder_and_a_panic_do_not_reach_the_caller(tmp_path, tok, monkeypatch):
    """The decoder of the file is not used; what the library panics on is one line like every other mistake."""
    content = json.loads(tok._tok.to_str()) | {"decoder": {"type": "Replace", "pattern": REGEX, "content": "x"}}
    (tmp_path / "t.json").write_text(json.dumps(content))
    assert Tokenizer(tmp_path / "t.json").decode([5, 6]) == "a pic"

    class PanicException(BaseException):
        pass

    def panic(*_):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(wordpiece._Tokenizer, "from_str", panic, raising=True)
    with pytest.raises(ValueError, match="index out of bounds"):
        Tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize("name", ["deep.json", "large.txt"])
def test_files_that_are_too_deep_or_too_large(tmp_path, name):
    if name == "deep.json":
        (tmp_path / name).write_text("[" * 200_000)
    else:
        with (tmp_path / name).open("wb") as f:
            f.truncate(1 << 40)
    with pytest.raises(ValueError, match="not a tokenizer.json|more than the 67108864 that a vocabulary may have"):
        Tokenizer(tmp_path / name)


def test_other_parts_of_one_meaning_are_read(tmp_path, tok):
    """As people build a WordPiece from the library's parts."""
    content = json.loads(tok._tok.to_str())
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"}],
    }
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}
    (tmp_path / "t.json").write_text(json.dumps(content))
    other = Tokenizer(tmp_path / "t.json")
    assert other.case == (True, True) and other.crc == tok.crc
    assert real(other, "A Café pictures") == real(tok, "A Café pictures")


if SHARED.exists():  # BERT's own vocabulary, beside the checkout of some developers

    def test_berts_vocabulary():
        tok = Tokenizer(SHARED)
        assert (tok.pad, tok.unk, tok.cls, tok.sep, tok.dec, tok.enc, tok.vocab_size) == (
            0,
            100,
            101,
            102,
            30522,
            30523,
            30524,
        )
        assert real(tok, "a picture of ") == [101, 1037, 3861, 1997, 102]
        assert real(tok, "a woman sitting on the beach with a dog") == [
            101, 1037, 2450, 3564, 2006, 1996, 3509, 2007, 1037, 3899, 102
        ]  # fmt: skip
        vocab = {t: i for i, t in enumerate(SHARED.read_text(encoding="utf-8").split("\n"))}
        for s in CASES + ["What's the déjà-vu of 東京タワー? 한국어 عربي naïveté supercalifragilistic №5 ½ “quotes”"]:
            assert real(tok, s, 300)[1:-1] == [vocab[p] for p in reference(vocab, s)], s
