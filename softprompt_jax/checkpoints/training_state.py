"""The training state of a run on disk, through Orbax: written in the background, the latest and the best kept."""

from __future__ import annotations

import contextlib
import json
import math
import operator
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from softprompt_jax.config import UserError
from softprompt_jax.distributed import cloud_files
from softprompt_jax.distributed.multihost import run_on_process_0

GROUPS, MEMBERS = "groups", "members.json"  # of a sweep: GROUPS/HASH/ holds the state that its MEMBERS share
_SCORE, _LOSS, _STEP, _PENDING, _LINES, _ARRAYS, _OWN = "score", "loss", "step", "pending", "lines", "arrays", "crc32"
_SMALL = 1 << 20  # numbers; a larger array is summed on its devices


_NAMES = ocp.path.step.standard_name_format()


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Leave it to the training loop: JAX's sync point knows one count, and a thread here asks with old steps."""
        return False


class Checkpoints:
    """A run's `checkpoints/` folder, here or on gs://. A step is complete or absent, whatever kills a write.

    Each has checksums of its arrays, its step and a checksum of both. What does not fit is refused by name; where an
    older one is good, it is used, and the damaged one is renamed to STEP.damaged, which is reported in a line. (Those
    that older versions wrote have a step only.)
    """

    def __init__(self, folder: str | Path, read_only: bool = False, report: Callable[[str], None] = lambda line: None):
        def rank(metrics: Any) -> Any:  # the highest score; of equal ones the lowest loss, then the earliest step
            return *self._rank(metrics), -metrics[_STEP]

        self._scores: dict[int, tuple[float, float | None]] = {}
        self._folder = str(folder if cloud_files.is_remote(folder) else Path(folder).absolute())
        self._report, self._read_only = report, read_only
        keep = ocp.checkpoint_managers
        best = keep.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(1), best]),
            best_fn=rank,
            best_mode="max",
            cleanup_tmp_directories=not read_only,  # what a kill in mid-write has left
            create=not read_only,
            read_only=read_only,
        )
        with self._writing():
            self._check_metadata() if read_only else run_on_process_0(self._check_metadata)
            self._manager = _Manager(self._folder, options=options, item_handlers=ocp.StandardCheckpointHandler())

    def save(
        self,
        step: int,
        state: Any,
        score: float | None = None,
        loss: float | None = None,
        pending: Any = None,
        lines: Any = None,
    ) -> None:
        """Start writing the state after `step` steps; returns once it has been copied off the device.

        `pending`: what the next line of the log says of steps so far; `lines`: the checksum of those before; anything
        that fits into JSON.
        """
        with self._writing():
            about = {
                _SCORE: score,
                _LOSS: loss,
                _STEP: step,
                _PENDING: pending,
                _LINES: lines,
                _ARRAYS: _checksums(state),
            }
            about |= {_OWN: _checksum_of(about)}
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=about, force=True)

    def pending(self, step: int) -> Any:
        """Return what was saved as such with a step; None where there was nothing."""
        return (self._manager.metrics(step) or {}).get(_PENDING)

    def lines(self, step: int) -> Any:
        """Return what was saved as such with a step; None where there was nothing."""
        return (self._manager.metrics(step) or {}).get(_LINES)

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
            state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:  # Orbax, TensorStore: a broken file
            reason = " ".join(str(error).split())[:200]
            raise self._refused(step, f"cannot be read ({type(error).__name__}: {reason})") from None
        known = (self._manager.metrics(step) or {}).get(_ARRAYS)
        if known is not None and known != (found := _checksums(state)):
            names = [name for name in known | found if known.get(name) != found.get(name)]
            raise self._refused(step, f"{names[0]} is not what was saved (its checksum differs)")
        return state

    def restore_newest(self, like: Any) -> tuple[Any, int] | None:
        """Return the state and the step of the newest checkpoint that is good; None if there is none at all.

        Errors: UserError where all are damaged.
        """
        damaged: dict[int, UserError] = {}
        newest = None
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                newest = self.restore(step, like), step
                break
            except UserError as error:
                damaged[step] = error
        if damaged:
            if newest is None:
                raise next(iter(damaged.values()))
            good = newest[1]
            run_on_process_0(lambda: self._set_aside(damaged, good))
            self._manager.reload()
        return newest

    def _check_metadata(self) -> None:
        """Refuse checkpoints that are not what their names say, before Orbax reads what they say of themselves."""
        paths = {each.step: each.path / "metrics" / "metrics" for each in _NAMES.find_all(self._folder)}
        damaged, good = {}, None
        for step, path in sorted(paths.items(), reverse=True):
            try:
                self._check_about(step, path)
                good = step if good is None else good
            except UserError as error:
                if not path.exists() and (good is not None or not path.parents[1].exists()):
                    continue  # it is being deleted, or was when a command was killed
                damaged[step] = error
        if damaged and (good is None or self._read_only):
            raise next(iter(damaged.values()))
        if damaged and good is not None:
            self._set_aside(damaged, good)

    def _check_about(self, step: int, path: Any) -> None:
        try:
            about = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise self._refused(step, f"metrics/metrics cannot be read as JSON ({reason})") from None
        if not isinstance(about, dict) or type(about.get(_STEP)) is not int:
            raise self._refused(step, "metrics/metrics does not say its step")
        if about[_STEP] != step:
            raise self._refused(step, f"is that of step {about[_STEP]} (exchanged or renamed)")
        own = about.pop(_OWN, None)
        numbers = [about.get(name) for name in (_SCORE, _LOSS)]
        if (own is not None and own != _checksum_of(about)) or not all(
            isinstance(each, int | float | None) for each in numbers
        ):
            raise self._refused(step, "metrics/metrics is not what was saved (its checksum differs)")

    def _refused(self, step: int, what: str) -> UserError:
        return UserError(
            f"{self._folder}/{step}: {what}; expected a complete checkpoint; delete this folder to go on from the one "
            "before"
        )

    def _set_aside(self, damaged: Mapping[int, UserError], good: int) -> None:
        """Rename what is damaged, so that its steps can be saved again and nothing is lost."""
        for step, error in damaged.items():
            path = _NAMES.find_step(self._folder, step).path
            aside = path.with_name(f"{step}.damaged")
            if aside.exists():
                aside.rmtree()
            path.rename(aside)
            self._report(f"{str(error).partition(';')[0]}; renamed to {aside.name}, going on from step {good}")

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


