"""Files that a path names: itself where there is such a file, else what its braces and wildcards stand for.

A name is taken as it is written wherever something of that name exists, so that folders may be called run[1] or 100%.
Braces are the shell's: {a,b}, {00000..00010} with its zeros, {0..10..2}, {a..e}, one within another.
"""

from __future__ import annotations

import glob
import itertools
import math
import os
import re

from blip_jax import buckets

MAX_NAMES = 200_000  # that the braces of one path may stand for
MAX_LETTERS = 100_000_000  # of all these names together
DEPTH = 16  # of braces in braces
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?|([a-zA-Z])\.\.([a-zA-Z])")


def find(path: str, on_bucket: bool = False) -> list[str]:
    """The sorted files or folders that `path` names, each once. ValueError: one of them does not exist, or too many.

    Of braces every name must exist; of wildcards any number but none. on_bucket: whether those on gs:// are read, too.
    """
    if buckets.is_bucket(path):
        return _on_bucket(path) if on_bucket else [str(buckets.local(path, "a file"))]
    if os.path.lexists(path):
        return [path]
    base, rest = _existing(path)
    found, missing = set(), []
    for name in braces(rest):
        matches = _matches(base, name)
        found.update(matches)
        if not matches:
            missing.append(base + name)
    if not missing:
        return sorted(found)
    if re.match(r"[a-z][a-z0-9+]*:", path):
        raise ValueError(f"{path!r}: addresses and pipes are not read; fetch the files and give their paths")
    if missing == [path]:
        what = f"no file matches {path!r}" if glob.has_magic(path) else f"{path!r} is not a file"
        raise ValueError(f"{what}; paths are relative to {os.getcwd()}")
    if not found:
        raise ValueError(f"no file matches {path!r}, as {missing[0]!r}; paths are relative to {os.getcwd()}")
    raise ValueError(
        f"{len(missing)} of the {len(missing) + len(found)} files that {path!r} stands for are missing, the first "
        f"{missing[0]!r}: fetch them, or give a pattern with * that only those match that are there"
    )


def _on_bucket(path: str) -> list[str]:
    """As `find`, of gs://; a name with * ? [ ] is always a pattern."""
    found, missing = set(), []
    folders: dict[str, set[str]] = {}  # listed once each, as braces name many files of one folder
    for name in braces(path):
        matches = buckets.glob(name, folders)
        found.update(matches)
        missing += [name] * (not matches)
    if missing:
        raise ValueError(
            f"{len(missing)} of the files that {path!r} stands for {'are' if missing[1:] else 'is'} not on the bucket, "
            f"the first {missing[0]!r}"
        )
    return sorted(found)


def _existing(path: str) -> tuple[str, str]:
    """`path` cut behind the last of its first folders that exist as they are written."""
    base, at = "", 0
    for slash in re.finditer("/+", path):
        if not os.path.isdir(path[: slash.start()] or "/"):
            break
        base, at = path[: slash.end()], slash.end()
    return base, path[at:]


def _matches(base: str, pattern: str) -> list[str]:
    """What matches below the folder `base`, part by part; a part that exists as it is written is no pattern."""
    found = [base]
    for part in re.findall("[^/]+/*", pattern):
        name, slash = part.rstrip("/"), part[len(part.rstrip("/")) :]
        found = [
            match + slash
            for folder in found
            for match in (
                [folder + name]
                if os.path.lexists(folder + name)
                else glob.glob(glob.escape(folder) + name)
                if glob.has_magic(name)
                else []
            )
        ]
    return found


def braces(text: str) -> list[str]:
    """The texts that `text` stands for, in order; what is no pair of braces with a comma or a range stays as it is.

    ValueError: too many, or braces too deep in one another.
    """
    if len(text) > MAX_LETTERS // 100:
        raise ValueError(f"a path of {len(text)} characters: no file has such a name")
    pairs = _pairs(text)
    return _product(text, 0, len(text), pairs, len(text))


def _pairs(text: str) -> dict[int, tuple[int, list[int]]]:
    """Where a brace opens -> where it closes, and the commas directly in it. Braces without partner are left out."""
    found, open_ = {}, []
    for at, letter in enumerate(text):
        if letter == "{":
            open_.append((at, []))
        elif letter == "," and open_:
            open_[-1][1].append(at)
        elif letter == "}" and open_:
            start, commas = open_.pop()
            found[start] = (at, commas)
    depth, ends = 0, []
    for start in sorted(found):
        ends = [end for end in ends if end > start] + [found[start][0]]
        depth = max(depth, len(ends))
        if depth > DEPTH:
            raise ValueError(f"braces in braces, more than {DEPTH} deep: {text[:80]!r}; give a simpler pattern")
    return found


def _product(text: str, start: int, end: int, pairs: dict, longest: int) -> list[str]:
    """What text[start:end] stands for."""
    parts, at, plain = [], start, start
    while at < end:
        choices = _choices(text, at, pairs, longest) if text[at] == "{" and at in pairs else None
        if choices is None:
            at += 1
            continue
        parts += [[text[plain:at]], choices]
        at = plain = pairs[at][0] + 1
        _bounded(math.prod(map(len, parts)), longest)
    parts.append([text[plain:end]])
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def _choices(text: str, at: int, pairs: dict, longest: int) -> list[str] | None:
    """What the braces that open at `at` stand for; None: they are letters like others."""
    end, commas = pairs[at]
    if not commas:
        return _span(text[at + 1 : end], longest)
    out = []
    for a, b in itertools.pairwise([at, *commas, end]):
        out += _product(text, a + 1, b, pairs, longest)
        _bounded(len(out), longest)
    return out


def _span(text: str, longest: int) -> list[str] | None:
    """00..10, 10..0..5 or a..e written out; None: it is no range."""
    if not (match := _RANGE.fullmatch(text)):
        return None
    if match[4]:
        first, last, step, width = ord(match[4]), ord(match[5]), 1, 0
    else:
        if len(text) > 60:
            raise ValueError(f"{{{text[:60]}...}} is no range of file numbers")
        first, last, step = int(match[1]), int(match[2]), abs(int(match[3] or 1)) or 1
        padded = any(re.match(r"-?0\d", end) for end in match.group(1, 2))
        width = max(len(match[1]), len(match[2])) if padded else 0
    count = abs(last - first) // step + 1
    _bounded(count, longest)
    numbers = range(first, last + (1 if last >= first else -1), step if last >= first else -step)
    return [chr(n) if match[4] else f"{n:0{width}d}" for n in numbers]


def _bounded(names: int, longest: int) -> None:
    if names > MAX_NAMES or names * longest > MAX_LETTERS:
        raise ValueError(f"the braces stand for {names} names, too many to look for: give a pattern with *")
