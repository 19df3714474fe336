"""Runs the key tables of `rules` in both directions on arrays; collects every problem and raises once."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from blip_jax.convert.layouts import HEADED, to_ours, to_theirs
from blip_jax.convert.rules.families import FAMILIES, IGNORED, OPTIONAL, STACKS, TIED, TOWERS
from blip_jax.trees import Lazy

# endings of the paths that hold integers, 64 bits wide in the originals' files
COUNTERS = ("queue/ptr", "queue/image_id")
CALLED = {"vit": "ViT", "med": "MED", "qformer": "Q-Former", "llm": "language model"}
SHOWN = 20  # names or lines that a message has
MAX_TENSORS = 20_000  # of a file; the largest of the released models has 1560
MAX_LAYERS = 1000  # of a tower: a number in a name beyond it is none of a layer


class Stack(NamedTuple):
    """Which layers of the original a stack of ours holds: first, first + step, ... of those counted as `counted`."""

    counted: str
    first: int
    step: int


class Row(NamedTuple):
    """A row of a family's table, for a number of layers: all its torch keys, and where they go."""

    keys: list[str]
    path: str
    layout: str
    shape: str
    stacked: bool  # whether the keys are slices of one parameter


def from_torch(family: str, tensors: Mapping[str, np.ndarray], heads: Mapping[str, int], *, lazy: bool = False) -> dict:
    """State dict of a PyTorch model -> nested dict of our arrays, {"params": ..., "momentum": ...}.

    Arrays are f32, but for counters, which stay as they are.

    Args:
      family: a key of `rules.families.FAMILIES`.
      tensors: arrays under the original's names, or what `numpy.asarray` reads and has shape and dtype. Tied copies may
        be present and must then be equal; an optional group (`OPTIONAL`) may be absent. What needs no rearranging is
        not copied.
      heads: number of attention heads of each part that has some, {"vit": 12, "med": 12}: it is not stored in the
        tensors.
      lazy: gives `Lazy` arrays, so that no more than one of them need ever be in memory.
    Raises: ValueError listing all missing, unknown, unequal and misshapen keys and all values that are not finite
      together.
    """
    table = rows(family, tensors)
    problems = check_keys(family, tensors, table)
    sizes = infer(table, tensors)
    problems += _check_shapes(table, tensors, sizes, heads)
    problems += _check_values(family, tensors, table)
    if problems:
        raise ValueError("\n  ".join([f"this is not a complete {family!r} state dict:", *shown(problems)]))
    out: dict = {}
    for row in table:
        for path, x in (_later if lazy else _read)(row, tensors, heads.get(part(row.path), 0)):
            _put(out, path, x)
    return out


def rows(family: str, tensors: Iterable[str]) -> list[Row]:
    """The table of a family, with a key for every layer that any of `tensors` (their names) belongs to.

    Absent groups are left out. Each stack has as many layers as any of its tensors shows, so that a layer that some
    module lacks counts as missing.
    """
    absent = {key for _, keys in absent_groups(family, tensors) for key in keys}
    counts = layer_counts(family, tensors)
    out = []
    for key, path, layout, shape in FAMILIES[family]:
        if key in absent:
            continue
        keys, stacked = [key], "{i}" in key
        if stacked:
            counted, first, step = layers_of(path)
            keys = [key.format(i=i) for i in range(first, counts[counted], step)]
        out.append(Row(keys, path, layout, shape, stacked))
    return out


def part(path: str) -> str:
    """The part ("vit", "med", "qformer", "llm") whose number of heads counts for a parameter; "" if none does."""
    return next((TOWERS[name] for name in path.split("/") if name in TOWERS), "")


def stack(path: str) -> str:
    """The stack that a parameter of one belongs to: params/qformer/cross/blocks/... -> "qformer/cross"."""
    return path.split("/blocks/")[0].split("params/")[-1]


def layers_of(path: str) -> Stack:
    return Stack(*STACKS.get(stack(path), (stack(path), 0, 1)))


def layer_counts(family: str, tensors: Iterable[str]) -> collections.Counter:
    """stack -> its layers in the original, one more than the highest number in a torch key; 0 where there is none.

    ValueError: a number from MAX_LAYERS on.
    """
    counts, stacks = collections.Counter(), {}
    for key, path, *_ in FAMILIES[family]:
        if "{i}" in key:
            stacks[key.split("{i}")[0]] = layers_of(path).counted
    pattern = re.compile("(" + "|".join(map(re.escape, stacks)) + r")(\d+)[./]")
    for name in tensors:
        if stacks and (match := pattern.match(name)):
            which, number = stacks[match[1]], match[2].lstrip("0") or "0"
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


