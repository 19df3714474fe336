"""The CapFilt run in one process: decisions, scores, shards, what is refused, other thresholds."""

import collections
import errno
import functools
import json
import os
import re
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from world.bucket import tree
from world.capfilt import save_model, save_models, settings, web_records
from world.pictures import encode, noise

from blip_jax import checkpoint, config, lock
from blip_jax.capfilt import decisions, shards
from blip_jax.capfilt import run as capfilt_run
from blip_jax.capfilt import settings as run_settings
from blip_jax.capfilt.refilter import refilter
from blip_jax.capfilt.run import run
from blip_jax.cli import main
from blip_jax.data import ledger, pairs
from blip_jax.data.batches import TrainData
from blip_jax.data.formats import open_source
from blip_jax.data.formats.array_record import write_array_record
from blip_jax.data.image import decode, eval_transform
from blip_jax.data.ledger import Ledger
from blip_jax.data.text.clean import clean_caption
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.inference import programs
from blip_jax.models.vision.vit import normalize_pixels
from blip_jax.tasks import build


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


@pytest.fixture
def models(tiny_cfg, world):
    if not (world / "captioner").exists():
        save_models(tiny_cfg, world)
    return {name: world / name for name in ("captioner", "filter")}


@pytest.fixture
def cfg(models, world):
    return settings(models, world)


@pytest.fixture
def finished(cfg, world):
    """The folder of a finished run on eight devices, made by the first test that needs it, and its summary."""
    if not (world / "out").exists():
        run(cfg, world / "out")
    return world / "out"


def rows_of(out) -> list[decisions.Row]:
    return [row for p in sorted((out / "shards").iterdir()) for row in decisions.rows_of(p / "decisions.parquet")]


def kept_of(out, source: str) -> dict[str, list[str]]:
    """key in the tables -> captions of the records of one output source."""
    src = open_source(source, config.source("array_record", f"{out}/shards/*/{source}.array_record"))
    return {in_table(src[i]["key"]): src[i]["captions"] for i in range(len(src))}


def in_table(key: str) -> str:
    """The key in the tables of a record of the output, which is a source with a name of its own, web or synthetic."""
    return re.sub("^(web|synthetic):(?=web:|world:)", "", key)


# --- the decisions


def test_every_text_has_a_row_and_a_reason(finished):
    rows, records = rows_of(finished), web_records()
    assert [r.record for r in rows if r.dataset == "web"] == sorted(r.record for r in rows if r.dataset == "web")
    assert {r.key for r in rows} == {f"web:{r['key']}" for r in records} | {f"world:scene-0-{i}" for i in range(9)}
    by_key = collections.defaultdict(list)
    for row in rows:
        by_key[row.key].append(row)
    for key, own in by_key.items():
        synthetic = [r for r in own if r.source == "synthetic"]
        assert own == [r for r in own if r.source == "web"] + synthetic
        assert len(synthetic) == (0 if key == "web:web-5" else 2)
        assert all((r.log_prob is None) == (r.source == "web") for r in own)
        texts = [r.text for r in own if r.reason in ("matched", "below threshold")]
        assert len(set(texts)) == len(texts) and set(texts) == {r.text for r in own if r.text} - {
            r.text for r in own if r.reason.startswith("unreadable")
        }
    web = lambda key: [(r.text, r.reason) for r in by_key[key] if r.source == "web"]
    assert web("web:web-0") == [("", "empty caption")]
    assert web("web:web-1")[0][0] == "a small square" and web("web:web-1")[1] == ("a small square", "repeated")
    assert web("web:web-3") == []  # no web caption, but two synthetic ones
    assert web("web:web-5") == [
        ("a cut picture", "unreadable: truncated picture"),
        ("of a ring", "unreadable: truncated picture"),
    ]
    assert [t for t, _ in web("web:web-6")] == [
        "a red star, number 6",
        "a red circle, number 6",
        "a red circle, number 6",
    ]
    for row in rows:
        assert row.kept == (row.reason == "matched")
        assert (row.itm is None) == (row.reason == "empty caption" or row.reason.startswith("unreadable"))
        if row.reason in ("matched", "below threshold"):
            assert row.kept == (row.itm >= 0.85)
    assert {r.reason for r in rows if r.source == "web"} >= {"matched", "below threshold"}
    assert {r.reason for r in rows if r.source == "synthetic"} >= {"matched", "below threshold"}
    skipped = [json.loads(line) for line in (finished / "skipped.jsonl").read_text().splitlines()]
    assert [(s["source"], s["key"], s["used"]) for s in skipped] == [
        ("web", "web:web-4", True),
        ("web", "web:web-5", False),
    ]
    assert skipped[0]["reason"] == "NUL characters removed" and skipped[1]["reason"].startswith("truncated picture: ")


