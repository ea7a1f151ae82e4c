"""What a run leaves in its folder: settings, `metrics.jsonl`, curves, everything trained, prompts, `result.json`."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt_jax import config
from softprompt_jax.checkpoints import artifact
from softprompt_jax.config import UserError, differences, settings_hash, to_yaml
from softprompt_jax.distributed import mesh as sharding
from softprompt_jax.distributed.multihost import is_first, on_first
from softprompt_jax.inference.evaluate import headline
from softprompt_jax.methods import Split, finish
from softprompt_jax.run import MACHINE, Run


def leave_files(
    run: Run, folder: Path, identity: str, parts: Split, trainable: dict[str, Any], result: dict[str, Any]
) -> None:
    """Write what a finished run leaves for others: everything trained, prompts, and last `result.json`."""
    whole = jax.tree.map(lambda leaf: jnp.asarray(sharding.gather(leaf)), trainable)
    final = parts.merge(whole, parts.frozen)
    metadata = {
        "backbone": identity,
        "task": run.task_name,
        "settings_hash": settings_hash(run, without=MACHINE),
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

    on_first(write, str(folder))


def save_own_prompts(run: Run, rows: np.ndarray, folder: Path, metadata: dict[str, str]) -> None:
    """Write the prompt of each task of a mixture as if the task had had a run of its own."""
    for task, own in zip(run.tasks, np.split(rows, len(run.tasks)), strict=True):
        settings = run.model_copy(update={"task": task}).model_dump(mode="json")
        path = artifact.own_prompt_file(folder, task.name)
        path.parent.mkdir(exist_ok=True)
        artifact.save_prompt(own, path, metadata | {"task": task.name, "settings": json.dumps(settings)})


def scores_in(folder: Path, run: Run) -> dict[int, float]:
    """Return the score of each validation in a run's `metrics.jsonl`, by step."""
    path, found = folder / "metrics.jsonl", {}
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # the last line of a killed run
            line = json.loads(text)
            if "validation" in line:
                found[line["step"]] = headline(run, line["validation"])
    return found


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
            for text in self._path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except ValueError:  # the last line of a killed run
                    continue
                if line["step"] <= first and first > 0 and (validated or line["step"] < first or "loss" in line):
                    kept.append(text)
                    self._before = line.get("seconds", self._before)
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(f"{text}\n" for text in kept))
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


def default_folder(run: Run, runs: Path = Path("runs")) -> Path:
    """Return the folder of a run that states none: `runs/HASH`, or what an older version called the same settings."""
    name = settings_hash(run, without=MACHINE)
    return runs / (name if (runs / name).exists() else folders_by_hash(runs).get(name, name))


def folders_by_hash(runs: Path) -> dict[str, str]:
    """Return the folders in `runs` that are named by a hash, by the hash that their settings have in this version."""
    found = {}
    for path in sorted(runs.glob("*/config.yaml")):
        if re.fullmatch("[0-9a-f]{12}", path.parent.name):
            with contextlib.suppress(UserError):  # settings that this version refuses
                saved = config.parse(Run, config.read(path), str(path))
                found[settings_hash(saved, without=MACHINE)] = path.parent.name
    return found


def at_saved_revisions(run: Run, folder: Path) -> Run:
    """Return a run at the revisions of hub data that its folder's `config.yaml` states."""
    path = folder / "config.yaml"
    return run.at_revisions_of(config.parse(Run, config.read(path), str(path)))


def prepare_folder(run: Run, folder: Path) -> dict[str, Any] | None:
    """Create a run's folder; return the result if it is finished; refuse one with other settings."""
    settings, partial = folder / "config.yaml", folder / "config.partial"
    if settings.exists():
        saved = config.parse(Run, config.read(settings), str(settings))  # fills in settings that are newer than it
        pair = (saved, run.at_revisions_of(saved))
        old, new = (each.model_dump(mode="json", exclude=set(MACHINE)) for each in pair)
        changed = differences(old, new)
        if changed:
            raise UserError(
                f"{folder}: was made with other settings ({'; '.join(changed[:6])}); "
                "expected the same; use another --out, or delete the folder"
            )
        finished = folder / "result.json"
        return json.loads(finished.read_text()) if finished.exists() else None
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; expected a folder for the run; use another --out")
    try:
        if folder.exists() and set(folder.iterdir()) - {partial}:
            raise UserError(f"{folder}: is not empty and no run; expected a new folder; use another --out")
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(to_yaml(run.pinned()))
        partial.replace(settings)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); expected a writable folder") from None
    return None
