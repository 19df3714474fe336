"""Key tables: which PyTorch tensor is which parameter, and how it is laid out. Tables only; `apply.py` runs them both ways.

A row is (torch key, our path, layout). `{i}` counts layers: a torch key with `{i}` and a path without it are the slices of one
stacked parameter. Layouts (torch -> ours), with N heads, H head dim:
  same                as it is
  lead / lead2        [1, ...] -> [...] / [1, 1, D] -> [D]
  linear              [out, in] -> [in, out]
  conv                [D, 3, p, p] -> [p, p, 3, D]
  heads_in            [N*H, D] -> [D, N, H]
  heads_in_bias       [N*H] -> [N, H]
  heads_out           [D, N*H] -> [N, H, D]
  qkv / qkv_bias      three stacked blocks of rows, one for each path (path holds `{qkv}`), then heads_in / heads_in_bias
  vocab               rows padded with zeros to the stored vocabulary
  transpose           [E, K] -> [K, E]
  scalar              [1] -> []
"""

from __future__ import annotations

VIT = (
    ("cls_token", "cls", "lead2"),
    ("pos_embed", "pos_embed", "lead"),
    ("patch_embed.proj.weight", "patch_embed/kernel", "conv"),
    ("patch_embed.proj.bias", "patch_embed/bias", "same"),
    ("blocks.{i}.norm1.weight", "blocks/ln1/scale", "same"),
    ("blocks.{i}.norm1.bias", "blocks/ln1/bias", "same"),
    ("blocks.{i}.attn.qkv.weight", "blocks/attn/{qkv}/kernel", "qkv"),
    ("blocks.{i}.attn.qkv.bias", "blocks/attn/{qkv}/bias", "qkv_bias"),
    ("blocks.{i}.attn.proj.weight", "blocks/attn/out/kernel", "heads_out"),
    ("blocks.{i}.attn.proj.bias", "blocks/attn/out/bias", "same"),
    ("blocks.{i}.norm2.weight", "blocks/ln2/scale", "same"),
    ("blocks.{i}.norm2.bias", "blocks/ln2/bias", "same"),
    ("blocks.{i}.mlp.fc1.weight", "blocks/mlp/fc1/kernel", "linear"),
    ("blocks.{i}.mlp.fc1.bias", "blocks/mlp/fc1/bias", "same"),
    ("blocks.{i}.mlp.fc2.weight", "blocks/mlp/fc2/kernel", "linear"),
    ("blocks.{i}.mlp.fc2.bias", "blocks/mlp/fc2/bias", "same"),
    ("norm.weight", "ln_post/scale", "same"),
    ("norm.bias", "ln_post/bias", "same"),
)


def _attention(torch: str, ours: str):
    rows = []
    for theirs, mine in (("query", "q"), ("key", "k"), ("value", "v")):
        rows += [(f"{torch}.self.{theirs}.weight", f"{ours}/{mine}/kernel", "heads_in"),
                 (f"{torch}.self.{theirs}.bias", f"{ours}/{mine}/bias", "heads_in_bias")]
    return (*rows,
            (f"{torch}.output.dense.weight", f"{ours}/out/kernel", "heads_out"),
            (f"{torch}.output.dense.bias", f"{ours}/out/bias", "same"),
            (f"{torch}.output.LayerNorm.weight", f"{ours}/ln/scale", "same"),
            (f"{torch}.output.LayerNorm.bias", f"{ours}/ln/bias", "same"))


