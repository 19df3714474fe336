"""Where every array lives: a table of parameters, a table of mesh axes, one `constrain`. Nothing else shards anything.

A parameter's path ends in a row of `PARAMS`, which names its dimensions; `AXES` says which mesh axis a dimension is
split over. Optimiser moments and momentum copies carry the same path endings and so follow the same rows. A leading
`layers` dimension of a scanned stack needs no row of its own. Losses and steps are written on global arrays; XLA
inserts the collectives, but for those of `within_cells`, where it would send more than has to travel.
"""

from __future__ import annotations

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blip_jax.parallel import compiler
from blip_jax.trees import path_name

MESH = ("data", "fsdp", "tensor")
AXES = {  # logical dimension -> mesh axis, axes or None (kept whole)
    # parameters
    "embed": "fsdp",
    "heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "norm": None,
    "patch": None,
    "proj": None,
    "queue": None,
    # activations
    "act_batch": ("data", "fsdp"),
    "act_embed": None,
    "act_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
}

PARAMS = (  # path ending -> logical dimensions, first match wins
    (r"vit/cls$", ("embed",)),
    (r"vit/pos_embed$|query_tokens$", ("patch", "embed")),
    (r"vit/patch_embed/kernel$", ("patch", "patch", "patch", "embed")),
    (r"(patch_embed|attn\w*/out|fc2|(lm_head|cls_head)/dense|merge/blocks)/bias$", ("norm",)),
    (r"attn\w*/[qkv]/kernel$", ("embed", "heads", "head_dim")),
    (r"attn\w*/[qkv]/bias$", ("heads", "head_dim")),
    (r"attn\w*/out/kernel$", ("heads", "head_dim", "embed")),
    (r"fc1/kernel$", ("embed", "mlp")),
    (r"fc1/bias$", ("mlp",)),
    (r"fc2/kernel$", ("mlp", "embed")),
    (r"wi_[01]/kernel$", ("embed", "mlp")),
    (r"wo/kernel$", ("mlp", "embed")),
    (r"rel_bias/embedding$", ("patch", "heads")),
    (r"ln\w*/(scale|bias)$", ("norm",)),
    (r"embed/word/embedding$", ("vocab", "embed")),
    (r"embed/pos/embedding$", ("patch", "embed")),
    (r"project_in/kernel$", ("proj", "embed")),
    (r"project_out/kernel$", ("embed", "proj")),
    (r"(lm_head|cls_head)/dense/kernel$", ("embed", "norm")),
    (r"lm_head/kernel$", ("embed", "vocab")),
    (r"lm_head/bias$", ("vocab",)),
    (r"merge/blocks/kernel$", ("embed", "norm")),
    (r"(vision_proj|text_proj|itm_head|cls_head/out|llm_proj)/kernel$", ("embed", "proj")),
    (r"(vision_proj|text_proj|itm_head|cls_head/out|llm_proj)/bias$", ("proj",)),
    (r"queue/(img|txt)$", ("queue", "proj")),
    (r"queue/image_id$", ("queue",)),
)
STACKED = re.compile(r"(^|/)blocks/(?!\d)")  # leaves with a leading `layers` dimension; blocks/3/ is a layer cut out


def make_mesh(cfg, devices=None) -> Mesh:
    """Mesh ('data', 'fsdp', 'tensor') from `cfg.{data,fsdp,tensor}`; one of them may be -1: the devices that are left.

    ValueError: the axes do not multiply to the number of devices, or the slices do not divide the data axis (see
    `mesh_of`).
    """
    devices = jax.devices() if devices is None else devices
    shape = [cfg.data, cfg.fsdp, cfg.tensor]
    if shape.count(-1) > 1 or any(s == 0 or s < -1 for s in shape):
        raise ValueError(f"mesh {tuple(shape)}: axes are positive, at most one is -1")
    known = math.prod(s for s in shape if s > 0)
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh (data, fsdp, tensor) = {(cfg.data, cfg.fsdp, cfg.tensor)} does not multiply to the {len(devices)} "
            "devices here: change cfg.mesh, or set one axis to -1"
        )
    return mesh_of(tuple(shape), devices)


def mesh_of(shape: tuple, devices) -> Mesh:
    """Mesh of a shape (data, fsdp, tensor), TPUs laid out along their wires.

    Of several slices each has its own part of the data axis.

    ValueError: the slices do not divide the data axis.
    """
    devices = list(devices)
    slices = compiler.slices(devices)
    inside = inside_slice(shape, slices)
    if devices[0].platform != "tpu":
        array = np.asarray(devices).reshape(shape)
    elif slices == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        array = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(array, MESH, axis_types=(AxisType.Auto,) * 3)


