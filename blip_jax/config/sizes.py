"""Sizes of the published models, and small ones for laptops and tests."""

from __future__ import annotations

# reference ViT sizes (BLIP paper, section 4.1); pos_std: standard deviation of the initial position table
VIT_SIZES = {
    "base": dict(width=768, depth=12, heads=12, mlp=3072, patch=16, pos_std=0.02),
    "large": dict(width=1024, depth=24, heads=16, mlp=4096, patch=16, pos_std=0.02),
    "small": dict(width=256, depth=4, heads=8, mlp=1024, patch=8, pos_std=0.02),
    "tiny": dict(width=48, depth=2, heads=4, mlp=192, patch=8, pos_std=0.02),
}
MED_SIZES = {  # BERT-base for both published sizes (BLIP paper, section 3.1)
    "base": dict(width=768, layers=12, heads=12, mlp=3072, positions=512, vocab_size=30524),
    "large": dict(width=768, layers=12, heads=12, mlp=3072, positions=512, vocab_size=30524),
    "small": dict(width=256, layers=4, heads=8, mlp=1024, positions=64, vocab_size=30524),
    "tiny": dict(width=32, layers=2, heads=4, mlp=64, positions=40, vocab_size=120),
}
