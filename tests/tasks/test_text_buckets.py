"""Text length buckets: the same examples in other batches, the same losses on fewer positions."""

import collections
import contextlib
import functools
import shutil
import tarfile
import threading

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from world.pictures import add_to_tar, encode, noise, write_json

from blip_jax import checkpoint, config, tasks
from blip_jax.data import pairs, windows
from blip_jax.data.batches import TrainData
from blip_jax.data.formats import open_source
from blip_jax.data.formats.array_record import write_array_record
from blip_jax.data.source import BadRecord
from blip_jax.data.text.wordpiece import SPECIAL, Tokenizer
from blip_jax.parallel import sharding
from blip_jax.tasks.step import Keys
from blip_jax.train import loop, metrics, optim
from blip_jax.train import state as train_state

WORDS = [f"w{i}" for i in range(40)]
BUCKETS, W, B = (4, 6, 9, 12), 3, 12


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    return Tokenizer(path)


def caption(i: int) -> str:
    """1 to 12 words, more often few."""
    n = 1 + min(np.random.default_rng(i).geometric(0.25), 12) - 1
    return " ".join(WORDS[(i + k) % 40] for k in range(n))


def rows(n: int, first: int = 0) -> list[dict]:
    """n good records, every third with three captions."""
    return [
        {
            "key": f"{i:04d}",
            "image": encode(noise(i)),
            "image_id": f"id{i}",
            "captions": [caption(i + 1000 * k) for k in range(1 if i % 3 else 3)],
        }
        for i in range(first, first + n)
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """70 records as json, 30 as a tar shard; pictures of the json list's first three and the tar's first are broken."""
    folder = tmp_path_factory.mktemp("data")
    listed, sharded = rows(70), rows(30, 100)
    for r in (*listed[:3], sharded[0]):
        r["image"] = b"no picture"
    listed[5]["captions"] = [" "]
    with tarfile.open(folder / "a.tar", "w") as tar:
        for r in sharded:
            add_to_tar(tar, f"{r['key']}.jpg", r["image"])
            add_to_tar(tar, f"{r['key']}.txt", r["captions"][0].encode())
    return {
        "list": config.source("json", str(write_json(folder, listed)), weight=2.0),
        "shard": config.source("tar", str(folder / "a.tar")),
    }


def settings(sources, **leaves):
    cfg = config.base("tiny")
    with cfg.unlocked():
        cfg.data.train.update(sources)
        cfg.update_from_flattened_dict(
            {
                "model.img_size": 16,
                "text.max_len": 12,
                "train.batch": B,
                "data.threads": 2,
                "data.prefetch": 2,
                "seed": 3,
                "data.max_bad_share": 0.5,
                "text.buckets": BUCKETS,
                "text.bucket_window": W,
                **leaves,
            }
        )
    return cfg


def run(cfg, tok, path, n, start=0, process=0, count=1):
    data = TrainData(cfg, tok, pairs, process_index=process, process_count=count, skipped_path=path / "skipped.jsonl")
    with data.batches(start) as it:
        return [next(it) for _ in range(n)], data


def examples(batches) -> list[tuple]:
    """Every example as (key, picture, words)."""
    return [
        (key, img.tobytes(), ids[mask].tobytes())
        for b in batches
        for key, img, ids, mask in zip(b["key"], b["img"], b["ids"], b["txt_mask"])
    ]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


# --- order


def test_cut_into_batches_of_one_length():
    rng = np.random.default_rng(0)
    for lengths in (rng.integers(3, 13, 60), np.full(60, 4), rng.integers(11, 13, 60)):
        order, T = windows.cut(lengths, 6, BUCKETS)
        assert sorted(order.ravel().tolist()) == list(range(60)) and (np.diff(order, axis=1) > 0).all()
        shortest = [min(t for t in BUCKETS if t >= lengths[batch].max()) for batch in order]
        assert T.tolist() == shortest == sorted(shortest)
        by_length = np.sort(lengths).reshape(10, 6).max(axis=1)  # no other order needs fewer positions
        assert T.sum() == sum(min(t for t in BUCKETS if t >= n) for n in by_length)


def test_lengths_are_asked_for_once_and_spread_over_the_window_before():
    asked = []

    def length_of(numbers):
        asked.append(numbers.start // 5)
        return np.array([3 + i % 9 for i in numbers])

    plan = windows.Windows(length_of, batch=5, window=4, buckets=BUCKETS, seed=1, start_step=6, threads=2, ahead=2)
    with contextlib.closing(plan):
        seen = []
        for step in range(6, 13):
            seen.append(plan.batch(step)[0])
            assert max(asked) <= step + 4
        assert sorted(asked)[:8] == list(range(4, 12)) and len(set(asked)) == len(asked)
        assert sum(plan.shares(8).values()) == pytest.approx(1) and plan.batch(7)[0].tolist() == seen[1].tolist()
        assert sorted(np.concatenate(seen[2:6]).tolist()) == list(range(40, 60))


def test_a_window_holds_the_same_examples_with_and_without_buckets(sources, tok, tmp_path):
    cut, data = run(settings(sources), tok, tmp_path / "..", 4 * W)
    whole, plain = run(settings(sources, **{"text.buckets": ()}), tok, tmp_path, 4 * W)
    lengths = set()
    for w in range(0, 4 * W, W):
        a, b = (collections.Counter(examples(x[w : w + W])) for x in (cut, whole))
        replaced = sum((a - b).values())  # a replacement has to fit its batch
        assert a.total() == b.total() == W * B and replaced <= 3 and (w or replaced)
    for batch in cut:
        T, longest = batch["ids"].shape[1], batch["txt_mask"].sum(axis=1).max()
        assert batch["txt_mask"].shape == batch["lm_mask"].shape == (B, T) and T in BUCKETS and longest <= T
        # nothing was cut but by max_len
        assert (batch["ids"][np.arange(B), batch["txt_mask"].sum(axis=1) - 1] == tok.sep).all()
        lengths.add(T)
    assert len(lengths) > 2 and whole[0]["ids"].shape == (B, 12)
    assert sum(b["ids"].shape[1] for b in cut) < 0.8 * 12 * 4 * W
    assert data.counts()["skipped"].keys() == plain.counts()["skipped"].keys() == {"not a picture", "empty caption"}
    assert data.counts()["noted"] == plain.counts()["noted"]
    assert not [t for t in threading.enumerate() if t.name.startswith("text-lengths")]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_threads_and_restarts_see_the_same_batches(sources, tok, tmp_path, accumulate):
    leaves = {"optim.accumulate": accumulate}
    whole, _ = run(settings(sources, **leaves), tok, tmp_path, 2 * W)
    for count in (2, 3):
        parts = [run(settings(sources, **leaves), tok, tmp_path, 2 * W, 0, p, count)[0] for p in range(count)]
        for step, batch in enumerate(whole):
            for name, value in batch.items():
                value = np.asarray(value)
                local = [np.asarray(p[step][name]).reshape(accumulate, -1, *value.shape[1:]) for p in parts]
                np.testing.assert_array_equal(np.concatenate(local, axis=1).reshape(value.shape), value, err_msg=name)
    assert_same(
        run(settings(sources, **leaves, **{"data.threads": 4, "data.prefetch": 5}), tok, tmp_path, 2 * W)[0], whole
    )
    assert_same(run(settings(sources, **leaves), tok, tmp_path, W, start=W - 1)[0], whole[W - 1 : 2 * W - 1])
    other, _ = run(settings(sources, **leaves, seed=4), tok, tmp_path, 2 * W)
    # the order of lengths is shuffled with the seed
    assert [b["ids"].shape for b in other] != [b["ids"].shape for b in whole]


def test_a_prompt_counts(sources, tok, tmp_path):
    prompt = {"text.prompt": "w1 w2 ", "text.max_len": 14, "text.buckets": (6, 8, 14)}
    batches, _ = run(settings(sources, **prompt), tok, tmp_path, W)
    assert {b["ids"].shape[1] for b in batches} <= {6, 8, 14}
    for b in batches:
        assert not b["lm_mask"][:, :3].any() and b["lm_mask"][:, 3:5].all()
    short = settings(sources, **prompt | {"text.buckets": (4, 14), "objective": "caption"})
    with pytest.raises(
        ValueError, match=r"text.prompt='w1 w2 ' takes 3 of the shortest of text.buckets=4 .* text.buckets to 5"
    ):
        tasks.validate(short, tok)


def test_a_replacement_is_cut_and_noted_where_no_record_fits(tok, tmp_path):
    listed = [{**r, "captions": [" ".join(WORDS[:9])]} for r in rows(2 * B)]
    for r in listed[:B]:
        r.update(image=b"no picture", captions=["w1"])
    source = config.source("json", str(write_json(tmp_path, listed)))
    cfg = settings({"list": source}, **{"text.bucket_window": 2, "data.max_bad_share": 1.0})
    batches, data = run(cfg, tok, tmp_path, 2)
    assert sorted(b["ids"].shape[1] for b in batches) == [4, 12]
    short = min(batches, key=lambda b: b["ids"].shape[1])
    assert short["ids"].tolist() == [[tok.cls, *tok.encode(["w0 w1"], 4)[0][0, 1:3].tolist(), tok.sep]] * B
    ((note, n),) = data.counts()["noted"].items()
    assert note.startswith("text cut") and n == B


def test_captions_without_pictures(sources, tmp_path):
    world = config.source("scenes", count=20, size=32, captions=2, noise=0.5)
    for source in (*sources.values(), world):
        opened = open_source("x", source)
        assert [opened.captions_of(i) for i in range(len(opened))] == [
            opened[i]["captions"] for i in range(len(opened))
        ]
    broken = tmp_path / "list.json"
    broken.write_text(
        '[{"image": "a.jpg", "caption": "a"}, {"image": 7, "caption": "b"}, {"image": "a.jpg", "caption": 5}, oops]'
    )
    opened = open_source("x", config.source("json", str(broken)))
    for i in (1, 2, 3):
        reasons = []
        for read in (opened.captions_of, opened.__getitem__):
            with pytest.raises(BadRecord) as e:
                read(i)
            reasons.append((e.value.key, e.value.reason.split(":")[0]))
        assert reasons[0][0] == reasons[1][0] and reasons[0][1].startswith("malformed")


def test_sources_whose_texts_come_with_pictures_are_refused(sources, tok, tmp_path):
    write_array_record(tmp_path / "b.ar", rows(3))
    with pytest.raises(
        ValueError, match=r"without their pictures.*: packed\. Give these as json or tar, or set text.buckets=\(\)"
    ):
        run(settings(sources | {"packed": config.source("array_record", str(tmp_path / "b.ar"))}), tok, tmp_path, 1)


@pytest.mark.parametrize(
    "leaves, expected",
    [
        ({"text.buckets": (8, 11)}, r"text.buckets is \(8, 11\): .* text.max_len = 12, as \(12\)"),
        ({"text.buckets": (8, 8, 12)}, r"text.buckets is \(8, 8, 12\): give ascending"),
        ({"text.buckets": (2, 12)}, "at least 3 positions"),
        ({"text.buckets": (7.5, 12)}, "whole numbers"),
        ({"text.bucket_window": 0}, "text.bucket_window is 0: it must be at least 1"),
        (
            {"loss.smoothing_over": "all"},
            "loss.smoothing_over is 'all' but text.buckets is set: .* set loss.smoothing_over='valid'",
        ),
    ],
)
def test_settings_that_do_not_fit(tiny_cfg, leaves, expected):
    tiny_cfg.text.buckets = (8, 12)
    tasks.validate(tiny_cfg)
    tiny_cfg.update_from_flattened_dict(leaves)
    with pytest.raises(ValueError, match=expected):
        tasks.validate(tiny_cfg)


# --- losses


@pytest.fixture(scope="module")
def model_and_state():
    """A model with every part, without dropout, and a state of random numbers with momentum encoder and queue."""
    cfg, rng = config.base("tiny"), np.random.default_rng(5)
    with cfg.unlocked():
        cfg.model.update(img_size=16, embed_dim=16, dtype="float32", dropout=0.0)
        cfg.model.vit.depth = cfg.model.med.layers = 1
        cfg.loss.queue = cfg.train.batch = 8
    model, (tx, _) = tasks.build(cfg), optim.make(cfg, 5)
    shapes = jax.eval_shape(functools.partial(train_state.create, cfg, model, tx), jax.random.key(0))
    params, momentum = jax.tree.map(
        lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), (shapes.params, shapes.extra)
    )
    return cfg, model, params | {"temp": np.float32(0.07)}, momentum


@pytest.mark.parametrize("objective", ["pretrain", "retrieval", "caption"])
def test_a_batch_cut_to_its_bucket_gives_the_same_losses_and_gradients(model_and_state, objective):
    (cfg, model, params, extra), rng = model_and_state, np.random.default_rng(0)
    txt_mask = np.arange(30) < rng.integers(3, 13, (8, 1))
    padded = {
        "img": rng.normal(size=(8, 16, 16, 3)).astype(np.float32),
        "txt_mask": txt_mask,
        "ids": np.where(txt_mask, rng.integers(5, 118, (8, 30)), 0).astype(np.int32),
        "lm_mask": txt_mask & (np.arange(30) >= 2),
        "image_id": np.arange(8, dtype=np.int32) // 2,
    }
    cut = padded | {name: padded[name][:, :12] for name in ("ids", "txt_mask", "lm_mask")}
    extra = extra | {"alpha": 0.4} if objective == "pretrain" else None
    task, keys = tasks.of(ConfigDict({"objective": objective})), Keys(jax.random.key(2), jax.random.key(3), 0)

    @jax.jit
    def loss(params, batch):
        of = lambda p: task.loss(model, cfg, p, extra, batch, keys)
        if objective == "retrieval":  # its gradients are those of pre-training's ITC and ITM
            return of(params), {}
        return jax.value_and_grad(of, has_aux=True)(params)

    with jax.set_mesh(sharding.make_mesh(cfg.mesh, jax.devices()[:1])):
        a, b = (jax.tree.map(np.asarray, loss(params, batch)) for batch in (padded, cut))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    ((total, _), grads) = a
    assert total > 1 and (objective == "retrieval" or max(np.abs(x).max() for x in jax.tree.leaves(grads)) > 0.01)


def test_a_captioner_compiles_each_length_once_and_resumes_within_a_window(tiny_cfg, tmp_path, capsys):
    cfg = tiny_cfg
    cfg.objective = "caption"
    cfg.model.dropout, cfg.optim.freeze = 0.0, ("vit/.*",)  # less to compile
    cfg.text.update(prompt="a picture of ", max_len=40, buckets=(36, 40), bucket_window=4)
    cfg.train.log_every = 1
    first = loop.fit(cfg, tmp_path)
    said = capsys.readouterr().out
    shapes = {line.split("texts of ")[1] for line in said.splitlines() if ": compiling the step for texts of" in line}
    assert said.count(": compiling the step for texts of") == len(shapes) == 2
    assert "texts of the batches of steps 1 to 4: 36 positions 25 % " in said and "FLOPs: at most" in said
    log = {row["step"]: row for row in metrics.drop_after(tmp_path / "metrics.jsonl", 6)}
    assert {row["train/text_positions"] for row in log.values()} == {36, 40}
    shutil.rmtree(tmp_path / checkpoint.SUBDIR / "6")
    again = loop.fit(cfg, tmp_path)
    assert again["log"]["loss"] == first["log"]["loss"] and again["log"]["examples"] == first["log"]["examples"]
    resumed = {row["step"]: row for row in metrics.drop_after(tmp_path / "metrics.jsonl", 6)}
    assert {s: r["train/loss"] for s, r in resumed.items()} == {s: r["train/loss"] for s, r in log.items()}
    assert "texts of the batches of steps 1 to 4" in capsys.readouterr().out
