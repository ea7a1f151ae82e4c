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
from softprompt_jax.paper.measures import MEASURES, Values, add_means, columns, targets
from softprompt_jax.statistics import mean_sd_text, score_statistics
from softprompt_jax.tasks import load, splits
from softprompt_jax.training.run_folder import read_result
from softprompt_jax.training.sweep import Member

if TYPE_CHECKING:
    from softprompt_jax.paper.experiments import Grid, Reported


def label(member: Member) -> str:
    """Name a run by its line, point, task and seed."""
    *names, seed = (member.varied[key] for key in ("line", "point", "task", "seed"))
    return ", ".join([*filter(None, names), f"seed {seed}"])


def collect(grid: Grid, members: Sequence[Member], runs: Path) -> dict[str, Any]:
    """Return what the finished runs of a grid come to, each in its folder in `runs`."""
    finished = {member.name: result for member in members if (result := read_result(runs / member.name)) is not None}
    there = [member for member in members if member.name in finished]
    values, extra = MEASURES[grid.measure](grid, members, runs)
    add_means(grid, values)
    # Of runs that trained together each states the time of all.
    seconds = [result["seconds"] / result.get("together", 1) for result in finished.values()]
    return {
        "metric": _metric(grid, members),
        "seeds": 1 + max((member.varied["seed"] for member in members), default=0),
        "cells": len(there),
        "missing": [label(member) for member in members if member.name not in finished],
        "lines": cells(grid, values),
        "majority": _majority(grid, there),
        **extra,
        "seconds_per_run": round(statistics.mean(seconds), 1) if seconds else None,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "softprompt_jax": softprompt_jax.__version__}
        | {package: version(package) for package in ("jax", "flax", "optax")},
    }


def cells(grid: Grid, values: Values) -> dict[str, dict[str, Any]]:
    """Return the statistics by line and column, null where no seed is finished."""
    lines: dict[str, dict[str, Any]] = {}
    for name in [*grid.lines, *(grid.means if grid.measure == "ensemble" else ())]:
        line = grid.lines.get(name)
        own = None if line is None or line.points is None else {*line.points, *grid.means}
        found = {column: percent_statistics(each) for column, each in values.get(name, {}).items()}
        planned = [column for column in columns(grid) if own is None or column in own]
        lines[name] = found if all(column in found for column in planned) else dict.fromkeys(planned) | found
    return lines


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


def table(lines: dict[str, dict[str, Any]], reported: Reported | None = None, counts: bool = False) -> str:
    """Write cells as a Markdown table: a row for each line, mean ± sd over the seeds, empty where none is finished.

    `reported`: these values stand in brackets behind ours, lines that only they have below ours. `counts`: with the
    number of seeds of each cell.
    """
    published = {} if reported is None else reported.lines
    fullest = sorted([*lines.values(), *published.values()], key=len, reverse=True)  # has the columns in their order
    shown = list(dict.fromkeys(column for line in fullest for column in line))
    rows = [f"| {' | '.join(['', *shown])} |", f"|{'---|' * (1 + len(shown))}"]
    for line in dict.fromkeys([*lines, *published]):
        own, others = lines.get(line, {}), published.get(line, {})
        written = (_cell(own.get(column), others.get(column), counts) for column in shown)
        rows.append(f"| {' | '.join([line, *written])} |")
    return "\n".join(rows)


def _cell(found: dict[str, Any] | None, published: Sequence[float] | None, counts: bool) -> str:
    own = "" if found is None else mean_sd_text(found) + (f" (n {len(found['values'])})" if counts else "")
    digits = ((value, 1 if round(value, 1) == value else 2) for value in published or ())
    said = "" if published is None else f"[{' ± '.join(f'{value:.{count}f}' for value, count in digits)}]"
    return " ".join(filter(None, (own, said)))
