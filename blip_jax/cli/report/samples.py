"""What the model of a run says of some of its evaluation data: captions, answers, judgements, nearest neighbours."""

from __future__ import annotations

import io
import pathlib
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from blip_jax import checkpoint, tasks
from blip_jax.checkpoint import BEST
from blip_jax.cli import configs
from blip_jax.cli.report.records import Records
from blip_jax.data import image
from blip_jax.data.encoded import BadImage
from blip_jax.data.evaluation import EvalData
from blip_jax.data.source import BadRecord
from blip_jax.inference.load import Loaded, load
from blip_jax.models.blip import Blip
from blip_jax.parallel import sharding
from blip_jax.tasks import captioned, two_stage

PIXELS = 256  # longer side of a picture in the report
AMONG = 4  # times as many pictures are searched as there are samples
QUERIES, SHOWN = 6, 5  # texts whose pictures are searched, and pictures of each
RANKED = 8  # of a text, that the matching head looks at


class Card(NamedTuple):
    """A record and what the model says of it."""

    pictures: list[bytes]  # JPEG
    asked: str  # a question, a sentence; "": nothing
    said: str
    people: list[str]  # captions, answers, a label: what people say of it


class Query(NamedTuple):
    """A text and the pictures that score highest for it."""

    text: str
    found: list[tuple[bytes, bool, float]]  # JPEG, whether it is the text's own, score; the best first


class Said(NamedTuple):
    """Samples."""

    cards: list[Card]
    queries: list[Query]
    origin: str  # checkpoint
    problem: str = ""  # why there are none


def of(run: Records, n: int) -> Said:
    """Of the first `n` records of data.eval, by the best checkpoint where one is kept, else by the newest."""
    try:
        return _of(run, n)
    except (ValueError, OSError, BadRecord, BadImage) as e:  # data or origin of a run that was moved here, say
        return Said([], [], "", " ".join(str(e).split())[:400])


def _of(run: Records, n: int) -> Said:
    if not len(run.cfg.data.eval):
        raise ValueError("data.eval is empty")
    cfg, task = _settings(run), tasks.of(run.cfg)
    folder = checkpoint.newest(run.workdir / BEST if run.best else run.workdir)
    mesh = sharding.make_mesh(cfg.mesh)
    with tempfile.TemporaryDirectory() as beside:
        loaded = load(folder, mesh, cfg.model.dtype)._replace(cfg=cfg)
        skipped = pathlib.Path(beside) / "skipped.jsonl"
        cfg.eval.limit = n
        cards = _cards(loaded, task, mesh, n, skipped)
        cfg.eval.limit = n * AMONG
        queries = _queries(loaded, task, mesh, skipped)
    if not cards and not queries:
        raise ValueError(f"objective {cfg.objective} has nothing to show picture by picture")
    return Said(cards, queries, str(folder.relative_to(run.workdir)))


def _settings(run: Records) -> ConfigDict:
    """The run's, for the devices that are here and few pictures."""
    cfg = run.cfg.copy_and_resolve_references().unlock()
    configs.use_own_vocabulary(cfg, run.workdir)
    cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor = -1, 1, 1
    cfg.eval.batch, cfg.eval.k = min(cfg.eval.batch, 16), min(cfg.eval.k, RANKED)
    if jax.default_backend() == "cpu":
        cfg.model.dtype = "float32"  # of which a CPU makes more
    return cfg


def _cards(loaded: Loaded, task, mesh, n: int, skipped: pathlib.Path) -> list[Card]:
    if hasattr(task, "samples"):
        data, told = task.eval_data(loaded.cfg, loaded.tokenizer, skipped), task.samples
    elif isinstance(loaded.model, Blip) and loaded.parts()["text decoder"]:  # of pre-training
        data, told = captioned.eval_data(loaded.cfg, loaded.tokenizer, skipped), captioned.samples
    else:
        return []
    places = {}
    for name, source in data.sources.items():
        for r in range(min(len(source), n - len(places))):
            try:
                record = source[r]
            except BadRecord:
                continue
            places[name, record["key"]] = record
    return [
        card(places[record["source"], record["key"]], text, loaded.cfg)
        for record, text in told(loaded, data, mesh)
        if (record["source"], record["key"]) in places
    ]


def card(record: dict, said: Any, cfg) -> Card:
    """Of a record of captions, of a question with answers, or of a sentence with a label about two pictures."""
    people = record.get("captions") or record.get("answers") or []
    if record.get("label") is not None:
        people = [str(bool(record["label"]))]
    encoded = record.get("images") or [record["image"]]
    pictures = [jpeg(image.decode(data, cfg.data.max_pixels, cfg.data.upright)[0]) for data in encoded]
    return Card(pictures, record.get("question") or record.get("sentence") or "", str(said), list(map(str, people)))


def _queries(loaded: Loaded, task, mesh, skipped: pathlib.Path) -> list[Query]:
    data = task.eval_data(loaded.cfg, loaded.tokenizer, skipped) if hasattr(task, "eval_data") else None
    if not isinstance(data, EvalData):
        return []
    cfg = loaded.cfg
    scores = two_stage.two_stage_scores(cfg, loaded.model, loaded.params, data, loaded.tokenizer, mesh)
    if scores.t2i.shape != (data.n_images, len(data.captions)):
        raise ValueError("some pictures of data.eval cannot be read")
    pictures = np.concatenate([batch["img"] for batch in data.image_batches(16)])  # as the model sees them
    out = []
    for text in np.unique(np.linspace(0, len(data.captions) - 1, QUERIES).astype(int)):
        best, own = np.argsort(-scores.t2i[:, text])[:SHOWN], int(scores.text_image[text])
        found = [(jpeg(Image.fromarray(pictures[i])), int(i) == own, float(scores.t2i[i, text])) for i in best]
        out.append(Query(data.captions[text], found))
    return out


def jpeg(picture: Image.Image) -> bytes:
    """A picture of the report."""
    small = picture.convert("RGB")
    small.thumbnail((PIXELS, PIXELS))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=88)
    return out.getvalue()
