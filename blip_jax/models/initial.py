"""How parameters start: a table from path to distribution, and few draws for all of them.

A kernel of random numbers takes a GPU's compiler half a second, and its key as long again where it is derived in it. So
the keys of all parameters come from one kernel, and parameters of one shape and distribution from another one.
"""

from __future__ import annotations

import functools
import math
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax import trees
from blip_jax.models.layers import stack
from blip_jax.parallel import sharding

ROWS = (  # path ending -> distribution, first match wins
    (r"(^|/)temp$", "temperature"),
    (r"scale$", "ones"),
    (r"(patch_embed|vision_proj|text_proj|itm_head|llm_proj|cls_head/\w+)/(kernel|bias)$", "torch"),
    (r"bias$", "zeros"),
    (r"vit/pos_embed$", "positions"),
    (r"(kernel|embedding|query_tokens)$|vit/cls$", "normal"),
)
SMALL = 2**20  # parameters of at most so many numbers are drawn together, whatever their shapes
CONSTANTS = {"temperature": 0.07, "ones": 1.0, "zeros": 0.0}


def parameters(shapes: dict, key, *, std: float, pos_std: float) -> dict:
    """Parameters of the given shapes, f32: nested dicts of ShapeDtypeStruct -> of arrays.

    "normal" has deviation `std`, "positions" `pos_std`; "torch" is U(-1/sqrt(n), 1/sqrt(n)) of what n inputs a kernel
    sums, torch's default for linear and convolution layers. A parameter's numbers depend on its path, its shape and
    `key` alone, not on the mesh or the others.
    ValueError: a path without a row in ROWS.
    """
    flat = dict(trees.paths(shapes))
    kinds = {path: _kind(path) for path in flat}
    drawn = [path for path in flat if kinds[path] not in CONSTANTS]
    crcs = np.array([zlib.crc32(path.encode()) for path in drawn], np.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, crcs)

    groups: dict[tuple, list[str]] = {}
    for path in drawn:
        small, dims = math.prod(flat[path].shape) <= SMALL, sharding.logical_dims(path, len(flat[path].shape))
        groups.setdefault((kinds[path] == "torch", *((None, None) if small else (flat[path].shape, dims))), []).append(
            path
        )

    out = {
        path: jnp.full(flat[path].shape, CONSTANTS[kind], jnp.float32)
        for path, kind in kinds.items()
        if kind in CONSTANTS
    }
    for (uniform, shape, dims), paths in groups.items():
        own = keys[np.array([drawn.index(path) for path in paths])]
        if shape is None:
            together = _draws(own, (max(math.prod(flat[path].shape) for path in paths),), uniform, (None,))
        else:
            together = _draws(own, shape, uniform, dims)
        for path, x in zip(paths, together):
            x = x if shape else x[: math.prod(flat[path].shape)].reshape(flat[path].shape)
            out[path] = x * (_bound(path, flat) if uniform else {"normal": std, "positions": pos_std}[kinds[path]])
    return trees.nest((path, out[path]) for path in flat)


def init_params(cfg, model, key) -> dict:
    """Random parameters of `model` as nested dict; pure (use under jax.jit with out_shardings, or jax.eval_shape)."""
    shapes = _shapes(model, cfg.model.img_size, min(8, cfg.text.max_len))
    return parameters(shapes, key, std=cfg.model.init_std, pos_std=cfg.model.vit.pos_std)


def _shapes(model, size: int, T: int) -> dict:
    """The parameters of `model` as nested dict of ShapeDtypeStruct; traced once for equal models, which takes seconds,
    as a run asks two or three times."""
    try:
        hash(model)
    except TypeError:  # one's own, with a list among its fields, say
        return _traced(model, size, T)
    return _kept(model, size, T)


def _traced(model, size: int, T: int) -> dict:
    def init():
        img, ids = jnp.zeros((1, size, size, 3)), jnp.zeros((1, T), jnp.int32)
        return model.init(jax.random.key(0), img, ids, jnp.ones((1, T), bool))["params"]

    with stack.looped():
        return jax.eval_shape(init)


_kept = functools.lru_cache(maxsize=8)(_traced)


def of_run(cfg, model, key) -> dict:
    """The random parameters of the run whose root key is jax.random.key(cfg.seed); pure, as `init_params`."""
    return init_params(cfg, model, jax.random.split(key, 3)[0])


def _draws(keys, shape: tuple, uniform: bool, dims: tuple):
    """f32[G,*shape]: numbers from U(-1, 1) or N(0, 1), each of G keys' its own; the first n of a key's are the
    same for every length."""

    def numbers(key, shape):
        return jax.random.uniform(key, shape, minval=-1.0) if uniform else jax.random.normal(key, shape)

    def draw(key):
        if dims[0] != "layers":
            return numbers(key, shape)
        # a stack is one loop over its layers, which keeps the random bits of one at a time
        layers = jax.random.split(key, shape[0])
        return jax.lax.map(lambda key: sharding.constrain(numbers(key, shape[1:]), *dims[1:]), layers)

    together = sharding.constrain(jax.vmap(draw)(keys), None, *dims)
    return jax.lax.optimization_barrier(together)  # else each parameter would draw all of them again for itself


def _kind(path: str) -> str:
    for ending, kind in ROWS:
        if re.search(ending, path):
            return kind
    raise ValueError(f"no row of ROWS in blip_jax/models/initial.py matches {path}: add one that says how it starts")


def _bound(path: str, flat: dict) -> float:
    """1 / sqrt(n), n of the kernel beside a bias."""
    kernel = flat[re.sub("bias$", "kernel", path)]
    return math.prod(kernel.shape[:-1]) ** -0.5


def magnified(params: dict, factor: float) -> dict:
    """Parameters with matrices and tables times `factor`: random ones of deviation 0.02 hardly let an output
    depend on the input."""
    large = re.compile(r"(kernel|embedding|vit/pos_embed)$")
    return trees.nest((path, x * factor if large.search(path) else x) for path, x in trees.paths(params))