def test_table_is_plain_parquet(finished):
    table = pq.read_table(finished / "shards" / "00000" / "decisions.parquet")
    assert table.schema == decisions.SCHEMA
    assert sorted(p.name for p in (finished / "shards").iterdir()) == ["00000", "00001", "00002"]
    assert not (finished / "unfinished").exists()


def test_scores_and_captions_are_those_of_the_models_one_by_one(cfg, models, finished):
    """Each text against its image alone, without cache, sharing or batch."""
    tokenizer = Tokenizer(models["filter"] / "vocab.txt")
    made, judge = (
        (build(ConfigDict(checkpoint.load_config(models[n]))), checkpoint.load_params(models[n]))
        for n in ("captioner", "filter")
    )
    captioner = jax.jit(programs.captioner(made[0], tokenizer, cfg.text.prompt, run_settings.method_of(cfg)))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def apply(model, method, params, *args):
        return model.apply({"params": params}, *args, method=method)

    sources = {name: open_source(name, s) for name, s in cfg.data.sources.items()}
    prompt = programs.prompt_ids(tokenizer, cfg.text.prompt)
    scored = [r for r in rows_of(finished) if r.itm is not None]
    assert len(scored) > 60
    for row in scored[::2]:
        picture = decode(sources[row.dataset][row.record]["image"], 10**6)[0]
        tok = apply(judge[0], "encode_image", judge[1], normalize_pixels(eval_transform(picture, 24)[None]))
        ids, mask = tokenizer.encode([row.text], 14)
        logits = apply(judge[0], "match", judge[1], ids, mask, apply(judge[0], "image_kv", judge[1], tok))
        np.testing.assert_allclose(row.itm, jax.nn.softmax(logits)[0, 1], atol=3e-6)
        txt, img = (
            apply(judge[0], "encode_text", judge[1], ids, mask)[1],
            apply(judge[0], "project_image", judge[1], tok),
        )
        np.testing.assert_allclose(row.itc, (txt @ img.T)[0, 0], atol=1e-6)
    for key in ("web:web-4", "world:scene-0-3"):
        own = [r for r in rows_of(finished) if r.key == key and r.source == "synthetic"]
        picture = decode(sources[own[0].dataset][own[0].record]["image"], 10**6)[0]
        img = eval_transform(picture, 16)[None]
        out = jax.device_get(captioner(made[1], img, programs.example_key(key, cfg.seed)[None]))
        kv = apply(made[0], "image_kv", made[1], apply(made[0], "encode_image", made[1], normalize_pixels(img)))
        for row, ids, log_prob in zip(own, out["ids"][0], out["log_prob"][0]):
            assert row.text == clean_caption(programs.text_of(tokenizer, ids, len(prompt)), 30)
            logits = apply(made[0], "lm_logits", made[1], ids[None], np.ones((1, len(ids)), bool), kv)[0]
            each = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[1:, None], axis=1)[:, 0]
            written = (ids[1:] != tokenizer.pad) & (np.arange(1, len(ids)) >= len(prompt))
            np.testing.assert_allclose([row.log_prob, log_prob], float(each[written].sum()), rtol=1e-5)


