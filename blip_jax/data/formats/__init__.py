"""The kinds of sources by name, and the one function that opens them."""

from __future__ import annotations

import importlib
import pkgutil

from blip_jax.data.formats.array_record import ArrayRecords
from blip_jax.data.formats.json import JsonRows
from blip_jax.data.formats.tar import TarShards
from blip_jax.data.formats.tfds import Tfds
from blip_jax.data.scenes.world import Scenes
from blip_jax.data.source import Source


def _scenes(name: str, cfg) -> Source:
    return Scenes(seed=cfg.seed, count=cfg.count, size=cfg.size, noise=cfg.noise, captions=cfg.captions, easy=cfg.easy)


KINDS = {"json": JsonRows, "tar": TarShards, "array_record": ArrayRecords, "tfds": Tfds, "scenes": _scenes}


def open_source(name: str, cfg) -> Source:
    """Opens the source that `cfg` (a config.source) describes. ValueError: a wrong file list, no record."""
    formats = {module.name for module in pkgutil.iter_modules(__path__)}
    if cfg.kind not in KINDS.keys() | formats:
        raise ValueError(
            f"data source {name!r}: kind {cfg.kind!r} is unknown; choose one of {sorted(KINDS.keys() | formats)}"
        )
    opened = KINDS[cfg.kind] if cfg.kind in KINDS else importlib.import_module(f"{__name__}.{cfg.kind}").open
    src = opened(name, cfg)
    src.name = name
    if not len(src):
        raise ValueError(
            f"data source {name!r}: {cfg.path or cfg.kind} holds no record; remove the source or give another path"
        )
    return src
