"""How a tensor of PyTorch is laid out here, both ways. The layouts are named in rules/blip.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blip_jax.models.text.med import padded_vocab

HEADED = {  # layout -> the dimension of the torch tensor that the heads share
    "heads_in": 0,
    "heads_in_bias": 0,
    "heads_out": 1,
    "qkv": 0,
    "qkv_bias": 0,
}


def to_ours(x: np.ndarray, layout: str, heads: int) -> dict[str, np.ndarray]:
    """What `{qkv}` stands for, or "" -> our array of a torch tensor."""
    if layout in ("qkv", "qkv_bias"):
        return {
            name: _laid_out(block, layout.replace("qkv", "heads_in"), heads)
            for name, block in zip("qkv", np.split(x, 3, axis=0))
        }
    return {"": _laid_out(x, layout, heads)}


def _laid_out(x: np.ndarray, layout: str, heads: int) -> np.ndarray:
    rows = x.shape[0] if x.ndim else 1
    match layout:
        case "same":
            return x
        case "lead":
            return x.reshape(x.shape[1:])
        case "lead2":
            return x.reshape(x.shape[2:])
        case "scalar":
            return x.reshape(())
        case "linear" | "transpose":
            return x.T
        case "conv":
            return x.transpose(2, 3, 1, 0)
        case "heads_in":
            return x.T.reshape(x.shape[1], heads, rows // heads)
        case "heads_in_bias":
            return x.reshape(heads, rows // heads)
        case "heads_out":
            return x.T.reshape(heads, x.shape[1] // heads, rows)
        case "vocab":
            return np.pad(x, [(0, padded_vocab(rows) - rows)] + [(0, 0)] * (x.ndim - 1))
        case "vocab_linear":
            return np.pad(x.T, [(0, 0), (0, padded_vocab(rows) - rows)])
    raise KeyError(layout)


def to_theirs(arrays: Sequence[np.ndarray], layout: str, vocab_size: int) -> np.ndarray:
    """The inverse of `to_ours`, of the arrays that `{qkv}` stands for, or of the one."""
    if layout in ("qkv", "qkv_bias"):
        return np.concatenate([to_theirs([a], layout.replace("qkv", "heads_in"), vocab_size) for a in arrays])
    return np.asarray(_laid_back(np.asarray(arrays[0]), layout, vocab_size), order="C")


def _laid_back(x: np.ndarray, layout: str, vocab_size: int) -> np.ndarray:
    match layout:
        case "same":
            return x
        case "lead":
            return x[None]
        case "lead2":
            return x[None, None]
        case "scalar":
            return x.reshape(1)
        case "linear" | "transpose":
            return x.T
        case "conv":
            return x.transpose(3, 2, 0, 1)
        case "heads_in":
            return x.reshape(x.shape[0], -1).T
        case "heads_in_bias":
            return x.reshape(-1)
        case "heads_out":
            return x.reshape(-1, x.shape[-1]).T
        case "vocab":
            return x[:vocab_size]
        case "vocab_linear":
            return x[:, :vocab_size].T
    raise KeyError(layout)
