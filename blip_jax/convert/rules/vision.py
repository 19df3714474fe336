"""Key tables of BLIP-2's image towers, names without the prefix that a model gives them; rows as in rules/blip.py."""

from __future__ import annotations

from blip_jax.convert.rules.blip import VIT

EVA = (  # LAVIS's EVA ViT-g (eva_vit_g.pth): no bias of keys, no norm behind the blocks
    *(row for row in VIT if row[1] != "blocks/attn/{qkv}/bias" and not row[1].startswith("ln_post/")),
    ("blocks.{i}.attn.q_bias", "blocks/attn/q/bias", "heads_in_bias", "D"),
    ("blocks.{i}.attn.v_bias", "blocks/attn/v/bias", "heads_in_bias", "D"),
)
_RESBLOCK = "transformer.resblocks.{i}."
CLIP = (  # the visual tower of OpenAI's CLIP ViT-L/14, also LAVIS's (clip_vit_L.pth)
    ("class_embedding", "cls", "same", "D"),
    ("positional_embedding", "pos_embed", "same", "P D"),
    ("conv1.weight", "patch_embed/kernel", "conv", "D 3 p p"),
    ("ln_pre.weight", "ln_pre/scale", "same", "D"),
    ("ln_pre.bias", "ln_pre/bias", "same", "D"),
    (_RESBLOCK + "ln_1.weight", "blocks/ln1/scale", "same", "D"),
    (_RESBLOCK + "ln_1.bias", "blocks/ln1/bias", "same", "D"),
    (_RESBLOCK + "attn.in_proj_weight", "blocks/attn/{qkv}/kernel", "qkv", "3D D"),
    (_RESBLOCK + "attn.in_proj_bias", "blocks/attn/{qkv}/bias", "qkv_bias", "3D"),
    (_RESBLOCK + "attn.out_proj.weight", "blocks/attn/out/kernel", "heads_out", "D D"),
    (_RESBLOCK + "attn.out_proj.bias", "blocks/attn/out/bias", "same", "D"),
    (_RESBLOCK + "ln_2.weight", "blocks/ln2/scale", "same", "D"),
    (_RESBLOCK + "ln_2.bias", "blocks/ln2/bias", "same", "D"),
    (_RESBLOCK + "mlp.c_fc.weight", "blocks/mlp/fc1/kernel", "linear", "F D"),
    (_RESBLOCK + "mlp.c_fc.bias", "blocks/mlp/fc1/bias", "same", "F"),
    (_RESBLOCK + "mlp.c_proj.weight", "blocks/mlp/fc2/kernel", "linear", "D F"),
    (_RESBLOCK + "mlp.c_proj.bias", "blocks/mlp/fc2/bias", "same", "D"),
)

TOWER_PREFIXES = ("visual_encoder.", "visual.", "")  # of the names in BLIP-2's, in CLIP's and in a tower's own files
# kind of a tower -> (a name that only it has, names of its blocks up to their number, regex of what only whole towers
# have, of which BLIP-2 takes what the block before the last gives)
TOWER_NAMES = {
    "eva": ("blocks.0.attn.q_bias", "blocks.", r"(norm|fc_norm|head)\.(weight|bias)"),
    "clip": ("class_embedding", "transformer.resblocks.", r"ln_post\.(weight|bias)|proj"),
}
