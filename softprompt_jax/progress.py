"""Progress of long work: a bar with time left in a terminal, plain lines elsewhere."""

from __future__ import annotations

import html
import importlib
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def in_notebook() -> bool:
    """Tell whether this is the kernel of a notebook."""
    module = sys.modules.get("IPython")
    return module is not None and type(module.get_ipython()).__name__ == "ZMQInteractiveShell"


class Reporter:
    """Says what happens on standard error, in a notebook with a bar below the cell; `quiet` says nothing."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._shown: Any = None  # the bar of a notebook
        self._said: set[str] = set()

    def line(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if not self.quiet:
            (self._bar.console if self._bar else self._console).print(text, markup=False)

    def once(self, text: str) -> None:
        """Print a line, the first time only."""
        if text not in self._said:
            self._said.add(text)
            self.line(text)

    def start(self, what: str, step: int, steps: int) -> None:
        """Begin work that goes from `step` to `steps`."""
        self._start, self._first = time.monotonic(), step
        self._skipped_s, self._skipped = 0.0, 0
        if not self.quiet and in_notebook():
            display = importlib.import_module("IPython.display")  # which a kernel has
            self._shown = display.display(_NotebookBar(f"{what} {step}/{steps}", step, steps), display_id=True)
        elif not self.quiet and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            texts = (TextColumn("elapsed"), TextColumn("{task.fields[left]}"), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, *texts, console=self._console)
            self._bar.start()
            self._bar.add_task(what, total=steps, completed=step, left="", note="")

    def skip(self, seconds: float) -> None:
        """Leave a step that took so long, as one that compiles does, out of the time left."""
        self._skipped_s, self._skipped = self._skipped_s + seconds, self._skipped + 1

    def update(self, step: int, steps: int, note: str) -> None:
        """Show how far it is; without a terminal, as a line with the time left."""
        seconds, done = time.monotonic() - self._start, step - self._first
        if done > self._skipped:
            seconds, done = seconds - self._skipped_s, done - self._skipped
        left = f"{duration(seconds / max(1, done) * (steps - step))} left"
        if self._shown is not None:
            self._shown.update(_NotebookBar(f"step {step}/{steps}  {note}  {left}", step, steps))
        elif self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, note=note, left=left)
        elif not self.quiet:
            self.line(f"step {step}/{steps}  {note}  {left}")

    def stop(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._shown = None


class _NotebookBar:
    """A bar and a line of text, as HTML or as text."""

    def __init__(self, text: str, step: int, steps: int):
        self._text, self._step, self._steps = text, step, steps

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        return f'<progress value="{self._step}" max="{self._steps}"></progress> {html.escape(self._text)}'


def duration(seconds: float) -> str:
    """Write seconds as 45s, 3m20s or 2h05m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
