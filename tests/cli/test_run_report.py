"""`blip-jax report`: what the page of a run holds, of runs that are whole, going on, odd, or of CapFilt."""

import json
import re

import pytest
from world.pictures import encode, noise
from world.runs import begun

from blip_jax.capfilt import decisions, shards, summary
from blip_jax.capfilt.decisions import Row
from blip_jax.cli import main
from blip_jax.cli.report import page, records, samples
from blip_jax.config import source

HOSTILE = "<script>alert(1)</script>"


def written(cfg, workdir, rows):
    """A workdir without a checkpoint: settings, a log whose last line is being written, what a start said."""
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(cfg.to_json())
    lines = [json.dumps({"step": i, "time": f"2026-01-01T00:0{i % 10}:00+00:00"} | row) for i, row in rows.items()]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "tr')
    said = ["blip_jax 0, jax 1", "1 processes, 8 devices of kind cpu, mesh {}", f"parameters: {HOSTILE}", "config {}"]
    (workdir / "start.txt").write_text("\n\n".join([*said, "parameters: of the table"]) + "\n")
    return workdir


def report(workdir, *flags) -> str:
    assert main.main(["report", f"--workdir={workdir}", *flags]) == 0
    return (workdir / "report.html").read_text()


def test_a_log_becomes_curves_and_tables(tiny_cfg, tmp_path, capsys):
    rows = {
        2: {"train/loss": 4.25, "train/lr": 1e-7, "train/goodput": 0.5, "train/examples_crc": 7},
        4: {"train/loss": 3.125, "train/lr": 3e-7, "train/goodput": 0.75, "train/examples_crc": 8},
        5: {"eval/r_mean": 31.256, "eval/images": 20, "eval/none": 1.0, "eval/loss": 4.5},
        6: {"eval/r_mean": 33.5, "eval/images": 20, "eval/none": 1.0, "eval/loss": 4.25},
    }
    run = written(tiny_cfg, tmp_path / f"a {HOSTILE[1:7]}", rows)
    (run / "evaluation.json").write_text(json.dumps({"checkpoint": HOSTILE, "r_mean": 12.34, "pictures": 8}))
    text = report(run)
    assert "without samples: data.eval is empty" in capsys.readouterr().out and "There are none: data.eval" in text
    assert HOSTILE not in text and text.count("&lt;script&gt;") == 2 and "of the table" not in text
    assert "4.250 → 3.125" in text and "62.5\u202f%" in text and "4 min 0 s" in text and "6 of 6" in text
    assert re.findall(r"<figcaption>(.*?)</figcaption>", text) == ["loss", "r_mean", "lr", page.SPEED["goodput"]]
    assert "<th scope=\"col\">step 5</th>" in text and "<td>31.26</td><td>33.50</td>" in text  # fmt: skip
    assert "<td>20</td><td>20</td>" in text and "<td>12.34</td>" in text and "<td>8</td>" in text
    assert "in training: 4.250 at 2, 3.125 at 4; on data.eval: 4.500 at 5, 4.250 at 6" in text
    assert text.count('class="line s1"') == 2 and "on data.eval, without dropout and augmentation" in text
    assert ">1.5e-07<" in text  # a tick of the learning rate
    assert '<th scope="row">train.batch</th><td>16</td><td>2880</td>' in text
    assert "data.train.world.count" in text and "data.train.world.noise" not in text  # 64 is none of a source's own


def test_settings_are_compared_with_a_file(tiny_cfg, tmp_path):
    run = written(tiny_cfg, tmp_path, {1: {"train/loss": 1.0}})
    other = tiny_cfg.copy_and_resolve_references().unlock()
    other.train.batch = 32
    del other.data.train["world"]
    found = records.read(run, other)
    assert [d for d in found.differences if d.leaf == "train.batch"] == [("train.batch", 16, 32)]
    assert {d.leaf.rpartition(".")[0] for d in found.differences} == {"train", "data.train.world"}
    assert records.read(run, tiny_cfg).differences == []


