"""Readers of the official files of the paper's tasks, and of BLIP's own: the same from both, pictures and videos in the
layouts that people have, and what is odd about them.
"""

import json
import os
import pathlib

import pytest

from blip_jax import config
from blip_jax.data.formats import open_source
from blip_jax.data.source import BadRecord
from blip_jax.eval import files, retrieval_files, vqa

MINI = pathlib.Path(__file__).resolve().parent.parent / "mini"


def opened(kind, *paths, images, **leaves):
    path = paths[0] if len(paths) == 1 else "{" + ",".join(paths) + "}"
    return open_source("s", config.source(kind, f"{MINI}/{path}", images=str(images), **leaves))


def read(path):
    return json.loads((MINI / path).read_text(encoding="utf-8"))


def put(folder, *paths):
    """Files that hold their own name, in the place of pictures and videos."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)


# ---- Visual Dialog


@pytest.fixture
def dialogs(tmp_path):
    ids = lambda split: [d["image_id"] for d in read(f"visdial/visdial_1.0_{split}.json")["data"]["dialogs"]]
    put(tmp_path, *(f"train2014/COCO_train2014_{i:012d}.jpg" for i in ids("train")[:2]))
    put(tmp_path, *(f"val2014/COCO_val2014_{i:012d}.jpg" for i in ids("train")[2:]))  # of which real ones are, too
    put(tmp_path, *(f"VisualDialog_val2018/VisualDialog_val2018_{i:012d}.jpg" for i in ids("val")))
    put(tmp_path, *(f"VisualDialog_test2018_{i:012d}.jpg" for i in ids("test")))  # all in one folder
    return tmp_path


@pytest.mark.parametrize(
    "split, dense", [("train", "train_dense_sample"), ("val", "val_dense_annotations"), ("test", "")]
)
def test_dialogs(split, dense, dialogs):
    paths = [f"visdial/visdial_1.0_{part}.json" for part in (split, dense) if part]
    source, want = opened("visdial", *paths, images=dialogs), read(paths[0])["data"]
    relevance = {(row["image_id"], row["round_id"]): row for row in (read(paths[1]) if dense else [])}
    assert len(source) == len(want["dialogs"])
    for i, dialog in enumerate(want["dialogs"]):
        record = source[i]
        assert record["image_id"] == str(dialog["image_id"]) and record["caption"] == dialog["caption"]
        assert record["image"].decode().endswith(f"_{dialog['image_id']:012d}.jpg")
        assert len(record["rounds"]) == len(dialog["dialog"])
        for number, (got, turn) in enumerate(zip(record["rounds"], dialog["dialog"]), 1):
            assert got["question"] == want["questions"][turn["question"]]
            assert got["answer"] == (want["answers"][turn["answer"]] if "answer" in turn else None)
            assert got["options"] == [want["answers"][n] for n in turn.get("answer_options", [])]
            assert got["truth"] == turn.get("gt_index")
            own = relevance.get((dialog["image_id"], number), {})
            assert got["relevance"] == own.get("gt_relevance", own.get("relevance"))
    last = source[0]["rounds"][-1]
    assert (last["answer"] is None) == (split == "test") and len(last["options"]) == 100
    assert split == "test" or relevance and last["options"][last["truth"]] == last["answer"]


def test_dialogs_that_do_not_belong_together_or_are_none(dialogs, tmp_path):
    val, dense = "visdial/visdial_1.0_val.json", "visdial/visdial_1.0_train_dense_sample.json"
    with pytest.raises(ValueError, match=r"3 dense annotations are of rounds .* do not hold, such as \[\(790, 9\)"):
        opened("visdial", val, dense, images=dialogs)
    with pytest.raises(ValueError, match="neither dialogs of Visual Dialog 1.0"):
        opened("visdial", "vqa/annotation/vqa_val.json", images=dialogs)
    content = read(val)
    content["data"]["dialogs"] = [
        {"image_id": "x", "caption": "", "dialog": []},
        {"image_id": 7, "caption": "", "dialog": [{"question": 0, "answer_options": [0, 1], "gt_index": 2}]},
        {"image_id": 8, "caption": "", "dialog": [{"question": 10**6}]},
        {"image_id": 9, "caption": "", "dialog": [{"question": 0, "answer": 1, "gt_index": 5}]},
    ]
    (tmp_path / "odd.json").write_text(json.dumps(content))
    put(tmp_path, *(f"VisualDialog_val2018/VisualDialog_val2018_{i:012d}.jpg" for i in (8, 9)))
    source = open_source("s", config.source("visdial", str(tmp_path / "odd.json"), images=str(tmp_path)))
    for i in (0, 1, 2):
        with pytest.raises(BadRecord, match="malformed row"):
            source[i]
    assert source[3]["rounds"] == [  # without options it is history, whatever gt_index says
        {"question": "is it a photo", "answer": "no", "options": [], "truth": None, "relevance": None}
    ]


# ---- NoCaps


@pytest.mark.parametrize("below", ["val/", ""])
def test_nocaps(below, tmp_path):
    rows = read("nocaps/annotation/nocaps_val.json")
    official = read("nocaps/annotation/nocaps_val_4500_captions.json")
    put(tmp_path, *(below + row["image"].split("/")[1] for row in rows))
    blip = opened("nocaps", "nocaps/annotation/nocaps_val.json", images=tmp_path)
    ours = opened("nocaps", "nocaps/annotation/nocaps_val_4500_captions.json", images=tmp_path)
    assert len(blip) == len(ours) == 12
    for i, row in enumerate(official["images"]):
        a, b = ours[i], blip[i]
        assert a["image"] == b["image"] and a["image_id"] == b["image_id"] == str(row["id"])
        assert a["domain"] == row["domain"] and b["domain"] == "" and b["captions"] == []
        assert a["captions"] == [x["caption"] for x in official["annotations"] if x["image_id"] == row["id"]]
        assert len(a["captions"]) == 10
    assert "no captions, only pictures" in blip.without_texts and not ours.without_texts
    with pytest.raises(ValueError, match="picture 0 more than once: val and test number their pictures alike"):
        opened("nocaps", "nocaps/annotation/nocaps_val.json", "nocaps/annotation/nocaps_test.json", images=tmp_path)
    with pytest.raises(ValueError, match="neither NoCaps' official `images` nor BLIP's"):
        opened("nocaps", "vqa/annotation/vqa_val.json", images=tmp_path)


# ---- questions about pictures


@pytest.mark.parametrize("split", ["train2014", "val2014", "test2015"])
def test_official_questions_are_blips_rows(split, tmp_path):
    official = [f"vqa/official/v2_OpenEnded_mscoco_{split}_questions.json"]
    official += [f"vqa/official/v2_mscoco_{split}_annotations.json"] if split != "test2015" else []
    made = list(opened("vqa", *official, images=tmp_path).rows())
    blip = opened("vqa", f"vqa/annotation/vqa_{split[:-4]}.json", images=tmp_path)
    assert made == list(blip.rows()) == read(f"vqa/annotation/vqa_{split[:-4]}.json")
    assert ("answer" in made[0]) == (split != "test2015")
    put(tmp_path, made[0]["image"], os.path.basename(made[-1]["image"]))  # below its folder, and by itself
    assert blip[0]["image"].decode() == made[0]["image"] and blip[len(blip) - 1]["image"].decode().startswith("COCO_")


def test_visual_genomes_questions_and_the_test_dev_subset(tmp_path):
    assert list(opened("vqa", "vqa/annotation/vg_qa.json", images=tmp_path).rows()) == read("vqa/annotation/vg_qa.json")
    part = files.vqa_questions(MINI / "vqa/official/v2_OpenEnded_mscoco_test-dev2015_questions.json")
    whole = files.vqa_questions(MINI / "vqa/official/v2_OpenEnded_mscoco_test2015_questions.json")
    assert set(part.ids) < set(whole.ids) and part.subset == "test-dev2015" and len(whole.ids) == 24


def test_a_list_of_answers_from_annotations(tmp_path):
    rows = read("vqa/annotation/vqa_train.json") + read("vqa/annotation/vqa_val.json")
    made = vqa.common_answers((row["answer"] for row in rows), at_least=2)
    assert {"yes", "no"} <= set(made) and made == vqa.common_answers((row["answer"] for row in rows[::-1]), at_least=2)
    assert not any(text.startswith("a ") for text in made)  # "a boat" and "boat" are one answer


def test_nlvr2s_files_ask_the_same(tmp_path):
    for split, n in (("train", 24), ("dev", 28), ("test1", 28)):
        blip = read(f"nlvr2/annotation/nlvr_{split.rstrip('1')}.json")
        official = [json.loads(line) for line in (MINI / f"nlvr2/official/{split}.json").read_text().splitlines()]
        layout = {"train": lambda path: path, "dev": lambda path: f"images/{path}", "test1": os.path.basename}[split]
        put(tmp_path, *(layout(path) for row in blip for path in row["images"]))
        a = opened("nlvr", f"nlvr2/official/{split}.json", images=tmp_path)
        b = opened("nlvr", f"nlvr2/annotation/nlvr_{split.rstrip('1')}.json", images=tmp_path)
        assert len(a) == len(b) == n
        for i, row in enumerate(blip):
            assert [path.decode() for path in a[i]["images"]] == list(map(layout, row["images"])) and a[i][
                "images"
            ] == b[i]["images"]
            assert a[i]["label"] == b[i]["label"] == (row["label"] == "True") and a[i]["sentence"] == b[i]["sentence"]
            assert a[i]["identifier"] == official[i]["identifier"]
        groups = files.nlvr_references(MINI / f"nlvr2/official/{split}.json")
        assert [groups[a[i]["identifier"]][1] for i in range(n)] == [a[i]["group"] for i in range(n)]
        assert len({a[i]["group"] for i in range(n)}) == len({b[i]["group"] for i in range(n)}) < n


# ---- captions


def test_flickr30k_and_coco_as_blip_has_them(tmp_path):
    rows = read("flickr30k/annotation/flickr30k_test.json")
    put(tmp_path, *(row["image"] for row in rows))
    source = opened("json", "flickr30k/annotation/flickr30k_test.json", images=tmp_path)
    assert [len(source[i]["captions"]) for i in range(len(source))] == [len(row["caption"]) for row in rows]
    pairs = retrieval_files.references(MINI / "flickr30k/annotation/flickr30k_test.json")
    assert pairs.owners == len(source) == 12 and len(pairs.text_owner) == 59 and not pairs.videos
    truth = files.caption_references(MINI / "coco_caption/annotation/coco_gt/coco_karpathy_test_gt.json")
    assert truth.captions == files.caption_references(MINI / "coco_caption/annotation/coco_karpathy_test.json").captions


def test_karpathys_splits(tmp_path):
    sentence = lambda text: {"tokens": text.split(), "raw": text, "imgid": 0, "sentid": 0}
    row = lambda name, split, *texts: {"filename": name, "split": split, "sentences": list(map(sentence, texts))}
    rows = [row("1.jpg", "train", "A dog.", "Dogs."), row("2.jpg", "test", "A cat."), row("3.jpg", "val", "A cow.")]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": rows, "dataset": "flickr30k"}))
    put(tmp_path, "flickr30k-images/1.jpg", "2.jpg")
    of = lambda file, split: open_source("s", config.source("karpathy", str(tmp_path / file), split=split))
    train, test = of("dataset_flickr30k.json", "train"), of("dataset_flickr30k.json", "test")
    want = {"key": "s:dataset_flickr30k.json#0:1.jpg", "image": b"flickr30k-images/1.jpg", "image_id": "1.jpg"}
    assert len(train) == len(test) == 1 and train[0] == want | {"captions": ["A dog.", "Dogs."]}
    assert test[0]["image"] == b"2.jpg" and test.captions_of(0) == ["A cat."]
    with pytest.raises(BadRecord, match="missing file: '3.jpg'"):
        of("dataset_flickr30k.json", "val")[0]
    coco = [row("a.jpg", "restval", "A bus.") | {"filepath": "val2014", "cocoid": 7}, {"sentences": [{}], "cocoid": 8}]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": coco, "dataset": "coco"}))
    put(tmp_path, "val2014/a.jpg")
    train = of("dataset_coco.json", "train")
    assert train[0]["image"] == b"val2014/a.jpg" and train[0]["image_id"] == "7"
    with pytest.raises(BadRecord, match="malformed row"):
        train[1]
    with pytest.raises(ValueError, match="split is '': choose one of train, val, test"):
        of("dataset_coco.json", "")
    with pytest.raises(ValueError, match="none of Karpathy's files"):
        opened("karpathy", "nocaps/annotation/nocaps_val_4500_captions.json", images=tmp_path, split="val")


# ---- videos


@pytest.mark.parametrize("below", ["", "videos/", "TestVideo/"])
def test_videos_with_captions(below, tmp_path):
    names = ["video7010", "video7011", "video7012"]
    put(tmp_path, *(f"{below}{name}.mp4" for name in names[:2]))
    pairs = opened("video_text", "msrvtt/annotation/msrvtt_test.jsonl", images=tmp_path)
    official = opened("video_text", "msrvtt/official/test_videodatainfo.json", images=tmp_path)
    assert [pairs.captions_of(i) for i in range(3)] == [
        [json.loads(line)["caption"]]
        for line in (MINI / "msrvtt/annotation/msrvtt_test.jsonl").read_text().splitlines()
    ]
    for i, name in enumerate(names[:2]):
        assert pairs[i]["image_id"] == official[i]["image_id"] == name
        assert pairs[i]["video"] == official[i]["video"] == str((tmp_path / f"{below}{name}.mp4").resolve())
        assert set(pairs[i]["captions"]) <= set(official[i]["captions"])
    with pytest.raises(BadRecord, match="missing file: 'video7012.mp4'"):
        pairs[2]
    with pytest.raises(ValueError, match="holds neither lines {clip_name, caption}"):
        opened("video_text", "msrvtt/qa_official/test_qa.json", images=tmp_path)
    references = retrieval_files.references(MINI / "msrvtt/annotation/msrvtt_test.jsonl")
    assert references.owners == 3 and references.videos


@pytest.mark.parametrize("data, ending", [("msrvtt", "mp4"), ("msvd_qa", "avi")])
def test_questions_about_videos_from_both_kinds_of_files(data, ending, tmp_path):
    folders = {"msrvtt": ("qa_official", "qa_lavis"), "msvd_qa": ("official", "lavis")}[data]
    rows = read(f"{data}/{folders[1]}/qa_test.json")
    put(tmp_path, *(row["video"] for row in rows))
    official = opened("video_qa", f"{data}/{folders[0]}/test_qa.json", images=tmp_path)
    lavis = opened("video_qa", f"{data}/{folders[1]}/*.json", images=tmp_path)
    assert len(official) == len(lavis) == len(rows)
    for i, row in enumerate(rows):
        a, b = official[i], lavis[i]
        assert a["video"] == b["video"] == str((tmp_path / row["video"]).resolve()) and a["video"].endswith(ending)
        assert a["question"] == b["question"] == row["question"] and a["answer"] == b["answer"] == row["answer"]
        assert b["question_id"] == row["question_id"]
    assert lavis.answers == tuple(read(f"{data}/{folders[1]}/qa_ans2label.json")) and official.answers == ()


def test_msvds_videos_need_their_names(tmp_path):
    (tmp_path / "test_qa.json").write_bytes((MINI / "msvd_qa/official/test_qa.json").read_bytes())
    (tmp_path / "names.txt").write_bytes((MINI / "msvd_qa/official/youtube_mapping.txt").read_bytes())
    with pytest.raises(ValueError, match="question 4000 is of a video of MSVD that youtube_mapping.txt does not name"):
        open_source("s", config.source("video_qa", str(tmp_path / "test_qa.json"), images=str(tmp_path)))
    source = open_source("s", config.source("video_qa", str(tmp_path / "*"), images=str(tmp_path)))
    with pytest.raises(BadRecord, match="missing file: 'mini0_60_1_9.mp4'"):
        source[0]
