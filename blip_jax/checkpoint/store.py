"""Writing checkpoints while a run trains, and restoring them onto its devices; a converted one, from NumPy."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from blip_jax import buckets
from blip_jax.checkpoint import sums
from blip_jax.checkpoint.folders import FILE_SUMS, SUBDIR, SUMS, VOCABULARIES, plain, spelled, vocabulary
from blip_jax.checkpoint.load import Damaged, compare, damage, load_data, recorded, tree, whole
from blip_jax.trees import Lazy, path_name

SLICE = 2**14  # bytes from which a part of an array is written by a device of its own, of those that have copies
LAZY = 2  # arrays that are read at a time, where they need not be in memory
WRITERS = 64  # devices that share the writing of one array, at most


def open_dir(workdir, keep: int, every: int = 0) -> ocp.CheckpointManager:
    """The checkpoints of `workdir`, created if missing; the `keep` newest stay, and those of every so many steps, if
    that is set. Close it (`with`) to finish saves."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, keep_period=every or None, create=True, cleanup_tmp_directories=True
    )
    arrays = ocp.type_handlers.ArrayHandler(
        array_metadata_store=key_store(),
        min_slice_bytes_for_replica_parallel=SLICE,
        max_replicas_for_replica_parallel=WRITERS,
    )
    kinds = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    state = _states(type_handler_registry=kinds)
    return ocp.CheckpointManager(_folder(workdir), options=options, item_handlers=_handlers(state))


def _states(**how) -> ocp.PyTreeCheckpointHandler:
    """What writes states, and beside each the checksums of the files that describe its arrays.

    An instance of orbax's own class, by which orbax knows what it is given.
    """
    handler = ocp.PyTreeCheckpointHandler(**how)
    finalize = handler.finalize

    def and_checksums(directory) -> None:  # in process 0, once all have written and before the folder has its name
        finalize(directory)
        (directory / FILE_SUMS).write_text(json.dumps(sums.of_files(buckets.of(directory))))

    handler.finalize = and_checksums
    return handler


def _folder(workdir) -> pathlib.Path:
    workdir = buckets.of(workdir)
    found = plain(workdir) / SUBDIR
    workdir.mkdir(parents=True, exist_ok=True)
    return found


def _handlers(state: ocp.CheckpointHandler) -> dict:
    return {"state": state} | {name: ocp.JsonCheckpointHandler() for name in ("data", "config", SUMS)}


def key_store():
    """What orbax keeps beside the arrays of a checkpoint, where it writes the kind of random keys.

    Orbax makes one by default, but exports no name of it for handlers that others build; this is the only place that
    reaches for it. What is lost without it, the kind of a key, tests/train/test_checkpoint.py compares.
    """
    from orbax.checkpoint._src.metadata.array_metadata_store import Store

    return Store()


def save(manager: ocp.CheckpointManager, step: int, state, data: dict, config: dict) -> None:
    """Starts writing checkpoint `step` in the background; returns once the state is copied off the devices.

    `data`: JSON-able position of everything beside the state (step, running sums); `config`: the resolved settings.
    ValueError: a checkpoint of a later step is there.
    """
    items = _items(spelled(manager.directory).parent, state, sums.of_state(state), data, config)
    if not manager.save(step, args=items):
        raise ValueError(
            f"checkpoint {step} was not saved, as {spelled(manager.directory)} holds checkpoint {manager.latest_step()}"
            ": move that away, or use another workdir"
        )


def _items(workdir: pathlib.Path, state, arrays: Mapping[str, str], data: dict, config: dict) -> ocp.args.Composite:
    """What a checkpoint consists of. arrays: their checksums, by path."""
    words = {key: vocabulary(workdir, name=name) for name, key in VOCABULARIES.items()}
    found = {
        "arrays": arrays,
        "data": sums.of_json(data),
        "config": sums.of_json(config),
        "vocabulary": None,
        **{key: {"file": x.name, "crc": sums.of_bytes(x.read_bytes())} for key, x in words.items() if x},
        "files": FILE_SUMS,
    }
    return ocp.args.Composite(
        state=ocp.args.PyTreeSave(state),
        data=ocp.args.JsonSave(data),
        config=ocp.args.JsonSave(config),
        **{SUMS: ocp.args.JsonSave({**found, "itself": sums.of_json(found)})},
    )


