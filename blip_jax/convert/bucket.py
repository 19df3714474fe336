"""Checkpoints of others on a bucket, copied here, as their readers map files into memory."""

from __future__ import annotations

import fnmatch
import pathlib
import sys

from blip_jax import buckets, checkpoint
from blip_jax.convert import foreign, hub

_COPIES: dict[str, tuple[dict, pathlib.Path]] = {}  # path -> what the files were, where their copies are


def copy(path) -> pathlib.Path:
    """A local copy of a file of weights, with the settings beside it, or of a Hugging Face folder; it stays until the
    process ends, and is made once.

    ValueError: there is nothing, or no model. OSError: it cannot be read, or there is no room.
    """
    found = buckets.stamps(path)
    if "" in found:
        root, name = path.parent, path.name
        beside = {near: stamp for near in foreign.BESIDE if (stamp := buckets.stamps(root / near).get(""))}
        wanted = {name: found[""], **beside}
    elif "config.json" in found:
        root, name, wanted = path, "", _of_folder(found)
    else:
        what = "holds neither checkpoints of ours" if found else "holds nothing: no file, no checkpoints of ours"
        raise ValueError(
            f"{path} {what} ({checkpoint.SUBDIR}/) nor a Hugging Face model (config.json): give what holds one, or a "
            "file of weights"
        )
    before, folder = _COPIES.get(str(path), ({}, None))
    if before != wanted:
        folder = buckets.folder_for(root)
        size = sum(size for size, _ in wanted.values())
        print(f"{path}: copying {len(wanted)} files, {size / 1e9:.3f} GB, to {folder}", file=sys.stderr)
        try:
            for near in wanted:
                (folder / near).parent.mkdir(parents=True, exist_ok=True)
                buckets.copy_here(f"{root}/{near}", folder / near)
        except OSError as e:
            raise OSError(f"{path} cannot be copied to {folder}: {e}; TMPDIR chooses another disk") from e
        _COPIES[str(path)] = wanted, folder
    return folder / name


def _of_folder(found: dict) -> dict:
    """What of a folder is read, as of one on the hub."""
    chosen = lambda *patterns: {n: x for n, x in found.items() if any(fnmatch.fnmatch(n, p) for p in patterns)}
    return chosen(*hub.TEXTS) | (chosen(*hub.WEIGHTS) or chosen(*hub.OLD_WEIGHTS))
