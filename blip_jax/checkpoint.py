"""Checkpoints of a run: train state, data position and config, one folder per step, written by orbax in the background.

A folder appears under its final name only when it is complete (orbax writes beside it and renames), so a process killed
at any moment leaves the previous checkpoint usable; `open_dir` removes what such a process left behind. The format
knows nothing of the mesh: a state saved on one restores onto any other.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging

SUBDIR = "checkpoints"
ITEMS = ("state", "data", "config")
SLICE = 2**14  # bytes from which a part of an array is written by a device of its own, of those that have copies
WRITERS = 64  # devices that share the writing of one array, at most
# in the tree of a state that orbax keeps beside it: text layers that are no stack, frozen parameters
OLD = re.compile(r"'med(_dec)?', 'layer_\d\d'|'frozen', '")


def vocabulary(workdir, like="") -> pathlib.Path | None:
    """Where `workdir` keeps the vocabulary of its checkpoints: vocab.txt or vocab.json, whichever there is, else None.

    like: a vocabulary file; then where a copy of it belongs, whether there is one or not.
    """
    found = [pathlib.Path(workdir) / f"vocab{suffix}" for suffix in (".txt", ".json")]
    if like:
        return found[pathlib.Path(like).suffix == ".json"]
    return next((path for path in found if path.is_file()), None)


def open_dir(workdir, keep: int) -> ocp.CheckpointManager:
    """The checkpoints of `workdir`, created if missing; the `keep` newest stay. Close it (`with`) to finish saves."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
    arrays = ocp.type_handlers.ArrayHandler(
        array_metadata_store=key_store(),
        min_slice_bytes_for_replica_parallel=SLICE,
        max_replicas_for_replica_parallel=WRITERS,
    )
    kinds = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=kinds)
    handlers = {"state": state, "data": ocp.JsonCheckpointHandler(), "config": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(pathlib.Path(workdir).absolute() / SUBDIR, options=options, item_handlers=handlers)


def key_store():
    """What orbax keeps beside the arrays of a checkpoint, where it writes the kind of random keys.

    Orbax makes one by default, but exports no name of it for handlers that others build; this is the only place that
    reaches for it. What is lost without it, the kind of a key, tests/train/test_checkpoint.py compares.
    """
    from orbax.checkpoint._src.metadata.array_metadata_store import Store

    return Store()


def folders(workdir) -> dict[int, pathlib.Path]:
    """The numbered folders of `workdir`, by number, newest first; whether they are complete or not."""
    found = (pathlib.Path(workdir).absolute() / SUBDIR).glob("*")
    return dict(sorted(((int(p.name), p) for p in found if p.name.isdigit() and p.is_dir()), reverse=True))


def newest_complete(workdir) -> int | None:
    """Number of the newest checkpoint of which nothing is missing, or None."""
    return next((step for step, folder in folders(workdir).items() if not missing(folder)), None)


def check_folders(workdir) -> tuple[int | None, list[str]]:
    """Number of the newest checkpoint of `workdir`, or None, and what is to be said of the others.

    ValueError: something of the newest one is missing; it names what, and the newest complete one.
    """
    found = folders(workdir)
    lost = {step: missing(folder) for step, folder in found.items()}
    newest = max(found, default=None)
    if newest is not None and lost[newest]:
        raise ValueError(_incomplete(found[newest], lost[newest], newest_complete(workdir)))
    if newest is not None:
        _refuse_old(found[newest])
    notes = [
        f"warning: {found[step]} is incomplete and of no use: {_named(names)} missing"
        for step, names in lost.items()
        if names
    ]
    torn = sorted(p.name for p in (pathlib.Path(workdir).absolute() / SUBDIR).glob("*.orbax-checkpoint-tmp*"))
    if torn:
        notes.append(f"an interrupted save left {', '.join(torn)}; removed, as it counts for nothing")
    return newest, notes


def missing(folder: pathlib.Path) -> list[str]:
    """Names of what a finished checkpoint folder lacks: an item, a file of the state, or the end of one."""
    lost = [f"{name}/" for name in ITEMS if not (folder / name).is_dir()]
    lost += [
        f"{name}/metadata"
        for name in ITEMS[1:]
        if (folder / name).is_dir() and not (folder / name / "metadata").is_file()
    ]
    state = folder / "state"
    if not state.is_dir():
        return lost
    try:
        return lost + [f"state/{name}" for name in _lost_files(state)]
    except (OSError, ValueError) as e:  # what should name the files cannot be read
        return [*lost, f"state/ (unreadable: {str(e).splitlines()[0][:200]})"]


def _lost_files(state: pathlib.Path) -> Iterator[str]:
    if not (state / "_METADATA").is_file():
        yield "_METADATA"
        return
    if json.loads((state / "_METADATA").read_text(encoding="utf-8")).get("use_ocdbt", True):
        yield from _lost_in_database(state)
        return
    for array in state.rglob(".zarray"):  # one folder for each array, as `write` makes them
        layout = json.loads(array.read_text(encoding="utf-8"))
        want = math.prod(-(-n // chunk) for n, chunk in zip(layout["shape"], layout["chunks"]))
        if sum(1 for p in array.parent.iterdir() if not p.name.startswith(".")) < want:
            yield f"{array.parent.relative_to(state)}/*"


def _lost_in_database(state: pathlib.Path) -> Iterator[str]:
    """Files that the database of the state refers to, and that are absent or too short; each once."""
    if not (state / "manifest.ocdbt").is_file():
        yield "manifest.ocdbt"
        return
    store, seen = ts.KvStore.open(f"file://{state}/").result(), set()
    todo = references(ts.ocdbt.dump(store).result()["versions"][-1])
    while todo:
        kind, base, name, offset, length = todo.pop()
        path = state / base / name
        whole = path.is_file() and path.stat().st_size >= offset + length
        if not whole and path not in seen:
            seen.add(path)
            yield str(path.relative_to(state))
        if whole and kind != "value":
            node = ts.ocdbt.dump(store, f"{kind}:{base}:{name}:{offset}:{length}").result()
            todo += references(node)


def references(node) -> list[tuple[str, str, str, int, int]]:
    """(kind, folder, file, offset, length) of all that a node of tensorstore's database refers to.

    node: as `ts.ocdbt.dump` describes it. Where in the description they stand differs with the kind of the node and is
    documented nowhere, but each is one string, kind:folder:file:offset:length; this is the only place that knows so.
    tests/test_private.py says when an upgrade writes them otherwise.
    """
    found = re.findall(r"(value|btreenode|versionnode):([^:]*):([^:]+):(\d+):(\d+)", str(node))
    return [(kind, folder, name, int(offset), int(length)) for kind, folder, name, offset, length in found]


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more + (" are" if len(names) > 1 else " is")


def _incomplete(folder: pathlib.Path, lost: list[str], other: int | None) -> str:
    remedy = (
        f"checkpoint {other} is the newest complete one: move {folder} away to go on from it"
        if other is not None
        else "there is no complete one beside it: put back what is missing, or move the folder away to begin anew"
    )
    return f"checkpoint {folder.name} in {folder.parent} is incomplete: {_named(lost)} missing; {remedy}"


def save(manager: ocp.CheckpointManager, step: int, state, data: dict, config: dict) -> None:
    """Starts writing checkpoint `step` in the background; returns once the state is copied off the devices.

    `data`: JSON-able position of everything beside the state (step, running sums); `config`: the resolved settings.
    """
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(data), config=ocp.args.JsonSave(config)
        ),
    )


def write(workdir, state: dict, data: dict, config: dict) -> None:
    """Checkpoint 0 of a new workdir from numpy arrays, which must not change meanwhile: they are not copied first.

    Each array gets a file of its own, so that nothing is collected in memory; readers tell the two layouts apart by
    themselves.
    """
    said = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # orbax warns of every layout but its default
    try:
        registry = ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False))
        )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(
                use_ocdbt=False, use_compression=False, type_handler_registry=registry
            ),
            "data": ocp.JsonCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        }
        options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(jax.tree.map(np.asarray, state)),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave(config),
        )
        with ocp.CheckpointManager(
            pathlib.Path(workdir).absolute() / SUBDIR, options=options, item_handlers=handlers
        ) as manager:
            manager.save(0, args=items)
    finally:
        logging.set_verbosity(said)


