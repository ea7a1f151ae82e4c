"""The experiments of Lester et al. (2021): a grid of changes over a base config, trained as a sweep, written as JSON.

An experiment is data (`configs/paper/NAME.yaml`): lines, points and tasks, each a few changed settings, times seeds.
It has up to three forms: `real`, on SmolLM2 and text out of packages, for a CPU; `published`, on hub models for a TPU;
and `miniature`, on the embedded T5, which tests the machinery. Runs are filed by the hash of their settings, so that
experiments share those they have in common.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from softprompt_jax import config
from softprompt_jax.analysis import plan
from softprompt_jax.assembly import abstract_backbone_of
from softprompt_jax.checkpoints import artifact
from softprompt_jax.config import Settings, UserError, nearest, settings_hash
from softprompt_jax.files import writable
from softprompt_jax.models.quantized import quantization_of
from softprompt_jax.paper import records, results
from softprompt_jax.paper.measures import Measure
from softprompt_jax.progress import Reporter
from softprompt_jax.run import UNHASHED_SETTINGS, load_run
from softprompt_jax.training.run_folder import folders_by_hash
from softprompt_jax.training.sweep import Member, train_members

FormName = Literal["miniature", "real", "published"]
FORMS: tuple[FormName, ...] = get_args(FormName)
Changes = dict[str, Any]  # dotted settings, as on the command line
HERE = Path("configs") / "paper"


class Line(Settings):
    """A line (or a group of bars) of a figure, a row of a table."""

    base: str | None = None  # another config than the grid's
    change: Changes = Field(default={})
    points: list[str] | None = None  # only these of the grid's
    tasks: dict[str, Changes] | None = None  # others than the grid's; {} for one run that states its task itself
    read: Literal["trained", "untrained"] = "trained"  # untrained: the score before the first step


class Reported(Settings):
    """Published values in percent, by line and column: a mean, or a mean and a standard deviation."""

    source: str
    lines: dict[str, dict[str, Annotated[list[float], Field(min_length=1, max_length=2)]]]


class Grid(Settings):
    """The runs of an experiment: lines x points x tasks x seeds, and what is measured on them.

    A point or a task may change `base`, too.
    `{line}`, `{point}` and `{seed}` in the texts of changes stand for the run's line, point and seed.
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
    means: dict[str, list[str]] = Field(
        default={}
    )  # a name, and the points (with measure: ensemble, lines) it averages
    reported: Reported | None = None  # what was published of the same runs
    plot: Literal["lines", "bars"] | None = None  # kind of plot, where it is not the experiment's
    cost: str  # what all of it takes, and on what

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        if set(self.score_on) != (set(self.tasks or {"": None}) if self.measure == "transfer" else set()):
            raise ValueError(
                "score_on names where each of `tasks` is scored with measure: transfer; expected all or none"
            )
        for name, of in self.means.items():
            known = self.lines if self.measure == "ensemble" else self.points
            if unknown := [one for one in of if one not in known]:
                raise ValueError(f"means.{name}: no {unknown[0]!r}; expected some of {', '.join(known)}")
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
    real: Grid | None = None
    published: Grid | None = None
    miniature: Grid | None = None
    # conclusions from the form real, and from miniature, written by hand; the list of experiments shows the first
    found: list[str] = Field(default=[])
    found_in_miniature: list[str] = Field(default=[])

    @field_validator("found", "found_in_miniature")
    @classmethod
    def _sentences(cls, found: list[str]) -> list[str]:
        if any(not text.endswith(".") for text in found):
            raise ValueError("expected sentences, each with its full stop")
        return found

    @model_validator(mode="after")
    def _has_a_form(self) -> Experiment:
        if not self.forms:
            raise ValueError(f"expected one or more of {', '.join(FORMS)}")
        return self

    @property
    def forms(self) -> dict[FormName, Grid]:
        """The grids by their form."""
        return {form: grid for form in FORMS if (grid := getattr(self, form)) is not None}


