"""Key tables: which PyTorch tensor is which parameter, and how it is laid out.

Tables only; `convert/apply.py` runs them both ways.

A row is (torch key, our path, layout, torch shape). `{i}` counts layers: torch keys with `{i}` are the slices of one
stacked parameter. Layouts (torch -> ours), with N heads, H head dim:
  same                as it is
  lead / lead2        [1, ...] -> [...] / [1, 1, D] -> [D]
  linear              [out, in] -> [in, out]
  conv                [D, 3, p, p] -> [p, p, 3, D]
  heads_in            [N*H, D] -> [D, N, H]
  heads_in_bias       [N*H] -> [N, H]
  heads_out           [D, N*H] -> [N, H, D]
  qkv / qkv_bias      three stacked blocks of rows, one for each path (path holds `{qkv}`), then heads_in
                      or heads_in_bias
  vocab               rows padded with zeros to the stored vocabulary
  vocab_linear        [V, D] -> [D, V], columns padded likewise
  transpose           [E, K] -> [K, E]
  scalar              [1] -> []
Shapes are words of a number, a letter, or both (a multiple); a letter is one size in a whole family:
  D F P p   ViT: width, hidden width of its MLP, positions (1 + a square), pixels of a patch
  W M T V   MED: width, hidden width of its MLP, positions, vocabulary; X: width of what cross-attention looks at,
            D or W
  E K       shared embedding, queue;  N H: heads and head dim, where a file shows them
"""

from __future__ import annotations

VIT = (
    ("cls_token", "cls", "lead2", "1 1 D"),
    ("pos_embed", "pos_embed", "lead", "1 P D"),
    ("patch_embed.proj.weight", "patch_embed/kernel", "conv", "D 3 p p"),
    ("patch_embed.proj.bias", "patch_embed/bias", "same", "D"),
    ("blocks.{i}.norm1.weight", "blocks/ln1/scale", "same", "D"),
    ("blocks.{i}.norm1.bias", "blocks/ln1/bias", "same", "D"),
    ("blocks.{i}.attn.qkv.weight", "blocks/attn/{qkv}/kernel", "qkv", "3D D"),
    ("blocks.{i}.attn.qkv.bias", "blocks/attn/{qkv}/bias", "qkv_bias", "3D"),
    ("blocks.{i}.attn.proj.weight", "blocks/attn/out/kernel", "heads_out", "D D"),
    ("blocks.{i}.attn.proj.bias", "blocks/attn/out/bias", "same", "D"),
    ("blocks.{i}.norm2.weight", "blocks/ln2/scale", "same", "D"),
    ("blocks.{i}.norm2.bias", "blocks/ln2/bias", "same", "D"),
    ("blocks.{i}.mlp.fc1.weight", "blocks/mlp/fc1/kernel", "linear", "F D"),
    ("blocks.{i}.mlp.fc1.bias", "blocks/mlp/fc1/bias", "same", "F"),
    ("blocks.{i}.mlp.fc2.weight", "blocks/mlp/fc2/kernel", "linear", "D F"),
    ("blocks.{i}.mlp.fc2.bias", "blocks/mlp/fc2/bias", "same", "D"),
    ("norm.weight", "ln_post/scale", "same", "D"),
    ("norm.bias", "ln_post/bias", "same", "D"),
)


def _projections(torch: str, ours: str, kv: str, twin: str = ""):
    """Rows of q, k, v and out of one attention.

    kv: the letter of the width that keys and values come from. twin: the number that tells the originals' two
    cross-attentions of one layer apart.
    """
    rows = []
    for theirs, mine, width in (("query", "q", "W"), ("key", "k", kv), ("value", "v", kv)):
        rows += [
            (f"{torch}.self{twin}.{theirs}.weight", f"{ours}/{mine}/kernel", "heads_in", f"W {width}"),
            (f"{torch}.self{twin}.{theirs}.bias", f"{ours}/{mine}/bias", "heads_in_bias", "W"),
        ]
    return (
        *rows,
        (f"{torch}.output.dense{twin}.weight", f"{ours}/out/kernel", "heads_out", "W W"),
        (f"{torch}.output.dense{twin}.bias", f"{ours}/out/bias", "same", "W"),
    )


