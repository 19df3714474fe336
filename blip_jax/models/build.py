"""Which model an objective has, and how a pre-trained BLIP becomes one of the models that are fine-tuned from it."""

from __future__ import annotations

import re
from typing import Callable

import flax.linen as nn

from blip_jax import trees
from blip_jax.models.blip import Blip
from blip_jax.models.nlvr import BlipNlvr
from blip_jax.models.vision.vit import resize_pos_embed
from blip_jax.models.vqa import BlipVqa

MODELS = {"pretrain": Blip, "retrieval": Blip, "caption": Blip, "vqa": BlipVqa, "nlvr": BlipNlvr}


def build(cfg) -> nn.Module:
    """The model of `cfg.objective` with the sizes of `cfg.model`. ValueError: no such objective."""
    if cfg.objective not in MODELS:
        raise ValueError(f"objective is {cfg.objective!r}: choose one of {', '.join(MODELS)}")
    return MODELS[cfg.objective].from_config(cfg.model)


def vqa_from_pretrain(params: dict, fresh: dict) -> tuple[dict, list[str]]:
    """Parameters of a pre-trained `Blip` as those of a `BlipVqa`: what text encoder and decoder shared becomes a copy
    in each.

    `fresh`: random parameters of the BlipVqa. With a ViT wider than the MED the kernels of the decoder's
    cross-attention keys and values do not fit and stay random, as in the original. The position table is resized,
    projections and matching head are left out. Returns the parameters and the names of those that stayed random.
    ValueError: what else is missing or has another shape.
    """
    return _start(
        params, fresh, lambda path: path.replace("med_dec/", "med/"), misfit=r"med_dec/layer_\d+/cross_attn/[kv]/kernel"
    )


def nlvr_from_pretrain(params: dict, fresh: dict) -> tuple[dict, list[str]]:
    """Parameters of a pre-trained `Blip` as those of a `BlipNlvr`: both cross-attentions of a layer start from its one.

    `fresh`: random parameters of the BlipNlvr; the merging layers and the head stay so. Else as `vqa_from_pretrain`.
    """
    origin = lambda path: re.sub(r"cross_attn[01]/", "cross_attn/", path).replace("cross_ln/", "cross_attn/ln/")
    return _start(params, fresh, origin, new=r"med/layer_\d+/merge/\w+|cls_head/.*")


def _start(params: dict, fresh: dict, origin: Callable, new: str = "", misfit: str = "") -> tuple[dict, list[str]]:
    """`fresh` with every leaf from origin(path) of `params`, but those that match `new`, or `misfit` in another
    shape."""
    have, out, random, problems = dict(trees.paths(params)), {}, [], []
    for path, want in trees.paths(fresh):
        x = have.get(origin(path))
        if path == "vit/pos_embed" and x is not None and x.shape != want.shape and x.shape[-1] == want.shape[-1]:
            x = resize_pos_embed(x, want.shape[0])
        if re.fullmatch(new, path) or x is not None and x.shape != want.shape and re.fullmatch(misfit, path):
            random.append(path)
            out[path] = want
        elif x is None:
            problems.append(f"{origin(path)} is missing")
        elif x.shape != want.shape:
            problems.append(f"{origin(path)} is {list(x.shape)}, {path} needs {list(want.shape)}")
        else:
            out[path] = x
    if problems:
        raise ValueError(
            "\n  ".join(
                [
                    "these are no parameters of a pre-training model of this size:",
                    *problems,
                    "give a checkpoint of objective pretrain, and the model.* sizes it was trained with",
                ]
            )
        )
    return trees.nest(out.items()), random
