"""Tiny models of every objective in workdirs, pictures, and the plain way to call a model.

For the tests of the verbs.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import blip_jax
from blip_jax import checkpoint, config, trees
from blip_jax.data import image
from blip_jax.models import initial
from blip_jax.models.vision.vit import normalize_pixels
from blip_jax.tasks import build
from blip_jax.train import state as train_state
from world import jitted
from world.pictures import noise

TEXTS = ["a small red star", "a blue ring on the left of a large green square", "ring"]
QUESTIONS = ["what is left of the ring", "which color", "is the small red star above the large blue square or below"]


@pytest.fixture(scope="module")
def folder(tiny_vocab, tmp_path_factory):
    """Workdirs pretrain, caption, retrieval, vqa and nlvr of tiny models with lively random weights."""
    root = tmp_path_factory.mktemp("models")
    for seed, objective in enumerate(("pretrain", "caption", "retrieval", "vqa", "nlvr")):
        saved(root / objective, objective, seed, tiny_vocab)
    return root


def saved(to, objective: str, seed: int, vocab, layers: int = 1) -> dict:
    """A workdir of a tiny model with lively random weights, which are returned. layers: of its text model."""
    c = config.base("tiny")
    c.objective = objective
    c.model.update(img_size=16, embed_dim=16, dtype="bfloat16")
    c.model.vit.depth, c.model.med.layers = 1, layers
    c.text.update(vocab=str(vocab), max_len=14, prompt="a small " if objective == "caption" else "")
    c.loss.momentum = False
    model = build(c)
    shapes = jax.eval_shape(functools.partial(initial.init_params, c, model), jax.random.key(0))
    params = lively(shapes, np.random.default_rng(seed))
    with checkpoint.open_dir(to, 1) as manager:
        state = train_state.create(c, model, optax.set_to_zero(), jax.random.key(0), params)
        checkpoint.save(manager, 3, state, {"step": 3}, json.loads(c.to_json()))
    shutil.copyfile(vocab, to / "vocab.txt")
    return params


@pytest.fixture(scope="module")
def models(folder):
    """name -> model, each loaded once."""
    loaded = {}

    def get(name: str):
        if name not in loaded:
            loaded[name] = blip_jax.from_pretrained(folder / name)
        return loaded[name]

    return get


def lively(shapes: dict, rng: np.random.Generator) -> dict:
    """Random parameters, large enough for pictures and texts to matter."""
    draw = lambda path, x: (
        np.ones(x.shape) if path.endswith("scale") else 0.07 if path == "temp" else rng.normal(0, 0.15, x.shape)
    )
    return trees.nest((path, np.asarray(draw(path, x), x.dtype)) for path, x in trees.paths(shapes))


def photos(n: int) -> list[np.ndarray]:
    return [np.asarray(noise(i, 30 + i, 20)) for i in range(n)]


def seen(img: np.ndarray) -> np.ndarray:
    """The pixels that a model of 16 px sees, f32[1,16,16,3]."""
    return np.asarray(normalize_pixels(image.eval_transform(Image.fromarray(img), 16)[None]))


def apply(model, method, *args, **how):
    return jitted.apply(model.model, model.params, method, *args, **how)


def tokens(model, text_: str):
    """ids i32[1,t] and mask of one text, without any padding."""
    ids, mask = model.tokenizer.encode([text_], model.cfg.text.max_len)
    return jnp.asarray(ids[:, : mask.sum()]), jnp.asarray(mask[:, : mask.sum()])


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=0)
