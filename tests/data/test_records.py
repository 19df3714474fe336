import io
import json
import os
import pathlib
import sys
import tarfile
import tracemalloc

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from world.pictures import add_to_tar, encode, noise, records, write_json

from blip_jax import config
from blip_jax.data import rows as json_rows
from blip_jax.data import source as R
from blip_jax.data.batches import open_all
from blip_jax.data.formats import open_source
from blip_jax.data.formats.array_record import write_array_record

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data" / "formats"


def content(source):
    return content_of_first(source, len(source))


def content_of_first(source, n):
    return [(source[i]["image"], source[i]["captions"]) for i in range(n)]


def wanted(rows):
    return [(r["image"], r["captions"]) for r in rows]


def bad(source, i):
    with pytest.raises(R.BadRecord) as e:
        source[i]
    return e.value.reason


# --- the same records from every layout


@pytest.mark.parametrize("options", [{}, {"indent": 1}, {"ensure_ascii": False, "indent": 4}])
def test_json_array(tmp_path, options):
    rows = records(5)
    path = write_json(tmp_path, rows, **options)
    source = open_source("web", config.source("json", str(path)))
    assert content(source) == wanted(rows)
    assert source.name == "web"
    assert [source[i]["image_id"] for i in range(5)] == [r["image_id"] for r in rows]
    assert [source[i]["key"] for i in (0, 4)] == ["web:list.json#0:img/0000.jpg", "web:list.json#4:img/0004.jpg"]


def test_json_lines_and_glob_of_lists(tmp_path):
    rows = records(6)
    table = json.loads(write_json(tmp_path, rows).read_text())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in table[:2]) + "\n\n" + json.dumps(table[2]))
    (tmp_path / "b.jsonl").write_text("\ufeff" + "\n".join(json.dumps(r) for r in table[3:]) + "\n", encoding="utf-8")
    source = open_source("x", config.source("json", str(tmp_path / "[ab].jsonl")))
    assert content(source) == wanted(rows)
    assert len({source[i]["key"] for i in range(6)}) == 6


def test_other_field_names_and_image_root(tmp_path):
    rows = records(2)
    write_json(tmp_path / "pictures", rows)
    table = [{"file": f"img/{r['key']}.jpg", "texts": r["captions"]} for r in rows]
    (tmp_path / "l.json").write_text(json.dumps(table))
    source = open_source(
        "x",
        config.source(
            "json", str(tmp_path / "l.json"), images=str(tmp_path / "pictures"), image_key="file", caption_key="texts"
        ),
    )
    assert content(source) == wanted(rows)
    assert source[1]["image_id"] == "img/0001.jpg"  # the path where a row has no id


def write_tar(path, rows, caption="txt"):
    with tarfile.open(path, "w") as tar:
        for r in rows:
            add_to_tar(tar, f"{r['key']}.jpg", r["image"])
            add_to_tar(tar, f"{r['key']}.json", json.dumps({"caption": r["captions"][0], "key": r["key"]}).encode())
            if caption == "txt":
                add_to_tar(tar, f"{r['key']}.txt", r["captions"][0].encode())


def single(rows):
    return [{**r, "captions": r["captions"][:1]} for r in rows]


@pytest.mark.parametrize("caption", ["txt", "json"])
def test_tar(tmp_path, caption):
    rows = single(records(5))
    write_tar(tmp_path / "0.tar", rows[:3], caption)
    write_tar(tmp_path / "1.tar", rows[3:], caption)
    source = open_source("x", config.source("tar", str(tmp_path / "*.tar")))
    assert content(source) == wanted(rows)
    assert [source[i]["key"] for i in (0, 4)] == ["x:0.tar/0000", "x:1.tar/0004"]


def test_array_record(tmp_path):
    rows = records(5)
    assert write_array_record(tmp_path / "a.array_record", rows[:2]) == 2
    write_array_record(tmp_path / "b.array_record", [{**r, "truth": {"n": 1}} for r in rows[2:]])
    source = open_source("x", config.source("array_record", str(tmp_path / "*.array_record")))
    assert content(source) == wanted(rows)
    assert [source[i]["key"] for i in range(5)] == [f"x:{r['key']}" for r in rows]
    assert source[3]["truth"] == {"n": 1} and source[3]["image_id"] == "id3"


