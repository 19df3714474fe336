"""Image tower of CLIP as BLIP-2 uses it: ViT-L/14 without its last block (CLIP paper, arXiv 2103.00020, section 2.4;
LAVIS's clip_vit.py)."""

from __future__ import annotations

from blip_jax.models.layers.norm import quick_gelu
from blip_jax.models.vision.vit import Traits, Vit


class Clip(Vit):
    """Pixels to tokens as `Vit` has it: a norm before the blocks and none behind, since BLIP-2 has one of its own
    (`ln_vision`); patches without bias, QuickGELU."""

    traits = Traits(eps=1e-5, activation=quick_gelu, patch_bias=False, ln_pre=True, ln_post=False, align_corners=True)
