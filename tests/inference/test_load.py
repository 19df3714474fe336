"""One model in all its forms: whoever needs a model takes each of them.

A file of the originals, a Hugging Face folder and a workdir.
"""

import json

import jax
import numpy as np
import pytest
from tokenizers.implementations import BertWordPieceTokenizer
from world import official
from world.bucket import tree
from world.convert import store
from world.pictures import noise

import blip_jax
from blip_jax import checkpoint, config, trees
from blip_jax.capfilt import decisions
from blip_jax.capfilt.run import models
from blip_jax.capfilt.run import run as capfilt
from blip_jax.convert import write
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.inference.load import checksum, load
from blip_jax.parallel import sharding
from blip_jax.train import evaluation, loop, start

FORMS = ("pth", "hf", "ours")
# heads of 64, as all files of the originals have
SIZES = official.TINY | dict(D=64, W=64, F=128, M=128, depth=1, layers=1)
TRAIN = official.TINY | dict(depth=1, F=192, layers=1, K=32)  # the model of tiny_cfg


@pytest.fixture(scope="module")
def forms(tmp_path_factory, tiny_vocab):
    """{"caption" | "itm": {form: path}} of the same random weights, large enough for pictures to matter."""
    pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[convert]'")
    root, out = tmp_path_factory.mktemp("forms"), {}
    for family in ("caption", "itm"):
        arrays = {
            name: x * (5 if name.endswith("weight") and "orm" not in name else 1)
            for name, x in official.tensors(family, SIZES, img_size=16).items()
        }
        pth = root / f"{family}.pth"
        official.save(pth, arrays)
        out[family] = {"pth": pth, "hf": root / f"{family}-hf", "ours": root / f"{family}-ours"}
        for form in ("hf", "ours"):
            write.convert(pth, out[family][form], to=form, vocab=str(tiny_vocab))
    return out


def retrieval_config(tiny_cfg):
    """A config to evaluate the matching model of `forms` with."""
    tiny_cfg.objective = "retrieval"
    tiny_cfg.model.vit.update(width=64, heads=1, mlp=128)
    tiny_cfg.model.med.update(width=64, heads=1, mlp=128)
    with tiny_cfg.data.unlocked():
        tiny_cfg.data.eval.world = config.source("scenes", count=9, size=32, seed=1)
    tiny_cfg.eval.update(k=3, batch=8, rerank_texts=2)
    return tiny_cfg


def capfilt_config(captioner, judge, tiny_vocab):
    c = config.capfilt()
    c.captioner, c.filter, c.text.vocab = str(captioner), str(judge), str(tiny_vocab)
    c.device_batch, c.shard_examples, c.method.n, c.dtype = 2, 5, 2, "float32"
    c.data.threads = c.data.prefetch = 2
    with c.data.unlocked():
        c.data.sources.world = config.source("scenes", count=10, size=32, noise=0.5)
    return c


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=0)


# --- one model, three forms -------------------------------------------------------------------------------------------
def test_verbs(forms, tiny_vocab):
    imgs, texts = [np.asarray(noise(i, 30 + i, 20)) for i in range(3)], ["a small red star", "a blue ring"]
    told, scores = [], []
    for form in FORMS:
        captioner = blip_jax.from_pretrained(forms["caption"][form], vocab=str(tiny_vocab))
        told.append(captioner.caption(imgs))
        scores.append(
            blip_jax.from_pretrained(forms["itm"][form], vocab=tiny_vocab).match(imgs, texts, every_pair=True)
        )
    assert told[0] == told[1] == told[2] and len({str(own) for own in told[0]}) > 1
    for other in scores[1:]:
        np.testing.assert_array_equal(scores[0]["probability"], other["probability"])
        np.testing.assert_array_equal(scores[0]["cosine"], other["cosine"])


