"""Which checkpoint folders there are, and what each of them lacks."""

from __future__ import annotations

import collections
import functools
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

import tensorstore as ts

from blip_jax import buckets

SUBDIR = "checkpoints"
BEST = "best"  # in a workdir: another one, of the checkpoint whose evaluation was the best
ITEMS = ("state", "data", "config")
SUMS = "checksums"  # an item that checkpoints of earlier versions lack
FILE_SUMS = "checksums.json"  # in a state: of the files that describe its arrays
# name of the file -> how checksums call it; the second is of a Q-Former that reads questions beside a language model
VOCABULARIES = {"vocab": "vocabulary", "questions": "questions"}
LINKS: dict[pathlib.Path, pathlib.Path] = {}  # that this process made, by the folders they lead to
PLAIN = re.compile(r"[\w/ .-]*")  # orbax and tensorstore take other characters for patterns, addresses, escapes, ...
COMMITTED = "commit_success.txt"  # in a folder on a bucket, where nothing is renamed: orbax writes it last
LOCK, CLOUDS = ".__lock", ("gs", "s3", "az", "hf")  # ... and these for lock files and for object stores


def vocabulary(workdir, like="", name: str = "vocab") -> pathlib.Path | None:
    """Where `workdir` keeps a vocabulary of its checkpoints: vocab.txt, .json or .model, whichever is there; None.

    like: a vocabulary file; then where a copy of it belongs, whether there is one or not. name: of VOCABULARIES.
    """
    found = [buckets.of(workdir) / f"{name}{suffix}" for suffix in (".txt", ".json", ".model")]
    if like:
        return next((path for path in found if path.suffix == pathlib.Path(like).suffix), found[0])
    return next((path for path in found if path.is_file()), None)


def vocabularies(workdir) -> list[pathlib.Path]:
    """The vocabularies that `workdir` keeps."""
    return [path for name in VOCABULARIES if (path := vocabulary(workdir, name=name))]


# --- names ------------------------------------------------------------------------------------------------------------
def plain(folder: pathlib.Path) -> pathlib.Path:
    """`folder` as orbax and tensorstore take it: by a link of another name where its own would be read
    for something else. ValueError: the name is no text, and what is said of the folder could not be printed."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(folder)!r} is no name in UTF-8: rename the folder") from None
    if buckets.is_bucket(folder) or _is_plain(folder):
        return folder
    if folder not in LINKS:
        link = pathlib.Path(_links().name) / str(len(LINKS))
        link.symlink_to(folder)
        LINKS[folder] = link
    return LINKS[folder]


def _is_plain(folder: pathlib.Path) -> bool:
    return bool(PLAIN.fullmatch(str(folder))) and LOCK not in str(folder) and (*folder.parts, "")[1] not in CLOUDS


def spelled(path) -> pathlib.Path:
    """The inverse of `plain`, also for what lies within such a folder."""
    if buckets.is_bucket(path):
        return path
    path = pathlib.Path(path)
    inside = (folder / path.relative_to(link) for folder, link in LINKS.items() if path.is_relative_to(link))
    return next(inside, path)


@functools.cache
def _links() -> tempfile.TemporaryDirectory:
    """This process's folder of links, which is removed when it ends."""
    usual = pathlib.Path(tempfile.gettempdir())
    return tempfile.TemporaryDirectory(prefix="blip_jax-", dir=usual if _is_plain(usual) else "/tmp")


# --- checkpoints of a workdir -----------------------------------------------------------------------------------------
def folders(workdir) -> dict[int, pathlib.Path]:
    """The numbered folders of `workdir`, by number, newest first; whether they are complete or not."""
    return numbered(buckets.of(workdir) / SUBDIR)


def numbered(parent: pathlib.Path) -> dict[int, pathlib.Path]:
    """The folders in `parent` whose names are numbers as orbax writes them, newest first; on a bucket those alone whose
    writing was completed, for the others have their names from the beginning, too."""
    entries = parent.iterdir() if parent.is_dir() else ()
    found = {int(p.name): p for p in entries if re.fullmatch("0|[1-9][0-9]*", p.name) and is_whole(p)}
    return dict(sorted(found.items(), reverse=True))


def is_whole(folder) -> bool:
    """Whether a folder is there and was not left while it was being written."""
    if buckets.is_bucket(folder):
        return (folder / COMMITTED).exists()
    return folder.is_dir()


def newest_complete(workdir) -> int | None:
    """Number of the newest checkpoint of which nothing is missing, or None."""
    return next((step for step, folder in folders(workdir).items() if not missing(folder)), None)


def home(folder: pathlib.Path) -> pathlib.Path:
    """The workdir of the run that wrote the checkpoint in `folder`, also where that is the best, kept apart."""
    workdir = folder.parent.parent
    return workdir.parent if workdir.name == BEST and (workdir.parent / SUBDIR).is_dir() else workdir


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
    files = [pathlib.PurePosixPath(name) for name in buckets.names(state)]
    chunks = collections.Counter(path.parent for path in files if not path.name.startswith("."))
    for array in (path for path in files if path.name == ".zarray"):  # one folder for each, as `write` makes them
        layout = json.loads((state / array).read_text(encoding="utf-8"))
        want = math.prod(-(-n // chunk) for n, chunk in zip(layout["shape"], layout["chunks"]))
        if chunks[array.parent] < want:
            yield f"{array.parent}/*"


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
    store, seen = ts.KvStore.open(buckets.kvstore(plain(state.parent) / "state")).result(), set()
    todo = references(ts.ocdbt.dump(store).result()["versions"][-1])
    while todo:
        kind, base, name, offset, length = todo.pop()
        path = state / base / name
        whole = path.is_file() and buckets.size(path) >= offset + length
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
    """What an error of a library says, in a line; of the system's, which tensorstore wraps in long ones, its words."""
    if number := re.search(r"os_error_code='(\d+)'", str(e)):
        return os.strerror(int(number[1]))
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."
