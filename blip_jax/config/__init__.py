"""Configurations: `base()` and `capfilt()` have every leaf, `source()` describes data, `problems()` checks."""

from blip_jax.config.check import nearest, problems, refuse, source_kinds
from blip_jax.config.leaves import base, blip2, capfilt, layer_decay, source
from blip_jax.config.sizes import (
    BLIP2_MODELS,
    LLM_SIZES,
    MED_SIZES,
    QFORMER_SIZES,
    TOWER_SIZES,
    VIT_SIZES,
    text_side,
)
