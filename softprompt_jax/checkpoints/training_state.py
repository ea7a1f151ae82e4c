"""The training state of a run on disk, through Orbax: written in the background, the latest and the best kept."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from softprompt_jax.config import UserError
from softprompt_jax.distributed import cloud_files

GROUPS, MEMBERS = "groups", "members.json"  # of a sweep: GROUPS/HASH/ holds the state that its MEMBERS share
_SCORE, _LOSS, _STEP = "score", "loss", "step"


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Leave it to the training loop: JAX's sync point knows one count, and a thread here asks with old steps."""
        return False


class Checkpoints:
    """A run's `checkpoints/` folder, here or on gs://. A step is complete or absent, whatever kills a write."""

    def __init__(self, folder: str | Path, read_only: bool = False):
        def rank(metrics: Any) -> Any:  # the highest score; of equal ones the lowest loss, then the earliest step
            return *self._rank(metrics), -metrics[_STEP]

        self._scores: dict[int, tuple[float, float | None]] = {}
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
            self._manager = _Manager(self._folder, options=options, item_handlers=ocp.StandardCheckpointHandler())

    def save(self, step: int, state: Any, score: float | None = None, loss: float | None = None) -> None:
        """Start writing the state after `step` steps; returns once it has been copied off the device."""
        with self._writing():
            metrics = {_SCORE: score, _LOSS: loss, _STEP: step}
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)

    def score(self, step: int, score: float, loss: float | None = None) -> None:
        """Score a step that was saved without; this object remembers it, no checkpoint."""
        self._scores[step] = score, loss

    def latest(self) -> int | None:
        """Return the last complete step, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Return the step with the highest score; None if no step has one.

        Of equal scores the one with the lowest validation loss is taken, of equal losses the earliest.
        """
        step = self._manager.best_step()
        return None if step is None or self._rank(self._manager.metrics(step))[0] == -math.inf else step

    def _rank(self, metrics: Any) -> tuple[float, float]:
        """Return the score, minus infinity where there is none or no number, and minus the loss."""
        score, loss = self._scores.get(metrics[_STEP], (metrics[_SCORE], metrics.get(_LOSS)))
        return -math.inf if score is None or math.isnan(score) else score, math.inf if loss is None else -loss

    def restore(self, step: int, like: Any = None) -> Any:
        """Read the state of a step with the structure, dtypes and sharding of `like`, or as NumPy arrays."""
        try:
            if like is None:  # wherever it was saved, devices of which this machine may have fewer
                self._manager.wait_until_finished()
                if (saved := self._manager.item_metadata(step)) is None:
                    raise ValueError("no metadata")
                abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved.tree)
            else:
                abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (OSError, ValueError, KeyError, TypeError) as error:  # of Orbax and TensorStore for a broken file
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
            with cloud_files.explain_errors(self._folder, "written"):
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


def best_or_latest(folder: str | Path) -> tuple[dict[str, Any], int]:
    """Return what an unfinished run has trained so far and after how many steps: its best checkpoint, or its latest.

    The tree is nested dictionaries of NumPy arrays, as `trained.safetensors` holds it. No model is needed. A member of
    a sweep has no checkpoints of its own: it is read from the state of its group. Errors: UserError without checkpoint.
    """
    own = f"{str(folder).rstrip('/')}/{cloud_files.CHECKPOINTS}"
    with contextlib.closing(Checkpoints(own, read_only=True)) as checkpoints:
        step = checkpoints.best()
        step = checkpoints.latest() if step is None else step
        if step is not None:
            return checkpoints.restore(step)["trainable"], step
    for group in () if cloud_files.is_remote(folder) else Path(folder).parent.glob(f"{GROUPS}/*/{MEMBERS}"):
        if Path(folder).name in (names := json.loads(group.read_text())):
            return _best_or_latest_of_group(group.parent, names.index(Path(folder).name))
    raise UserError(f"{folder}: has no checkpoint yet; expected one; wait for the run's first")


def _best_or_latest_of_group(folder: Path, index: int) -> tuple[dict[str, Any], int]:
    with contextlib.closing(Checkpoints(folder / cloud_files.CHECKPOINTS, read_only=True)) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{folder}: has no checkpoint yet; expected one; wait for the group's first")
        state, best, marks = checkpoints.restore(step)
    chosen = int(marks["best_step"][index])
    tree = best if chosen else state["trainable"]
    return jax.tree.map(lambda leaf: leaf[index], tree), chosen or step
