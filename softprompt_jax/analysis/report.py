"""Compare runs on one page: their scores over seeds, their curves, the settings that differ."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from softprompt_jax import config
from softprompt_jax.analysis.page import COLOURS, GREY, Page, gradient, plot_text
from softprompt_jax.checkpoints import artifact
from softprompt_jax.config import UserError
from softprompt_jax.inference.evaluate import run_score, score_factor, score_text
from softprompt_jax.inference.mistakes import Mistakes, read_mistakes
from softprompt_jax.run import UNHASHED_SETTINGS, Run, load_run
from softprompt_jax.statistics import CELL, SCORE, mean_sd_text, score_statistics
from softprompt_jax.training.run_folder import read_metrics, read_result
from softprompt_jax.training.sweep import short_names

_IGNORED = frozenset({"seed", *UNHASHED_SETTINGS})
# Settings of how a run is watched or computed, not of what it learns.
_BOOKKEEPING = {"log_every", "evaluate_every", "checkpoint_every", "evaluation_batch_size", "evaluation_examples"}
_MOST_LABELS = 10  # of a confusion matrix; of more labels the ten most frequent confusions are listed
_LETTERS = 20  # of a label in it
_BOOKKEEPING |= {"result_examples", "shapes", "accumulate", "attention", "remat", "unroll"}


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run's folder says; `result` is None of a run that has not finished."""

    folder: Path
    run: Run
    lines: list[dict[str, Any]]  # of metrics.jsonl
    result: dict[str, Any] | None

    def score(self, split: str) -> float | None:
        """Return the number by which runs are compared, of a split."""
        scores = (self.result or {}).get(split)
        return None if scores is None or self.run.pretraining else run_score(self.run, scores)

    def tasks(self, split: str) -> dict[str, dict[str, float]]:
        """Return the metrics of each task on a split."""
        scores = (self.result or {}).get(split)
        return {} if scores is None else scores.get("tasks", {self.run.task_name: scores})


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only; `settings` tell it from other groups, `others` differ as well."""

    settings: dict[str, Any]
    runs: list[RunRecord]
    others: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def unit(self) -> float:
        """Return what its scores are multiplied by to be shown."""
        return score_factor(self.runs[0].run)

    def number(self, score: float) -> str:
        """Write a score of these runs in their unit."""
        return score_text(score, self.unit)

    @property
    def title(self) -> str:
        """Name it by its settings: task and kinds by themselves and first, others with their names."""
        known = {key: _shown(value) for key, value in self.settings.items() if value is not None}
        kinds = [known[key] for key in sorted(known, key="task".__ne__) if _is_kind(key)]
        others = [f"{key} {value}" for key, value in known.items() if not _is_kind(key)]
        return ", ".join(kinds + others) or self.runs[0].run.task_name


def read_runs(sources: Sequence[str | Path]) -> list[RunRecord]:
    """Read run folders, and all runs in folders of runs such as a sweep's. Errors: UserError where there is none."""
    found: dict[Path, RunRecord] = {}
    for source in map(Path, sources):
        folders = [path.parent for path in sorted(source.rglob("config.yaml"))]
        if not folders:
            raise UserError(f"{source}: no run; expected the folder of a run, or one that holds some")
        for folder in folders:
            if not set(folder.parents) & set(folders):  # what lies in a run is a copy for the hub
                run = load_run(folder / "config.yaml")
                lines = read_metrics(folder / "metrics.jsonl", run)
                found.setdefault(folder.absolute(), RunRecord(folder, run, lines, read_result(folder, run)))
    return list(found.values())


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Put runs together that differ in their seed only, and name each group by the fewest settings that it needs."""
    grouped: dict[str, list[RunRecord]] = {}
    for run in runs:
        grouped.setdefault(run.run.model_dump_json(exclude=set(_IGNORED)), []).append(run)
    flat = [_settings_of(members[0].run) for members in grouped.values()]
    every = dict.fromkeys(itertools.chain.from_iterable(flat))
    keys = [key for key in every if len({_shown(settings.get(key)) for settings in flat}) > 1]
    # What only one kind of method or optimizer has is said by the kind.
    own = {key for key in keys if len({_shown(one[key]) for one in flat if key in one}) == 1 and not _is_kind(key)}
    naming: list[str] = []
    told_apart = 1
    for key in sorted(keys, key=lambda key: (key in own, _rank(key))):
        count = len({json.dumps([settings.get(name) for name in (*naming, key)]) for settings in flat})
        if count > told_apart:
            naming, told_apart = [*naming, key], count
    others = [key for key in keys if key not in naming and key not in own and not key.startswith("task.")]
    short = {key: key if name.isdigit() else name for key, name in short_names(keys).items()}

    def named(settings: dict[str, Any], chosen: Sequence[str]) -> dict[str, Any]:
        return {short[key]: settings.get(key) for key in keys if key in chosen}

    return [
        Group(named(settings, naming), members, named(settings, others))
        for settings, members in zip(flat, grouped.values(), strict=True)
    ]


def _settings_of(run: Run) -> dict[str, Any]:
    """Return the settings of a run by dotted keys; `task` is the task's name, `task.settings` what it is made of."""
    settings = run.model_dump(mode="json", exclude=set(_IGNORED))
    return flatten(settings | {"task": run.task_name}) | flatten({"task.settings": settings["task"]})


