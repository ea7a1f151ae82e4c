"""Text-to-text tasks by name: `tasks.get("sentiment_movie")`, `tasks.load(task, "train")`.

A new task is a file here with a dict `TASKS`, listed below.
"""

from __future__ import annotations

from typing import Any

from softprompt_jax.config import UserError, nearest, parse
from softprompt_jax.tasks import sentiment, spam
from softprompt_jax.tasks.task import Example, Task, load, splits

__all__ = ["Example", "Task", "get", "load", "names", "resolve", "splits"]

_TASKS: dict[str, Task] = {**sentiment.TASKS, **spam.TASKS}


def names() -> list[str]:
    """Return the names of all tasks."""
    return sorted(_TASKS)


def get(name: str) -> Task:
    """Return a task by its name; an unknown name is a UserError with the nearest ones."""
    if name not in _TASKS:
        raise UserError(f"task {name!r}: unknown; expected one of {', '.join(names())}{nearest(name, _TASKS)}")
    return _TASKS[name]


def resolve(value: Any, where: str = "task") -> Task:
    """Return the task that a run's settings state: a name, a mapping of settings, or a task already."""
    return get(value) if isinstance(value, str) else value if isinstance(value, Task) else parse(Task, value, where)
