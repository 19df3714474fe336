"""Key table of OPT as Hugging Face transformers names its tensors, which BLIP-2's files do below a prefix.

Rows are as in rules/blip.py. Letters of the shapes: C width, G hidden width of the MLP, J width of the embedding, U
vocabulary, S rows of the position table.
"""

from __future__ import annotations

_LAYER = "model.decoder.layers.{i}."


def _affine(torch: str, ours: str, layout: str, rows: str, columns: str):
    bias = "heads_in_bias" if layout == "heads_in" else "same"
    return (
        (f"{_LAYER}{torch}.weight", f"blocks/{ours}/kernel", layout, f"{rows} {columns}"),
        (f"{_LAYER}{torch}.bias", f"blocks/{ours}/bias", bias, rows),
    )


def _norm(torch: str, ours: str):
    return (f"{torch}.weight", f"{ours}/scale", "same", "C"), (f"{torch}.bias", f"{ours}/bias", "same", "C")


_SHARED = (
    ("model.decoder.embed_tokens.weight", "embed/word/embedding", "vocab", "U J"),
    ("model.decoder.embed_positions.weight", "embed/pos/embedding", "same", "S C"),
    *(row for x in "qkv" for row in _affine(f"self_attn.{x}_proj", f"attn/{x}", "heads_in", "C", "C")),
    *_affine("self_attn.out_proj", "attn/out", "heads_out", "C", "C"),
    *_affine("fc1", "mlp/fc1", "linear", "G", "C"),
    *_affine("fc2", "mlp/fc2", "linear", "C", "G"),
    *_norm(f"{_LAYER}self_attn_layer_norm", "blocks/ln1"),
    *_norm(f"{_LAYER}final_layer_norm", "blocks/ln2"),
)
_FINAL_NORM = _norm("model.decoder.final_layer_norm", "ln_post")
_PROJECTIONS = (
    ("model.decoder.project_in.weight", "project_in/kernel", "linear", "C J"),
    ("model.decoder.project_out.weight", "project_out/kernel", "linear", "J C"),
)


def rows(torch: str = "", ours: str = "params/llm/", *, pre_norm: bool = True, projected: bool = False) -> tuple:
    """The table with both prefixes. pre_norm, projected: of the sizes in config/sizes.py; 350m alone has False, True,
    where `projected` means an embedding of another width than the layers'."""
    found = _SHARED + _FINAL_NORM * pre_norm + _PROJECTIONS * projected
    return tuple((torch + theirs, ours + mine, layout, shape) for theirs, mine, layout, shape in found)


def tied(torch: str = "") -> tuple:
    """(torch key of the copy, torch key of the original): files need not hold the copy."""
    return ((f"{torch}lm_head.weight", f"{torch}model.decoder.embed_tokens.weight"),)
