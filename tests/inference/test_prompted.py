"""Verbs of a BLIP-2 with a language model, from a workdir and from several files, with OPT and with T5."""

import functools

import numpy as np
import pytest
from world.pieces import write_pieces
from world.runs import begun
from world.verbs import photos

import blip_jax
from blip_jax import config
from blip_jax.data.scenes.world import vocab_captions
from blip_jax.data.text.bpe import train_bpe


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
