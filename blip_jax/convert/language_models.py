"""What a config.json says of OPT or T5, alone or within that of a BLIP-2: used, checked against the weights and against
what the models here are, or named as ignored."""

from __future__ import annotations

from collections.abc import Mapping

from blip_jax.convert import foreign

KINDS = {"opt": "OPT", "t5": "T5"}  # model_type -> what it is
SIZES = {  # field -> letter of the shapes in rules/opt.py and rules/t5.py
    "opt": {"hidden_size": "C", "ffn_dim": "G", "word_embed_proj_dim": "J", "vocab_size": "U"},
    "t5": {"d_model": "C", "d_ff": "G", "num_heads": "A", "relative_attention_num_buckets": "R", "vocab_size": "U"},
}
FIXED = {  # field -> values that mean what the models here are
    "opt": {
        "activation_function": ("relu",),
        "enable_bias": (True,),
        "layer_norm_elementwise_affine": (True,),
        "_remove_final_layer_norm": (False,),
        "tie_word_embeddings": (True,),
    },
    "t5": {
        "feed_forward_proj": ("gated-gelu",),
        "dense_act_fn": ("gelu", "gelu_new"),
        "is_gated_act": (True,),
        "layer_norm_epsilon": (1e-6,),
        "scale_decoder_outputs": (False,),
        "decoder_start_token_id": (0,),
        "is_decoder": (False,),
        "is_encoder_decoder": (True,),
    },
}
OTHERS = {  # fields that `said` reads besides
    "opt": ("num_hidden_layers", "do_layer_norm_before", "max_position_embeddings"),
    "t5": ("num_layers", "num_decoder_layers", "d_kv", "relative_attention_max_distance", "tie_word_embeddings"),
}
MAX_DISTANCE = 128  # of T5, where nothing says it
TANH_GELU = "gelu_new"  # what "gated-gelu" alone means to transformers


def said(kind: str, config: Mapping, sizes: Mapping, layers: Mapping, pre_norm: bool, prefix: str = "") -> foreign.Said:
    """Settings of a language model of `kind` against what its tensors show; `more` is for `cfg.model.llm`.

    prefix: of fields in messages; without one it is a language model alone, which BLIP-2 runs as LAVIS does.
    """
    have = {field: sizes.get(letter) for field, letter in SIZES[kind].items()}
    if kind == "opt":
        have |= {"num_hidden_layers": layers["llm"], "do_layer_norm_before": pre_norm}
        have["max_position_embeddings"] = sizes.get("S", 2) - 2
    else:
        have |= {"num_layers": layers["llm/encoder"], "num_decoder_layers": layers["llm/decoder"]}
        have["d_kv"] = sizes.get("I", 0) // max(sizes.get("A", 1), 1)
    problems = [
        f"{foreign.told(prefix + field, config[field])}, but the weights have {size}"
        for field, size in have.items()
        if config.get(field) is not None and (type(config[field]) is not type(size) or config[field] != size)
    ]
    problems += [
        f"{foreign.told(prefix + field, config[field])}: the models here have {' or '.join(map(repr, values))}"
        for field, values in FIXED[kind].items()
        if config.get(field) is not None and config[field] not in values
    ]
    heads, more, notes = {}, {}, []
    if kind == "opt":
        n = config.get("num_attention_heads")
        if n is not None and not (foreign.whole(n) and sizes.get("C", 0) % n == 0):
            problems.append(
                f"{foreign.told(prefix + 'num_attention_heads', n)}: it must divide the width {sizes.get('C')}"
            )
        elif n is not None:
            heads = {"llm": n}
    else:
        problems += _tied(config, prefix)
        distance = config.get("relative_attention_max_distance")
        if distance is not None and not foreign.whole(distance):
            problems.append(f"{foreign.told(prefix + 'relative_attention_max_distance', distance)}: no whole number")
        more["max_distance"] = distance or MAX_DISTANCE
        act = config.get("dense_act_fn", TANH_GELU)
        if not prefix and act == TANH_GELU:
            notes.append("FlanT5 by itself has the tanh GELU: the exact one taken, with which BLIP-2 was trained")
        elif act == TANH_GELU:
            more["act"] = TANH_GELU
            notes.append(
                f"{prefix}dense_act_fn is {TANH_GELU}, or left to transformers, which then takes it: so it is here"
            )
    return foreign.Said(heads, problems, notes, more)


def _tied(config: Mapping, prefix: str) -> list[str]:
    """Of a T5: whether its scores would be scaled, as those of the first T5 with one matrix at both ends."""
    if config.get("tie_word_embeddings") is True and config.get("scale_decoder_outputs") is None:
        return [
            f"{prefix}tie_word_embeddings is True and scale_decoder_outputs is missing: scores of such a T5 are "
            "scaled, those of T5 v1.1 and FlanT5 are not; set tie_word_embeddings to false if it is one of them"
        ]
    return []


def ignored(kind: str, config: Mapping, prefix: str = "") -> list[str]:
    """Fields of `config` that `said` neither uses nor checks."""
    used = {"model_type", "architectures", "num_attention_heads", *SIZES[kind], *FIXED[kind], *OTHERS[kind]}
    return [prefix + field for field in config if field not in used and config[field] is not None]


# --- written ----------------------------------------------------------------------------------------------------------
NEWLINE = 50118  # of OPT's vocabulary, where BLIP-2's texts end
IMAGE_TOKENS = {"opt": 50265, "t5": 32100}  # of the released folders


def model_json(llm, dropout: float) -> dict:
    """text_config of our `cfg.model.llm`, everything written out in which transformers' defaults could differ."""
    if llm.kind == "opt":
        return dict(
            model_type="opt",
            vocab_size=llm.vocab_size,
            hidden_size=llm.width,
            num_hidden_layers=llm.layers,
            ffn_dim=llm.mlp,
            max_position_embeddings=llm.positions,
            do_layer_norm_before=llm.pre_norm,
            word_embed_proj_dim=llm.embed_width,
            num_attention_heads=llm.heads,
            activation_function="relu",
            dropout=dropout,
            attention_dropout=0.0,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=NEWLINE if llm.vocab_size > NEWLINE else 2,
            tie_word_embeddings=True,
        )
    return dict(
        model_type="t5",
        vocab_size=llm.vocab_size,
        d_model=llm.width,
        d_kv=llm.head_dim,
        d_ff=llm.mlp,
        num_layers=llm.layers,
        num_decoder_layers=llm.decoder_layers if "decoder_layers" in llm else llm.layers,
        num_heads=llm.heads,
        relative_attention_num_buckets=llm.buckets,
        relative_attention_max_distance=llm.max_distance,
        dropout_rate=dropout,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
        dense_act_fn=llm.act if "act" in llm else "gelu",
        tie_word_embeddings=False,  # hence no scaling of scores, too
        pad_token_id=0,
        bos_token_id=1,  # that a folder of BLIP-2 starts from without a prompt
        eos_token_id=1,
        decoder_start_token_id=0,
        is_encoder_decoder=True,
    )
