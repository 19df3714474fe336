"""Key tables of BLIP-2: LAVIS's checkpoints, the parts they are made of, and transformers' names for them.

Rows, layouts and shapes are those of rules/blip.py. The letters of shapes:
  D F P p   image encoder, as there;  E: shared embedding
  W M T V   Q-Former: width, hidden width of its MLPs, positions, vocabulary;  Q: queries
  d f v     language model: width, hidden width of its MLP, vocabulary
  e t       OPT: width of the word embedding, rows of the position table (positions + 2)
  i b n     T5: heads times head dim, buckets of relative positions, heads
"""

from __future__ import annotations


def _under(torch: str, ours: str, rows):
    return tuple((torch + key, ours + path, layout, shape) for key, path, layout, shape in rows)


def _pair(torch: str, ours: str, layout: str, shape: str, bias: str = "same"):
    """Weight and bias of a linear layer; `shape`: of the weight."""
    rows = shape.split()[0]
    return (
        (f"{torch}.weight", f"{ours}/kernel", layout, shape),
        (f"{torch}.bias", f"{ours}/bias", bias, rows),
    )


def _norm(torch: str, ours: str, width: str):
    return ((f"{torch}.weight", f"{ours}/scale", "same", width), (f"{torch}.bias", f"{ours}/bias", "same", width))


def _projections(torch: dict[str, str], ours: str, width: str, kv: str):
    """q, k, v and out of an attention; torch: {"q": name of its linear layer, ...}; kv: the letter of the width that
    keys and values come from."""
    rows = []
    for name, source in (("q", width), ("k", kv), ("v", kv)):
        rows += _pair(torch[name], f"{ours}/{name}", "heads_in", f"{width} {source}", "heads_in_bias")
    return (*rows, *_pair(torch["out"], f"{ours}/out", "heads_out", f"{width} {width}"))


# --- image encoders ---------------------------------------------------------------------------------------------------
EVA = (
    ("cls_token", "cls", "lead2", "1 1 D"),
    ("pos_embed", "pos_embed", "lead", "1 P D"),
    *_pair("patch_embed.proj", "patch_embed", "conv", "D 3 p p"),
    *_norm("blocks.{i}.norm1", "blocks/ln1", "D"),
    ("blocks.{i}.attn.q_bias", "blocks/attn/q/bias", "heads_in_bias", "D"),
    ("blocks.{i}.attn.v_bias", "blocks/attn/v/bias", "heads_in_bias", "D"),
    ("blocks.{i}.attn.qkv.weight", "blocks/attn/{qkv}/kernel", "qkv", "3D D"),
    *_pair("blocks.{i}.attn.proj", "blocks/attn/out", "heads_out", "D D"),
    *_norm("blocks.{i}.norm2", "blocks/ln2", "D"),
    *_pair("blocks.{i}.mlp.fc1", "blocks/mlp/fc1", "linear", "F D"),
    *_pair("blocks.{i}.mlp.fc2", "blocks/mlp/fc2", "linear", "D F"),
)
_RES = "transformer.resblocks.{i}."
CLIP = (
    ("class_embedding", "cls", "same", "D"),
    ("positional_embedding", "pos_embed", "same", "P D"),
    ("conv1.weight", "patch_embed/kernel", "conv", "D 3 p p"),
    *_norm("ln_pre", "ln_pre", "D"),
    *_norm(_RES + "ln_1", "blocks/ln1", "D"),
    (_RES + "attn.in_proj_weight", "blocks/attn/{qkv}/kernel", "qkv", "3D D"),
    (_RES + "attn.in_proj_bias", "blocks/attn/{qkv}/bias", "qkv_bias", "3D"),
    *_pair(_RES + "attn.out_proj", "blocks/attn/out", "heads_out", "D D"),
    *_norm(_RES + "ln_2", "blocks/ln2", "D"),
    *_pair(_RES + "mlp.c_fc", "blocks/mlp/fc1", "linear", "F D"),
    *_pair(_RES + "mlp.c_proj", "blocks/mlp/fc2", "linear", "D F"),
)

# --- Q-Former ---------------------------------------------------------------------------------------------------------
_LAYER = "encoder.layer.{i}."


def _bert_attention(torch: str, ours: str, kv: str):
    names = {name: f"{torch}.self.{word}" for name, word in (("q", "query"), ("k", "key"), ("v", "value"))}
    return (
        *_projections(names | {"out": f"{torch}.output.dense"}, ours, "W", kv),
        *_norm(f"{torch}.output.LayerNorm", f"{ours}/ln", "W"),
    )


