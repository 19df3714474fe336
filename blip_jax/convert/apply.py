"""Runs the key tables of `rules` in both directions on arrays; collects every problem and raises once."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from blip_jax.convert.rules.blip import FAMILIES, FIRST_LAYER, IGNORED, OPTIONAL, TIED, TOWERS
from blip_jax.models.text.med import padded_vocab

# endings of the paths that hold integers, 64 bits wide in the originals' files
COUNTERS = ("queue/ptr", "queue/image_id")
SHOWN = 20  # names or lines that a message has
MAX_TENSORS = 20_000  # of a file; the largest of the released models has 1560
MAX_LAYERS = 1000  # of a tower: a number in a name beyond it is none of a layer


class Row(NamedTuple):
    """A row of a family's table, for a number of layers: all its torch keys, and where they go."""

    keys: list[str]
    path: str
    layout: str
    shape: str
    stacked: bool  # whether the keys are slices of one parameter


def from_torch(family: str, tensors: Mapping[str, np.ndarray], *, vit_heads: int, med_heads: int) -> dict:
    """State dict of a PyTorch model -> nested dict of our arrays, {"params": ..., "momentum": ...}.

    Arrays are f32, but for counters, which stay as they are.

    Args:
      family: a key of `rules.blip.FAMILIES`.
      tensors: arrays under the original's names, or what `numpy.asarray` reads and has shape and dtype. Tied copies may
        be present and must then be equal; an optional group (`rules.blip.OPTIONAL`) may be absent. What needs no
        rearranging is not copied.
      vit_heads, med_heads: not stored in the tensors, so they must be given.
    Raises: ValueError listing all missing, unknown, unequal and misshapen keys and all values that are not finite
      together.
    """
    table = rows(family, tensors)
    problems = check_keys(family, tensors, table)
    sizes = infer(table, tensors)
    problems += _check_shapes(table, tensors, sizes, vit_heads, med_heads)
    problems += _check_values(family, tensors, table)
    if problems:
        raise ValueError("\n  ".join([f"this is not a complete {family!r} state dict:", *shown(problems)]))
    out: dict = {}
    for row in table:
        heads = vit_heads if "/vit/" in row.path else med_heads
        for path, x in _read(row, tensors, heads):
            _put(out, path, x)
    return out


def rows(family: str, tensors: Iterable[str]) -> list[Row]:
    """The table of a family, with a key for every layer that any of `tensors` (their names) belongs to.

    Absent groups are left out. Each tower has one number of layers, the largest found, so that a layer that some module
    lacks counts as missing.
    """
    absent = {key for _, keys in absent_groups(family, tensors) for key in keys}
    counts = layer_counts(family, tensors)
    out = []
    for key, path, layout, shape in FAMILIES[family]:
        if key in absent:
            continue
        stacked, first = "{i}" in key, FIRST_LAYER.get(path, 0)
        keys = [key.format(i=i) for i in range(first, counts[tower(path)])] if stacked else [key]
        out.append(Row(keys, path, layout, shape, stacked))
    return out


def tower(path: str) -> str:
    """The tower ("vit", "med") that a parameter of a stack belongs to."""
    return next(TOWERS[name] for name in path.split("/") if name in TOWERS)


def layer_counts(family: str, tensors: Iterable[str]) -> dict[str, int]:
    """tower -> its layers, one more than the highest number in a torch key; 0 where there is none.

    ValueError: a number from MAX_LAYERS on.
    """
    counts, parts = dict.fromkeys(TOWERS.values(), 0), {}
    for key, path, *_ in FAMILIES[family]:
        if "{i}" in key:
            parts[key.split("{i}")[0]] = tower(path)
    pattern = re.compile("(" + "|".join(map(re.escape, parts)) + r")(\d+)[./]")
    for name in tensors:
        if parts and (match := pattern.match(name)):
            which, number = parts[match[1]], match[2].lstrip("0") or "0"
            if len(number) > len(str(MAX_LAYERS)) or int(number) >= MAX_LAYERS:
                raise ValueError(
                    f"{name[:120]} is of layer {number[:20]}{'...' * (len(number) > 20)}: a model has fewer than "
                    f"{MAX_LAYERS} layers; the file is damaged, or no checkpoint"
                )
            counts[which] = max(counts[which], int(number) + 1)
    return counts


