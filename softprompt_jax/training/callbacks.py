"""Functions that are called with a run's numbers while it trains: the user's own, TensorBoard, Weights & Biases.

A callback is called with the step and a dictionary of numbers: where the run is logged (`loss`, `learning_rate`, ...),
validated (`validation/accuracy`, ...), saved (`checkpoint`, the step), and at the end (the numbers of `result.json`).
One that returns True stops the training. An object may also have `begin(run, folder)`, called before the first step,
and `close()`, called at the end, after an error too.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softprompt_jax.config import UserError
from softprompt_jax.distributed.multihost import is_first, run_on_process_0
from softprompt_jax.files import refusals, writable
from softprompt_jax.run import Run

Callback = Callable[[int, dict[str, Any]], object]


def numbers_of(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the numbers of nested dictionaries by their paths, such as `validation/accuracy`, without the step."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, int | float | np.number) and (prefix or name != "step"):
            found[f"{prefix}{name}"] = value
    return found


class Callbacks:
    """The callbacks of a run; those of process 0 are called. Used as a context, it closes them."""

    def __init__(self, callbacks: Sequence[Callback]):
        for callback in callbacks:
            if not callable(callback):
                raise UserError(
                    f"callbacks: found {type(callback).__name__}; expected functions of a step and its numbers"
                )
        self._callbacks = callbacks
        self.stop = False  # whether one has asked for it

    def begin(self, run: Run, folder: Path) -> None:
        """Say what begins, or goes on, and where."""
        for callback in self._callbacks if is_first() else ():
            getattr(callback, "begin", lambda run, folder: None)(run, folder)

    def __call__(self, step: int, values: Mapping[str, Any]) -> None:
        """Call each with the numbers of nested dictionaries."""
        if self._callbacks:
            self.stop = run_on_process_0(lambda: self._call(step, numbers_of(values))) or self.stop

    def _call(self, step: int, numbers: dict[str, Any]) -> bool:
        answers = [callback(step, dict(numbers)) for callback in self._callbacks]
        return any(isinstance(answer, bool | np.bool_) and bool(answer) for answer in answers)

    def __enter__(self) -> Callbacks:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.ExitStack() as closing:
            for callback in self._callbacks if is_first() else ():
                closing.callback(getattr(callback, "close", lambda: None))


class TensorBoard:
    """Curves in a folder that TensorBoard shows. Each run writes some into its own folder `tensorboard/`, unasked.

    (tensorboardX's writer has a thread, and puts the host's name into the file's.)
    """

    def __init__(self, folder: str | Path, first: int = 0):
        """Begin a file; events behind step `first` in those before it are not shown."""
        from tensorboardX.record_writer import RecordWriter

        self._path = Path(folder) / f"events.out.tfevents.{time.time_ns()}"
        with writable(self._path):
            self._file = RecordWriter(str(self._path))
            self._add(file_version="brain.Event:2")
            if first > 0:
                self._add(step=first + 1, session_log={"status": "START"})
            self._file.flush()

    def __call__(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Add numbers, at once: what a kill loses of a curve would not be drawn again."""
        from tensorboardX.summary import scalar

        with refusals(self._path):
            for tag, number in numbers.items():
                self._add(step=step, summary=scalar(tag, number))
            self._file.flush()

    def close(self) -> None:
        """End the file."""
        with refusals(self._path):
            self._file.close()

    def _add(self, **values: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]

        self._file.write(Event(wall_time=time.time(), **values).SerializeToString())


class WandB:
    """The numbers of a run in a project of Weights & Biases, for which the package `wandb` must be installed.

    A run that goes on after an interruption goes on there, too: its id is in the run folder's `wandb.txt`. `settings`
    are arguments of `wandb.init`, such as `entity` or `mode="offline"`.
    """

    def __init__(self, project: str, **settings: Any):
        self._project, self._settings, self._run = project, settings, None

    def begin(self, run: Run, folder: Path) -> None:
        """Begin the run there, with all settings. Errors: UserError where wandb is not installed."""
        try:
            import wandb  # type: ignore[import-not-found]
        except ImportError:
            raise UserError(
                f"wandb {self._project}: the package wandb is not installed; expected it; pip install wandb, or leave "
                "the setting out"
            ) from None
        file = folder / "wandb.txt"
        if not file.exists():
            with writable(file) as path:
                path.write_text(uuid.uuid4().hex[:8])
        known = {"project": self._project, "id": file.read_text().strip(), "resume": "allow", "name": folder.name}
        self._run = wandb.init(**known | {"config": run.model_dump(mode="json")} | self._settings)
        self._run.define_metric("*", step_metric="step")  # steps after a checkpoint are taken, and logged, again

    def __call__(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Log numbers."""
        assert self._run is not None
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        """End the run there."""
        if self._run is not None:
            self._run.finish()
            self._run = None