def test_what_is_no_run_is_said(tmp_path, tiny_cfg):
    with pytest.raises(ValueError, match="has no config.json and no metrics.jsonl: give the --workdir of `blip-jax tr"):
        records.read(tmp_path)
    run = written(tiny_cfg, tmp_path, {1: {}, 2: {}})
    (run / "metrics.jsonl").write_text("no\n{}\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 1, is not JSON: 'no'"):
        records.read(run)


def test_a_pretraining_shows_captions_and_nearest_neighbours(tiny_cfg, tmp_path):
    with tiny_cfg.data.unlocked():
        tiny_cfg.data.eval.world = source("scenes", count=20, size=32, seed=1, captions=2)
    tiny_cfg.eval.max_length, tiny_cfg.eval.beams = 9, 2
    run = written(tiny_cfg, begun(tiny_cfg, tmp_path / "run"), {1: {"train/loss": 4.0}})
    text = report(run, "--samples=3")
    assert "There are none" not in text and "samples by</dt><dd>checkpoints/1</dd>" in text
    assert text.count('<article class="card">') == 3 and text.count('<article class="query">') == samples.QUERIES
    said = samples.of(records.read(run), 2)
    assert [len(card.people) for card in said.cards] == [2, 2] and all(card.said for card in said.cards)
    for query in said.queries:  # of 8 pictures
        scores = [score for _, _, score in query.found]
        assert scores == sorted(scores, reverse=True) and len(query.found) == samples.SHOWN
        assert sum(right for _, right, _ in query.found) <= 1
    assert len({data for query in said.queries for data, _, _ in query.found}) <= 2 * samples.AMONG


def test_records_of_every_kind_are_cards(tiny_cfg):
    picture = encode(noise(0, 600, 300), "PNG")
    asked = samples.card({"image": picture, "question": "what?", "answers": ["a", "a", "b"]}, "c", tiny_cfg)
    judged = {"images": [picture, picture], "sentence": "both", "label": False}
    assert asked[1:] == ("what?", "c", ["a", "a", "b"]) and asked.pictures[0].startswith(b"\xff\xd8\xff")
    assert samples.card(judged, True, tiny_cfg)[1:] == ("both", "True", ["False"])
    assert len(samples.card(judged, True, tiny_cfg).pictures) == 2
    text = page.cards(samples.Said([asked, samples.Card([], "", "", [HOSTILE])], [], "x"))
    assert "<p>what?</p><p><b>c</b></p><p><small>a</small><small>b</small></p>" in text
    assert "(empty)" in text and HOSTILE not in text


def test_a_capfilt_run_shows_what_it_kept_and_dropped(tmp_path):
    text = lambda i, source, itm: Row(f"k{i}", "web", i, f"text {i} {HOSTILE}", source, itm, 0.1)
    rows = [row for i in range(3) for row in decisions.judge([text(i, "web", 0.3 * i)], 0.5)]
    rows += decisions.judge([text(9, "synthetic", 0.875)], 0.5) + decisions.unreadable("k5", "web", 5, [], "torn: x")
    folder = shards.folder(tmp_path, 0)
    folder.mkdir(parents=True)
    decisions.write(folder / shards.TABLE, rows)
    (tmp_path / "summary.json").write_text(json.dumps(summary.summarise(tmp_path, 1, 0.5)))
    (tmp_path / "capfilt.json").write_text(json.dumps({"settings": {"seed": 42}}))
    shown = report(tmp_path)
    assert re.search(r'<th scope="row">web</th><td>3</td><td>1</td><td>2</td>', shown)
    assert "<li>1 torn</li>" in shown and "66.7\u202f%" in shown and "match 0.88, k9" in shown
    assert shown.count("text 0 &lt;script&gt;") == 1 and HOSTILE not in shown and "&quot;seed&quot;: 42" in shown
