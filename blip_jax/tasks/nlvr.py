"""The model of NLVR2. It is converted and used; what trains it is not here yet."""

from __future__ import annotations

import re

from blip_jax.models.build import Start
from blip_jax.models.nlvr import BlipNlvr


def _origin(path: str) -> str:
    return re.sub("cross_attn[01]/", "cross_attn/", path).replace("cross_ln/", "cross_attn/ln/")


# Both cross-attentions of a layer start as its one of pre-training, their common LayerNorm as that one's.
START = Start(_origin, new="med/.*merge/.*|cls_head/.*")


def check(cfg, tokenizer=None) -> list[str]:
    return ["objective is 'nlvr': its model can be used, but not trained; choose pretrain, retrieval or caption"]


def build(cfg) -> BlipNlvr:
    return BlipNlvr.from_config(cfg.model)
