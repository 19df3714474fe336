"""The model of visual question answering. It is converted and used; what trains it is not here yet."""

from __future__ import annotations

from blip_jax.models.build import Start
from blip_jax.models.vqa import BlipVqa

# Both text models start as the shared one of pre-training. Where image and text widths differ the decoder, which looks
# at question
# states, has keys and values of another shape; these start random, as in the original.
START = Start(lambda path: path.replace("med_dec/", "med/"), misfit="med_dec/.*/cross_attn/[kv]/kernel")


def check(cfg, tokenizer=None) -> list[str]:
    return ["objective is 'vqa': its model can be used, but not trained; choose pretrain, retrieval or caption"]


def build(cfg) -> BlipVqa:
    return BlipVqa.from_config(cfg.model)
