"""Where the golden cases lie: in $GOLDEN_DIR those that it has, in tests/golden the others."""

import os
import pathlib

OWN = pathlib.Path(__file__).parents[1] / "golden"
BEGUN = pathlib.Path.cwd()  # where a relative $GOLDEN_DIR begins, whatever folder a test works in


def folder(case: str) -> pathlib.Path:
    """The folder of a case, such as blip/vqa, scores/visdial or blip2/features.

    Raises ValueError where $GOLDEN_DIR is set and holds no cases: its tests would be those of the project's own.
    """
    given = BEGUN / (os.environ.get("GOLDEN_DIR") or OWN)
    if not any((given / kind).is_dir() for kind in ("blip", "blip2", "scores")):
        raise ValueError(f"GOLDEN_DIR is {str(given)!r}: it has no folder blip, blip2 or scores; name one that has")
    return given / case if (given / case).is_dir() else OWN / case
