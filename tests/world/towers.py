"""Image towers of BLIP-2 from tensors under the originals' names, by the rows of convert/rules/vision.py alone."""

import re

import jax.numpy as jnp
import numpy as np

from blip_jax import trees
from blip_jax.convert.layouts import to_ours
from blip_jax.convert.rules.vision import CLIP, EVA
from blip_jax.models.layers.norm import LayerNorm
from blip_jax.models.vision.towers import tower

TABLES = {"eva": EVA, "clip": CLIP}


def under_our_paths(kind, tensors, heads, prefix="visual_encoder."):
    """(path, layer or None, array) of each torch tensor with the prefix."""
    for name in (name for name in tensors if name.startswith(prefix)):
        plain = name[len(prefix) :]
        number = re.search(r"(?<=blocks\.)\d+(?=\.)", plain)
        key = plain if number is None else plain[: number.start()] + "{i}" + plain[number.end() :]
        path, layout = next(row[1:3] for row in TABLES[kind] if row[0] == key)
        for letter, x in to_ours(tensors[name], layout, heads).items():
            yield path.replace("{qkv}", letter), number and int(number[0]), x


def parameters(kind, tensors, heads, prefix="visual_encoder."):
    """Nested parameters of the tower, layers stacked."""
    flat = {}
    for path, layer, x in under_our_paths(kind, tensors, heads, prefix):
        if layer is None:
            flat[path] = x
        else:
            flat.setdefault(path, {})[layer] = x
    stack = lambda layers: np.stack([layers[i] for i in range(len(layers))])
    return trees.nest((path, stack(x) if isinstance(x, dict) else x) for path, x in flat.items())


def of_shapes(kind, params, heads, img_size):
    """The tower with the sizes of its parameters."""
    depth, width, mlp = params["blocks"]["mlp"]["fc1"]["kernel"].shape
    patch = len(params["patch_embed"]["kernel"])
    return tower(
        {"kind": kind, "width": width, "depth": depth, "heads": heads, "mlp": mlp, "patch": patch}, img_size=img_size
    )


def pixels(x):
    return jnp.asarray(x).transpose(0, 2, 3, 1)


def ln_vision(tensors, tokens, eps=1e-5):
    params = {"scale": tensors["ln_vision.weight"], "bias": tensors["ln_vision.bias"]}
    return LayerNorm(eps, jnp.float32).apply({"params": params}, tokens)
