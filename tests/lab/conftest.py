"""The laboratory's scripts are flat modules of benchmarks/, as when they are run."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
