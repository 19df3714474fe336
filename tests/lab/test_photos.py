"""benchmarks/photos.py and cut_bert.py: a part of a BERT, captions beside those of people, both arms at a tiny size."""

import json

import cut_bert
import numpy as np
import photos
import pytest
from safetensors.numpy import load_file
from world import official
from world.convert import store
from world.pictures import encode, noise

from blip_jax.convert import read
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.eval import captions, java, tokens

CONFIG = {"model_type": "bert", "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 118}
CONFIG |= {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 40, "type_vocab_size": 2}
SAID = ["a word7 word3", "word3 b word50", "word50 word50 c", "a word9", "d word7 a"]
WORDS = 60


@pytest.fixture
def bert(tmp_path):
    """A tiny BERT of two layers and 118 words in a Hugging Face folder."""
    path = tmp_path / "whole"
    path.mkdir()
    store(path, "model", official.bert())
    official.vocabulary(path / "vocab.txt")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_a_part_of_a_bert_is_its_first_layers_and_splits_the_captions_as_the_whole(bert, tmp_path):
    out = tmp_path / "part"
    cut_bert.cut(bert, SAID, out, 1, WORDS)
    whole, part = read.read(bert), read.read(out)
    assert (part.cfg.model.med.layers, part.cfg.model.med.vocab_size) == (1, WORDS + 2)
    entries, kept = ((path / "vocab.txt").read_text().splitlines() for path in (bert, out))
    assert len(kept) == WORDS and kept == [entry for entry in entries if entry in kept]  # in its order
    table = lambda source: source.state["params"]["med"]["embed"]["word"]["embedding"]
    np.testing.assert_array_equal(table(part)[:WORDS], table(whole)[[entries.index(entry) for entry in kept]])
    for name in ("q", "k", "v"):
        kernel = lambda source: source.state["params"]["med"]["blocks"]["self_attn"][name]["kernel"]
        np.testing.assert_array_equal(kernel(part), kernel(whole)[:1])
    split = lambda path, words: [[words[i] for i in row] for row in Tokenizer(path / "vocab.txt").encode(SAID, 12)[0]]
    assert split(out, kept) == split(bert, entries) and "word9" in split(out, kept)[3]
    assert not any("layer.1." in name for name in load_file(out / "model.safetensors"))


def test_what_cannot_be_cut_is_refused(bert, tmp_path):
    with pytest.raises(ValueError, match="--layers=3: .* has 2"):
        cut_bert.cut(bert, SAID, tmp_path / "part", 3, WORDS)
    for size in (20, 119):
        with pytest.raises(ValueError, match=rf"--words={size}: .* take 35 entries of .*, which has 118"):
            cut_bert.cut(bert, SAID, tmp_path / "part", 1, size)
    assert not (tmp_path / "part").exists()


PEOPLE = {
    1: ["a dog runs on grass", "a brown dog runs", "the dog is running on the grass"],
    2: ["two men play football", "men in red play a game", "football players on grass"],
    3: ["a girl in a pink dress", "the girl climbs stairs", "a child climbs the stairs"],
    4: ["a man rides a bike", "the man on a bike", "a cyclist rides on a road"],
}
MADE = {1: "a dog on the grass", 2: "two men on grass", 3: "a girl", 4: "a man on a bike"}


def test_people_are_scored_by_the_others_and_models_by_the_same_references():
    from pycocoevalcap.cider.cider import Cider

    found = photos.beside_people({"model": MADE}, PEOPLE, approximate=True)
    name, cut = f"{captions.MARK}CIDEr", tokens.approximate
    numbers = {"model": [], photos.PEOPLE: []}
    for left_out in range(3):
        others = {key: [text for i, text in enumerate(texts) if i != left_out] for key, texts in PEOPLE.items()}
        of_people = {key: [texts[left_out]] for key, texts in PEOPLE.items()}
        for who, texts in (("model", {key: [text] for key, text in MADE.items()}), (photos.PEOPLE, of_people)):
            numbers[who].append(Cider().compute_score(cut(others), cut(texts)))
    for who, turns in numbers.items():
        assert found[who].corpus[name] == pytest.approx(np.mean([corpus for corpus, _ in turns]), rel=1e-12)
        each = [found[who].each[key][name] for key in PEOPLE]
        np.testing.assert_allclose(each, np.mean([pictures for _, pictures in turns], axis=0), rtol=1e-12)
    assert found["model"].corpus[name] > 0.3
    with pytest.raises(ValueError, match=r"\[2, 3\] captions of people"):
        photos.turns(PEOPLE | {5: ["one", "two"]})
    with pytest.raises(ValueError, match=r"\[1\] captions"):
        photos.turns({1: ["one"]})


def test_the_sentence_for_all_pictures_is_the_best_of_the_commonest():
    """The commonest of all is of one picture; another fits many."""
    people = {i: [f"a dog runs on word{i}", f"dog number{i} runs", "a brown dog runs"] for i in range(8)}
    people |= {8: ["black cat"] * 9, 9: ["red bus stops"] * 2, 10: ["men talk"] * 2}
    assert photos.sentence(people, 11) == "a brown dog runs"


def test_errors_are_those_of_the_mean():
    each = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = photos.with_error(each)
    assert found["mean"] == pytest.approx(each.mean())
    again = [np.random.default_rng(i).choice(each, 400).mean() for i in range(400)]  # other pictures
    assert np.mean(np.abs(np.array(again) - each.mean()) < found["error"]) == pytest.approx(0.95, abs=0.03)


@pytest.fixture
def data(tmp_path):
    """Twelve photographs to train, a row for each of their two captions, and four to look at, with three each."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rows = {"train": [], "val": []}
    for i in range(16):
        name = f"images/photo_{i:03d}.jpg"
        (folder / name).write_bytes(encode(noise(i)))
        said = [SAID[(i + j) % len(SAID)] for j in range(3)]
        if i < 12:
            rows["train"] += [{"image": name, "caption": text, "image_id": f"photo_{i}"} for text in said[:2]]
        else:
            rows["val"].append({"image": name, "caption": said})
    for split, own in rows.items():
        (folder / f"{split}.json").write_text(json.dumps(own))
    return folder


def shrunk(make):
    """`photos.configured` of a model as small as the tiny BERT."""

    def configured(arm, data, steps):
        cfg = make(arm, data, steps).unlock()
        cfg.model.vit.update(width=16, depth=1, heads=2, mlp=32)
        cfg.model.med.update(width=32, heads=4, mlp=64, positions=40, vocab_size=WORDS + 2)
        cfg.model.update(img_size=32, embed_dim=8)
        cfg.text.update(max_len=8, buckets=())
        cfg.train.update(batch=8, log_every=1)
        cfg.eval.update(k=4, batch=4, rerank_texts=4, max_length=8)
        return cfg.lock()

    return configured


def test_both_arms_are_one_model_and_end_in_one_table(bert, data, tmp_path, monkeypatch, capsys):
    def no_java():
        raise ValueError("no Java")

    monkeypatch.setattr(java, "find", no_java)  # METEOR would take half a minute
    plain = lambda name: name.removeprefix(captions.MARK)
    exact = photos.beside_people

    def beside_people(made, people):
        of = lambda numbers: {"METEOR": 0.5} | {plain(name): x for name, x in numbers.items()}
        found = exact(made, people, approximate=True)
        return {
            who: own._replace(corpus=of(own.corpus), each={k: of(v) for k, v in own.each.items()})
            for who, own in found.items()
        }

    monkeypatch.setattr(photos, "beside_people", beside_people)
    monkeypatch.setattr(photos, "configured", shrunk(photos.configured))
    paths, out = (str(data), str(tmp_path / "runs"), str(bert)), str(tmp_path / "out.json")
    took = photos.run(*paths, 2, "the command", only="random")
    assert took["random"]["processor_seconds"] > 0 and not (tmp_path / "runs" / "bert").exists()
    result = photos.run(*paths, 2, "the command", out)

    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert result["arms"]["random"]["cost"] == took["random"]  # it was there
    started = {arm: read.read(tmp_path / "runs" / arm).state["params"]["med"] for arm in photos.ARMS}
    words = load_file(data / "bert" / "model.safetensors")["bert." + cut_bert.WORDS]
    far = {arm: np.abs(med["embed"]["word"]["embedding"][:WORDS] - words).max() for arm, med in started.items()}
    assert far["bert"] < 0.02 < 1 < far["random"]  # two steps from it
    for own in result["arms"].values():
        assert own["retrieval"]["images"] == 4 and own["retrieval"]["texts"] == 12
        assert own["step"] == 2 and len(own["losses"]["loss_lm"]) == 2
    assert {*result["captions"]} == {*photos.ARMS, photos.SENTENCE, photos.PEOPLE}
    difference = result["bert_minus_random"]["CIDEr"]["mean"]
    both = [result["captions"][arm]["CIDEr"] for arm in photos.ARMS]
    assert difference == pytest.approx(both[1] - both[0])
    said = capsys.readouterr().out
    assert "| people |" in said and "| image to text, cosine alone |" in said


def test_both_arms_have_the_same_settings_but_for_the_start():
    random, bert = (photos.configured(arm, "data/photos", 0) for arm in photos.ARMS)
    assert not random.train.init_from and bert.train.init_from == "data/photos/bert"
    with bert.unlocked():
        bert.train.init_from, bert.optim.lr_factors = "", ()
    assert random == bert
