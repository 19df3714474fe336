"""An InstructBLIP with T5, whose Q-Former reads the prompt: from LAVIS's files, a Hugging Face folder and a workdir,
and its verbs. What the model computes, tests/models/test_golden_blip2_llm.py holds to LAVIS."""

import json

import jax
import numpy as np
import pytest
from world import blip2 as cases
from world.verbs import photos

import blip_jax
from blip_jax.convert import hf_blip2, read, write
from blip_jax.data.text import wordpiece
from blip_jax.data.text.sentencepiece import SPACE, SPECIAL
from blip_jax.decode import limits
from blip_jax.inference import language
from blip_jax.inference.inputs import Picture
from blip_jax.inference.programs import Method

CASE = "instruct_t5"


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    """text.vocab of a T5 of letters and of a Q-Former, as small as the golden ones."""
    at = tmp_path_factory.mktemp("words")
    pieces = [[x, 0.0] for x in SPECIAL] + [[x, -3.0] for x in (SPACE, *"abcdefghijklmnopqrstuvwxyz?QSA:.")]
    model = {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False}
    (at / "pieces.json").write_text(json.dumps({"version": "1.0", "normalizer": None, "model": model}))
    words = cases.vocab(at / "words.txt", cases.meta(CASE)["config"]["vocab"])
    return f"{at / 'pieces.json'},{words}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """LAVIS's file, its tower and its language model."""
    at, (own, tower, llm) = tmp_path_factory.mktemp("lavis"), cases.parts(CASE)
    (at / "t5").mkdir()
    settings = cases.meta(CASE)["llm"] | {"model_type": "t5"}
    (at / "t5" / "config.json").write_text(json.dumps(settings))
    cases.save(at / "t5" / "model.safetensors", llm)
    names = cases.save(at / "own.safetensors", own), cases.save(at / "tower.safetensors", tower), at / "t5"
    return ",".join(map(str, names))


@pytest.fixture(scope="module")
def workdir(files, vocab, tmp_path_factory):
    out = tmp_path_factory.mktemp("ours") / "run"
    write.convert(files, out, vocab=vocab, heads=cases.heads(CASE))
    return out


@pytest.fixture(scope="module")
def model(workdir):
    return blip_jax.from_pretrained(workdir, batch=4)


def test_verbs_hand_the_prompt_to_the_q_former(model):
    t5, bert, imgs = model.tokenizer.language, model.tokenizer.questions, photos(2)
    how = dict(beams=2, repetition_penalty=1.5, length_penalty=-1.0)
    method = Method("beam", rule="lavis", **how, **limits.lengths(1, 0, 4))
    program = jax.jit(language.generating(model.model, method, language.special(model.model, t5)))
    prompts = ["a word", "Question: is it a ring? Short answer:"]
    found = model.generate(imgs, prompts, max_length=4, **how)
    for img, rows, prompt in zip(imgs, found, prompts):  # of one picture, without any padding
        ids, mask = t5.encode([prompt], t5.lengths([prompt], 200)[0])
        own, own_mask = bert.encode(
            [prompt], min(bert.lengths([prompt], 200)[0], model.cfg.text.max_len), keep_end=True
        )
        assert mask.all() and own_mask.all()
        pixels = model._pixels([Picture("a", img)])
        ran = program(model.params, pixels, np.zeros((1, 2), np.uint32), ids, mask, own, own_mask)
        assert rows[0]["text"] == t5.decode(np.asarray(ran["ids"])[0, 0, 1:]).strip()
        assert rows[0]["log_prob"] == pytest.approx(float(ran["log_prob"][0, 0]), rel=1e-4)
        own[0, 1] += 1  # another question
        other = program(model.params, pixels, np.zeros((1, 2), np.uint32), ids, mask, own, own_mask)
        assert float(other["log_prob"][0, 0]) != pytest.approx(rows[0]["log_prob"], rel=1e-5)
    told = model.answer(imgs[1], "is it a ring?", max_length=4, **how)
    assert (
        told["log_prob"] == pytest.approx(found[1][0]["log_prob"], rel=1e-4) and told["answer"] == found[1][0]["text"]
    )
    (caption,) = model.caption(imgs[0], max_length=4, **how)
    (empty,) = model.generate(imgs[0], "", max_length=4, **how)
    assert caption["caption"] == empty["text"] and caption["log_prob"] == pytest.approx(empty["log_prob"], rel=1e-5)