def _checksums(state: Any) -> dict[str, int]:
    """Return a checksum of each array of a state, by its path. They do not depend on how it is sharded."""
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    leaves = [leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    local = [leaf.size <= _SMALL and (isinstance(leaf, np.ndarray) or leaf.is_fully_addressable) for leaf in leaves]
    sums = [
        _sum(np.asarray(leaf), np) if here else _sum_on_device(leaf) for leaf, here in zip(leaves, local, strict=True)
    ]
    return {name: int(each) for name, each in zip(names, sums, strict=True)}


def _sum(leaf: Any, numpy: Any) -> Any:
    """Return the sum of an array's words times odd numbers that follow from their places, mod 2^32."""
    leaf = leaf.reshape(leaf.shape or 1)
    bits = np.dtype(f"u{leaf.dtype.itemsize}")
    if numpy is np:
        words = np.ascontiguousarray(leaf).view(np.uint32 if leaf.dtype.itemsize == 8 else bits)
    elif leaf.dtype == bool:
        words = leaf
    else:
        words = jax.lax.bitcast_convert_type(leaf, bits)
    place = numpy.zeros((1,) * words.ndim, np.uint32)
    for axis, size in enumerate(words.shape):
        along = numpy.arange(size, dtype=np.uint32).reshape(-1, *(1,) * (words.ndim - axis - 1))
        place = place * np.uint32(size) + along
    weight = place * np.uint32(0x9E3779B1)
    weight = (weight ^ (weight >> np.uint32(15))) * np.uint32(0x85EBCA77) | np.uint32(1)
    return (words.astype(np.uint32) * weight).sum(dtype=np.uint32)


_sum_on_device = jax.jit(lambda leaf: _sum(leaf, jnp))


def _checksum_of(about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def read_members(path: Path) -> list[str]:
    """Return the names of the runs that share the state beside `members.json`. Errors: UserError for another file."""
    with contextlib.suppress(OSError, ValueError):
        names = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    raise UserError(
        f"{path}: cannot be read; expected the names of runs that train together; delete {path.parent}, and the same "
        "sweep trains them again"
    )


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
        if Path(folder).name in (names := read_members(group)):
            with contextlib.closing(Checkpoints(group.parent / cloud_files.CHECKPOINTS, read_only=True)) as checkpoints:
                if (step := checkpoints.latest()) is None:
                    break
                state, best, marks = checkpoints.restore(step)
            index = names.index(Path(folder).name)
            chosen = int(marks["best_step"][index])
            tree = best if chosen else state["trainable"]
            return jax.tree.map(operator.itemgetter(index), tree), chosen or step
    raise UserError(f"{folder}: has no checkpoint yet; expected one; wait for the run's first")