def absent_groups(family: str, tensors: Iterable[str]) -> list[tuple[str, list[str]]]:
    """The optional groups of which `tensors` has nothing: (what it is, its torch keys in the table)."""
    out = []
    for what, pattern in OPTIONAL.get(family, ()):
        if not any(re.fullmatch(pattern, name) for name in tensors):
            out.append((what, [row[0] for row in FAMILIES[family] if re.fullmatch(pattern, row[0])]))
    return out


def paths_of(family: str) -> str:
    """A regex of the paths of our parameters that a family's table fills."""
    paths = (re.escape(path).replace(r"\{qkv\}", "[qkv]") for _, path, *_ in FAMILIES[family])
    return "|".join(dict.fromkeys(paths))


def copies(family: str, table: list[Row]) -> Iterator[tuple[str, str]]:
    """(torch key of a tied copy, torch key of its original) for every layer."""
    present = [key for row in table for key in row.keys]
    for copy, original in TIED[family]:
        pattern = re.compile(re.escape(original).replace(r"\{i\}", r"(\d+)"))
        for key in present:
            if match := pattern.fullmatch(key):
                yield copy.format(i=match[1]) if match.groups() else copy, key


def buffers(names: Iterable[str]) -> dict[str, str]:
    """Torch keys of the originals' buffers of positions 0, 1, ..., each -> key of its position table."""
    table = "embeddings.position_embeddings.weight"
    return {name.replace(table, "embeddings.position_ids"): name for name in names if name.endswith(table)}


def check_keys(family: str, tensors: Iterable[str], table: list[Row]) -> list[str]:
    """What is missing, and what neither the table nor the list of rightly ignored names knows."""
    expected = {key for row in table for key in row.keys}
    known = expected | {copy for copy, _ in copies(family, table)}
    missing = [key for row in table for key in row.keys if key not in tensors]
    unknown = [k for k in tensors if k not in known and not any(re.search(p, k) for p in IGNORED[family])]
    if FAMILIES[family] and not any(layer_counts(family, tensors).values()):
        missing.append("all layers")
    return [
        f"{what}: {listed(folded(keys))}"
        for what, keys in (("missing", missing), (f"not in the table of family {family!r}", unknown))
        if keys
    ]


def listed(names: Iterable[str]) -> str:
    """Names with commas, not too many and none too long."""
    return ", ".join(shown([f"{name[:117]}..." if len(name) > 120 else name for name in names]))


def shown(lines: list[str]) -> list[str]:
    """The first lines of many, and how many more there are."""
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], f"... and {more} more"] if more > 1 else lines


def folded(keys: Iterable[str]) -> list[str]:
    """Names that differ in one number only as one: ["a.0.b", "a.1.b", "a.3.b"] -> ["a.{0-1,3}.b"]"""
    groups: dict[str, list[str]] = {}
    for key in keys:
        match = re.search(r"(?<=[._])\d{1,9}(?=[./])", key)
        numbers = groups.setdefault(key if match is None else key[: match.start()] + "{}" + key[match.end() :], [])
        numbers += [] if match is None else [match[0]]
    return [name.replace("{}", _ranges(numbers)) if numbers else name for name, numbers in groups.items()]


def _ranges(numbers: list[str]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    parts: list[list[int]] = []
    for n in sorted({int(n) for n in numbers}):
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return "{" + ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in parts) + "}"


def infer(table: list[Row], tensors: Mapping) -> dict[str, int]:
    """The size that each letter of the shapes stands for: what most tensors say."""
    votes: dict[str, collections.Counter] = {}
    for row in table:
        words = row.shape.split()
        for key in row.keys:
            shape = tensors[key].shape if key in tensors else ()
            for word, n in zip(words, shape) if len(words) == len(shape) else ():
                if word.isalpha():
                    votes.setdefault(word, collections.Counter())[n] += 1
    return {letter: found.most_common(1)[0][0] for letter, found in votes.items()}


