"""The data sets of tests/mini with pictures of noise in the place of their photographs, and configs that read them."""

from __future__ import annotations

import json
import pathlib
import shutil
import zlib

from ml_collections import ConfigDict

from blip_jax.config import source
from blip_jax.tasks import dialog, video_qa, video_retrieval, vqa
from world.pictures import encode, noise

MINI = pathlib.Path(__file__).resolve().parents[1] / "mini"
LISTS = {  # folder of pictures -> the lists that name them
    "coco": [f"coco_caption/annotation/coco_karpathy_{split}.json" for split in ("train", "val", "test")],
    "flickr30k": [f"flickr30k/annotation/flickr30k_{split}.json" for split in ("train", "val", "test")],
    "nocaps": [f"nocaps/annotation/nocaps_{split}.json" for split in ("val", "test")],
    "vqa": [f"vqa/annotation/{name}.json" for name in ("vqa_train", "vqa_val", "vqa_test", "vg_qa")],
    "nlvr2": [f"nlvr2/annotation/nlvr_{split}.json" for split in ("train", "dev", "test")],
}
SOURCES = {  # objective -> kind, folder of pictures, training files, evaluation files, both below tests/mini
    "caption": ("json", "coco", LISTS["coco"][0], LISTS["coco"][1]),
    "retrieval": ("json", "flickr30k", LISTS["flickr30k"][0], LISTS["flickr30k"][2]),
    "vqa": ("vqa", "vqa", "vqa/official/v2_*train2014*.json", "vqa/official/v2_*val2014*.json"),
    "nlvr": ("nlvr", "nlvr2", "nlvr2/official/train.json", "nlvr2/official/dev.json"),
    "dialog": ("visdial", "visdial", "visdial/visdial_1.0_train.json", "visdial/visdial_1.0_val*.json"),
}
VIDEOS = {  # objective -> kind, videos, evaluation file, all below tests/mini; the videos are those of the data sets
    "video_retrieval": ("video_text", "msrvtt", "msrvtt/annotation/msrvtt_test.jsonl"),
    "video_qa": ("video_qa", "msvd_qa", "msvd_qa/official/test_qa.json"),
}
DIALOGS = {  # split -> its pictures below "visdial"
    "train": "train2014/COCO_train2014_{:012d}.jpg",
    "val": "VisualDialog_val2018/VisualDialog_val2018_{:012d}.jpg",
    "test": "VisualDialog_test2018/VisualDialog_test2018_{:012d}.jpg",
}


def read(path: str):
    return json.loads((MINI / path).read_text(encoding="utf-8"))


def write(folder: pathlib.Path) -> pathlib.Path:
    """The lists, beside which readers write what they find out, and every picture that they name.

    Of NLVR2's pictures, all of which are named .png, every second pair are JPEG files.
    """
    shutil.copytree(MINI, folder / "lists", ignore=shutil.ignore_patterns(".*"))
    named = {name: [row for path in lists for row in read(path)] for name, lists in LISTS.items()}
    named["visdial"] = [
        {"image": form.format(dialog["image_id"])}
        for split, form in DIALOGS.items()
        for dialog in read(f"visdial/visdial_1.0_{split}.json")["data"]["dialogs"]
    ]
    for name, rows in named.items():
        for i, paths in enumerate(row.get("images") or [row["image"]] for row in rows):
            for path in paths:
                place = folder / name / path
                if not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(encode(noise(zlib.crc32(path.encode())), "PNG" if i % 2 else "JPEG"))
    return folder


def found(files: pathlib.Path, kind: str, folder: str, path: str) -> ConfigDict:
    """A config.source of lists and a folder of pictures that `write` has written."""
    return source(kind, str(files / "lists" / path), images=str(files / folder))


def settings(cfg: ConfigDict, objective: str, files: pathlib.Path) -> ConfigDict:
    """The tiny config for a run of `objective` on its mini data set: three steps, the second and last evaluated."""
    kind, folder, train, evaluated = SOURCES[objective]
    cfg.objective = objective
    with cfg.data.unlocked():
        cfg.data.train = ConfigDict({"mini": found(files, kind, folder, train)})
        cfg.data.eval = ConfigDict({"mini": found(files, kind, folder, evaluated)})
        if objective == "vqa":
            cfg.data.train.vg = found(files, kind, folder, "vqa/annotation/vg_qa.json")
    if objective == "caption":
        cfg.text.prompt = "a "
        cfg.eval.max_length, cfg.eval.beams = 9, 2
    if objective == "vqa":
        cfg.model.vit.update(width=32, mlp=64)
        cfg.task = vqa.leaves()
        cfg.task.update(answers=3, answer_len=6, answer_list=str(MINI / "vqa/annotation/answer_list.json"), k=5)
    if objective == "dialog":
        cfg.model.vit.update(width=32, mlp=64)
        cfg.task = dialog.leaves()
        cfg.task.update(negatives=2, caption_len=8)
        cfg.text.max_len = 16  # one length, hence one program
        cfg.eval.rerank_texts = 100
    cfg.data.epoch_examples = 16
    cfg.train.update(steps=3, log_every=1, save_every=2, eval_every=2, keep=1, keep_best=objective != "vqa")
    return cfg


def evaluation_of(cfg: ConfigDict, objective: str) -> ConfigDict:
    """The tiny config for the evaluation of an objective of VIDEOS on its mini data set, three frames of each."""
    kind, folder, path = VIDEOS[objective]
    cfg.objective, cfg.task = objective, {"video_retrieval": video_retrieval, "video_qa": video_qa}[objective].leaves()
    cfg.task.frames = 3
    if objective == "video_qa":
        cfg.model.vit.update(width=32, mlp=64)
        cfg.task.update(max_length=6, k=5, train_answers=str(MINI / "vqa/annotation/answer_list.json"))
    with cfg.data.unlocked():
        cfg.data.train = ConfigDict()
        cfg.data.eval = ConfigDict({"clips": source(kind, str(MINI / path), images=str(MINI / folder))})
    cfg.train.steps = 0
    cfg.eval.update(batch=2, rerank_texts=2, k=2)
    return cfg
