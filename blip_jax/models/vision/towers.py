"""The image towers by kind, as the sizes in a config and the parameters of a checkpoint say it."""

from __future__ import annotations

from collections.abc import Mapping

from blip_jax.models.vision.clip import Clip
from blip_jax.models.vision.eva import Eva
from blip_jax.models.vision.vit import Vit, resize_pos_embed

TOWERS = {"vit": Vit, "eva": Eva, "clip": Clip}


def tower(sizes: Mapping, **settings) -> Vit:
    """The tower of these sizes, `cfg.model.vit`: a module as `Vit`, whose other fields are `settings`.

    Without `kind` it is BLIP's own. ValueError: a kind that is none of TOWERS.
    """
    kind = sizes.get("kind", "vit")
    if kind not in TOWERS:
        raise ValueError(f"model.vit.kind is {kind!r}: choose one of {', '.join(TOWERS)}")
    return TOWERS[kind](**{name: size for name, size in sizes.items() if name != "kind"}, **settings)


def kind_of(vit: Mapping) -> str:
    """The kind of a tower with these parameters, or their shapes: CLIP alone has a norm before its blocks, of the
    others EVA has none behind them."""
    return "clip" if "ln_pre" in vit else "vit" if "ln_post" in vit else "eva"


def resized(table, positions: int, vit: Mapping):
    """`resize_pos_embed` of the table of a tower with parameters `vit`, by the rule of its kind."""
    return resize_pos_embed(table, positions, TOWERS[kind_of(vit)].traits.align_corners)