def one_by_one() -> ocp.type_handlers.NumpyHandler:
    """What writes arrays one after the other, and reads those that are `trees.Lazy` when it is their turn.

    Orbax's handler has no such setting; this is the only place that reaches into it. tests/test_private.py says when
    an upgrade breaks it, tests/convert/test_blip2_files.py measures what it is for.
    """

    class OneByOne(ocp.type_handlers.NumpyHandler):
        async def _background_serialize(self, values, infos, args=None):
            for value, info, arg in zip(values, infos, args):
                await super()._background_serialize([np.asarray(value)], [info], [arg])

    return OneByOne(deepcopy_host_arrays=False)


def write(workdir, state: dict, data: dict, config: dict) -> None:
    """Checkpoint 0 of a new workdir from numpy arrays, which must not change meanwhile: they are not copied first. Of
    `trees.Lazy` arrays there are no more than LAZY in memory.

    Each array gets a file of its own, so that nothing is collected in memory; readers tell the two layouts apart by
    themselves. ValueError: it cannot be read back.
    """
    workdir = pathlib.Path(workdir).absolute()
    lazy = any(isinstance(x, Lazy) for x in jax.tree.leaves(state))
    threads = min(LAZY, sums.THREADS) if lazy else sums.THREADS
    state = jax.tree.map(lambda x: x if isinstance(x, Lazy) else np.asarray(x), state)
    leaves = {path_name(path): x for path, x in jax.tree.leaves_with_path(state)}
    with ThreadPoolExecutor(threads) as pool:
        arrays = dict(zip(leaves, pool.map(lambda x: sums.of_array(np.asarray(x)), leaves.values())))
    said = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # orbax warns of every layout but its default
    try:
        each = one_by_one()
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, each), (Lazy, each))
        handler = _states(use_ocdbt=False, use_compression=False, type_handler_registry=registry)
        options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
        with ocp.CheckpointManager(_folder(workdir), options=options, item_handlers=_handlers(handler)) as manager:
            manager.save(0, args=_items(workdir, state, arrays, data, config))
    finally:
        logging.set_verbosity(said)
    if found := damage(workdir / SUBDIR / "0", threads=threads):
        raise Damaged(workdir / SUBDIR / "0", found)


def restore(manager: ocp.CheckpointManager, step: int, shapes, shardings) -> tuple[object, dict]:
    """Checkpoint `step` as (state placed by `shardings`, data). `shapes`: the state's `jax.eval_shape`.

    ValueError: the checkpoint holds other leaves or shapes than `shapes`; every one that differs is listed. It is
    damaged: what of it, and the newest good one.
    """
    check_same(manager, step, shapes)
    folder = spelled(manager.directory) / str(step)
    state = whole(folder, lambda: _restored(manager, folder, shapes, shardings))
    return state, load_data(folder)


def _restored(manager: ocp.CheckpointManager, folder: pathlib.Path, shapes, shardings):
    expected = recorded(folder)

    def target(path, x, sharding):
        dtype = x.dtype
        if expected and not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):  # as stored, which the checksum is of
            dtype = jax.numpy.dtype(expected["arrays"][path_name(path)].split("[")[0])
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)

    targets = jax.tree.map_with_path(target, shapes, shardings)
    args = ocp.args.PyTreeRestore(targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets))
    state = manager.restore(int(folder.name), args=ocp.args.Composite(state=args))["state"]
    if expected:
        compare(expected["arrays"], sums.of_state(state))
    return jax.tree.map(lambda x, shape: x if x.dtype == shape.dtype else x.astype(shape.dtype), state, shapes)


def check_same(manager: ocp.CheckpointManager, step: int, shapes, elsewhere: dict[str, tuple] | None = None) -> None:
    """ValueError listing the leaves in which checkpoint `step` differs from the state that `shapes` describes.

    elsewhere: path -> shape of leaves of the state that the checkpoint does not hold but refers to.
    """
    folder = spelled(manager.directory) / str(step)
    held = whole(folder, lambda: tree(folder))
    found = {path: tuple(leaf.shape) for path, leaf in held.items()} | (elsewhere or {})
    storage = jax.tree.leaves_with_path(jax.eval_shape(lambda x: jax.tree.map(sums.stored, x), shapes))
    expected = {path_name(path): x.shape for path, x in storage}
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
                    f"checkpoint {step} in {folder.parent} holds another model or optimiser:",
                    *lines[:20],
                    *more,
                    "use another workdir, or the settings that wrote it",
                ]
            )
        )
