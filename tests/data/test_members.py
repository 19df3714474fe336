"""Tar files as people and accidents make them: which samples are found, and what is said of the rest."""

import json
import logging
import tarfile

import numpy as np
import pytest
from world.pictures import add_to_tar, encode, noise

from blip_jax import config
from blip_jax.data import members
from blip_jax.data.batches import open_all
from blip_jax.data.formats import open_source
from blip_jax.data.source import BadRecord

JPG = [encode(noise(i)) for i in range(4)]


def write(path, *files, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            add_to_tar(tar, name, data)
    return path


def pairs(*names):
    return [(f"{n}.{ext}", data) for i, n in enumerate(names) for ext, data in (("jpg", JPG[i]), ("txt", n.encode()))]


def opened(path, **leaves):
    return open_source("s", config.source("tar", str(path), **leaves))


def content(source):
    """key behind "s:" -> captions, or the category of why it cannot be used."""
    out = {}
    for i in range(len(source)):
        try:
            key, said = source[i]["key"], source[i]["captions"]
        except BadRecord as e:
            key, said = e.key, ": ".join(e.reason.split(": ")[:2])
        assert key not in out
        out[key.removeprefix("s:")] = said
    return out


def test_names_are_split_at_the_first_dot_of_the_last_part(tmp_path):
    names = ["photo_1.v2", "photo_2", "folder.a/b.c.d", "folder.a/e"]
    source = opened(write(tmp_path / "a.tar", *pairs(*names)))
    keys = ["photo_1", "photo_2", "folder.a/b", "folder.a/e"]
    assert content(source) == {f"a.tar/{key}": [name] for key, name in zip(keys, names)}
    assert [source[i]["image"] for i in range(4)] == JPG


@pytest.mark.parametrize(
    "names, picture, captions",
    [
        (["jpg", "png", "txt"], "jpg", ["txt"]),
        (["png", "jpg", "txt"], "jpg", ["txt"]),
        (["seg.png", "webp", "txt"], "webp", ["txt"]),
        (["v2.jpg", "v2.json", "txt"], "v2.jpg", ["txt"]),
        (["v1.jpg", "v1.txt", "v2.jpg", "v2.txt"], "v1.jpg", ["v1.txt"]),
        (["v1.txt", "v2.txt", "txt", "v2.jpg"], "v2.jpg", ["v2.txt"]),
        (["JPG", "jpg", "txt"], "JPG", ["txt"]),
        (["alt.txt", "jpg", "txt"], "jpg", ["txt"]),
    ],
)
def test_one_of_each_kind_is_used_and_that_is_said(tmp_path, caplog, names, picture, captions):
    data = {name: name.encode() for name in names} | {"v2.json": json.dumps({"caption": "of the json"}).encode()}
    path = write(tmp_path / "a.tar", *((f"0.{name}", data[name]) for name in names))
    source = opened(path)
    assert len(source) == 1 and (source[0]["image"], source[0]["captions"]) == (picture.encode(), captions)
    several = sum(not name.endswith(("txt", "json")) for name in names) > 1 or "alt.txt" in names or "v1.txt" in names
    assert ("1 samples have more than one" in caplog.text and f".{picture}" in caplog.text) == several
    if "png" in names:
        assert opened(path, image_key="png")[0]["image"] == b"png"


def test_repeated_names_are_samples_of_their_own(tmp_path):
    files = [*pairs("a", "a~2"), *pairs("a"), *pairs("a")]
    assert content(opened(write(tmp_path / "a.tar", *files))) == {
        "a.tar/a": ["a"], "a.tar/a~2": ["a~2"], "a.tar/a~3": ["a"], "a.tar/a~4": ["a"]
    }  # fmt: skip


def test_the_same_shard_names_of_two_crawls(tmp_path):
    for crawl in ("x", "y"):
        write(tmp_path / crawl / "0.tar", *pairs("0"))
    source = opened(tmp_path / "*" / "0.tar")
    assert [source[i]["key"] for i in range(2)] == ["s:x/0.tar/0", "s:y/0.tar/0"]
    assert len({source[i]["image_id"] for i in range(2)}) == 2
    other = open_source("t", config.source("tar", str(tmp_path / "x" / "0.tar")))
    assert other[0]["key"] == "t:0.tar/0"


@pytest.mark.parametrize(
    "key, caption", [("caption", "alt"), ("TEXT", "told"), ("json/caption", "other"), ("a/b", "in")]
)
def test_caption_key_names_a_field_of_the_json(tmp_path, caplog, key, caption):
    about = {"TEXT": "told", "caption": "other", "a": {"b": "in"}}
    files = [("0.jpg", JPG[0]), ("0.txt", b"alt"), ("0.json", json.dumps(about).encode())]
    source = opened(write(tmp_path / "a.tar", *files), caption_key=key)
    assert source[0]["captions"] == source.captions_of(0) == [caption]
    assert ("caption_key='json/caption'" in caplog.text) == (key == "caption")


def test_a_wrong_caption_key_is_refused_with_the_fields(tmp_path):
    about = json.dumps({"TEXT": "told", "url": "u"}).encode()
    path = write(tmp_path / "a.tar", ("0.jpg", JPG[0]), ("0.json", about))
    with pytest.raises(ValueError, match=r"caption_key is 'text'.*\['TEXT', 'url'\]"):
        opened(path, caption_key="text")
    with pytest.raises(ValueError, match=r"no sample .*\['TEXT', 'url'\]: set `caption_key`"):
        open_all({"s": config.source("tar", str(path))})
    with pytest.raises(ValueError, match="there is no .json"):
        opened(write(tmp_path / "b.tar", *pairs("0")), caption_key="TEXT")
    with pytest.raises(ValueError, match="with the extension 'png'.*"):
        opened(path, image_key="png")


@pytest.mark.parametrize(
    "value, same", [(7, True), (7.0, True), ("7", True), (" 7 ", True), (None, False), ("", False), ("NaN", False),
                    (float("nan"), False), (True, False), ([7], False), ({}, False), (7.5, False)]
)  # fmt: skip
def test_image_id_of_the_json(tmp_path, value, same):
    files = [(f"{n}.json", json.dumps({"image_id": value, "caption": "c"}).encode()) for n in "ab"]
    source = opened(write(tmp_path / "a.tar", ("a.jpg", JPG[0]), ("b.jpg", JPG[1]), *files))
    assert [source[i]["image_id"] for i in (0, 1)] == (["7", "7"] if same else [source[i]["key"] for i in (0, 1)])


def test_pictures_alone_are_for_capfilt(tmp_path, caplog):
    source = config.source("tar", str(write(tmp_path / "a.tar", ("0.jpg", JPG[0]), ("1.jpg", JPG[1]))))
    with pytest.raises(ValueError, match="data source 's': no sample .* both a picture and a caption"):
        open_all({"s": source})
    found = open_all({"s": source}, texts=False)["s"]
    assert content(found) == {"a.tar/0": [], "a.tar/1": []} and "taken without texts" in caplog.text


def test_members_that_are_not_read_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    files = [*pairs("0"), ("0.cls", b"7"), ("README", b""), (".hidden.jpg", b""), ("0.mp3", b""), ("1.mp3", b"")]
    assert len(opened(write(tmp_path / "a.tar", *files))) == 1
    assert "members that are not read: .mp3 (2), .cls (1), no dot (1), hidden (1)" in caplog.text


# --- what is broken


def shard(tmp_path, name="a.tar"):
    """Three samples; the file as bytes."""
    return bytearray(write(tmp_path / name, *pairs("0", "1", "2")).read_bytes())


def read(tmp_path, data):
    (tmp_path / "b.tar").write_bytes(data)
    return {key.removeprefix("b.tar/"): said for key, said in content(opened(tmp_path / "b.tar")).items()}


GOOD = {"0": ["0"], "1": ["1"], "2": ["2"]}


def test_end_marks_in_the_middle(tmp_path, caplog):
    data = shard(tmp_path)
    second = data.index(b"1.jpg")
    assert read(tmp_path, data[:second] + bytes(1024) + data[second:]) == GOOD
    assert "1 shards go on behind an end mark" in caplog.text
    # the first header of a sample zeroed: it is lost, and said; the others are not
    data[second : second + 512] = bytes(512)
    assert read(tmp_path, data) == GOOD | {"1": "malformed member: a damaged header"}


def test_joined_tars(tmp_path, caplog):
    a = shard(tmp_path)
    b = write(tmp_path / "other.tar", *pairs("3", "0")).read_bytes()
    assert read(tmp_path, a + b) == GOOD | {"3": ["3"], "0~2": ["0"]}
    assert "go on behind an end mark" in caplog.text
    caplog.clear()
    assert read(tmp_path, a + b"x" * 700) == GOOD
    assert "1 shards end in bytes that are no tar" in caplog.text


def checksum(header: bytearray) -> bytearray:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


@pytest.mark.parametrize(
    "size, sample",
    [
        ((-1000).to_bytes(12, "big", signed=True), "malformed member: its size cannot be right"),  # negative, binary
        (b"-0000001000\0", "malformed member: its size cannot be right"),
        (b"\x80" + (2**80).to_bytes(11, "big"), "malformed member: its size cannot be right"),
        (b"77777777777\0", "malformed member: its size cannot be right"),
        (b"00000003001\0", "malformed member: its size cannot be right"),  # past the following header
        (b"no number  \0", "malformed member: its size cannot be right"),
    ],
)
def test_a_wrong_size_costs_one_record(tmp_path, size, sample):
    data = shard(tmp_path)
    at = data.index(b"1.jpg")
    data[at + 124 : at + 136] = size
    data[at : at + 512] = checksum(data[at : at + 512])
    assert read(tmp_path, data) == GOOD | {"1": sample}


def extended(kind: bytes, content: bytes) -> bytes:
    header = bytearray(512)
    header[:4] = b"long"
    header[124:136] = b"%011o\0" % len(content)
    header[156:157], header[257:265] = kind, b"ustar\0" + b"00"
    return bytes(checksum(header)) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    "before, sample",
    [
        (extended(b"x", b"14 size=-1000\n"), "malformed member: its size cannot be right"),
        (extended(b"x", b"99 size=5\n"), "malformed member: an extended header that cannot be read"),
        (extended(b"x", b"30 GNU.sparse.realsize=9999999\n"[:30] + b"\n"), None),
        (extended(b"L", b"1.jpg\0") * 5000, ["1"]),
        (extended(b"x", b"15 path=1.jpg\n\n"[:15]), None),
    ],
)
def test_extended_headers_cost_one_record_at_the_most(tmp_path, before, sample):
    data = shard(tmp_path)
    at = data.index(b"1.jpg")
    found = read(tmp_path, data[:at] + before + data[at:])
    assert {key: found[key] for key in ("0", "2")} == {"0": ["0"], "2": ["2"]} and len(found) == 3
    assert sample is None or found["1"] == sample


