"""config.json of a Hugging Face folder of BLIP, as transformers understands it, and the settings files that it loads.

Where transformers' defaults are not what the released models were trained with, ours are the originals', and a note
says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from ml_collections import ConfigDict

from blip_jax.convert import foreign
from blip_jax.data.text.wordpiece import EXTRA, SPECIAL, Tokenizer
from blip_jax.models.vision.vit import PIXEL_MEAN, PIXEL_STD

ARCHITECTURES = {
    "BlipForConditionalGeneration": "caption",
    "BlipForImageTextRetrieval": "itm",
    "BlipForQuestionAnswering": "vqa",
}
DEFAULTS = {  # part of config.json ("": its top level) -> what transformers takes where a key is missing
    "": {"image_text_hidden_size": 256},
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 384,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    },
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "vocab_size": 30524,
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "bos_token_id": 30522,
        "sep_token_id": 102,
        "pad_token_id": 0,
    },
}
EPS = {"vision_config": 1e-6, "text_config": 1e-12}  # the originals' and ours
BERT_BASE = {"hidden_size": 768, "heads": 12}  # the text model of every released BLIP
LETTERS = {  # of the shapes in rules/blip.py -> what config.json calls it
    "D": ("vision_config", "hidden_size"),
    "F": ("vision_config", "intermediate_size"),
    "p": ("vision_config", "patch_size"),
    "W": ("text_config", "hidden_size"),
    "M": ("text_config", "intermediate_size"),
    "V": ("text_config", "vocab_size"),
    "T": ("text_config", "max_position_embeddings"),
    "E": ("", "image_text_hidden_size"),
}


def family_of(config: dict, names: Mapping) -> str:
    """caption, itm or vqa: by the architecture, or where config.json names none, by the text models among the tensors.

    ValueError: another architecture.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(
            f"config.json: {foreign.told('architectures', architectures)}: it must be a list of names, such as "
            f"{', '.join(ARCHITECTURES)}"
        )
    known = [name for name in architectures if name in ARCHITECTURES]
    if known:
        return ARCHITECTURES[known[0]]
    if architectures or config.get("model_type") != "blip":
        what = (
            f"architecture {', '.join(name[:60] for name in architectures[:5])}"
            if architectures
            else f"model_type {foreign.short(config.get('model_type'))}"
        )
        raise ValueError(
            f"config.json has {what}: known are {', '.join(ARCHITECTURES)}, and as initial weights BERT (model_type "
            "bert) and timm's plain ViTs (architecture vit_*, deit_*)"
        )
    decoder, encoder = (any(name.startswith(part) for name in names) for part in ("text_decoder.", "text_encoder."))
    if decoder:
        return "vqa" if encoder else "caption"
    return "itm"


def parts_of(config: dict) -> dict[str, dict]:
    """The keys of DEFAULTS with the values of config.json, or the default where it has none; a square as one number."""
    parts = {}
    for part, defaults in DEFAULTS.items():
        given = config.get(part) if part else config
        given = given if isinstance(given, dict) else {}
        parts[part] = {key: default if given.get(key) is None else given[key] for key, default in defaults.items()}
    for key in ("image_size", "patch_size"):
        size = parts["vision_config"][key]
        if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
            parts["vision_config"][key] = size[0]
    return parts


def check_values(config: dict, parts: dict, notes: list[str]) -> list[str]:
    """What our models cannot take. An eps that is not ours goes into `notes` if it is transformers' default."""
    problems = []
    for part, values in parts.items():
        given = config.get(part, {}) if part else config
        if given is not None and not isinstance(given, dict):
            problems.append(f"{foreign.told(part, given)}: it must be settings")
            continue
        dot = f"{part}." if part else ""
        problems += [line for line in foreign.fixed(given or {}, dot) if not line.startswith(f"{dot}hidden_act")]
        told = {key: foreign.told(f"{dot}{key}", value) for key, value in values.items()}
        problems += [
            f"{told[key]}: it must be a whole number above 0"
            for key, default in DEFAULTS[part].items()
            if type(default) is int and not key.endswith("_id") and not (type(values[key]) is int and values[key] > 0)
        ]
        if not part:
            continue
        if values["hidden_act"] not in foreign.FIXED["hidden_act"]:
            problems.append(f"{told['hidden_act']}: the models here have the exact GELU, 'gelu'")
        if values["layer_norm_eps"] == EPS[part]:
            continue
        if values["layer_norm_eps"] == DEFAULTS[part]["layer_norm_eps"]:
            notes.append(
                f"{told['layer_norm_eps']}, transformers' default: {EPS[part]:g} taken, with which the originals were "
                "trained"
            )
        else:
            problems.append(f"{told['layer_norm_eps']}: the models here have {EPS[part]:g}")
    return problems