def _bert_mlp(suffix: str, ours: str):
    return (
        *_pair(f"{_LAYER}intermediate{suffix}.dense", f"blocks/{ours}/fc1", "linear", "M W"),
        *_pair(f"{_LAYER}output{suffix}.dense", f"blocks/{ours}/fc2", "linear", "W M"),
        *_norm(f"{_LAYER}output{suffix}.LayerNorm", f"blocks/{ours}_ln", "W"),
    )


QFORMER_QUERIES = (  # what queries alone go through
    *_norm("embeddings.LayerNorm", "embed/ln", "W"),
    *_bert_attention(_LAYER + "attention", "blocks/self_attn", "W"),
    *_bert_attention(_LAYER + "crossattention", "cross/blocks/cross_attn", "D"),
    *_bert_mlp("_query", "query_mlp"),
)
QFORMER_TEXT = (  # what texts need besides
    ("embeddings.word_embeddings.weight", "embed/word/embedding", "vocab", "V W"),
    ("embeddings.position_embeddings.weight", "embed/pos/embedding", "same", "T W"),
    *_bert_mlp("", "mlp"),
)
QFORMER_HEAD = (
    ("bias", "bias", "vocab", "V"),
    *_pair("transform.dense", "dense", "linear", "W W"),
    *_norm("transform.LayerNorm", "ln", "W"),
)

# --- language models --------------------------------------------------------------------------------------------------
_OPT_LAYER = "model.decoder.layers.{i}."
OPT = (
    ("model.decoder.embed_tokens.weight", "embed/word/embedding", "vocab", "v e"),
    ("model.decoder.embed_positions.weight", "embed/pos/embedding", "same", "t d"),
    ("model.decoder.project_in.weight", "project_in/kernel", "linear", "d e"),
    ("model.decoder.project_out.weight", "project_out/kernel", "linear", "e d"),
    *_norm(_OPT_LAYER + "self_attn_layer_norm", "blocks/ln1", "d"),
    *_projections(
        {name: f"{_OPT_LAYER}self_attn.{name}_proj" for name in ("q", "k", "v", "out")}, "blocks/attn", "d", "d"
    ),
    *_norm(_OPT_LAYER + "final_layer_norm", "blocks/ln2", "d"),
    *_pair(_OPT_LAYER + "fc1", "blocks/mlp/fc1", "linear", "f d"),
    *_pair(_OPT_LAYER + "fc2", "blocks/mlp/fc2", "linear", "d f"),
    *_norm("model.decoder.final_layer_norm", "ln_post", "d"),
)
OPT_TIED = (("lm_head.weight", "model.decoder.embed_tokens.weight"),)
OPT_OPTIONAL = (r"model\.decoder\.project_(in|out)\..*", r"model\.decoder\.final_layer_norm\..*")


def _t5_layers(half: str, attentions):
    """attentions: (torch name, ours) of each attention of a block, in order; the MLP is behind them."""
    rows = []
    for number, (torch, ours) in enumerate(attentions):
        layer = f"{half}.block.{{i}}.layer.{number}."
        rows += [
            (f"{layer}layer_norm.weight", f"{half}/blocks/ln{number + 1}/scale", "same", "d"),
            *((f"{layer}{torch}.{x}.weight", f"{half}/blocks/{ours}/{x}/kernel", "heads_in", "i d") for x in "qkv"),
            (f"{layer}{torch}.o.weight", f"{half}/blocks/{ours}/out/kernel", "heads_out", "d i"),
        ]
    number = len(attentions)
    layer = f"{half}.block.{{i}}.layer.{number}."
    return (
        (
            f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            f"{half}/rel_bias/embedding",
            "same",
            "b n",
        ),
        *rows,
        (f"{layer}layer_norm.weight", f"{half}/blocks/ln{number + 1}/scale", "same", "d"),
        *(
            (f"{layer}DenseReluDense.{x}.weight", f"{half}/blocks/mlp/{x}/kernel", "linear", shape)
            for x, shape in (("wi_0", "f d"), ("wi_1", "f d"), ("wo", "d f"))
        ),
        (f"{half}.final_layer_norm.weight", f"{half}/ln_post/scale", "same", "d"),
    )


T5 = (
    ("shared.weight", "embed/word/embedding", "vocab", "v d"),
    ("lm_head.weight", "lm_head/kernel", "vocab_linear", "v d"),
    *_t5_layers("encoder", (("SelfAttention", "attn"),)),
    *_t5_layers("decoder", (("SelfAttention", "attn"), ("EncDecAttention", "cross_attn"))),
)
T5_TIED = (  # never the head: FlanT5's is its own
    ("encoder.embed_tokens.weight", "shared.weight"),
    ("decoder.embed_tokens.weight", "shared.weight"),
)