def restore(manager: ocp.CheckpointManager, step: int, shapes, shardings) -> tuple[object, dict]:
    """Checkpoint `step` as (state placed by `shardings`, data). `shapes`: the state's `jax.eval_shape`.

    ValueError: the checkpoint holds other leaves or shapes than `shapes`; every one that differs is listed.
    """
    check_same(manager, step, shapes)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    state = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
    got = manager.restore(step, args=ocp.args.Composite(state=state, data=ocp.args.JsonRestore()))
    return got["state"], got["data"]


def saved_config(manager: ocp.CheckpointManager, step: int) -> dict:
    """The settings that wrote checkpoint `step`."""
    return manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]


def check_same(manager: ocp.CheckpointManager, step: int, shapes, elsewhere: dict[str, tuple] | None = None) -> None:
    """ValueError listing the leaves in which checkpoint `step` differs from the state that `shapes` describes.

    elsewhere: path -> shape of leaves of the state that the checkpoint does not hold but refers to.
    """
    found = _leaf_shapes(manager.item_metadata(step)["state"].tree) | (elsewhere or {})
    expected = _leaf_shapes(jax.tree.map(_storage_shape, shapes))
    lines = []
    for path in sorted(found.keys() | expected.keys(), key=lambda p: (not p.startswith("params"), p)):
        if path not in expected:
            lines.append(f"  {path}: only in the checkpoint")
        elif path not in found:
            lines.append(f"  {path}: only in this config's state")
        elif found[path] != expected[path]:
            lines.append(f"  {path}: checkpoint {list(found[path])}, this config {list(expected[path])}")
    if lines:
        more = [f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise ValueError(
            "\n".join(
                [
                    f"checkpoint {step} in {manager.directory} holds another model or optimiser:",
                    *lines[:20],
                    *more,
                    "use another workdir, or the settings that wrote it",
                ]
            )
        )


def load_params(path) -> dict:
    """Parameters that a checkpoint holds, as a nested dict of numpy arrays, whatever mesh wrote them.

    Frozen ones are not among them: `convert.read.read` gives all.

    `path`: a workdir (its newest checkpoint), or one checkpoint folder. ValueError: no complete checkpoint there.
    """
    return _load(path, "params")["params"] or {}


def load_extra(path) -> dict | None:
    """What the task carried besides parameters, as momentum copies and queue, of numpy arrays.

    None where there is nothing.
    """
    return _load(path, "extra").get("extra") or None


def _load(path, *names: str) -> dict:
    folder = newest(path) / "state"
    tree = ocp.StandardCheckpointHandler().metadata(folder).tree
    item = {name: tree[name] for name in names if tree.get(name)}
    got = dict.fromkeys(names)
    if item:
        with ocp.PyTreeCheckpointer() as reader:
            got |= reader.restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    item=item,
                    partial_restore=True,
                    restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item),
                ),
            )
    return got