def test_long_and_foreign_names(tmp_path):
    names = ["d/" * 60 + "long", "täst/日本", "x" * 99]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = write(tmp_path / f"{form}.tar", *pairs(*names), format=form)
        assert content(opened(path)) == {f"{form}.tar/{name}": [name] for name in names}


def test_names_that_are_no_text_stay_apart(tmp_path):
    path = write(tmp_path / "a.tar", *pairs("0", "1"), format=tarfile.GNU_FORMAT)
    data = path.read_bytes()
    for old, new in ((b"0.", b"\xff."), (b"1.", b"\xfe.")):
        for ext in (b"jpg", b"txt"):
            at = data.index(old + ext)
            data = data[:at] + bytes(checksum(bytearray(data[at : at + 512].replace(old, new, 1)))) + data[at + 512 :]
    path.write_bytes(data)
    assert sorted(content(opened(path)).values()) == [["0"], ["1"]]


def test_any_damage_loses_little(tmp_path):
    """Random bytes over one block anywhere: never an error, and at least the samples without that block are read."""
    data, rng = shard(tmp_path), np.random.default_rng(0)
    starts = [data.index(f"{n}.jpg".encode()) for n in range(3)] + [len(data)]
    for block in range(0, starts[2] + 2048, 512):
        hurt = bytearray(data)
        hurt[block : block + 512] = rng.bytes(512)
        found = read(tmp_path, hurt)
        for n in range(3):
            if not starts[n] <= block < starts[n + 1]:
                assert found[f"{n}"] == [f"{n}"], block


def test_zeros_are_an_empty_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    with pytest.raises(ValueError, match="holds no record"):
        opened(tmp_path / "a.tar")
    write(tmp_path / "b.tar", *pairs("0"))
    assert content(opened(tmp_path / "*.tar")) == {"b.tar/0": ["0"]}


def test_an_index_points_into_the_file(tmp_path):
    path = write(tmp_path / "a.tar", *pairs("0", "1"))
    size, index = path.stat().st_size, members.build(str(path), "image")
    assert members.sound(index, size) and not members.sound(index, size // 2)
    for name, change in (("ends", lambda x: x[::-1]), ("names", lambda x: x[:-1]), ("rows", lambda x: x[:1])):
        assert not members.sound(index._replace(arrays={**index.arrays, name: change(index.arrays[name])}), size)
    assert path.read_bytes()[members.probe(index) :][:5] == b"1.jpg"