def test_equal_keys_of_two_array_record_sources_are_two(tmp_path):
    write_array_record(tmp_path / "a", [{"key": key, "image": b""} for key in ("1", "x:1", "xx:1")])
    config_of = config.source("array_record", str(tmp_path / "a"))
    x, y = (open_source(name, config_of) for name in "xy")
    assert [x[i]["key"] for i in range(3)] == ["x:1", "x:1", "x:xx:1"]  # as it was packed from a source of this name
    assert [y[i]["key"] for i in range(3)] == [y[i]["image_id"] for i in range(3)] == ["y:1", "y:x:1", "y:xx:1"]


def test_array_record_is_complete_or_absent(tmp_path):
    with pytest.raises(ValueError, match="record 1 needs"):
        write_array_record(tmp_path / "a", [records(1)[0], {"key": 3}])
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    import tensorflow_datasets as tfds

    class TinyPairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            picture = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
            texts = tfds.features.Sequence({"text": tfds.features.Text()})
            features = {"image": picture, "image_id": np.int64, "captions": texts, "title": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, r in enumerate(records(5)):
                texts = [{"text": c} for c in r["captions"]]
                yield i, {"image": io.BytesIO(r["image"]), "image_id": i, "captions": texts, "title": r["captions"][0]}

    folder = tmp_path_factory.mktemp("tfds")
    TinyPairs(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return str(folder)


def test_tfds(tfds_folder):
    source = open_source(
        "x", config.source("tfds", "tiny_pairs/train", images=tfds_folder, caption_key="captions/text")
    )
    rows = records(5)
    assert sorted(content(source)) == sorted(wanted(rows))  # TFDS shuffles by a hash of the key
    assert {source[i]["image_id"] for i in range(5)} == set("01234")
    titles = open_source("x", config.source("tfds", "tiny_pairs/train", images=tfds_folder, caption_key="title"))
    assert sorted(content(titles)) == sorted(wanted(single(rows)))
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    "path, leaves, message",
    [
        ("tiny_pairs/test", {}, "cannot open 'tiny_pairs/test'"),
        ("no_such_set/train", {}, "cannot open 'no_such_set/train'"),
        ("tiny_pairs/train", {"caption_key": "caption"}, r"no field \['caption'\]"),
        ("tiny_pairs/train", {"image_key": "picture", "caption_key": "title"}, "picture"),
    ],
)
def test_tfds_that_cannot_be_opened(tfds_folder, path, leaves, message):
    with pytest.raises(ValueError, match=message):
        open_source("x", config.source("tfds", path, images=tfds_folder, **leaves))


def test_tfds_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match="pip install tensorflow-datasets"):
        open_source("x", config.source("tfds", "a/train"))


def test_scenes():
    source = open_source("world", config.source("scenes", count=3, seed=5, size=32))
    assert len(source) == 3 and source.name == "world" and source[2]["captions"][0]


# --- wrong file lists end at once


@pytest.mark.parametrize(
    "kind, name, data, message",
    [
        ("json", None, b"", "is not a file"),
        ("json", "*.json", None, "no file matches"),
        ("json", "l.json", b"", "is empty"),
        ("json", "l.json", b"\xff\xd8\xff\xe0 picture", "is not JSON"),
        ("json", "l.json", b"[]", "holds no record"),
        ("json", "l.json", b'[{"image": "a", "caption": "b"}', "has no end"),
        ("json", "l.json", b'[{"image": "a", "caption": "b"}, {"image": "c", "capt', "has no end"),
        ("json", "l.json", b'[{"url": "a", "caption": "b"}]', "image_key"),
        (
            "json",
            "l.json",
            b'{"image": "a", "text": "b"}\n',
            r"no row .* has the field 'caption'; the fields are .*'text'",
        ),
        ("json", "l.json", b"[1, 2, 3]", "no JSON objects"),
        ("json", "l.json", b"{broken\n{lines\n", "no JSON objects"),
        ("tar", "s.tar", b"not a tar at all", "is not a tar file"),
        ("tar", "s.tar", b"", "is not a tar file"),
        ("tar", "s.tar", b"\x1f\x8b\x08\x00rest", "gunzip"),
        ("tar", "*.tar", None, "no file matches"),
        ("array_record", "a.ar", b"nothing of the kind" * 9, "is not ArrayRecord"),
        ("feather", "a.arrow", b"x", "kind 'feather' is unknown"),
    ],
)
def test_wrong_file_list(tmp_path, kind, name, data, message):
    if data:
        (tmp_path / name).write_bytes(data)
    elif data is not None and name:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        open_all({"web": config.source(kind, str(tmp_path / (name or "absent")))})


