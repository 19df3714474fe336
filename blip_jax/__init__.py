"""BLIP and BLIP-2 in JAX/Flax."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"
__all__ = ["Blip", "__version__", "from_pretrained"]
# imported when first asked for: jax takes a second
_HOMES = {"from_pretrained": "blip_jax.inference.pretrained", "Blip": "blip_jax.models.blip"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(
            f"module 'blip_jax' has no attribute {name!r}; it has {', '.join(__all__)} and its submodules"
        )
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