def _norm(torch: str, ours: str):
    return ((f"{torch}.weight", f"{ours}/scale", "same", "W"), (f"{torch}.bias", f"{ours}/bias", "same", "W"))


def _attention(torch: str, ours: str, kv: str = "W"):
    return (*_projections(torch, ours, kv), *_norm(f"{torch}.output.LayerNorm", f"{ours}/ln"))


def _dense(torch: str, ours: str, rows: str, columns: str):
    return (
        (f"{torch}.weight", f"{ours}/kernel", "linear", f"{rows} {columns}"),
        (f"{torch}.bias", f"{ours}/bias", "same", rows),
    )


LAYER = "encoder.layer.{i}."
SELF_ATTENTION = _attention(LAYER + "attention", "blocks/self_attn")
DECODER_SELF_ATTENTION = _attention(LAYER + "attention", "blocks/self_attn_dec")
TEXT_SHARED = (  # what text encoder and decoder have in common: every path without "/attention"
    ("embeddings.word_embeddings.weight", "embed/word/embedding", "vocab", "V W"),
    ("embeddings.position_embeddings.weight", "embed/pos/embedding", "same", "T W"),
    *_norm("embeddings.LayerNorm", "embed/ln"),
    *_attention(LAYER + "crossattention", "blocks/cross_attn", "X"),
    *_dense(LAYER + "intermediate.dense", "blocks/mlp/fc1", "M", "W"),
    *_dense(LAYER + "output.dense", "blocks/mlp/fc2", "W", "M"),
    *_norm(LAYER + "output.LayerNorm", "blocks/mlp_ln"),
)
LM_HEAD = (
    ("bias", "bias", "vocab", "V"),
    *_dense("transform.dense", "dense", "W", "W"),
    *_norm("transform.LayerNorm", "ln"),
)


def _under(torch: str, ours: str, rows, cross: str = "D"):
    """`rows` with both prefixes; `cross` is the X of their shapes."""
    return tuple((torch + t, ours + o, layout, shape.replace("X", cross)) for t, o, layout, shape in rows)


_TEMP = ("temp", "params/temp", "same", "")
_VIT = _under("visual_encoder.", "params/vit/", VIT)
_TEXT = _under("text_encoder.", "params/med/", TEXT_SHARED + SELF_ATTENTION)
_ENCODER = (
    *_VIT,
    *_TEXT,
    *_dense("vision_proj", "params/vision_proj", "E", "D"),
    *_dense("text_proj", "params/text_proj", "E", "W"),
    *_dense("itm_head", "params/itm_head", "2", "W"),
)
_MOMENTUM = (
    *_under("visual_encoder_m.", "momentum/params/vit/", VIT),
    *_under("text_encoder_m.", "momentum/params/med/", TEXT_SHARED + SELF_ATTENTION),
    *_dense("vision_proj_m", "momentum/params/vision_proj", "E", "D"),
    *_dense("text_proj_m", "momentum/params/text_proj", "E", "W"),
    ("image_queue", "momentum/queue/img", "transpose", "E K"),
    ("text_queue", "momentum/queue/txt", "transpose", "E K"),
)
_DECODER = (
    *_under("text_decoder.bert.", "params/med/", DECODER_SELF_ATTENTION),
    *_under("text_decoder.cls.predictions.", "params/med/lm_head/", LM_HEAD),
)

_CROSS = LAYER + "crossattention"
NLVR_TEXT = (  # two cross-attentions, one for each image, under one LayerNorm
    *(row for row in TEXT_SHARED if "/cross_attn/" not in row[1]),
    *SELF_ATTENTION,
    *_projections(_CROSS, "blocks/cross_attn0", "X", "0"),
    *_projections(_CROSS, "blocks/cross_attn1", "X", "1"),
    *_norm(_CROSS + ".output.LayerNorm", "blocks/cross_ln"),
    *_dense(_CROSS + ".output.merge_layer", "merge/blocks", "W", "2W"),
)
# stack -> that with which its layers are counted, its first layer, its step
STACKS = {
    "med_dec": ("med", 0, 1),
    "med/merge": ("med", 6, 1),  # earlier layers average the two
}

