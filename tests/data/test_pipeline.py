import collections
import json
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image
from world.pictures import add_to_tar, encode, noise, png_header, records, write_json

from blip_jax import config, tasks
from blip_jax.data import batches as P
from blip_jax.data import pairs
from blip_jax.data.evaluation import EvalData
from blip_jax.data.formats.array_record import write_array_record
from blip_jax.data.image import decode, eval_transform, train_transform
from blip_jax.data.text.wordpiece import SPECIAL, Tokenizer

VOCAB = list(SPECIAL) + ["picture", "number", "noise", "of", "seed", *"0123456789", *(f"##{i}" for i in range(10))]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n")
    return Tokenizer(path)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """40 good records, as a json source."""
    return config.source("json", str(write_json(tmp_path_factory.mktemp("web"), records(40))))


def settings(sources, batch=8, **leaves):
    cfg = config.base("tiny")
    with cfg.unlocked():
        cfg.model.img_size, cfg.text.max_len, cfg.train.batch = 16, 12, batch
        cfg.data.threads, cfg.data.prefetch = 2, 2
        cfg.data.train.update(sources)
        cfg.update_from_flattened_dict(leaves)
    return cfg


def make(cfg, tok, path, process=0, count=1):
    return P.TrainData(cfg, tok, pairs, process_index=process, process_count=count, skipped_path=path / "skipped.jsonl")


def run(data, steps, start=0):
    with data.batches(start) as it:
        return [next(it) for _ in range(steps)]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_array_equal(a[k], b[k], err_msg=k)


# --- batches


def test_a_batch(tok, web, tmp_path):
    cfg = settings({"web": web})
    batch = run(make(cfg, tok, tmp_path), 1)[0]
    assert {k: (v.shape, v.dtype) for k, v in batch.items() if k != "key"} == {
        "img": ((8, 16, 16, 3), np.uint8), "ids": ((8, 12), np.int32), "txt_mask": ((8, 12), bool),
        "lm_mask": ((8, 12), bool), "image_id": ((8,), np.int64)
    }  # fmt: skip
    for key, ids, mask in zip(batch["key"], batch["ids"], batch["txt_mask"]):
        n = int(key.split("/")[1][:4])
        assert tok.decode(ids).replace(" ", "") in (f"picturenumber{n}", f"noiseofseed{n}")
        assert ids[0] == tok.cls and ids[mask][-1] == tok.sep and (ids[~mask] == tok.pad).all()
    assert len(set(batch["image_id"].tolist())) == len(set(batch["key"])) == 8


@pytest.mark.parametrize("prompt, prompt_len", [("", 1), ("a picture of ", 4)])
def test_texts_begin_with_the_prompt_which_is_not_scored(tok, web, tmp_path, prompt, prompt_len):
    batch = run(make(settings({"web": web}, **{"text.prompt": prompt}), tok, tmp_path), 1)[0]
    plain = run(make(settings({"web": web}), tok, tmp_path), 1)[0]
    assert batch["key"] == plain["key"]
    np.testing.assert_array_equal(batch["img"], plain["img"])
    begin = tok.encode([prompt], 12)[0][0, :prompt_len]
    for ids, mask, scored, without in zip(batch["ids"], batch["txt_mask"], batch["lm_mask"], plain["ids"]):
        np.testing.assert_array_equal(ids[:prompt_len], begin)
        words = ids[prompt_len:][mask[prompt_len:]]  # caption and [SEP], the same as without a prompt
        np.testing.assert_array_equal(words, without[1 : 1 + len(words)])
        assert words[-1] == tok.sep and len(words) > 2
        np.testing.assert_array_equal(np.flatnonzero(scored), np.arange(prompt_len, prompt_len + len(words)))


