"""The experiments of Lester et al. (2021): a grid of changes over a base config, trained, measured and written as JSON.

An experiment is data (`configs/paper/NAME.yaml`): lines, points and tasks, each a few changed settings, times seeds.
It has two forms: `published`, on hub models for a TPU, and `miniature`, on the embedded backbone and text out of
packages. Runs are filed by the hash of their settings, so that experiments share those they have in common.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

import softprompt_jax
from softprompt_jax import config
from softprompt_jax.checkpoints import artifact
from softprompt_jax.config import Settings, UserError, nearest
from softprompt_jax.paper import measures
from softprompt_jax.paper.measures import Member
from softprompt_jax.run import load_run

if TYPE_CHECKING:
    from softprompt_jax.data.task import Task

FormName = Literal["miniature", "published"]
Changes = dict[str, Any]  # dotted settings, as on the command line
HERE = Path("configs") / "paper"


class Line(Settings):
    """A line (or a group of bars) of a figure, a row of a table."""

    base: str | None = None  # another config than the form's
    change: Changes = Field(default={})
    points: list[str] | None = None  # only these of the form's
    tasks: dict[str, Changes] | None = None  # others than the form's; {} for one run that states its task itself
    read: Literal["trained", "untrained"] = "trained"  # untrained: the score before the first step


class Grid(Settings):
    """The runs of an experiment: lines x points x tasks x seeds, and what is read off them.

    `{line}` and `{point}` in the texts of changes stand for the names of the run's line and point.
    `measure`: "score" is the result's mean metric; "transfer" scores what each task's run learnt on the tasks of
    `score_on`; "ensemble" lets the seeds vote; "neighbours" reads prompts as pieces of the vocabulary; "mixed" answers
    all tasks in common batches.
    """

    base: str  # config, relative to the experiment's file
    change: Changes = Field(default={})
    lines: dict[str, Line] = Field(min_length=1)
    points: dict[str, Changes] = Field(default={"": {}})
    tasks: dict[str, Changes] = Field(default={})
    seeds: int = Field(3, gt=0)
    measure: Literal["score", "transfer", "ensemble", "neighbours", "mixed"] = "score"
    score_on: dict[str, list[str]] = Field(
        default={}
    )  # of transfer: the task that was trained on, and those to score it on
    cost: str  # what all of it takes, and on what

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        if set(self.score_on) != (set(self.tasks or {"": None}) if self.measure == "transfer" else set()):
            raise ValueError(
                "score_on names where each of `tasks` is scored with measure: transfer; expected all or none"
            )
        for name, line in self.lines.items():
            if strange := [point for point in line.points or () if point not in self.points]:
                raise ValueError(f"lines.{name}: no point {strange[0]!r}; expected some of {', '.join(self.points)}")
        return self


class Experiment(Settings):
    """A figure or table of the paper."""

    title: str
    source: str  # where in the paper
    question: str
    plot: Literal["lines", "bars"] = "bars"
    x: str = ""  # what the points are
    published: Grid
    miniature: Grid
    found: list[str] = Field(default=[])  # what the result says, by hand; the README has the first

    @field_validator("found")
    @classmethod
    def _sentences(cls, found: list[str]) -> list[str]:
        if any(not text.endswith(".") for text in found):
            raise ValueError("expected sentences, each with its full stop")
        return found

    def grid(self, name: FormName) -> Grid:
        """Return one of the two forms."""
        return self.published if name == "published" else self.miniature


def folder() -> Path:
    """Return the folder of the experiments: that of the working directory, or of the checkout."""
    for found in (HERE, Path(__file__).resolve().parents[2] / HERE):
        if found.is_dir():
            return found
    raise UserError(f"{HERE}: no such folder; expected a checkout of softprompt_jax; go there, or give a file")


def experiments() -> dict[str, Path]:
    """Return the file of each experiment by its name; a config beside them without `published:` is a plain run."""
    files = sorted(folder().glob("*.yaml"))
    return {path.stem: path for path in files if "\npublished:\n" in path.read_text(encoding="utf-8")}


def load(name: str) -> tuple[Experiment, Path]:
    """Read an experiment by its name or its file; also return the file."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = experiments()
        if name not in known:
            raise UserError(f"experiment {name!r}: unknown; expected one of {', '.join(known)}{nearest(name, known)}")
        path = known[name]
    return config.parse(Experiment, config.read(path), str(path)), path