def test_missing_image_folder(tmp_path):
    path = write_json(tmp_path, records(1))
    with pytest.raises(ValueError, match="image folder .*nowhere"):
        open_source("x", config.source("json", str(path), images=str(tmp_path / "nowhere")))


def test_a_tar_of_what_is_not_read_says_what_it_holds(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("0.jpg.gz", "0.txt.gz", "1.mp"):
            add_to_tar(tar, name, b"abc")
    message = r"no sample in .*s.tar' has a picture .*; other members are \.jpg\.gz \(1\), .*\.mp \(1\); give shards as"
    with pytest.raises(ValueError, match=message):
        open_source("x", config.source("tar", str(tmp_path / "s.tar")))


def test_tar_without_pairs(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add_to_tar(tar, "a.jpg", encode(noise(0)))
        add_to_tar(tar, "b.txt", b"text")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        add_to_tar(tar, "b.txt", b"text")
    with pytest.raises(ValueError, match="both a picture"):
        open_all({"x": config.source("tar", str(tmp_path / "s.tar"))})
    with pytest.raises(ValueError, match="no sample .* has a picture"):
        open_source("x", config.source("tar", str(tmp_path / "t.tar")))


# --- single bad records


def test_malformed_rows(tmp_path):
    good = json.loads(write_json(tmp_path, records(2)).read_text())
    rows = [
        json.dumps(good[0]),
        '{"image": "img/0000.jpg", "caption": }',
        "17",
        '"a string, {with} [brackets]"',
        '{"image": "img/0000.jpg, "caption": "an open quote"}',
        json.dumps({"image": "img/0000.jpg", "caption": 3}),
        json.dumps({"image": "img/0000.jpg", "caption": ["a", None]}),
        json.dumps({"caption": "no image"}),
        json.dumps({"image": ["a", "b"], "caption": "list of images"}),
        json.dumps({"image": "img/0001.jpg"}),
        json.dumps(good[1]),
    ]
    (tmp_path / "l.json").write_text("[" + ",\n".join(rows) + "]")
    source = open_source("x", config.source("json", str(tmp_path / "l.json")))
    assert len(source) == len(rows)
    assert source[0]["captions"] == good[0]["caption"] and source[10]["captions"] == [good[1]["caption"]]
    assert [bad(source, i).split(":")[0] for i in (1, 2, 3, 4, 7, 8)] == ["malformed row"] * 6
    assert [bad(source, i).split(":")[0] for i in (5, 6)] == ["malformed caption"] * 2
    assert source[9]["captions"] == []
    with pytest.raises(R.BadRecord, match="x:l.json#2: malformed row"):
        source[2]


def test_malformed_lines_at_the_end_of_the_array(tmp_path):
    good = json.loads(write_json(tmp_path, records(1)).read_text())[0]
    (tmp_path / "l.json").write_text(f"[{json.dumps(good)}, nonsense  ]\n")
    source = open_source("x", config.source("json", str(tmp_path / "l.json")))
    assert len(source) == 2 and source[0]["captions"] and bad(source, 1).startswith("malformed row")


def test_malformed_json_lines(tmp_path):
    good = json.loads(write_json(tmp_path, records(1)).read_text())[0]
    lines = [json.dumps(good).encode(), b'{"image": "half', b"\xff\xfe", b"[1]", json.dumps(good).encode()]
    (tmp_path / "l.jsonl").write_bytes(b"\n".join(lines))
    source = open_source("x", config.source("json", str(tmp_path / "l.jsonl")))
    assert [bad(source, i).split(":")[0] for i in (1, 2, 3)] == ["malformed row"] * 3
    assert source[0]["image"] == source[4]["image"]


def test_paths_stay_below_the_root(tmp_path):
    write_json(tmp_path / "root", records(1))
    outside = tmp_path / "secret.jpg"
    outside.write_bytes(encode(noise(7)))
    (tmp_path / "root" / "link.jpg").symlink_to(outside)
    (tmp_path / "root" / "up").symlink_to(tmp_path)
    (tmp_path / "root" / "inner.jpg").symlink_to(tmp_path / "root" / "img" / "0000.jpg")
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "a.jpg").write_bytes(b"x")
    os.mkfifo(tmp_path / "root" / "pipe.jpg")
    inside = str(tmp_path / "root" / "img" / "0000.jpg")
    leaving = ["../secret.jpg", str(outside), "link.jpg", "up/secret.jpg", "img/../../secret.jpg", "../root-2/a.jpg"]
    others = ["absent.jpg", "img", "pipe.jpg", "a\0b.jpg", "\ud800.jpg"]
    fine = ["img/0000.jpg", "img/../img/0000.jpg", inside, "inner.jpg"]
    table = [{"image": p, "caption": "c"} for p in leaving + others + fine]
    (tmp_path / "l.json").write_text(json.dumps(table))
    source = open_source("x", config.source("json", str(tmp_path / "l.json"), images=str(tmp_path / "root")))
    for i in range(len(leaving)):
        assert bad(source, i).startswith("path leaves the image root"), leaving[i]
    for i, reason in enumerate(["missing file"] + ["unreadable file"] * 4, len(leaving)):
        assert bad(source, i).startswith(reason), table[i]
    for i in range(len(leaving + others), len(table)):
        assert source[i]["image"] == records(1)[0]["image"]


def test_tar_odd_samples(tmp_path):
    jpg = encode(noise(0))
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in [
            ("d/a.jpg", jpg), ("d/a.txt", b"first"), ("e/a.txt", b"other folder"), ("e/a.PNG", b"png"),
            ("d/a.jpg", b"again"), ("d/a.txt", b"second"), ("b.jpg", jpg), ("c.txt", b"no picture"),
            ("f.jpg", jpg), ("f.json", b"{half"), ("g.jpg", jpg), ("g.txt", b"\xff\xfe"), ("h.jpg", jpg),
            ("h.json", b'{"caption": null}'), (".hidden.jpg", b""), ("i.seg.png", b"mask"), ("i.webp", jpg),
            ("i.json", b'{"caption": ["one", "two"]}'), ("j.jpg", jpg), ("j.json", b"[1]"),
        ]:  # fmt: skip
            add_to_tar(tar, name, data)
        tar.addfile(tarfile.TarInfo("k.jpg/"))
    source = open_source("x", config.source("tar", str(tmp_path / "s.tar")))
    keys = ["d/a", "e/a", "d/a~2", "b", "c", "f", "g", "h", "i", "j"]
    assert len(source) == len(keys)
    got = {}
    for i, key in enumerate(keys):
        try:
            got[key] = source[i]
            assert got[key]["key"] == f"x:s.tar/{key}"
        except R.BadRecord as e:
            assert e.key == f"x:s.tar/{key}"
            got[key] = e.reason.split(":")[0]
    assert {k: v["captions"] for k, v in got.items() if isinstance(v, dict)} == {
        "d/a": ["first"], "e/a": ["other folder"], "d/a~2": ["second"], "b": [], "h": [], "i": ["one", "two"]
    }  # fmt: skip
    assert got["d/a~2"]["image"] == b"again"
    assert {k: v for k, v in got.items() if isinstance(v, str)} == {
        "c": "no picture", "f": "malformed caption", "g": "malformed caption", "j": "malformed caption"
    }  # fmt: skip


def test_tar_cut_anywhere(tmp_path, caplog):
    rows = single(records(4))
    write_tar(tmp_path / "whole.tar", rows)
    data = (tmp_path / "whole.tar").read_bytes()
    third, json_of_third = data.index(b"0002.jpg"), data.index(b"0002.json")
    picture = len(rows[2]["image"])
    cuts = {
        third: "(rest)",
        third + 100: "(rest)",
        third + 512: "0002",
        third + 700: "0002",
        third + 512 + picture - 1: "0002",
        third + 512 + picture: "0002",
        json_of_third + 100: "0002",
        data.index(b"0003.jpg"): "(rest)",
    }
    for cut, name in cuts.items():
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        source = open_source("x", config.source("tar", str(tmp_path / "cut.tar")))
        whole = 3 if cut > json_of_third + 512 else 2
        assert len(source) == whole + 1
        assert content_of_first(source, whole) == wanted(rows[:whole])
        with pytest.raises(R.BadRecord, match="tar cut in the middle") as e:
            source[whole]
        assert e.value.key == f"x:cut.tar/{name}"
        assert "is cut or broken after" in caplog.text
        caplog.clear()


def test_tar_with_a_broken_header(tmp_path):
    rows = single(records(3))
    write_tar(tmp_path / "s.tar", rows)
    data = bytearray((tmp_path / "s.tar").read_bytes())
    at = data.index(b"0001.jpg")
    data[at : at + 512] = b"\x55" * 512
    (tmp_path / "s.tar").write_bytes(data)
    source = open_source("x", config.source("tar", str(tmp_path / "s.tar")))
    assert len(source) == 3 and content_of_first(source, 1) == wanted(rows[:1])
    assert bad(source, 1).startswith("malformed member: a damaged header")
    assert source[2]["captions"] == rows[2]["captions"]  # what follows it is read


def test_bad_array_records(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "a"), "group_size:1")
    rows = [records(1)[0], {"key": "k"}, {"key": 3, "image": b""}, {"key": "c", "image": b"", "captions": [1]}]
    for r in rows:
        writer.write(msgpack.packb(r))
    writer.write(b"\xc1 not msgpack")
    writer.close()
    source = open_source("x", config.source("array_record", str(tmp_path / "a")))
    assert source[0]["captions"] == rows[0]["captions"]
    assert [bad(source, i).split(":")[0] for i in (1, 2, 3, 4)] == [
        "malformed record", "malformed record", "malformed caption", "malformed record"
    ]  # fmt: skip