def test_a_long_prompt_is_read_whole_by_t5_and_its_end_by_the_q_former(model, vocab):
    words = wordpiece.Tokenizer(vocab.split(",")[1])
    n = model.cfg.text.max_len
    assert n == min(128, cases.meta(CASE)["config"]["pos"])
    letters = " ".join("abcdefghij"[i % 10] for i in range(n + 20))
    (ids,), (mask,) = words.encode([letters], n, keep_end=True)
    (whole,), (real,) = words.encode([letters], 500)
    assert mask.all() and ids[0] == words.cls and ids[1:].tolist() == whole[real][-n + 1 :].tolist()
    (first,), _ = words.encode([letters], n)
    assert first[-1] == words.sep and first[:-1].tolist() == whole[: n - 1].tolist()

    ends = [f"{start} {letters}" for start in ("b b b", "c d e")]
    (img,) = photos(1)
    one, two = (row[0]["log_prob"] for row in model.generate(img, ends, beams=1, max_length=2))
    assert one != two, "T5 reads the beginning"
    with pytest.raises(ValueError, match=r"prompt 0 has \d+ tokens: at most 1024 are read"):
        model.generate(img, "word " * 2000)


def test_files_folders_and_workdirs_are_one_model(files, vocab, workdir, model, tmp_path):
    assert model.cfg.objective == "blip2_vqa" and model.model.questions
    assert sorted(path.name for path in workdir.iterdir() if path.is_file() and path.suffix != ".lock") == [
        "questions.txt",
        "vocab.json",
    ]
    source = read.read(files, vocab=vocab, heads=cases.heads(CASE))
    assert source.family == CASE and str(source.questions) == vocab.split(",")[1]
    write.convert(workdir, tmp_path / "hf", to="hf")
    assert (tmp_path / "hf" / hf_blip2.QUESTIONS / "vocab.txt").is_file()
    folder, (img,) = blip_jax.from_pretrained(tmp_path / "hf", batch=4), photos(1)
    how = dict(beams=2, max_length=4, repetition_penalty=1.5, length_penalty=-1.0)
    (mine,), (theirs,) = (x.generate(img, "a ring", **how) for x in (model, folder))
    assert theirs["text"] == mine["text"] and folder.cfg.model.vision_eps == 1e-6 < model.cfg.model.vision_eps
    assert theirs["log_prob"] == pytest.approx(mine["log_prob"], rel=1e-3)
    write.convert(tmp_path / "hf", tmp_path / "again")
    assert (tmp_path / "again" / "questions.txt").read_bytes() == (workdir / "questions.txt").read_bytes()


def test_vocabularies_that_are_missing_or_wrong(files, vocab, tmp_path):
    t5, bert = vocab.split(",")
    heads = cases.heads(CASE)
    size = cases.meta(CASE)["config"]["vocab"]
    short = cases.vocab(tmp_path / "short.txt", size - 1)
    with pytest.raises(ValueError, match=f"has {size - 1} entries with .DEC., but the model has {size}.*the second"):
        read.read(files, vocab=f"{t5},{short}", heads=heads)
    with pytest.raises(ValueError, match="is BERT's WordPiece, but"):
        read.read(files, vocab=f"{bert},{t5}", heads=heads)
    stage2 = cases.save(tmp_path / "stage2.safetensors", cases.parts("stage2_t5_full")[0])
    with pytest.raises(ValueError, match="has one vocabulary, but .* names two"):
        read.read(stage2, vocab=vocab, heads=cases.heads("stage2_t5_full"))