def members(form: Grid, path: Path, seeds: int | None = None) -> Iterator[Member]:
    """Yield every run of a form: all of one seed before the next, so that a part of it compares like with like.

    A run that two lines have in common comes twice. Errors: UserError naming the line for settings that are wrong.
    """
    for seed in range(seeds or form.seeds):
        for (name, line), (point, change) in itertools.product(form.lines.items(), form.points.items()):
            if line.points is not None and point not in line.points:
                continue
            tasks = form.tasks if line.tasks is None else line.tasks
            for task, own in (tasks or {"": {}}).items():
                changes = {**({"task": task} if task else {}), **form.change, **line.change, **change, **own}
                named = {"{line}": name, "{point}": point}
                overrides = [f"{key}={_filled(value, named)}" for key, value in (changes | {"seed": seed}).items()]
                try:
                    run = load_run(path.parent / (line.base or form.base), overrides)
                except UserError as error:
                    raise UserError(f"{path}: {', '.join(filter(None, (name, point, task)))}: {error}") from None
                yield Member(name, point, task, seed, line.read, run)


def _filled(value: Any, named: dict[str, str]) -> str:
    text = json.dumps(value, ensure_ascii=False)
    for field, name in named.items():
        text = text.replace(field, name)
    return text


def write_configs(name: str, form_name: FormName, to: Path, seeds: int | None = None) -> list[Path]:
    """Write each run of a form as a config, for `softprompt train` or `plan` on another machine; return the files."""
    experiment, path = load(name)
    to.mkdir(parents=True, exist_ok=True)
    written = {}
    for member in members(experiment.grid(form_name), path, seeds):
        file = to / f"{member.name}.yaml"
        if file not in written:
            file.write_text(f"# {experiment.title}: {member.label}\n{config.to_yaml(member.run)}", encoding="utf-8")
        written[file] = None
    return list(written)


def distinct_steps(members: Iterator[Member], of_one_size: bool = False) -> dict[str, list[Member]]:
    """Group runs by what their compiled steps depend on: not on seeds, texts, losses and numbers of steps.

    `of_one_size`: by what their memory and time depend on, which weights, rates and initial values do not change.
    """
    from softprompt_jax.analysis.plan import backbone_settings, kept_as

    found: dict[str, list[Member]] = {}
    for member in members:
        settings = member.run.model_dump(mode="json", exclude={"seed", "task", "loss", "steps"})
        if of_one_size:
            settings["backbone"] = backbone_settings(member.run).model_dump(mode="json")
            settings["quantize"] = kept_as(member.run)
            settings["methods"] = [method | {"init": None} for method in settings["methods"]]
            settings["optimizer"] |= dict.fromkeys(("learning_rate", "weight_decay", "step_origin"))
            settings |= dict.fromkeys(("schedule", "target_sentinel"))
        key = json.dumps([settings, len(member.run.tasks)], sort_keys=True)
        found.setdefault(hashlib.sha256(key.encode()).hexdigest()[:16], []).append(member)
    return found