# --- the index of JSON lists

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(["image", "caption", 'a"}{', "x\\"]), VALUES, max_size=4), max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, indent=st.sampled_from([None, 0, 3]), ascii=st.booleans(), long=st.sampled_from([4, 64, 1 << 16]))
def test_rows_of_any_array_are_found(tmp_path, monkeypatch, rows, indent, ascii, long):
    monkeypatch.setattr(json_rows, "LONG", long)  # most rows of a list are found in one go, those that are longer not
    data = json.dumps(rows, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    (tmp_path / "l").write_bytes(data)
    at = json_rows.build(str(tmp_path / "l")).arrays["starts"]
    assert at.dtype == np.int64
    pieces = [data[a:b].strip(b" \n,") for a, b in zip(at, at[1:])]
    assert [json.loads(p.decode("utf-8", "surrogatepass")) for p in pieces] == rows


def test_rows_however_deep_or_long(tmp_path, monkeypatch):
    deep = "[" * 400 + "{}" + "]" * 400
    nested = '{"a":' * 40 + '[{"b": "}, {"}]' + "}" * 40
    rows = [
        f'{{"image": "0.jpg", "caption": "a", "m": {nested}}}',
        f'{{"image": "0.jpg", "m": {deep}, "caption": "b"}}',
        json.dumps({"image": "0.jpg", "caption": "c", "m": 'y"\\{' * (1 << 19)}),
        f'{{"image": "0.jpg", "caption": "d", "m": {"[" * 100_000 + "]" * 100_000}}}',
        json.dumps({"image": "0.jpg", "caption": "e", "m": "y" * (R.MAX_TEXT + 1)}),
        json.dumps({"image": "0.jpg", "caption": "f"}),
    ]
    (tmp_path / "0.jpg").write_bytes(b"x")
    for name, text in (("a.json", "[" + ", ".join(rows) + "]"), ("b.json", "\n".join(rows))):
        (tmp_path / name).write_text(text)
        source = open_source("x", config.source("json", str(tmp_path / name)))
        assert len(source) == 6
        assert [source[i]["captions"] for i in (0, 1, 2, 5)] == [["a"], ["b"], ["c"], ["f"]]
        assert bad(source, 3).startswith("malformed row: nested too deep")
        assert bad(source, 4).startswith("malformed row: 83") and f"at most {R.MAX_TEXT}" in bad(source, 4)


def test_a_broken_row_costs_itself(tmp_path):
    good = [{"image": "0.jpg", "caption": str(i)} for i in range(3)]
    (tmp_path / "0.jpg").write_bytes(b"x")
    for broken in (
        '{"image": "a, "caption": "b"}',
        '{"a": [1,, 2]}',
        "{'a': 1}",
        '{"a": {"b": [}}',
        '"lone',
        "}",
        "]}",
    ):
        rows = [json.dumps(good[0]), broken, *map(json.dumps, good[1:])]
        (tmp_path / "l.json").write_text("[" + ",\n".join(rows) + "]")
        source = open_source("x", config.source("json", str(tmp_path / "l.json")))
        found = []
        for i in range(len(source)):
            try:
                found.append(source[i]["captions"][0])
            except R.BadRecord:
                found.append(None)
        assert found == ["0", None, "1", "2"], broken


def test_arrays_one_behind_the_other(tmp_path):
    rows = json.loads(write_json(tmp_path, records(4)).read_text())
    (tmp_path / "l.json").write_text(json.dumps(rows[:2]) + "\n" + json.dumps(rows[2:]))
    assert content(open_source("x", config.source("json", str(tmp_path / "l.json")))) == wanted(records(4))


def test_the_same_list_names_of_two_folders(tmp_path):
    for folder in "ab":
        path = write_json(tmp_path / folder, records(1))
        path.write_text(json.dumps([{"image": "img/0000.jpg", "caption": "c"}]))
    source = open_source("x", config.source("json", str(tmp_path / "*" / "list.json")))
    assert [source[i]["key"] for i in (0, 1)] == [f"x:{f}/list.json#0:img/0000.jpg" for f in "ab"]
    assert source[0]["image_id"] != source[1]["image_id"]  # without image_id, pictures of two folders are two


@pytest.mark.parametrize(
    "value", ["absent", None, "", " ", "NaN", float("nan"), float("inf"), [], {"a": 1}, False, 1e300]
)
def test_what_is_no_image_id(tmp_path, value):
    rows = [{"image": f"./img/000{i}.jpg", "caption": "c", "image_id": value} for i in (0, 0, 1)]
    path = write_json(tmp_path, records(2))
    path.write_text(json.dumps([{k: v for k, v in row.items() if v != "absent"} for row in rows]))
    source = open_source("x", config.source("json", str(path)))
    path_of = lambda i: f"img/000{i}.jpg"
    assert [source[i]["image_id"] for i in range(3)] == [path_of(0), path_of(0), path_of(1)]


def test_nested_fields_of_a_list(tmp_path):
    table = [{"file": {"path": "img/0000.jpg"}, "sentences": [{"raw": "a"}, {"raw": "b"}]}]
    path = write_json(tmp_path, records(1))
    path.write_text(json.dumps(table))
    leaves = {"image_key": "file/path", "caption_key": "sentences/raw"}
    source = open_source("x", config.source("json", str(path), **leaves))
    assert source[0]["captions"] == source.captions_of(0) == ["a", "b"]


def test_a_list_of_pictures_alone(tmp_path, caplog):
    path = write_json(tmp_path, records(2))
    path.write_text(json.dumps([{"image": "img/0000.jpg"}, {"image": "img/0001.jpg"}]))
    with pytest.raises(ValueError, match="field 'caption'; the fields are .*caption_key"):
        open_all({"x": config.source("json", str(path))})
    source = open_all({"x": config.source("json", str(path))}, texts=False)["x"]
    assert [source[i]["captions"] for i in (0, 1)] == [[], []] and "taken without texts" in caplog.text
    with pytest.raises(ValueError, match="no row .* has the field 'TEXT'"):  # it was asked for
        open_all({"x": config.source("json", str(path), caption_key="TEXT")}, texts=False)


def test_index_is_compact(tmp_path):
    n = 20_000
    with open(tmp_path / "l.json", "w") as f:
        f.write("[" + ", ".join(json.dumps({"image": f"{i}.jpg", "caption": "words " * 12}) for i in range(n)) + "]")
    tracemalloc.start()
    source = open_source("x", config.source("json", str(tmp_path / "l.json")))
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(source) == n
    assert kept < 12 * n  # bytes; the rows themselves are 100 each, as Python objects several hundred


if SHARED.exists():  # samples of real files, beside the checkout of some developers

    def test_real_shards():
        source = open_source("x", config.source("tar", str(SHARED / "img2dataset" / "0000[01].tar")))
        assert len(source) == 40
        assert all(source[i]["image"][:2] == b"\xff\xd8" and source[i]["captions"][0] for i in range(40))
