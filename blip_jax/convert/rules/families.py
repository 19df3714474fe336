"""All families of checkpoints as one: the tables of BLIP and of BLIP-2."""

from __future__ import annotations

from blip_jax.convert.rules import blip

FAMILIES, WORDS, TIED, IGNORED, OPTIONAL, STACKS = (
    blip.FAMILIES,
    blip.WORDS,
    blip.TIED,
    blip.IGNORED,
    blip.OPTIONAL,
    blip.STACKS,
)
INITIAL = blip.INITIAL
# module of the parameter tree -> the part whose number of heads counts for it
TOWERS = {"vit": "vit", "med": "med", "med_dec": "med", "qformer": "qformer", "llm": "llm"}