# --- whole models -----------------------------------------------------------------------------------------------------
_SEEING = (  # image encoder, and Q-Former with queries alone
    *_under("visual_encoder.", "params/vit/", EVA),
    *_under("visual_encoder.", "params/vit/", CLIP),
    *_norm("ln_vision", "params/ln_vision", "D"),
    ("query_tokens", "params/query_tokens", "lead", "1 Q W"),
    *_under("Qformer.bert.", "params/qformer/", QFORMER_QUERIES),
)
_TEXT = _under("Qformer.bert.", "params/qformer/", QFORMER_TEXT)
_MATCHING = (
    ("temp", "params/temp", "same", ""),
    *_pair("vision_proj", "params/vision_proj", "linear", "E W"),
    *_pair("text_proj", "params/text_proj", "linear", "E W"),
    *_pair("itm_head", "params/itm_head", "linear", "2 W"),
)
_OPT = _under("opt_model.", "params/llm/", OPT)
_T5 = (*_under("t5_model.", "params/llm/", T5), *_pair("t5_proj", "params/llm_proj", "linear", "d W"))

FAMILIES = {
    "blip2": (
        *_SEEING,
        *_TEXT,
        *_MATCHING,
        *_under("Qformer.cls.predictions.", "params/qformer/lm_head/", QFORMER_HEAD),
    ),
    "blip2_itm": (*_SEEING, *_TEXT, *_MATCHING),
    "blip2_opt": (*_SEEING, *_OPT, *_pair("opt_proj", "params/llm_proj", "linear", "e W")),
    "blip2_t5": (*_SEEING, *_T5),
    "instruct_t5": (*_SEEING, *_TEXT, *_T5),
    "eva": _under("", "params/vit/", EVA),
    "clip": _under("", "params/vit/", CLIP),
    "opt": _under("", "params/llm/", OPT),
    "t5": _under("", "params/llm/", T5),
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
STACKS = {"qformer/cross": ("qformer", 0, 2)}  # cross-attention is in every second layer

_TIED_HEAD = (
    ("Qformer.cls.predictions.decoder.weight", "Qformer.bert.embeddings.word_embeddings.weight"),
    ("Qformer.cls.predictions.decoder.bias", "Qformer.cls.predictions.bias"),
)
_T5_COPIES = tuple((f"t5_model.{copy}", f"t5_model.{original}") for copy, original in T5_TIED)
TIED = {
    "blip2": _TIED_HEAD,
    "blip2_opt": tuple((f"opt_model.{copy}", f"opt_model.{original}") for copy, original in OPT_TIED),
    "blip2_t5": _T5_COPIES,
    "instruct_t5": _T5_COPIES,
    "opt": OPT_TIED,
    "t5": T5_TIED,
    **dict.fromkeys(("blip2_itm", "eva", "clip"), ()),
}
_POSITION_IDS = r"(^|\.)position_ids$"
# of T5's first release, which transformers leaves unread, too
_CROSS_BIAS = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$"
IGNORED = {
    **dict.fromkeys(FAMILIES, (_POSITION_IDS, _CROSS_BIAS, r"model\.decoder\.version$")),
    "eva": (r"(norm|fc_norm|head)\.(weight|bias)$", r"mask_token$"),  # of the last block on, which BLIP-2 leaves out
    "clip": (r"ln_post\.(weight|bias)$", r"proj$"),
}
_EVA_KEYS = r"visual_encoder\.(cls_token|pos_embed|patch_embed\..*|blocks\..*)"
_CLIP_KEYS = r"visual_encoder\.(class_embedding|positional_embedding|conv1\..*|ln_pre\..*|transformer\..*)"
# no name: read.py says which parts there are
_TOWERS = (("", _EVA_KEYS), ("", _CLIP_KEYS))
_OPT_PARTS = (("", r"opt_model\..*"), *(("", rf"opt_model\.{pattern}") for pattern in OPT_OPTIONAL))
OPTIONAL = {
    "blip2": _TOWERS,
    "blip2_itm": (*_TOWERS, ("the temperature", "temp")),
    "blip2_opt": (*_TOWERS, *_OPT_PARTS),
    **dict.fromkeys(("blip2_t5", "instruct_t5"), (*_TOWERS, ("", r"t5_model\..*"))),
    "opt": tuple(("", pattern) for pattern in OPT_OPTIONAL),
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