def check_sizes(parts: dict, sizes: Mapping[str, int], layers: Mapping[bool, int]) -> list[str]:
    """Where config.json contradicts what the weights show (`apply.infer`, `apply.layer_counts`)."""
    shown = [(*LETTERS[letter], size) for letter, size in sizes.items() if letter in LETTERS]
    shown += [
        ("vision_config", "num_hidden_layers", layers["vit"]),
        ("text_config", "num_hidden_layers", layers["med"]),
    ]
    problems = [
        f"{part}.{key} is {parts[part][key]}".lstrip(".") + f", but the weights have {size}"
        for part, key, size in shown
        if size != parts[part][key]
    ]
    img_size, patch = (parts["vision_config"][key] for key in ("image_size", "patch_size"))
    positions = 1 + (img_size // patch) ** 2
    if img_size % patch or sizes.get("P", positions) != positions:
        problems.append(
            f"vision_config.image_size is {img_size} with patches of {patch}, but the weights have "
            f"{sizes.get('P', 'no')} positions"
        )
    return problems


def check_ids(parts: dict, tokenizer: Tokenizer | None) -> list[str]:
    """Of a decoder: it must start with [DEC], the last but one entry, and end with the vocabulary's [SEP]."""
    text = parts["text_config"]
    expected = {"bos_token_id": text["vocab_size"] - len(EXTRA)}
    if tokenizer:
        expected |= {"sep_token_id": tokenizer.sep, "pad_token_id": tokenizer.pad}
    return [
        f"text_config.{key} is {text[key]}, but the vocabulary's is {want}"
        for key, want in expected.items()
        if text[key] != want
    ]


def text_heads(parts: dict, notes: list[str]) -> int:
    """num_attention_heads of the text model, but 12 where it is as wide as BERT-base and config.json says 8 or nothing.

    The weights do not show the number; 8 is transformers' default and not BERT's, from which every BLIP starts.
    """
    given, default = parts["text_config"]["num_attention_heads"], DEFAULTS["text_config"]["num_attention_heads"]
    if parts["text_config"]["hidden_size"] != BERT_BASE["hidden_size"] or given != default:
        return given
    notes.append(
        f"text_config.num_attention_heads is missing or {default}, transformers' default: {BERT_BASE['heads']} taken, "
        f"as in BERT-base and all released models; --med_heads={default} if this model was really trained with "
        f"{default}"
    )
    return BERT_BASE["heads"]


def ignored(config: dict, family: str, model: ConfigDict, tokenizer: Tokenizer | None) -> list[str]:
    """The note on fields that are neither read nor checked, nor what our own export of this model would say."""
    sep, pad = (tokenizer.sep, tokenizer.pad) if tokenizer else (None, None)
    ours = model_json(family, model, sep=sep, pad=pad)
    out = []
    for part, defaults in DEFAULTS.items():
        given = config.get(part) if part else {key: x for key, x in config.items() if key not in DEFAULTS}
        mine = ours[part] if part else ours
        used = {*defaults, *foreign.FIXED, "architectures", "model_type"}
        for key, value in (given or {}).items():
            if key not in used and value is not None and not (key in mine and mine[key] == value):
                out.append(f"{part}.{key}".lstrip("."))
    return foreign.ignored(out)


# --- written ----------------------------------------------------------------------------------------------------------
def model_json(family: str, model: ConfigDict, *, sep: int, pad: int) -> dict:
    """config.json of our `cfg.model`.

    Everything in which transformers' defaults differ from the originals is written out.
    """
    vit, med = model.vit, model.med
    (architecture,) = (name for name, known in ARCHITECTURES.items() if known == family)
    text = dict(
        model_type="blip_text_model",
        vocab_size=med.vocab_size,
        hidden_size=med.width,
        encoder_hidden_size=vit.width,
        intermediate_size=med.mlp,
        num_hidden_layers=med.layers,
        num_attention_heads=med.heads,
        max_position_embeddings=med.positions,
        hidden_act="gelu",
        layer_norm_eps=EPS["text_config"],
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.dropout,
        initializer_range=model.init_std,
        bos_token_id=med.vocab_size - len(EXTRA),
        eos_token_id=sep,
        sep_token_id=sep,
        pad_token_id=pad,
        is_decoder=True,
        tie_word_embeddings=True,
    )
    vision = dict(
        model_type="blip_vision_model",
        hidden_size=vit.width,
        intermediate_size=vit.mlp,
        num_hidden_layers=vit.depth,
        num_attention_heads=vit.heads,
        image_size=model.img_size,
        patch_size=vit.patch,
        hidden_act="gelu",
        layer_norm_eps=EPS["vision_config"],
        attention_dropout=0.0,
        initializer_range=model.init_std,
    )
    return {
        "architectures": [architecture],
        "model_type": "blip",
        "dtype": "float32",
        "tie_word_embeddings": True,
        "image_text_hidden_size": model.embed_dim,
        "text_config": text,
        "vision_config": vision,
    }


def tokenizer_json(positions: int, tokenizer: Tokenizer) -> dict:
    """tokenizer_config.json: BERT's WordPiece with [DEC] and [ENC] as the last two entries."""
    added = {
        str(i): {
            "content": token,
            "special": True,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }
        for token, i in zip(EXTRA, (tokenizer.dec, tokenizer.enc))
    }
    case = tokenizer.case
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL))
    return {
        "tokenizer_class": "BertTokenizer",
        "processor_class": "BlipProcessor",
        "do_lower_case": case.lowercase,
        **({} if case.strip_accents == case.lowercase else {"strip_accents": case.strip_accents}),
        **names,
        "additional_special_tokens": list(EXTRA),
        "added_tokens_decoder": added,
        "model_max_length": positions,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def pixels_json(img_size: int) -> dict:
    """preprocessor_config.json: the original's evaluation transform.

    Bicubic to a square, CLIP's mean and deviation.
    """
    return {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": img_size, "width": img_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
    }
