"""Paths of the user's: local ones, and those on Google Cloud Storage, gs://bucket/folder.

A path is looked at once, where it comes in: `of` where a bucket will do, `local` where it will not. Both refuse every
other address before anything is made of it, since a path library would take s3://x for a folder called s3:. What `of`
gives for a bucket is an epath.Path, which has pathlib's interface; a local path stays pathlib's.

An object on a bucket is written whole and appears when it is complete. There is no appending, no renaming of a folder
and no link: a file is written beforehand and given its name when it is complete (`write`, `whole`, `put`), one that
grows is written beside the run (`staged`) and copied there whole (`sync`).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import errno
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from etils import epath

from blip_jax.data import temporary

SCHEME = "gs://"
PAST_THE_END = 416  # HTTP's answer to a range that begins behind a file
NEEDS = ("gcsfs", "google.cloud.storage")  # modules of the extra gcs
EVERY = 30.0  # seconds at least between two copies of a file that grows, where nobody asks for one
SHARE = 20  # ... and of as many seconds at most one goes into copying
THREADS = 8  # that copy at once
LAST = ("commit_success.txt", "config.json")  # without which a checkpoint, a Hugging Face folder counts for nothing
COPY = "gcloud storage cp --recursive"


def is_bucket(path) -> bool:
    """Whether a path is on a bucket."""
    return _text(path).startswith(SCHEME)


def of(path, what: str = "the path") -> pathlib.Path | epath.Path:
    """A path, local (made absolute) or gs://. what: the argument that it comes from.

    ValueError: another address, one without a bucket, or what reads buckets is not installed.
    """
    text = _text(path)
    if not is_bucket(text):
        return local(path, what)
    if not re.match(r"gs://[a-z0-9][a-z0-9._-]+(/|$)", text) or re.search(r"[*?\[\]#\n\r]|/\.\.?(/|$)|(?<!:)//", text):
        raise ValueError(f"{what} is {text!r}: gs://BUCKET/FOLDER was expected, without any of * ? [ ] # . .. // in it")
    for module in NEEDS:
        if not _installed(module):
            raise ValueError(
                f"{what} is {text!r}, and Google Cloud Storage needs {module}, which is not installed: pip install "
                "'blip-jax[gcs]', or give a local folder, as one where the bucket is mounted with gcsfuse"
            )
    _fresh_listings()
    return epath.Path(text.rstrip("/"))


def local(path, what: str = "the path", instead: str = "") -> pathlib.Path:
    """A local path, made absolute. ValueError: it is an address; instead: the remedy."""
    text = _text(path)
    if (found := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)) or re.match(r"gs:/+", text) and not _there(text):
        if is_bucket(text):
            how = instead or f"give a local path, and copy with {COPY}, or mount the bucket with gcsfuse"
            raise ValueError(f"{what} is {text!r}, but this is only read and written locally: {how}")
        if not found:
            raise ValueError(f"{what} is {text!r}: gs:// takes two slashes, which pathlib.Path drops: give text")
        raise ValueError(
            f"{what} is {text!r}, but {found[1]}:// is not read or written: give a local path, as one where that place "
            "is mounted, or gs://, where the command takes it"
        )
    return pathlib.Path(path).absolute()


def _text(path) -> str:
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) else str(path)


def _there(text: str) -> bool:
    return os.path.lexists(re.match("gs:", text)[0])


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _fresh_listings() -> None:
    """Other processes write to the bucket, too: what gcsfs listed a while ago is asked again."""
    import fsspec

    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)


# --- objects ----------------------------------------------------------------------------------------------------------
def write(path, content: str | bytes) -> None:
    """A small file of these bytes, or of this text in UTF-8, whole or not at all; a local one's folder is made."""
    content = content.encode("utf-8") if isinstance(content, str) else content
    if is_bucket(path):
        with _answers(path):
            _system().pipe_file(_text(path), content)
        return
    with whole(path) as file:
        file.write_bytes(content)


@contextlib.contextmanager
def whole(path) -> Iterator[pathlib.Path]:
    """A local file to be written, which gets the name `path` when the block ends, and is removed where that raises.

    The folder of a local path is made.
    """
    with contextlib.ExitStack() as stack:
        if is_bucket(path):
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(dir=temporary.own_folder())))
        else:
            folder = path.parent
            folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f"{path.name}.tmp"
        stack.callback(beside.unlink, missing_ok=True)
        yield beside
        put(beside, path)


def put(file: pathlib.Path, path) -> None:
    """Gives a complete local file the name `path`, over what has it: a rename, or to a bucket a copy, whole or not at
    all."""
    if is_bucket(path):
        send(file, path)
        file.unlink()
    else:
        file.replace(path)


