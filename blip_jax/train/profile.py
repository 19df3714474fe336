"""A profile of some steps of a run, for TensorBoard, XProf or Perfetto: what each device and the host did when."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

from blip_jax.console import say

FOLDER = "profile"  # in the workdir
MOST = 1000  # steps; a profile of as many has gigabytes


class Steps(NamedTuple):
    """The first and the last step of a profile."""

    first: int
    last: int


def parse(text: str) -> Steps:
    """Steps of "FIRST:LAST", or of one number. ValueError: it is neither, or there are none or too many."""
    match = re.fullmatch(r"(\d{1,15})(?::(\d{1,15}))?", text)
    found = Steps(int(match[1]), int(match[2] or match[1])) if match else Steps(0, 0)
    if not 1 <= found.first <= found.last < found.first + MOST:
        raise ValueError(f"--profile is {text!r}: give FIRST:LAST, steps from 1 on and at most {MOST}, as 100:103")
    return found


def port(text: str) -> int:
    """A port of this host. ValueError: it is none that a user may take."""
    if not re.fullmatch(r"\d{1,5}", text) or not 1024 <= int(text) < 1 << 16:
        raise ValueError(f"--profiler_port is {text!r}: give a number from 1024 to 65535, as 9012")
    return int(text)


@contextlib.contextmanager
def served(number: int | None) -> Iterator[None]:
    """Lets others ask for profiles at a port, each process of a host at its own; none where it is None."""
    if number is None:
        yield
        return
    number += jax.process_index()
    jax.profiler.start_server(number)
    try:
        say(f"profiles while this runs: port {number} of this host, the next processes' behind it")
        yield
    finally:
        jax.profiler.stop_server()


class Profile:
    """Records the steps `wanted` into `folder` as they come; none where it is None. A context: who leaves it ends a
    recording that still runs, as a signal makes a run do."""

    def __init__(self, wanted: Steps | None, folder: pathlib.Path):
        self._wanted, self._folder, self._begun = wanted, folder, 0

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_) -> None:
        if self._begun:
            self._end(f"stopped before step {self._wanted.last}")

    def before(self, step: int) -> None:
        """Step number `step` is next. A run that goes on within the steps records those that are left."""
        if self._wanted and not self._begun and self._wanted.first <= step <= self._wanted.last:
            jax.profiler.start_trace(self._folder)
            self._begun = step

    def after(self, step: int, values) -> None:
        """It was begun; values: what it computes, for which the last one is waited."""
        if self._begun and step >= self._wanted.last:
            jax.block_until_ready(values)
            self._end(f"steps {self._begun} to {step}")

    def _end(self, what: str) -> None:
        jax.profiler.stop_trace()
        self._wanted, self._begun = None, 0
        say(f"profile, {what}: {self._folder}; tensorboard --logdir={self._folder} shows it, with xprof installed")
