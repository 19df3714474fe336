"""What every command says and how: lines of the first process, settings as JSON, the revision of the source."""

from __future__ import annotations

import functools
import json
import pathlib
import subprocess

import jax


def say(text: str) -> None:
    """Prints to the console of the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def plain(cfg) -> dict:
    """A config as JSON would keep it: nested dicts, tuples as lists."""
    return json.loads(cfg.to_json())


@functools.cache
def revision() -> str:
    """Git revision of the checkout this runs from; "none" for an installed package, which has its version alone.

    The folder it is installed in may lie in another project's repository, whose revision means nothing here.
    """
    root = pathlib.Path(__file__).parent.parent
    if not (root / ".git").exists():
        return "none"
    try:
        done = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except OSError:
        return "none"
    return done.stdout.strip() or "none"