def create(path, content: bytes) -> None:
    """A file of these bytes on a bucket. FileExistsError: there is one of that name, which stays."""
    with _answers(path):
        _system().pipe_file(_text(path), content, mode="create")


def send(file: pathlib.Path, to, over: bool = True) -> None:
    """Copies a local file, whatever its size, to a bucket, or a folder: then the file whose name ends all of LAST
    comes last. over: also where there is one already. OSError: it cannot be written; FileExistsError: there is one."""
    if file.is_dir():
        below = [path for path in file.rglob("*") if path.is_file()]
        last = sorted((path for path in below if path.name in LAST), key=lambda path: -len(path.parts))
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda path: send(path, to / path.relative_to(file), over), set(below) - set(last)))
        for path in last:
            send(path, to / path.relative_to(file), over)
        return
    with _answers(to):
        _system().put_file(str(file), _text(to), mode="overwrite" if over else "create")


def size(path) -> int:
    """Of a file, in bytes. OSError: there is none."""
    with _answers(path):
        return of(path).stat().length if is_bucket(path) else os.path.getsize(path)


def opened(path) -> BinaryIO:
    """A file, to be read from its beginning to its end."""
    with _answers(path):
        return of(path).open("rb") if is_bucket(path) else open(path, "rb")


@contextlib.contextmanager
def by_ranges(path) -> Iterator[BinaryIO]:
    """A file on a bucket, of which each read fetches what it asks for and no more. OSError: there is none, or it cannot
    be read."""
    with _answers(path), _system().open(_text(path), "rb", cache_type="none") as file:
        yield file


