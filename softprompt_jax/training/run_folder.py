"""What a run leaves in its folder: settings, `metrics.jsonl`, curves, everything trained, prompts, `result.json`."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt_jax import config
from softprompt_jax.checkpoints import artifact
from softprompt_jax.checkpoints.training_state import Checkpoints
from softprompt_jax.config import UserError, differences, settings_hash, to_yaml
from softprompt_jax.distributed import mesh as sharding
from softprompt_jax.distributed.multihost import is_first, run_on_process_0
from softprompt_jax.inference.evaluate import run_score
from softprompt_jax.methods import Split, finish
from softprompt_jax.run import UNHASHED_SETTINGS, Run


def leave_files(
    run: Run, folder: Path, identity: str, parts: Split, trainable: dict[str, Any], result: dict[str, Any]
) -> None:
    """Write what a finished run leaves for others: everything trained, prompts, and last `result.json`."""
    whole = jax.tree.map(lambda leaf: jnp.asarray(sharding.gather(leaf)), trainable)
    final = parts.merge(whole, parts.frozen)
    metadata = {
        "backbone": identity,
        "task": run.task_name,
        "settings_hash": settings_hash(run, without=UNHASHED_SETTINGS),
        "step": str(result["best_step"]),
        "settings": json.dumps(run.model_dump(mode="json")),
        "fingerprint": artifact.fingerprint(final),
    }

    def write() -> None:
        artifact.save_trained(finish(final), folder / artifact.TRAINED_FILE, metadata)
        if parts.trains_prompt_only:
            rows, placed = np.asarray(final.prompt.table()), metadata | {"place": final.prompt.place}
            if run.own_prompts:
                save_own_prompts(run, rows, folder, placed)
            else:
                artifact.save_prompt(rows, folder / artifact.PROMPT_FILE, placed)
        artifact.dump(result, folder / "result.json")

    run_on_process_0(write)


def save_own_prompts(run: Run, rows: np.ndarray, folder: Path, metadata: dict[str, str]) -> None:
    """Write the prompt of each task of a mixture as if the task had had a run of its own."""
    for task, own in zip(run.tasks, np.split(rows, len(run.tasks)), strict=True):
        settings = run.model_copy(update={"task": task}).model_dump(mode="json")
        path = artifact.own_prompt_file(folder, task.name)
        path.parent.mkdir(exist_ok=True)
        artifact.save_prompt(own, path, metadata | {"task": task.name, "settings": json.dumps(settings)})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl` as dictionaries with a `step`; none where there is no file.

    A line is skipped if it is not JSON: the last one of a run that was killed, or that is being written.
    """
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def scores_in(folder: Path, run: Run) -> dict[int, tuple[float, float | None]]:
    """Return the score and the loss of each validation in a run's `metrics.jsonl`, by step. Older runs have no loss."""
    lines = (line for line in read_metrics(folder / "metrics.jsonl") if "validation" in line)
    return {line["step"]: (run_score(run, line["validation"]), line["validation"].get("loss")) for line in lines}