def folder() -> Path:
    """Return the folder of the experiments: that of the working directory, or the one that ships."""
    return config.shipped(HERE)


def experiments() -> dict[str, Path]:
    """Return the file of each experiment by its name; a config beside them without `question:` is a plain run."""
    files = sorted(folder().glob("*.yaml"))
    return {path.stem: path for path in files if "\nquestion: " in path.read_text(encoding="utf-8")}


def load(name: str) -> tuple[Experiment, Path]:
    """Read an experiment by its name or its file; also return the file."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = experiments()
        if name not in known:
            raise UserError(f"experiment {name!r}: unknown; expected one of {', '.join(known)}{nearest(name, known)}")
        path = known[name]
    return config.parse(Experiment, config.read(path), str(path)), path


def load_form(name: str, form: FormName) -> tuple[Experiment, Path, Grid]:
    """Read an experiment as `load` does, with one of its forms. Errors: UserError for a form that it does not have."""
    experiment, path = load(name)
    if (grid := experiment.forms.get(form)) is None:
        raise UserError(f"{path}: has no form {form}; expected one of {', '.join(experiment.forms)}")
    return experiment, path, grid


def members(grid: Grid, path: Path, seeds: int | None = None, overrides: Sequence[str] = ()) -> Iterator[Member]:
    """Yield every run of a grid as a member of a sweep, named by the hash of its settings, seed after seed.

    `overrides` change every run. A run that two lines have in common comes twice. Errors: UserError naming the line for
    settings that are wrong.
    """
    for seed in range(seeds or grid.seeds):
        for (name, line), (point, change) in itertools.product(grid.lines.items(), grid.points.items()):
            if line.points is not None and point not in line.points:
                continue
            tasks = grid.tasks if line.tasks is None else line.tasks
            for task, special in (tasks or {"": {}}).items():
                changes = {**grid.change, **line.change, **change, **special}
                base = changes.pop("base", line.base or grid.base)
                if task and "base" not in special:
                    changes.setdefault("task", task)
                text = json.dumps(changes | {"seed": seed}, ensure_ascii=False)
                text = text.replace("{line}", name).replace("{point}", point).replace("{seed}", str(seed))
                own = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in json.loads(text).items()]
                try:
                    run = load_run(path.parent / base, [*own, *overrides])
                except UserError as error:
                    raise UserError(f"{path}: {', '.join(filter(None, (name, point, task)))}: {error}") from None
                varied = {"line": name, "point": point, "task": task, "seed": seed}
                yield Member(settings_hash(run, without=UNHASHED_SETTINGS), varied, run)


def write_configs(
    name: str, form: FormName, to: Path, seeds: int | None = None, overrides: Sequence[str] = ()
) -> list[Path]:
    """Write each run of a form as a config, for `softprompt train` or `plan` on another machine; return the files."""
    experiment, path, grid = load_form(name, form)
    runs = {to / f"{member.name}.yaml": member for member in members(grid, path, seeds, overrides)}
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
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Compile each step of an experiment that differs in size for each topology, ahead of time (`plan.plan`).

    Returns for each step its `lines` and `points`, the number of runs (`runs`), and `plans`: what `plan.plan` says, by
    topology. What has been compiled is kept in `runs`/plans, whichever experiment asked for it.
    """
    _, path, grid = load_form(name, form)
    steps = steps_of_one_size(members(grid, path, seeds, overrides))
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
    overrides: Sequence[str] = (),
    only_seed: int | None = None,
) -> dict[str, Any]:
    """Train what is missing of an experiment as a sweep does, and write what is finished to `to` after each program.

    `together`: at most so many prompts of one shape in one program; with 1 all runs of a seed come before the next.
    `only_seed`: train the runs of this seed only. `overrides`: changed settings of every run. The same command goes on
    where a killed one stopped; with the form `real` also without the folders of runs that a JSON beside `to` holds.
    Returns what was written: for every line and column the values of the seeds (percent), their mean and standard
    deviation, null for those to do, and the runs without a result (`missing`).
    """
    experiment, path, grid = load_form(name, form)
    reporter = reporter or Reporter(quiet=True)
    planned = list(members(grid, path, seeds, overrides))
    if form == "real":
        records.check_place(to, overrides)
        records.restore(to.parent, planned, runs)
    known = folders_by_hash(runs)  # some have the name that an older version gave to the same settings
    whole = [dataclasses.replace(member, name=known.get(member.name, member.name)) for member in planned]
    labels = {member.name: results.label(member) for member in whole}
    about = {"experiment": path.stem, "form": form, "title": experiment.title}
    about |= {"settings": list(overrides)} if overrides else {}

    def collect() -> dict[str, Any]:
        if form == "real":
            records.drop_checkpoints(whole, runs)
        try:
            result = about | results.collect(grid, whole, runs)
        except records.WeightsGone as gone:
            reporter.line(f"{gone}: the weights are gone; trained again")
            records.forget(gone.folders)
            return collect()
        if form == "real":
            result |= records.of(whole, [results.label(member) for member in whole], runs)
        artifact.dump(result, to)
        return result

    def begin(group: Sequence[Member]) -> None:
        collect()
        reporter.line("\n".join(f"{labels.get(member.name, 'another')}: {runs / member.name}" for member in group))

    collect()
    chosen = {member.name: member for member in whole if only_seed in (None, member.varied["seed"])}
    by_seed = itertools.groupby(chosen.values(), lambda member: member.varied["seed"] if together == 1 else None)
    for group in [list(group) for _, group in by_seed]:
        train_members(group, runs, together, reporter, before_group=begin)
    return collect()


