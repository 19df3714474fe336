"""Which files a path names: itself before any pattern, the shell's braces, wildcards; what is bounded."""

import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from world.pictures import add_to_tar, records, write_json

from blip_jax import config
from blip_jax.data.formats import open_source
from blip_jax.data.formats.array_record import write_array_record
from blip_jax.data.pack import pack
from blip_jax.data.paths import braces, find

ODD = ["run[1]", "what?", "100%", "a#b", "two words", "数据", "{a,b}", "{0..3}", "star*", "[a-c]", "'q\"", "a:b", "%2F"]


@pytest.mark.parametrize("folder", ODD)
def test_a_name_that_exists_is_no_pattern(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / "run1").mkdir()  # what the pattern run[1] would match
    files = [tmp_path / folder / f"s-{i}.tar" for i in range(3)]
    for file in [*files, tmp_path / "run1" / "s-0.tar"]:
        file.touch()
    assert find(str(files[0])) == [str(files[0])]
    assert find(f"{tmp_path / folder}/*.tar") == find(f"{tmp_path / folder}/s-{{0..2}}.tar") == list(map(str, files))
    monkeypatch.chdir(tmp_path)
    assert find(f"{folder}/s-[01].tar") == [f"{folder}/s-0.tar", f"{folder}/s-1.tar"]


def test_a_literal_part_behind_a_wildcard(tmp_path):
    for folder in ("a/run[1]", "b/run[1]", "c/run1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.json").touch()
    assert find(f"{tmp_path}/*/run[1]/x.json") == [f"{tmp_path}/{f}/x.json" for f in ("a/run[1]", "b/run[1]", "c/run1")]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("s-{00008..00011}.tar", "s-00008.tar s-00009.tar s-00010.tar s-00011.tar"),
        ("{a,b}/{1..2}", "a/1 a/2 b/1 b/2"),
        ("{a,{b,c}d,}x", "ax bdx cdx x"),
        ("{3..1}{-1..1}", "3-1 30 31 2-1 20 21 1-1 10 11"),
        ("{00..10..5}", "00 05 10"),
        ("{a..c}", "a b c"),
        ("{-01..1}", "-01 000 001"),
        ("{a{1..2},c}", "a1 a2 c"),
        ("{{a,b}", "{a {b"),
        ("{x} {} a}b {a,b", "{x} {} a}b {a,b"),
    ],
)
def test_braces_are_those_of_the_shell(text, expected):
    assert " ".join(braces(text)) == expected


@pytest.mark.parametrize(
    "text",
    ["{0..99999999999}", "{0..9999}" * 6, "{a,b}" * 1000, "{" + "9" * 10**5 + "..1}", "x" * 90_000 + "{0..99999}"]
    + ["{a," * 17 + "}" * 17, "{" * 10_000 + "}" * 10_000, "x" * 10**7, "{{0..150000},{0..150000}}"],
)
def test_hostile_braces_are_refused(text):
    with pytest.raises(ValueError) as e:
        braces(text)
    assert len(str(e.value)) < 400 and "\n" not in str(e.value)


def test_what_is_missing_is_named(tmp_path):
    for i in (0, 1, 3):
        (tmp_path / f"{i}.tar").touch()
    with pytest.raises(ValueError, match=r"1 of the 4 files .*are missing, the first '.*/2.tar'.* with \*"):
        find(f"{tmp_path}/{{0..3}}.tar")
    with pytest.raises(ValueError, match="no file matches .*{4..5}.tar', as '.*/4.tar'"):
        find(f"{tmp_path}/{{4..5}}.tar")
    with pytest.raises(ValueError, match=r"no file matches '.*\*.jpg'; paths are relative to"):
        find(f"{tmp_path}/*.jpg")
    with pytest.raises(ValueError, match="absent' is not a file; paths are relative to"):
        find(f"{tmp_path}/absent")
    for address in ("s3://bucket/{0..3}.tar", "pipe:curl x", "https://a.b/c.tar"):
        with pytest.raises(ValueError, match="addresses and pipes are not read"):
            find(address)
    with pytest.raises(ValueError):
        find("a\0b")
    assert find(f"{tmp_path}/{{0,*}}.tar") == [f"{tmp_path}/{i}.tar" for i in (0, 1, 3)]  # each once
    os.symlink(tmp_path / "nowhere", tmp_path / "4.tar")
    assert find(f"{tmp_path}/4.tar") == [f"{tmp_path}/4.tar"]


@pytest.mark.parametrize("folder", [*ODD, "s3:x", "file:", "~", "-x", "$HOME", "a\\b", "a\nb", "[0:1]"])
def test_every_kind_reads_from_every_folder(tmp_path, monkeypatch, folder):
    rows, inside = records(2), tmp_path / folder
    inside.mkdir()
    images = [f"img/{r['key']}.jpg" for r in rows]
    write_json(inside, rows, "l.json")
    (inside / "t.csv").write_text("image,caption\n" + "".join(f"{image},x\n" for image in images))
    pq.write_table(pa.table({"image": images, "caption": ["x", "y"]}), inside / "t.parquet")
    with tarfile.open(inside / "s.tar", "w") as tar:
        for r in rows:
            add_to_tar(tar, f"{r['key']}.jpg", r["image"])
            add_to_tar(tar, f"{r['key']}.txt", b"x")
    write_array_record(inside / "a.array_record", rows)
    pack("x", config.source("tar", str(inside / "s.tar")), inside / "out")
    monkeypatch.chdir(tmp_path)
    for name in ("l.json", "t.csv", "t.parquet", "s.tar", "a.array_record", "out/00000.array_record"):
        for path in (str(inside / name), f"{folder}/{name}", f"{folder}/{{{name},{name}}}", f"{inside}/?{name[1:]}"):
            source = open_source("x", config.source(name.split(".")[-1], path))
            assert [source[i]["image"] for i in range(2)] == [r["image"] for r in rows], path
