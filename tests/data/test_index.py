"""Indexes that are kept: used when they are of this very file, made anew otherwise, whatever is in them."""

import json
import os
import tarfile

import numpy as np
import pytest
from world.pictures import add_to_tar, encode, noise

from blip_jax import config
from blip_jax.data import coco, index, members, rows
from blip_jax.data.formats import csv, open_source

JPG = encode(noise(0))


@pytest.fixture
def shard(tmp_path):
    return write(tmp_path / "data" / "0.tar", ["0", "1", "2"])


def write(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            add_to_tar(tar, f"{name}.jpg", JPG)
            add_to_tar(tar, f"{name}.txt", name.encode())
    return path


@pytest.fixture
def made(monkeypatch):
    """Names of the files whose index was made here."""
    found = []
    for module in (members, rows, csv, coco):
        build = module.build
        monkeypatch.setattr(
            module, "build", lambda path, build=build, **k: (found.append(os.path.basename(path)), build(path, **k))[1]
        )
    return found


def captions(path, kind="tar"):
    source = open_source("s", config.source(kind, str(path)))
    return [source[i]["captions"] for i in range(len(source))]


def kept(folder):
    return list((folder / index.FOLDER).iterdir())


def test_an_index_is_made_once(shard, made):
    assert captions(shard) == captions(shard) == captions(shard.parent / "*.tar") == [["0"], ["1"], ["2"]]
    assert made == ["0.tar"] and len(kept(shard.parent)) == 1
    os.rename(shard.parent, shard.parent.with_name("moved"))  # it goes with the data
    assert captions(shard.parent.with_name("moved") / "0.tar") == [["0"], ["1"], ["2"]] and made == ["0.tar"]
    open_source("s", config.source("tar", str(shard.parent.with_name("moved") / "0.tar"), image_key="jpg"))
    assert made == ["0.tar"] * 2  # other settings, another index


def test_lists_too(tmp_path, made):
    (tmp_path / "0.jpg").write_bytes(JPG)
    path = tmp_path / "l.json"
    path.write_text(json.dumps([{"image": "0.jpg", "caption": str(i)} for i in range(3)]))
    assert captions(path, "json") == captions(path, "json") == [["0"], ["1"], ["2"]]
    assert made == ["l.json"]


def test_tables_and_cocos_files_too(tmp_path, made):
    (tmp_path / "0.jpg").write_bytes(JPG)
    (tmp_path / "a.csv").write_text("filepath,title\n" + "".join(f"0.jpg,{i}\n" for i in range(3)))
    (tmp_path / "a.tsv").write_text("filepath\ttitle\n0.jpg\tx\n")
    official = {"images": [{"id": 7, "file_name": "0.jpg"}], "annotations": [{"image_id": 7, "caption": "y"}]}
    (tmp_path / "c.json").write_text(json.dumps(official))
    for _ in range(2):
        assert captions(tmp_path / "a.csv", "csv") == [["0"], ["1"], ["2"]]
        assert captions(tmp_path / "a.tsv", "tsv") == [["x"]] and captions(tmp_path / "c.json", "json") == [["y"]]
        assert made == ["a.csv", "a.tsv", "c.json"]
    with open(tmp_path / "a.csv", "a") as file:
        file.write("0.jpg,3\n")
    assert len(captions(tmp_path / "a.csv", "csv")) == 4 and made[3:] == ["a.csv"]


def test_another_file_has_another_index(shard, made):
    captions(shard)
    before = shard.stat()
    write(shard, ["5", "6", "7"])
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert captions(shard) == [["5"], ["6"], ["7"]] and len(made) == 2
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 2))
    captions(shard)
    assert len(made) == 3
    # of the same size and time, but with another record at the place of the last one
    write(shard, ["5", "6", "8"])
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 2))
    assert captions(shard) == [["5"], ["6"], ["8"]] and len(made) == 4


