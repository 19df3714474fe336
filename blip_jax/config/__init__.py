"""Configurations: `base()` and `capfilt()` have every leaf, `source()` describes data, `problems()` checks."""

from blip_jax.config.check import nearest, problems, refuse, source_kinds
from blip_jax.config.leaves import base, capfilt, layer_decay, source
from blip_jax.config.sizes import MED_SIZES, VIT_SIZES
