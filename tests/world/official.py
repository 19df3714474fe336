"""Synthetic checkpoints of every released family, of random values.

Names and shapes are those of the originals' tensors, full size or small.

`python tests/world/official.py pretrain base model.pth` writes a full-size file of random weights (2 GB), to measure
conversion with.
"""

import pathlib
import sys

import numpy as np

BASE = dict(D=768, depth=12, F=3072, p=16, W=768, M=3072, layers=12, V=30524, T=512, E=256, K=57600)
LARGE = BASE | dict(D=1024, depth=24, F=4096)
TINY = dict(D=48, depth=2, F=96, p=8, W=32, M=64, layers=2, V=120, T=40, E=16, K=24)
TINY_HEADS = dict(heads=dict(vit=4, med=4))
IMG_SIZE = {"pretrain": 224, "features": 224, "vqa": 480, "deit": 224, "augreg": 224}  # else 384


def vit(prefix, s, positions):
    D, F, p = s["D"], s["F"], s["p"]
    out = {
        "cls_token": (1, 1, D),
        "pos_embed": (1, positions, D),
        "patch_embed.proj.weight": (D, 3, p, p),
        "patch_embed.proj.bias": (D,),
        "norm.weight": (D,),
        "norm.bias": (D,),
    }
    for i in range(s["depth"]):
        block = {
            "norm1.weight": (D,),
            "norm1.bias": (D,),
            "attn.qkv.weight": (3 * D, D),
            "attn.qkv.bias": (3 * D,),
            "attn.proj.weight": (D, D),
            "attn.proj.bias": (D,),
            "norm2.weight": (D,),
            "norm2.bias": (D,),
            "mlp.fc1.weight": (F, D),
            "mlp.fc1.bias": (F,),
            "mlp.fc2.weight": (D, F),
            "mlp.fc2.bias": (D,),
        }
        out |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {prefix + name: shape for name, shape in out.items()}


