"""Checkpoints by name from the Hugging Face hub, through `huggingface_hub` and into its usual cache."""

from __future__ import annotations

import pathlib
import re

TEXTS = ("*.json", "vocab.txt")  # settings and vocabulary
WEIGHTS = ("*.safetensors", "checkpoints/[0-9]*/*")
OLD_WEIGHTS = ("pytorch_model*.bin",)  # fetched only where there is nothing of WEIGHTS: most repositories hold both
NAME = re.compile(r"[\w.-]+/[\w.-]+")


def folder(name: str) -> pathlib.Path:
    """The folder of the repository `name`, as "Salesforce/blip-vqa-base", downloaded where the cache has it not yet.

    Without a network what the cache holds is used. ValueError: no such name, huggingface_hub is missing, or the
    download failed and nothing is in the cache.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no file or folder here, and no name of the form owner/name on the Hugging Face hub"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"{name!r} is no file or folder here; to look on the Hugging Face hub: pip install 'blip-jax[hub]'"
        ) from None
    found = _snapshot(huggingface_hub, name, [*TEXTS, *WEIGHTS])
    if not any(next(found.glob(pattern), None) for pattern in WEIGHTS):
        found = _snapshot(huggingface_hub, name, [*TEXTS, *OLD_WEIGHTS])
    return found


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
