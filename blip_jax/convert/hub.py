"""Checkpoints by name from the Hugging Face hub, through `huggingface_hub` and into its usual cache."""

from __future__ import annotations

import difflib
import pathlib
import re
import sys

TEXTS = ("*.json", "vocab.txt", "merges.txt", "spiece.model", "qformer_tokenizer/vocab.txt")  # settings and vocabulary
WEIGHTS = ("*.safetensors", "checkpoints/[0-9]*/*")
OLD_WEIGHTS = ("pytorch_model*.bin",)  # fetched only where there is nothing of WEIGHTS: most repositories hold both
SCHEME = re.compile(r"^hf:/{1,2}")  # a path in between may have made one slash of two
NAME = re.compile(r"[\w.-]+/[\w.-]+")


def folder(name: str) -> pathlib.Path:
    """The folder of the repository `name`, as "Salesforce/blip-vqa-base", downloaded where the cache has it not yet.

    What looks like a path of this machine is not sent anywhere; hf://owner/name always means the hub.
    Without a network what the cache holds is used. ValueError: no such name, huggingface_hub is missing, or the
    download failed and nothing is in the cache.
    """
    given, name = name, SCHEME.sub("", name)
    if given == name and (why := _local(name)):
        raise ValueError(why)
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no file or folder here, and no name of the form owner/name on the Hugging Face hub"
        )
    huggingface_hub = library(f"{name!r} is no file or folder here; to look on the Hugging Face hub")
    print(f"{name}: no file or folder here, so it is looked up on the Hugging Face hub", file=sys.stderr)
    found = _snapshot(huggingface_hub, name, [*TEXTS, *WEIGHTS])
    if not any(next(found.glob(pattern), None) for pattern in WEIGHTS):
        found = _snapshot(huggingface_hub, name, [*TEXTS, *OLD_WEIGHTS])
    return found


def library(purpose: str):
    """huggingface_hub. ValueError: it is not installed; `purpose` begins the message."""
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"{purpose}: pip install 'blip-jax[hub]'") from None
    return huggingface_hub


def _local(name: str) -> str:
    """Why `name`, which is not there, is taken for a path of this machine; "" where it may be the hub's."""
    path = pathlib.Path(name)
    parent = path.expanduser().parent
    if not name.startswith((".", "~", "/")) and (parent == pathlib.Path(".") or not parent.is_dir()):
        return ""
    found = sorted(p.name for p in parent.iterdir()) if parent.is_dir() else []
    close = [str(path.parent / near) for near in difflib.get_close_matches(path.name, found, 2, 0.5)]
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    elif not parent.is_dir():
        hint = f"there is no folder {path.parent}"
    else:
        hint = f"{path.parent} holds {', '.join(found[:8]) or 'nothing'}" + (", ..." if len(found) > 8 else "")
    escape = f" (hf://{name} asks the Hugging Face hub)" if NAME.fullmatch(name) and name[0] != "." else ""
    return f"{name!r} is no file or folder here: {hint}{escape}"


def _snapshot(library, name: str, patterns: list[str]) -> pathlib.Path:
    try:
        return pathlib.Path(library.snapshot_download(name, allow_patterns=patterns))
    # a dozen types of its own and of the network libraries below it, which change with their versions
    except Exception as e:
        try:
            return pathlib.Path(library.snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except Exception:
            reason = str(e).strip().split("\n")[0]
            raise ValueError(
                f"{name!r} is no file or folder here, is not in the cache of huggingface_hub, and could not be "
                f"downloaded ({type(e).__name__}: {reason}): correct the name, go online, or give a folder"
            ) from None
