"""A trained model from wherever it lies: our workdirs, the originals' files, Hugging Face folders, names on its hub."""

from __future__ import annotations

import pathlib
import sys
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from blip_jax import buckets, trees
from blip_jax.convert import origins, read, vocabulary
from blip_jax.convert.source import Source
from blip_jax.data.text import tokenizers
from blip_jax.inference.batching import placed
from blip_jax.models.blip import Blip
from blip_jax.models.blip2 import Blip2
from blip_jax.tasks import build

NEEDS = {  # what is asked of a model -> the parts it takes, the checkpoints that have them
    "caption": (("text decoder",), "a captioner or a pre-training checkpoint"),
    "match": (("text encoder", "projections", "matching head"), "a retrieval or pre-training checkpoint"),
    "localize": (("image-grounded text encoder", "matching head"), "a retrieval or pre-training checkpoint of BLIP"),
    "answer": (("question encoder and answer decoder",), "a VQA checkpoint"),
    "generate": (("language model",), "a checkpoint of BLIP-2's second stage"),
    "image features": (("image encoder",), "a checkpoint with one"),
    "text and multimodal features": (("text encoder",), "a retrieval or pre-training checkpoint"),
}


class Loaded(NamedTuple):
    """A trained model."""

    model: Any  # a module of blip_jax.models
    params: dict  # on the devices of a mesh; else NumPy f32, or what is read as such when numpy.asarray is called on it
    cfg: ConfigDict  # config.base with the checkpoint's objective, model and texts
    tokenizer: Any  # of data.text; None of a model that reads no text
    origin: str  # the checkpoint folder, file or Hugging Face folder

    def parts(self) -> dict[str, bool]:
        """Which parts there are."""
        blip, later = isinstance(self.model, Blip), isinstance(self.model, Blip2)
        return {
            "image encoder": "vit" in self.params,
            "text decoder": "lm_head" in self.params["qformer" if later else "med"] if later or blip else False,
            "text encoder": "word" in self.params["qformer"]["embed"] if later else blip and self.model.encoder,
            "image-grounded text encoder": blip and self.model.encoder,
            "projections": {"vision_proj", "text_proj"} <= self.params.keys(),
            "matching head": "itm_head" in self.params,
            "question encoder and answer decoder": "med_dec" in self.params,
            "language model": "llm" in self.params,
        }

    def can(self, what: str) -> bool:
        """Whether the model has all parts that `what`, a key of NEEDS, takes."""
        parts = self.parts()
        return all(parts[part] for part in NEEDS[what][0])

    def require(self, what: str, name: str = "") -> None:
        """ValueError: the model lacks parts that `what`, a key of NEEDS, takes.

        name: of the setting that it comes from.
        """
        needed, who = NEEDS[what]
        parts = self.parts()
        if missing := [part for part in needed if not parts[part]]:
            subject = f"{self.origin} ({self.cfg.objective})"
            if name:
                subject = f"{name} is {subject}, which"
            raise ValueError(f"{subject} cannot do {what}: it has no {' and no '.join(missing)}; give {who}")


def load(
    path, mesh: Mesh | None = None, dtype: str = "", vocab: str = "", *, heads: Mapping[str, int] | None = None
) -> Loaded:
    """A trained model, ready for use.

    Of a workdir, one of its checkpoint folders, a .pth of the originals, a Hugging Face folder or a name on its hub; or
    of several with commas, a BLIP-2 and the parts that its file lacks.

    Args:
      mesh: where the parameters go, placed by `sharding` and rounded to the dtype once; None: they stay on the host in
        float32, those of a BLIP-2 where they lie.
      dtype: of the computation, "float32" | "bfloat16"; "": as it was trained.
      vocab, heads: as in `convert.read.read`.
    ValueError: `read.read`; initial weights, which are no model; a mesh that does not divide a parameter.
    """
    found = read.read(str(path), vocab=str(vocab), heads=heads, momentum=False)
    params = found.state["params"]
    if missing := _missing(found):
        raise ValueError(
            f"{path} ({found.family}) holds no {' and no '.join(missing)}: these are weights to start training from; "
            "give a trained model"
        )
    for note in found.notes if jax.process_index() == 0 else ():
        print(f"{path}: {note}", file=sys.stderr)
    cfg = found.cfg.copy_and_resolve_references().unlock()
    cfg.model.dtype = dtype or cfg.model.dtype
    questions = (found.questions or vocabulary.of_questions(found)) if vocabulary.reads_questions(found) else ""
    own = found.family != "blip2_vision"  # which reads no text
    tokenizer = tokenizers.of(cfg.model, _vocabulary(found, path), questions) if own else None
    params = params if mesh is None else placed(params, mesh, cfg.model.dtype)
    return Loaded(build(cfg), params, cfg.lock(), tokenizer, place(path))


def place(path) -> str:
    """Where the model lies that `path` names: `Loaded.origin`. ValueError: `read.locate`."""
    return ",".join(str(buckets.spelled(read.locate(name))) for name in origins.names(str(path)))


def _missing(found: Source) -> list[str]:
    """What a checkpoint lacks to be a model."""
    params = found.state["params"]
    text = "qformer" if "qformer" in params or "ln_vision" in params else "med"
    needed = {"vit": "image encoder"} if found.family != "blip2_text" else {}
    needed |= {text: "text model"}
    if "llm_proj" in params:
        needed["llm"] = "language model"
    return [what for part, what in needed.items() if part not in params]


def _vocabulary(found: Source, path) -> pathlib.Path:
    if found.vocab is None:
        raise ValueError(
            f"no tokenizer came with {path}: give that of its language model with --vocab=FILE (vocab=), OPT's "
            "vocab.json beside its merges.txt, T5's spiece.model, or the tokenizer.json of either"
        )
    return found.vocab


def read_for(cfg, origin, momentum: bool = False) -> Source:
    """Any checkpoint, initial weights too, for a run of `cfg`, with its vocabulary.

    Where a file names no numbers of heads, they are those of `cfg`.

    momentum: whether the momentum encoder and queues of a workdir are read, too.
    ValueError: `read.read`, also where it was trained with another vocabulary than text.vocab.
    """
    heads = read.heads_of(cfg) if pathlib.Path(origin).is_file() else {}
    found = read.read(origin, vocab=None, momentum=momentum, heads=heads)
    language, *questions = tokenizers.files(cfg.text.vocab)
    if "llm" not in cfg.model or not cfg.model.llm:
        return vocabulary.settled(found, cfg.text.vocab, str(origin))
    if vocabulary.reads_questions(found) and questions:
        return vocabulary.settled(found, cfg.text.vocab, str(origin))
    if found.state["params"].keys() & {"llm", "llm_proj"}:
        return vocabulary.settled(found, language, str(origin))
    # the words of a Q-Former, of which a second stage reads none
    return vocabulary.settled(found, questions[0], str(origin)) if questions else found


def checksum(params: dict) -> int:
    """crc32 of all parameters, with their names: NumPy arrays, or `Lazy` ones, which are read a layer at a time."""
    crc = 0
    for path, leaf in sorted(trees.paths(params), key=lambda p: p[0]):
        crc = zlib.crc32(path.encode(), crc)
        for part in leaf.rows() if isinstance(leaf, trees.Lazy) and "/blocks/" in path else [leaf]:
            crc = zlib.crc32(np.ascontiguousarray(part), crc)
    return crc
