"""Captions for a vocabulary: every kind of file that holds some, told apart by content."""

import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from world.pictures import add_to_tar, encode, noise, records

from blip_jax.cli import main
from blip_jax.data.captions import read
from blip_jax.data.formats.array_record import write_array_record

TEXTS = ["a dog runs", "a “red” bus, 数据"]


@pytest.fixture
def files(tmp_path):
    rows = [{"image": f"img_{i}.jpg", "caption": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "lists.json").write_text(json.dumps([{"caption": TEXTS}]))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TEXTS).encode())
    (tmp_path / "a.csv").write_text(
        "\ufefffilepath,title\n" + "".join(f'img_{i}.jpg,"{t}"\n' for i, t in enumerate(TEXTS))
    )
    (tmp_path / "a.tsv").write_text("url\tTEXT\n" + "".join(f"http://x/{i}\t{t}\n" for i, t in enumerate(TEXTS)))
    pq.write_table(pa.table({"URL": ["http://x"] * 2, "TEXT": TEXTS}), tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "s[1].tar", "w") as tar:
        for i, text in enumerate(TEXTS):
            add_to_tar(tar, f"{i}.jpg", encode(noise(i)))
            add_to_tar(tar, f"{i}.txt", text.encode())
    write_array_record(tmp_path / "a.array_record", [{**r, "captions": [t]} for r, t in zip(records(2), TEXTS)])
    return tmp_path


def test_captions_of_every_kind(files):
    names = sorted(p.name for p in files.iterdir())
    assert len(names) == 9
    for name in names:
        assert read([str(files / name)]) == (TEXTS, {}), name
    assert read([f"{files}/a.{{csv,json}}", f"{files}/a.txt"])[0] == TEXTS * 3


def test_what_has_no_captions_is_named(files):
    (files / "b.json").write_text(json.dumps([{"caption": "x"}, {"words": "y"}, {"caption": 3}, 5, {"Text": ["z"]}]))
    assert read([str(files / "b.json")]) == (["x", "z"], {"no `caption`": 2, "malformed caption": 1})
    assert read([str(files / "b.json")], "words")[0] == ["y"]
    for name, content, message in (
        ("c.json", b'[{"words": "y"}]', "no list of rows with a `caption` .no `caption`"),
        ("c.json", b'{"caption": "x"}', "one object, not a list"),
        ("c.json", b"[1", ", not JSON"),
        ("c.json", b"[" * 99_999, ", not JSON"),
        ("c.csv", b"filepath,words\na,b\n", r"its columns are \['filepath', 'words'\]: set --caption_key"),
        ("c.parquet", b"PAR1" + bytes(50), "is not Parquet"),
        ("c.bin", b"\x89PNG\xff\xfe", "is no UTF-8 text"),
        ("c.bin", b"a\0b", "is no text"),
        ("c.gz", b"\x1f\x8b", "is compressed"),
        ("c.txt", b"", "no list of rows"),
    ):
        (files / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}'? .*{message}") as e:
            read([str(files / name)])
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="is a folder: name its files"):
        read([str(files)])


def test_a_vocabulary_from_a_table(files, capsys):
    out = files / "vocab.txt"
    assert main.main(["vocab", f"--captions={files / 'a.csv'}", "--size=60", f"--out={out}"]) == 0
    assert "60 entries from 2 captions" in capsys.readouterr().out
    assert not any("jp" in word or "img" in word for word in out.read_text().split())
