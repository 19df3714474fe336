"""An InstructBLIP with T5, whose Q-Former reads the prompt: from LAVIS's files, a Hugging Face folder and a workdir,
and its verbs. What the model computes, tests/models/test_golden_blip2_llm.py holds to LAVIS."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from world import blip2 as cases
from world.verbs import photos

import blip_jax
from blip_jax.convert import hf_blip2, write
from blip_jax.data.text import wordpiece
from blip_jax.data.text.sentencepiece import SPACE, SPECIAL
from blip_jax.decode import limits
from blip_jax.inference import language
from blip_jax.inference.programs import Method
from blip_jax.models.vision.vit import normalize_pixels

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


def read(files, vocab, heads):
    """`read.read` of files that do not say the heads of these sizes."""
    from blip_jax.convert import read

    return read.read(files, vocab=vocab, heads=heads)


@pytest.fixture(scope="module")
def workdir(files, vocab, tmp_path_factory):
    out = tmp_path_factory.mktemp("ours") / "run"
    write.convert(files, out, vocab=vocab, heads=cases.heads(CASE))
    return out


@pytest.fixture(scope="module")
def model(workdir):
    return blip_jax.from_pretrained(workdir, batch=4)


def directly(model, img, prompt, question, new, **how):
    """What `generate` does, of one picture without any padding."""
    t5, bert = model.tokenizer.language, model.tokenizer.questions
    (ids,), (mask,) = t5.encode([prompt], 200)
    (own,), (own_mask,) = bert.encode([question], model.cfg.text.max_len, keep_end=True)
    rows = [x[None, : m.sum()] for x, m in ((ids, mask), (mask, mask), (own, own_mask), (own_mask, own_mask))]
    apply = lambda *args, method: model.model.apply({"params": model.params}, *args, method=method)
    soft = apply(apply(img, method="encode_image"), *rows[2:], method="soft_prompt")
    method = Method("beam", rule="lavis", **how, **limits.lengths(1, 0, new))
    special = language.special(model.model, t5)
    found = language.behind(apply, soft, *rows[:2], jnp.zeros((1, 2), jnp.uint32), method, special)
    return t5.decode(np.asarray(found["ids"])[0, 0, 1:]), float(found["log_prob"][0, 0])


def test_verbs_hand_the_prompt_to_the_q_former(model):
    imgs, size = photos(2), model.cfg.model.img_size
    seen = model._pixels([blip_jax.inference.inputs.Picture("a", img) for img in imgs])
    assert seen.shape[1:] == (size, size, 3)
    how = dict(beams=2, repetition_penalty=1.5, length_penalty=-1.0)
    prompts = ["a word", "Question: is it a ring? Short answer:"]
    found = model.generate(imgs, prompts, max_length=4, **how)
    for i, (rows, prompt) in enumerate(zip(found, prompts)):
        text, log_prob = directly(model, normalize_pixels(jnp.asarray(seen[i : i + 1])), prompt, prompt, 4, **how)
        assert rows[0]["text"] == text.strip() and rows[0]["log_prob"] == pytest.approx(log_prob, rel=1e-4)
        other = directly(model, normalize_pixels(jnp.asarray(seen[i : i + 1])), prompt, "b", 4, **how)
        assert other[1] != pytest.approx(log_prob, rel=1e-5), "it reads the question"
    told = model.answer(imgs[1], "is it a ring?", max_length=4, **how)
    assert (
        told["log_prob"] == pytest.approx(found[1][0]["log_prob"], rel=1e-4) and told["answer"] == found[1][0]["text"]
    )
    (caption,) = model.caption(imgs[0], beams=2, max_length=4)
    (empty,) = model.generate(imgs[0], "", beams=2, max_length=4)
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
    one, two = (model.generate(img, end, beams=1, max_length=2)[0]["log_prob"] for end in ends)
    assert one != two, "T5 reads the beginning"
    with pytest.raises(ValueError, match=r"prompt 0 has \d+ tokens: at most 1024 are read"):
        model.generate(img, "word " * 2000)


def test_files_folders_and_workdirs_are_one_model(files, vocab, workdir, model, tmp_path):
    assert model.cfg.objective == "blip2_vqa" and model.model.questions
    assert sorted(path.name for path in workdir.iterdir() if path.is_file() and path.suffix != ".lock") == [
        "questions.txt",
        "vocab.json",
    ]
    source = read(files, vocab, cases.heads(CASE))
    assert source.family == CASE and str(source.questions) == vocab.split(",")[1]
    write.convert(workdir, tmp_path / "hf", to="hf")
    assert (tmp_path / "hf" / hf_blip2.QUESTIONS / "vocab.txt").is_file()
    folder, (img,) = blip_jax.from_pretrained(tmp_path / "hf", batch=4), photos(1)
    (mine,), (theirs,) = (x.generate(img, "a ring", beams=2, max_length=3) for x in (model, folder))
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
        read(files, f"{t5},{short}", heads)
    with pytest.raises(ValueError, match="is BERT's WordPiece, but"):
        read(files, f"{bert},{t5}", heads)
    stage2 = cases.save(tmp_path / "stage2.safetensors", cases.parts("stage2_t5_full")[0])
    with pytest.raises(ValueError, match="has one vocabulary, but .* names two"):
        read(stage2, vocab, cases.heads("stage2_t5_full"))
