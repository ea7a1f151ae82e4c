"""The result of an experiment: its finished runs as values by line and column, mean, sd and the majority class."""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import softprompt_jax
from softprompt_jax.data.metrics import most_frequent
from softprompt_jax.data.task import Task
from softprompt_jax.inference.evaluate import mean_score, score
from softprompt_jax.paper.measures import MEASURES, columns, targets
from softprompt_jax.statistics import mean_sd_text, score_statistics
from softprompt_jax.tasks import load, splits
from softprompt_jax.training.run_folder import read_result
from softprompt_jax.training.sweep import Member

if TYPE_CHECKING:
    from softprompt_jax.paper.experiments import Grid


def label(member: Member) -> str:
    """Name a run by its line, point, task and seed."""
    *names, seed = (member.varied[key] for key in ("line", "point", "task", "seed"))
    return ", ".join([*filter(None, names), f"seed {seed}"])


def collect(grid: Grid, members: Sequence[Member], runs: Path) -> dict[str, Any]:
    """Return what the finished runs of a grid come to, each in its folder in `runs`."""
    finished = {member.name: result for member in members if (result := read_result(runs / member.name)) is not None}
    there = [member for member in members if member.name in finished]
    values, extra = MEASURES[grid.measure](grid, members, runs)
    # Of runs that trained together each states the time of all.
    seconds = [result["seconds"] / result.get("together", 1) for result in finished.values()]
    return {
        "metric": _metric(grid, members),
        "seeds": 1 + max((member.varied["seed"] for member in members), default=0),
        "cells": len(there),
        "missing": [label(member) for member in members if member.name not in finished],
        "lines": {line: _cells(grid, line, values.get(line, {})) for line in grid.lines},
        "majority": _majority(grid, there),
        **extra,
        "seconds_per_run": round(statistics.mean(seconds), 1) if seconds else None,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "softprompt_jax": softprompt_jax.__version__}
        | {package: version(package) for package in ("jax", "flax", "optax")},
    }


def _cells(grid: Grid, name: str, values: dict[str, list[float]]) -> dict[str, Any]:
    """Return the statistics of a line by column, null where no seed is finished."""
    own = grid.lines[name].points if grid.measure == "score" else None
    planned = [column for column in columns(grid) if own is None or column in own]
    found = {column: percent_statistics(each) for column, each in values.items()}
    return found if all(column in found for column in planned) else dict.fromkeys(planned) | found


def percent_statistics(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None of one value) and the values, all in percent with two digits."""
    percent = [round(100 * value, 2) for value in values]
    found = score_statistics(percent)
    sd = None if found["sd"] is None else round(found["sd"], 2)
    return {"mean": round(found["mean"], 2), "sd": sd, "values": percent}


def _metric(grid: Grid, members: Sequence[Member]) -> str:
    """Say what is averaged: the mean of a task's metrics, or the first metric of a task that transfer is scored on."""
    if grid.measure == "transfer":
        return " and ".join(dict.fromkeys(task.metrics[0] for task in targets(grid).values()))
    joined = {task.name: " and ".join(task.metrics) for member in members for task in member.run.tasks}
    named = {name: f"mean of {metrics}" if " and " in metrics else metrics for name, metrics in joined.items()}
    if len(set(named.values())) == 1:
        return next(iter(named.values()))
    return "; ".join(f"{name}: {metrics}" for name, metrics in named.items())


def _majority(grid: Grid, finished: Sequence[Member]) -> dict[str, float]:
    """Return the score of the most frequent label of the train split, in percent, in the table's metric.

    By task, or by column where runs are scored on several tasks; tasks without label words are left out.
    """
    transfer = grid.measure == "transfer"
    scored = targets(grid) if transfer else {task.name: task for member in finished for task in member.run.tasks}
    limit = finished[0].run.result_examples if finished else None
    levels = {n: _majority_score(task.model_dump_json(), transfer, limit) for n, task in scored.items() if finished}
    return {name: round(100 * level, 2) for name, level in levels.items() if level is not None}


@functools.cache
def _majority_score(task_json: str, first_metric: bool, limit: int | None) -> float | None:
    task = Task.model_validate_json(task_json)
    known = splits(task)
    if task.words is None or "train" not in known:
        return None
    examples = load(task, "test" if "test" in known else "validation")[:limit]
    answer = most_frequent(example.target for example in load(task, "train"))
    scores = score(task, [answer] * len(examples), examples)
    return scores[task.metrics[0]] if first_metric else mean_score(task, scores)


def table(result: dict[str, Any]) -> str:
    """Write a result as a Markdown table: a row for each line, mean ± sd over the seeds."""
    fullest = sorted(result["lines"].values(), key=len, reverse=True)  # has the columns in their order
    shown = list(dict.fromkeys(column for line in fullest for column in line))
    if not any(cell for line in fullest for cell in line.values()):
        return "(no result yet)"
    lines = [f"| {' | '.join(['', *shown])} |", f"|{'---|' * (1 + len(shown))}"]
    for line, values in result["lines"].items():
        cells = (mean_sd_text(cell) if (cell := values.get(column)) else "" for column in shown)
        lines.append(f"| {' | '.join([line, *cells])} |")
    return "\n".join(lines)