def read_at(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file on a bucket, fewer at its end. OSError: there is none, or it cannot be read."""
    if size <= 0:
        return b""
    from gcsfs.retry import HttpError

    with _answers(path):
        try:
            return _system().cat_file(path, start=offset, end=offset + size)
        except HttpError as e:
            if e.code != PAST_THE_END:
                raise
            return b""


def stamp(path: str) -> tuple[int, int]:
    """Size of a file on a bucket in bytes, and when it was written, in nanoseconds. OSError: there is none."""
    about = _system().info(path)
    return int(about["size"]), round(about["mtime"].timestamp() * 1e6) * 1000


def copy_here(path: str, to: pathlib.Path) -> None:
    """Copies a file on a bucket, whatever its size. OSError: it cannot be read, or `to` not be written."""
    with _answers(path):
        _system().get_file(path, str(to))


@contextlib.contextmanager
def _answers(path) -> Iterator[None]:
    """OSError that names the path: what the bucket answers where it does not do what it is asked, which gcsfs has in
    its own type, or without the name. Nothing of a local path."""
    if not is_bucket(path):
        yield
        return
    from gcsfs.retry import HttpError

    try:
        yield
    except HttpError as e:
        raise OSError(f"{path}: the bucket answers {e.code} {e}") from None
    except FileNotFoundError as e:
        raise FileNotFoundError(errno.ENOENT, "No such object, or no such bucket", _text(path)) from e


def copy_within(folder, to, but: str) -> None:
    """Copies what is below a folder of a bucket, except the file called `but`, without reading it."""
    found = [name for name in _system().find(_text(folder)) if name != f"{_text(folder).removeprefix(SCHEME)}/{but}"]
    below = [name.removeprefix(_text(folder).removeprefix(SCHEME)) for name in found]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(_system().cp_file, found, [f"{_text(to)}{name}" for name in below]))


def remove(folder, first: str) -> None:
    """Removes what is below a folder of a bucket, the file called `first` before the others."""
    (folder / first).unlink(missing_ok=True)
    if folder.exists():
        folder.rmtree()


def exists(path) -> bool:
    """Whether there is a file of this name on a bucket, or one below it."""
    with _answers(path):
        return _system().exists(_text(path))


def names(folder) -> list[str]:
    """Of the files below a folder, each once and relative to it."""
    if is_bucket(folder):
        return list(stamps(folder))
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def stamps(path) -> dict[str, tuple[int, str]]:
    """Size in bytes and generation of all that is below a folder of a bucket, by name; of a file itself, as ""."""
    with _answers(path):
        found = _system().find(_text(path), detail=True)
    root = _text(path).removeprefix(SCHEME)
    return {name.removeprefix(root).lstrip("/"): (int(x["size"]), str(x["generation"])) for name, x in found.items()}


def written(folder) -> dict[str, datetime.datetime]:
    """When each file below a folder of a bucket was written, by the bucket's clock, by name relative to the folder."""
    with _answers(folder):
        found = _system().find(_text(folder), detail=True)
    root = f"{_text(folder).removeprefix(SCHEME)}/"
    return {name.removeprefix(root): x["ctime"] for name, x in found.items()}


def glob(path: str, folders: dict[str, set[str]]) -> list[str]:
    """The files on a bucket that a path with wildcards matches. folders: what was listed before."""
    bucket, _, name = path.removeprefix(SCHEME).partition("/")
    of(f"{SCHEME}{bucket}")
    if re.search(r"[*?\[]", name):
        with _answers(path):
            return [SCHEME + match for match in _system().glob(path)]
    parent = path.rpartition("/")[0]
    if parent not in folders:
        try:
            with _answers(parent):
                listed = _system().ls(parent, detail=True)
        except FileNotFoundError:
            listed = []
        folders[parent] = {SCHEME + x["name"] for x in listed if x["type"] == "file"}
    return [path] * (path in folders[parent])


def _system():
    """What lists and reads objects; fsspec keeps one for all who ask."""
    import fsspec

    return fsspec.filesystem("gs", finalize_on_close=True)  # as epath asks for it


def kvstore(folder) -> dict:
    """A folder as tensorstore's key-value stores are told of it."""
    text = f"{_text(folder).rstrip('/')}/"
    if not is_bucket(folder):
        return {"driver": "file", "path": text}
    bucket, _, path = text.removeprefix(SCHEME).partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": path}


def is_file(path) -> bool:
    """Whether a file of this name is there."""
    with _answers(path):
        return of(path).is_file() if is_bucket(path) else os.path.isfile(path)


def fetched(path, beside: str = "") -> pathlib.Path:
    """A local copy of a small file on a bucket, a vocabulary, say; a local path as it is. beside: the name of a file
    that goes with it, where there is one. ValueError: there is no such file."""
    if not is_bucket(path):
        return pathlib.Path(path)
    path = of(path)
    folder = folder_for(path.parent)
    try:
        with _answers(path):
            (folder / path.name).write_bytes(path.read_bytes())
            if beside and (more := path.with_name(beside)).exists():
                (folder / beside).write_bytes(more.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    return folder / path.name


def folder_for(place) -> pathlib.Path:
    """A new local folder, for copies of what lies in a folder of a bucket."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=temporary.own_folder()))
    _REMOTE[folder] = place
    return folder


# --- files that grow --------------------------------------------------------------------------------------------------
class _Growing(NamedTuple):
    """What of a local file or folder is on the bucket already."""

    to: epath.Path
    sizes: dict[pathlib.Path, int]  # bytes


_GROWING: dict[pathlib.Path, _Growing] = {}
_REMOTE: dict[pathlib.Path, epath.Path] = {}  # where copies belong, also after their run
_next = [0.0]  # when a copy is due, of time.monotonic()


def staged(path) -> pathlib.Path:
    """Where a file (or a folder) that grows is written: a local one itself; for one on a bucket a local copy, with what
    the bucket has of a file, which `sync` copies back."""
    if not is_bucket(path):
        return path
    copy = pathlib.Path(tempfile.mkdtemp(dir=temporary.own_folder())) / path.name
    have = {}
    if path.exists() and not path.is_dir():
        copy.write_bytes(path.read_bytes())
        have[copy] = copy.stat().st_size
    _GROWING[copy], _REMOTE[copy] = _Growing(path, have), path
    return copy


def rewritten(copy: pathlib.Path) -> None:
    """Says that a staged file has another content, which its size may not show."""
    if copy in _GROWING:
        _GROWING[copy].sizes.clear()


def spelled(path):
    """What the user calls a path: of a local copy, the place on the bucket."""
    if is_bucket(path):
        return path
    return next((to / path.relative_to(copy) for copy, to in _REMOTE.items() if path.is_relative_to(copy)), path)


def sync(every: float = 0.0) -> None:
    """Copies to the bucket what of the staged files has grown; every: only if the last time is so many seconds ago.

    Whole files, as an object cannot be appended to: what one copy costs grows with the file, so the time between two is
    at least SHARE times what the last one took. OSError: the bucket cannot be written.
    """
    if not _GROWING or every and time.monotonic() < _next[0]:
        return
    began = time.monotonic()
    for copy, (to, sizes) in _GROWING.items():
        files = [copy] if copy.is_file() else sorted(p for p in copy.rglob("*") if p.is_file())
        for file in files:
            data = file.read_bytes()
            if sizes.get(file) != len(data):
                target = to / file.relative_to(copy) if file != copy else to
                target.write_bytes(data)
                sizes[file] = len(data)
    now = time.monotonic()
    _next[0] = now + max(every, EVERY, SHARE * (now - began))


def settle() -> None:
    """The last `sync` of a run."""
    try:
        sync()
    finally:
        for copy in list(_GROWING):
            del _GROWING[copy]
            if copy.is_dir():
                shutil.rmtree(copy, ignore_errors=True)
            else:
                copy.unlink(missing_ok=True)
