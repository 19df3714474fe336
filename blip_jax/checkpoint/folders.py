"""Which checkpoint folders there are, and what each of them lacks."""

from __future__ import annotations

import functools
import json
import math
import pathlib
import re
import tempfile
from collections.abc import Iterator

import tensorstore as ts

SUBDIR = "checkpoints"
ITEMS = ("state", "data", "config")
SUMS = "checksums"  # an item that checkpoints of earlier versions lack
# in the tree of a state that orbax keeps beside it: text layers that are no stack, frozen parameters
OLD = re.compile(r"'med(_dec)?', 'layer_\d\d'|'frozen', '")
PLAIN = re.compile(r"[\w/ .-]*")  # orbax and tensorstore take other characters for patterns, addresses, escapes, ...
LOCK, CLOUDS = ".__lock", ("gs", "s3", "az", "hf")  # ... and these for lock files and for object stores


def vocabulary(workdir, like="") -> pathlib.Path | None:
    """Where `workdir` keeps the vocabulary of its checkpoints: vocab.txt or vocab.json, whichever there is, else None.

    like: a vocabulary file; then where a copy of it belongs, whether there is one or not.
    """
    found = [pathlib.Path(workdir) / f"vocab{suffix}" for suffix in (".txt", ".json")]
    if like:
        return found[pathlib.Path(like).suffix == ".json"]
    return next((path for path in found if path.is_file()), None)


# --- names ------------------------------------------------------------------------------------------------------------
def plain(folder: pathlib.Path) -> pathlib.Path:
    """`folder` as orbax and tensorstore take it: by a link of another name where its own would be read
    for something else. ValueError: the name is no text, and what is said of the folder could not be printed."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(folder)!r} is no name in UTF-8: rename the folder") from None
    return folder if _is_plain(folder) else _link(folder)


def _is_plain(folder: pathlib.Path) -> bool:
    return bool(PLAIN.fullmatch(str(folder))) and LOCK not in str(folder) and folder.parts[1] not in CLOUDS


def spelled(path: pathlib.Path) -> pathlib.Path:
    """The inverse of `plain`, also for what lies within such a folder."""
    links = pathlib.Path(_links().name)
    if not path.is_relative_to(links):
        return path
    link, *within = path.relative_to(links).parts
    return (links / link).readlink().joinpath(*within)


@functools.cache
def _link(folder: pathlib.Path) -> pathlib.Path:
    links = pathlib.Path(_links().name)
    link = links / str(len(list(links.iterdir())))
    link.symlink_to(folder)
    return link


@functools.cache
def _links() -> tempfile.TemporaryDirectory:
    """This process's folder of links, which is removed when it ends."""
    usual = pathlib.Path(tempfile.gettempdir())
    return tempfile.TemporaryDirectory(prefix="blip_jax-", dir=usual if _is_plain(usual) else "/tmp")


# --- checkpoints of a workdir -----------------------------------------------------------------------------------------
def folders(workdir) -> dict[int, pathlib.Path]:
    """The numbered folders of `workdir`, by number, newest first; whether they are complete or not."""
    return numbered(pathlib.Path(workdir).absolute() / SUBDIR)


def numbered(parent: pathlib.Path) -> dict[int, pathlib.Path]:
    """The folders in `parent` whose names are numbers as orbax writes them, newest first."""
    entries = parent.iterdir() if parent.is_dir() else ()
    found = {int(p.name): p for p in entries if re.fullmatch("0|[1-9][0-9]*", p.name) and p.is_dir()}
    return dict(sorted(found.items(), reverse=True))


def newest_complete(workdir) -> int | None:
    """Number of the newest checkpoint of which nothing is missing, or None."""
    return next((step for step, folder in folders(workdir).items() if not missing(folder)), None)


