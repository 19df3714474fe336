"""Packing: any source as ArrayRecord shards, the same records in the same order, in parallel, resumed."""

import json
import tarfile

import numpy as np
import pytest
from world.pictures import add_to_tar, records, write_json

from blip_jax import config
from blip_jax.cli import main
from blip_jax.data import pack as packing
from blip_jax.data import pairs
from blip_jax.data.batches import TrainData
from blip_jax.data.formats import open_source
from blip_jax.data.pack import pack
from blip_jax.data.source import BadRecord
from blip_jax.data.text.wordpiece import SPECIAL, Tokenizer


def content(source):
    return [(source[i], source.captions_of(i)) for i in range(len(source))]


def usable(source):
    out = []
    for i in range(len(source)):
        try:
            out.append((source[i], source.captions_of(i)))
        except BadRecord:
            continue
    return out


def packed(out, name="web"):
    return open_source(name, config.source("array_record", str(out / "*.array_record")))


def tree(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.fixture
def sources(tmp_path):
    """23 records in each layout; of the list and the table the pictures of two are missing."""
    rows = records(23)
    rows[3]["captions"] = ["“quoted”\ud800 \n數據 🙂"]
    rows[4]["captions"] = []
    path = write_json(tmp_path, rows)
    for gone in ("0007", "0022"):
        (tmp_path / "img" / f"{gone}.jpg").unlink()
    with tarfile.open(tmp_path / "s[1].tar", "w") as tar:
        for r in records(23):
            add_to_tar(tar, f"{r['key']}.jpg", r["image"])
            add_to_tar(tar, f"{r['key']}.txt", r["captions"][0].encode())
    lines = "".join(f"img/{i:04d}.jpg\tnumber {i}\n" for i in range(23))
    (tmp_path / "t.tsv").write_text("filepath\ttitle\n" + lines)
    return {
        "list": config.source("json", str(path)),
        "shard": config.source("tar", str(tmp_path / "s[1].tar")),
        "table": config.source("tsv", str(tmp_path / "t.tsv")),
        "world": config.source("scenes", count=23, size=32, captions=2, noise=0.5),
    }


@pytest.mark.parametrize("name", ["list", "shard", "table", "world"])
def test_the_records_of_any_source_in_their_order(sources, tmp_path, name):
    out, source = tmp_path / "out", open_source(name, sources[name])
    done = pack(name, sources[name], out, shard_examples=5, threads=3, max_bad_share=1.0)
    wanted = usable(source)
    assert content(packed(out, name)) == wanted and len(wanted) == (21 if name in ("list", "table") else 23)
    missing = {"missing file": 2} if len(wanted) == 21 else {}
    texts = sum(len(captions) for _, captions in wanted)
    assert done == {
        "stopped": False,
        "finished": 5,
        "shards": 5,
        "records": len(wanted),
        "texts": texts,
        "skipped": missing,
    }
    skipped = out / "skipped.jsonl"
    rows = [json.loads(line) for line in skipped.read_text().splitlines()] if skipped.exists() else []
    assert sorted(r["reason"].split(":")[0] for r in rows) == ["missing file"] * len(rows) and len(rows) == 23 - len(
        wanted
    )
    assert len(list(out.glob("*.array_record"))) == 5 and not (out / "unfinished").exists()


def test_training_sees_the_same_examples(sources, tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join([*SPECIAL, "picture", "number", "noise", "of", "seed", *map(str, range(23))])
    )
    tok, seen = Tokenizer(tmp_path / "vocab.txt"), []
    pack("data", sources["shard"], tmp_path / "out", shard_examples=6)
    for k, source in enumerate(
        (sources["shard"], config.source("array_record", str(tmp_path / "out" / "*.array_record")))
    ):
        cfg = config.base("tiny")
        with cfg.unlocked():
            cfg.data.train.data = source
            cfg.model.img_size, cfg.text.max_len, cfg.train.batch, cfg.data.threads, cfg.data.prefetch = 16, 12, 8, 2, 2
            cfg.text.buckets, cfg.text.bucket_window = (5, 12), 2
        data = TrainData(cfg, tok, pairs, process_index=0, process_count=1, skipped_path=tmp_path / f"{k}.jsonl")
        with data.batches() as batches:
            seen.append([next(batches) for _ in range(6)])
    for a, b in zip(*seen):
        assert a.keys() == b.keys() and a["key"] == b["key"]
        for name in a.keys() - {"key"}:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_what_is_finished_stays(sources, tmp_path):
    pack("list", sources["list"], tmp_path / "whole", shard_examples=5, max_bad_share=1.0)
    whole, out, asked = tree(tmp_path / "whole"), tmp_path / "out", []

    def stop():
        asked.append(0)
        return len(asked) > 3

    done = pack("list", sources["list"], out, shard_examples=5, threads=1, max_bad_share=1.0, stop=stop)
    assert done["stopped"] and 0 < done["finished"] < 5
    assert not [p for p in (out / "unfinished").iterdir()]
    (out / "unfinished" / "00004.array_record.12345678.part").write_bytes(b"of a run that was killed")
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.array_record")}
    for process in (1, 0):
        done = pack("list", sources["list"], out, shard_examples=5, max_bad_share=1.0, process=process, processes=2)
    assert done["finished"] == 5 and done["records"] == 21 and done["skipped"] == {"missing file": 2}
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert {k: v for k, v in tree(out).items() if "skipped" not in k} == {
        k: v for k, v in whole.items() if "skipped" not in k
    }


def test_another_source_or_a_full_disk_is_one_line(sources, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack("list", sources["list"], out, shard_examples=5, max_bad_share=1.0)
    for name, leaf, shard_examples in (("list", "table", 5), ("list", "list", 6), ("other", "list", 5)):
        with pytest.raises(ValueError, match="was begun with other settings: .* -> .*another folder") as e:
            pack(name, sources[leaf], out, shard_examples=shard_examples)
        assert "\n" not in str(e.value)
    (out / "pack.json").unlink()
    with pytest.raises(ValueError, match="holds shards and no pack.json"):
        pack("list", sources["list"], out)
    with pytest.raises(ValueError, match="shard_examples=0"):
        pack("list", sources["list"], tmp_path / "o", shard_examples=0)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="packing into .* failed: .*finished shards stay"):
        pack("list", sources["list"], tmp_path / "file" / "x")

    class Full:
        def __init__(self, *_):
            raise RuntimeError("No space left on device")

    monkeypatch.setattr(packing, "Writing", Full)
    with pytest.raises(OSError, match="No space left on device. Nothing half-written counts"):
        pack("list", sources["list"], tmp_path / "full")


def test_too_many_bad_records_stop(tmp_path):
    path = write_json(tmp_path, records(150))
    for i in range(0, 150, 2):
        (tmp_path / "img" / f"{i:04d}.jpg").unlink()
    with pytest.raises(ValueError, match="cannot be used, more than .*missing file"):
        pack("list", config.source("json", str(path)), tmp_path / "out", shard_examples=110)


def test_from_the_shell(sources, tmp_path, capsys):
    out = tmp_path / "two words" / "cc"
    command = ["pack", str(tmp_path / "s[1].tar"), f"--out={out}", "--shard_examples=10"]
    assert main.main(command) == 0
    assert (
        f"{out}: 23 records with 23 texts in 3 shards; read them with source('array_record', "
        in capsys.readouterr().out
    )
    source = packed(out)
    assert len(source) == 23 and json.loads((out / "pack.json").read_text())["name"] == "cc"
    assert main.main(command) == 0  # nothing left to do
    for argv, message in (
        ([*command[1:2], "b.tar", "--out=x"], "in quotes"),
        (["--out=x"], "needs a file or a pattern"),
        ([str(tmp_path / "absent"), "--out=x"], "is not a file"),
        ([str(tmp_path / "img"), "--out=x"], "is a folder: give the files"),
        ([str(tmp_path / "t.tsv"), f"--out={tmp_path / 'o'}", "--kind=tar"], "is a CSV or TSV table, not tar"),
        ([str(tmp_path / "t.tsv")], "needs --out"),
    ):
        assert main.main(["pack", *argv]) == 2
        err = capsys.readouterr().err
        assert message in err and err.strip().splitlines()[-1].startswith("error: "), err
    made = ["pack", "--kind=scenes", "--count=5", "--size=32", "--captions=2", f"--out={tmp_path / 'world'}"]
    assert main.main(made) == 0 and len(packed(tmp_path / "world")[0]["captions"]) == 2
