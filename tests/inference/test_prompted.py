"""Verbs of a BLIP-2 with a language model, from a workdir and from several files, with OPT and with T5."""

import functools
import json

import numpy as np
import pytest
from PIL import Image
from world.pieces import write_pieces
from world.runs import begun
from world.verbs import photos

import blip_jax
from blip_jax import config, tasks
from blip_jax.cli import infer
from blip_jax.data.scenes.world import vocab_captions
from blip_jax.data.text import bpe
from blip_jax.data.text.bpe import train_bpe
from blip_jax.inference import language


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a workdir of a second stage with random parameters."""
    at, captions, out = tmp_path_factory.mktemp("prompted"), list(vocab_captions(300)), {}
    train_bpe(captions, 300, at / "vocab.json")
    write_pieces(captions, 140, at / "pieces.json")
    for llm, vocab in (("opt", "vocab.json"), ("flant5", "pieces.json")):
        cfg = config.blip2("eva_tiny", "tiny", f"{llm}_tiny").unlock()
        cfg.model.update(img_size=16, dtype="float32", init_std=0.2)
        cfg.text.vocab, cfg.text.max_len, cfg.train.steps = str(at / vocab), 12, 1
        with cfg.data.unlocked():
            cfg.data.train.world = config.source("scenes", count=64, size=32)
        cfg.train.batch = 16
        out[llm] = begun(cfg, at / llm)
    return out


@pytest.fixture(scope="module")
def models(folders):
    return functools.cache(lambda llm: blip_jax.from_pretrained(folders[llm], batch=4))


KINDS = pytest.mark.parametrize("llm", ["opt", "flant5"])


@KINDS
def test_a_text_depends_on_neither_the_prompts_beside_it_nor_its_place(llm, models):
    model, imgs = models(llm), photos(3)
    prompts = ["a red circle", "", "a photo of a large blue square and a green star on the left"]
    together = model.generate(imgs, prompts, beams=2, max_length=6)
    for img, prompt, rows in zip(imgs, prompts, together):
        (alone,) = model.generate(img, prompt, beams=2, max_length=6)
        assert rows[0]["text"] == alone["text"]
        assert rows[0]["log_prob"] == pytest.approx(alone["log_prob"], rel=1e-4)
    assert len({rows[0]["log_prob"] for rows in together}) == 3, "image and prompt are read"


@KINDS
def test_captions_are_texts_behind_the_trained_prompt(llm, models):
    model, (img,) = models(llm), photos(1)
    found = model.caption(img, n=2, beams=2, max_length=6)
    assert [row["caption"] for row in found] == [
        row["text"] for row in model.generate(img, "", 2, beams=2, max_length=6)
    ]
    assert found[0]["log_prob"] >= found[1]["log_prob"] - 10 and len(found) == 2
    drawn = [model.caption(img, 3, "nucleus", max_length=6, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 3


def test_an_answer_that_a_space_before_it_makes_longer_is_ranked_whole(models, tmp_path, monkeypatch):
    """Six tokens as it is given, nine behind a space."""
    vocab = {token: i for i, token in enumerate([*bpe.SPECIAL, *sorted(bpe.pre_tokenizers.ByteLevel.alphabet())])}
    vocab |= {token: len(vocab) + i for i, token in enumerate(("Ġa", "ab", "abc", "abcd"))}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ a\na b\nab c\nabc d\n", encoding="utf-8")
    model, tokenizer = models("opt"), bpe.Tokenizer(tmp_path / "vocab.json")
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    ids, mask = model._answers(["abcdvwxyz"])
    assert tokenizer.decode(ids[0][mask[0]]) == "abcdvwxyz" and ids[0][mask[0]][-1] == vocab["Ċ"]


@KINDS
def test_ranking_finds_the_answer_of_the_least_loss(llm, models):
    model, imgs = models(llm), photos(2)
    answers = ["red", "blue", "a green star"]
    found = model.answer(imgs, ["what is this?", "which colour is it?"], method="rank", answers=answers)
    assert all(row["answer"] in answers and row["score"] < 0 for row in found)
    # each answer alone has the score that it has among the others
    alone = [model.answer(imgs[0], "what is this?", method="rank", answers=[answer])["score"] for answer in answers]
    assert found[0]["score"] == pytest.approx(max(alone), rel=1e-4)
    assert found[0]["answer"] == answers[int(np.argmax(alone))]
    (told,) = model.answer(imgs[:1], ["what is this?"], beams=2, max_length=4)
    assert set(told) == {"answer", "log_prob"}


def test_wrong_arguments_and_what_a_language_model_cannot_do(models):
    model, (img,) = models("opt"), photos(1)
    for call, expected in (
        (lambda: model.generate(img, "word " * 200), "tokens"),
        (lambda: model.generate(img, rule="other"), "rule"),
        (lambda: model.generate(img, max_length=0), "max_length"),
        (lambda: model.generate(img, n=3, beams=2), "raise beams"),
        (lambda: model.generate([img] * 3, ["a", "b"]), "prompts"),
        (lambda: model.answer(img, "what?", prompt="Question:"), "{}"),
        (lambda: model.answer(img, "what?", method="rank"), "answers"),
        (lambda: model.match(img, "a star"), "cannot do match"),
        (lambda: model.features(texts="a star"), "cannot do"),
    ):
        with pytest.raises(ValueError, match=expected):
            call()


def test_the_command_answers_with_the_defaults_of_its_model(models, folders, tmp_path, capsys):
    pixels = photos(1)[0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    model = f"--model={folders['opt']}"
    assert infer.answer(["answer", str(tmp_path / "a.png"), "--question=what?", model, "--max_length=3", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["answers"]
    told = models("opt").answer(pixels, "what?", max_length=3)
    assert row["answer"] == told["answer"] and row["log_prob"] == pytest.approx(told["log_prob"], rel=1e-5)


# --- traps of other implementations (docs/blip2.md) -------------------------------------------------------------------
@pytest.fixture
def decoded(models, monkeypatch):
    """A function: kind -> the rows of ids that its tokenizer is given from now on."""

    def of(llm):
        rows, decode = [], models(llm).tokenizer.decode
        monkeypatch.setattr(models(llm).tokenizer, "decode", lambda ids: rows.append(np.asarray(ids)) or decode(ids))
        return rows

    return of


@KINDS
def test_limits_count_new_tokens_whatever_the_prompt_and_the_queries_take(llm, models, decoded):
    """Transformers subtracted the queries from max_length, and had min_length count the prompt."""
    model, rows, special = (
        models(llm),
        decoded(llm),
        language.special(models(llm).model, models(llm).tokenizer),
    )
    for prompt in ("", "a photo of a large blue square and a green star on the left"):
        rows.clear()
        model.generate(photos(2), prompt, beams=3, min_length=3, max_length=3)
        assert [len(row) for row in rows] == [3, 3], "fewer than the prompt's tokens, and than the queries"
        assert all(special.end not in row for row in rows)


def test_presets_of_questions_are_the_evaluations_of_lavis(models, monkeypatch):
    """Five beams, ten new tokens, no penalty of repetition; the prompt and the length penalty by language model."""
    for llm, prompt, penalty in (
        ("opt", "Question: what? Answer:", 0.0),
        ("flant5", "Question: what? Short answer:", -1.0),
    ):
        asked = []

        def texts(pictures, prompts, how, *_):
            asked.append((prompts, how))
            return [[("", 0.0)]]

        monkeypatch.setattr(models(llm), "_texts_behind", texts)
        models(llm).answer(photos(1)[0], "what?")
        ((prompts, how),) = asked
        assert prompts == [prompt] and (how.kind, how.beams, how.rule) == ("beam", 5, "lavis")
        assert (how.length_penalty, how.repetition_penalty) == (penalty, 1.0)
        assert (how.min_length, how.max_length) == (1, 1 + 10)  # of the start id, too


@KINDS
def test_a_text_ends_and_is_filled_by_the_tokenizers_own_ids(llm, models):
    model = models(llm)
    found = language.special(model.model, model.tokenizer)
    t = model.tokenizer
    assert found == ((t.bos, t.newline, t.pad) if llm == "opt" else (t.pad, t.eos, t.pad))
    if llm == "opt":
        assert t.decode([found.end]) == "" and t.encode(["\n"], 3)[0][0].tolist() == [t.bos, found.end, t.pad]


@KINDS
def test_a_placeholder_of_images_is_text_like_any_other(llm, models):
    """Hugging Face's processors put an id for each query before the text, and do not count them."""
    model, (img,) = models(llm), photos(1)
    plain, one, many = (model.generate(img, "<image>" * n + "a star", beams=1, max_length=3)[0] for n in (0, 1, 9))
    assert plain["log_prob"] != one["log_prob"] != many["log_prob"]
    other = model.generate(photos(2)[1], "<image>a star", beams=1, max_length=3)[0]
    assert other["log_prob"] != one["log_prob"], "the picture is seen, whatever the text holds"


