"""Batches of one text length each: which examples of a window form which batch, computed ahead in threads.

The global order is cut into windows of W batches. The examples of a window are ordered by the bucket that holds their
text, ties by position, and cut into W batches, which come in a shuffled order. So a window holds the same examples as
without buckets, each once; a batch is as long as its longest text's bucket; and all of it depends on (seed, window) and
on the lengths alone. Every process finds the same batches without a word to the others.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable

import numpy as np


def cut(lengths: np.ndarray, batch: int, buckets) -> tuple[np.ndarray, np.ndarray]:
    """Cuts n * `batch` examples into n batches, shortest first: (rows, T).

    rows: positions i64[n,batch], ascending in a batch; T: i64[n], the text positions of each batch.

    lengths: text positions of the examples, at most the last of `buckets`.
    """
    bucket = np.searchsorted(np.asarray(buckets), lengths)
    rows = np.sort(np.argsort(bucket, kind="stable").reshape(-1, batch), axis=1)
    return rows, np.asarray(buckets)[bucket[rows].max(axis=1)]


def plan(lengths: np.ndarray, batch: int, buckets, seed: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """What the steps of window number `window` take: (rows i64[W,B], T i64[W]), as `cut`, in a shuffled order."""
    rows, T = cut(lengths, batch, buckets)
    # the examples' own streams have the numbers below 2**63
    stream = np.random.Philox(key=np.array([seed, 2**63 + window], np.uint64))
    order = np.random.Generator(stream).permutation(len(rows))
    return rows[order], T[order]


class Windows:
    """Which examples a step takes, and their T. Used from several threads; close it.

    length_of: (range of global example numbers) -> their text lengths, called in `threads` threads. When a step is
    asked for, the lengths of the batch `window` steps later are begun, so that the work of the next window is spread
    over this one.
    ahead: steps by which the asking may be out of order.
    """

    def __init__(
        self,
        length_of: Callable[[range], np.ndarray],
        *,
        batch: int,
        window: int,
        buckets,
        seed: int,
        start_step: int,
        threads: int,
        ahead: int,
    ):
        self._length_of = length_of
        self._batch, self._window, self._buckets = batch, window, buckets
        self._seed, self._ahead = seed, ahead
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(max(threads, 1), thread_name_prefix="text-lengths")

        # step -> text lengths of the examples that it has in the order without buckets
        self._lengths: dict[int, concurrent.futures.Future] = {}
        # window -> what its steps take: global example numbers i64[W,B], T i64[W]
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        # the lengths of the steps before this one have been begun or are not needed
        self._asked = start_step // window * window

    def batch(self, step: int) -> tuple[np.ndarray, int]:
        """Global example numbers i64[B] of `step`, ascending, and T, the length of its texts."""
        window, at = divmod(step, self._window)
        # Most calls find their window planned and its successor begun: these need no lock, as a plan never changes.
        if step + self._window >= self._asked or window not in self._plans:
            with self._lock:
                self._begin(step + self._window)
                if window not in self._plans:
                    self._plan(window)
        numbers, T = self._plans[window]
        return numbers[at], int(T[at])

    def shares(self, step: int) -> dict[int, float]:
        """T -> share of the batches in the window of `step` that are so long."""
        self.batch(step)
        T, count = np.unique(self._plans[step // self._window][1], return_counts=True)
        return {int(t): int(n) / self._window for t, n in zip(T, count)}

    def _begin(self, last: int) -> None:
        """Has the threads find the lengths of all steps up to `last`."""
        while self._asked <= last:
            first = self._asked * self._batch
            self._lengths[self._asked] = self._pool.submit(self._length_of, range(first, first + self._batch))
            self._asked += 1

    def _plan(self, window: int) -> None:
        """Waits for the lengths of a window and decides what its steps take."""
        first = window * self._window
        steps = range(first, first + self._window)
        lengths = np.concatenate([self._lengths[step].result() for step in steps])
        rows, T = plan(lengths, self._batch, self._buckets, self._seed, window)

        # forget what no step can ask for any more; a new dict, since others read the old one without the lock
        for step in steps:
            del self._lengths[step]
        kept = {w: plan for w, plan in self._plans.items() if w + self._ahead >= window}
        self._plans = kept | {window: (first * self._batch + rows, T)}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