def plan_experiment(
    name: str,
    form_name: FormName,
    runs: Path,
    topologies: Sequence[str],
    seeds: int | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Compile each step of an experiment that differs in size for each topology, ahead of time (`plan.plan`).

    Returns for each step its `lines` and `points`, the number of runs (`runs`), and `plans`: what `plan.plan` says, by
    topology. What has been compiled is kept in `runs`/plans, whichever experiment asked for it.
    """
    from softprompt_jax.analysis.plan import plan

    experiment, path = load(name)
    steps = distinct_steps(members(experiment.grid(form_name), path, seeds), of_one_size=True)
    (runs / "plans").mkdir(parents=True, exist_ok=True)
    answers = []
    for number, (key, shared) in enumerate(steps.items(), 1):
        plans = {}
        for topology in topologies:
            kept = runs / "plans" / f"{key}-{topology.replace(':', '-')}.json"
            if not kept.exists():
                tell(f"{number}/{len(steps)} {shared[0].label}: compiling for {topology}")
                settings = kept.with_suffix(".yaml")
                settings.write_text(config.to_yaml(shared[0].run), encoding="utf-8")
                artifact.dump(plan(str(settings), [], [topology])[0], kept)
            plans[topology] = json.loads(kept.read_text())
        names = {
            "lines": list(dict.fromkeys(member.line for member in shared)),
            "points": list(dict.fromkeys(member.point for member in shared if member.point)),
        }
        answers.append(names | {"runs": len({member.name for member in shared}), "plans": plans})
    return answers


def run_experiment(
    name: str,
    form_name: FormName,
    runs: Path,
    to: Path,
    seeds: int | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train what is missing of an experiment, and write what is finished so far to `to` after each run.

    The same command goes on where a killed one stopped. Returns what was written: for every line and column the values
    of the seeds (percent), their mean and standard deviation, and what is not there yet (`missing`).
    """
    from softprompt_jax.training.loop import train

    experiment, path = load(name)
    form = experiment.grid(form_name)
    grid = list(members(form, path, seeds))
    result = collect(path.stem, form_name, experiment, grid, runs)
    for number, member in enumerate(grid, 1):
        place = runs / member.name
        if not (place / "result.json").exists():
            tell(f"{number}/{len(grid)} {member.label}: {place}")
            try:
                train(member.run, place)
            except config.Diverged as error:  # it stays missing
                tell(f"{place}: {error}")
        result = collect(path.stem, form_name, experiment, grid, runs)
        artifact.dump(result, to)
    return result


def collect(name: str, form_name: FormName, experiment: Experiment, grid: list[Member], runs: Path) -> dict[str, Any]:
    """Return the result of the runs of a grid that are finished."""
    form = experiment.grid(form_name)
    finished = [member for member in grid if (runs / member.name / "result.json").exists()]
    extra: dict[str, Any] = {}
    if form.measure in ("score", "transfer"):
        values = _per_seed(finished, grid, form, runs)
    else:
        values, extra = measures.MEASURES[form.measure](finished, grid, runs)
    results = [json.loads((runs / member.name / "result.json").read_text()) for member in finished]
    return {
        "experiment": name,
        "form": form_name,
        "title": experiment.title,
        "metric": _metric(grid, form),
        "seeds": 1 + max((member.seed for member in grid), default=0),
        "cells": len(finished),
        "missing": [member.label for member in grid if member not in finished],
        "lines": {
            line: {column: percent_statistics(found) for column, found in columns.items()}
            for line, columns in values.items()
        },
        "majority": _majority(finished, form),
        **extra,
        "seconds_per_run": round(statistics.mean(r["seconds"] for r in results), 1) if results else None,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "softprompt_jax": softprompt_jax.__version__}
        | {package: version(package) for package in ("jax", "flax", "optax")},
    }