_FLAX_BLOCK = "Transformer/encoderblock_{i}/"
_FLAX_ATTENTION = _FLAX_BLOCK + "MultiHeadDotProductAttention_1/"
_AUGREG = (  # the .npz files of "How to train your ViT?": kernels are laid out as ours
    ("cls", "cls", "lead2", "1 1 D"),
    ("Transformer/posembed_input/pos_embedding", "pos_embed", "lead", "1 P D"),
    ("embedding/kernel", "patch_embed/kernel", "same", "p p 3 D"),
    ("embedding/bias", "patch_embed/bias", "same", "D"),
    *(
        (_FLAX_BLOCK + theirs, f"blocks/{ours}", "same", shape)
        for theirs, ours, shape in (
            ("LayerNorm_0/scale", "ln1/scale", "D"),
            ("LayerNorm_0/bias", "ln1/bias", "D"),
            ("LayerNorm_2/scale", "ln2/scale", "D"),
            ("LayerNorm_2/bias", "ln2/bias", "D"),
            ("MlpBlock_3/Dense_0/kernel", "mlp/fc1/kernel", "D F"),
            ("MlpBlock_3/Dense_0/bias", "mlp/fc1/bias", "F"),
            ("MlpBlock_3/Dense_1/kernel", "mlp/fc2/kernel", "F D"),
            ("MlpBlock_3/Dense_1/bias", "mlp/fc2/bias", "D"),
        )
    ),
    *(
        (f"{_FLAX_ATTENTION}{theirs}/{leaf}", f"blocks/attn/{ours}/{leaf}", "same", shape)
        for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"))
        for leaf, shape in (("kernel", "D N H"), ("bias", "N H"))
    ),
    (_FLAX_ATTENTION + "out/kernel", "blocks/attn/out/kernel", "same", "N H D"),
    (_FLAX_ATTENTION + "out/bias", "blocks/attn/out/bias", "same", "D"),
    ("Transformer/encoder_norm/scale", "ln_post/scale", "same", "D"),
    ("Transformer/encoder_norm/bias", "ln_post/bias", "same", "D"),
)
_BERT = tuple(row for row in TEXT_SHARED if "/cross_attn/" not in row[1])

FAMILIES = {  # family -> rows; paths start at the train state's `params` or `momentum`
    "pretrain": (_TEMP, *_ENCODER, *_DECODER, *_MOMENTUM, ("queue_ptr", "momentum/queue/ptr", "scalar", "1")),
    "retrieval": (
        _TEMP,
        *_ENCODER,
        *_MOMENTUM,
        ("idx_queue", "momentum/queue/image_id", "lead", "1 K"),
        ("ptr_queue", "momentum/queue/ptr", "scalar", "1"),
    ),
    "itm": _ENCODER,
    "features": (*_VIT, *_TEXT),
    "dialog": (*_VIT, *_TEXT, *_dense("itm_head", "params/itm_head", "2", "W")),
    "caption": (
        *_VIT,
        *_under("text_decoder.bert.", "params/med/", TEXT_SHARED + DECODER_SELF_ATTENTION),
        *_under("text_decoder.cls.predictions.", "params/med/lm_head/", LM_HEAD),
    ),
    "vqa": (
        *_VIT,
        *_TEXT,
        *_under("text_decoder.bert.", "params/med_dec/", TEXT_SHARED + DECODER_SELF_ATTENTION, cross="W"),
        *_under("text_decoder.cls.predictions.", "params/med_dec/lm_head/", LM_HEAD),
    ),
    "nlvr": (
        *_VIT,
        *_under("text_encoder.", "params/med/", NLVR_TEXT),
        *_dense("cls_head.0", "params/cls_head/dense", "W", "W"),
        *_dense("cls_head.2", "params/cls_head/out", "2", "W"),
    ),
    "deit": _under("", "params/vit/", VIT),
    "augreg": _under("", "params/vit/", _AUGREG),
    "bert": (
        *_under("bert.", "params/med/", _BERT + SELF_ATTENTION),
        *_under("bert.", "params/med/", DECODER_SELF_ATTENTION),
        *_under("cls.predictions.", "params/med/lm_head/", LM_HEAD),
    ),
}
WORDS = {  # family -> what it is, and which models it is complete for besides itself
    "pretrain": ("a pre-training model", ("retrieval", "itm", "features", "caption", "deit", "bert")),
    "retrieval": ("a retrieval model", ("itm", "features")),
    "itm": ("a matching model", ("features",)),
    "features": ("a feature extractor", ()),
    "dialog": ("a visual dialog model", ("features",)),
    "caption": ("a captioner", ()),
    "vqa": ("a question answering model", ()),
    "nlvr": ("an NLVR2 model", ()),
    "deit": ("initial weights of a ViT, from timm", ()),
    "augreg": ("initial weights of a ViT, from Flax", ()),
    "bert": ("initial weights of the MED, from BERT", ()),
}
INITIAL = ("deit", "augreg", "bert")  # families that are a part of a model, for the start of pre-training

