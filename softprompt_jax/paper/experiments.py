"""The experiments of Lester et al. (2021): a grid of changes over a base config, trained as a sweep, written as JSON.

An experiment is data (`configs/paper/NAME.yaml`): lines, points and tasks, each a few changed settings, times seeds.
It has two forms: `published`, on hub models for a TPU, and `miniature`, on the embedded backbone and text out of
packages. Runs are filed by the hash of their settings, so that experiments share those they have in common.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from softprompt_jax import config
from softprompt_jax.analysis import plan
from softprompt_jax.assembly import abstract_backbone_of
from softprompt_jax.checkpoints import artifact
from softprompt_jax.config import Settings, UserError, nearest, settings_hash
from softprompt_jax.files import writable
from softprompt_jax.models.quantized import quantization_of
from softprompt_jax.paper import results
from softprompt_jax.paper.measures import Measure
from softprompt_jax.progress import Reporter
from softprompt_jax.run import UNHASHED_SETTINGS, load_run
from softprompt_jax.training.run_folder import folders_by_hash
from softprompt_jax.training.sweep import Member, train_members

FormName = Literal["miniature", "published"]
Changes = dict[str, Any]  # dotted settings, as on the command line
HERE = Path("configs") / "paper"


class Line(Settings):
    """A line (or a group of bars) of a figure, a row of a table."""

    base: str | None = None  # another config than the grid's
    change: Changes = Field(default={})
    points: list[str] | None = None  # only these of the grid's
    tasks: dict[str, Changes] | None = None  # others than the grid's; {} for one run that states its task itself
    read: Literal["trained", "untrained"] = "trained"  # untrained: the score before the first step


class Grid(Settings):
    """The runs of an experiment: lines x points x tasks x seeds, and what is measured on them.

    `{line}` and `{point}` in the texts of changes stand for the names of the run's line and point.
    `measure`: "score" is the mean of a task's metrics; "transfer" scores what each task's run learnt on the tasks of
    `score_on`; "ensemble" lets the seeds vote; "neighbours" reads prompts as pieces of the vocabulary; "mixed" answers
    all tasks in common batches.
    """

    base: str  # config, relative to the experiment's file
    change: Changes = Field(default={})
    lines: dict[str, Line] = Field(min_length=1)
    points: dict[str, Changes] = Field(default={"": {}})
    tasks: dict[str, Changes] = Field(default={})
    seeds: int = Field(3, gt=0)
    measure: Measure = "score"
    score_on: dict[str, list[str]] = Field(default={})  # of transfer: the trained task, and the tasks to score it on
    cost: str  # what all of it takes, and on what

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        if set(self.score_on) != (set(self.tasks or {"": None}) if self.measure == "transfer" else set()):
            raise ValueError(
                "score_on names where each of `tasks` is scored with measure: transfer; expected all or none"
            )
        for name, line in self.lines.items():
            if unknown := [point for point in line.points or () if point not in self.points]:
                raise ValueError(f"lines.{name}: no point {unknown[0]!r}; expected some of {', '.join(self.points)}")
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
    found: list[str] = Field(default=[])  # conclusions, written by hand; the list of experiments shows the first

    @field_validator("found")
    @classmethod
    def _sentences(cls, found: list[str]) -> list[str]:
        if any(not text.endswith(".") for text in found):
            raise ValueError("expected sentences, each with its full stop")
        return found


def folder() -> Path:
    """Return the folder of the experiments: that of the working directory, or the one that ships."""
    return config.shipped(HERE)


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


def members(grid: Grid, path: Path, seeds: int | None = None) -> Iterator[Member]:
    """Yield every run of a grid as a member of a sweep, named by the hash of its settings, seed after seed.

    A run that two lines have in common comes twice. Errors: UserError naming the line for settings that are wrong.
    """
    for seed in range(seeds or grid.seeds):
        for (name, line), (point, change) in itertools.product(grid.lines.items(), grid.points.items()):
            if line.points is not None and point not in line.points:
                continue
            tasks = grid.tasks if line.tasks is None else line.tasks
            for task, own in (tasks or {"": {}}).items():
                changes = {**({"task": task} if task else {}), **grid.change, **line.change, **change, **own}
                text = json.dumps(changes | {"seed": seed}, ensure_ascii=False)
                filled = json.loads(text.replace("{line}", name).replace("{point}", point))
                overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in filled.items()]
                try:
                    run = load_run(path.parent / (line.base or grid.base), overrides)
                except UserError as error:
                    raise UserError(f"{path}: {', '.join(filter(None, (name, point, task)))}: {error}") from None
                varied = {"line": name, "point": point, "task": task, "seed": seed}
                yield Member(settings_hash(run, without=UNHASHED_SETTINGS), varied, run)


def write_configs(name: str, form: FormName, to: Path, seeds: int | None = None) -> list[Path]:
    """Write each run of a form as a config, for `softprompt train` or `plan` on another machine; return the files."""
    experiment, path = load(name)
    runs = {to / f"{member.name}.yaml": member for member in members(getattr(experiment, form), path, seeds)}
    with writable(to, folder=True):
        for file, member in runs.items():
            about = f"# {experiment.title}: {results.label(member)}\n"
            file.write_text(about + config.to_yaml(member.run), encoding="utf-8")
    return list(runs)


def steps_of_one_size(runs: Iterable[Member]) -> dict[str, list[Member]]:
    """Group runs by what the memory and time of their steps depend on.

    Seeds, texts, losses, numbers of steps, weights, learning rates and initial values change neither.
    """
    found: dict[str, list[Member]] = {}
    for member in runs:
        left_out = {"seed", "task", "loss", "steps", "schedule", "target_sentinel"}
        settings = member.run.model_dump(mode="json", exclude=left_out)
        backbone = abstract_backbone_of(member.run)
        settings["backbone"] = backbone.settings.model_dump(mode="json")
        settings["quantize"] = quantization_of(backbone.model)
        settings["methods"] = [method | {"init": None} for method in settings["methods"]]
        settings["optimizer"] |= dict.fromkeys(("learning_rate", "weight_decay", "step_origin"))
        key = json.dumps([settings, len(member.run.tasks)], sort_keys=True)
        found.setdefault(hashlib.sha256(key.encode()).hexdigest()[:16], []).append(member)
    return found


def plan_experiment(
    name: str,
    form: FormName,
    runs: Path,
    topologies: Sequence[str],
    seeds: int | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Compile each step of an experiment that differs in size for each topology, ahead of time (`plan.plan`).

    Returns for each step its `lines` and `points`, the number of runs (`runs`), and `plans`: what `plan.plan` says, by
    topology. What has been compiled is kept in `runs`/plans, whichever experiment asked for it.
    """
    experiment, path = load(name)
    steps = steps_of_one_size(members(getattr(experiment, form), path, seeds))
    (runs / "plans").mkdir(parents=True, exist_ok=True)
    answers = []
    for number, (key, group) in enumerate(steps.items(), 1):
        plans = {}
        for topology in topologies:
            kept = runs / "plans" / f"{key}-{topology.replace(':', '-')}.json"
            if not kept.exists():
                tell(f"{number}/{len(steps)} {results.label(group[0])}: compiling for {topology}")
                settings = kept.with_suffix(".yaml")
                settings.write_text(config.to_yaml(group[0].run), encoding="utf-8")
                artifact.dump(plan.plan(str(settings), [], [topology])[0], kept)
            plans[topology] = json.loads(kept.read_text())
        lines, points = (list(dict.fromkeys(member.varied[key] for member in group)) for key in ("line", "point"))
        names = {"lines": lines, "points": [point for point in points if point]}
        answers.append(names | {"runs": len({member.name for member in group}), "plans": plans})
    return answers


