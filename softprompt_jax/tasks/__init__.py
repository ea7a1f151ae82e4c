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
from softprompt_jax.data.examples import Example
from softprompt_jax.data.sources import SHORT_FORMS
from softprompt_jax.data.task import Task, load, splits

__all__ = ["Example", "Task", "complete", "get", "load", "names", "resolve", "splits"]


@functools.cache
def _settings() -> dict[str, dict[str, Any]]:
    """Read the settings of all named tasks."""
    files = sorted(Path(__file__).parent.glob("*.yaml"))
    return {name: settings for path in files for name, settings in config.read(path).items()}


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

    `source: {revision: ...}`, without a kind, changes a part of the named task's source. `{kind: seqio, name: ...,
    module: ...}` is a seqio Task with its own metrics, and further settings as in any task. `inputs` of a task with a
    teacher is the file of its rows.
    """
    if not isinstance(value, Mapping):
        return value
    if value.get("kind") == "distill" and "inputs" in value:
        if "source" in value:
            raise UserError("task: found inputs and a source; expected one of them; leave the other out")
        return {key: item for key, item in value.items() if key != "inputs"} | {
            "source": {"kind": "inputs", "path": value["inputs"]}
        }
    source, kind = value.get("source", {}), SHORT_FORMS.get(str(value.get("kind", "")))
    if kind is not None and "source" not in value:
        own = {key: value[key] for key in kind.model_fields if key in value}
        rest = {key: item for key, item in value.items() if key not in own or key == "name"}
        return {"source": own, **kind.fixed, "metrics": [kind.own_metrics], **rest}
    if not isinstance(source, Mapping) or "kind" in source:
        return value
    if "name" not in value:
        raise UserError(
            f"task: found {', '.join(map(str, value))}; expected a source too, or the name of the task to change, "
            "as in {name: boolq, with_prefix: true}"
        )
    named = get(str(value["name"])).model_dump()
    return {**named, **value, "source": {**named["source"], **source}}


def short(task: Task) -> Any:
    """Return the shortest settings of a task: its name, what differs from the task of that name, or all of it."""
    if task.name not in names():
        stated = task.model_dump(mode="json", exclude_defaults=True)
        return stated | {"source": {"kind": task.source.kind, **stated["source"]}}
    named, own = (each.model_dump(mode="json") for each in (get(task.name), task))
    changes = {key: item for key, item in own.items() if item != named[key]}
    if "source" in changes and own["source"]["kind"] == named["source"]["kind"]:
        changes["source"] = {key: item for key, item in own["source"].items() if item != named["source"][key]}
    return {"name": task.name, **changes} if changes else task.name


def resolve(value: Any) -> Task:
    """Return the task that a run's settings state: a name, a mapping of settings, or a task already."""
    if isinstance(value, str):
        return get(value)
    return value if isinstance(value, Task) else parse(Task, complete(value), "task")
