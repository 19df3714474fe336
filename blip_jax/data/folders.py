"""Pictures below a folder, here or on a bucket, which no path may leave, but by links into folders of the config."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from blip_jax import buckets
from blip_jax.data import remote
from blip_jax.data.source import MAX_BYTES, BadRecord, read_at

log = logging.getLogger(__name__)

LINKED = "path leaves the image root through a link that the source's `roots` do not allow"


class Folder(NamedTuple):
    """A folder of pictures and the further ones that links in it may lead into; all are real paths."""

    path: str  # on a bucket, too
    roots: tuple[str, ...]


def image_folder(name: str, cfg, beside: str) -> Folder:
    """The folder of a source's pictures: cfg.images, or that of the file `beside`. ValueError: there is none."""
    folder = cfg.images or os.path.dirname(remote.origin(beside)) or "."
    if buckets.is_bucket(folder):
        if not buckets.exists(folder):
            raise ValueError(f"data source {name!r}: there is nothing in the image folder {folder!r}; set its `images`")
        return Folder(folder.rstrip("/"), ())
    for leaf, path in (("images", folder), *(("roots", root) for root in cfg.roots)):
        if not os.path.isdir(path):
            raise ValueError(f"data source {name!r}: the image folder {path!r} does not exist; set its `{leaf}`")
    return Folder(os.path.realpath(folder), tuple(map(os.path.realpath, cfg.roots)))


def read_image(key: str, folder: Folder, path: str) -> bytes:
    """The bytes of `path` below `folder`. BadRecord when it leaves the folder or cannot be read."""
    try:
        if buckets.is_bucket(folder.path):
            return _of_bucket(key, folder, path)
        real, size = locate(key, folder, path)
        if size > MAX_BYTES:
            raise BadRecord(key, f"file too large: {size} bytes, at most {MAX_BYTES} are read")
        return read_at(real, 0, size)
    except (OSError, ValueError) as e:
        raise BadRecord(key, f"unreadable file: {type(e).__name__}: {e}") from None


def _of_bucket(key: str, folder: Folder, path: str) -> bytes:
    """As `read_image`, in one request."""
    if path.startswith("/") or ".." in path.split("/") or re.search("[\0\r\n]|://", path):
        raise BadRecord(key, f"path leaves the image root: {path!r} is no name below {folder.path!r}")
    try:
        found = buckets.read_at(f"{folder.path}/{path.removeprefix('./')}", 0, MAX_BYTES + 1)
    except FileNotFoundError:
        raise BadRecord(key, f"missing file: {path!r} is not in {folder.path!r}") from None
    if len(found) > MAX_BYTES:
        raise BadRecord(key, f"file too large: at most {MAX_BYTES} bytes are read")
    return found


def there(folder: Folder, path: str) -> bool:
    """Whether something of this name lies in the folder."""
    whole = os.path.join(folder.path, path)
    return buckets.exists(whole) if buckets.is_bucket(whole) else os.path.exists(whole)


def locate(key: str, folder: Folder, path: str) -> tuple[str, int]:
    """The real path of `path` below `folder`, and the size of the file. BadRecord: it leaves the folder, or is not
    there.
    """
    try:
        real = os.path.realpath(os.path.join(folder.path, path))
        if not _allowed(folder, real):
            if link := _link(folder, path):
                raise BadRecord(key, f"{LINKED}: {path!r} is {real!r}; if that is meant, add {_target(link)!r} to them")
            raise BadRecord(key, f"path leaves the image root: {path!r} is {real!r}, outside {folder.path!r}")
        return real, os.stat(real).st_size
    except FileNotFoundError:
        raise BadRecord(key, f"missing file: {path!r} is not in {folder.path!r}") from None
    except (OSError, ValueError) as e:  # ValueError: a path with NUL or broken characters
        raise BadRecord(key, f"unreadable file: {type(e).__name__}: {e}") from None


def first_there(folder: Folder, paths: Sequence[str]) -> str:
    """The first of `paths` that is there, one picture as layouts differ; where none is, the first."""
    return next((path for path in paths if there(folder, path)), paths[0])


def check_links(name: str, folder: Folder, paths: Iterable) -> None:
    """Looks at the first pictures of a list for links out of its folder: some are said, ValueError where all are."""
    if buckets.is_bucket(folder.path):
        return
    out, others = {}, 0
    for path in paths:
        try:
            link = _link(folder, path) if isinstance(path, str) else None
            others += not link and os.path.exists(os.path.join(folder.path, path))
        except (OSError, ValueError, TypeError):
            continue
        if link:
            out.setdefault(_target(link), link)
    if not out:
        return
    links = ", ".join(f"{link!r} leads to {target!r}" for target, link in [*out.items()][:3])
    remedy = f"roots={tuple(sorted(out))[:3]}"
    if not others:
        raise ValueError(
            f"data source {name!r}: its pictures lie behind links out of the image folder {folder.path!r}: {links}. "
            f"If that is meant, allow it: set its `roots`, as {remedy}"
        )
    log.warning(
        "data source %r: links lead out of the image folder %r: %s; what lies there is skipped unless its `roots` "
        "allow it, as %s",
        name,
        folder.path,
        links,
        remedy,
    )


def _allowed(folder: Folder, real: str) -> bool:
    return any(os.path.commonpath((root, real)) == root for root in (folder.path, *folder.roots))


def _link(folder: Folder, path: str) -> str | None:
    """The first link of `path` that leads out of the folder; None: none does, or `path` leaves it by itself."""
    whole = os.path.normpath(os.path.join(folder.path, path))
    if os.path.commonpath((folder.path, whole)) != folder.path or _allowed(folder, os.path.realpath(whole)):
        return None
    at = folder.path
    for part in os.path.relpath(whole, folder.path).split(os.sep):
        at = os.path.join(at, part)
        if os.path.islink(at) and not _allowed(folder, os.path.realpath(at)):
            return at
    return None


def _target(link: str) -> str:
    """The folder that a link leads to, or that of the file."""
    real = os.path.realpath(link)
    return real if os.path.isdir(real) else os.path.dirname(real)
