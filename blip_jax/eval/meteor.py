"""METEOR 1.5 (Denkowski and Lavie 2014) as coco-caption runs it: a Java program that answers line by line."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Hashable, Mapping, Sequence

from blip_jax.eval import java


class Meteor:
    """A running METEOR. It starts in the background, which takes some 13 s of a core: enter it before other work.

    ValueError: Java or pycocoevalcap is missing, or the program ended before its answer.
    """

    def __enter__(self) -> Meteor:
        jar = java.folder() / "meteor" / "meteor-1.5.jar"
        argv = java.command("-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm", heap="2G")
        self._said = tempfile.TemporaryFile()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        self._process = java.start(argv, **pipes)
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def score(
        self, results: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]]
    ) -> tuple[float, list[float]]:
        """Of the corpus, from the sums of its counts, and of each picture; texts are words with spaces between."""
        counts = [self._asked(["SCORE", *references[key], text]) for key, text in results.items()]
        each = [float(value) for value in self._answers(["EVAL", *counts], len(counts))]
        return float(self._answers([], 1)[0]), each

    def _asked(self, parts: list[str]) -> str:
        parts = [part.replace("|||", "").replace("  ", " ") for part in parts]
        return self._answers(parts, 1)[0]

    def _answers(self, parts: list[str], lines: int) -> list[str]:
        """The next `lines` of the program, after asking it for them where `parts` says so."""
        try:
            if parts:
                self._process.stdin.write((" ||| ".join(parts) + "\n").encode("utf-8", "replace"))
                self._process.stdin.flush()
            found = [self._process.stdout.readline().decode().strip() for _ in range(lines)]
        except BrokenPipeError:
            found = [""]
        if not all(found):
            self._said.seek(0)
            raise ValueError(f"METEOR ended before its answer: {java.last_words(self._said.read())}")
        return found
