"""Text-to-text tasks by name: `tasks.get("sentiment_movie")`, `tasks.load(task, "train")`.

A new task is a file here with a dict `TASKS`, listed below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprompt_jax.config import UserError, nearest, parse
from softprompt_jax.data.seqio_source import Seqio
from softprompt_jax.data.task import SEQIO, Example, Task, load, splits
from softprompt_jax.tasks import (
    generation,
    glue,
    inference,
    paraphrase,
    question_answering,
    rewriting,
    sentiment,
    spam,
    superglue,
)

__all__ = ["Example", "Task", "complete", "get", "load", "names", "resolve", "splits"]

_FILES = (superglue, glue, question_answering, inference, generation, rewriting, sentiment, paraphrase, spam)
_TASKS: dict[str, Task] = {name: task for file in _FILES for name, task in file.TASKS.items()}


def names() -> list[str]:
    """Return the names of all tasks."""
    return sorted(_TASKS)


def get(name: str) -> Task:
    """Return a task by its name; an unknown name is a UserError with the nearest ones."""
    if name not in _TASKS:
        raise UserError(f"task {name!r}: unknown; expected one of {', '.join(names())}{nearest(name, _TASKS)}")
    return _TASKS[name]


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
