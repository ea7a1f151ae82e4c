"""Progress of long work: a bar with time left in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Says what happens on standard error; `quiet` says nothing."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._start, self._first = time.monotonic(), 0

    def line(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if not self.quiet:
            (self._bar.console if self._bar else self._console).print(text, markup=False)

    def start(self, what: str, step: int, steps: int) -> None:
        """Begin work that goes from `step` to `steps`."""
        self._start, self._first = time.monotonic(), step
        if not self.quiet and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(
                *columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self._console
            )
            self._bar.start()
            self._bar.add_task(what, total=steps, completed=step, note="")

    def update(self, step: int, steps: int, note: str) -> None:
        """Show how far it is; without a terminal, as a line with the time left."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, note=note)
        elif not self.quiet:
            seconds = (time.monotonic() - self._start) / max(1, step - self._first) * (steps - step)
            self.line(f"step {step}/{steps}  {note}  {duration(seconds)} left")

    def stop(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """Write seconds as 45s, 3m20s or 2h05m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