def dense(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def text(prefix, s, cross, twin=False):
    W, M = s["W"], s["M"]
    out = {
        "embeddings.position_ids": (1, s["T"]),
        "embeddings.word_embeddings.weight": (s["V"], W),
        "embeddings.position_embeddings.weight": (s["T"], W),
        **norm("embeddings.LayerNorm", W),
    }
    for i in range(s["layers"]):
        layer = {}
        for part in ("query", "key", "value"):
            layer |= dense(f"attention.self.{part}", W, W)
            for n in ("0", "1") if twin else ("",):
                layer |= dense(f"crossattention.self{n}.{part}", W, W if part == "query" else cross)
        for n in ("0", "1") if twin else ("",):
            layer |= dense(f"crossattention.output.dense{n}", W, W)
        if twin and i >= 6:
            layer |= dense("crossattention.output.merge_layer", W, 2 * W)
        layer |= {
            **dense("attention.output.dense", W, W),
            **norm("attention.output.LayerNorm", W),
            **norm("crossattention.output.LayerNorm", W),
            **dense("intermediate.dense", M, W),
            **dense("output.dense", W, M),
            **norm("output.LayerNorm", W),
        }
        out |= {f"encoder.layer.{i}.{name}": shape for name, shape in layer.items()}
    return {prefix + name: shape for name, shape in out.items()}


def head(prefix, s):
    W, V = s["W"], s["V"]
    return {
        f"{prefix}bias": (V,),
        **dense(f"{prefix}transform.dense", W, W),
        **norm(f"{prefix}transform.LayerNorm", W),
        f"{prefix}decoder.weight": (V, W),
        f"{prefix}decoder.bias": (V,),
    }


def shapes(family, s=BASE, img_size=0):
    """name -> shape of the family's file, as the originals' `torch.save` writes it."""
    D, W, E, K = s["D"], s["W"], s["E"], s["K"]
    positions = ((img_size or IMG_SIZE.get(family, 384)) // s["p"]) ** 2 + 1
    see, read = vit("visual_encoder.", s, positions), text("text_encoder.", s, D)
    decode = text("text_decoder.bert.", s, D) | head("text_decoder.cls.predictions.", s)
    project = dense("vision_proj", E, D) | dense("text_proj", E, W)
    momentum = (
        vit("visual_encoder_m.", s, positions)
        | text("text_encoder_m.", s, D)
        | dense("vision_proj_m", E, D)
        | dense("text_proj_m", E, W)
    )
    queues = {"image_queue": (E, K), "text_queue": (E, K)}
    match = dense("itm_head", 2, W)
    return {
        "pretrain": {"temp": (), **queues, "queue_ptr": (1,), **see, **read, **project, **match, **momentum, **decode},
        "retrieval": {
            "temp": (),
            **queues,
            "idx_queue": (1, K),
            "ptr_queue": (1,),
            **see,
            **read,
            **project,
            **match,
            **momentum,
        },
        "itm": {**see, **read, **project, **match},
        "features": {**see, **read},
        "dialog": {**see, **read, **match},
        "caption": {**see, **decode},
        "vqa": {**see, **read, **text("text_decoder.bert.", s, W), **head("text_decoder.cls.predictions.", s)},
        "nlvr": {
            **see,
            **text("text_encoder.", s, D, twin=True),
            **dense("cls_head.0", W, W),
            **dense("cls_head.2", 2, W),
        },
        "deit": {**vit("", s, positions), "head.weight": (1000, D), "head.bias": (1000,)},
    }[family]


def tied(family, name):
    """The name of the tensor that `name` shares its values with in the originals."""
    same = {
        "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
        "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    }
    name = same.get(name, name)
    if family == "pretrain" and name.startswith("text_decoder.bert.") and ".attention." not in name:
        name = name.replace("text_decoder.bert.", "text_encoder.")
    return name


def tensors(family, s=BASE, seed=0, img_size=0):
    """name -> random array; tied names share one array, as tied parameters share one storage."""
    rng, out, listed = np.random.default_rng(seed), {}, shapes(family, s, img_size)
    for name, shape in listed.items():
        origin = tied(family, name)
        if name.endswith("position_ids"):
            out[name] = np.arange(shape[1])[None]
        elif name in ("queue_ptr", "ptr_queue"):
            out[name] = np.array([8])
        elif name == "idx_queue":
            out[name] = rng.integers(-100, 2**40, shape)
        else:
            if origin not in out:
                x = rng.standard_normal(shape, np.float32) * np.float32(0.05)
                out[origin] = (
                    x + 1 if "LayerNorm.weight" in name or "norm" in name and name.endswith("weight") else np.asarray(x)
                )
            out[name] = out[origin]
    return {name: out[name] for name in listed}


def save(path, arrays, **beside):
    """torch.save of {"model": arrays, ...}; needs torch."""
    from blip_jax.convert import torch_io

    if not beside:
        return torch_io.save_pth(path, arrays)
    import torch

    torch.save({"model": {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}, **beside}, path)


def flax(s=TINY, heads=4, seed=0):
    """name -> random array of a ViT as an .npz of the augreg release has them."""
    D, F, p, H, positions = s["D"], s["F"], s["p"], s["D"] // heads, (32 // s["p"]) ** 2 + 1
    listed = {
        "cls": (1, 1, D),
        "embedding/kernel": (p, p, 3, D),
        "embedding/bias": (D,),
        "head/kernel": (D, 10),
        "head/bias": (10,),
        "Transformer/posembed_input/pos_embedding": (1, positions, D),
        "Transformer/encoder_norm/scale": (D,),
        "Transformer/encoder_norm/bias": (D,),
    }
    for i in range(s["depth"]):
        block, attention = (
            f"Transformer/encoderblock_{i}/",
            f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1/",
        )
        for part in ("query", "key", "value"):
            listed |= {f"{attention}{part}/kernel": (D, heads, H), f"{attention}{part}/bias": (heads, H)}
        listed |= {
            f"{attention}out/kernel": (heads, H, D),
            f"{attention}out/bias": (D,),
            f"{block}MlpBlock_3/Dense_0/kernel": (D, F),
            f"{block}MlpBlock_3/Dense_0/bias": (F,),
            f"{block}MlpBlock_3/Dense_1/kernel": (F, D),
            f"{block}MlpBlock_3/Dense_1/bias": (D,),
        }
        listed |= {f"{block}LayerNorm_{n}/{leaf}": (D,) for n in (0, 2) for leaf in ("scale", "bias")}
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in listed.items()}


def bert(s=TINY, seed=0, prefix="bert.", old_norms=False, head=True):
    """name -> random array of a BERT for pre-training of two words fewer, as its files name them."""
    W, V = s["W"], s["V"] - 2
    listed = {name: shape for name, shape in text("bert.", s | {"V": V}, W).items() if "crossattention" not in name}
    listed |= {"bert.embeddings.token_type_embeddings.weight": (2, W), **dense("bert.pooler.dense", W, W)}
    if head:
        listed |= globals()["head"]("cls.predictions.", s | {"V": V}) | dense("cls.seq_relationship", 2, W)
    rng = np.random.default_rng(seed)
    out = {name: rng.standard_normal(shape, np.float32) for name, shape in listed.items() if "position_ids" not in name}
    if head:
        out["cls.predictions.decoder.weight"] = out["bert.embeddings.word_embeddings.weight"]
        out["cls.predictions.decoder.bias"] = out["cls.predictions.bias"]

    def rename(name):
        if old_norms:
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return prefix + name.removeprefix("bert.") if name.startswith("bert.") else name

    return {rename(name): x for name, x in out.items()}


def vocabulary(path, size=TINY["V"]):
    """A vocab.txt that makes `size` entries with [DEC] and [ENC]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"word{i}" for i in range(size - 2 - len(words))]
    pathlib.Path(path).write_text("\n".join(words) + "\n")
    return str(path)


if __name__ == "__main__":
    family, size, path = sys.argv[1:]
    save(path, tensors(family, {"base": BASE, "large": LARGE, "tiny": TINY}[size]))
    vocabulary(pathlib.Path(path).with_suffix(".txt"), BASE["V"] if size != "tiny" else TINY["V"])