def test_a_long_caption_after_the_prompt_is_cut_before_sep(tok, tmp_path):
    rows = [{**r, "captions": ["number noise of seed 1 2 3 4 5 6 7 8 9"]} for r in records(8)]
    cfg = settings({"web": config.source("json", str(write_json(tmp_path, rows)))}, **{"text.prompt": "a picture of "})
    batch = run(make(cfg, tok, tmp_path), 1)[0]
    assert (batch["ids"][:, -1] == tok.sep).all() and (batch["lm_mask"] == (np.arange(12) >= 4)).all()


def test_a_prompt_that_leaves_no_room(tok, web, tmp_path):
    leaves = {"text.prompt": "a picture of "}
    least = run(make(settings({"web": web}, **leaves, **{"text.max_len": 6}), tok, tmp_path), 1)[0]
    assert least["lm_mask"].sum(1).tolist() == [2] * 8
    with pytest.raises(
        ValueError, match=r"text.prompt='a picture of ' takes 4 of text.max_len=5 .* set text.max_len to 6"
    ):
        tasks.validate(settings({"web": web}, **leaves, **{"text.max_len": 5, "objective": "caption"}), tok)


def test_every_random_choice_comes_from_the_examples_own_stream(tok, web, tmp_path):
    cfg = settings({"web": web})
    data = make(cfg, tok, tmp_path)
    batch = run(data, 1, start=3)[0]
    for position, key in enumerate(batch["key"]):
        rng = np.random.Generator(np.random.Philox(key=np.array([cfg.seed, 3 * 8 + position], np.uint64)))
        record = data.sources["web"][int(key.split("#")[1].split(":")[0])]
        caption = record["captions"][rng.integers(len(record["captions"]))]
        im = decode(record["image"], 10**6)[0]
        img = train_transform(im, 16, rng, scale=cfg.data.crop_scale, flip=True, randaugment=True)
        np.testing.assert_array_equal(img, batch["img"][position])
        np.testing.assert_array_equal(tok.encode([caption], 12)[0][0], batch["ids"][position])


def test_order_does_not_depend_on_threads(tok, web, tmp_path):
    runs = [run(make(settings({"web": web}, **{"data.threads": n}), tok, tmp_path), 6) for n in (0, 1, 4)]
    for other in runs[1:]:
        for a, b in zip(runs[0], other):
            assert_same(a, b)


def test_seed_changes_order_and_augmentation(tok, web, tmp_path):
    a, b = (run(make(settings({"web": web}, seed=s), tok, tmp_path), 1)[0] for s in (1, 2))
    assert a["key"] != b["key"]
    assert not np.array_equal(a["img"], b["img"])