def test_shards_are_what_the_table_says_and_train(cfg, finished, tiny_cfg, models, tmp_path):
    rows, sources = rows_of(finished), {name: open_source(name, s) for name, s in cfg.data.sources.items()}
    for source in ("web", "synthetic"):
        expected = collections.defaultdict(list)
        for row in rows:
            if row.kept and row.source == source:
                expected[row.key].append(row.text)
        assert kept_of(finished, source) == expected
        src = open_source(source, config.source("array_record", f"{finished}/shards/*/{source}.array_record"))
        places = {row.key: (row.dataset, row.record) for row in rows}
        for i in range(len(src)):
            record = src[i]
            dataset, number = places[in_table(record["key"])]
            original = sources[dataset][number]
            assert record["image"] == original["image"] and record["image_id"].split(":")[-1] == original["image_id"]
            assert set(record) == set(original)  # also what only this source has: "from", "truth"
    with tiny_cfg.data.unlocked():
        tiny_cfg.data.train = ConfigDict(
            {s: config.source("array_record", f"{finished}/shards/*/{s}.array_record") for s in ("web", "synthetic")}
        )
    data = TrainData(
        tiny_cfg,
        Tokenizer(tiny_cfg.text.vocab),
        pairs,
        process_index=0,
        process_count=1,
        skipped_path=tmp_path / "skipped.jsonl",
    )
    with data.batches() as batches:
        keys = [key for _ in range(4) for key in next(batches)["key"]]
    assert data.counts()["skipped"] == {} and set(map(in_table, keys)) <= {r.key for r in rows if r.kept}


def test_summary_counts_what_the_tables_hold(finished):
    summary, rows = json.loads((finished / "summary.json").read_text()), rows_of(finished)
    assert summary["images"] == 20 and summary["unreadable"] == {"truncated picture": 1}
    rows = [r for r in rows if not r.reason.startswith("unreadable")]
    for source in ("web", "synthetic"):
        own, part = [r for r in rows if r.source == source], summary[source]
        assert part["reasons"] == dict(collections.Counter(r.reason for r in own))
        noise_rows = sum(r.reason in ("below threshold", "empty caption") for r in own)
        assert part["noise_ratio"] == noise_rows / sum(r.reason != "repeated" for r in own)
        lengths = collections.Counter(len(r.text.split()) for r in own if r.text)
        assert {int(k): v for k, v in part["lengths"].items()} == lengths
        assert part["mean_words"] == pytest.approx(sum(k * v for k, v in lengths.items()) / lengths.total())
        assert part["distinct_words"] == len({w for r in own for w in r.text.split()})
        assert sum(part["itm_histogram"]) == sum(r.itm is not None for r in own)
        assert [e["text"] for e in part["examples"]["kept"]] == [r.text for r in own if r.kept][:5]
    kept = [r for r in rows if r.kept]
    assert summary["kept"]["texts"] == len(kept) and summary["kept"]["images"] == len({r.key for r in kept})


# --- the same bytes


def on(count: int, monkeypatch) -> None:
    """Runs from here on take `count` of the eight devices."""
    few = jax.devices()[:count]
    monkeypatch.setattr(jax, "local_devices", lambda: few)


def test_one_device_makes_the_bytes_of_eight(cfg, finished, tmp_path, monkeypatch, capsys):
    on(1, monkeypatch)
    run(cfg, tmp_path / "out")
    line = r"capfilt: 21/21 images  [\d.]+ images/s  eta 0:00:00  noise so far: web ([\d.]+) %, synthetic ([\d.]+) %"
    noise_of = json.loads((finished / "summary.json").read_text())
    assert re.search(line, capsys.readouterr().out).groups() == tuple(
        f"{100 * noise_of[source]['noise_ratio']:.1f}" for source in ("web", "synthetic")
    )
    assert tree(tmp_path / "out") == tree(finished)


def test_processes_of_three_devices_share_the_shards_and_finished_ones_stay(
    cfg, finished, tmp_path, monkeypatch, capsys
):
    on(3, monkeypatch)
    out = tmp_path / "out"
    assert run(cfg, out, 1, 2) == {"stopped": False, "finished": 1, "shards": 3}
    stamp = (out / "shards" / "00001").stat().st_mtime_ns
    assert run(cfg, out, 2, 3) == {"stopped": False, "finished": 2, "shards": 3}
    summary = run(cfg, out, 0, 3)
    assert tree(out / "shards") == tree(finished / "shards") and (out / "shards" / "00001").stat().st_mtime_ns == stamp
    assert (
        summary == json.loads((out / "summary.json").read_text()) == json.loads((finished / "summary.json").read_text())
    )
    capsys.readouterr()
    assert run(cfg, out) == summary  # nothing is left to do
    printed = capsys.readouterr().out
    assert (
        "3 finished; process 0 of 1 makes 0" in printed
        and "CapFilt at threshold 0.85: 20 images, 1 unreadable" in printed
    )
    with pytest.raises(ValueError, match="process=2 of processes=2"):
        run(cfg, out, 2, 2)