def check_folders(workdir) -> tuple[int | None, list[str]]:
    """Number of the newest checkpoint of `workdir`, or None, and what is to be said of the others.

    ValueError: something of the newest one is missing; it names what, and the newest complete one. A name that orbax
    reads as a number, and nobody else does.
    """
    found, parent = folders(workdir), pathlib.Path(workdir).absolute() / SUBDIR
    names = {p.name for p in (parent.iterdir() if parent.is_dir() else ())} - {str(step) for step in found}
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
    torn = sorted(name for name in names if ".orbax-checkpoint-tmp" in name)
    if torn:
        notes.append(f"an interrupted save left {', '.join(torn)}; removed, as it counts for nothing")
    return last, notes


def newest(path) -> pathlib.Path:
    """The newest complete checkpoint folder of a workdir, or `path` itself if it is one. ValueError: there is none."""
    path = pathlib.Path(path).absolute()
    if (path / "state").is_dir():
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


# --- one checkpoint ---------------------------------------------------------------------------------------------------
def missing(folder: pathlib.Path) -> list[str]:
    """Names of what a finished checkpoint folder lacks: an item, a file of the state, or the end of one."""
    items = (*ITEMS, *([SUMS] if _has_sums(folder) else []))
    lost = [f"{name}/" for name in items if not (folder / name).is_dir()]
    lost += [
        f"{name}/metadata"
        for name in items[1:]
        if (folder / name).is_dir() and not (folder / name / "metadata").is_file()
    ]
    state = folder / "state"
    if not state.is_dir():
        return lost
    try:
        return lost + [f"state/{name}" for name in _lost_files(state)]
    except Exception as e:  # what should name the files is anything but what it was
        return [*lost, f"state/ (unreadable: {short(e)})"]


def _has_sums(folder: pathlib.Path) -> bool:
    """Whether there is an item of checksums, or what orbax notes of a checkpoint says that there was one."""
    noted = folder / "_CHECKPOINT_METADATA"
    return (folder / SUMS).is_dir() or (noted.is_file() and f'"{SUMS}"'.encode() in noted.read_bytes())


def _lost_files(state: pathlib.Path) -> Iterator[str]:
    if not (state / "_METADATA").is_file():
        yield "_METADATA"
        return
    if is_database(state):
        yield from _lost_in_database(state)
        return
    for array in state.rglob(".zarray"):  # one folder for each array, as `write` makes them
        layout = json.loads(array.read_text(encoding="utf-8"))
        want = math.prod(-(-n // chunk) for n, chunk in zip(layout["shape"], layout["chunks"]))
        if sum(1 for p in array.parent.iterdir() if not p.name.startswith(".")) < want:
            yield f"{array.parent.relative_to(state)}/*"


def is_database(state: pathlib.Path) -> bool:
    """Whether the arrays of a state are in tensorstore's database; else each has a folder of its own."""
    found = json.loads((state / "_METADATA").read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("_METADATA is no JSON object")
    return bool(found.get("use_ocdbt", True))


def _lost_in_database(state: pathlib.Path) -> Iterator[str]:
    """Files that the database of the state refers to, and that are absent or too short; each once."""
    if not (state / "manifest.ocdbt").is_file():
        yield "manifest.ocdbt"
        return
    store, seen = ts.KvStore.open({"driver": "file", "path": f"{plain(state.parent)}/state/"}).result(), set()
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


# --- words ------------------------------------------------------------------------------------------------------------
def listed(names: list[str]) -> str:
    """The first of some names, and the verb that follows them."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more + (" are" if len(names) > 1 else " is")


def short(e: BaseException) -> str:
    """What an error of a library says, in a line."""
    return (str(e).splitlines() or [type(e).__name__])[0][:200]


def _incomplete(folder: pathlib.Path, lost: list[str]) -> str:
    beside = numbered(folder.parent)
    other = next((step for step, p in beside.items() if p != folder and not missing(p)), None)
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
    if tree.is_file() and OLD.search(tree.read_text(encoding="utf-8", errors="replace")):
        raise ValueError(
            f"checkpoint {folder} is of an earlier version of blip_jax, whose text layers were not stacked and whose "
            "frozen parameters were in the checkpoint: let that version write it as a PyTorch file (`blip-jax convert "
            f"{folder} OUT.pth --to=official`) and give OUT.pth to this one's `blip-jax convert`, or start anew in "
            "another workdir"
        )
    return folder