_TIED_HEAD = ("text_decoder.cls.predictions.decoder.bias", "text_decoder.cls.predictions.bias")
_TIED_DECODER = (
    ("text_decoder.cls.predictions.decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight"),
    _TIED_HEAD,
)
TIED = {  # family -> (torch key of the copy, torch key of the original): equal on reading, written again on export
    "pretrain": (
        *((f"text_decoder.bert.{row[0]}", f"text_encoder.{row[0]}") for row in TEXT_SHARED),
        ("text_decoder.cls.predictions.decoder.weight", "text_encoder.embeddings.word_embeddings.weight"),
        _TIED_HEAD,
    ),
    "caption": _TIED_DECODER,
    "vqa": _TIED_DECODER,
    "bert": (
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
    **dict.fromkeys(("retrieval", "itm", "features", "dialog", "nlvr", "deit", "augreg"), ()),
}
# a buffer of counting numbers, which later versions of transformers no longer store
_POSITION_IDS = r"(^|\.)position_ids$"
IGNORED = {  # family -> regexes of torch keys that are rightly left unread
    **dict.fromkeys(FAMILIES, (_POSITION_IDS,)),
    "deit": (r"head\.(weight|bias)$",),  # the ImageNet classifier
    "augreg": (r"(head|pre_logits)/(kernel|bias)$",),  # likewise
    "bert": (
        _POSITION_IDS,
        # MED has none of these
        r"bert\.embeddings\.token_type_embeddings\.weight$",
        r"bert\.pooler\.dense\.(weight|bias)$",
        r"cls\.seq_relationship\.(weight|bias)$",
    ),
}
_MOMENTUM_COPIES = ("the momentum encoder", r"\w+_m\..*")
# family -> (what it is, regex of torch keys): complete, or not there at all, as in re-releases for inference
OPTIONAL = {
    "pretrain": (_MOMENTUM_COPIES, ("the feature queues", "image_queue|text_queue|queue_ptr")),
    "retrieval": (_MOMENTUM_COPIES, ("the feature queues", "image_queue|text_queue|idx_queue|ptr_queue")),
    "bert": (("the language-modelling head", r"cls\.predictions\..*"),),
}

# beginnings of names: the originals', Hugging Face transformers'; names of the text models are the same in both
HF_NAMES = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.blocks.{i}.norm1.", "vision_model.encoder.layers.{i}.layer_norm1."),
    ("visual_encoder.blocks.{i}.norm2.", "vision_model.encoder.layers.{i}.layer_norm2."),
    ("visual_encoder.blocks.{i}.attn.qkv.", "vision_model.encoder.layers.{i}.self_attn.qkv."),
    ("visual_encoder.blocks.{i}.attn.proj.", "vision_model.encoder.layers.{i}.self_attn.projection."),
    ("visual_encoder.blocks.{i}.mlp.", "vision_model.encoder.layers.{i}.mlp."),
    ("visual_encoder.norm.", "vision_model.post_layernorm."),
)