def test_where_it_is_kept(shard, made, tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP_JAX_CACHE", str(tmp_path / "own"))
    assert captions(shard) == captions(shard) and made == ["0.tar"]
    assert not (shard.parent / index.FOLDER).exists() and len(list((tmp_path / "own" / "index").iterdir())) == 1
    monkeypatch.delenv("BLIP_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (shard.parent / index.FOLDER).touch()  # as where the folder cannot be written
    assert captions(shard) == captions(shard) and made == ["0.tar"] * 2
    assert len(list((tmp_path / "cache" / "blip_jax" / "index").iterdir())) == 1
    (tmp_path / "cache" / "blip_jax" / "index").rename(tmp_path / "gone")
    (tmp_path / "cache" / "blip_jax" / "index").touch()  # nowhere at all
    assert captions(shard) == [["0"], ["1"], ["2"]] and made == ["0.tar"] * 3


def test_what_is_not_sound_is_made_anew(shard, made, caplog):
    captions(shard)
    (place,) = kept(shard.parent)
    good, rng = place.read_bytes(), np.random.default_rng(0)
    hostile = [b"", b"x", good[:-1], good + b"x", good[: len(index.MAGIC)], bytes(len(good)), b"x" * (9 << 20)]
    for bit in rng.integers(0, 8 * len(good), 60).tolist():
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        hostile.append(bytes(flipped))
    for n, content in enumerate(hostile, 2):
        place.write_bytes(content)
        assert captions(shard) == [["0"], ["1"], ["2"]] and len(made) == n
        assert place.read_bytes() == good


def signed(header: dict, body: bytes) -> bytes:
    head = json.dumps(header).encode()
    content = len(head).to_bytes(8, "little") + head + body
    return index.MAGIC + index.hashlib.blake2b(content, digest_size=index.DIGEST).digest() + content


def test_a_right_checksum_is_not_enough(shard, made):
    captions(shard)
    (place,) = kept(shard.parent)
    content = place.read_bytes()[len(index.MAGIC) + index.DIGEST :]
    end = 8 + int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8:end]), content[end:]
    far = bytearray(body)
    far[:4] = b"\xff" * 4  # the place of the first picture
    unlike = [
        ({**header, "lengths": {**header["lengths"], "rows": 10**12}}, body),
        ({**header, "lengths": {**header["lengths"], "rows": -1}}, body),
        ({**header, "lengths": {**header["lengths"], "rows": "3"}}, body),
        ({**header, "lengths": []}, body),
        ({**header, "notes": {}}, body),
        ({**header, "notes": {**header["notes"], "behind": ["x"]}}, body),
        ({**header, "probe": [0, 0]}, body),
        ({**header, "probe": None}, body),
        (header, bytes(far)),
        ([], body),
    ]
    for n, (head, rest) in enumerate(unlike, 2):
        place.write_bytes(signed(head, rest))
        assert captions(shard) == [["0"], ["1"], ["2"]] and len(made) == n, head
    place.unlink()
    os.mkfifo(place)
    assert captions(shard) == [["0"], ["1"], ["2"]]
    deep = b'{"size":' * 100_000
    place.unlink(missing_ok=True)
    place.write_bytes(index.MAGIC + bytes(16) + len(deep).to_bytes(8, "little") + deep)
    assert captions(shard) == [["0"], ["1"], ["2"]]


def test_a_file_that_changes_meanwhile_is_not_kept(shard, monkeypatch, caplog):
    build = members.build

    def slow(path, **settings):
        found = build(path, **settings)
        os.utime(path, ns=(0, 0))
        return found

    monkeypatch.setattr(members, "build", slow)
    captions(shard)
    assert "changed while its index was made" in caplog.text and not (shard.parent / index.FOLDER).exists()


def test_many_files_are_shared_out_to_processes(tmp_path, made, monkeypatch):
    names = [f"{i:02}" for i in range(5)]
    for name in names:
        write(tmp_path / f"{name}.tar", [name])
    (tmp_path / "05.tar").write_bytes(b"no tar at all")
    monkeypatch.setattr(index, "SHARE", 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numpy.py").write_text("raise SystemExit('what lies in the current folder must not run')")
    with pytest.raises(ValueError, match="data source 's': '05.tar' is not a tar file"):
        captions("*.tar")
    assert made == ["05.tar"]
    (tmp_path / "05.tar").unlink()
    assert captions("*.tar") == [[name] for name in names] and made == ["05.tar"]
