"""An orderly end on a signal."""

from __future__ import annotations

import signal
import threading


class Interrupt:
    """While entered, SIGTERM and the first SIGINT set `asked` and say what happens next; a second SIGINT ends at once."""

    def __init__(self, then: str):
        self.asked, self._then, self._before = False, then, {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"{signal.Signals(number).name}: {self._then}", flush=True)
