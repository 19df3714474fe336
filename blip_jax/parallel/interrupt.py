"""An orderly end on a signal, also in the middle of long work."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable

_now: Interrupt | None = None  # the innermost that is entered


class Stopped(BaseException):
    """A signal asked for the end, and this is a place where nothing is lost by it.

    No Exception, so that nobody who handles failures takes it for one.
    """


class Interrupt:
    """While entered, SIGTERM and the first SIGINT are noted, and a second SIGINT ends at once.

    As long as nothing would be lost (`then` is empty) they raise Stopped where the main thread stands. Otherwise they
    say what happens next, `then`, and set `asked`, which somebody must look at: `here`, or `check`.

    agree: what the processes of a run make of their `asked` (`processes.stops`): all stop at the same place or none.
    """

    def __init__(self, then: str = "", agree: Callable[[bool], bool] = bool):
        self.asked, self.then, self._agree, self._before, self._outer = False, then, agree, {}, None

    def __enter__(self) -> Interrupt:
        global _now
        self._outer, _now = _now, self
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        global _now
        _now = self._outer
        for number, handler in self._before.items():
            # None: it was set by no Python code, as JAX's own for SIGTERM among several processes
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def deferred(self, then: str):
        """While entered, a signal is noted; then: what happens next, said when it comes."""
        before, self.then = self.then, then
        try:
            yield
        finally:
            self.then = before

    def here(self) -> bool:
        """Whether to stop at this place. All processes of a run ask equally often, and get the same answer."""
        return self._agree(self.asked)

    def _note(self, number, _frame) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(RuntimeError):  # the signal came within a print of the main thread
            print(f"{signal.Signals(number).name}: {self.then or 'stopping'}", flush=True)
        if not self.then:
            raise Stopped("stopped by a signal")


def check() -> None:
    """Stopped, if a signal asked for it: for long work between two saves. Where no Interrupt is entered, nothing.

    All processes of a run call it equally often.
    """
    if _now is not None and _now.here():
        raise Stopped("stopped by a signal")