class Log:
    """`metrics.jsonl` and TensorBoard events; what a killed run wrote past its checkpoint is dropped.

    Only the first process writes.
    """

    def __init__(self, folder: Path, first: int, validated: bool = True):
        """Go on after step `first`; unless that is `validated`, its validation is written anew."""
        from tensorboardX import SummaryWriter

        self._path = folder / "metrics.jsonl"
        self._before, self._start = 0.0, time.monotonic()
        self._events: Any = None
        if not is_first():
            return
        if self._path.exists():
            kept = []
            for line in read_metrics(self._path):
                if line["step"] <= first and first > 0 and (validated or line["step"] < first or "loss" in line):
                    kept.append(line)
                    self._before = line.get("seconds", self._before)
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
            partial.replace(self._path)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=first or None)

    def seconds(self) -> float:
        """Return the seconds of this run, those before a restart included."""
        return self._before + time.monotonic() - self._start

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, and its numbers as curves."""
        if self._events is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if isinstance(value, dict):
                for inner, number in value.items():
                    self._events.add_scalar(f"{name}/{inner}", number, line["step"])
            elif name != "step":
                self._events.add_scalar(name, value, line["step"])
        self._events.flush()  # what a kill loses of a curve would not be drawn again

    def close(self) -> None:
        """End the curves."""
        if self._events is not None:
            self._events.close()


def create_folder(folder: Path) -> None:
    """Create a run's folder, empty, so that it can be locked."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; expected a folder for the run; use another --out")
    with _written(folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_folder(run: Run, folder: Path, checkpoints: str | Path | None = None) -> dict[str, Any] | None:
    """Refuse a folder that is not this run's, and return the result if the run is finished; nothing is written.

    A folder of the same settings with fewer `steps` goes on from its last checkpoint in `checkpoints`, where the
    learning rates up to there are those of a run of so many steps. (With dropout it is not to the bit the longer run:
    the number of compiled shapes, on which masks depend, is chosen by `steps`, too.) Without `checkpoints`, as in a
    sweep, other `steps` are refused like any other setting.
    """
    settings, result = folder / "config.yaml", folder / "result.json"
    if not settings.exists():
        if folder.exists() and {path.name for path in folder.iterdir()} - {"config.partial"}:
            raise UserError(f"{folder}: is not empty and no run; expected a new folder; use another --out")
        return None
    saved = _read_settings(settings)
    old, new = (each.model_dump(mode="json", exclude=set(UNHASHED_SETTINGS)) for each in (saved, run))
    changed = differences(old, new)
    if not changed:
        return json.loads(result.read_text()) if result.exists() else None
    if checkpoints is None or run.steps < saved.steps or old | {"steps": run.steps} != new:
        raise UserError(
            f"{folder}: was made with other settings ({'; '.join(changed[:6])}); "
            "expected the same; use another --out, or delete the folder"
        )
    with contextlib.closing(Checkpoints(checkpoints, read_only=True)) as opened:
        _check_longer(saved, run, folder, opened.latest(), result.exists())
    return None


def _check_longer(saved: Run, run: Run, folder: Path, latest: int | None, finished: bool) -> None:
    """Refuse to make a run longer whose steps so far would have been others."""
    before = jnp.arange(latest or 0)
    old, new = (np.asarray(each.schedule.build(1.0, each.steps)(before)) for each in (saved, run))
    reason = None
    if finished and latest is None:
        reason = "its checkpoints are gone, or belong to a sweep's group"
    elif run.pretraining is not None:
        reason = "the stages of pre-training are shares of all steps"
    elif not np.array_equal(old, new):
        reason = f"its {run.schedule.decay} decay was that of {saved.steps} steps; only other schedules go on"
    if reason is not None:
        raise UserError(
            f"{folder}: cannot go on from {saved.steps} to {run.steps} steps ({reason}); "
            "expected the same steps; use another --out"
        )


@contextlib.contextmanager
def begin_folder(run: Run, folder: Path, send: Callable[[], None] = lambda: None) -> Iterator[Callable[[], None]]:
    """Write `config.yaml` into a checked folder; an error before the yielded function is called takes it back.

    So a command that fails before its first step leaves no settings behind that the corrected one would not fit. The
    result of a run that is made longer is removed first: a kill in between leaves an unfinished run of fewer steps.
    `send` is called after each change.
    """
    settings, result, partial = (folder / name for name in ("config.yaml", "result.json", "config.partial"))
    before = {path: path.read_bytes() for path in (settings, result) if path.exists()}
    begun = False

    def begin() -> None:
        nonlocal begun
        begun = True

    try:
        if settings not in before or _read_settings(settings).steps != run.steps:
            with _written(folder):
                result.unlink(missing_ok=True)
                partial.write_text(to_yaml(run))
                partial.replace(settings)
            send()
        yield begin
    except BaseException:
        if not begun:
            if settings not in before:  # the folder was empty
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path, old in before.items():
                path.write_bytes(old)
            send()
        raise


def _read_settings(path: Path) -> Run:
    """Read a saved config; settings that are newer than it have their defaults."""
    return config.parse(Run, config.read(path), str(path))


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); expected a writable folder") from None