def shape_of(words: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """ "3D D" with the sizes of the letters -> (3 * D, D). KeyError: a letter without a size."""
    parts = [re.fullmatch(r"(\d*)([A-Za-z]?)", word).groups() for word in words.split()]
    return tuple(int(n or 1) * (sizes[letter] if letter else 1) for n, letter in parts)


def _check_shapes(table, tensors, sizes, vit_heads: int, med_heads: int) -> list[str]:
    out = []
    for row in table:
        for key in row.keys:
            if key in tensors and set(re.findall("[A-Za-z]", row.shape)) <= sizes.keys():
                expected, found = shape_of(row.shape, sizes), tuple(tensors[key].shape)
                if 0 in found:
                    out.append(f"misshapen: {key} is {list(found)}, empty")
                elif found != expected:
                    out.append(f"misshapen: {key} is {list(found)}, the other tensors imply {list(expected)}")
            elif key in tensors:
                out.append(
                    f"misshapen: {key} is {list(tensors[key].shape)}, not of the form [{', '.join(row.shape.split())}]"
                )
    for letter, heads, part in (("D", vit_heads, "ViT"), ("W", med_heads, "MED")):
        if letter in sizes and (heads < 1 or sizes[letter] % heads):
            out.append(f"the {part}'s width {sizes[letter]} does not divide into {heads} heads")
    if "P" in sizes and (sizes["P"] - 1) != int((sizes["P"] - 1) ** 0.5) ** 2:
        out.append(f"the position table has {sizes['P']} rows: it must be 1 + a square")
    if {"N", "H", "D"} <= sizes.keys() and sizes["N"] * sizes["H"] != sizes["D"]:
        out.append(f"{sizes['N']} heads of {sizes['H']} do not make the width {sizes['D']}")
    return out


def _check_values(family: str, tensors, table) -> list[str]:
    """Numbers that are no numbers, and tied copies that differ."""
    kinds, unequal = [], []
    broken = []
    for row in table:
        counts = row.path.endswith(COUNTERS)
        for key in (k for k in row.keys if k in tensors):
            dtype = tensors[key].dtype
            if not jnp.issubdtype(dtype, np.integer if counts else np.floating):
                kinds.append(
                    f"misshapen: {key} holds {dtype}, expected {'integers' if counts else 'floating-point numbers'}"
                )
            elif not counts and not _finite(as_float32(tensors[key])):
                broken.append(key)
    for copy, original in copies(family, table):
        if copy in tensors and original in tensors and not np.array_equal(tensors[copy], tensors[original]):
            unequal.append(f"{copy} and {original}")
    return (
        kinds
        + [f"NaN or infinite: {listed(folded(broken))}"] * bool(broken)
        + [f"tied but unequal: {listed(folded(sorted(unequal)))}"] * bool(unequal)
    )


def _finite(x) -> bool:
    return x.size == 0 or bool(np.isfinite(x.min()) and np.isfinite(x.max()))


def as_float32(x) -> np.ndarray:
    """An array as f32, without a copy where it is; integers as they are."""
    x = np.asarray(x)
    return np.asarray(x, np.float32) if jnp.issubdtype(x.dtype, np.floating) else x


def _read(row: Row, tensors, heads: int) -> Iterator[tuple[str, np.ndarray]]:
    """(our path, our array) of one row: a stack of all layers, or just one."""
    stacks: dict[str, np.ndarray] = {}
    for i, key in enumerate(row.keys):
        for part, x in _to_ours(as_float32(tensors[key]), row.layout, heads).items():
            path = row.path.replace("{qkv}", part)
            if row.stacked:
                stacks.setdefault(path, np.empty((len(row.keys), *x.shape), x.dtype))[i] = x
            else:
                yield path, x
    yield from stacks.items()


def _to_ours(x, layout: str, heads: int) -> dict[str, np.ndarray]:
    """What `{qkv}` stands for, or "" -> our array of a torch tensor; layouts: as in rules/blip.py."""
    if layout in ("qkv", "qkv_bias"):
        return {
            name: _laid_out(block, layout.replace("qkv", "heads_in"), heads)
            for name, block in zip("qkv", np.split(x, 3, axis=0))
        }
    return {"": _laid_out(x, layout, heads)}


def _laid_out(x, layout: str, heads: int) -> np.ndarray:
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
    raise KeyError(layout)


def to_torch(family: str, state: Mapping, *, vocab_size: int, consume: bool = False) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: {"params", "momentum"} -> arrays under the original's names.

    The padding rows of the stored vocabulary (from vocab_size on) are dropped; a tied copy is the same array as its
    original. An optional group of which the state has nothing is left out. consume: takes what was written out of
    `state`, so that the two are never in memory together. ValueError lists all parameters that are missing.
    """
    out, problems, depths = {}, [], _depths(state)
    absent = {row[0] for _, pattern in OPTIONAL.get(family, ()) for row in _unless_held(family, pattern, state)}
    for torch_key, path, layout, _ in FAMILIES[family]:
        if torch_key in absent or depths.get(path.split("/merge/")[0], 1) <= FIRST_LAYER.get(path, 0):
            continue
        try:
            written = _write(torch_key, path, layout, state, vocab_size, consume)
            out |= {key: x.astype(np.int64) if path.endswith(COUNTERS) else x for key, x in written}
        except KeyError as e:
            problems.append(f"{path} (no {e})")
    if problems:
        raise ValueError(f"the state lacks parameters of family {family!r}:\n  " + "\n  ".join(problems))
    for copy, original in copies(family, [Row(list(out), "", "", "", False)]):
        out[copy] = out[original]
    return out


def _depths(tree: Mapping, prefix: str = "") -> dict[str, int]:
    """Path of each module that has a stack -> the stack's layers."""
    out = {}
    for name, value in tree.items():
        if name == "blocks":
            leaf = value
            while isinstance(leaf, Mapping):
                leaf = next(iter(leaf.values()), ())
            out[prefix.rstrip("/")] = len(leaf)
        elif isinstance(value, Mapping):
            out |= _depths(value, f"{prefix}{name}/")
    return out


def _unless_held(family: str, pattern: str, state: Mapping) -> list[tuple]:
    """The rows of an optional group if the state holds nothing of it, else none."""
    group = [row for row in FAMILIES[family] if re.fullmatch(pattern, row[0])]

    def held(path):
        try:
            return _get(state, path.replace("{qkv}", "q")) is not None
        except KeyError:
            return False

    return [] if any(held(path) for _, path, *_ in group) else group


def _write(torch_key, path, layout, state, vocab_size, consume):
    """(torch key, torch array) of one row."""
    arrays = [_get(state, path.replace("{qkv}", c), consume) for c in ("qkv" if "{qkv}" in path else " ")]
    if "{i}" in torch_key:
        for i in range(len(arrays[0])):
            yield (
                torch_key.format(i=FIRST_LAYER.get(path, 0) + i),
                _to_torch([a[i] for a in arrays], layout, vocab_size),
            )
    else:
        yield torch_key, _to_torch(arrays, layout, vocab_size)


def _to_torch(arrays, layout, vocab_size):
    if layout in ("qkv", "qkv_bias"):
        return np.concatenate([_to_torch([a], layout.replace("qkv", "heads_in"), vocab_size) for a in arrays])
    return np.asarray(_laid_back(np.asarray(arrays[0]), layout, vocab_size), order="C")


def _laid_back(x: np.ndarray, layout: str, vocab_size: int) -> np.ndarray:
    """The inverse of `_laid_out`."""
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
    raise KeyError(layout)


def _get(tree, path: str, take: bool = False):
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree[parent]
    return tree.pop(name) if take else tree[name]


def _put(tree: dict, path: str, x) -> None:
    *parents, name = path.split("/")
    for p in parents:
        tree = tree.setdefault(p, {})
    tree[name] = x
