"""What a CapFilt run reads, and its summary, without a model: pictures alone, and crawls that share names."""

import json
import tarfile

from world.pictures import add_to_tar, encode, noise

from blip_jax import config
from blip_jax.capfilt import decisions, shards, summary
from blip_jax.capfilt.decisions import Row
from blip_jax.capfilt.input import Records
from blip_jax.data.batches import open_all


def test_pictures_alone_and_crawls_of_the_same_names(tmp_path):
    for crawl in ("a", "b"):
        (tmp_path / crawl).mkdir()
        with tarfile.open(tmp_path / crawl / "0.tar", "w") as tar:
            add_to_tar(tar, "0.jpg", encode(noise(0)))
    (tmp_path / "0.jpg").write_bytes(encode(noise(1)))
    (tmp_path / "l.json").write_text(json.dumps([{"image": "0.jpg"}]))
    sources = {
        "crawls": config.source("tar", str(tmp_path / "*" / "0.tar")),
        "list": config.source("json", str(tmp_path / "l.json")),
        "other": config.source("tar", str(tmp_path / "a" / "0.tar")),
    }
    sources = open_all(sources, texts=False)
    plan = shards.Plan({name: len(source) for name, source in sources.items()}, 10)
    data = Records(config.capfilt(), sources, plan, [0], (16,))
    examples = [data.example(i) for i in range(4)]
    assert all(e["texts"] == [] and e["reason"] == "" and e["img"][16].shape == (16, 16, 3) for e in examples)
    keys = ["crawls:a/0.tar/0", "crawls:b/0.tar/0", "list:l.json#0:0.jpg", "other:0.tar/0"]
    assert [e["key"] for e in examples] == keys
    assert [e["fields"]["image_id"] for e in examples] == [*keys[:2], "list:0.jpg", keys[3]]

    # their synthetic texts alone are decided on
    rows = [
        row
        for e in examples
        for row in decisions.judge([Row(e["key"], e["dataset"], e["record"], "a ring", "synthetic", 0.9, 0.1)], 0.5)
    ]
    shards.folder(tmp_path, 0).mkdir(parents=True)
    decisions.write(shards.folder(tmp_path, 0) / shards.TABLE, rows)
    found = summary.finish(tmp_path, 1, 0.5)
    assert found["images"] == 4 and found["web"]["texts"] == 0 and found["kept"] == {**found["kept"], "images": 4}
