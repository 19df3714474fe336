"""SPICE (Anderson et al., arXiv 1607.08822), where the user has Stanford CoreNLP 3.6.0, which no package brings."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Hashable, Mapping, Sequence

from blip_jax import buckets
from blip_jax.eval import java

NEEDED = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
NOT_COMPUTED = f"not computed (it needs {' and '.join(NEEDED)} of stanford-corenlp-full-2015-12-09: --{{flag}}=FOLDER)"
OPENED = ("lang", "util", "math", "text", "net")  # packages that SPICE's serialiser looks into, which Java 16 forbids


def check(folder: str) -> None:
    """ValueError: CoreNLP is not in the folder, or that is on a bucket."""
    buckets.local(folder, "the folder of CoreNLP")
    if missing := [name for name in NEEDED if not (pathlib.Path(folder) / name).is_file()]:
        raise ValueError(f"SPICE needs {' and '.join(missing)}, not found in {folder!r}: unpack CoreNLP 3.6.0 there")


def score(
    results: Mapping[Hashable, str], references: Mapping[Hashable, Sequence[str]], folder: str
) -> tuple[float, list[float]]:
    """F of the corpus, the mean over pictures, and of each; texts are words with spaces between.

    folder: of CoreNLP 3.6.0's jars. ValueError: they or Java are missing, or the program fails.
    """
    check(folder)
    home = java.folder() / "spice"
    classes = [home / "spice-1.0.jar", home / "lib" / "*", *(pathlib.Path(folder).absolute() / name for name in NEEDED)]
    opened = [f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in OPENED]
    rows = [
        {"image_id": i, "test": text, "refs": list(references[key])} for i, (key, text) in enumerate(results.items())
    ]
    with tempfile.TemporaryDirectory() as work:
        asked, found = pathlib.Path(work) / "asked.json", pathlib.Path(work) / "found.json"
        asked.write_text(json.dumps(rows), encoding="utf-8")
        main = ("edu.anu.spice.SpiceScorer", str(asked), "-out", str(found), "-subset", "-silent")
        java.run(java.command(*opened, "-cp", os.pathsep.join(map(str, classes)), *main, heap="8G"))
        if not found.is_file():
            raise ValueError("SPICE ended without an answer")
        by_number = {row["image_id"]: float(row["scores"]["All"]["f"]) for row in json.loads(found.read_bytes())}
    if by_number.keys() != set(range(len(rows))):
        raise ValueError(f"SPICE answered for {len(by_number)} of {len(rows)} pictures")
    each = [by_number[i] for i in range(len(rows))]
    return sum(each) / len(each), each