def test_beam_search(cfg, tmp_path, monkeypatch):
    on(1, monkeypatch)
    cfg.method.kind, cfg.method.beams, cfg.method.repetition_penalty = "beam", 2, 1.0
    with cfg.data.unlocked():
        del cfg.data.sources["web"]
    run(cfg, tmp_path / "out")
    rows = [r for r in rows_of(tmp_path / "out") if r.source == "synthetic"]
    assert len(rows) == 18 and all(np.isfinite(r.log_prob) for r in rows)
    assert all(a.text != b.text for a, b in zip(rows[::2], rows[1::2]))


# --- other thresholds


def test_refilter_equals_a_run_with_that_threshold(cfg, finished, tmp_path, monkeypatch, capsys):
    scores = sorted(r.itm for r in rows_of(finished) if r.itm is not None)
    cfg.threshold = scores[2 * len(scores) // 3]  # exactly a score, which is kept
    run(cfg, tmp_path / "run")
    monkeypatch.chdir(tmp_path)  # relative paths of the run are not lost
    assert main.main(["capfilt", "refilter", f"--run={finished}", f"--threshold={cfg.threshold!r}", "--out=again"]) == 0
    assert tree(tmp_path / "run" / "shards") == tree(tmp_path / "again" / "shards") != tree(finished / "shards")
    for name in ("summary.json", "capfilt.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    refilter(finished, cfg.threshold, tmp_path / "again")
    with pytest.raises(ValueError, match="other settings:\n  settings.threshold: .* there, 0.9 here"):
        refilter(finished, 0.9, tmp_path / "again")


def test_nothing_kept_is_said_loudly(finished, tmp_path, capsys):
    assert max(r.itm for r in rows_of(finished) if r.itm is not None) < 1
    summary = refilter(finished, 1.0, tmp_path / "none")
    assert summary["kept"] == {"texts": 0, "images": 0, "distinct_words": 0, "mean_words": None, "lengths": {}}
    assert "WARNING: NOT ONE TEXT WAS KEPT" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no record"):
        kept_of(tmp_path / "none", "web")


def test_refilter_refuses(finished, cfg, models, tmp_path, capsys):
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="it must be between 0 and 1"):
            refilter(finished, value, tmp_path / "x")
    with pytest.raises(ValueError, match="the run itself"):
        refilter(finished, 0.5, finished)
    with pytest.raises(ValueError, match="capfilt.json cannot be read"):
        refilter(tmp_path / "nowhere", 0.5, tmp_path / "x")
    run_settings.settle(tmp_path / "begun", run_settings.read(finished))
    with pytest.raises(ValueError, match="is not finished, 3 of 3 shards are missing"):
        refilter(tmp_path / "begun", 0.5, tmp_path / "x")
    assert main.main(["capfilt", "refilter", "--threshold=0.5"]) == 2
    assert "blip-jax capfilt refilter needs --run and --out" in capsys.readouterr().err
    rows = web_records()
    moved = tmp_path / "moved"
    moved.mkdir()
    write_array_record(moved / "a.array_record", [rows[-1], *rows[:-1]])
    record = run_settings.read(finished)
    record["settings"]["data"]["sources"]["web"]["path"] = str(moved / "a.array_record")
    (tmp_path / "begun" / "capfilt.json").write_text(json.dumps(record))
    os.symlink(finished / "shards", tmp_path / "begun" / "shards")
    with pytest.raises(ValueError, match="record .* of source 'web' is 'web:web-.*', in the run it was 'web:web-.*'"):
        refilter(tmp_path / "begun", 0.0, tmp_path / "x")
    assert not list((tmp_path / "x" / "unfinished").glob("*")) and not (tmp_path / "x" / "shards" / "00000").exists()


# --- what is refused


def test_all_problems_of_a_config_at_once(tmp_path):
    c = config.capfilt()
    c.threshold, c.method.kind, c.dtype, c.device_batch, c.method.max_length = 1.5, "greedy", "float16", 0, 3
    with pytest.raises(ValueError) as e:
        run(c, tmp_path / "out")
    for part in (
        "has 8 problems",
        "threshold is 1.5: it must be between 0 and 1",
        "captioner is empty",
        "filter is empty",
        "method.kind is 'greedy'",
        "dtype is 'float16'",
        "device_batch is 0",
        "data.sources is empty",
        "method.max_length is 3",
    ):
        assert part in str(e.value)
    assert not (tmp_path / "out").exists()
    c.method.n, c.method.beams, c.method.length_penalty = 10**9, 2000, float("nan")
    with pytest.raises(ValueError) as e:
        run(c, tmp_path / "out")
    for part in (
        "method.n is 1000000000: it must be between 1 and 256",
        "method.beams is 2000: it must be between 1 and 64",
        "method.length_penalty is nan: it must be between -10 and 10",
    ):
        assert part in str(e.value)


def test_models_that_do_not_fit(cfg, models, tiny_cfg, tmp_path):
    cfg.captioner, cfg.filter = str(models["filter"]), str(models["captioner"])
    with pytest.raises(
        ValueError, match="captioner is .*, which cannot do caption: it has no text decoder; give a captioner"
    ):
        run(cfg, tmp_path / "out")
    cfg.captioner = cfg.filter
    with pytest.raises(
        ValueError,
        match="filter is .*, which cannot do match: it has no text encoder and no projections and no matching head",
    ):
        run(cfg, tmp_path / "out")
    cfg.filter = str(models["filter"])
    cfg.method.max_length = 4
    cfg.method.min_length = 1
    with pytest.raises(ValueError, match="method.max_length is 4: it must be more than the . tokens of text.prompt"):
        run(cfg, tmp_path / "out")
    vocab = open(tiny_cfg.text.vocab).read().splitlines()
    vocab[-2:] = vocab[:-3:-1]
    (tmp_path / "other.txt").write_text("\n".join(vocab) + "\n")
    tiny_cfg.text.vocab = str(tmp_path / "other.txt")
    cfg.filter = str(save_model(tiny_cfg, tmp_path / "other", 3))
    both = f"{models['captioner']}/vocab.txt and {tmp_path}/other/vocab.txt"
    with pytest.raises(ValueError, match=f"different vocabularies, {both}: fine-tune both"):
        run(cfg, tmp_path / "out")
    cfg.filter = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match="nothing' is no file or folder here"):
        run(cfg, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_may_move_whatever_its_source_is_called(cfg, tmp_path):
    def record(path):
        with cfg.data.unlocked():
            cfg.data.sources = ConfigDict(
                {"cc-12m": config.source("tar", path), "SBU (photos)": config.source("tar", path)}
            )
        model = {"path": "m", "crc32": 1}
        return run_settings.on_record(cfg, model, model, 1, {"cc-12m": 3, "SBU (photos)": 2})

    run_settings.settle(tmp_path, record("/here/*.tar"))
    run_settings.settle(tmp_path, record("/there/*.tar"))


def test_output_of_a_run_with_other_settings(cfg, models, finished, tmp_path):
    cfg.data.threads, cfg.data.max_bad_share = 1, 0.9
    cfg.captioner = str(shutil.copytree(models["captioner"], tmp_path / "moved"))
    before = tree(finished)
    run(cfg, finished)  # speed, patience and places may change
    other = run_settings.read(finished)
    other["captioner"]["crc32"] += 1
    with pytest.raises(ValueError, match="other settings:\n  captioner.crc32: "):
        run_settings.settle(finished, other)
    earlier = tmp_path / "earlier"  # begun before there was a leaf
    earlier.mkdir()
    other = run_settings.read(finished)
    del other["settings"]["data"]["upright"]
    (earlier / "capfilt.json").write_text(json.dumps(other))
    run_settings.settle(earlier, run_settings.read(finished))
    cfg.threshold, cfg.seed, cfg.data.sources.world.noise = 0.6, 1, 0.0
    with pytest.raises(ValueError) as e:
        run(cfg, finished)
    lines = str(e.value).splitlines()
    assert lines[0] == f"{finished} holds a CapFilt run with other settings:" and lines[1:-1] == [
        "  settings.data.sources.world.noise: 0.6 there, 0.0 here",
        "  settings.seed: 42 there, 1 here",
        "  settings.threshold: 0.85 there, 0.6 here",
    ]
    assert tree(finished) == before


@pytest.mark.parametrize("where", ["one shard", "two shards", "two processes"])
def test_duplicate_keys_name_both_places(where, cfg, world, tmp_path):
    rows = [{"key": f"k{i}", "image": encode(noise(i)), "captions": ["a ring"], "image_id": str(i)} for i in range(12)]
    rows[3 if where == "one shard" else 11]["key"] = "k1"
    write_array_record(tmp_path / "rows.array_record", rows)
    with cfg.data.unlocked():
        cfg.data.sources = ConfigDict({"rows": config.source("array_record", str(tmp_path / "rows.array_record"))})
    second = (
        "record 3 of source 'rows' (shard 00000)"
        if where == "one shard"
        else "record 11 of source 'rows' (shard 00001)"
    )
    begin = lambda: run(cfg, tmp_path / "out")
    if where == "two processes":
        assert run(cfg, tmp_path / "out", 1, 2)["finished"] == 1
        begin = lambda: run(cfg, tmp_path / "out", 0, 2)
    with pytest.raises(ValueError) as e:
        begin()
    places = ["record 1 of source 'rows' (shard 00000)", second]
    if where == "two processes":
        places.reverse()
    assert f"key 'rows:k1' occurs twice: {places[0]} and {places[1]}" in str(e.value)
    assert not (tmp_path / "out" / "summary.json").exists()
    assert not list((tmp_path / "out" / "unfinished").glob("*"))


def test_keys_of_many_shards(tmp_path, monkeypatch):
    """Found among shards of any order and size; two keys with one hash are not two equal keys."""

    def put(shard, names):
        writer = shards.ShardWriter(tmp_path, shard)
        writer.add(
            None, [decisions.Row(name, "d", i, "", "web", reason="empty caption") for i, name in enumerate(names)]
        )
        writer.commit()

    for shard in range(9):
        put(shard, [f"{shard}-{i}" for i in range(1 + 3 * shard % 5)])
    keys = shards.Keys(tmp_path)
    keys.add_finished(range(9))
    with pytest.raises(ValueError, match=r"'4-1' occurs twice: record 1 of source 'd' \(shard 00004\) and record 5"):
        keys.add(9, [("4-1", "d", 5, "matched")])
    keys.add(9, [("4-1", "d", 5, "unreadable: broken picture")])
    monkeypatch.setattr(shards, "_hash", lambda key: 1)
    keys = shards.Keys(tmp_path)
    keys.add_finished(range(9))
    with pytest.raises(ValueError, match="'8-0' occurs twice"):
        keys.add(9, [("8-0", "d", 0, "matched")])


def test_too_many_unreadable_records_stop_the_run(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ENOUGH", 5)
    cfg.data.max_bad_share = 0.01
    with pytest.raises(ValueError, match=r"1 of 8 records read .* more than data.max_bad_share=0.01"):
        run(cfg, tmp_path / "out")
    assert not list((tmp_path / "out" / "unfinished").glob("*")) and not list((tmp_path / "out").glob("shards/*"))


# --- output that cannot be written


def test_output_that_cannot_be_a_folder(cfg, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match="writing the settings in .* failed: .*Not a directory.*give a folder that can be written"
    ):
        run(cfg, tmp_path / "file" / "out")


def test_a_full_disk_leaves_nothing_and_the_run_goes_on_later(cfg, finished, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for place in ((shards, "_sync"), (Ledger, "add"), (decisions, "write")):
        with monkeypatch.context() as m:
            m.setattr(*place, full)
            with pytest.raises(
                OSError, match="writing .* in .*/out failed: .*No space left on device.*run the same command"
            ):
                run(cfg, tmp_path / "out")
        assert not list((tmp_path / "out" / "unfinished").glob("*")) and not list((tmp_path / "out").glob("shards/*"))
    run(cfg, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(finished)


def test_a_file_that_cannot_grow(tmp_path):
    """The record writer's own failure, from the operating system, is an OSError too."""
    row = decisions.Row("k", "d", 0, "text", "web", 0.9, 0.1, None, True, "matched")
    record = {"key": "k", "image": os.urandom(300_000), "captions": ["raw"], "image_id": "k"}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = shards.ShardWriter(tmp_path, 0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        with pytest.raises(OSError, match="writing shard 00000 in .* failed: .*File too large"):
            writer.add(record, [row])
            writer.commit()
        writer.drop()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(tmp_path) == {} and shards.finished(tmp_path, 1) == []
    writer = shards.ShardWriter(tmp_path, 0)
    writer.add(record, [row])
    writer.commit()
    assert shards.finished(tmp_path, 1) == [0] and kept_of(tmp_path, "web") == {"web:k": ["text"]}


def test_two_processes_with_one_number(tmp_path):
    shards.ShardWriter(tmp_path, 3).commit()
    second = shards.ShardWriter(tmp_path, 3)
    with pytest.raises(OSError, match="writing shard 00003"):
        second.commit()
    second.drop()
    assert sorted(tree(tmp_path / "shards" / "00003")) == [
        "decisions.parquet",
        "synthetic.array_record",
        "web.array_record",
    ]


def test_a_folder_in_use_is_left_alone(cfg, finished, tmp_path):
    """By another run, and by a process of the same number."""
    out = tmp_path / "out"
    for share in (None, lock.Share(0, 2)):
        with lock.held(out, share):
            with pytest.raises(ValueError, match=f"{out} is in use by process {os.getpid()} on host"):
                run(cfg, out, 0, 2)
            with pytest.raises(ValueError, match=f"{out} is in use by process"):
                refilter(finished, 0.5, out)
            assert [p.name.split(".")[0].split("-")[0] for p in out.iterdir()] == ["lock"]


def test_a_signal_stops_a_refilter_within_a_shard(cfg, finished, tmp_path, monkeypatch, capsys):
    out, shard_writer = tmp_path / "out", shards.ShardWriter

    def asked(folder, shard):
        if shard == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return shard_writer(folder, shard)

    with monkeypatch.context() as m:
        m.setattr(shards, "ShardWriter", asked)
        assert refilter(finished, 0.85, out) == {"stopped": True}
    assert [p.name for p in (out / "shards").iterdir()] == ["00000"] and not list((out / "unfinished").glob("0*"))
    assert "SIGTERM: dropping this shard, then stopping" in capsys.readouterr().out
    assert not refilter(finished, 0.85, out).get("stopped") and not list(out.glob("lock*"))


def test_a_signal_before_the_first_batch_stops_a_run(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(capfilt_run, "models", lambda cfg: os.kill(os.getpid(), signal.SIGINT))
    assert run(cfg, tmp_path / "out") == {"stopped": True} and not (tmp_path / "out").exists()


def test_scores_that_are_not_finite():
    row = decisions.Row("k", "d", 0, "text", "web", float("nan"), 0.1)
    with pytest.raises(ValueError, match="k of 'd': the filter's scores are not finite"):
        decisions.judge([row], 0.5)


def test_command_line(capsys, tmp_path):
    assert main.main(["capfilt", "--out=x"]) == 2
    assert "blip-jax capfilt needs --config" in capsys.readouterr().err
    (tmp_path / "c.py").write_text("from blip_jax.config import capfilt as get_config\n")
    assert main.main(["capfilt", f"--config={tmp_path}/c.py", "--out=x", "--process=1"]) == 2
    assert "give both --process and --processes" in capsys.readouterr().err
    assert main.main(["capfilt", f"--config={tmp_path}/c.py", f"--out={tmp_path}/x"]) == 2
    assert "captioner is empty" in capsys.readouterr().err
