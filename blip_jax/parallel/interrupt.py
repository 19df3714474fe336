"""An orderly end on a signal."""

from __future__ import annotations

import signal
import threading


class Interrupt:
    """While entered, SIGTERM and the first SIGINT set `asked` and say what happens next; a second SIGINT ends at once.

    several: this process is one of several of a run, and JAX tells all of them of a SIGTERM to any
    (`reached_preemption` of the checkpoint manager); SIGTERM is left to it, and SIGINT becomes one.
    """

    def __init__(self, then: str, several: bool = False):
        self.asked, self._then, self._several, self._before = False, then, several, {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
            self._before = {s: signal.signal(s, self._note) for s in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"{signal.Signals(number).name}: {self._then}", flush=True)
        if self._several:
            signal.raise_signal(signal.SIGTERM)