def test_every_epoch_covers_each_record_once_in_a_new_order(tok, web, tmp_path):
    data = make(settings({"web": web}), tok, tmp_path)
    assert data.epoch_examples == 40
    keys = [k for b in run(data, 15) for k in b["key"]]
    epochs = [keys[i : i + 40] for i in (0, 40, 80)]
    assert all(len(set(e)) == 40 for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert data.counts() == {"read": 120, "skipped": {}, "noted": {}}


def test_epoch_examples_from_the_config(tok, web, tmp_path):
    assert make(settings({"web": web}, **{"data.epoch_examples": 7}), tok, tmp_path).epoch_examples == 7


def test_captions_of_a_record_are_all_used(tok, web, tmp_path):
    batches = run(make(settings({"web": web}), tok, tmp_path), 50)
    texts = collections.defaultdict(collections.Counter)
    for b in batches:
        for key, ids in zip(b["key"], b["ids"]):
            texts[int(key.split("#")[1].split(":")[0])][tok.decode(ids)] += 1
    assert all(len(texts[i]) == 2 - i % 2 for i in range(40))
    first = sum(n for i in range(0, 40, 2) for t, n in texts[i].items() if t.startswith("picture"))
    assert 70 < first < 130  # of 200


def test_mixture_weights_and_epochs_within_a_source(tok, web, tmp_path):
    write_array_record(tmp_path / "b.ar", records(10))
    other = config.source("array_record", str(tmp_path / "b.ar"), weight=3.0)
    data = make(settings({"web": web, "other": other}), tok, tmp_path)
    assert data.epoch_examples == 50 and list(data.sources) == ["other", "web"]
    keys = [k for b in run(data, 40) for k in b["key"]]
    from_other = [k for k in keys if k.startswith("other:")]
    assert len(from_other) == 240  # 3 of 4, exactly
    for i in range(0, 240, 10):
        assert len(set(from_other[i : i + 10])) == 10
    for n in range(1, 41):  # spread evenly, not in runs
        assert abs(sum(k.startswith("other:") for k in keys[: 8 * n]) - 6 * n) <= 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_global_batch(tok, web, tmp_path, count, accumulate):
    cfg = settings({"web": web}, **{"optim.accumulate": accumulate})
    whole = run(make(cfg, tok, tmp_path), 3)
    parts = [run(make(cfg, tok, tmp_path, p, count), 3) for p in range(count)]
    for step, batch in enumerate(whole):
        for name, value in batch.items():
            value = np.asarray(value)
            local = [np.asarray(p[step][name]).reshape(accumulate, -1, *value.shape[1:]) for p in parts]
            np.testing.assert_array_equal(np.concatenate(local, axis=1).reshape(value.shape), value, err_msg=name)


def test_resume_equals_the_uninterrupted_run(tok, web, tmp_path):
    cfg = settings({"web": web})
    whole = run(make(cfg, tok, tmp_path), 12)
    for start in (1, 5, 11):  # epochs are 5 steps
        for a, b in zip(run(make(cfg, tok, tmp_path), 12 - start, start), whole[start:], strict=True):
            assert_same(a, b)


def test_far_steps_are_reached_at_once(tok, web, tmp_path):
    began = time.time()
    assert run(make(settings({"web": web}), tok, tmp_path), 1, start=10**9)[0]["img"].any()
    assert time.time() - began < 5


def test_close_ends_the_threads(tok, web, tmp_path):
    before = set(threading.enumerate())
    started = lambda: [t for t in threading.enumerate() if t.name.startswith("grain-prefetch") and t not in before]
    it = make(settings({"web": web}), tok, tmp_path).batches(0)
    next(it)
    assert started()
    it.close()
    it.close()
    deadline = time.time() + 5
    while started() and time.time() < deadline:
        time.sleep(0.01)
    assert not started()
    with pytest.raises(ValueError):
        next(it)


@pytest.mark.parametrize("batch, accumulate, count", [(8, 3, 1), (8, 1, 3), (8, 4, 4), (0, 1, 1)])
def test_batch_that_does_not_divide(tok, web, tmp_path, batch, accumulate, count):
    with pytest.raises(ValueError, match=f"train.batch={batch} does not divide"):
        make(settings({"web": web}, batch, **{"optim.accumulate": accumulate}), tok, tmp_path, 0, count)


def test_wrong_sources(tok, web, tmp_path):
    with pytest.raises(ValueError, match="no data source"):
        make(settings({}), tok, tmp_path)
    with pytest.raises(ValueError, match="weights must be above 0, got {'web': 0"):
        make(settings({"web": {**web, "weight": 0.0}}), tok, tmp_path)
    with pytest.raises(ValueError, match="process_index=2"):
        make(settings({"web": web}), tok, tmp_path, 2, 2)


# --- bad input


def write_everything_bad(folder):
    """Every kind of bad input beside 40 good records; returns {key: reason} of the skipped, and of the noted."""
    rows = json.loads(write_json(folder, records(40)).read_text())
    jpg, deep = encode(noise(9, 60, 40)), Image.fromarray(np.full((9, 9), 40_000, np.uint16))
    gif = encode(noise(1), "GIF", save_all=True, append_images=[noise(2), noise(3)])
    many_words = " ".join(["number"] * 10_000)
    files = {
        "truncated.jpg": (jpg[: len(jpg) // 2], "truncated picture", None),
        "zero.jpg": (b"", "empty image file", None),
        "bomb.png": (png_header(9_999, 9_999), "decompression bomb", None),
        "text.jpg": (b"this is no picture", "not a picture", None),
        "animated.gif": (gif, None, "animated picture, first frame used"),
        "cmyk.jpg": (encode(noise(1).convert("CMYK")), None, None),
        "grey.jpg": (encode(noise(1).convert("L")), None, None),
        "deep.png": (encode(deep, "PNG"), None, "16-bit picture, scaled to 8 bits"),
        "one.png": (encode(noise(1, 1, 1), "PNG"), None, "tiny picture"),
        "long.png": (encode(noise(1, 10_000, 10), "PNG"), None, "extreme aspect ratio"),
    }  # fmt: skip
    skipped, noted = {}, {}

    def add(image, caption, reason=None, note=None):
        key = f"web:list.json#{len(rows)}:{image}"
        rows.append({"image": image, "caption": caption})
        skipped.update({key: reason} if reason else {})
        noted.update({key: note} if note else {})

    for name, (data, reason, note) in files.items():
        (folder / "img" / name).write_bytes(data)
        add(f"img/{name}", "picture", reason, note)
    good = rows[0]["image"]
    add("img/absent.jpg", "picture", "missing file")
    add("../outside.jpg", "picture", "path leaves the image root")
    add(good, "", "empty caption")
    add(good, [" ", "...", "\u0007"], "empty caption")
    add(good, many_words, None, "long caption, cut to 30 words")
    add(good, "😀 🏖️ Привет 東京 مرحبا")
    add(good, "pic\0ture\0", None, "NUL characters removed")
    add(good, "picture \ud83d", None, "broken characters replaced")
    listing = json.dumps(rows)
    skipped[f"web:list.json#{len(rows)}"] = "malformed row"
    (folder / "list.json").write_text(f'{listing[:-1]}, {{"image": "{good}", "caption": oops}}]')
    (folder.parent / "outside.jpg").write_bytes(jpg)
    return len(rows) + 1, skipped, noted


def read_log(path):
    return [json.loads(line) for line in (path / "skipped.jsonl").read_text().splitlines()]


def test_train_goes_through_a_folder_of_everything_bad(tok, tmp_path):
    n, skipped, noted = write_everything_bad(tmp_path / "web")
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        for r in records(10):
            add_to_tar(tar, f"{r['key']}.jpg", r["image"])
            add_to_tar(tar, f"{r['key']}.txt", r["captions"][0].encode())
    whole = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"0009.jpg") + 700])
    sources = {
        "web": config.source("json", str(tmp_path / "web" / "list.json")),
        "cut": config.source("tar", str(tmp_path / "cut.tar")),
    }
    data = make(settings(sources, **{"data.max_bad_share": 0.5}), tok, tmp_path)
    assert len(data.sources["web"]) == n and len(data.sources["cut"]) == 10
    batches = run(data, -(-2 * n // 8) + 8)  # each source gives every second example: more than one epoch of both
    assert all(b["img"].shape == (8, 16, 16, 3) and b["txt_mask"].any(axis=1).all() for b in batches)
    log = read_log(tmp_path)
    assert {r["key"]: r["reason"].split(":")[0] for r in log if not r["used"]} == {
        **skipped,
        "cut:cut.tar/0009": "tar cut in the middle",
    }
    assert {r["key"]: r["reason"] for r in log if r["used"]} == noted
    assert {r["source"] for r in log} == {"web", "cut"}
    assert len(log) == len({(r["key"], r["reason"]) for r in log})  # once each, though met in several epochs
    counts = data.counts()
    assert counts["read"] == 8 * len(batches) + sum(counts["skipped"].values())
    assert set(counts["skipped"]) == {*skipped.values(), "tar cut in the middle"} and set(counts["noted"]) == set(
        noted.values()
    )
    delivered = {k for b in batches for k in b["key"]}
    assert not delivered & set(skipped) and set(noted) <= delivered
    assert {"web:list.json#45:img/cmyk.jpg", "web:list.json#46:img/grey.jpg"} <= delivered


def test_too_many_bad_records_stop_the_run(tok, tmp_path):
    write_everything_bad(tmp_path / "web")
    sources = {"web": config.source("json", str(tmp_path / "web" / "list.json"))}
    data = make(settings(sources, 4), tok, tmp_path)
    with pytest.raises(ValueError) as e, data.batches(0) as it:
        for _ in range(1000):
            next(it)
    counts = data.counts()
    bad = sum(counts["skipped"].values())
    assert 100 <= counts["read"] < 112 and bad > 0.05 * counts["read"]
    assert f"{bad} of {counts['read']} records read ({100 * bad / counts['read']:.1f} %)" in str(e.value)
    for part in ("data.max_bad_share=0.05", str(tmp_path / "skipped.jsonl"), "empty caption ("):
        assert part in str(e.value)


def test_few_bad_records_do_not_stop_a_small_run(tok, tmp_path):
    write_everything_bad(tmp_path / "web")
    sources = {"web": config.source("json", str(tmp_path / "web" / "list.json"))}
    # below 100 records, though the share is over the limit
    assert len(run(make(settings(sources), tok, tmp_path), 8)) == 8


def test_source_without_any_usable_record(tok, tmp_path):
    rows = [{**r, "image": b"no picture"} for r in records(5)]
    sources = {"web": config.source("json", str(write_json(tmp_path, rows)))}
    with pytest.raises(ValueError, match=r"100.0 %.*not a picture \(\d+\)"):
        run(make(settings(sources), tok, tmp_path), 1)
    with pytest.raises(ValueError, match="100 records in a row of source 'web'"):
        run(make(settings(sources, **{"data.max_bad_share": 1.0}), tok, tmp_path), 1)


def test_a_bad_record_touches_only_the_examples_that_drew_it(tok, tmp_path):
    rows = records(40)
    sources = {"web": config.source("json", str(write_json(tmp_path, rows)))}
    cfg = settings(sources, **{"data.max_bad_share": 0.5})
    good = run(make(cfg, tok, tmp_path), 10)
    (tmp_path / "img" / "0007.jpg").write_bytes(b"")
    bad = [run(make(cfg, tok, tmp_path), 10) for _ in range(2)]
    replaced = 0
    for a, b, again in zip(good, *bad):
        assert_same(b, again)
        for i, key in enumerate(a["key"]):
            if "img/0007" in key:
                replaced += 1
                assert "img/0007" not in b["key"][i]
            else:
                assert b["key"][i] == key
                np.testing.assert_array_equal(a["img"][i], b["img"][i])
    assert replaced == 2


def test_skipped_file_survives_restarts(tok, tmp_path):
    rows = records(40)
    rows[3]["image"] = rows[5]["image"] = b"x"
    sources = {"web": config.source("json", str(write_json(tmp_path, rows)))}
    cfg = settings(sources, **{"data.max_bad_share": 0.5})
    run(make(cfg, tok, tmp_path), 5)
    log = (tmp_path / "skipped.jsonl").read_text()
    assert sorted(r["key"] for r in read_log(tmp_path)) == [
        "web:list.json#3:img/0003.jpg",
        "web:list.json#5:img/0005.jpg",
    ]
    run(make(cfg, tok, tmp_path), 5)
    assert (tmp_path / "skipped.jsonl").read_text() == log
    first, second = log.splitlines(keepends=True)
    (tmp_path / "skipped.jsonl").write_text(first + second[:20])  # killed in the middle of a line
    run(make(cfg, tok, tmp_path), 5)
    assert (tmp_path / "skipped.jsonl").read_text() == first + second[:20] + "\n" + second


# --- orientation


def test_pictures_are_turned_where_it_is_asked_for(tok, tmp_path):
    """Orientation 6: red at the top of what is stored is red at the right of the picture."""
    stored, exif = Image.new("RGB", (40, 40)), Image.Exif()
    stored.paste((255, 0, 0), (0, 0, 40, 10))
    exif[0x0112] = 6
    rows = [r | {"image": encode(stored, exif=exif, quality=95)} for r in records(8)]
    sources = {"web": config.source("json", str(write_json(tmp_path, rows)))}
    for upright in (False, True):
        how = {"data.upright": upright, "data.crop_scale": (1.0, 1.0), "data.flip": False, "data.randaugment": False}
        cfg = settings(sources, **how)
        for img in (
            run(make(cfg, tok, tmp_path), 1)[0]["img"][0],
            next(EvalData(cfg, tok, sources, skipped_path=tmp_path / "s.jsonl").image_batches(1))["img"][0],
        ):
            red = img[..., 0].astype(int) - img[..., 1]
            assert (red[:, -2:].mean() > 150) == upright and (red[:2].mean() > 150) != upright


# --- evaluation


def test_eval_data(tok, tmp_path):
    rows = records(11)
    cfg = settings({})
    sources = {"val": config.source("json", str(write_json(tmp_path, rows)))}
    data = EvalData(cfg, tok, sources, skipped_path=tmp_path / "skipped.jsonl")
    assert data.n_images == 11
    assert data.captions == [c for r in rows for c in r["captions"]]
    assert data.text_image.dtype == np.int64
    assert data.text_image.tolist() == [i for i, r in enumerate(rows) for _ in r["captions"]]
    for _ in range(2):  # passes can be repeated
        batches = list(data.image_batches(4))
        assert [b["index"].tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, -1]]
        assert all(b["img"].shape == (4, 16, 16, 3) and b["img"].dtype == np.uint8 for b in batches)
        assert not batches[2]["img"][3].any()
        for b in batches:
            for img, i in zip(b["img"], b["index"]):
                if i >= 0:
                    im = decode(rows[i]["image"], 10**6)[0]
                    np.testing.assert_array_equal(img, eval_transform(im, 16))
    assert data.counts() == {"read": 11, "skipped": {}, "noted": {}}


def test_eval_data_limit_and_two_sources(tok, tmp_path):
    source = lambda name, n: config.source("json", str(write_json(tmp_path / name, records(n))))
    sources = {"a": source("a", 3), "b": source("b", 4)}
    cfg = settings({}, **{"eval.limit": 5})
    data = EvalData(cfg, tok, sources, skipped_path=tmp_path / "s.jsonl")
    assert data.n_images == 5 and data.text_image.max() == 4
    np.testing.assert_array_equal(
        next(data.image_batches(5))["img"][3],
        eval_transform(decode(records(1)[0]["image"], 10**6)[0], 16),
    )


def test_eval_data_with_bad_records(tok, tmp_path):
    rows = records(6)
    rows[1]["captions"], rows[3]["image"], rows[4]["captions"] = ["  "], b"x", ["picture", "..."]
    path = write_json(tmp_path, rows)
    (tmp_path / "img" / "0002.jpg").unlink()
    data = EvalData(
        settings({}), tok, {"val": config.source("json", str(path))}, skipped_path=tmp_path / "skipped.jsonl"
    )
    assert data.n_images == 4  # 0, 3, 4, 5
    assert data.captions == [*rows[0]["captions"], *rows[3]["captions"], "picture", *rows[5]["captions"]]
    for _ in range(2):
        assert [b["index"].tolist() for b in data.image_batches(3)] == [[0, -1, 2], [3, -1, -1]]
    assert data.counts()["skipped"] == {"empty caption": 1, "missing file": 1, "not a picture": 1}
    assert sorted(r["key"] for r in read_log(tmp_path)) == [f"val:list.json#{i}:img/000{i}.jpg" for i in (1, 2, 3)]


def test_eval_data_without_images(tok, tmp_path):
    rows = [{**r, "captions": [""]} for r in records(3)]
    with pytest.raises(ValueError, match="no record of .*'empty caption': 3"):
        EvalData(
            settings({}),
            tok,
            {"v": config.source("json", str(write_json(tmp_path, rows)))},
            skipped_path=tmp_path / "s",
        )


@pytest.mark.parametrize("ids", ["given", "absent"])
@pytest.mark.parametrize("order", ["one after another", "mixed"])
def test_rows_of_one_picture_are_evaluated_as_a_list_of_captions(tok, tmp_path, ids, order):
    rows = [{**r, "captions": [*r["captions"], f"seed {i}"]} for i, r in enumerate(records(5))]
    whole = json.loads(write_json(tmp_path, rows).read_text())
    split = [(n, {**row, "caption": c}) for row in whole for n, c in enumerate(row["caption"])]
    split = [row for _, row in (split if order == "one after another" else sorted(split, key=lambda pair: pair[0]))]

    def data(rows):
        path = tmp_path / f"{len(rows)}.json"
        path.write_text(json.dumps([{k: v for k, v in r.items() if ids == "given" or k != "image_id"} for r in rows]))
        sources = {"v": config.source("json", str(path))}
        return EvalData(settings({}), tok, sources, skipped_path=tmp_path / "skipped.jsonl")

    a, b = data(whole), data(split)
    assert a.n_images == b.n_images == 5 and a.captions == b.captions
    assert a.text_image.tolist() == b.text_image.tolist()
    for one, other in zip(a.image_batches(2), b.image_batches(2), strict=True):
        assert_same(one, other)


def test_evaluation_of_one_id_with_several_pictures(tok, tmp_path, caplog):
    rows = records(4)
    path = write_json(tmp_path, rows)
    table = json.loads(path.read_text())
    for row in table:
        row["image_id"] = 7
    path.write_text(json.dumps(table))
    (tmp_path / "img" / "0000.jpg").write_bytes(b"no picture")  # the next one of the same id counts
    source = {"v": config.source("json", str(path))}
    data = EvalData(settings({}), tok, source, skipped_path=tmp_path / "skipped.jsonl")
    assert data.n_images == 1 and data.captions == [c for r in rows for c in r["captions"]]
    assert "3 records bring another picture" in caplog.text
    picture = eval_transform(decode(rows[1]["image"], 10**6)[0], 16)
    np.testing.assert_array_equal(next(data.image_batches(1))["img"][0], picture)
    assert data.counts()["skipped"] == {"not a picture": 1}
    assert data.counts()["noted"] == {"another picture than the first of its image_id, which is used": 3}


def test_eval_limit_counts_pictures(tok, tmp_path):
    rows = [{**r, "image_id": f"id{i // 3}"} for i, r in enumerate(records(9))]
    source = {"v": config.source("json", str(write_json(tmp_path, rows)))}
    cfg = settings({}, **{"eval.limit": 2})
    data = EvalData(cfg, tok, source, skipped_path=tmp_path / "skipped.jsonl")
    assert data.n_images == 2 and data.captions == [c for r in rows[:6] for c in r["captions"]]


def test_sources_of_one_name_each_train_together(tok, tmp_path):
    for crawl in ("a", "b"):
        with tarfile.open(tmp_path / f"{crawl}.tar", "w") as tar:
            add_to_tar(tar, "0.jpg", encode(noise(0)))
            add_to_tar(tar, "0.txt", b"picture")
        (tmp_path / crawl).mkdir()
        (tmp_path / f"{crawl}.tar").rename(tmp_path / crawl / "0.tar")
    sources = {crawl: config.source("tar", str(tmp_path / crawl / "0.tar")) for crawl in ("a", "b")}
    batch = run(make(settings(sources), tok, tmp_path), 1)[0]
    assert set(batch["key"]) == {"a:0.tar/0", "b:0.tar/0"} and len(set(batch["image_id"].tolist())) == 2
