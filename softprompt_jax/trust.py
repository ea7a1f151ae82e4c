"""What the settings inside a file may cause: nothing is fetched, imported or read at its word alone.

A prompt file, an adapter or a run's folder may come from anybody. What its settings ask for is done without a question
only if it ships with us (the source of a named task, checksum included; a packaged backbone), or is a backbone of
the hub, whose weights and tokenizer are data. All else needs the user's own word: `trust`, or that this user has
trained with the very same source, backbone or file on this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from softprompt_jax.checkpoints.artifact import Artifact, load_artifact
from softprompt_jax.checkpoints.packaged import PACKAGES
from softprompt_jax.config import UserError
from softprompt_jax.data.sources import Files, Folder, Inputs
from softprompt_jax.data.task import Task
from softprompt_jax.run import Run, Scratch
from softprompt_jax.tasks import get, names

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def check_task(task: Task, where: str, trust: bool) -> Task:
    """Return the task of a file whose rows are wanted. Errors: UserError where its source needs the user's word."""
    if not (trust or any(get(name).source == task.source for name in names()) or _is_remembered(_source(task))):
        asked = _short(task.source.model_dump(exclude_defaults=True))
        raise UserError(
            f"{where}: its settings ask for the data {task.source.kind} {asked}, which ships with no task of ours; "
            "nothing was read; expected your word; add --task NAME for a task of `softprompt tasks`, or --trust"
        )
    return task


def check_backbone(backbone: str | Scratch, where: str, trust: bool) -> None:
    """Refuse the backbone of a file's settings that is no hub name and not ours, without the user's word."""
    if trust or backbone == "embedded" or backbone in PACKAGES or _is_remembered(_backbone(backbone)):
        return
    named = isinstance(backbone, str)
    if named and _HUB_NAME.fullmatch(backbone) and not Path(backbone).exists():
        return
    asked = f"the backbone {_short(backbone)}" if named else "a backbone of random weights"
    raise UserError(
        f"{where}: its settings ask for {asked}; nothing was read; expected your word for what is none of the hub; "
        "add --backbone FOLDER, or --trust"
    )


def reader(where: str, trust: bool) -> Callable[[str], Artifact]:
    """Return what reads the prompts and runs that a file's methods name, such as those that they began with."""

    def read(source: str) -> Artifact:
        if not trust and not _is_remembered(("prompt", _absolute(source))):
            raise UserError(
                f"{where}: its settings ask for the file {_short(source)}; nothing was read; expected your word; "
                "add --trust"
            )
        return load_artifact(source)

    return read


def named_backbone(artifacts: Sequence[Artifact], given: str | None = None, trust: bool = False) -> str:
    """Return the backbone that is given, or the first that one of some artifacts says that it was trained on.

    Errors: UserError where none says one, or one that needs the user's word.
    """
    if given is not None:
        return given
    for one in artifacts:
        if (name := one.backbone) is not None:
            check_backbone(name, one.source, trust)
            return name
    raise UserError(f"{artifacts[0].source}: says no backbone; expected one; add --backbone with a folder or hub name")


def remember(run: Run) -> None:
    """Note what a run is trained with, so that its own settings are this user's word later on.

    Where nothing can be noted, later commands want --trust.
    """
    asked = [_backbone(run.backbone), *map(_source, run.tasks), *(("prompt", _absolute(path)) for path in _files(run))]
    with contextlib.suppress(OSError):
        for mark in map(_mark, asked):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def _files(run: Run) -> Iterator[str]:
    """Yield the prompts and runs that the methods of a run start from."""
    for method in run.methods:
        paths = [getattr(getattr(method, "init", None), "path", None), getattr(method, "source", None)]
        yield from (path for path in (*paths, *(getattr(method, "teachers", None) or ())) if path is not None)


def _source(task: Task) -> Any:
    values = task.source.model_dump(mode="json")
    if isinstance(task.source, Files | Folder | Inputs):
        return {name: _absolute(value) if isinstance(value, str) else value for name, value in values.items()}
    return values | ({"from": os.getcwd()} if "module" in values else {})  # a module of that name may lie elsewhere too


def _backbone(backbone: str | Scratch) -> Any:
    known = _absolute(backbone) if isinstance(backbone, str) else backbone.model_dump(mode="json")
    return ["backbone", known]


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _mark(asked: Any) -> Path:
    """Return the file that says that this user has asked for it; not in the cache, which people copy."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "softprompt_jax" / "asked" / hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _is_remembered(asked: Any) -> bool:
    return _mark(asked).is_file()


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 160 else f"{text[:157]}..."
