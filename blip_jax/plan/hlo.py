"""What a compiled program moves: its collectives and its memory traffic, read from the compiler's text (optimised HLO).

The text has one block of instructions per computation. A scanned stack of layers is a `while` whose body stands there
once and runs as often as its condition's constant says, so everything in it is counted so many times. The TPU's and the
GPU's compiler write the same language; what one of them alone writes is said where it is read.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

# dtype -> bytes; the others say their bits in the name
WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1, "c64": 8}
KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
FREE = (
    "bitcast",
    "get-tuple-element",
    "tuple",
    "parameter",
    "constant",
    "while",
    "call",
    "conditional",
    "after-all",
    "partition-id",
    "iota",
    "optimization-barrier",
    "copy-done",
    "all-reduce-done",
    "all-gather-done",
    "async-done",
    "async-update",
    "collective-permute-done",
    "call-start",
)
_NAME = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")


class Op(NamedTuple):
    """One instruction, as written: `inside` stands in its brackets, `rest` behind them."""

    name: str
    kind: str
    type: str
    inside: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inside)


class Collective(NamedTuple):
    """One collective operation of a program, of every device."""

    kind: str  # of KINDS, without -start
    bytes: int  # of its result on one device; of a reduce-scatter of its operand: the whole array that takes part
    count: int  # times a step
    # devices of the first group, as positions in the mesh's flat order (of one slice's part of it);
    # (): one in each slice
    group: tuple
    op_name: str  # where in our code it comes from
    shapes: str  # its arrays, the largest first


def travels(kind: str, size: float, n: int) -> float:
    """Bytes that each of n devices receives in a collective over an array of `size` bytes."""
    if n < 2:
        return 0.0
    if kind in ("collective-permute", "collective-broadcast"):
        return float(size)
    return (2 if kind == "all-reduce" else 1) * size * (n - 1) / n


def computations(text: str) -> tuple[dict[str, list[Op]], str]:
    """Instructions by computation, and the name of the one that the program starts with. ValueError: there is none."""
    found, entry, ops = {}, "", None
    for line in text.splitlines():
        if line[:1] not in (" ", "}", ""):
            if match := _HEAD.match(line):
                ops = found.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
        elif ops is not None and (match := _NAME.match(line)):
            ops.append(_op(match[1], line[match.end() :]))
    if not entry:
        raise ValueError("this is no HLO text: it has no ENTRY computation; give what `compiled.as_text()` returns")
    return found, entry


def _op(name: str, text: str) -> Op:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    kind, _, rest = text[end:].strip().partition("(")
    close = _closing(rest, 0, 1)
    return Op(name, kind, text[:end], rest[:close], rest[close + 1 :])


def _closing(text: str, start: int, depth: int = 0) -> int:
    """Position of the bracket that closes the first one from `start` on; `depth` are open already."""
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    return len(text)


def times(found: dict[str, list[Op]], entry: str, trips: int = 1) -> tuple[dict[str, int], set[str]]:
    """How often each computation runs in a step, and which of them are schedules of their own.

    The instructions of the others are parts of a fusion. trips: of a `while` that the data end, a token loop; any other
    says its own.
    """
    runs, scheduled = {}, set()

    def visit(name: str, count: int, own: bool) -> None:
        runs[name] = runs.get(name, 0) + count
        if own:
            scheduled.add(name)
        ops = found.get(name, ())
        for op in ops:
            loops = _trips(op, ops, found, trips) if op.kind == "while" else 1
            # what a loop or a call runs is a schedule as its caller's is; what a fusion or a sum calls is a part of it,
            # and a loop's condition compares two numbers and moves nothing
            passes_on = own and op.kind in ("while", "call", "call-start", "conditional")
            for match in _CALLED.finditer(op.rest):
                of_schedule = passes_on and not match[0].startswith("condition")
                for called in re.findall(r"[\w.\-]+", match[1]):
                    visit(called, count * loops, of_schedule)

    visit(entry, 1, True)
    return runs, scheduled


def _trips(loop: Op, around: list[Op], found: dict[str, list[Op]], otherwise: int) -> int:
    """How often a counting loop runs: from where it starts to the constant of its condition.

    Where the condition is more than this comparison, as in a GPU's program, which makes a fusion of it: what the
    compiler counted, or else `otherwise`. around: the instructions of the computation in which
    the loop stands.
    """
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    ops = found.get(condition[1] if condition else "", ())
    bounds = [int(o.inside) for o in ops if o.kind == "constant" and o.type.startswith(("s32[]", "u32[]"))]
    plain = all(o.kind in ("constant", "parameter", "get-tuple-element", "compare", "copy", "bitcast") for o in ops)
    if not plain or len(bounds) != 1:
        counted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        return int(counted[1]) if counted else otherwise

    # the counter is the one element of the loop's state that the condition looks at; it starts at 1 where the compiler
    # took the first turn out of the loop
    counters = [
        int(index[1]) for o in ops if o.kind == "get-tuple-element" and (index := re.search(r"index=(\d+)", o.rest))
    ]
    if len(counters) != 1:
        return bounds[0]
    return bounds[0] - _constant(loop.operands[0], counters[0], {o.name: o for o in around})


def _constant(name: str, index: int, known: dict[str, Op]) -> int:
    """The constant that a tuple holds at an index; 0 where it is not written as one."""
    made = known.get(name)
    if not made or made.kind != "tuple" or index >= len(made.operands):
        return 0
    at = known.get(made.operands[index])
    while at and at.kind in ("copy", "bitcast"):
        at = known.get(at.operands[0])
    return int(at.inside) if at and at.kind == "constant" and at.inside.isdigit() else 0


def size(kind: str, only_hbm: bool = False) -> int:
    """Bytes of a type as written, "f32[8,4]{1,0}" or a tuple of such; `only_hbm`: without arrays in faster memory."""
    total = 0.0
    for dtype, dims, layout in _ARRAY.findall(kind):
        if only_hbm and re.search(r"S\([1-9]", layout):
            continue
        bits = re.search(r"(\d+)$", dtype)
        width = WIDTHS.get(dtype, int(bits[1]) / 8 if bits else 0)
        total += width * math.prod(int(d) for d in dims.split(",") if d)
    return int(total)


def collectives(text: str, devices: int, trips: int = 1) -> list[Collective]:
    """Every collective of a program for so many devices, the largest first; trips as in `times`.

    ValueError: unreadable groups.
    """
    found, entry = computations(text)
    runs, scheduled = times(found, entry, trips)
    fusions = {
        called[1]: op.rest
        for ops in found.values()
        for op in ops
        if (called := re.search(r"calls=%?([\w.\-]+)", op.rest))
    }

    out, seen = {}, set()
    for name, count in runs.items():
        # a sum of which every device keeps a part: the TPU's compiler writes it as a fusion of that name, around an
        # all-reduce that does not say where it comes from
        scatters = name.startswith("all-reduce-scatter")
        types = {op.name: op.type for op in found.get(name, ())}
        for op in found.get(name, ()):
            if op.kind == "recv" and "xla_megascale" in op.rest:
                out[name, op.name] = _between(op, count)
            kind = op.kind.removesuffix("-start")
            if kind not in KINDS:
                continue

            where = re.search(r'op_name="([^"]*)"', fusions.get(name, "") if scatters else op.rest)
            where = where[1] if where else ""
            channel = re.search(r"channel_id=(\d+)", op.rest)
            step = (channel and channel[1], op.type.split("{")[0], where)
            # one asynchronous collective is carried on by several fusions
            if name not in scheduled and not scatters and step in seen:
                continue
            seen.add(step)

            kind = "reduce-scatter" if scatters else kind
            arrays = [types.get(x, "") for x in op.operands]
            operands, result = sum(map(size, arrays)), size(op.type)
            if op.kind.endswith("-start"):
                result -= operands  # its type is a tuple of both
            summed = kind in ("reduce-scatter", "all-reduce")
            moved = (operands if summed else 0) or result
            out[name, op.name] = Collective(
                kind, moved, count, group(op.rest, devices), where, _shown(arrays) or op.type
            )
    return sorted(out.values(), key=lambda c: -c.bytes * c.count)


def _shown(arrays: list[str]) -> str:
    """The largest of some arrays and how many more there are; "" where there is none."""
    found = [f"{dtype}[{dims}]" for dtype, dims, _ in _ARRAY.findall(" ".join(arrays))]
    if not found:
        return ""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return max(found, key=size) + more


def _between(op: Op, count: int) -> Collective:
    """What a device gets from those of the other slices: a transfer by the hosts.

    It names the collective that it is a part of.
    """
    dtype, dims, _ = _ARRAY.search(op.type).groups()
    array = f"{dtype}[{dims}]"
    how = re.search(r'transfer_type="(\w+)"', op.rest)
    kind = how[1].lower().replace("_", "-") if how else "one-to-one"
    if kind == "one-to-one":
        kind = "collective-permute"
    return Collective(kind, size(array), count, group=(), op_name="", shapes=array)


def group(text: str, devices: int) -> tuple:
    """The first group of devices (one that has several members, if any) in the attributes of a collective."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text):
        moves = [sorted({int(a), int(b)}) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        return tuple(max(moves, key=len))  # the first that is not of a device with itself
    written = re.search(
        r"replica_groups=(\{\}|\{\{[\d,]+\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
        r"|mesh\[[^\]]*\](?:, device_ids=\([^{]*\))?\s*\{[^}]*\})",
        text,
    )
    if not written:
        raise ValueError(f"a collective's groups are written in a way that is not known here: {text[:200]!r}")
    words = written[1]
    if words == "{}":
        return tuple(range(devices))
    if words.startswith("{{"):
        return tuple(map(int, words[2:-1].split(",")))
    if words.startswith("["):
        return tuple(_iota(words).tolist())
    return tuple(_of_mesh(words))


def _iota(words: str) -> np.ndarray:
    """The first row of "[4,2]<=[2,4]T(1,0)": numbers 0, 1, ... in the second shape, transposed, as the first shape."""
    groups, dims, order = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", words).groups()
    return _transposed(dims, order).reshape(tuple(map(int, groups.split(","))))[0]


def _of_mesh(words: str) -> list[int]:
    """The first group of "mesh['a'=4,'b'=8] {'b'}", or of "{'b':(2)4}".

    The latter is the part of size 4 of b that follows one of size 2. The places of the mesh are devices 0, 1, ..., or
    "device_ids=([8,4]T(1,0))": numbers in that shape, transposed; or a list of them.
    """
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", words)}
    axes = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", words[words.rindex("{") :])
    order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", words)
    listed = re.search(r"device_ids=\(([\d,\s]+)\)", words)

    # how far apart in the flat mesh two neighbours along an axis are
    strides, after = {}, 1
    for name in reversed(sizes):
        strides[name] = after
        after *= sizes[name]

    # the group's places: the first one, and from each so far all those along one more axis
    places = np.zeros(1, int)
    for name, before, part in axes:
        whole = sizes[name]
        n = int(part) if part else whole
        step = strides[name] * (whole // (int(before) * n) if part else 1)
        places = (places[:, None] + step * np.arange(n)).reshape(-1)

    if order:
        return _transposed(order[1], order[2]).reshape(-1)[places].tolist()
    if listed:
        ids = listed[1].split(",")
        return [int(ids[i]) for i in places]
    return places.tolist()


def _transposed(dims: str, order: str | None) -> np.ndarray:
    """0, 1, ... in the shape `dims`, "4,8", with its dimensions in another order, "1,0"."""
    shape = tuple(map(int, dims.split(",")))
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(tuple(map(int, order.split(",")))) if order else ids


def traffic(text: str, trips: int = 1) -> float:
    """Bytes of HBM that a step reads and writes by the compiler's schedule.

    Operands and results of every instruction that runs. An operand of which a fusion reads a slice counts as that
    slice, a result written into a slice of an operand as the slice. Arrays that the compiler keeps in faster memory do
    not count.
    """
    found, entry = computations(text)
    runs, scheduled = times(found, entry, trips)
    total = 0
    for name in scheduled:
        known = {op.name: op for op in found.get(name, ())}
        total += runs[name] * sum(_bytes(op, known, found) for op in known.values())
    return float(total)


def _bytes(op: Op, known: dict[str, Op], found: dict[str, list[Op]]) -> int:
    """Bytes of HBM that one instruction reads and writes; known: its computation's by name."""
    if op.kind in FREE or op.kind.endswith("-done") or _room(op):
        return 0

    def hbm(o: Op) -> int:
        return size(o.type, only_hbm=True)

    operands = [known[x] for x in op.operands if x in known]
    if op.kind == "dynamic-slice":  # the slice is read and written; of the array no more is touched
        return 2 * hbm(op)
    if op.kind == "dynamic-update-slice":  # in place: the new slice is read and written
        return 2 * hbm(operands[1])

    called = re.search(r"calls=%?([\w.\-]+)", op.rest) if op.kind == "fusion" else None
    if not called:
        written = 0 if op.kind.endswith("-start") else hbm(op) - _workspace(op)
        return written + sum(map(hbm, operands))
    inner = found.get(called[1], [])
    read = sum(min(hbm(o), part) for o, part in zip(operands, _parts(inner, len(operands), found)))
    return _written(op, inner) + read


def _parts(inner: list[Op], n: int, found: dict[str, list[Op]]) -> list[float]:
    """Of each operand of a fusion, the bytes of the slices it reads of it; infinite where it reads all."""
    users: dict = {}
    for op in inner:
        for x in op.operands:
            users.setdefault(x, []).append(op)
    parameters = {int(op.inside): op.name for op in inner if op.kind == "parameter"}
    return [_sliced(parameters.get(i, ""), users, found) for i in range(n)]


def _sliced(name: str, users: dict, found: dict[str, list[Op]]) -> float:
    """Bytes that the instructions `users` of an array read of it, through views of it and fusions inside the fusion."""
    total = 0.0
    for op in users.get(name, ()):
        called = re.search(r"calls=%?([\w.\-]+)", op.rest) if op.kind == "fusion" else None
        if op.kind == "dynamic-slice" and op.operands[0] == name:
            total += size(op.type)
        elif op.kind in ("bitcast", "reshape"):
            total += _sliced(op.name, users, found)
        elif called:
            parts = _parts(found.get(called[1], []), len(op.operands), found)
            total += sum(part for x, part in zip(op.operands, parts) if x == name)
        elif op.kind != "dynamic-update-slice" or op.operands[0] != name:
            return math.inf
    return total


def _written(op: Op, inner: list[Op]) -> int:
    """Bytes that a fusion writes: of results that are a slice of an operand, overwritten, the slice."""
    types = {o.name: o.type for o in inner}
    total = size(op.type, only_hbm=True) - sum(map(_workspace, inner))
    for o in inner:
        if o.kind == "dynamic-update-slice" and len(o.operands) > 1:
            slice_ = size(types.get(o.operands[1], ""))
            total -= max(size(o.type) - slice_, 0)
    return max(total, 0)


def _room(op: Op) -> bool:
    """Whether it only makes room for what a loop will write, as for each layer's results; the TPU's compiler calls
    that a custom call."""
    return op.kind == "custom-call" and 'custom_call_target="AllocateBuffer"' in op.rest


def _workspace(op: Op) -> int:
    """Bytes among a tuple of results that are room for a library's kernel, as cuBLAS and cuDNN get on a GPU: bytes in
    one dimension, of which nobody says how many are touched."""
    if op.kind != "custom-call" or not op.type.startswith("("):
        return 0
    return sum(size(array) for array in re.findall(r"\b[su]8\[\d+\]", op.type))