LAYER = "encoder.layer.{i}."
SELF_ATTENTION = _attention(LAYER + "attention", "layer_{i:02d}/self_attn")
DECODER_SELF_ATTENTION = _attention(LAYER + "attention", "layer_{i:02d}/self_attn_dec")
TEXT_SHARED = (  # what text encoder and decoder have in common: every path without "/attention"
    ("embeddings.word_embeddings.weight", "embed/word/embedding", "vocab"),
    ("embeddings.position_embeddings.weight", "embed/pos/embedding", "same"),
    ("embeddings.LayerNorm.weight", "embed/ln/scale", "same"),
    ("embeddings.LayerNorm.bias", "embed/ln/bias", "same"),
    *_attention(LAYER + "crossattention", "layer_{i:02d}/cross_attn"),
    (LAYER + "intermediate.dense.weight", "layer_{i:02d}/mlp/fc1/kernel", "linear"),
    (LAYER + "intermediate.dense.bias", "layer_{i:02d}/mlp/fc1/bias", "same"),
    (LAYER + "output.dense.weight", "layer_{i:02d}/mlp/fc2/kernel", "linear"),
    (LAYER + "output.dense.bias", "layer_{i:02d}/mlp/fc2/bias", "same"),
    (LAYER + "output.LayerNorm.weight", "layer_{i:02d}/mlp_ln/scale", "same"),
    (LAYER + "output.LayerNorm.bias", "layer_{i:02d}/mlp_ln/bias", "same"),
)
LM_HEAD = (
    ("bias", "bias", "vocab"),
    ("transform.dense.weight", "dense/kernel", "linear"),
    ("transform.dense.bias", "dense/bias", "same"),
    ("transform.LayerNorm.weight", "ln/scale", "same"),
    ("transform.LayerNorm.bias", "ln/bias", "same"),
)


def _under(torch: str, ours: str, rows):
    return tuple((torch + t, ours + o, layout) for t, o, layout in rows)


def _dense(torch: str, ours: str):
    return ((f"{torch}.weight", f"{ours}/kernel", "linear"), (f"{torch}.bias", f"{ours}/bias", "same"))


_ENCODER = (*_under("visual_encoder.", "params/vit/", VIT), *_under("text_encoder.", "params/med/", TEXT_SHARED + SELF_ATTENTION),
            *_dense("vision_proj", "params/vision_proj"), *_dense("text_proj", "params/text_proj"),
            *_dense("itm_head", "params/itm_head"))
_MOMENTUM = (*_under("visual_encoder_m.", "momentum/params/vit/", VIT),
             *_under("text_encoder_m.", "momentum/params/med/", TEXT_SHARED + SELF_ATTENTION),
             *_dense("vision_proj_m", "momentum/params/vision_proj"), *_dense("text_proj_m", "momentum/params/text_proj"),
             ("image_queue", "momentum/queue/img", "transpose"), ("text_queue", "momentum/queue/txt", "transpose"))
_DECODER = (*_under("text_decoder.bert.", "params/med/", DECODER_SELF_ATTENTION),
            *_under("text_decoder.cls.predictions.", "params/med/lm_head/", LM_HEAD))

FAMILIES = {  # family -> rows; paths start at the train state's `params` or `momentum`
    "pretrain": (("temp", "params/temp", "same"), *_ENCODER, *_DECODER, *_MOMENTUM, ("queue_ptr", "momentum/queue/ptr", "scalar")),
    "retrieval": (("temp", "params/temp", "same"), *_ENCODER, *_MOMENTUM, ("idx_queue", "momentum/queue/image_id", "lead"),
                  ("ptr_queue", "momentum/queue/ptr", "scalar")),
    "itm": _ENCODER,
    "caption": (*_under("visual_encoder.", "params/vit/", VIT),
                *_under("text_decoder.bert.", "params/med/", TEXT_SHARED + DECODER_SELF_ATTENTION),
                *_under("text_decoder.cls.predictions.", "params/med/lm_head/", LM_HEAD)),
}
_TIED_HEAD = ("text_decoder.cls.predictions.decoder.bias", "text_decoder.cls.predictions.bias")
TIED = {  # family -> (torch key of the copy, torch key of the original): equal on reading, written again on export
    "pretrain": (*((f"text_decoder.bert.{t}", f"text_encoder.{t}") for t, _, _ in TEXT_SHARED),
                 ("text_decoder.cls.predictions.decoder.weight", "text_encoder.embeddings.word_embeddings.weight"),
                 _TIED_HEAD),
    "retrieval": (),
    "itm": (),
    "caption": (("text_decoder.cls.predictions.decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight"), _TIED_HEAD),
}
IGNORED = (r"position_ids$",)  # buffers that carry no information
