"""The mean loss and the speed of the steps since the last line of the log."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from softprompt_jax.data.batches import BatchCounts


class Speed(NamedTuple):
    """The mean loss of some steps and how fast they were; numbers, or [N] for N runs."""

    loss: Any
    examples_per_s: Any
    tokens_per_s: Any
    padding: Any

    def line(self, step: int, learning_rate: Any, seconds: float) -> dict[str, Any]:
        """Return the line of metrics.jsonl: `tokens_per_s` counts text, `padding` is that of BatchCounts."""
        return {
            "step": step,
            "loss": float(self.loss),
            "learning_rate": learning_rate,
            "examples_per_s": round(float(self.examples_per_s), 2),
            "tokens_per_s": round(float(self.tokens_per_s), 1),
            "padding": round(float(self.padding), 4),
            "seconds": round(seconds, 2),
        }


class Meter:
    """Losses and counts of the steps since the last line; steps that compiled are left out of the speed.

    `pending`: those of the steps before this process, as `pending()` has returned them. The means are then the same to
    the bit; the speed is that of this process.
    """

    def __init__(self, pending: dict[str, Any] | None = None) -> None:
        self.restart()
        self._before = pending

    def restart(self) -> None:
        """Begin a new line."""
        self._steps: list[tuple[Any, BatchCounts, float | None]] = []
        self._before: dict[str, Any] | None = None
        self._start = time.monotonic()

    def add(self, loss: Any, counts: BatchCounts, compiling_s: float | None) -> None:
        """Add a step, and how long it took if it compiled."""
        self._steps.append((loss, counts, compiling_s))

    def skip(self, seconds: float) -> None:
        """Leave what was no step out of the speed."""
        self._start += seconds

    def _sums(self) -> tuple[Any, int, BatchCounts]:
        """Wait for the steps; return the sum of their losses, their number and their counts."""
        losses, counts, _ = (list(each) for each in zip(*self._steps, strict=True))
        steps = len(losses)
        if self._before:
            losses.insert(0, self._before["loss"])
            counts.insert(0, BatchCounts(*map(np.asarray, self._before["counts"])))
            steps += self._before["steps"]
        # One after another: so the sum is the same to the bit wherever it was cut.
        loss = functools.reduce(np.add, (np.asarray(loss, np.float64) for loss in losses))
        return loss, steps, _total(counts)

    def pending(self) -> dict[str, Any] | None:
        """Wait for the steps and return what a process that goes on from here needs; fits into JSON."""
        if not self._steps:
            return self._before
        loss, steps, counts = self._sums()
        seconds = time.monotonic() - self._start + (self._before or {"seconds": 0.0})["seconds"]
        counted = [np.asarray(each).tolist() for each in counts]
        return {"loss": loss.tolist(), "steps": steps, "counts": counted, "seconds": round(seconds, 2)}

    def read(self) -> Speed:
        """Wait for the steps and return their means."""
        loss, steps, counts = self._sums()
        seconds = time.monotonic() - self._start
        fast = [counts for _, counts, compiling_s in self._steps if compiling_s is None]
        if fast:
            seconds -= sum(each for *_, each in self._steps if each is not None)
        done = _total(fast or [counts for _, counts, _ in self._steps])
        return Speed(loss / steps, done.examples / seconds, done.text / seconds, counts.padding)


def _total(counts: Sequence[BatchCounts]) -> BatchCounts:
    return BatchCounts(*(np.sum(each, axis=0) for each in zip(*counts, strict=True)))