@KINDS
def test_a_prompt_of_two_thousand_words(llm, models):
    with pytest.raises(
        ValueError, match=r"prompt 1 has \d+ tokens: at most \d+ are read, so that 30 new ones have room"
    ):
        models(llm).generate(photos(2), ["a star", "star " * 2000])


@KINDS
def test_what_fits_is_what_generate_takes(llm, models):
    model = models(llm)
    room = language.room(model.model, 4)
    n = next(n for n in range(1, 2000) if not model.fits("star " * n, 4)) - 1
    for prompt in ("star " * n, "star " * (n + 1)):
        assert (int(model.tokenizer.lengths([prompt], 1 << 20)[0]) <= room) == model.fits(prompt, 4)
    with pytest.raises(ValueError, match=f"at most {room} are read, so that 4 new ones"):
        model.generate(photos(1)[0], "star " * (n + 1), max_length=4)


def test_float16_is_no_dtype_of_the_computation(folders):
    """In which T5 overflows."""
    with pytest.raises(ValueError, match="dtype is 'float16': choose float32 or bfloat16"):
        blip_jax.from_pretrained(folders["flant5"], dtype="float16")
    cfg = config.blip2("eva_tiny", "tiny", "flant5_tiny").unlock()
    cfg.model.dtype = "float16"
    with pytest.raises(ValueError, match="model.dtype"):
        tasks.validate(cfg)
