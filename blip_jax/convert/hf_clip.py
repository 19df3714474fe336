"""Hugging Face folders of CLIP: its image tower, under the names of OpenAI's files."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from blip_jax.convert import foreign, hf
from blip_jax.trees import Lazy

KINDS = ("clip", "clip_vision_model")  # model_type of CLIPModel, of the image tower with or without its projection
TOWER = "vision_model."  # which CLIPVisionModel of transformers 5 leaves out
NAMES = (  # (OpenAI's, transformers') beginnings of names
    ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("conv1.", "embeddings.patch_embedding."),
    ("ln_pre.", "pre_layrnorm."),  # as transformers spells it
    ("ln_post.", "post_layernorm."),
    ("transformer.resblocks.{i}.ln_1.", "encoder.layers.{i}.layer_norm1."),
    ("transformer.resblocks.{i}.ln_2.", "encoder.layers.{i}.layer_norm2."),
    ("transformer.resblocks.{i}.attn.out_proj.", "encoder.layers.{i}.self_attn.out_proj."),
    ("transformer.resblocks.{i}.attn.", "encoder.layers.{i}.self_attn."),
    ("transformer.resblocks.{i}.mlp.c_fc.", "encoder.layers.{i}.mlp.fc1."),
    ("transformer.resblocks.{i}.mlp.c_proj.", "encoder.layers.{i}.mlp.fc2."),
)
SIZES = {"hidden_size": "D", "intermediate_size": "F", "patch_size": "p"}
FIXED = {  # field -> what the tower here has, which is also what transformers takes where it is missing
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
HEADS, IMAGE_SIZE = 12, 224  # where transformers finds no number


def under_original_names(weights: Mapping) -> dict:
    """The tensors under OpenAI's names, q, k and v in one; what is not of the tower keeps its name. Nothing is read."""
    out, apart = {}, {}
    for name in weights:
        inner = name.removeprefix(TOWER)
        if inner == name and name.startswith(("text_model.", "text_", "visual_", "logit_")):
            out[name] = weights[name]
            continue
        for pattern, new in hf.renaming((theirs, original) for original, theirs in NAMES):
            inner = pattern.sub(new, inner)
        begin, _, last = inner.rpartition("attn.")
        if begin and last[:7] in ("q_proj.", "k_proj.", "v_proj."):
            apart.setdefault(f"{begin}attn.in_proj_{last[7:]}", {})[last[0]] = weights[name]
        elif not inner.endswith("position_ids"):
            out[f"visual.{inner}"] = weights[name]
    for name, found in apart.items():
        out[f"visual.{name}"] = _joined(name, found)
    return out


def _joined(name: str, found: Mapping) -> Lazy:
    """Of q, k and v one tensor. ValueError: one of them is missing, or of another shape."""
    shapes = {which: tuple(x.shape) for which, x in found.items()}
    if shapes.keys() != set("qkv") or len({*shapes.values()}) > 1:
        raise ValueError(f"{name}: q, k and v of one shape are expected, there are {shapes}")
    parts = [found[which] for which in "qkv"]
    shape = (3 * parts[0].shape[0], *parts[0].shape[1:])
    return Lazy(shape, parts[0].dtype, lambda: np.concatenate([np.asarray(x) for x in parts]))


def said(config: Mapping, sizes: Mapping[str, int], layers: Mapping[str, int]) -> foreign.Said:
    """config.json against the tensors of the tower, without its last block."""
    vision = config.get("vision_config") if config.get("model_type") == "clip" else config
    if not isinstance(vision, Mapping):
        return foreign.Said({}, ["vision_config is missing"], [])
    problems = foreign.fixed({name: x for name, x in vision.items() if name not in FIXED})
    problems += [
        f"{foreign.told(field, vision[field])}, but the weights have {sizes[letter]}"
        for field, letter in SIZES.items()
        if vision.get(field) is not None and letter in sizes and vision[field] != sizes[letter]
    ]
    problems += [
        f"{foreign.told(field, vision[field])}: the CLIP tower here has {value!r}"
        for field, value in FIXED.items()
        if vision.get(field) is not None and vision[field] != value
    ]
    blocks = vision.get("num_hidden_layers")
    if blocks is not None and blocks not in (layers["vit"], layers["vit"] + 1):
        problems.append(f"{foreign.told('num_hidden_layers', blocks)}, but the weights have {layers['vit']}")
    size, patch = vision.get("image_size") or IMAGE_SIZE, sizes.get("p", 1)
    if not foreign.whole(size) or sizes.get("P", 0) != 1 + (size // patch) ** 2:
        problems.append(f"{foreign.told('image_size', size)}, but the weights have {sizes.get('P')} positions")
    heads = vision.get("num_attention_heads") or HEADS
    if not foreign.whole(heads) or sizes.get("D", 0) % heads:
        problems.append(f"{foreign.told('num_attention_heads', heads)}: it must divide the width {sizes.get('D')}")
    known = {*SIZES, *FIXED, *foreign.FIXED, "num_hidden_layers", "image_size", "num_attention_heads", "model_type"}
    known |= {"architectures", "vision_config", "text_config", "projection_dim"}
    rest = [field for field in vision if field not in known and vision[field] is not None]
    return foreign.Said({"vit": heads}, problems, foreign.ignored(rest))
