"""Arguments of any command: flags are set, mistakes are one line that says what was meant."""

from __future__ import annotations

import re

from absl import flags
from ml_collections import ConfigDict

from blip_jax.cli import configs, usage


def parse(values: flags.FlagValues, argv: list[str], required: tuple[str, ...], positional: int = 0) -> list[str]:
    """Sets the flags; returns the arguments that are none, at most `positional`.

    argv: the name of the command and what follows it. Shown: help was asked for, and is printed.
    ValueError: flags of `required` are missing, an unknown flag, a value that cannot be, too many arguments.
    """
    rest = set_flags(values, argv)
    if len(rest) > positional:
        raise ValueError(
            f"unexpected argument {rest[positional]!r}: flags are --name=value; `blip-jax {argv[0]} --help` lists them"
        )
    require(argv[0], [f"--{name}" for name in required if getattr(values, name) is None])
    return rest


def require(command: str, missing: list[str]) -> None:
    """ValueError where something is missing."""
    if missing:
        raise ValueError(f"blip-jax {command} needs {' and '.join(missing)}; `blip-jax {command} --help` shows how")


def set_flags(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Sets the flags; returns the arguments that are none. Errors as of `parse`."""
    if usage.asked(argv):
        usage.show(argv[0], values)
    try:
        return values(argv)[1:]
    except flags.UnrecognizedFlagError as e:
        raise ValueError(_unknown(values, argv[0], e)) from e


def _unknown(values: flags.FlagValues, command: str, e: flags.UnrecognizedFlagError) -> str:
    name = e.flagname
    if "config" not in values:
        return str(e)
    if name.startswith("config."):
        return f"--{name} without --config: give the config file, too"
    cfg = values["config"].value
    cfg = cfg if isinstance(cfg, ConfigDict) else None
    if name.replace("-", "_") in configs.FOLDERS and "workdir" in values:
        return f"Unknown command line flag {name!r}: did you mean --workdir?"
    if leaf := configs.leaf(cfg, name):
        return f"Unknown command line flag {name!r}: did you mean --config.{leaf}?"
    near = re.search(r"Did you mean: (.*?) \?", str(e))
    told = f"did you mean --{near[1].replace(', ', ' or --')}?" if near else f"`blip-jax {command} --help` lists them"
    return f"Unknown command line flag {name!r}: {told}"
