"""Checkpoints, sources and settings for the tests of CapFilt."""

import json
import pathlib
import shutil

import jax
import optax

from blip_jax import checkpoint, config, trees
from blip_jax.data.formats.array_record import write_array_record
from blip_jax.models import initial
from blip_jax.tasks import build
from blip_jax.train import state as train_state
from world.pictures import encode, noise


def save_model(cfg, workdir, seed: int, strength: float = 1.0) -> pathlib.Path:
    """A workdir with a checkpoint of random parameters.

    strength: multiplies all kernels; the larger it is, the more scores differ.
    """
    model = build(cfg)
    params = jax.jit(lambda key: initial.init_params(cfg, model, key))(jax.random.key(seed))
    params = trees.nest(
        (path, leaf * strength if path.endswith("kernel") else leaf) for path, leaf in trees.paths(params)
    )
    cfg.loss.momentum = False
    state = train_state.create(cfg, model, optax.set_to_zero(), jax.random.key(0), params)
    with checkpoint.open_dir(workdir, 1) as manager:
        checkpoint.save(manager, 7, state, {"step": 7}, json.loads(cfg.to_json()))
    vocab = pathlib.Path(cfg.text.vocab)
    shutil.copyfile(vocab, pathlib.Path(workdir) / f"vocab{vocab.suffix}")
    return pathlib.Path(workdir)


def save_models(cfg, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """A captioner without encoder and a filter without decoder, of different sizes.

    cfg: the tiny_cfg of conftest.
    """
    small, large = cfg.copy_and_resolve_references(), cfg.copy_and_resolve_references()
    small.objective, large.objective = "caption", "retrieval"
    large.model.img_size, large.model.vit.width, large.text.max_len = 24, 32, 14
    return {
        "captioner": save_model(small, folder / "captioner", 1),
        "filter": save_model(large, folder / "filter", 2, strength=6.0),
    }


def web_records(n: int = 12) -> list[dict]:
    """n records with 1, 2, 3, 0, ... web captions, some of them empty or repeated, and one picture that is broken."""
    captions = lambda i: [f"A Red {'circle' if k else 'star'}, number {i}!" for k in range((i + 1) % 4)]
    rows = [
        {
            "key": f"web-{i}",
            "image": encode(noise(i, 20 + i, 30)),
            "captions": captions(i),
            "image_id": f"id{i}",
            "from": f"page {i}",
        }
        for i in range(n)
    ]
    rows[0]["captions"] = [" .. "]
    rows[1]["captions"] = ["a small square", "A small square."]
    rows[4]["captions"] = ["A red\0 star"]
    rows[5] |= {"image": rows[5]["image"][:300], "captions": ["a cut picture", "of a ring"]}
    return rows


def settings(models: dict, folder: pathlib.Path, scenes: int = 9):
    """A run over `web_records`, in two files with an empty one between them, and scenes with noise; shards of 8."""
    for name, rows in (("a", web_records()[:7]), ("b", []), ("c", web_records()[7:])):
        write_array_record(folder / f"{name}.array_record", rows)
    c = config.capfilt()
    c.captioner, c.filter = str(models["captioner"]), str(models["filter"])
    c.threshold, c.device_batch, c.shard_examples, c.method.n = 0.85, 2, 8, 2
    c.method.max_length = 16
    c.data.threads = c.data.prefetch = 2
    with c.data.unlocked():
        c.data.sources.web = config.source("array_record", str(folder / "*.array_record"))
        c.data.sources.world = config.source("scenes", count=scenes, size=32, noise=0.6)
    return c
