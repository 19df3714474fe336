"""Key table of T5 v1.1 (FlanT5) as Hugging Face transformers names its tensors, which BLIP-2's files do below a prefix.

Rows are as in rules/blip.py, with one more layout: `vocab_linear`, [V, D] -> [D, Vp], padded as `vocab`. Letters of the
shapes: C width, I heads times head dim, A heads, G hidden width of the MLP, R buckets of distances, U vocabulary.
The encoder and the decoder each have their own number of layers.
"""

from __future__ import annotations

# One table under up to three names, of which a file has any: `words_and_head` of convert/tied.py leaves the first.
WORDS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
HEAD = "lm_head.weight"  # absent where it is the word table


def _attention(torch: str, ours: str):
    return (
        *((f"{torch}.{x}.weight", f"{ours}/{x}/kernel", "heads_in", "I C") for x in "qkv"),
        (f"{torch}.o.weight", f"{ours}/out/kernel", "heads_out", "C I"),
    )


def _stack(name: str, cross: bool):
    """Rows of one of the two stacks: self-attention, in the decoder cross-attention, feed-forward, each with its norm
    before it."""
    layer, last = name + ".block.{i}.layer.", 1 + cross
    norm = lambda torch, ours: (f"{torch}.weight", f"{name}/{ours}/scale", "same", "C")
    return (
        (
            f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            f"{name}/rel_bias/embedding",
            "same",
            "R A",
        ),
        *_attention(f"{layer}0.SelfAttention", f"{name}/blocks/attn"),
        *(_attention(f"{layer}1.EncDecAttention", f"{name}/blocks/cross_attn") if cross else ()),
        *(norm(f"{layer}{i}.layer_norm", f"blocks/ln{i + 1}") for i in range(last + 1)),
        *(
            (f"{layer}{last}.DenseReluDense.{w}.weight", f"{name}/blocks/mlp/{w}/kernel", "linear", shape)
            for w, shape in (("wi_0", "G C"), ("wi_1", "G C"), ("wo", "C G"))
        ),
        norm(f"{name}.final_layer_norm", "ln_post"),
    )


_ROWS = (
    (WORDS[0], "embed/word/embedding", "vocab", "U C"),
    *_stack("encoder", False),
    *_stack("decoder", True),
    (HEAD, "lm_head/kernel", "vocab_linear", "U C"),
)


def rows(torch: str = "", ours: str = "params/llm/") -> tuple:
    """The table with both prefixes."""
    return tuple((torch + theirs, ours + mine, layout, shape) for theirs, mine, layout, shape in _ROWS)


def tied(torch: str = "") -> tuple:
    """(torch key of the copy, torch key of the original): files need not hold the copy."""
    return tuple((torch + copy, torch + WORDS[0]) for copy in WORDS[1:])
