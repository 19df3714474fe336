"""Which examples come when: where in the order of all a run stands, also after its batch size changed.

The order of all examples is a function of the seed and the sources, and an example is its number there. A run takes
them one after another, `train.batch` for each step; with text.buckets a step takes some of its window. If a run goes on
with another batch, or other windows, what the steps before have left of their window comes first.
"""

from __future__ import annotations

from typing import NamedTuple


class Order(NamedTuple):
    """The examples from step `step` on: first those `left`, then all from number `following`.

    epoch: epochs that had passed at that step, counted with the batch and the data that each step had.
    """

    step: int = 0
    following: int = 0
    left: tuple[int, ...] = ()  # ascending
    epoch: float = 0.0

    def number(self, place: int) -> int:
        """Number of the example at `place`, counted from `step` on."""
        return self.left[place] if place < len(self.left) else self.following + place - len(self.left)

    def rest(self, place: int) -> tuple[tuple[int, ...], int]:
        """(left, following) of what comes from `place` on."""
        return self.left[place:], max(self.number(place), self.following)

    def examples(self, step: int, batch: int) -> int:
        """Examples that a run has seen after `step` steps, of which those from the order's own on had this batch."""
        return self.following - len(self.left) + (step - self.step) * batch

    def epochs(self, step: int, epoch_steps: int) -> float:
        """Epochs that have passed after `step` steps."""
        return self.epoch + (step - self.step) / epoch_steps

    def ahead(self, epoch_steps: int) -> int:
        """Steps of this batch that the epochs so far make up, less the steps done, to the nearest step."""
        return round(self.epoch * epoch_steps) - self.step
