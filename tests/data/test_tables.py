"""CSV, TSV and Parquet lists as sources: which columns, which rows, what is refused, and files of another kind."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from world.pictures import add_to_tar, encode, noise, records, write_json

from blip_jax import config
from blip_jax.data import source as R
from blip_jax.data.batches import open_all
from blip_jax.data.formats import csv, open_source, parquet


def opened(kind, path, **leaves):
    return open_source("web", config.source(kind, str(path), **leaves))


def pictures(folder, n=4):
    folder.mkdir(exist_ok=True)
    for i in range(n):
        (folder / f"{i}.jpg").write_bytes(encode(noise(i)))
    return [(folder / f"{i}.jpg").read_bytes() for i in range(n)]


def bad(source, i):
    with pytest.raises(R.BadRecord) as e:
        source[i]
    return e.value


def captions(source):
    return [source[i]["captions"] for i in range(len(source))]


TEXTS = ["a dog", 'he said "no", twice', "two\nlines, of\r\ntext", "数据 “x”"]


@pytest.mark.parametrize("kind, separator", [("csv", ","), ("tsv", "\t"), ("csv", "\t"), ("csv", ";"), ("tsv", "|")])
@pytest.mark.parametrize("end, mark", [("\n", ""), ("\r\n", "\ufeff")])
def test_csv(tmp_path, kind, separator, end, mark):
    import csv as writer

    images, text = pictures(tmp_path), io.StringIO()
    table = writer.writer(text, delimiter=separator, lineterminator=end)
    table.writerow(["filepath", "title"])
    table.writerows([[f"{i}.jpg", t] for i, t in enumerate(TEXTS)])
    (tmp_path / "a.csv").write_bytes((mark + text.getvalue() + end).encode())
    source = opened(kind, tmp_path / "a.csv")
    assert captions(source) == [[t] for t in TEXTS] == [source.captions_of(i) for i in range(4)]
    assert [source[i]["image"] for i in range(4)] == images
    assert source[1]["key"] == "web:a.csv#1:1.jpg" and source[1]["image_id"] == "1.jpg"


def test_quotes_that_are_not_closed_cost_no_row(tmp_path):
    pictures(tmp_path)
    lines = ["filepath,caption", '0.jpg,"an open quote', "1.jpg,second", '2.jpg,say ""cheese""', '3.jpg,"closed"', ""]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert captions(opened("csv", tmp_path / "a.csv")) == [
        ["an open quote"],
        ["second"],
        ['say ""cheese""'],
        ["closed"],
    ]


def test_malformed_rows_of_csv(tmp_path):
    pictures(tmp_path)
    rows = [
        b"0.jpg,fine",
        b"1.jpg",
        b"1.jpg,a,b",
        b"1.jpg,\xff\xfe",
        b"absent.jpg,x",
        b"../a.csv,x",
        b",no path",
        b"3.jpg,",
    ]
    (tmp_path / "a.csv").write_bytes(
        b"image,caption\n" + b"\n\n".join(rows) + b"\n" + b"x" * (R.MAX_TEXT + 9) + b",y\n0.jpg,z"
    )
    source = opened("csv", tmp_path / "a.csv")
    assert len(source) == 10 and source[9]["captions"] == ["z"] and source[7]["captions"] == [""]
    reasons = [bad(source, i).reason.split(":")[0] for i in (1, 2, 3, 4, 5, 6, 8)]
    assert reasons == ["malformed row"] * 3 + ["missing file", "path leaves the image root"] + ["malformed row"] * 2
    assert bad(source, 1).key == "web:a.csv#1" and bad(source, 4).key == "web:a.csv#4:absent.jpg"
    assert "1 fields at byte 26, the first line names 2" in bad(source, 1).reason


def test_columns_by_any_usual_name_or_by_the_config(tmp_path):
    images = pictures(tmp_path / "img", 2)
    for header in ("image,caption", "FILE_NAME,TEXT", "path,sentence", '"image","Title"'):
        (tmp_path / "a.csv").write_text(f"{header},image_id\n0.jpg,x,7\n1.jpg,y,7.5\n")
        source = opened("csv", tmp_path / "a.csv", images=str(tmp_path / "img"))
        assert captions(source) == [["x"], ["y"]] and source[0]["image_id"] == "7"
    (tmp_path / "b.csv").write_text("image,mine,caption\nabsent,0.jpg,x\n")
    source = opened("csv", tmp_path / "b.csv", images=str(tmp_path / "img"), image_key="mine")
    assert source[0]["image"] == images[0]
    with pytest.raises(
        ValueError, match=r"no column 'other'; its columns are \['image', 'mine', 'caption'\]: set `image"
    ):
        opened("csv", tmp_path / "b.csv", image_key="other")
    with pytest.raises(ValueError, match="no column 'filepath'"):  # a usual name, but asked for
        opened("csv", tmp_path / "b.csv", image_key="filepath")
    (tmp_path / "c.csv").write_text("image,words\n0.jpg,x\n")
    source = opened("csv", tmp_path / "c.csv", images=str(tmp_path / "img"))
    assert source[0]["captions"] == [] and "no column of captions" in source.without_texts


def parquet_rows(path, n, group=3, **columns):
    table = pa.table({"image": [f"{i}.jpg" for i in range(n)], **columns})
    pq.write_table(table, path, row_group_size=group)
    return path


def test_parquet(tmp_path):
    images = pictures(tmp_path, 4)
    lists = [["a", "b"], [], None, ["c"]]
    parquet_rows(tmp_path / "0.parquet", 4, TEXT=TEXTS)
    parquet_rows(tmp_path / "1.parquet", 4, caption=lists, image_id=[1, 2, None, 2])
    source = opened("parquet", tmp_path / "{0,1}.parquet")
    assert captions(source) == [[t] for t in TEXTS] + [c or [] for c in lists]
    assert [source[i]["image"] for i in range(8)] == images * 2
    assert [source[i]["image_id"] for i in range(4, 8)] == ["1", "2", "2.jpg", "2"]
    assert source[5]["key"] == "web:1.parquet#1:1.jpg" and source.captions_of(4) == ["a", "b"]


def test_parquet_with_the_pictures_in_it(tmp_path):
    images = pictures(tmp_path, 3)
    pq.write_table(
        pa.table({"jpg": images, "caption": ["x", "y", "z"], "url": ["http://a"] * 3}), tmp_path / "a.parquet"
    )
    both = [{"bytes": images[0], "path": "p.jpg"}, {"bytes": None, "path": "1.jpg"}, {"bytes": images[2], "path": None}]
    pq.write_table(pa.table({"image": both, "text": ["x", "y", "z"]}), tmp_path / "b.parquet")
    for name, ids in (("a", ["web:a.parquet#0"]), ("b", ["p.jpg", "1.jpg", "web:b.parquet#2"])):
        source = opened("parquet", tmp_path / f"{name}.parquet")
        assert [source[i]["image"] for i in range(3)] == images and captions(source) == [["x"], ["y"], ["z"]]
        assert [source[i]["image_id"] for i in range(len(ids))] == ids


def test_parquet_is_bounded(tmp_path, monkeypatch):
    pictures(tmp_path, 1)
    # a text of 4 MB that stands in each of 4000 rows: 16 GB were it written out
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array(["x" * (4 << 20)]))
    path = parquet_rows(tmp_path / "bomb.parquet", 4000, 4000, caption=one)
    assert path.stat().st_size < 1 << 20
    source = opened("parquet", path)
    assert len(source.captions_of(3999)[0]) == 4 << 20
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 4000], pa.int32()), one)
    source = opened("parquet", parquet_rows(tmp_path / "lists.parquet", 2, 9, captions=lists))
    assert len(source.captions_of(0)[0]) == 4 << 20
    assert bad(source, 1).reason.startswith("malformed row: a list of 167")
    deep = pa.array([[["x"]], [["y"]]])
    assert (
        "is of type list"
        in bad(opened("parquet", parquet_rows(tmp_path / "deep.parquet", 2, 9, caption=deep)), 0).reason
    )
    path = parquet_rows(tmp_path / "a.parquet", 90, 10, caption=[f"{i} " + "x" * 400 for i in range(90)])
    monkeypatch.setattr(parquet, "KEPT", 9000)
    source = opened("parquet", path)
    for i in np.random.default_rng(0).permutation(90):
        assert source.captions_of(int(i))[0].startswith(f"{i} ")
    monkeypatch.setattr(parquet, "GROUP_BYTES", 3000)
    assert bad(opened("parquet", path), 5).reason.startswith("row group too large")
    monkeypatch.setattr(parquet, "GROUP_ROWS", 9)
    with pytest.raises(ValueError, match="row group 0 has 10 rows, at most 9: write it with smaller row groups"):
        opened("parquet", path)


def test_damaged_parquet(tmp_path):
    pictures(tmp_path, 3)
    whole = parquet_rows(tmp_path / "a.parquet", 9, caption=[f"c{i}" for i in range(9)]).read_bytes()
    rng = np.random.default_rng(2)
    for trial in range(60):
        data = bytearray(whole[: rng.integers(len(whole))] if trial % 3 == 0 else whole)
        if trial % 3:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (tmp_path / "b.parquet").write_bytes(data)
        try:
            source = opened("parquet", tmp_path / "b.parquet")
            for i in range(len(source)):
                try:
                    source[i]
                except R.BadRecord as e:
                    assert "\n" not in e.reason
        except ValueError as e:
            assert "b.parquet" in str(e) and "\n" not in str(e)


# --- what cannot be a source, and how it can


@pytest.mark.parametrize(
    "kind, name", [("csv", "a.csv"), ("tsv", "a.tsv"), ("parquet", "a.parquet"), ("json", "a.json")]
)
def test_addresses_are_to_be_fetched(tmp_path, kind, name):
    path, row = tmp_path / name, {"URL" if kind != "json" else "url": "http://a/b.jpg", "caption": "x"}
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif kind == "json":
        path.write_text(json.dumps([row]))
    else:
        path.write_text("\n".join("\t".join(line) for line in (row, row.values())))
    expected = f"img2dataset --url_list={path} --input_format={kind} --url_col=(URL|url) --caption_col=caption"
    with pytest.raises(ValueError, match=expected):
        opened(kind, path)
    (tmp_path / "b.csv").write_text("image,caption\nhttps://a/b.jpg,x\n")
    with pytest.raises(ValueError, match="img2dataset .*--url_col=image"):
        opened("csv", tmp_path / "b.csv")


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"a very typical bus station\thttp://x/y.jpg\n", "The first line of a CSV or TSV names the columns"),
        ("a.csv", "\ufeffimage,caption\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("a.csv", b"\xff\xd8\xff\xe0 picture", "is not UTF-8 text"),
        ("a.csv", b"image,caption\n", "holds no record"),
        ("a.csv", b"image\0,caption\n", "is no table"),
        ("a.csv", b"image," * 200_000, "is no table"),
        ("a.parquet", b"PAR1" + bytes(40) + b"PAR1", "is not Parquet, or damaged"),
        ("a.parquet", b"nothing", "is not Parquet, or damaged"),
    ],
)
def test_wrong_tables(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"data source 'web': .*{message}") as e:
        opened(name.split(".")[1], tmp_path / name)
    assert "\n" not in str(e.value)


def test_a_file_of_another_kind_is_told(tmp_path):
    pictures(tmp_path, 1)
    (tmp_path / "a.csv").write_text("filepath,title\n0.jpg,a dog\n")
    (tmp_path / "table").write_text("filepath\ttitle\n0.jpg\ta dog\n")
    parquet_rows(tmp_path / "a.parquet", 1, caption=["x"])
    write_json(tmp_path, records(1), "a.json")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_to_tar(tar, "0.jpg", encode(noise(0)))
        add_to_tar(tar, "0.txt", b"x")
    from blip_jax.data.formats.array_record import write_array_record

    write_array_record(tmp_path / "a.array_record", records(1))
    kinds = {"a.csv": "csv", "a.parquet": "parquet", "a.json": "json", "a.tar": "tar", "a.array_record": "array_record"}
    for name, right in kinds.items():
        for kind in kinds.values():
            if kind == right:
                assert len(opened(kind, tmp_path / name)) == 1
                continue
            with pytest.raises(ValueError, match=f"'.*{name}' is an? .*, not {kind}: give the source kind='{right}'"):
                opened(kind, tmp_path / name)
    with pytest.raises(ValueError, match="kind='csv', which reads it as it is, nothing needs to be converted"):
        opened("json", tmp_path / "a.csv")
    (tmp_path / "a.csv.gz").write_bytes(b"\x1f\x8b rest")
    with pytest.raises(ValueError, match="is compressed, .* `gunzip`"):
        opened("csv", tmp_path / "a.csv.gz")


def test_all_missing_sources_are_named_at_once(tmp_path):
    names = ("b.json", "*.tar", "c.{0..3}.array_record")
    sources = {f"s{i}": config.source(n.split(".")[-1], str(tmp_path / n)) for i, n in enumerate(names)}
    with pytest.raises(ValueError) as e:
        open_all(sources | {"world": config.source("scenes", count=3)})
    assert [f"data source 's{i}': " in str(e.value) for i in range(3)] == [True] * 3 and "\n" not in str(e.value)


# --- links


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_linked_image_folders(tmp_path, kind, caplog):
    images, data = pictures(tmp_path / "disk", 2), tmp_path / "data"
    data.mkdir()
    os.symlink(tmp_path / "disk", data / "train2014")
    path = data / f"a.{kind}"
    if kind == "json":
        path.write_text(json.dumps([{"image": f"train2014/{i}.jpg", "caption": "x"} for i in (0, 1)]))
    else:
        path.write_text("image,caption\ntrain2014/0.jpg,x\ntrain2014/1.jpg,x\n")
    with pytest.raises(
        ValueError, match=r"behind links out of .*leads to '.*disk'.*set its `roots`, as roots=\('.*disk',"
    ):
        opened(kind, path)
    for roots in ((str(tmp_path / "disk"),), str(tmp_path / "disk"), (str(tmp_path),)):
        source = opened(kind, path, roots=roots)
        assert [source[i]["image"] for i in (0, 1)] == images
    with pytest.raises(ValueError, match="set its `roots`"):
        opened(kind, path, roots=(str(tmp_path / "nowhere"),))

    # where some pictures are in the folder, what lies behind links is said and skipped
    (data / "0.jpg").write_bytes(images[0])
    line = '{"image": "0.jpg", "caption": "x"}\n{"image": "train2014/1.jpg", "caption": "x"}'
    path.write_text(line if kind == "json" else "image,caption\n0.jpg,x\ntrain2014/1.jpg,x\n")
    source = opened(kind, path)
    assert "set its" not in caplog.text and "leads to" in caplog.text and "roots=" in caplog.text
    assert source[0]["image"] == images[0] and "`roots`" in bad(source, 1).reason.split(":")[0]


def test_the_lines_of_a_csv_are_bounded(tmp_path):
    lines = b"image,caption\n" + b'0.jpg,"x\n' * 2000 + b'1.jpg,"' + b"y\n" * 99_000
    (tmp_path / "a.csv").write_bytes(lines)
    rows = csv.Lines(str(tmp_path / "a.csv"))
    assert len(rows) > 99_000  # a quote that is never closed is a letter, and takes no other row with it
