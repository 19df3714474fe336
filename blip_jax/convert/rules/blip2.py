"""Key tables of BLIP-2: LAVIS's checkpoints, the parts they are made of, and transformers' names for them.

Rows, layouts and the letters of shapes are those of the tables that it puts together.
"""

from __future__ import annotations

from blip_jax.convert.rules import opt, qformer, t5
from blip_jax.convert.rules.vision import CLIP, EVA


def _under(torch: str, ours: str, rows):
    return tuple((torch + key, ours + path, layout, shape) for key, path, layout, shape in rows)


def _linear(torch: str, ours: str, rows: str, columns: str):
    return (
        (f"{torch}.weight", f"{ours}/kernel", "linear", f"{rows} {columns}"),
        (f"{torch}.bias", f"{ours}/bias", "same", rows),
    )


# --- whole models -----------------------------------------------------------------------------------------------------
_SEEING = (  # image encoder, and Q-Former with queries alone
    *_under("visual_encoder.", "params/vit/", EVA),
    *_under("visual_encoder.", "params/vit/", CLIP),
    *qformer.QUERIES,
)
_LM_HEAD = "params/qformer/lm_head/"
_OPT = opt.rows("opt_model.", projected=True)
_T5 = (*t5.rows("t5_model."), *_linear("t5_proj", "params/llm_proj", "C", "W"))

FAMILIES = {
    "blip2": (*_SEEING, *qformer.TEXT, *qformer.HEADS),
    "blip2_itm": (*_SEEING, *qformer.TEXT, *(row for row in qformer.HEADS if not row[1].startswith(_LM_HEAD))),
    "blip2_opt": (*_SEEING, *_OPT, *_linear("opt_proj", "params/llm_proj", "J", "W")),
    "blip2_t5": (*_SEEING, *_T5),
    "instruct_t5": (*_SEEING, *qformer.TEXT, *_T5),
    "eva": _under("", "params/vit/", EVA),
    "clip": _under("", "params/vit/", CLIP),
    "opt": opt.rows(projected=True),
    "t5": t5.rows(),
}
WORDS = {
    "blip2": ("a first-stage model of BLIP-2", ("blip2_itm",)),
    "blip2_itm": ("a matching model of BLIP-2", ()),
    "blip2_opt": ("a second-stage model of BLIP-2 with OPT", ()),
    "blip2_t5": ("a second-stage model of BLIP-2 with T5", ()),
    "instruct_t5": ("an InstructBLIP with T5", ()),
    "eva": ("an EVA image encoder", ()),
    "clip": ("a CLIP image encoder", ()),
    "opt": ("a language model OPT", ()),
    "t5": ("a language model T5", ()),
}
INITIAL = ("eva", "clip", "opt", "t5")
# families of a whole BLIP-2, and the language model of each
WHOLE = {"blip2": "", "blip2_itm": "", "blip2_opt": "opt", "blip2_t5": "t5", "instruct_t5": "t5"}
STACKS = qformer.STACKS
TIED = {
    "blip2": qformer.TIED,
    "blip2_opt": opt.tied("opt_model."),
    **dict.fromkeys(("blip2_t5", "instruct_t5"), t5.tied("t5_model.")),
    "opt": opt.tied(),
    "t5": t5.tied(),
    **dict.fromkeys(("blip2_itm", "eva", "clip"), ()),
}
IGNORED = dict.fromkeys(
    FAMILIES,
    (
        *qformer.IGNORED,
        # of T5's first release, which transformers leaves unread, too
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
        r"model\.decoder\.version$",
    ),
)
_EVA_KEYS = r"visual_encoder\.(cls_token|pos_embed|patch_embed\..*|blocks\..*)"
_CLIP_KEYS = r"visual_encoder\.(class_embedding|positional_embedding|conv1\..*|ln_pre\..*|transformer\..*)"
# no name: read.py says which parts there are
_TOWERS = (("", _EVA_KEYS), ("", _CLIP_KEYS))
_OPT_FORMS = (r"model\.decoder\.project_(in|out)\..*", r"model\.decoder\.final_layer_norm\..*")  # 350m and the others
_OPT_PARTS = (("", r"opt_model\..*"), *(("", rf"opt_model\.{pattern}") for pattern in _OPT_FORMS))
OPTIONAL = {
    "blip2": _TOWERS,
    "blip2_itm": (*_TOWERS, ("the temperature", "temp")),
    "blip2_opt": (*_TOWERS, *_OPT_PARTS),
    **dict.fromkeys(("blip2_t5", "instruct_t5"), (*_TOWERS, ("", r"t5_model\..*"))),
    "opt": tuple(("", pattern) for pattern in _OPT_FORMS),
}

# --- transformers' names ----------------------------------------------------------------------------------------------
_HF_BLOCK = "vision_model.encoder.layers.{i}."
_HF_SEEING = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.blocks.{i}.norm1.", _HF_BLOCK + "layer_norm1."),
    ("visual_encoder.blocks.{i}.norm2.", _HF_BLOCK + "layer_norm2."),
    ("visual_encoder.blocks.{i}.attn.qkv.", _HF_BLOCK + "self_attn.qkv."),
    ("visual_encoder.blocks.{i}.attn.proj.", _HF_BLOCK + "self_attn.projection."),
    ("visual_encoder.blocks.{i}.mlp.", _HF_BLOCK + "mlp."),
    ("ln_vision.", "vision_model.post_layernorm."),
    ("Qformer.bert.encoder.layer.{i}.attention.self.", "qformer.encoder.layer.{i}.attention.attention."),
    ("Qformer.bert.encoder.layer.{i}.crossattention.self.", "qformer.encoder.layer.{i}.crossattention.attention."),
    ("Qformer.bert.encoder.", "qformer.encoder."),
)
_HF_TEXT = (
    ("Qformer.bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("Qformer.bert.embeddings.word_embeddings.", "embeddings.word_embeddings."),
    ("Qformer.bert.embeddings.position_embeddings.", "embeddings.position_embeddings."),
)
_HF_T5 = (("t5_model.", "language_model."), ("t5_proj.", "language_projection."))
HF_NAMES = {  # family -> (LAVIS's, transformers') beginnings of names
    "blip2_itm": (
        *_HF_SEEING,
        *_HF_TEXT,
        ("vision_proj.", "vision_projection."),
        ("text_proj.", "text_projection."),
    ),
    "blip2_opt": (
        *_HF_SEEING,
        *_HF_TEXT[:1],
        ("opt_model.", "language_model."),
        ("opt_proj.", "language_projection."),
    ),
    "blip2_t5": (*_HF_SEEING, *_HF_TEXT[:1], *_HF_T5),
    "instruct_t5": (
        *_HF_SEEING,
        ("Qformer.bert.embeddings.LayerNorm.", "qformer.embeddings.layernorm."),
        ("Qformer.bert.embeddings.word_embeddings.", "qformer.embeddings.word_embeddings."),
        ("Qformer.bert.embeddings.position_embeddings.", "qformer.embeddings.position_embeddings."),
        *_HF_T5,
    ),
}
# transformers has one bias of q, k and v, of which the middle third is always zero; LAVIS has q's and v's
HF_BIAS = ("visual_encoder.blocks.{i}.attn.", _HF_BLOCK + "self_attn.qkv.bias")