def load_config(path) -> dict:
    """The settings that wrote a checkpoint; `path` and errors as `load_params`."""
    return _load_json(path, "config")


def load_data(path) -> dict:
    """What a checkpoint holds beside state and settings; one that was converted says so under "converted", one that has
    frozen parameters refers to them under "frozen"."""
    return _load_json(path, "data")


def _load_json(path, name: str) -> dict:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(newest(path) / name)


def newest(path) -> pathlib.Path:
    """The newest complete checkpoint folder of a workdir, or `path` itself if it is one. ValueError: there is none."""
    path = pathlib.Path(path).absolute()
    if (path / "state").is_dir():
        return _refuse_old(path)
    for folder in (path / SUBDIR, path):
        steps = sorted(
            (p for p in folder.glob("*") if p.name.isdigit() and any((p / name).is_dir() for name in ITEMS)),
            key=lambda p: int(p.name),
        )
        if steps:
            if lost := missing(steps[-1]):
                raise ValueError(
                    _incomplete(steps[-1], lost, newest_complete(folder.parent) if folder.name == SUBDIR else None)
                )
            return _refuse_old(steps[-1])
    raise ValueError(
        f"{path} holds no complete checkpoint: give a workdir of `blip-jax train`, or one of the numbered "
        f"folders in its {SUBDIR}/"
    )


def _refuse_old(folder: pathlib.Path) -> pathlib.Path:
    """The folder of a checkpoint.

    ValueError: its text layers are med/layer_00, med/layer_01, ..., as they were before they were stacked, or it holds
    frozen parameters, as before they were referred to.
    """
    tree = folder / "state" / "_METADATA"
    if tree.is_file() and OLD.search(tree.read_text(encoding="utf-8")):
        raise ValueError(
            f"checkpoint {folder} is of an earlier version of blip_jax, whose text layers were not stacked and whose "
            "frozen parameters were in the checkpoint: let that version write it as a PyTorch file (`blip-jax convert "
            f"{folder} OUT.pth --to=official`) and give OUT.pth to this one's `blip-jax convert`, or start anew in "
            "another workdir"
        )
    return folder


def _storage_shape(x):
    """Random keys are stored as their uint32 data."""
    return jax.eval_shape(jax.random.key_data, x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _leaf_shapes(tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