def run_experiment(
    name: str,
    form: FormName,
    runs: Path,
    to: Path,
    seeds: int | None = None,
    together: int = 8,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Train what is missing of an experiment as a sweep does, and write what is finished to `to` after each program.

    `together`: at most so many prompts of one shape in one program. The same command goes on where a killed one
    stopped. Returns what was written: for every line and column the values of the seeds (percent), their mean and
    standard deviation, and the runs without a result (`missing`).
    """
    experiment, path = load(name)
    grid, reporter = getattr(experiment, form), reporter or Reporter(quiet=True)
    known = folders_by_hash(runs)  # some have the name that an older version gave to the same settings
    planned = members(grid, path, seeds)
    whole = [dataclasses.replace(member, name=known.get(member.name, member.name)) for member in planned]
    labels = {member.name: results.label(member) for member in whole}

    def collect() -> dict[str, Any]:
        result = {"experiment": path.stem, "form": form, "title": experiment.title} | results.collect(grid, whole, runs)
        artifact.dump(result, to)
        return result

    def begin(group: Sequence[Member]) -> None:
        collect()
        reporter.line("\n".join(f"{labels.get(member.name, 'another')}: {runs / member.name}" for member in group))

    train_members(
        list({member.name: member for member in whole}.values()), runs, together, reporter, before_group=begin
    )
    return collect()


def listing() -> Iterator[str]:
    """Yield a line for each experiment: its runs and cost in both forms."""
    forms: tuple[FormName, ...] = ("miniature", "published")
    for name in experiments():
        experiment, path = load(name)
        yield f"{name:22} {experiment.title} ({experiment.source})"
        for form in forms:
            grid = getattr(experiment, form)
            count = grid.seeds * len({member.name for member in members(grid, path, seeds=1)})
            yield f"{'':22} {form:10} {count:4} runs; {grid.cost}"
