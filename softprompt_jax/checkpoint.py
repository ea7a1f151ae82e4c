"""The training state on disk, through Orbax: written in the background, the latest and the best kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

SCORE = "score"


class Checkpoints:
    """A run's `checkpoints/` folder. A step is complete or absent: a kill in mid-write leaves no trace."""

    def __init__(self, folder: Path, read_only: bool = False):
        def score(metrics: Any) -> float:
            return -float("inf") if metrics.get(SCORE) is None else float(metrics[SCORE])

        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, best_fn=score, best_mode="max")
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
            return
        keep = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep.AnyPreservationPolicy(
                    [keep.LatestN(1), keep.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)]
                ),
                best_fn=score,
                best_mode="max",
                enable_async_checkpointing=True,
                create=True,
            ),
        )

    def save(self, step: int, state: Any, score: float | None = None) -> None:
        """Start writing the state after `step` steps; returns once it has been copied off the device."""
        metrics = None if score is None else {SCORE: score}
        self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)

    def latest(self) -> int | None:
        """Return the last complete step, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Return the step with the highest score, or the latest where none was scored."""
        best = self._manager.best_step()
        return self.latest() if best is None else best

    def restore(self, step: int, like: Any = None) -> Any:
        """Read the state of a step with the structure, dtypes and sharding of `like`, or as it was saved."""
        if like is None:
            return self._manager.restore(step, args=ocp.args.StandardRestore())
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def wait(self) -> None:
        """Wait until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until everything is written, and end."""
        self.wait()
        self._manager.close()
