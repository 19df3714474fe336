"""JSON in pieces: what `json.loads` gives, without keeping other threads from their turn.

`json.loads` holds Python's lock until it is done. With a file of some 100 MB on a busy host that takes longer than the
other processes of a run wait for a sign of life (blip_jax/parallel/peers.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

SPACE = re.compile(r"[ \t\n\r]*")
WHOLE = json.JSONDecoder().raw_decode  # (text, begin) -> a value, and where it ends


def parsed(text: str, kept: Callable[[Any], Any] = lambda element: element) -> Any:
    """`json.loads(text)`; the elements of the outermost list, or of the lists of the outermost object and of objects in
    it, one by one.

    kept: what is kept of each of these elements, which may be smaller.
    """
    value, at = _value(text, _next(text, 0), kept)
    if (end := _next(text, at)) != len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def _next(text: str, at: int) -> int:
    return SPACE.match(text, at).end()


def _value(text: str, at: int, kept: Callable) -> tuple[Any, int]:
    """The value at `at`, and where it ends."""
    parse = {"[": _list, "{": _object}.get(text[at : at + 1])
    return parse(text, at, kept) if parse else WHOLE(text, at)


def _list(text: str, at: int, kept: Callable) -> tuple[list, int]:
    """The list at `at`, and where it ends."""
    out, at = [], _next(text, at + 1)
    if text[at : at + 1] == "]":
        return out, at + 1
    while True:
        value, at = WHOLE(text, at)
        out.append(kept(value))
        at = _next(text, at)
        if text[at : at + 1] == "]":
            return out, at + 1
        at = _behind(",", text, at)


def _object(text: str, at: int, kept: Callable) -> tuple[dict, int]:
    """The object at `at`, and where it ends."""
    out, at = {}, _next(text, at + 1)
    if text[at : at + 1] == "}":
        return out, at + 1
    while True:
        if text[at : at + 1] != '"':
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
        name, at = WHOLE(text, at)
        at = _behind(":", text, _next(text, at))
        out[name], at = _value(text, at, kept)
        at = _next(text, at)
        if text[at : at + 1] == "}":
            return out, at + 1
        at = _behind(",", text, at)


def _behind(mark: str, text: str, at: int) -> int:
    """Where what follows `mark` begins. json.JSONDecodeError: it is not at `at`."""
    if text[at : at + 1] != mark:
        raise json.JSONDecodeError(f"Expecting {mark!r} delimiter", text, at)
    return _next(text, at + 1)
