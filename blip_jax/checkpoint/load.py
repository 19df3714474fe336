"""Reading a checkpoint on the host, as NumPy arrays and JSON, each compared with its checksum."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from blip_jax import buckets
from blip_jax.checkpoint import sums
from blip_jax.checkpoint.folders import (
    FILE_SUMS,
    ITEMS,
    SUBDIR,
    SUMS,
    VOCABULARIES,
    folders,
    is_database,
    is_whole,
    listed,
    missing,
    numbered,
    plain,
    short,
    vocabulary,
)
from blip_jax.trees import Lazy, nest, path_name

# in the tree of a state that orbax keeps beside it: text layers that are no stack, frozen parameters
OLD = re.compile(r"'med(_dec)?', 'layer_\d\d'|'frozen', '")


# --- which one is read ------------------------------------------------------------------------------------------------
def check_folders(workdir) -> tuple[int | None, list[str]]:
    """Number of the newest checkpoint of `workdir`, or None, and what is to be said of the others.

    ValueError: something of the newest one is missing; it names what, and the newest complete one. A name that orbax
    reads as a number, and nobody else does.
    """
    found, parent = folders(workdir), buckets.of(workdir) / SUBDIR
    entries = list(parent.iterdir() if parent.is_dir() else ())
    torn = sorted(p.name for p in entries if ".orbax-checkpoint-tmp" in p.name or p.is_dir() and not is_whole(p))
    names = {p.name for p in entries} - {str(step) for step in found} - set(torn)
    if strange := sorted(name for name in names if re.search(r"^(0|[1-9]\d*)$", name)):
        raise ValueError(
            f"{parent / strange[0]} is named as a checkpoint is, and is none: move it away, for saving counts it as one"
        )
    lost = {step: missing(folder) for step, folder in found.items()}
    last = max(found, default=None)
    if last is not None and lost[last]:
        raise ValueError(_incomplete(found[last], lost[last]))
    if last is not None:
        _refuse_old(found[last])
    notes = [
        f"warning: {found[step]} is incomplete and of no use: {listed(names)} missing"
        for step, names in lost.items()
        if names
    ]
    if torn:
        notes.append(f"an interrupted save left {', '.join(torn)}; removed, as it counts for nothing")
    return last, notes


def newest(path) -> pathlib.Path:
    """The newest complete checkpoint folder of a workdir, or `path` itself if it is one. ValueError: there is none."""
    path = buckets.of(path)
    if (path / "state").is_dir() and is_whole(path):
        return _refuse_old(path)
    for parent in (path / SUBDIR, path):
        found = (p for p in numbered(parent).values() if any((p / name).is_dir() for name in ITEMS))
        if folder := next(found, None):
            if lost := missing(folder):
                raise ValueError(_incomplete(folder, lost))
            return _refuse_old(folder)
    raise ValueError(
        f"{path} holds no complete checkpoint: give a workdir of `blip-jax train`, or one of the numbered "
        f"folders in its {SUBDIR}/"
    )


def _incomplete(folder: pathlib.Path, lost: list[str]) -> str:
    other = _good_beside(folder)
    remedy = (
        f"checkpoint {other} is the newest complete one: move {folder} away to go on from it"
        if other is not None
        else "there is no complete one beside it: put back what is missing, or move the folder away to begin anew"
    )
    return f"checkpoint {folder.name} in {folder.parent} is incomplete: {listed(lost)} missing; {remedy}"


def _refuse_old(folder: pathlib.Path) -> pathlib.Path:
    """The folder of a checkpoint.

    ValueError: its text layers are med/layer_00, med/layer_01, ..., as they were before they were stacked, or it holds
    frozen parameters, as before they were referred to.
    """
    tree = folder / "state" / "_METADATA"
    if tree.is_file() and OLD.search(tree.read_bytes().decode("utf-8", "replace")):
        raise ValueError(
            f"checkpoint {folder} is of an earlier version of blip_jax, whose text layers were not stacked and whose "
            "frozen parameters were in the checkpoint: let that version write it as a PyTorch file (`blip-jax convert "
            f"{folder} OUT.pth --to=official`) and give OUT.pth to this one's `blip-jax convert`, or start anew in "
            "another workdir"
        )
    return folder


# --- its parts --------------------------------------------------------------------------------------------------------
def load_params(path, lazy: bool = False) -> dict:
    """Parameters that a checkpoint holds, as a nested dict of numpy arrays, whatever mesh wrote them.

    Frozen ones are not among them: `convert.read.read` gives all.

    `path`: a workdir (its newest checkpoint), or one checkpoint folder. lazy: gives arrays that are read when they are
    used, and compared with their checksums then. ValueError: no complete checkpoint there, or a
    damaged one: what of it, and the newest good one beside it.
    """
    return _load(newest(path), "params/", lazy)


def load_extra(path) -> dict | None:
    """What the task carried besides parameters, as momentum copies and queue, of numpy arrays.

    None where there is nothing.
    """
    return _load(newest(path), "extra/") or None


def _load(folder: pathlib.Path, prefix: str, lazy: bool = False) -> dict:
    def later(leaf, array, path: str) -> Lazy:
        return Lazy(leaf.shape, leaf.dtype, lambda: whole(folder, lambda: array(path)))

    def read() -> dict:
        paths, array = _reader(folder)
        wanted = [path for path in paths if path.startswith(prefix)]
        if lazy:
            leaves = tree(folder)
            return nest((path.removeprefix(prefix), later(leaves[path], array, path)) for path in wanted)
        with ThreadPoolExecutor(sums.THREADS) as pool:
            return nest((path.removeprefix(prefix), x) for path, x in zip(wanted, pool.map(array, wanted)))

    return whole(folder, read)


def load_config(path) -> dict:
    """The settings that wrote a checkpoint; `path` and errors as `load_params`."""
    folder = newest(path)
    return whole(folder, lambda: _json(folder, "config"))


def load_data(path) -> dict:
    """What a checkpoint holds beside state and settings; one that was converted says so under "converted", one that has
    frozen parameters refers to them under "frozen"."""
    folder = newest(path)
    return whole(folder, lambda: _json(folder, "data"))


def own_vocabulary(folder: pathlib.Path, name: str = "vocab") -> pathlib.Path | None:
    """The vocabulary file that belongs to a checkpoint folder of a workdir, None if it has none; name: of VOCABULARIES.
    Of one on a bucket, a local copy.

    ValueError: it is not what it was when the checkpoint was written.
    """
    found = vocabulary(folder.parent.parent, name=name)
    noted = (whole(folder, lambda: recorded(folder)) or {}).get(VOCABULARIES[name])
    if found and noted and (crc := sums.of_bytes(found.read_bytes())) != noted["crc"]:
        raise ValueError(
            f"{found} is not the vocabulary that checkpoint {folder} was written with: checksum {crc}, expected "
            f"{noted['crc']}: put back {noted['file']}"
        )
    return found and buckets.fetched(found, "merges.txt")


# --- what is read -----------------------------------------------------------------------------------------------------
def recorded(folder: pathlib.Path) -> dict | None:
    """The checksums of a checkpoint, None where it is of a version that wrote none. ValueError: they do not add up."""
    if not (folder / SUMS).is_dir():
        _say_unverified(folder)
        return None
    found = _parsed(folder, SUMS)
    itself = found.pop("itself", None)
    if sums.of_json(found) != itself:
        raise ValueError(f"{SUMS}/metadata does not fit its own checksum")
    return found


@functools.cache
def _say_unverified(folder: pathlib.Path) -> None:
    if jax.process_index() == 0:
        print(f"{folder} has no checksums, as it is of an earlier version: read without verifying it", file=sys.stderr)


def _json(folder: pathlib.Path, name: str) -> dict:
    found, expected = _parsed(folder, name), recorded(folder)
    if expected:
        compare({name: expected[name]}, {name: sums.of_json(found)})
    return found


def _parsed(folder: pathlib.Path, name: str) -> dict:
    try:
        found = json.loads((folder / name / "metadata").read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{name}/metadata is no JSON ({short(e)})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name}/metadata is no JSON object")
    return found


def tree(folder: pathlib.Path) -> dict[str, Any]:
    """What orbax knows of each array of a checkpoint, by path: name, shape and dtype.

    ValueError: they are not those that were written, or another of the files that describe them is not.
    """
    expected = recorded(folder)
    if expected and expected.get("files"):  # which the first checkpoints that had checksums lack
        compare(_file_sums(folder), {f"state/{name}": crc for name, crc in sums.of_files(folder / "state").items()})
    try:
        with _quiet():
            found = ocp.StandardCheckpointHandler().metadata(plain(folder) / "state").tree
    except Exception as e:
        raise ValueError(f"state/ cannot be read ({type(e).__name__}: {short(e)})") from None
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(found)}
    if expected:
        shapes = {path: said.split()[0] for path, said in expected["arrays"].items()}
        compare(shapes, {path: sums.said(x) for path, x in leaves.items()})
    return leaves


def _file_sums(folder: pathlib.Path) -> dict[str, str]:
    """What `store` wrote beside the state. ValueError: it is not there, or not as it was."""
    try:
        found = json.loads((folder / "state" / FILE_SUMS).read_bytes())
        return {f"state/{name}": crc for name, crc in found.items()}
    except (OSError, ValueError, RecursionError, AttributeError) as e:
        raise ValueError(f"state/{FILE_SUMS} cannot be read ({short(e)})") from None


def _reader(folder: pathlib.Path) -> tuple[list[str], Callable[[str], np.ndarray]]:
    """The paths of the arrays of a checkpoint, and what reads one of them. ValueError: it differs from its checksum."""
    leaves, expected = tree(folder), recorded(folder)
    base, context = buckets.kvstore(plain(folder) / "state"), ts.Context({"cache_pool": {"total_bytes_limit": 10**8}})
    database = is_database(folder / "state")

    def read(path: str) -> np.ndarray:
        name = leaves[path].name
        store = {**base, "path": f"{base['path']}{name}/"}
        if database:
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        spec = {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False, "recheck_cached_data": False}
        x = ts.open(spec, context=context, open=True, read=True).result().read().result()
        if expected:
            compare({path: expected["arrays"][path]}, {path: sums.of_array(x)})
        return x

    return sorted(leaves), read


def compare(expected: dict[str, str], found: dict[str, str]) -> None:
    """ValueError, in a line, that names in what two lists of checksums differ."""
    if other := sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)):
        path, more = other[0], f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise ValueError(f"{path}: expected {expected.get(path, 'nothing')}, found {found.get(path, 'nothing')}{more}")


# --- damage -----------------------------------------------------------------------------------------------------------
def damage(folder: pathlib.Path, share: int = 0, shares: int = 1, threads: int = sums.THREADS) -> list[str]:
    """What of a checkpoint is missing, cannot be read or is not what was written; [] if it is good.

    All of it is read, in memory one array for each thread. share, shares: of the arrays only every `shares`-th, from
    that number on.
    """
    if lost := missing(folder):
        return [f"{name} is missing" for name in lost]
    found = set()

    def attempt(read: Callable, *args) -> None:
        try:
            read(*args)
        except MemoryError:
            raise
        except Exception as e:  # of whatever kind a library takes damaged bytes for
            found.add(short(e))

    def arrays() -> None:
        for path in (folder / "state" / "array_metadatas").glob("*"):
            json.loads(path.read_bytes())
        paths, read = _reader(folder)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda path: attempt(read, path), paths[share::shares]))

    with _quiet():
        for read in (lambda: _json(folder, "data"), lambda: _json(folder, "config"), arrays):
            attempt(read)
        if found:
            gc.collect()  # of the tasks that orbax left unfinished, which would log themselves later
    return sorted(found)


def _good_beside(folder: pathlib.Path) -> int | None:
    """Number of the newest good checkpoint beside a bad one."""
    return next((step for step, p in numbered(folder.parent).items() if p != folder and not damage(p)), None)


class Damaged(ValueError):
    """A checkpoint of which `damage` found something; says what, and the newest good one beside it, in a line."""

    def __init__(self, folder: pathlib.Path, found: list[str]):
        other = _good_beside(folder)
        remedy = (
            f"checkpoint {other} is the newest good one: move {folder} away to go on from it"
            if other is not None
            else "there is no good one beside it: put back a copy of it, or move the folder away to begin anew"
        )
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        super().__init__(
            f"checkpoint {folder.name} in {folder.parent} is damaged: {'; '.join(found[:3])}{more}; {remedy}"
        )


def whole(folder: pathlib.Path, read: Callable[[], Any]) -> Any:
    """`read()`. Damaged: it failed, and the checkpoint that it reads is damaged."""
    with _quiet():
        try:
            return read()
        except (MemoryError, OSError, jax.errors.JaxRuntimeError):  # of the machine, unless the files say otherwise
            if not (found := damage(folder)):
                raise
        except Exception as e:
            found = damage(folder) or [short(e)]  # what orbax alone looks at
        gc.collect()  # outside of the handler, where nothing holds on to unfinished tasks any more
    raise Damaged(folder, found)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what asyncio logs of the tasks that orbax gives up when one of them fails."""
    log = logging.getLogger("asyncio")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
