"""All families of checkpoints as one: the tables of BLIP and of BLIP-2."""

from __future__ import annotations

from blip_jax.convert.rules import blip, blip2

FAMILIES = blip.FAMILIES | blip2.FAMILIES
WORDS = blip.WORDS | blip2.WORDS
TIED = blip.TIED | blip2.TIED
IGNORED = blip.IGNORED | blip2.IGNORED
OPTIONAL = blip.OPTIONAL | blip2.OPTIONAL
STACKS = blip.STACKS | blip2.STACKS
INITIAL = blip.INITIAL + blip2.INITIAL
# module of the parameter tree -> the part whose number of heads counts for it
TOWERS = {"vit": "vit", "med": "med", "med_dec": "med", "qformer": "qformer", "llm": "llm"}