def _check_shapes(table, tensors, sizes, heads: Mapping[str, int]) -> list[str]:
    out, divided = [], {}
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
        if (axis := HEADED.get(row.layout)) is not None:
            word = row.shape.split()[axis].lstrip("0123456789")  # the rows or columns that heads share, of one block
            divided[word] = part(row.path)
    for letter, name in divided.items():
        n = heads.get(name, 0)
        if letter in sizes and (n < 1 or sizes[letter] % n):
            out.append(f"the {CALLED.get(name, name)}'s width {sizes[letter]} does not divide into {n} heads")
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
        for name, x in to_ours(as_float32(tensors[key]), row.layout, heads).items():
            path = row.path.replace("{qkv}", name)
            if row.stacked:
                stacks.setdefault(path, np.empty((len(row.keys), *x.shape), x.dtype))[i] = x
            else:
                yield path, x
    yield from stacks.items()


def _later(row: Row, tensors, heads: int) -> Iterator[tuple[str, Lazy]]:
    """As `_read`, of arrays that are still to be read."""
    if not row.keys:
        return
    shown = to_ours(np.broadcast_to(np.uint8(0), tensors[row.keys[0]].shape), row.layout, heads)  # shapes alone
    for name, like in shown.items():

        def read(i=0, name=name):
            return to_ours(as_float32(tensors[row.keys[i]]), row.layout, heads)[name]

        shape = (len(row.keys), *like.shape) if row.stacked else like.shape
        yield row.path.replace("{qkv}", name), Lazy(shape, np.float32, read, read if row.stacked else None)


def to_torch(
    family: str,
    state: Mapping,
    *,
    vocab_size: int | Mapping[str, int],
    consume: bool = False,
    keep: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: {"params", "momentum"} -> arrays under the original's names.

    A tied copy is the same array as its original. keep: what each array is kept as, such as one in a file
    (`torch_io.spool`). The other arguments and errors are those of `written`.
    """
    named = written(family, state, vocab_size=vocab_size, consume=consume)
    out = {name: keep(x) for name, x in named}
    for copy, original in copies(family, [Row(list(out), "", "", "", False)]):
        out[copy] = out[original]
    return out


def written(
    family: str, state: Mapping, *, vocab_size: int | Mapping[str, int], consume: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """(the original's name, its array) of each parameter of {"params", "momentum"}, one after the other, no copies.

    The padding rows of the stored vocabulary are dropped: vocab_size is its number of entries, or that of each part,
    {"qformer": 30523, "llm": 50272}. An optional group of which the state has nothing is left out. consume: takes what
    was written out of `state`, so that the two are never in memory together.
    ValueError, before anything is given: all parameters that are missing.
    """
    absent = {row[0] for _, pattern in OPTIONAL.get(family, ()) for row in _unless_held(family, pattern, state)}
    table = [row for row in FAMILIES[family] if row[0] not in absent and not _beyond(row[1], state)]
    problems = []
    for _, path, *_ in table:
        try:
            for name in _paths(path):
                _get(state, name)
        except KeyError as e:
            problems.append(f"{path} (no {e})")
    if problems:
        raise ValueError(f"the state lacks parameters of family {family!r}:\n  " + "\n  ".join(problems))
    for torch_key, path, layout, _ in table:
        arrays = [np.asarray(_get(state, name, consume)) for name in _paths(path)]
        size = vocab_size.get(part(path), 0) if isinstance(vocab_size, Mapping) else vocab_size
        if "{i}" in torch_key:
            _, first, step = layers_of(path)
            for i in range(len(arrays[0])):
                yield torch_key.format(i=first + step * i), to_theirs([a[i] for a in arrays], layout, size)
        else:
            x = to_theirs(arrays, layout, size)
            yield torch_key, x.astype(np.int64) if path.endswith(COUNTERS) else x


def _paths(path: str) -> list[str]:
    """What `{qkv}` in a path stands for."""
    return [path.replace("{qkv}", c) for c in ("qkv" if "{qkv}" in path else " ")]


def _beyond(path: str, state: Mapping) -> bool:
    """Whether a parameter is of a stack that begins after the last layer of the one it is counted with."""
    own = layers_of(path) if "/blocks/" in path else Stack("", 0, 1)
    if not own.first:
        return False
    try:
        leaf = _get(state, path.split("params/")[0] + f"params/{own.counted}/blocks")
    except KeyError:
        return False
    while isinstance(leaf, Mapping):
        leaf = next(iter(leaf.values()), ())
    return len(leaf) <= own.first


def _unless_held(family: str, pattern: str, state: Mapping) -> list[tuple]:
    """The rows of an optional group if the state holds nothing that only it has, else none."""
    group = [row for row in FAMILIES[family] if re.fullmatch(pattern, row[0])]
    own, others = (
        {name for row in FAMILIES[family] if (row in group) is inside for name in _paths(row[1])}
        for inside in (True, False)
    )

    def held(path):
        try:
            return _get(state, path) is not None
        except KeyError:
            return False

    return [] if any(held(path) for path in own - others) else group


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