def test_evaluation(forms, tiny_cfg, tmp_path):
    cfg, found = retrieval_config(tiny_cfg), {}
    for form in FORMS:
        found[form] = evaluation.evaluate(cfg, tmp_path / form, str(forms["itm"][form]))
        record = json.loads((tmp_path / form / "evaluation.json").read_text())
        assert record.pop("checkpoint").startswith(str(forms["itm"][form])) and record == found[form]
    assert found["pth"] == found["hf"] == found["ours"] and found["pth"]["images"] == 9
    with pytest.raises(ValueError, match="holds another model:(?s:.*)itm_head/kernel is missing"):
        evaluation.evaluate(cfg, tmp_path / "x", str(forms["caption"]["pth"]))


def test_capfilt(forms, tiny_vocab, tmp_path):
    for form in FORMS:
        capfilt(capfilt_config(forms["caption"][form], forms["itm"][form], tiny_vocab), tmp_path / form)
    want = tree(tmp_path / "ours" / "shards")
    assert tree(tmp_path / "pth" / "shards") == want == tree(tmp_path / "hf" / "shards") and len(want) == 6
    record = json.loads((tmp_path / "pth" / "capfilt.json").read_text())
    assert record["captioner"]["path"] == str(forms["caption"]["pth"])
    # the same models from elsewhere: nothing is made anew
    again = capfilt_config(forms["caption"]["ours"], forms["itm"]["ours"], "")
    assert capfilt(again, tmp_path / "pth")["images"] == 10
    rows = [
        row for k in (0, 1) for row in decisions.rows_of(tmp_path / "pth" / "shards" / f"0000{k}" / "decisions.parquet")
    ]
    assert len({row.text for row in rows if row.source == "synthetic"}) > 5


def test_capfilt_with_parameters_split_over_devices(forms, tiny_vocab, tmp_path, monkeypatch):
    """The same captions and scores; and the number of groups changes no byte."""
    cfg, rows = capfilt_config(forms["caption"]["ours"], forms["itm"]["ours"], tiny_vocab), {}
    for name, devices, fsdp in (("whole", 8, 1), ("four pairs", 8, 2), ("one pair", 2, 2)):
        with monkeypatch.context() as m:
            m.setattr(jax, "local_devices", lambda devices=devices: jax.devices()[:devices])
            cfg.mesh.fsdp = fsdp
            capfilt(cfg, tmp_path / name)
        rows[name] = [
            row
            for k in (0, 1)
            for row in decisions.rows_of(tmp_path / name / "shards" / f"0000{k}" / "decisions.parquet")
        ]
    for row, want in zip(rows["four pairs"], rows["whole"], strict=True):
        assert row._replace(itm=None, itc=None, log_prob=None) == want._replace(itm=None, itc=None, log_prob=None)
        assert (row.itm is None, row.log_prob is None) == (want.itm is None, want.log_prob is None)
        close([row.itm or 0.0, row.itc or 0.0], [want.itm or 0.0, want.itc or 0.0])
        close(row.log_prob or 0.0, want.log_prob or 0.0, 1e-4)
    assert tree(tmp_path / "one pair" / "shards") == tree(tmp_path / "four pairs" / "shards")
    cfg.mesh.fsdp = 3
    with pytest.raises(ValueError, match=r"mesh.fsdp \* mesh.tensor is 3 \* 1: it must divide the 8 devices here"):
        capfilt(cfg, tmp_path / "x")


def test_a_start_from_a_file_is_the_start_from_the_workdir_it_is_converted_into(tiny_cfg, tmp_path):
    arrays = official.tensors("pretrain", TRAIN, img_size=16)
    file = store(tmp_path, "pretrain", arrays)
    write.convert(file, tmp_path / "ours", vocab=tiny_cfg.text.vocab, **official.TINY_HEADS)
    states = []
    for origin in (file, tmp_path / "ours"):
        tiny_cfg.train.init_from = str(origin)
        run = loop.prepare(tiny_cfg, tmp_path / "run")
        with jax.set_mesh(run.mesh):
            states.append(jax.device_get(start.create(run, start.load(run)).replace(rng=None)))
    jax.tree.map(np.testing.assert_array_equal, *states)
    np.testing.assert_array_equal(states[0].extra["queue"]["img"], arrays["image_queue"].T)


