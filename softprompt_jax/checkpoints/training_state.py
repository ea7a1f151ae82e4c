"""The training state on disk, through Orbax: written in the background, the latest and the best kept."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from softprompt_jax.config import UserError
from softprompt_jax.distributed import cloud_files

_SCORE, _STEP = "score", "step"
# Through it Orbax warns of what is meant here, such as opening a folder to read only, and tells errors of its threads,
# which are raised here as well.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Leave it to the training loop: JAX's sync point knows one count, and a thread here asks with old steps."""
        return False


class Checkpoints:
    """A run's `checkpoints/` folder, here or on gs://. A step is complete or absent, whatever kills a write."""

    def __init__(self, folder: str | Path, read_only: bool = False):
        def rank(metrics: Any) -> Any:  # the highest score; of equal ones the earliest step
            score = self._scores.get(metrics[_STEP], metrics[_SCORE])
            return -float("inf") if score is None or math.isnan(score) else score, -metrics[_STEP]

        self._scores: dict[int, float] = {}
        self._folder = str(folder if cloud_files.is_remote(folder) else Path(folder).absolute())
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, best_fn=rank, best_mode="max")
        else:
            keep = ocp.checkpoint_managers
            best = keep.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False)
            options = ocp.CheckpointManagerOptions(
                preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(1), best]),
                best_fn=rank,
                best_mode="max",
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,  # what a kill in mid-write has left
                create=True,
            )
        with self._writing():
            self._manager = _Manager(self._folder, options=options)

    def save(self, step: int, state: Any, score: float | None = None) -> None:
        """Start writing the state after `step` steps; returns once it has been copied off the device."""
        with self._writing():
            metrics = {_SCORE: score, _STEP: step}
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)

    def score(self, step: int, score: float) -> None:
        """Score a step that was saved without; this object remembers it, no checkpoint."""
        self._scores[step] = score

    def latest(self) -> int | None:
        """Return the last complete step, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Return the step with the highest score, the earliest of equal ones."""
        return self._manager.best_step()

    def restore(self, step: int, like: Any = None) -> Any:
        """Read the state of a step with the structure, dtypes and sharding of `like`, or as it was saved."""
        abstract = None if like is None else jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax and TensorStore raise nearly anything for a broken file
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self._folder}/{step}: cannot be read ({type(error).__name__}: {reason}); expected a complete "
                "checkpoint; delete this folder to go on from the one before"
            ) from None

    def wait(self) -> None:
        """Wait until everything is written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until everything is written, and end."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Tell in one line that the disk is full or read-only; what was written earlier stays."""
        if cloud_files.is_remote(self._folder):
            with cloud_files.told(self._folder, "written"):
                yield
            return
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore wraps the system's errors in a ValueError
            wrapped = re.search(r"([^:]+) \[os_error_code", str(error))
            if wrapped is None and not isinstance(error, OSError):
                raise
            reason = wrapped.group(1).strip() if wrapped else getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"{self._folder}: a checkpoint cannot be written ({reason}); expected a writable folder with space; "
                "make room, then the same command goes on from the last complete checkpoint"
            ) from None
