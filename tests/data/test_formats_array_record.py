"""ArrayRecord: what a file claims is bounded before it is unpacked; captions beside it; what is damaged is named."""

import json
import resource
import subprocess
import sys

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from world.pictures import records

from blip_jax import config
from blip_jax.data import source as R
from blip_jax.data.formats import array_record, open_source
from blip_jax.data.formats.array_record import Writing, unpack, write_array_record


def opened(path, name="web"):
    return open_source(name, config.source("array_record", str(path)))


def write(path, rows, options="group_size:1"):
    writer = ArrayRecordWriter(str(path), options)
    for row in rows:
        writer.write(row if isinstance(row, bytes) else msgpack.packb(row))
    writer.close()
    return path


def bad(source, i):
    with pytest.raises(R.BadRecord) as e:
        source[i]
    return e.value


@pytest.mark.parametrize(
    "options",
    ["group_size:1", "group_size:3", "group_size:1,uncompressed", "group_size:2,transpose:true"]
    + ["group_size:1,brotli:6", "group_size:7,snappy", "group_size:1,pad_to_block_boundary:true"],
)
def test_files_however_they_are_written(tmp_path, options):
    rng = np.random.default_rng(0)
    rows = [{"key": f"k{i}", "image": rng.bytes(3000 * (i % 7 + 1)), "captions": [f"c{i}"]} for i in range(40)]
    source = opened(write(tmp_path / "a.array_record", rows, options))
    assert [source[i]["image"] for i in range(40)] == [r["image"] for r in rows]  # chunks across blocks of 64 KiB


def test_names_are_no_pieces_of_files(tmp_path):
    for name in ("a[0:1]", "a", "100%#?"):
        write_array_record(tmp_path / name, records(3))
    assert len(opened(tmp_path / "a[0:1]")) == len(opened(tmp_path / "100%#?")) == 3


BOMB = """
import resource, sys
from blip_jax import config
from blip_jax.data.formats import open_source
from blip_jax.data.source import BadRecord
source, seen = open_source("web", config.source("array_record", sys.argv[1])), []
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for i in range(len(source)):
    try:
        seen.append(len(source[i]["image"]))
    except BadRecord as e:
        seen.append(f"{e.key}: {e.reason}")
print(seen, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_record_that_unpacks_to_too_much_is_refused_unread(tmp_path):
    row = {"key": "k", "image": bytes(R.MAX_BYTES + 1)}
    write(tmp_path / "b", [records(1)[0], row, records(1)[0]])
    assert (tmp_path / "b").stat().st_size < 1 << 18
    done = subprocess.run([sys.executable, "-c", BOMB, tmp_path / "b"], capture_output=True, text=True)
    seen, grown = done.stdout.strip().rsplit(" ", 1)
    assert "web:b#1: record too large: 268435" in seen and seen.count(str(len(records(1)[0]["image"]))) == 2
    assert int(grown) < 64  # MiB


def test_a_record_of_too_many_objects_is_refused_unmade():
    many = bytes([0x80]) * array_record.FIELD_BYTES  # each an empty dict
    row = msgpack.packb({"key": "k", "image": b""})[1:]
    hostile = [
        b"\x83" + row + b"\xa1x\xdd" + (len(many)).to_bytes(4, "big") + many,
        b"\xdf\x00\xff\xff\xff" + row,
        b"\x83" + row + b"\xa1x" + b"\x91" * 100_000 + b"\xc0",
        b"\x82" + row + b"\xc0",
        b"\x83" + row + b"\x01\x02",
        b"\xdd\xff\xff\xff\xff",
        b"",
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in hostile:
        with pytest.raises(ValueError):
            unpack(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert unpack(b"\x83" + row + b"\xa1x\xc6" + (2 << 20).to_bytes(4, "big") + bytes(2 << 20))["x"] == bytes(2 << 20)


def test_damaged_files_are_named(tmp_path):
    whole = write(tmp_path / "whole", records(30)).read_bytes()
    rng = np.random.default_rng(1)
    for trial in range(60):
        data = bytearray(whole)
        if trial % 3 == 0:
            data = data[: rng.integers(len(data))]
        else:
            # the table of contents, which lies in the last two blocks, and anywhere
            at = rng.integers(0 if trial % 3 == 1 else len(whole) - 70_000, len(data))
            data[at] ^= 1 << rng.integers(8)
        (tmp_path / "a").write_bytes(data)
        try:
            source = opened(tmp_path / "a")
        except ValueError as e:
            assert "\n" not in str(e) and "/a'" in str(e)
            continue
        for i in range(len(source)):
            try:
                assert source[i]["key"] == f"web:{i:04d}"
            except R.BadRecord as e:
                assert e.key == f"web:a#{i}" and e.reason.startswith("malformed record")


def test_a_record_without_image_id_is_its_own_picture(tmp_path):
    ids = [None, "", "nan", 7, 7.0, "7", float("nan"), True]
    rows = [{"key": f"k{i}", "image": b"x", "captions": [], "image_id": one} for i, one in enumerate(ids)]
    source = opened(write(tmp_path / "a", rows))
    assert [source[i]["image_id"] for i in range(len(ids))] == [
        *("web:k0", "web:k1", "web:k2", "7", "7", "7", "web:k6", "web:k7")
    ]


# --- captions beside


def with_captions(path, rows):
    with Writing(path) as file:
        for row in rows:
            file.add(row)
        file.commit({"read": len(rows)})


def test_captions_beside_are_those_of_the_records(tmp_path):
    rows = [{**r, "captions": [f"{c} \ud800\n“quoted”" for c in r["captions"]]} for r in records(9)]
    with_captions(tmp_path / "0.array_record", rows[:4])
    with_captions(tmp_path / "1.array_record", rows[4:])
    source = opened(tmp_path / "*.array_record")
    assert len(source) == 9
    assert [source.captions_of(i) for i in range(9)] == [r["captions"] for r in rows]
    assert [source[i]["captions"] for i in range(9)] == [r["captions"] for r in rows]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{k}.array_record{end}" for k in (0, 1) for end in ("", ".captions.jsonl")
    ]
    (tmp_path / "1.array_record.captions.jsonl").unlink()
    assert not hasattr(opened(tmp_path / "*.array_record"), "captions_of")


def test_captions_of_another_file_are_refused(tmp_path):
    with_captions(tmp_path / "a", records(4))
    with_captions(tmp_path / "b", [*records(3), {**records(4)[3], "key": "x" * 99_999}])
    beside = tmp_path / "a.captions.jsonl"
    lines = beside.read_text().splitlines()
    for content in ((tmp_path / "b.captions.jsonl").read_text(), "\n".join(lines[:3]), "", "no", "[1]\n", "[" * 99_999):
        beside.write_text(content)
        with pytest.raises(ValueError, match=r"data source 'web': .*a.captions.jsonl' .*remove it, or pack"):
            opened(tmp_path / "a")
    beside.write_text("\n".join([lines[0], "[1]", "{half", '"one"', lines[4]]) + "\n")
    source = opened(tmp_path / "a")
    for i in (0, 1):
        with pytest.raises(R.BadRecord, match=f"web:a#{i}: malformed caption"):
            source.captions_of(i)
    assert source.captions_of(2) == ["one"] and source.captions_of(3) == json.loads(lines[4])


def test_an_unfinished_file_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), Writing(tmp_path / "a") as file:
        file.add(records(1)[0])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