def inside_slice(shape: tuple, slices: int) -> tuple:
    """The part (data, fsdp, tensor) of a mesh that lies in each of so many slices.

    ValueError: they do not divide the data axis.
    """
    data, fsdp, tensor = shape
    if data % slices:
        near = [n for n in (data // slices * slices, data // slices * slices + slices) if n > 0]
        raise ValueError(
            f"mesh.data is {data}: it must be a multiple of the {slices} slices, since only the data axis crosses from "
            f"one slice to another, as {' or '.join(map(str, near))}"
        )
    return data // slices, fsdp, tensor


def logical_dims(name: str, ndim: int) -> tuple[str, ...]:
    """Names of the dimensions of the parameter called `name`; () for scalars.

    ValueError: no row of PARAMS matches.
    """
    if ndim == 0:
        return ()
    for pattern, dims in PARAMS:
        if re.search(pattern, name):
            dims = ("layers", *dims) if STACKED.search(name) else dims
            if len(dims) != ndim:
                raise ValueError(
                    f"{name} has {ndim} dimensions, its row {pattern!r} in blip_jax/parallel/sharding.py names {dims}"
                )
            return dims
    raise ValueError(
        f"no row of PARAMS in blip_jax/parallel/sharding.py matches {name}: add one that names its {ndim} dimensions"
    )


def partition_spec(dims) -> P:
    """PartitionSpec of logical dimensions (None entries stay whole). ValueError for a name that AXES does not know."""
    unknown = [d for d in dims if d is not None and d not in AXES]
    if unknown:
        raise ValueError(
            f"logical dimensions {unknown} are not in AXES of blip_jax/parallel/sharding.py, which has {sorted(AXES)}"
        )
    return P(*(None if d is None else AXES[d] for d in dims))


def axis_size(mesh, axes) -> int:
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))


def shardings_for(tree, mesh: Mesh):
    """NamedSharding of every array (or ShapeDtypeStruct) of a state or parameter tree.

    Raises one ValueError that lists each parameter without a row and each dimension that its mesh axis does not divide.
    """
    problems = []

    def place(path, x):
        name = path_name(path)
        try:
            dims = logical_dims(name, x.ndim)
            spec = partition_spec(dims)
        except ValueError as e:
            problems.append(str(e))
            return NamedSharding(mesh, P())
        for size, dim, axes in zip(x.shape, dims, spec):
            if size % axis_size(mesh, axes):
                problems.append(
                    f"{name}: dimension {dim} = {size} does not divide by mesh axis {axes} = {axis_size(mesh, axes)}; "
                    f"choose a smaller cfg.mesh.{axes} or another size"
                )
        return NamedSharding(mesh, spec)

    out = jax.tree_util.tree_map_with_path(place, tree)
    if problems:
        raise ValueError("cannot shard the state:\n  " + "\n  ".join(problems))
    return out


def batch_sharding(mesh: Mesh, accumulate: int = 1) -> NamedSharding:
    """Sharding of batch arrays: [B, ...], or [A, B/A, ...] for A > 1 micro-batches."""
    rows = AXES["act_batch"]
    return NamedSharding(mesh, P(None, rows) if accumulate > 1 else P(rows))


def constrain(x, *dims):
    """Pins an activation to the mesh of `jax.set_mesh`, by logical dimensions (None: whole).

    Without a mesh it does nothing, nor inside `jax.shard_map`, where an array is one device's part already.
    """
    spec, mesh = partition_spec(dims), jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def splits(dim: str) -> bool:
    """Whether the mesh of `jax.set_mesh` splits a logical dimension; not inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and not mesh.manual_axes and axis_size(mesh, AXES[dim]) > 1


def report(tree, mesh: Mesh) -> str:
    """Table of the largest arrays, and the share of bytes kept whole.

    A row has an array's shape, dimensions, spec and bytes per device.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shardings = jax.tree.leaves(shardings_for(tree, mesh))
    rows, total, per_device, whole = [], 0, 0, 0
    for (path, x), sharding in zip(leaves, shardings):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            continue
        size = x.size * x.dtype.itemsize
        local = math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
        total, per_device = total + size, per_device + local
        whole += size if local == size else 0
        rows.append(
            (size, f"{path_name(path):58} {str(tuple(x.shape)):22} {str(sharding.spec):42} {local / 2**20:9.2f} MiB")
        )
    rows.sort(key=lambda r: -r[0])
    head = f"{'array':58} {'shape':22} {'spec':42} per device"
    shown = [text for _, text in rows[:40]]
    more = [f"... and {len(rows) - 40} smaller arrays"] if len(rows) > 40 else []
    foot = (
        f"{len(rows)} arrays, {total / 2**30:.3f} GiB in all, {per_device / 2**30:.3f} GiB per device on mesh "
        f"{dict(mesh.shape)}; {100 * whole / max(total, 1):.2f} % of the bytes are kept whole on every device"
    )
    return "\n".join([head, *shown, *more, foot])


def rows(mesh: jax.sharding.Mesh, count: int, process: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` examples, split over `mesh` as a batch is, the devices of a process (by default this one) hold.

    Returns positions i64, rising, and bool for each, whether no process with a lower number holds it too. On a slice
    the mesh follows the wires and not the numbers of the hosts; and hosts that a tensor axis spans hold the same
    examples.
    """
    process = jax.process_index() if process is None else process
    held, first = np.zeros(count, bool), np.full(count, process)
    for device, index in batch_sharding(mesh).devices_indices_map((count,)).items():
        first[index[0]] = np.minimum(first[index[0]], process_of(device))
        held[index[0]] |= process_of(device) == process
    return np.flatnonzero(held), first[held] == process


def process_of(device: jax.Device) -> int:
    """Number of the process that drives a device."""
    return device.process_index
