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
_OPT = (*opt.rows("opt_model.", projected=True), *_linear("opt_proj", "params/llm_proj", "J", "W"))
_T5 = (*t5.rows("t5_model."), *_linear("t5_proj", "params/llm_proj", "C", "W"))

_ALL = (*_SEEING, *qformer.TEXT, *qformer.HEADS)


def _without(rows, *paths: str):
    return tuple(row for row in rows if not row[1].startswith(tuple(f"params/{path}" for path in paths)))


_HEADS = ("qformer/lm_head/", "itm_head/", "temp")
FAMILIES = {
    "blip2": _ALL,
    "blip2_itm": _without(_ALL, "qformer/lm_head/"),
    # transformers' classes of one half each, whose Q-Former is whole
    "blip2_vision": _without(_ALL, *_HEADS, "qformer/embed/word/", "qformer/embed/pos/", "text_proj/"),
    "blip2_text": _without(_ALL, *_HEADS, "vit/", "ln_vision/", "vision_proj/"),
    "blip2_opt": (*_SEEING, *_OPT),
    "blip2_t5": (*_SEEING, *_T5),
    "instruct_opt": (*_SEEING, *qformer.TEXT, *_OPT),
    "instruct_t5": (*_SEEING, *qformer.TEXT, *_T5),
    "eva": _under("", "params/vit/", EVA),
    "clip": _under("", "params/vit/", CLIP),
    "opt": opt.rows(projected=True),
    "t5": t5.rows(),
}
WORDS = {
    "blip2": ("a first-stage model of BLIP-2", ("blip2_itm", "blip2_vision", "blip2_text")),
    "blip2_itm": ("a matching model of BLIP-2", ("blip2_vision", "blip2_text")),
    "blip2_vision": ("the images' half of a matching model of BLIP-2", ()),
    "blip2_text": ("the texts' half of a matching model of BLIP-2", ()),
    "blip2_opt": ("a second-stage model of BLIP-2 with OPT", ()),
    "blip2_t5": ("a second-stage model of BLIP-2 with T5", ()),
    "instruct_opt": ("an InstructBLIP with OPT", ()),
    "instruct_t5": ("an InstructBLIP with T5", ()),
    "eva": ("an EVA image encoder", ()),
    "clip": ("a CLIP image encoder", ()),
    "opt": ("a language model OPT", ()),
    "t5": ("a language model T5", ()),
}
INITIAL = ("eva", "clip", "opt", "t5")
HALVES = ("blip2_vision", "blip2_text")
MATCHING = ("blip2_itm", *HALVES)  # those without language modelling
# families of a whole BLIP-2, and the language model of each
WHOLE = dict.fromkeys(("blip2", *MATCHING), "") | {
    "blip2_opt": "opt",
    "blip2_t5": "t5",
    "instruct_opt": "opt",
    "instruct_t5": "t5",
}
READS_QUESTIONS = ("instruct_opt", "instruct_t5")  # those whose Q-Former does; LAVIS has none with OPT
STACKS = qformer.STACKS
TIED = {
    "blip2": qformer.TIED,
    **dict.fromkeys(("blip2_opt", "instruct_opt"), opt.tied("opt_model.")),
    **dict.fromkeys(("blip2_t5", "instruct_t5"), t5.tied("t5_model.")),
    "opt": opt.tied(),
    "t5": t5.tied(),
    **dict.fromkeys((*MATCHING, "eva", "clip"), ()),
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
    **dict.fromkeys(("blip2", "blip2_vision"), _TOWERS),
    "blip2_itm": (*_TOWERS, ("the temperature", "temp")),
    **dict.fromkeys(("blip2_opt", "instruct_opt"), (*_TOWERS, *_OPT_PARTS)),
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
_HF_QUESTIONS = (
    ("Qformer.bert.embeddings.LayerNorm.", "qformer.embeddings.layernorm."),
    ("Qformer.bert.embeddings.word_embeddings.", "qformer.embeddings.word_embeddings."),
    ("Qformer.bert.embeddings.position_embeddings.", "qformer.embeddings.position_embeddings."),
)
_HF_OPT = (("opt_model.", "language_model."), ("opt_proj.", "language_projection."))
_HF_T5 = (("t5_model.", "language_model."), ("t5_proj.", "language_projection."))
HF_NAMES = {  # family -> (LAVIS's, transformers') beginnings of names
    "blip2_itm": (
        *_HF_SEEING,
        *_HF_TEXT,
        ("vision_proj.", "vision_projection."),
        ("text_proj.", "text_projection."),
    ),
    "blip2_opt": (*_HF_SEEING, *_HF_TEXT[:1], *_HF_OPT),
    "blip2_t5": (*_HF_SEEING, *_HF_TEXT[:1], *_HF_T5),
    "instruct_opt": (*_HF_SEEING, *_HF_QUESTIONS, *_HF_OPT),
    "instruct_t5": (*_HF_SEEING, *_HF_QUESTIONS, *_HF_T5),
}
HF_NAMES |= dict.fromkeys(HALVES, HF_NAMES["blip2_itm"])
# transformers has one bias of q, k and v, of which the middle third is always zero; LAVIS has q's and v's
HF_BIAS = ("visual_encoder.blocks.{i}.attn.", _HF_BLOCK + "self_attn.qkv.bias")