def percent_statistics(values: list[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None of one value) and the values, in percent."""
    percent = [round(100 * value, 2) for value in values]
    deviation = round(statistics.stdev(percent), 2) if len(percent) > 1 else None
    return {"mean": round(statistics.mean(percent), 2), "sd": deviation, "values": percent}


def _per_seed(finished: list[Member], grid: list[Member], form: Grid, runs: Path) -> measures.Values:
    """The values of each line and column by seed, several tasks' mean; a seed counts when all of them are finished."""
    found: dict[tuple[str, str, int], list[float]] = {}
    wanted = collections.Counter((member.line, member.point, member.seed) for member in grid)
    there = collections.Counter((member.line, member.point, member.seed) for member in finished)
    for member in finished:
        if form.measure == "transfer":
            for column, value in _transfers(member, form, runs):
                found[member.line, column, member.seed] = [value]
        elif there[member.line, member.point, member.seed] == wanted[member.line, member.point, member.seed]:
            found.setdefault((member.line, member.point or "score", member.seed), []).append(_score(member, runs))
    values: measures.Values = {}
    for (line, column, _), of_tasks in found.items():
        values.setdefault(line, {}).setdefault(column, []).append(statistics.mean(of_tasks))
    return values


def _score(member: Member, runs: Path) -> float:
    """The mean metric of a run's result, after training or before."""
    from softprompt_jax.inference.evaluate import mean_score

    result = json.loads((runs / member.name / "result.json").read_text())
    scores = result[result["baselines"]["split"]] if member.read == "trained" else result["baselines"]["untrained"]
    return scores["mean"] if "tasks" in scores else mean_score(member.run.tasks[0], scores)


def _transfers(member: Member, form: Grid, runs: Path) -> Iterator[tuple[str, float]]:
    """The scores of what a run has learnt on other tasks; they are kept in its folder."""
    from softprompt_jax.inference.predictor import load_predictor
    from softprompt_jax.tasks import resolve, splits

    kept = runs / member.name / "scored_on.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    predictor = None
    for target in form.score_on[member.task]:
        task = resolve(target)
        if target not in known:
            predictor = predictor or load_predictor(runs / member.name)
            known[target] = predictor.evaluate(task, "test" if "test" in splits(task) else "validation")
            artifact.dump(known, kept)
        yield _column(form, member.task, target), known[target][task.metrics[0]]


def _metric(grid: list[Member], form: Grid) -> str:
    """Say what is averaged: the mean of a task's metrics, or a target's first one."""
    if form.measure == "transfer":
        return " and ".join(dict.fromkeys(task.metrics[0] for task in _targets(form).values()))
    said = {task.name: " and ".join(task.metrics) for member in grid for task in member.run.tasks}
    said = {name: f"mean of {metrics}" if " and " in metrics else metrics for name, metrics in said.items()}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{name}: {metrics}" for name, metrics in said.items())


def _targets(form: Grid) -> dict[str, Task]:
    """Return the tasks of `score_on` by the column that they have in the table."""
    from softprompt_jax.tasks import resolve

    return {_column(form, of, target): resolve(target) for of, on in form.score_on.items() for target in on}


def _column(form: Grid, trained_on: str, target: str) -> str:
    return target if len(form.tasks) < 2 else f"{trained_on} to {target}"


def _majority(finished: list[Member], form: Grid) -> dict[str, float]:
    """The score of always giving the most frequent label of the train split, in percent, in the table's metric.

    By task, or by column where runs are scored on several; without those whose targets are no label words.
    """
    transfer = form.measure == "transfer"
    scored = _targets(form) if transfer else {task.name: task for member in finished for task in member.run.tasks}
    levels = {name: _level(task.model_dump_json(), transfer) for name, task in scored.items()} if finished else {}
    return {name: round(100 * level, 2) for name, level in levels.items() if level is not None}


@functools.cache
def _level(task_json: str, first_metric: bool) -> float | None:
    from softprompt_jax.data.metrics import most_frequent
    from softprompt_jax.data.task import Task
    from softprompt_jax.inference.evaluate import mean_score, score
    from softprompt_jax.tasks import load, splits

    task = Task.model_validate_json(task_json)
    known = splits(task)
    if task.words is None or "train" not in known:
        return None
    examples = load(task, "test" if "test" in known else "validation")
    label = most_frequent(example.target for example in load(task, "train"))
    scores = score(task, [label] * len(examples), examples)
    return scores[task.metrics[0]] if first_metric else mean_score(task, scores)


def table(result: dict[str, Any]) -> str:
    """Write a result as a Markdown table: a row for each line, mean ± sd over the seeds."""
    fullest = sorted(result["lines"].values(), key=len, reverse=True)  # has the columns in their order
    columns = list(dict.fromkeys(column for line in fullest for column in line))
    if not columns:
        return "(no result yet)"
    rows = [["", *columns]]
    for line, values in result["lines"].items():
        rows.append([line, *(written(values[column]) if column in values else "" for column in columns)])
    head = f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}"
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in rows[1:])])


def written(value: dict[str, Any]) -> str:
    """Write mean ± sd."""
    return f"{value['mean']:.1f}" + ("" if value["sd"] is None else f" ± {value['sd']:.1f}")


def listing() -> Iterator[str]:
    """Yield a line for each experiment: its runs and cost in both forms."""
    for name in experiments():
        experiment, path = load(name)
        yield f"{name:22} {experiment.title} ({experiment.source})"
        for form_name in ("miniature", "published"):
            form = experiment.grid(form_name)
            count = form.seeds * len({member.name for member in members(form, path, seeds=1)})
            yield f"{'':22} {form_name:10} {count:4} runs; {form.cost}"
