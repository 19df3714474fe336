"""What the tutorials name, small: configs, checkpoints and data of the same names and layouts."""

from __future__ import annotations

import json
import pathlib
import tarfile

import numpy as np
from tokenizers import AddedToken
from tokenizers.implementations import BertWordPieceTokenizer

from blip_jax.convert import write
from blip_jax.data.text.wordpiece import train_vocab
from world import official
from world.mini import read
from world.pictures import add_to_tar, encode, noise

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORDS = 300  # of the vocabulary, without [DEC] and [ENC]
SIZES = dict(D=64, depth=1, F=128, p=16, W=64, M=128, layers=1, V=WORDS + 2, T=64, E=16, K=64)
PIXELS = 32
CONFIG = '''"""{name}, of a small model and a few steps."""

import importlib.util

from world.small import smaller


def get_config(*argument):
    spec = importlib.util.spec_from_file_location("published", {path!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return smaller(module.get_config(*argument))
'''


def smaller(c, steps: int = 2, batch: int = 32):
    """A config of a run, with the sizes of SIZES and a few steps; what it reads and how it learns stay."""
    if "model" not in c:  # CapFilt
        c.device_batch, c.shard_examples, c.method.max_length = 8, 16, 12
        c.threshold = 0.0  # a filter of two steps finds that nothing matches
        return c
    c.model.vit.update(width=SIZES["D"], depth=SIZES["depth"], heads=1, mlp=SIZES["F"], patch=SIZES["p"])
    c.model.med.update(width=SIZES["W"], layers=SIZES["layers"], heads=1, mlp=SIZES["M"])
    c.model.med.update(positions=SIZES["T"])
    if c.model.med.vocab_size == 30524:  # BERT's
        c.model.med.vocab_size = SIZES["V"]
    c.model.update(img_size=PIXELS, embed_dim=SIZES["E"], dtype="float32", dropout=0.0)
    c.data.randaugment = False
    c.data.threads = c.data.prefetch = 2
    c.loss.queue = 2 * batch * (c.loss.queue > 0)
    c.loss.group_size = 4 * (c.loss.group_size > 0)
    c.train.update(steps=min(c.train.steps, steps), batch=batch, log_every=1, save_every=steps, keep=1)
    c.train.eval_every = min(c.train.eval_every, steps)
    c.eval.k, c.eval.batch, c.eval.max_length = 4, 8, 12
    c.eval.loss_examples = 0  # a program more of each
    return c


def configs(folder: pathlib.Path) -> None:
    """`folder`/configs with a smaller form of each of the published runs."""
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.py"):
        (folder / "configs" / path.name).write_text(CONFIG.format(name=path.name, path=str(path)))


def vocabulary(path: pathlib.Path) -> pathlib.Path:
    """A vocab.txt of WORDS entries, of COCO's captions."""
    captions = [row["caption"] for row in read("coco_caption/annotation/coco_karpathy_train.json")]
    train_vocab(captions, WORDS, path)
    return path


def pth(path: pathlib.Path, family: str = "pretrain") -> None:
    """A file of the originals, of random values; needs torch."""
    official.save(path, official.tensors(family, SIZES, img_size=PIXELS))


def on_hub(home: pathlib.Path, vocab: pathlib.Path, **families: str) -> None:
    """Repositories in the cache of huggingface_hub, owner__name=family, as it lays them out.

    As in BLIP's on the hub a tokenizer.json lies beside vocab.txt.
    """
    from safetensors.numpy import save_file

    words = vocab.read_text(encoding="utf-8").splitlines()
    tokenizer = BertWordPieceTokenizer({word: i for i, word in enumerate(words)}, lowercase=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("[DEC]", "[ENC]")])
    for name, family in families.items():
        repository = home / "hub" / f"models--{name.replace('__', '--').replace('_', '-')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "snapshots").mkdir()
        arrays = official.tensors(family, SIZES, img_size=PIXELS)
        file = home / f"{family}.safetensors"
        save_file({key: np.ascontiguousarray(x) if x.ndim else x for key, x in arrays.items()}, file)
        snapshot = repository / "snapshots" / ("0" * 40)
        write.convert(file, snapshot, to="hf", vocab=str(vocab))
        tokenizer.save(str(snapshot / "tokenizer.json"))


def photos(folder: pathlib.Path, n: int) -> None:
    folder.mkdir()
    for i in range(n):
        (folder / f"{i}.jpg").write_bytes(encode(noise(i, 60, 40)))


def coco(folder: pathlib.Path) -> None:
    """Karpathy's splits as BLIP's lists in `folder`, and pictures of noise under COCO's names in `folder`/coco."""
    for split in ("train", "val", "test"):
        rows = read(f"coco_caption/annotation/coco_karpathy_{split}.json")
        (folder / f"coco_karpathy_{split}.json").write_text(json.dumps(rows))
        for i, row in enumerate(rows):
            place = folder / "coco" / row["image"]
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(encode(noise(i)))


def visual_genome(folder: pathlib.Path) -> None:
    """`folder`/vg_caption.json with paths of another disk, and pictures in VG's two folders; one picture is missing."""
    rows = [{"image": f"/export/vg/image/{i}.jpg", "caption": f"region {i} of a photo"} for i in range(1, 9)]
    (folder / "vg_caption.json").write_text(json.dumps(rows))
    for i in range(1, 8):
        place = folder / "vg" / ("VG_100K_2" if i % 2 else "VG_100K") / f"{i}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encode(noise(i)))


def cc12m(folder: pathlib.Path, shards: int = 2, n: int = 12) -> None:
    """Shards as img2dataset writes them: .jpg, .txt and .json of a sample, in no order; a picture is cut off."""
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in sorted(range(n), key=lambda i: (i % 5, i)):
                key, caption = f"{shard:05}{i:04}", f"Picture {i} of the web, PERSON> on a beach"
                jpg = encode(noise(100 * shard + i))
                about = {"caption": caption, "url": f"http://example.org/{key}.jpg", "key": key, "status": "success"}
                about |= {"error_message": None, "width": 40, "height": 30, "exif": "{}", "sha256": "0" * 64}
                add_to_tar(tar, f"{key}.jpg", jpg[: len(jpg) // 2] if shard == i == 1 else jpg)
                add_to_tar(tar, f"{key}.txt", caption.encode())
                add_to_tar(tar, f"{key}.json", json.dumps(about, indent=4).encode())


def alt_texts(folder: pathlib.Path) -> None:
    """Lists of texts that passed, COCO's captions, and that did not, the names of files."""
    photos(folder, 8)
    for split, n in (("train", 96), ("val", 24)):
        told = [row["caption"] for row in read("coco_caption/annotation/coco_karpathy_train.json")]
        told = told[:n] if split == "train" else told[-n:]
        for verdict, texts in (("good", told), ("bad", [f"IMG_{7 * i:04}" for i in range(n)])):
            rows = [{"image": f"{i % 8}.jpg", "caption": text} for i, text in enumerate(texts)]
            (folder / f"{verdict}_{split}.json").write_text(json.dumps(rows))