def _rank(key: str) -> int:
    """Return how soon a setting names a group: task, kinds, what changes learning, what the task is made of, others."""
    if key.startswith("task."):
        return 3
    return 0 if key == "task" else 1 if _is_kind(key) else 4 if key in _BOOKKEEPING else 2


def flatten(settings: Any) -> dict[str, Any]:
    """Return nested settings as dotted keys and values, as the command line takes them."""

    def is_value(part: Any) -> bool:
        return not part or (isinstance(part, list) and not any(isinstance(each, dict) for each in part))

    leaves, _ = jax.tree.flatten_with_path(settings, is_leaf=is_value)
    return {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in leaves}


def _is_kind(key: str) -> bool:
    return key == "task" or key.rpartition(".")[2] == "kind"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ----------------------------------------------------------------------------------------------------------- tables


def table(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return the scores of each group, as fractions: mean, sd, 95% interval and best over its finished runs."""
    rows = []
    for group in groups:
        row: dict[str, Any] = {"settings": group.settings | group.others, "seeds": [r.run.seed for r in group.runs]}
        row["finished"] = sum(run.result is not None for run in group.runs)
        for split in ("validation", "test"):
            values = [value for run in group.runs if (value := run.score(split)) is not None]
            row[split] = score_statistics(values) if values else None
        rows.append(row)
    return rows


def breakdown(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return each group's metrics on each task, of the test split or where there is none of validation."""
    rows = []
    for group in groups:
        found: dict[tuple[str, str], dict[str, list[float]]] = {}
        for run in group.runs:
            split = "test" if run.tasks("test") else "validation"
            for task, scores in run.tasks(split).items():
                for name, value in scores.items():
                    if name != "count":
                        found.setdefault((task, split), {}).setdefault(name, []).append(value)
        for (task, split), metrics in found.items():
            measured = {name: score_statistics(values) for name, values in metrics.items()}
            rows.append(
                {"settings": group.settings, "title": group.title, "task": task, "split": split, "metrics": measured}
            )
    return rows


def curves(group: Group, name: str) -> list[tuple[list[int], list[float]]]:
    """Return steps and values of each run that has some.

    `name`: `loss`, `learning_rate` or another number of `metrics.jsonl`; `validation_loss`; or `score`, the mean of the
    task's metrics on validation in the unit in which tables show it.
    """

    def value(run: Run, line: dict[str, Any]) -> float | None:
        validation = line.get("validation")
        if name == "score":
            return None if validation is None or run.pretraining else group.unit * run_score(run, validation)
        return (validation or {}).get("loss") if name == "validation_loss" else line.get(name)

    found = []
    for run in group.runs:
        points = {line["step"]: number for line in run.lines if (number := value(run.run, line)) is not None}
        if points:
            found.append((list(points), list(points.values())))
    return found


# ------------------------------------------------------------------------------------------------------------- page


def report(sources: Sequence[str | Path], to: str | Path) -> list[Path]:
    """Write `index.html`, its plots as PNG and `report.json` on these runs into the folder `to`; return the files.

    Sources are run folders, finished or not, or folders of such. Runs that differ in their seed only share a line, with
    mean and sd. Errors: UserError for a folder without a run, or without matplotlib.
    """
    runs = read_runs(sources)
    groups, folder = group_runs(runs), Path(to)
    page, rows = Page("Runs compared", folder), table(groups)
    names = ", ".join(dict.fromkeys(run.run.task_name for run in runs))
    page.text(f"{len(runs)} runs with {len(groups)} different settings on {names}.")
    if unfinished := [str(run.folder) for run in runs if run.result is None]:
        page.text(f"Not finished, in no table of scores: {', '.join(unfinished)}.")
    best = _scores(page, groups, rows)
    _curves(page, groups)
    _tasks(page, groups)
    _mistakes(page, [groups[number] for number in best])
    _settings(page, groups)
    written = page.write()
    artifact.dump({"table": rows, "tasks": breakdown(groups)}, folder / "report.json")
    return [*written, folder / "report.json"]


def _scores(page: Page, groups: Sequence[Group], rows: Sequence[dict[str, Any]]) -> list[int]:
    """Add the scores, and return the numbers of the best groups, one a task."""
    page.heading("Scores")
    splits = [split for split in ("test", "validation") if any(row[split] for row in rows)]
    best: dict[str, int] = {}
    for number, (group, row) in enumerate(zip(groups, rows, strict=True)):
        task, found = group.runs[0].run.task_name, row["validation"]
        if found and (task not in best or found["mean"] > rows[best[task]]["validation"]["mean"]):
            best[task] = number
    both = list(zip(groups, rows, strict=True))
    columns: dict[str, Sequence[Any]] = {"setting": [group.title for group in groups]}
    for split in splits:
        columns[split] = [_mean_sd(row[split], group.number, best=True) for group, row in both]
    for split in splits[:1]:
        columns[f"95% interval of the {split} mean"] = [_interval(row[split], group.number) for group, row in both]
    columns["before training"], columns["majority class"] = zip(*map(_baseline, groups), strict=True)
    columns["runs"] = [row["finished"] for row in rows]
    page.table(columns, chosen=list(best.values()) if len(groups) > 1 else ())
    page.text(
        f"{SCORE} A cell: {CELL}. The interval is Student's. The majority class is scored by accuracy."
        + (" Green: the best setting of each task on validation." if len(groups) > 1 else "")
    )
    if not splits:
        return []
    split = splits[0]
    drawn = [number for number, row in enumerate(rows) if row[split]]
    axes = page.figure("scores", f"The {split} score of each setting, mean and sd", 0.3 + 0.5 * len(drawn))
    for place, number in enumerate(reversed(drawn)):
        times, found = groups[number].unit, rows[number][split]
        values = [times * value for run in groups[number].runs if (value := run.score(split)) is not None]
        axes.plot(values, [place] * len(values), ".", color=GREY)
        spread = times * (found["sd"] or 0)
        axes.errorbar(times * found["mean"], place, xerr=spread, fmt="o", color=_colour(number), capsize=3)
        title = textwrap.shorten(plot_text(groups[number].title), 70, placeholder=" ...")
        axes.text(0.0, place + 0.34, title, fontsize=9.5, va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks([])
    axes.grid(axis="x", color="#dde3ea", linewidth=0.8)
    axes.set(xlabel=f"{split} score{_percent(groups)}: mean ± sd; grey: each run", ylim=(-0.5, len(drawn) - 0.2))

    return list(best.values())


def _baseline(group: Group) -> list[str | None]:
    """Return the score before training, and the majority class's accuracy, as the runs measured them."""
    for run in group.runs:
        baselines = (run.result or {}).get("baselines")
        if baselines:
            majority = baselines["majority"]
            mean = statistics.fmean(majority.values()) if isinstance(majority, dict) else majority
            return [group.number(run_score(run.run, baselines["untrained"])), score_text(mean, 100.0)]
    return [None, None]


def _curves(page: Page, groups: Sequence[Group]) -> None:
    page.heading("Curves")
    loss = "loss per target token"
    named = {
        "score": f"validation score{_percent(groups)}",
        "validation_loss": f"validation {loss}",
        "loss": f"training {loss}",
    }
    for name, label in named.items():
        drawn = [(number, found) for number, group in enumerate(groups) if (found := curves(group, name))]
        if not drawn:
            continue
        axes = page.figure(name, f"{label} of each setting over the steps")
        for number, found in drawn:
            style = {"color": _colour(number), "linestyle": ("-", "--", ":", "-.")[number // len(COLOURS) % 4]}
            for steps, values in found:
                axes.plot(steps, values, alpha=0.3 if len(found) > 1 else 1, linewidth=1, **style)
            common = sorted(set.intersection(*(set(steps) for steps, _ in found)))
            means = [np.mean([values[steps.index(step)] for steps, values in found]) for step in common]
            title = groups[number].title + (f" ({len(found)} runs)" if len(found) > 1 else "")
            axes.plot(common, means, linewidth=2, label=plot_text(title), **style)
        axes.set(xlabel="step", ylabel=label)
        if len(drawn) <= 12:
            page.legend(axes)
    page.text("Thin lines are runs, thick ones the mean over the runs of a setting.")


def _tasks(page: Page, groups: Sequence[Group]) -> None:
    page.heading("Task by task")
    rows = sorted(breakdown(groups), key=lambda row: row["task"])
    names = sorted(dict.fromkeys(name for row in rows for name in row["metrics"]), key="loss".__eq__)
    own = {task.name for group in groups for task in group.runs[0].run.tasks if task.scored_by_source}

    def number(task: str, name: str) -> Callable[[float], str]:
        times = 1.0 if name == "loss" or (task in own and name != "illegal") else 100.0
        return lambda value: score_text(value, times)

    columns = {"task": [row["task"] for row in rows], "split": [row["split"] for row in rows]}
    columns["setting"] = [row["title"] for row in rows]
    for name in names:
        title = "loss per token" if name == "loss" else name
        columns[title] = [_mean_sd(row["metrics"].get(name), number(row["task"], name)) for row in rows]
    page.table(columns)


def _mistakes(page: Page, groups: Sequence[Group]) -> None:
    """Add which label was taken for which, and the mistakes that the runs were surest of, all seeds together."""
    found: dict[tuple[int, str], list[Mistakes]] = {}
    for number, group in enumerate(groups):
        for run in group.runs:
            for task, mistakes in read_mistakes(run.folder).items() if run.result is not None else ():
                found.setdefault((number, task), []).append(mistakes)
    if not found:
        return
    page.heading("Mistakes")
    for (number, task), runs in found.items():
        first = runs[0]
        said = dict.fromkeys([task, groups[number].title, first.split])  # a single setting has the task's name
        page.text(f"{', '.join(said)}: " + (f"{len(runs)} runs together." if len(runs) > 1 else "one run."))
        counts = np.sum([run.counts for run in runs if run.answers == first.answers], axis=0)
        name = f"confusion{len(page.plots)}"
        if len(first.labels) <= _MOST_LABELS:
            _confusion(page.figure(name, f"Answers of {task} by right label", **_matrix_size(first)), first, counts)
        else:
            pairs = [(i, j) for i, j in np.argwhere(counts) if first.labels[i] != first.answers[j]]
            pairs = sorted(pairs, key=lambda pair: -counts[pair])[:10]
            page.table(
                {
                    "right label": [first.labels[i] for i, _ in pairs],
                    "answer": [first.answers[j] for _, j in pairs],
                    "times": [int(counts[pair]) for pair in pairs],
                }
            )
        _surest(page, runs)


def _matrix_size(found: Mistakes) -> dict[str, float]:
    longest = min(_LETTERS, max(map(len, found.labels)))
    return {"height": 0.4 * len(found.labels) + 0.3, "left": 0.75 + 0.085 * longest, "foot": 0.6 + 0.06 * longest}


def _confusion(axes: Any, found: Mistakes, counts: np.ndarray) -> None:
    """Draw a confusion matrix: the colour of a cell is its share of the row."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    columns = [number for number in range(len(found.answers)) if number < len(found.labels) or counts[:, number].any()]
    axes.imshow(shares[:, columns] ** 0.7, cmap=gradient(), vmin=0, vmax=1, aspect="auto")
    for row, place in itertools.product(range(len(counts)), range(len(columns))):
        share, count = shares[row, columns[place]], counts[row, columns[place]]
        text = f"{count}\n{share:.0%}" if len(columns) <= 4 else str(count)
        axes.text(place, row, text, ha="center", va="center", fontsize=9, color="white" if share > 0.45 else "#1c2733")
    cut = [plot_text(word if len(word) <= _LETTERS else f"{word[: _LETTERS - 3]}...") for word in found.answers]
    axes.set_xticks(range(len(columns)), [cut[number] for number in columns], rotation=30, ha="right")
    axes.set_yticks(range(len(counts)), cut[: len(counts)])
    axes.set(ylabel="right", xlabel="answered: count, and share of the row")
    axes.grid(visible=False)


def _surest(page: Page, runs: Sequence[Mistakes]) -> None:
    """Add the ten mistakes of all runs that were made with the highest probability."""
    made: dict[tuple[str, str, str], list[float]] = {}
    for mistake in itertools.chain.from_iterable(run.surest for run in runs):
        made.setdefault((mistake.input, mistake.target, mistake.answer), []).append(mistake.probability)
    surest = sorted(made.items(), key=lambda item: -max(item[1]))[:10]
    if not surest:
        page.text("No wrong answer.")
        return
    page.text(f"The {len(surest)} most confident mistakes, by the probability that the model gives its own answer:")
    page.table(
        {
            "text": [text for (text, _, _), _ in surest],
            "right": [target for (_, target, _), _ in surest],
            "answer": [answer for (_, _, answer), _ in surest],
            "probability": [f"{max(values):.0%}" for _, values in surest],
            "runs": [f"{len(values)} of {len(runs)}".replace(" ", "\N{NO-BREAK SPACE}") for _, values in surest],
        }
    )


def _settings(page: Page, groups: Sequence[Group]) -> None:
    page.heading("Settings")
    others = [", ".join(f"{key} {_shown(value)}" for key, value in group.others.items()) for group in groups]
    page.table(
        {
            "setting": [group.title for group in groups],
            "differs also in": [text or None for text in others],
            "seeds": [", ".join(str(run.run.seed) for run in group.runs) for group in groups],
            "folders": [", ".join(str(run.folder) for run in group.runs) for group in groups],
        }
    )
    first = groups[0].runs[0].run.model_dump(mode="json", exclude=set(_IGNORED))
    page.details(f"All settings of {groups[0].title}", config.to_yaml(first).rstrip())


def _mean_sd(found: dict[str, Any] | None, number: Callable[[float], str], best: bool = False) -> str | None:
    return None if found is None else mean_sd_text(found, number, best).replace(" ", "\N{NO-BREAK SPACE}")


def _interval(found: dict[str, Any] | None, number: Callable[[float], str]) -> str | None:
    if found is None or found["interval"] is None:
        return None
    return " to ".join(number(found["mean"] + sign * found["interval"]) for sign in (-1, 1))


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _percent(groups: Sequence[Group]) -> str:
    return ", %" if all(group.unit == 100 for group in groups) else ""
