"""What the settings that lie beside weights say of them: config.json of BERT and of timm, the originals'
med_config.json, which has BERT's fields.

Every field is used, checked against the tensors or against what our models are, or named as ignored. Those of a Hugging
Face folder of BLIP are in hf_config.py.
"""

from __future__ import annotations

import json
import pathlib
import reprlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from blip_jax.models.text.med import EPS
from blip_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD

MAX_BYTES = 1 << 25  # of a settings file; the longest, an index of shards, have some 100 KB
BESIDE = ("config.json", "med_config.json")  # of a file of weights
TEXT_SIZES = {  # field of BERT -> the letter of the shapes in rules/blip.py
    "hidden_size": "W",
    "intermediate_size": "M",
    "max_position_embeddings": "T",
    "vocab_size": "V",
}
FIXED = {  # field -> values that mean what our models are
    "hidden_act": ("gelu", "gelu_python"),
    "position_embedding_type": ("absolute",),
    "qkv_bias": (True,),
    "num_channels": (3,),
}
HEADS = 12  # of BERT, where transformers finds no number
NEAR = 1e-5  # an eps up to it hardly changes what BERT computes
TIMM = ("vit_", "deit_")  # beginnings of timm's names of plain ViTs
NAMED = 20  # fields that a note names; of more, those that say nothing of a model are counted
# what transformers writes into any config.json: of generation, of classification heads, of its own records
GENERIC = frozenset(
    "_attn_implementation_autoset _commit_hash _name_or_path add_cross_attention bad_words_ids begin_suppress_tokens "
    "bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty "
    "do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty "
    "finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label is_decoder "
    "is_encoder_decoder label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams "
    "num_labels num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type "
    "pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate suppress_tokens "
    "task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k "
    "top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache".split()
)


class Said(NamedTuple):
    """heads: {"vit"} or {"med"}, if it is said; problems: what does not fit; notes: what is ignored; more: of a
    language model, leaves of `cfg.model.llm`."""

    heads: dict[str, int]
    problems: list[str]
    notes: list[str]
    more: Mapping = MappingProxyType({})


