"""Text-to-text tasks by name: `tasks.get("sentiment_movie")`, `tasks.load(task, "train")`.

The files `*.yaml` here hold the named tasks. A key is a name; its value is what `task:` of a run may hold, so that it
can be copied from here and changed. To add a task, write its settings into one of the files, or a new file.
Python is needed only for what settings cannot say: `data/preprocessors.py` (how a row becomes other rows, and a
prediction an answer) and `data/readers.py` (how the files of a package become rows).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt_jax import config
from softprompt_jax.config import UserError, nearest, parse
from softprompt_jax.data.seqio_source import Seqio
from softprompt_jax.data.task import SEQIO, Example, Task, load, splits

__all__ = ["Example", "Task", "complete", "get", "load", "names", "resolve", "splits"]


@functools.cache
def _settings() -> dict[str, dict[str, Any]]:
    """Read the settings of all named tasks."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        found |= config.read(path)
    return found


def names() -> list[str]:
    """Return the names of all tasks."""
    return sorted(_settings())


@functools.cache
def get(name: str) -> Task:
    """Return a task by its name; an unknown name is a UserError with the nearest ones."""
    if name not in _settings():
        raise UserError(f"task {name!r}: unknown; expected one of {', '.join(names())}{nearest(name, names())}")
    return parse(Task, {"name": name} | _settings()[name], f"task {name}")


def complete(value: Any) -> Any:
    """Return a mapping without a source as the named task with these settings in the stead of its own.

    `{kind: seqio, name: ..., module: ...}` is a seqio Task with its own metrics, and further settings as in any task.
    """
    if not isinstance(value, Mapping) or "source" in value or "name" not in value:
        return value
    if value.get("kind") == "seqio":
        source = {key: value[key] for key in Seqio.model_fields if key in value}
        rest = {key: item for key, item in value.items() if key not in source or key == "name"}
        return {"source": source, "input": "{inputs}", "target": "{targets}", "metrics": [SEQIO], **rest}
    return {**get(str(value["name"])).model_dump(), **value}


def resolve(value: Any, where: str = "task") -> Task:
    """Return the task that a run's settings state: a name, a mapping of settings, or a task already."""
    if isinstance(value, str):
        return get(value)
    return value if isinstance(value, Task) else parse(Task, complete(value), where)
