"""Checkpoints of BLIP-2 from the golden cases: as files of LAVIS, as Hugging Face folders, and cut into their parts."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from world import golden, official

CLASSES = {
    "hf_opt": "Blip2ForConditionalGeneration",
    "hf_t5": "Blip2ForConditionalGeneration",
    "hf_itm": "Blip2ForImageTextRetrieval",
}
TOWER, LANGUAGE_MODELS = "visual_encoder.", ("opt_model.", "t5_model.")


def meta(case):
    return json.loads((golden.folder(f"blip2/{case}") / "meta.json").read_text())


def weights(case):
    return load_file(golden.folder(f"blip2/{case}") / "weights.safetensors")


def heads(case):
    """Of a case under LAVIS's names; its CLIP tower has heads of 64, whatever the sizes say."""
    m, tensors = meta(case), weights(case)
    clip = "visual_encoder.class_embedding" in tensors
    vit = len(tensors["ln_vision.weight"]) // 64 if clip else m["config"]["vheads"]
    out = {"vit": vit, "qformer": m["config"]["th"]}
    return out | ({"llm": m["llm"].get("num_attention_heads", m["llm"].get("num_heads"))} if "llm" in m else {})


def vocab(path, entries):
    """A vocab.txt of a Q-Former with `entries`, [DEC] the last of them."""
    return official.vocabulary(path, entries + 1)


def settings(case):
    """config.json of a case of transformers, as its class would write it."""
    config = meta(case)["config"]
    config |= {"architectures": [CLASSES[case]], "model_type": "blip-2"}
    if "text_config" in config:
        config["text_config"]["model_type"] = case.removeprefix("hf_")
    return config


def folder(path, case, config=None, tensors=None):
    """A case as a Hugging Face folder, with other settings or tensors if they are given."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings(case) if config is None else config))
    save(path / "model.safetensors", weights(case) if tensors is None else tensors)
    return path


def save(path, tensors):
    save_file({name: np.ascontiguousarray(x) if x.ndim else x for name, x in tensors.items()}, path)
    return path


def parts(case):
    """Tensors of a second-stage case: what LAVIS saves, its image tower, its language model, under their own names."""
    left, tower, llm = {}, {}, {}
    for name, x in weights(case).items():
        if name.startswith(TOWER):
            tower[name.removeprefix(TOWER)] = x
        elif name.startswith(LANGUAGE_MODELS):
            llm[name.split(".", 1)[1]] = x
        else:
            left[name] = x
    return left, tower, llm