def load(path: pathlib.Path) -> dict:
    """The settings in a JSON file. ValueError: too large, not JSON, too deep, or no settings."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"it has {size} bytes, of at most {MAX_BYTES}")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(
            f"{path} cannot be read ({str(e)[:200]}): give a folder that transformers' save_pretrained wrote"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not settings")
    return content


def told(field: str, value) -> str:
    """A field and its value in a message, however long or deep that is."""
    return f"{field[:60]} is {short(value)}"


def short(value) -> str:
    return reprlib.repr(value)


def whole(value) -> bool:
    return type(value) is int and value > 0


def fixed(config: Mapping, prefix: str = "") -> list[str]:
    """Fields of FIXED that have other values; a field that is missing or null has none."""
    return [
        f"{told(prefix + field, config[field])}: the models here have {' or '.join(map(repr, values))}"
        for field, values in FIXED.items()
        if config.get(field) is not None and not any(config[field] == value for value in values)
    ]


def ignored(fields: Iterable[str]) -> list[str]:
    """The note on fields that neither name a number nor can be checked."""
    fields = sorted(field[:60] for field in fields)
    generic = [field for field in fields if field.split(".")[-1] in GENERIC] if len(fields) > NAMED else []
    names = [field for field in fields if field not in generic]
    more = len(names) - 5 * NAMED
    names = [*names[: 5 * NAMED], *[f"{more} more"] * (more > 0)]
    names += [f"{len(generic)} fields of generation and bookkeeping (docs/checkpoints.md)"] * bool(generic)
    return [f"config.json: ignored {', '.join(names)}"] * bool(names)


def describes(config: Mapping, sizes: Mapping[str, int], layers: Mapping[str, int]) -> bool:
    """Whether settings that lie beside a file of weights are its own: width and depth agree."""
    return "W" in sizes and (config.get("hidden_size"), config.get("num_hidden_layers")) == (sizes["W"], layers["med"])


def bert(
    config: Mapping, sizes: Mapping[str, int], layers: Mapping[str, int], token_types: int | None, pad: int | None
) -> Said:
    """Settings of BERT, or of the text model of the originals, against what the tensors show.

    token_types: rows of their table, None if there is none; pad: the vocabulary's id of [PAD], None if there is none.
    """
    used = {"model_type", "architectures", "num_attention_heads", "num_hidden_layers", "layer_norm_eps", *TEXT_SIZES}
    used |= FIXED.keys() & config.keys()
    have = {field: sizes.get(letter) for field, letter in TEXT_SIZES.items()} | {"num_hidden_layers": layers["med"]}
    if token_types is not None:
        have["type_vocab_size"] = token_types
    if pad is not None:
        have["pad_token_id"] = pad
    if "D" in sizes:
        have["encoder_width"] = sizes["D"]
    problems, notes = fixed(config), []
    kind = config.get("model_type")
    if kind is not None and kind != "bert":
        problems.append(f"{told('model_type', kind)}: of the text models only 'bert' is read")
    for field, size in have.items():
        if (value := config.get(field)) is not None and (type(value) is not int or value != size):
            problems.append(f"{told(field, value)}, but the weights have {size}")
    eps = config.get("layer_norm_eps")
    if eps is not None and eps != EPS:
        if type(eps) is float and 0 < eps <= NEAR:
            notes.append(
                f"{told('layer_norm_eps', eps)}: {EPS:g} taken, which the models here have; hardly a difference"
            )
        else:
            problems.append(f"{told('layer_norm_eps', eps)}: the models here have {EPS:g}")
    heads = config.get("num_attention_heads")
    if heads is not None and not (whole(heads) and sizes.get("W", 0) % heads == 0):
        problems.append(f"{told('num_attention_heads', heads)}: it must divide the width {sizes.get('W')}")
    elif heads is None and config.get("hidden_size") is not None and sizes.get("W", 1) % HEADS == 0:
        heads = HEADS
        notes.append(f"config.json lacks num_attention_heads: {HEADS} taken, transformers' default for BERT")
    rest = config.keys() - used - have.keys()
    said = {"med": heads} if heads is not None and not problems else {}
    return Said(said, problems, notes + ignored(field for field in rest if config[field] is not None))


def timm(config: Mapping, sizes: Mapping[str, int], layers: Mapping[str, int]) -> Said:
    """Settings of a ViT of timm against what the tensors show."""
    problems, notes = [], []
    name, model = config.get("architecture"), config.get("model_args")
    model = model if isinstance(model, dict) else {}
    pictures = next((config[k] for k in ("pretrained_cfg", "default_cfg") if isinstance(config.get(k), dict)), config)
    if not isinstance(name, str) or not name.startswith(TIMM):
        problems.append(f"{told('architecture', name)}: of timm's models only plain ViTs are read, vit_* and deit_*")
    side = round((sizes.get("P", 1) - 1) ** 0.5) * sizes.get("p", 1)
    have = {
        "num_features": (config, sizes.get("D")),
        "embed_dim": (model, sizes.get("D")),
        "depth": (model, layers["vit"]),
        "patch_size": (model, sizes.get("p")),
        "img_size": (model, side),
        "input_size": (pictures, [3, side, side]),
    }
    for field, (place, size) in have.items():
        value = place.get(field)
        if value is not None and value != size and not (field in ("patch_size", "img_size") and value == [size, size]):
            problems.append(f"{told(field, value)}, but the weights have {size}")
    problems += fixed(model, "model_args.")
    heads = model.get("num_heads")
    if heads is not None and not (whole(heads) and sizes.get("D", 0) % heads == 0):
        problems.append(f"{told('num_heads', heads)}: it must divide the width {sizes.get('D')}")
    for field, ours in (("mean", PIXEL_MEAN), ("std", PIXEL_STD)):
        value = pictures.get(field)
        if value is not None and not _near(value, ours):
            notes.append(
                f"{told(field, value)} of its pixels: here they are normalised by {[round(x, 3) for x in ours]}"
            )
    used = {"architecture", "model_args", "pretrained_cfg", "default_cfg", "mean", "std", "num_heads", *have, *FIXED}
    rest = [
        field
        for place in {id(x): x for x in (config, model, pictures)}.values()
        for field in place
        if field not in used and place[field] is not None
    ]
    said = {"vit": heads} if heads is not None and not problems else {}
    return Said(said, problems, notes + ignored(dict.fromkeys(rest)))


def _near(value, ours) -> bool:
    try:
        return len(value) == len(ours) and all(abs(a - b) < 1e-3 for a, b in zip(value, ours))
    except TypeError:
        return False
