"""`blip-jax bench` beside other programs that do the same work: `python benchmarks/against.py train --size=base
--batch=8`.

  train [--compiled --rounds=3]   the original's step in PyTorch (torch_step.py), with --compiled through torch.compile
  caption                         transformers' BLIP, and the original's way of decoding
  filter, encode                  transformers' BLIP

All other flags are those of `blip-jax bench`. Needs `pip install -e ".[peers]"`. A peer has our weights, and its
outputs must agree before anything is timed; then all sides take turns within each round.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys

from absl import flags

from blip_jax.cli import bench, usage

NEEDS = {
    "train": ("torch",),
    "caption": ("torch", "transformers"),
    "filter": ("torch", "transformers"),
    "encode": ("torch", "transformers"),
}


def main(argv: list[str]) -> int:
    """The command line; a mistake is one line and exit status 2, as of `blip-jax`."""
    try:
        return measure(argv)
    except usage.Shown:
        return 0
    except (ValueError, OSError, flags.Error) as error:
        if os.environ.get("BLIP_JAX_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def measure(argv: list[str]) -> int:
    """As `blip-jax bench`, with the peer of the workload."""
    what = argv[0] if argv else ""
    if what not in NEEDS:
        raise ValueError(f"there are peers of {', '.join(NEEDS)}, not of {what or 'nothing'!r}")
    if missing := [name for name in NEEDS[what] if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{what} needs {' and '.join(missing)}: pip install -e '.[peers]'")
    command = shlex.join(["python", "benchmarks/against.py", *argv])
    more = define_train if what == "train" else None
    return bench.measure(what, argv[1:], command, more, lambda values: peer_of(what, values))


def define_train(values: flags.FlagValues) -> None:
    """The flags that the training step's peer has beside those of the workload."""
    flags.DEFINE_bool("compiled", False, "PyTorch's step through torch.compile", flag_values=values)
    flags.DEFINE_integer("rounds", 3, "in which all take turns", lower_bound=1, flag_values=values)


def peer_of(what: str, values: flags.FlagValues):
    """What the workload's `run` takes as its peer."""
    if what == "train":
        import against_torch

        return against_torch.Peer("torch-compile" if values.compiled else "torch", values.compiled, values.rounds)

    import against_transformers

    return against_transformers.captions if what == "caption" else against_transformers.outputs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
