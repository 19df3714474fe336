"""NLVR2: is a sentence true of two pictures (paper section 5.4, figure 5b)?"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax import losses
from blip_jax.data.evaluation import EvalRows
from blip_jax.data.source import BadRecord, expand
from blip_jax.data.text.clean import clean_caption, plain_text
from blip_jax.eval import nlvr
from blip_jax.eval import submission as servers
from blip_jax.inference.batching import Pass, Runner, at_most
from blip_jax.models import flops as counts
from blip_jax.models.build import Start
from blip_jax.models.nlvr import FIRST_MERGE, BlipNlvr
from blip_jax.models.vision.vit import normalize_pixels
from blip_jax.tasks import step

SIDES = ("img0", "img1")  # left and right
BEST = ("accuracy",)  # of dev, as the original
BEGINS_FROM = "a pre-training checkpoint, as the paper's model_base.pth"
OTHER = {"left": "right", "right": "left"}


def _origin(path: str) -> str:
    return re.sub("cross_attn[01]/", "cross_attn/", path).replace("cross_ln/", "cross_attn/ln/")


# Both cross-attentions of a layer start as its one of pre-training, their common LayerNorm as that one's.
START = Start(_origin, new="med/.*merge/.*|cls_head/.*")


def check(cfg, tokenizer=None) -> list[str]:
    if cfg.text.prompt:
        return [
            f"text.prompt is {cfg.text.prompt!r} but objective is nlvr, whose texts have none: set text.prompt to "
            "the empty string"
        ]
    return []


def build(cfg) -> BlipNlvr:
    return BlipNlvr.from_config(cfg.model)


# --- training ---------------------------------------------------------------------------------------------------------
def example(record: dict, rng: np.random.Generator, cfg, tokenizer) -> dict:
    """A sentence with its two pictures, half of the time exchanged, with the words "left" and "right" of the sentence.

    {"img0", "img1": bytes, "ids": i32[T], "txt_mask": bool[T], "label": bool[], "notes"}; T = text.max_len. BadRecord:
    no label is known.
    """
    if record["label"] is None:
        raise BadRecord(record["key"], "sentence without a label")
    record = exchanged(record) if rng.random() < 0.5 else record
    return sentence(record, cfg, tokenizer) | {"label": np.bool_(record["label"])}


def exchanged(record: dict) -> dict:
    """The record with its pictures exchanged, and the words "left" and "right" of the sentence."""
    words = [OTHER.get(word, word) for word in record["sentence"].split(" ")]
    return record | {"sentence": " ".join(words), "images": record["images"][::-1]}


def sentence(record: dict, cfg, tokenizer) -> dict:
    """{"img0", "img1": bytes, "ids": i32[T], "txt_mask": bool[T], "notes"} of a record as it is."""
    written, notes = plain_text(record["sentence"])
    text = clean_caption(written, cfg.text.max_words)
    ids, mask = tokenizer.encode([text], cfg.text.max_len)
    if tokenizer.lengths([text], cfg.model.med.positions)[0] > cfg.text.max_len:
        notes.append("long sentence, cut")
    return {
        **dict(zip(SIDES, record["images"])),
        "ids": ids[0],
        "txt_mask": mask[0],
        "notes": notes,
    }


def shapes(cfg) -> dict:
    B, S, T = cfg.train.batch, cfg.model.img_size, cfg.text.max_len
    pictures = {side: ((B, S, S, 3), np.uint8) for side in SIDES}
    return pictures | {"ids": ((B, T), np.int32), "txt_mask": ((B, T), bool), "label": ((B,), bool)}


def logits(apply, batch: dict, streams: dict | None):
    """f32[B,2] of pictures f32[B,S,S,3] on either side; streams: of dropout, or None for none."""
    how = {name: {"deterministic": streams is None, "rngs": streams and streams[name]} for name in ("vit", "text")}
    # side by side, so that both pictures of an example stay on the device that has its row
    img = jnp.stack([batch[side] for side in SIDES], axis=1)
    img_tok = apply(img.reshape(-1, *img.shape[2:]), method="encode_image", **how["vit"])
    img_tok = img_tok.reshape(*img.shape[:2], *img_tok.shape[1:])  # B 2 P D
    return apply(batch["ids"], batch["txt_mask"], img_tok[:, 0], img_tok[:, 1], method="classify", **how["text"])


def loss(model, cfg, params, extra, batch: dict, keys: step.Keys):
    """Cross-entropy of true and false; batch: as `shapes`, pictures f32 normalised. Returns loss f32[], (metrics,
    {}).
    """
    apply = functools.partial(model.apply, {"params": params})
    found = logits(apply, batch, step.dropout_streams(keys.dropout, ("vit", "text")))
    total, accuracy = losses.itm(found, batch["label"].astype(jnp.int32))
    return total, ({"loss": total, "accuracy": accuracy}, {})


def flops(cfg, T: int | None = None) -> dict[str, float]:
    """FLOPs of a training step per sentence with its two pictures."""
    model, T, med = cfg.model, T or cfg.text.max_len, cfg.model.med
    P, (vision, pixels) = counts.positions(model), counts.vision(model)

    def layer(queries):
        cross = (
            2 * queries * 2 * med.width**2 + 4 * queries * P * med.width
        )  # of one picture, its keys and values apart
        return counts.text_layer(med, T, queries) + 2 * cross

    merging = max(med.layers - FIRST_MERGE, 0)
    positions = merging * T - (T - 1) * (
        merging > 0
    )  # the head reads position 0 alone, so the last layer computes no other
    parts = {
        "vision": 2 * vision,
        "image_kv": 2 * counts.image_kv(model),
        "text": (med.layers - 1) * layer(T) + layer(1),
        "merge": positions * 2 * 2 * med.width**2,
        "head": 2 * med.width**2 + 2 * 2 * med.width,
    }
    return counts.trained(cfg, parts, unneeded=2 * pixels)


# --- evaluation -------------------------------------------------------------------------------------------------------
def eval_data(cfg, tokenizer, skipped_path) -> EvalRows:
    """The sentences of cfg.data.eval, with labels or without."""
    return EvalRows(cfg, tokenizer, shown, cfg.data.eval, skipped_path=skipped_path)


def shown(record: dict, cfg, tokenizer) -> dict:
    """`sentence`; with eval.exchange of half of the records, drawn by seed and key, exchanged, as the original's
    evaluation shows them.
    """
    half = zlib.crc32(f"{cfg.seed} {record['key']}".encode(errors="backslashreplace")) % 2
    return sentence(exchanged(record) if cfg.eval.exchange and half else record, cfg, tokenizer)


@functools.cache
def compiled(model) -> Callable:
    """`labels` of a model, jitted, kept from one evaluation of a run to the next."""
    return jax.jit(labels(model))


def passes(cfg, model, unit: int) -> list[Pass]:
    """What `evaluate` runs, for plans. unit: as of `Runner`."""
    B, S, T = at_most(cfg.eval.batch, unit), cfg.model.img_size, cfg.text.max_len
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype)
    given = *(rows(np.uint8, S, S, 3) for _ in SIDES), rows(np.int32, T), rows(bool, T)
    return [Pass("labels", labels(model), given, flops(cfg)["forward"], pictures=len(SIDES))]


def labels(model) -> Callable:
    """The program of `evaluate`: (params, left and right img u8[B,S,S,3], ids i32[B,T], txt_mask bool[B,T]) ->
    i32[B]."""

    def program(params, *arrays):
        batch = dict(zip((*SIDES, "ids", "txt_mask"), arrays))
        batch |= {side: normalize_pixels(batch[side]) for side in SIDES}
        return jnp.argmax(logits(functools.partial(model.apply, {"params": params}), batch, None), axis=-1)

    return program


def evaluate(loaded, data: EvalRows, mesh) -> dict:
    """Accuracy and consistency in percent over the examples with labels, pictures in their order, and the number of all
    examples.

    "predictions" holds them all: [{"identifier", "label"}].
    """
    told = list(samples(loaded, data, mesh))
    known = [(label, record["label"], record["group"]) for record, label in told if record["label"] is not None]
    scores = nlvr.score(*zip(*known)) if known else {}
    return {
        "examples": len(told),
        **scores,
        "predictions": [{"identifier": r["identifier"], "label": label} for r, label in told],
    }


def samples(loaded, data: EvalRows, mesh) -> Iterator[tuple[dict, bool]]:
    """(record, label) of each example in order; each once, whatever fills the last batch."""
    runner = Runner(mesh)
    size, program = runner.size(len(data), loaded.cfg.eval.batch), compiled(loaded.model)

    def passes():
        for records, rows in data.batches(size):
            yield (
                records,
                program(loaded.params, *(runner.put(rows[name], size) for name in (*SIDES, "ids", "txt_mask"))),
            )

    with jax.set_mesh(mesh):
        for records, found in runner.fetched(passes()):
            yield from ((record, bool(label)) for record, label in zip(records, found))


def table(result: dict) -> str:
    """The scores, a line each."""
    rows = [f"{name:12} {result[name]:6.2f}" for name in ("accuracy", "consistency") if name in result]
    return "\n".join([f"{result['examples']} examples", *rows])


def submission(result: dict, cfg) -> tuple[str, str]:
    """(file name, content) as the official evaluation reads it. ValueError: it would not be every example of data.eval
    once, or they are of several files or of BLIP's list, which has no identifiers.
    """
    asked = [path for name, source in cfg.data.eval.items() for path in expand(name, source)]
    if len(asked) > 1:
        raise ValueError(f"data.eval has {len(asked)} files: the official evaluation takes the predictions of one")
    return servers.nlvr2(((row["identifier"], row["label"]) for row in result["predictions"]), asked[0])