def in_order(form: FormName, overrides: Sequence[str] = ()) -> list[str]:
    """Return the experiments that have a form, the cheapest first: the next is the one with the least left to train.

    The cost of a run is that of its steps, counted in tokens; runs of experiments before are there already.
    """
    left = {name: load(name) for name in experiments()}
    left = {name: found for name, found in left.items() if form in found[0].forms}
    runs = {
        name: {member.name: _tokens(member) for member in members(experiment.forms[form], path, 1, overrides)}
        for name, (experiment, path) in left.items()
    }
    done: set[str] = set()
    order: list[str] = []
    while left:
        costs = {name: sum(cost for run, cost in runs[name].items() if run not in done) for name in left}
        order.append(min(left, key=lambda name: costs[name]))
        done |= runs[order[-1]].keys()
        del left[order[-1]]
    return order


def _tokens(member: Member) -> int:
    rows = sum(getattr(method, "length", 0) for method in member.run.methods)
    return member.run.steps * member.run.batch_size * (member.run.max_input_tokens + rows)


def run_all(
    form: FormName,
    runs: Path,
    to: Path,
    seeds: int | None = None,
    together: int = 1,
    reporter: Reporter | None = None,
    overrides: Sequence[str] = (),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train one seed of all experiments that have a form, then the next; yield each result, in `to`/NAME.json, too."""
    order = in_order(form, overrides)
    wanted = {name: seeds or load_form(name, form)[2].seeds for name in order}
    for seed in range(max(wanted.values(), default=0)):
        for name in (name for name in order if seed < wanted[name]):
            yield (
                name,
                run_experiment(name, form, runs, to / f"{name}.json", seeds, together, reporter, overrides, seed),
            )


def listing() -> Iterator[str]:
    """Yield a line for each experiment: its runs and cost in both forms."""
    for name in experiments():
        experiment, path = load(name)
        yield f"{name:22} {experiment.title} ({experiment.source})"
        for form, grid in experiment.forms.items():
            count = grid.seeds * len({member.name for member in members(grid, path, seeds=1)})
            yield f"{'':22} {form:10} {count:4} runs; {grid.cost}"