def test_loaded_on_the_host_or_on_a_mesh(forms):
    path = forms["itm"]["ours"]
    host, mesh = load(path), sharding.mesh_of((2, 2, 1), jax.devices()[:4])
    spread = load(path, mesh, "bfloat16")
    assert (
        host.origin == str(path / "checkpoints" / "0")
        and host.cfg.model.dtype == "float32"
        and spread.model.dtype == "bfloat16"
    )
    again = load(path / "checkpoints" / "0")
    assert checksum(host.params) == checksum(again.params) != checksum(load(forms["caption"]["ours"]).params)
    for (name, want), (_, x) in zip(trees.paths(host.params), trees.paths(spread.params), strict=True):
        assert isinstance(want, np.ndarray) and want.dtype == np.float32 and x.sharding.mesh == mesh, name
        np.testing.assert_array_equal(np.asarray(x), want.astype(x.dtype), err_msg=name)
    kernel = spread.params["vit"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.dtype == "bfloat16" and not kernel.is_fully_replicated


def test_initial_weights_are_no_model(tmp_path):
    path = store(tmp_path, "deit", official.tensors("deit", SIZES, img_size=16))
    with pytest.raises(ValueError, match="holds no text model: these are weights to start training from"):
        load(path)


# --- vocabularies -----------------------------------------------------------------------------------------------------
@pytest.fixture
def spellings(tiny_vocab, tmp_path):
    """Files that mean one vocabulary."""
    text = tiny_vocab.read_text()
    for name, content in (("crlf", text.replace("\n", "\r\n")), ("bom", "\ufeff" + text), ("open", text.rstrip("\n"))):
        (tmp_path / f"{name}.txt").write_bytes(content.encode())
    words = text.rstrip("\n").split("\n")
    BertWordPieceTokenizer({word: i for i, word in enumerate(words)}).save(str(tmp_path / "tokenizer.json"))
    return [tmp_path / name for name in ("crlf.txt", "bom.txt", "open.txt", "tokenizer.json")]


@pytest.fixture
def other(tiny_vocab, tmp_path):
    """A vocabulary of the same tokens in another order."""
    words = tiny_vocab.read_text().rstrip("\n").split("\n")
    (tmp_path / "other.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]) + "\n")
    return tmp_path / "other.txt"


def test_a_vocabulary_is_its_tokens_and_ids(spellings, other, tiny_vocab):
    assert (
        {Tokenizer(path).crc for path in (tiny_vocab, *spellings)}
        == {Tokenizer(tiny_vocab).crc}
        != {Tokenizer(other).crc}
    )


def test_a_model_takes_its_vocabulary_however_spelt_and_no_other(forms, spellings, other, tiny_vocab):
    for form in ("hf", "ours"):
        for path in spellings:
            assert load(forms["caption"][form], vocab=path).tokenizer.path == path
        with pytest.raises(ValueError, match="trained with another vocabulary than .*other.txt: set text.vocab"):
            load(forms["caption"][form], vocab=other)
    cfg = capfilt_config(forms["caption"]["ours"], forms["itm"]["pth"], "")
    with pytest.raises(ValueError, match="no vocabulary came with the checkpoint"):
        models(cfg)


def test_a_run_goes_on_with_its_vocabulary_however_spelt_and_with_no_other(tiny_cfg, spellings, other, tmp_path):
    workdir = tmp_path / "run"
    tiny_cfg.text.vocab = str(other)
    loop.prepare(tiny_cfg, workdir)
    for path in (spellings[-1], spellings[0]):  # there is no checkpoint yet: the vocabulary may change
        tiny_cfg.text.vocab = str(path)
        loop.prepare(tiny_cfg, workdir)
    assert [p.name for p in workdir.glob("vocab*")] == ["vocab.json"]  # the second means the same
    (workdir / "checkpoints" / "1" / "state").mkdir(parents=True)
    for path in spellings:
        tiny_cfg.text.vocab = str(path)
        loop.prepare(tiny_cfg, workdir)
    tiny_cfg.text.vocab = str(other)
    with pytest.raises(ValueError, match="was trained with another vocabulary, kept in .*vocab.json: set text.vocab="):
        loop.prepare(tiny_cfg, workdir)
    assert Tokenizer(checkpoint.vocabulary(workdir)).crc == Tokenizer(spellings[1]).crc
