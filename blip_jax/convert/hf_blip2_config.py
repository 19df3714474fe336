"""config.json of a Hugging Face folder of BLIP-2 or InstructBLIP, as transformers understands it, both ways.

Every field is used, checked against the weights or against what the models here are, or named as ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from blip_jax import trees
from blip_jax.config import TOWER_SIZES
from blip_jax.convert import foreign, language_models
from blip_jax.convert.rules.blip2 import MATCHING, READS_QUESTIONS

ARCHITECTURES = {  # class -> its model; "": by text_config
    "Blip2ForConditionalGeneration": "",
    "Blip2Model": "",
    "Blip2ForImageTextRetrieval": "blip2_itm",
    "Blip2VisionModelWithProjection": "blip2_vision",
    "Blip2TextModelWithProjection": "blip2_text",
    "InstructBlipForConditionalGeneration": "instruct",
    "InstructBlipModel": "instruct",
}
CLASSES = {  # family -> the class that is written
    "blip2_opt": "Blip2ForConditionalGeneration",
    "blip2_t5": "Blip2ForConditionalGeneration",
    "blip2_itm": "Blip2ForImageTextRetrieval",
    "blip2_vision": "Blip2VisionModelWithProjection",
    "blip2_text": "Blip2TextModelWithProjection",
    **dict.fromkeys(READS_QUESTIONS, "InstructBlipForConditionalGeneration"),
}
KINDS = {"blip-2": "blip_2", "instructblip": "instructblip"}  # model_type -> beginning of that of its parts
SIZES = {  # part of config.json -> field -> letter of the shapes
    "vision_config": {"hidden_size": "D", "intermediate_size": "F", "patch_size": "p"},
    "qformer_config": {
        "hidden_size": "W",
        "intermediate_size": "M",
        "max_position_embeddings": "T",
        "vocab_size": "V",
        "encoder_hidden_size": "D",
    },
    "": {"num_query_tokens": "Q", "image_text_hidden_size": "E"},
}
DEFAULTS = {  # what transformers takes where a field is missing
    "vision_config": {"num_attention_heads": 16, "image_size": 224, "layer_norm_eps": 1e-6},
    "qformer_config": {"num_attention_heads": 12},
}
FIXED = {  # field of qformer_config -> values that mean what the models here are
    "cross_attention_frequency": (2,),
    "layer_norm_eps": (1e-12,),
    "pad_token_id": (0,),
}
EPS = (1e-6, 1e-5)  # of the vision tower's norms: transformers' now and until July 2023
BLOCK_EPS = 1e-6  # of EVA's blocks, here always


class Said(NamedTuple):
    """What config.json says. heads: part -> number; model, llm: leaves of `cfg.model` and `cfg.model.llm`; kept: fields
    that an export gives back; problems: what does not fit; notes: what is taken otherwise; rest: fields that nothing
    reads."""

    heads: dict[str, int]
    model: dict
    llm: dict
    kept: dict
    problems: list[str]
    notes: list[str]
    rest: list[str]


def family_of(config: Mapping) -> str:
    """ValueError: an architecture or a language model that is not here."""
    named = config.get("architectures") or []
    named = [name for name in named if isinstance(name, str)] if isinstance(named, list) else [str(named)]
    known = [ARCHITECTURES[name] for name in named if name in ARCHITECTURES]
    if named and not known:
        raise ValueError(
            f"config.json has architecture {', '.join(name[:60] for name in named[:5])}: known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    what = known[0] if known else {"instructblip": "instruct"}.get(config.get("model_type"), "")
    if what in MATCHING:
        return what
    kind = part(config, "text_config").get("model_type", "opt")
    families = {kind: f"{what or 'blip2'}_{kind}" for kind in ("opt", "t5")}
    if not isinstance(kind, str) or kind not in families:
        raise ValueError(
            f"config.json: {foreign.told('text_config.model_type', kind)}: here are {' and '.join(families)}"
            + " (InstructBLIP with Vicuna is not)" * (what == "instruct")
        )
    return families[kind]


def part(config: Mapping, name: str) -> dict:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def check(config: Mapping, family: str, sizes: Mapping, layers: Mapping, pre_norm: bool) -> Said:
    """config.json of a folder of `family` against what its tensors show (`apply.infer`, `apply.layer_counts`)."""
    problems, notes, heads, model = [], [], {}, {}
    for name in ("vision_config", "qformer_config", "text_config"):
        if config.get(name) is not None and not isinstance(config[name], dict):
            problems.append(f"{foreign.told(name, config[name])}: it must be settings")
    for name, fields in SIZES.items():
        given, dot = (part(config, name), f"{name}.") if name else (config, "")
        for field, letter in fields.items():
            value = given.get(field)
            value = value[0] if isinstance(value, list) and len(value) == 2 and value[0] == value[1] else value
            if value is not None and letter in sizes and (type(value) is not int or value != sizes[letter]):
                problems.append(f"{foreign.told(dot + field, value)}, but the weights have {sizes[letter]}")
    vision, qformer = part(config, "vision_config"), part(config, "qformer_config")
    if family == "blip2_text":
        model |= _unseen(vision, sizes.get("D", 0))
    towers = (("vision_config", vision, "vit"), ("qformer_config", qformer, "qformer"))
    for name, given, stack in towers[family == "blip2_text" :]:
        n, depth = given.get("num_attention_heads"), layers[stack]
        n = DEFAULTS[name]["num_attention_heads"] if n is None else n
        width = sizes.get("D" if stack == "vit" else "W", 0)
        if not foreign.whole(n) or width % n:
            problems.append(f"{foreign.told(f'{name}.num_attention_heads', n)}: it must divide the width {width}")
        else:
            heads[stack] = n
        if given.get("num_hidden_layers") not in (None, depth):
            problems.append(
                f"{foreign.told(f'{name}.num_hidden_layers', given['num_hidden_layers'])}, but the weights have {depth}"
            )
        problems += foreign.fixed(given, f"{name}.")
    problems += [
        f"{foreign.told(f'qformer_config.{field}', qformer[field])}: the models here have {values[0]!r}"
        for field, values in FIXED.items()
        if qformer.get(field) is not None and qformer[field] not in values
    ]
    problems += _text_input(family, qformer) + _image_size(vision, sizes)
    eps = vision.get("layer_norm_eps", DEFAULTS["vision_config"]["layer_norm_eps"])
    if eps not in EPS:
        problems.append(f"{foreign.told('vision_config.layer_norm_eps', eps)}: known are {EPS[0]:g} and {EPS[1]:g}")
    model["vision_eps"] = eps
    if eps != BLOCK_EPS:
        notes.append(
            f"vision_config.layer_norm_eps is {eps:g}: so it is for the last norm; the blocks have {BLOCK_EPS:g}, with "
            "which they were trained"
        )
    llm, rest = {}, []
    if family not in MATCHING:
        kind = family.rsplit("_", 1)[1]
        text = language_models.said(kind, part(config, "text_config"), sizes, layers, pre_norm, "text_config.")
        problems, notes, heads, llm = problems + text.problems, notes + text.notes, heads | text.heads, text.more
        only_decoder = config.get("use_decoder_only_language_model")
        if only_decoder is not None and only_decoder is not (kind == "opt"):
            problems.append(
                f"{foreign.told('use_decoder_only_language_model', only_decoder)}, but text_config is {kind}"
            )
        rest += language_models.ignored(kind, part(config, "text_config"), "text_config.")
    else:
        rest += ["text_config"] * ("text_config" in config)
    kept = {}
    if (image := config.get("image_token_index")) is not None:
        if type(image) is not int or image < 0:
            problems.append(f"{foreign.told('image_token_index', image)}: it must be an id")
        kept = {"image_token_index": image}
        notes.append(f"image_token_index {image}: here the queries stand before the text, without such an id")
    return Said(heads, model, llm, kept, problems, notes, rest + _rest(config))


def _text_input(family: str, qformer: Mapping) -> list[str]:
    told = qformer.get("use_qformer_text_input")
    if told is None or family in READS_QUESTIONS or told is (family in MATCHING):
        return []
    return [
        f"qformer_config.use_qformer_text_input is {told}, but {'matching' if family in MATCHING else 'this'} "
        f"model's Q-Former {'reads' if family in MATCHING else 'does not read'} text"
    ]


def _unseen(vision: Mapping, width: int) -> dict:
    """Leaves of `cfg.model` of an image encoder of which there is no tensor, for the way back."""
    sizes = {"depth": "num_hidden_layers", "heads": "num_attention_heads", "mlp": "intermediate_size"}
    found = {ours: vision.get(theirs) for ours, theirs in (sizes | {"patch": "patch_size"}).items()}
    vit = TOWER_SIZES["eva_g"] | {"width": width} | {name: n for name, n in found.items() if foreign.whole(n)}
    size = vision.get("image_size")
    return {"vit": ConfigDict(vit), "img_size": size if foreign.whole(size) else 224}


def _image_size(vision: Mapping, sizes: Mapping) -> list[str]:
    size, patch = vision.get("image_size", DEFAULTS["vision_config"]["image_size"]), sizes.get("p", 1)
    size = size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size
    if not foreign.whole(size):
        return [f"{foreign.told('vision_config.image_size', size)}: it must be a whole number, of a square"]
    positions = 1 + (size // patch) ** 2
    if size % patch or sizes.get("P", positions) != positions:
        return [
            f"vision_config.image_size is {size} with patches of {patch}, but the weights have {sizes.get('P')} "
            "positions"
        ]
    return []


def _rest(config: Mapping) -> list[str]:
    """Fields of the top level and of vision and Q-Former that nothing reads."""
    out, known = [], {"num_attention_heads", "num_hidden_layers", "image_size", "layer_norm_eps", "model_type"}
    known |= {*foreign.FIXED, "architectures"}
    for name, more in (("vision_config", ()), ("qformer_config", (*FIXED, "use_qformer_text_input"))):
        given = part(config, name)
        out += [
            f"{name}.{field}"
            for field in given
            if field not in {*known, *more, *SIZES[name]} and given[field] is not None
        ]
    top = {*SIZES[""], "vision_config", "qformer_config", "text_config", "model_type", "architectures"}
    top |= {"image_token_index", "use_decoder_only_language_model", "is_encoder_decoder"}
    return out + [field for field in config if field not in top and config[field] is not None]


def ignored(config: Mapping, said: Said, family: str, model) -> list[str]:
    """The note on fields of `said.rest`, but for those that our own export of this model would say as well."""
    ours, given = (trees.flat(x) for x in (model_json(family, model, said.kept), dict(config)))
    return foreign.ignored(name for name in said.rest if name not in ours or ours[name] != given.get(name))


# --- written ----------------------------------------------------------------------------------------------------------
def model_json(family: str, model, kept: Mapping) -> dict:
    """config.json of our `cfg.model`. kept: fields of the folder that it came from, as of `Said`."""
    vit, qformer = model.vit, model.qformer
    start = KINDS["instructblip" if family in READS_QUESTIONS else "blip-2"]
    out = {
        "architectures": [CLASSES[family]],
        "model_type": "instructblip" if family in READS_QUESTIONS else "blip-2",
        "dtype": "float32",
        "vision_config": dict(
            model_type=f"{start}_vision_model",
            hidden_size=vit.width,
            intermediate_size=vit.mlp,
            num_hidden_layers=vit.depth,
            num_attention_heads=vit.heads,
            image_size=model.img_size,
            patch_size=vit.patch,
            hidden_act="gelu",
            layer_norm_eps=BLOCK_EPS,
            attention_dropout=0.0,
            qkv_bias=True,
        ),
        "qformer_config": dict(
            model_type=f"{start}_qformer",
            vocab_size=qformer.vocab_size,
            hidden_size=qformer.width,
            num_hidden_layers=qformer.layers,
            num_attention_heads=qformer.heads,
            intermediate_size=qformer.mlp,
            hidden_act="gelu",
            hidden_dropout_prob=model.dropout,
            attention_probs_dropout_prob=model.dropout,
            max_position_embeddings=qformer.positions,
            layer_norm_eps=1e-12,
            pad_token_id=0,
            cross_attention_frequency=2,
            encoder_hidden_size=vit.width,
            **({} if family in READS_QUESTIONS else {"use_qformer_text_input": family in MATCHING}),
        ),
        "num_query_tokens": qformer.queries,
        "image_token_index": kept.get("image_token_index"),
    }
    if family in MATCHING:
        out["image_text_hidden_size"] = model.embed_dim
        return out
    image = language_models.IMAGE_TOKENS[model.llm.kind]
    if out["image_token_index"] is None and image < model.llm.vocab_size:
        out["image_token_index"] = image
    out["text_config"] = language_models.model_json(model.llm, model.llm_dropout)
    out["use_decoder_only_language_model"] = model.llm.kind == "opt"
    return out
