"""Runs the key tables of `rules.py` in both directions on numpy arrays; collects every problem and raises once."""

from __future__ import annotations

import re
from typing import Mapping

import numpy as np

from blip_jax.convert.rules import FAMILIES, IGNORED, TIED
from blip_jax.models.med import padded_vocab


def from_torch(family: str, tensors: Mapping[str, np.ndarray], *, vit_heads: int, med_heads: int) -> dict:
    """State dict of a PyTorch model -> nested dict of our arrays, {"params": ..., "momentum": ...}.

    Args:
      family: a key of `rules.FAMILIES`.
      tensors: arrays under the original's names; tied copies may be present and must then be equal.
      vit_heads, med_heads: not stored in the tensors, so they must be given.
    Raises: ValueError listing all missing, unknown, unequal and misshapen keys together.
    """
    problems, out, used = [], {}, set()
    for torch_key, path, layout in FAMILIES[family]:
        keys = _numbered(torch_key, tensors)
        used.update(keys)
        missing = [k for k in keys if k not in tensors] or ([torch_key] if not keys else [])
        if missing:
            problems.append(f"missing: {', '.join(missing)}")
            continue
        heads = vit_heads if "/vit/" in path else med_heads
        try:
            for p, x in _read(torch_key, keys, path, layout, tensors, heads):
                _put(out, p, x)
        except (ValueError, IndexError) as e:
            problems.append(f"misshapen: {torch_key} {[tensors[k].shape for k in keys][:2]}: {e}")
    for copy, original in TIED[family]:
        for k in _numbered(copy, tensors):
            used.add(k)
            twin = _twin(copy, original, k)
            if k in tensors and twin in tensors and not np.array_equal(tensors[k], tensors[twin]):
                problems.append(f"tied but unequal: {k} and {twin}")
    unknown = [k for k in tensors if k not in used and not any(re.search(p, k) for p in IGNORED)]
    if unknown:
        problems.append(f"not in the table of family {family!r}: {', '.join(sorted(unknown))}")
    if problems:
        raise ValueError(f"this is not a complete {family!r} state dict:\n  " + "\n  ".join(problems))
    return out


def to_torch(family: str, state: dict, *, vocab_size: int) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: nested dict {"params", "momentum"} -> arrays under the original's names, tied copies included.

    The padding rows of the stored vocabulary (from vocab_size on) are dropped. ValueError lists all parameters that are missing.
    """
    out, problems = {}, []
    for torch_key, path, layout in FAMILIES[family]:
        try:
            out |= dict(_write(torch_key, path, layout, state, vocab_size))
        except KeyError as e:
            problems.append(f"{path} (no {e})")
    if problems:
        raise ValueError(f"the state lacks parameters of family {family!r}:\n  " + "\n  ".join(problems))
    for copy, original in TIED[family]:
        if "{i}" in copy:
            pattern = re.escape(original).replace(r"\{i\}", r"(\d+)")
            out |= {copy.format(i=m[1]): x for k, x in list(out.items()) if (m := re.fullmatch(pattern, k))}
        else:
            out[copy] = out[original]
    return out


def _numbered(key: str, tensors) -> list[str]:
    """The torch keys of a row, one per layer for keys with {i}; layers are counted from 0 to the highest one present."""
    if "{i}" not in key:
        return [key]
    pattern = re.compile(re.escape(key).replace(r"\{i\}", r"(\d+)"))
    found = [int(m[1]) for k in tensors if (m := pattern.fullmatch(k))]
    return [key.format(i=i) for i in range(max(found) + 1)] if found else []


def _twin(copy: str, original: str, key: str) -> str:
    if "{i}" not in copy:
        return original
    return original.format(i=re.fullmatch(re.escape(copy).replace(r"\{i\}", r"(\d+)"), key)[1])


def _read(torch_key, keys, path, layout, tensors, heads):
    """(our path, our array) of one row: one array per layer, or one stack of all layers, or just one."""
    parts = [_to_ours(tensors[k], layout, heads) for k in keys]  # per layer, {q|k|v or "": array}
    for part in parts[0]:
        ours = path.replace("{qkv}", part)
        if "{i:02d}" in path:
            yield from ((ours.format(i=i), p[part]) for i, p in enumerate(parts))
        elif "{i}" in torch_key:
            yield ours, np.stack([p[part] for p in parts])
        else:
            yield ours, parts[0][part]


def _to_ours(x, layout, heads) -> dict:
    if layout in ("qkv", "qkv_bias"):
        if x.shape[0] % 3:
            raise ValueError("rows are not three equal blocks")
        return {name: _to_ours(block, layout.replace("qkv", "heads_in"), heads)[""]
                for name, block in zip("qkv", np.split(x, 3, axis=0))}
    rows = x.shape[0] if x.ndim else 1
    return {"": {
        "same": lambda: x,
        "lead": lambda: x.reshape(x.shape[1:]),
        "lead2": lambda: x.reshape(x.shape[2:]),
        "scalar": lambda: x.reshape(()),
        "linear": lambda: x.T,
        "transpose": lambda: x.T,
        "conv": lambda: x.transpose(2, 3, 1, 0),
        "heads_in": lambda: x.T.reshape(x.shape[1], heads, rows // heads),
        "heads_in_bias": lambda: x.reshape(heads, rows // heads),
        "heads_out": lambda: x.T.reshape(heads, x.shape[1] // heads, rows),
        "vocab": lambda: np.pad(x, [(0, padded_vocab(rows) - rows)] + [(0, 0)] * (x.ndim - 1)),
    }[layout]()}


def _write(torch_key, path, layout, state, vocab_size):
    """(torch key, torch array) of one row."""
    if "{i:02d}" in path:
        layers = sum(name.startswith("layer_") for name in _get(state, path.split("/layer_")[0]))
        for i in range(layers):
            yield torch_key.format(i=i), _to_torch([_get(state, path.format(i=i))], layout, vocab_size)
        return
    arrays = [_get(state, path.replace("{qkv}", c)) for c in ("qkv" if "{qkv}" in path else " ")]
    if "{i}" in torch_key:
        for i in range(len(arrays[0])):
            yield torch_key.format(i=i), _to_torch([a[i] for a in arrays], layout, vocab_size)
    else:
        yield torch_key, _to_torch(arrays, layout, vocab_size)


def _to_torch(arrays, layout, vocab_size):
    if layout in ("qkv", "qkv_bias"):
        return np.concatenate([_to_torch([a], layout.replace("qkv", "heads_in"), vocab_size) for a in arrays])
    x = np.asarray(arrays[0])
    return np.ascontiguousarray({
        "same": lambda: x,
        "lead": lambda: x[None],
        "lead2": lambda: x[None, None],
        "scalar": lambda: x.reshape(1),
        "linear": lambda: x.T,
        "transpose": lambda: x.T,
        "conv": lambda: x.transpose(3, 2, 0, 1),
        "heads_in": lambda: x.reshape(x.shape[0], -1).T,
        "heads_in_bias": lambda: x.reshape(-1),
        "heads_out": lambda: x.reshape(-1, x.shape[-1]).T,
        "vocab": lambda: x[:vocab_size],
    }[layout]())


def _get(tree, path: str):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _put(tree: dict, path: str, x) -> None:
    *parents, name = path.split("/")
    for p in parents:
        tree = tree.setdefault(p, {})
    tree[name] = x
