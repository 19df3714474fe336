"""Sizes of the published models, and small ones for laptops and tests."""

from __future__ import annotations

from typing import Any, NamedTuple

# reference ViT sizes (BLIP paper, section 4.1); pos_std: standard deviation of the initial position table
VIT_SIZES = {
    "base": dict(width=768, depth=12, heads=12, mlp=3072, patch=16, pos_std=0.02),
    "large": dict(width=1024, depth=24, heads=16, mlp=4096, patch=16, pos_std=0.02),
    "small": dict(width=256, depth=4, heads=8, mlp=1024, patch=8, pos_std=0.02),
    "tiny": dict(width=48, depth=2, heads=4, mlp=192, patch=8, pos_std=0.02),
}
# towers of BLIP-2, each without the last block of the published one (BLIP-2 paper, section 3.3); `kind`: the module of
# blip_jax/models/vision
TOWER_SIZES = {
    "clip_l": dict(kind="clip", width=1024, depth=23, heads=16, mlp=4096, patch=14, pos_std=0.02),
    "eva_g": dict(kind="eva", width=1408, depth=39, heads=16, mlp=6144, patch=14, pos_std=0.02),
    "clip_tiny": dict(kind="clip", width=64, depth=2, heads=2, mlp=128, patch=8, pos_std=0.02),
    "eva_tiny": dict(kind="eva", width=48, depth=2, heads=2, mlp=96, patch=8, pos_std=0.02),
}
MED_SIZES = {  # BERT-base for both published sizes (BLIP paper, section 3.1)
    "base": dict(width=768, layers=12, heads=12, mlp=3072, positions=512, vocab_size=30524),
    "large": dict(width=768, layers=12, heads=12, mlp=3072, positions=512, vocab_size=30524),
    "small": dict(width=256, layers=4, heads=8, mlp=1024, positions=64, vocab_size=30524),
    "tiny": dict(width=32, layers=2, heads=4, mlp=64, positions=40, vocab_size=120),
}
QFORMER_SIZES = {  # BERT-base, cross-attention in every second layer (BLIP-2 paper, section 3.1)
    "base": dict(width=768, layers=12, heads=12, mlp=3072, positions=512, vocab_size=30523, queries=32),
    "tiny": dict(width=32, layers=2, heads=4, mlp=64, positions=40, vocab_size=119, queries=4),
}
# Language models; `kind`: the module of blip_jax/models/text. OPT (arXiv 2205.01068, table 1): embed_width is that of
# the word embedding, which 350m projects to `width`; pre_norm False: LayerNorm behind the residual. T5 v1.1 (FlanT5):
# `layers` of the encoder and as many of the decoder.
LLM_SIZES = {
    "opt_125m": dict(width=768, layers=12, heads=12, mlp=3072, embed_width=768, pre_norm=True),
    "opt_350m": dict(width=1024, layers=24, heads=16, mlp=4096, embed_width=512, pre_norm=False),
    "opt_2.7b": dict(width=2560, layers=32, heads=32, mlp=10240, embed_width=2560, pre_norm=True),
    "opt_6.7b": dict(width=4096, layers=32, heads=32, mlp=16384, embed_width=4096, pre_norm=True),
    "flant5_base": dict(width=768, layers=12, heads=12, head_dim=64, mlp=2048),
    "flant5_large": dict(width=1024, layers=24, heads=16, head_dim=64, mlp=2816),
    "flant5_xl": dict(width=2048, layers=24, heads=32, head_dim=64, mlp=5120),
    "flant5_xxl": dict(width=4096, layers=24, heads=64, head_dim=64, mlp=10240),
    "opt_tiny": dict(width=32, layers=2, heads=4, mlp=64, embed_width=32, pre_norm=True, positions=96, vocab_size=300),
    "flant5_tiny": dict(width=32, layers=2, heads=4, head_dim=8, mlp=64, vocab_size=140),
}
_OPT = dict(kind="opt", positions=2048, vocab_size=50272)
_T5 = dict(kind="t5", buckets=32, max_distance=128, vocab_size=32128)
LLM_SIZES = {name: (_OPT if name.startswith("opt") else _T5) | sizes for name, sizes in LLM_SIZES.items()}

# BLIP-2 as published and as small as tests need it -> keys of TOWER_SIZES, QFORMER_SIZES and LLM_SIZES; the first stage
# has no language model
BLIP2_MODELS = {
    "blip2_stage1": ("eva_g", "base", ""),
    "blip2_stage1_vitl": ("clip_l", "base", ""),
    "blip2_stage1_tiny": ("eva_tiny", "tiny", ""),
    "blip2_opt2.7b": ("eva_g", "base", "opt_2.7b"),
    "blip2_opt6.7b": ("eva_g", "base", "opt_6.7b"),
    "blip2_flant5xl": ("eva_g", "base", "flant5_xl"),
    "blip2_flant5xxl": ("eva_g", "base", "flant5_xxl"),
    "blip2_vitl_opt2.7b": ("clip_l", "base", "opt_2.7b"),
    "blip2_vitl_flant5xl": ("clip_l", "base", "flant5_xl"),
    "blip2_opt_tiny": ("eva_tiny", "tiny", "opt_tiny"),
    "blip2_flant5_tiny": ("eva_tiny", "tiny", "flant5_tiny"),
}


ADDED = ("[DEC]", "[ENC]")  # tokens that the tokenizer has behind the entries of its file


class TextSide(NamedTuple):
    """The model that reads the texts of a config."""

    part: str  # its name in `cfg.model`
    sizes: Any  # there
    added: tuple[str, ...]  # of ADDED, those that its vocabulary has

    @property
    def positions(self) -> int:
        """The most tokens of a text; T5's may be as long as one likes."""
        return self.sizes.get("positions", 1 << 20)

    @property
    def vocab_size(self) -> int:
        return self.sizes.vocab_size


def text_side(model) -> TextSide:
    """Of `cfg.model`: BLIP's MED, with [DEC] and [ENC], BLIP-2's Q-Former, with [DEC], or its language model."""
    if "med" in model:
        return TextSide("med", model.med, ADDED)
    if model.llm:
        return TextSide("llm", model.llm, ())
    return TextSide("qformer", model.qformer, ADDED[:1])
