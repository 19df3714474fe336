"""Key tables of BLIP-2's Q-Former and of what its first stage adds, under LAVIS's names; rows are explained in blip.py.

W M T V are the sizes of the Q-Former, Q its queries, D the width of the tower, E the shared embedding.
"""

from __future__ import annotations


def _dense(torch: str, ours: str, rows: str, columns: str):
    return (
        (f"{torch}.weight", f"{ours}/kernel", "linear", f"{rows} {columns}"),
        (f"{torch}.bias", f"{ours}/bias", "same", rows),
    )


def _norm(torch: str, ours: str, width: str = "W"):
    return (f"{torch}.weight", f"{ours}/scale", "same", width), (f"{torch}.bias", f"{ours}/bias", "same", width)


def _attention(torch: str, ours: str, kv: str = "W"):
    """kv: the letter of the width that keys and values come from."""
    rows = []
    for theirs, mine, width in (("query", "q", "W"), ("key", "k", kv), ("value", "v", kv)):
        rows += [
            (f"{torch}.self.{theirs}.weight", f"{ours}/{mine}/kernel", "heads_in", f"W {width}"),
            (f"{torch}.self.{theirs}.bias", f"{ours}/{mine}/bias", "heads_in_bias", "W"),
        ]
    return (
        *rows,
        (f"{torch}.output.dense.weight", f"{ours}/out/kernel", "heads_out", "W W"),
        (f"{torch}.output.dense.bias", f"{ours}/out/bias", "same", "W"),
        *_norm(f"{torch}.output.LayerNorm", f"{ours}/ln"),
    )


def _feed_forward(torch: str, ours: str, kind: str = ""):
    return (
        *_dense(f"{torch}intermediate{kind}.dense", f"{ours}/fc1", "M", "W"),
        *_dense(f"{torch}output{kind}.dense", f"{ours}/fc2", "W", "M"),
        *_norm(f"{torch}output{kind}.LayerNorm", f"{ours}_ln"),
    )


_BERT, _OURS = "Qformer.bert.", "params/qformer/"
_LAYER = _BERT + "encoder.layer.{i}."
# what the queries need, as the second stage has it
QUERIES = (
    ("query_tokens", "params/query_tokens", "lead", "1 Q W"),
    *_norm("ln_vision", "params/ln_vision", "D"),
    *_norm(_BERT + "embeddings.LayerNorm", _OURS + "embed/ln"),
    *_attention(_LAYER + "attention", _OURS + "blocks/self_attn"),
    *_attention(_LAYER + "crossattention", _OURS + "cross/blocks/cross_attn", "D"),
    *_feed_forward(_LAYER, _OURS + "blocks/query_mlp", "_query"),
)
# what a text beside them needs, as InstructBLIP has it too
TEXT = (
    (_BERT + "embeddings.word_embeddings.weight", _OURS + "embed/word/embedding", "vocab", "V W"),
    (_BERT + "embeddings.position_embeddings.weight", _OURS + "embed/pos/embedding", "same", "T W"),
    *_feed_forward(_LAYER, _OURS + "blocks/mlp"),
)
HEADS = (  # of the first stage
    ("Qformer.cls.predictions.bias", _OURS + "lm_head/bias", "vocab", "V"),
    *_dense("Qformer.cls.predictions.transform.dense", _OURS + "lm_head/dense", "W", "W"),
    *_norm("Qformer.cls.predictions.transform.LayerNorm", _OURS + "lm_head/ln"),
    *_dense("vision_proj", "params/vision_proj", "E", "W"),
    *_dense("text_proj", "params/text_proj", "E", "W"),
    *_dense("itm_head", "params/itm_head", "2", "W"),
    ("temp", "params/temp", "same", ""),
)
STAGE1 = (*QUERIES, *TEXT, *HEADS)

# stack -> that with which its layers are counted, its first layer, its step: only even layers look at the image
STACKS = {"qformer/cross": ("qformer", 0, 2)}
TIED = (  # (torch key of the copy, torch key of the original)
    ("Qformer.cls.predictions.decoder.weight", "Qformer.bert.embeddings.word_embeddings.weight"),
    ("Qformer.cls.predictions.decoder.bias", "Qformer.cls.predictions.bias"),
)
IGNORED = (r"(^|\.)position_ids$",)  # a buffer of counting numbers
