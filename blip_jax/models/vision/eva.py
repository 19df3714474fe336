"""Image tower of EVA-CLIP as BLIP-2 uses it: ViT-g/14 without its last block (BLIP-2 paper, section 3.3; LAVIS's
eva_vit.py)."""

from __future__ import annotations

from blip_jax.models.vision.vit import Traits, Vit


class Eva(Vit):
    """Pixels to tokens as `Vit` has it, heads of 88 at full size: its keys have no bias, and no norm follows its
    blocks, since BLIP-2 has one of its own (`ln_vision`)."""

    traits = Traits(eps=1e-6, key_bias=False, ln_post=False)
