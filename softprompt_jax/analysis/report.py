"""Compare runs: their curves, their scores with confidence over seeds, the settings that differ."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softprompt_jax import config
from softprompt_jax.analysis.page import COLOURS, Page
from softprompt_jax.checkpoints import artifact
from softprompt_jax.config import UserError
from softprompt_jax.data.task import SEQIO
from softprompt_jax.inference.evaluate import headline, shown, unit
from softprompt_jax.run import UNHASHED_SETTINGS, Run
from softprompt_jax.statistics import score_statistics

_IGNORED = frozenset({"seed", *UNHASHED_SETTINGS})
_COUNTS = ("count",)  # of scores that are no measure


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
        return None if scores is None or self.run.pretraining else headline(self.run, scores)

    def tasks(self, split: str) -> dict[str, dict[str, float]]:
        """Return the metrics of each task on a split."""
        scores = (self.result or {}).get(split)
        if scores is None:
            return {}
        return scores.get("tasks", {self.run.task_name: scores})


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only; `settings` are those in which it differs from other groups."""

    settings: dict[str, Any]
    runs: list[RunRecord]

    @property
    def unit(self) -> float:
        """Return what its scores are multiplied by to be shown."""
        return unit(self.runs[0].run)

    @property
    def title(self) -> str:
        """Name it by what is particular: task and kinds by themselves and first, what it has not is left out."""
        has = {key: _shown(value) for key, value in self.settings.items() if value is not None}
        kinds = [has[key] for key in sorted(has, key="task".__ne__) if _is_kind(key)]
        others = [f"{key} {value}" for key, value in has.items() if not _is_kind(key)]
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
                found.setdefault(folder.absolute(), _read(folder))
    return list(found.values())


def _read(folder: Path) -> RunRecord:
    path, measured, result = folder / "config.yaml", folder / "metrics.jsonl", folder / "result.json"
    run = config.parse(Run, config.read(path), str(path))
    lines = []
    for text in measured.read_text(encoding="utf-8").splitlines() if measured.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the last line of a run that was killed, or is being written
            continue
    try:
        return RunRecord(
            folder, run, lines, json.loads(result.read_text(encoding="utf-8")) if result.exists() else None
        )
    except ValueError as error:
        raise UserError(f"{result}: not JSON ({error}); expected a run's result; run it again") from None


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Put runs together that differ in their seed only, and say in which settings the groups differ."""
    flat = [
        flatten(run.run.model_dump(mode="json", exclude={"task", *_IGNORED}))
        | {"task": run.run.task_name}
        | flatten({"task.settings": run.run.model_dump(mode="json", include={"task"})["task"]})
        for run in runs
    ]
    by_task: dict[str, list[dict[str, Any]]] = {}
    for run, settings in zip(runs, flat, strict=True):
        by_task.setdefault(run.run.task_name, []).append(settings)

    def differs(key: str) -> bool:
        # What a task is made of says no more than its name, unless there are several tasks of one name.
        among = by_task.values() if key.startswith("task.") else [flat]
        return any(len({_shown(settings.get(key)) for settings in part}) > 1 for part in among)

    keys = [key for key in dict.fromkeys(itertools.chain.from_iterable(flat)) if differs(key)]
    grouped: dict[str, list[int]] = {}
    for index, settings in enumerate(flat):
        grouped.setdefault(json.dumps(settings, sort_keys=True), []).append(index)
    short = _short_names(keys)
    return [
        Group({short[key]: flat[members[0]].get(key) for key in keys}, [runs[i] for i in members])
        for members in grouped.values()
    ]


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as dotted keys and values, as the command line takes them."""
    if isinstance(settings, Mapping) and settings:
        parts = ((str(key), value) for key, value in settings.items())
    elif isinstance(settings, list) and any(isinstance(value, Mapping) for value in settings):
        parts = ((str(number), value) for number, value in enumerate(settings))
    else:
        return {prefix: settings}
    found: dict[str, Any] = {}
    for key, value in parts:
        found |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return found


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Call a setting by the last part of its path, if no other ends so."""
    lasts = [key.rpartition(".")[2] for key in keys]
    return {
        key: last if lasts.count(last) == 1 and not last.isdigit() else key
        for key, last in zip(keys, lasts, strict=True)
    }


def _is_kind(key: str) -> bool:
    return key == "task" or key.rpartition(".")[2] == "kind"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ----------------------------------------------------------------------------------------------------------- tables


def table(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return the scores of each group, as fractions: mean, sd, 95% interval and best over its finished runs."""
    rows = []
    for group in groups:
        row: dict[str, Any] = {"settings": group.settings, "seeds": [run.run.seed for run in group.runs]}
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
                    if name not in _COUNTS:
                        found.setdefault((task, split), {}).setdefault(name, []).append(value)
        for (task, split), metrics in found.items():
            measured = {name: score_statistics(values) for name, values in metrics.items()}
            rows.append({"settings": group.settings, "task": task, "split": split, "metrics": measured})
    return rows


def curves(group: Group, name: str) -> list[tuple[list[int], list[float]]]:
    """Return steps and values of each run: `loss`, `learning_rate`, ..., or `score`, what checkpoints are chosen by."""
    found = []
    for run in group.runs:
        points = [
            (line["step"], headline(run.run, line["validation"]) if name == "score" else line[name])
            for line in run.lines
            if ("validation" if name == "score" else name) in line and not (name == "score" and run.run.pretraining)
        ]
        if points:
            steps, values = zip(*points, strict=True)
            found.append((list(steps), list(values)))
    return found


# ------------------------------------------------------------------------------------------------------------- page


def report(sources: Sequence[str | Path], to: str | Path) -> list[Path]:
    """Write `index.html`, its plots as PNG and `report.json` on these runs into the folder `to`; return the files.

    Sources are run folders, finished or not, or folders of such. Runs that differ in their seed only are one line, with
    the 95% confidence interval of their mean. Errors: UserError for a folder without a run, or without matplotlib.
    """
    runs = read_runs(sources)
    groups, folder = group_runs(runs), Path(to)
    page = Page("Runs compared", folder)
    unfinished = [str(run.folder) for run in runs if run.result is None]
    names = list(dict.fromkeys(run.run.task_name for run in runs))
    page.text(
        f"{len(runs)} runs in {len(groups)} settings on {', '.join(names)}. Runs that differ in their seed only are "
        "one line: their mean ± half of its 95% confidence interval (Student's t), and the best of them."
    )
    if unfinished:
        page.text(f"Not finished, in no table: {', '.join(unfinished)}.")
    rows = table(groups)
    _scores(page, groups, rows)
    _curves(page, groups)
    _tasks(page, groups)
    _settings(page, groups)
    written = page.write()
    artifact.dump({"table": rows, "tasks": breakdown(groups)}, folder / "report.json")
    return [*written, folder / "report.json"]


def _scores(page: Page, groups: Sequence[Group], rows: Sequence[dict[str, Any]]) -> None:
    page.heading("Scores")
    splits = [split for split in ("validation", "test") if any(row[split] for row in rows)]
    keys = list(groups[0].settings) or ["task"]
    best: dict[str, int] = {}
    for number, (group, row) in enumerate(zip(groups, rows, strict=True)):
        task, found = group.runs[0].run.task_name, row["validation"]
        if found and (task not in best or found["mean"] > rows[best[task]]["validation"]["mean"]):
            best[task] = number
    baselines = [_baseline(group) for group in groups]
    page.table(
        [*keys, "runs", *splits, *(f"best {split}" for split in splits), "untrained", "majority accuracy"],
        [
            [
                *([_shown(value) for value in group.settings.values()] or [group.title]),
                row["finished"],
                *(_mean(row[split], group.unit) for split in splits),
                *(_number(row[split] and row[split]["best"], group.unit) for split in splits),
                *baseline,
            ]
            for group, row, baseline in zip(groups, rows, baselines, strict=True)
        ],
        chosen=list(best.values()) if len(groups) > 1 else (),
    )
    told = "The score of a run is the mean of its task's metrics, in percent (those of seqio Tasks: in their own unit)."
    page.text(f"{told} Green: the best setting of each task on validation." if len(groups) > 1 else told)
    shown = [(g, row) for g, row in zip(groups, rows, strict=True) if row[splits[-1]]] if splits else []
    if not shown:
        return
    axes = page.figure(
        "scores", f"The {splits[-1]} score of each setting with its confidence", 9.0, 1 + 0.35 * len(shown)
    )
    for place, (group, row) in enumerate(reversed(shown)):
        found = row[splits[-1]]
        values = [group.unit * value for run in group.runs if (value := run.score(splits[-1])) is not None]
        axes.plot(values, [place] * len(values), ".", color="#9aa8b7")
        axes.errorbar(
            group.unit * found["mean"],
            place,
            xerr=group.unit * (found["interval"] or 0),
            fmt="o",
            color=COLOURS[0],
            capsize=3,
        )
    axes.set_yticks(range(len(shown)), [_plain(group.title) for group, _ in reversed(shown)])
    percent = " in percent" if all(group.unit == 100 for group in groups) else ""
    axes.set(xlabel=f"{splits[-1]} score{percent}: mean, 95% interval, each run", ylim=(-0.6, len(shown) - 0.4))


def _baseline(group: Group) -> list[str | None]:
    """Return the score before training, and the majority class's accuracy, as the runs measured them."""
    for run in group.runs:
        baselines = (run.result or {}).get("baselines")
        if baselines:
            majority = baselines["majority"]
            mean = statistics.fmean(majority.values()) if isinstance(majority, dict) else majority
            return [_number(headline(run.run, baselines["untrained"]), group.unit), _number(mean)]
    return [None, None]


def _curves(page: Page, groups: Sequence[Group]) -> None:
    page.heading("Curves")
    for name, label in (("loss", "training loss per token"), ("score", "validation score")):
        drawn = [(group, found) for group in groups if (found := curves(group, name))]
        if not drawn:
            continue
        axes = page.figure(name, f"{label} of each setting over the steps")
        for number, (group, found) in enumerate(drawn):
            colour, dashes = COLOURS[number % len(COLOURS)], ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
            for steps, values in found:
                axes.plot(steps, values, dashes, color=colour, alpha=0.3 if len(found) > 1 else 1, linewidth=1)
            common = sorted(set.intersection(*(set(steps) for steps, _ in found)))
            means = [np.mean([values[steps.index(step)] for steps, values in found]) for step in common]
            title = _plain(group.title) + (f" ({len(found)} runs)" if len(found) > 1 else "")
            axes.plot(common, means, dashes, color=colour, linewidth=2, label=title)
        axes.set(xlabel="step", ylabel=label)
        if len(drawn) <= 12:
            axes.legend(fontsize=8)
    page.text("Thin lines are runs, thick ones the mean over the seeds of a setting.")


def _tasks(page: Page, groups: Sequence[Group]) -> None:
    page.heading("Task by task")
    rows = breakdown(groups)
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    title = {id(group.settings): group.title for group in groups}
    own = {task.name for group in groups for task in group.runs[0].run.tasks if SEQIO in task.metrics}

    def _unit(task: str, name: str) -> float:
        return 1.0 if name == "loss" or (task in own and name != "illegal") else 100.0

    ordered = sorted(rows, key=lambda row: row["task"])
    page.table(
        ["task", "split", "setting", *names],
        [
            [row["task"], row["split"], title[id(row["settings"])]]
            + [_mean(row["metrics"].get(name), _unit(row["task"], name)) for name in names]
            for row in ordered
        ],
    )


def _settings(page: Page, groups: Sequence[Group]) -> None:
    page.heading("Settings")
    keys = list(groups[0].settings)
    page.table(
        [*(keys or ["settings"]), "seeds", "folders"],
        [
            [
                *([_shown(value) for value in group.settings.values()] or ["all the same"]),
                ", ".join(str(run.run.seed) for run in group.runs),
                ", ".join(str(run.folder) for run in group.runs),
            ]
            for group in groups
        ],
    )
    first = groups[0].runs[0].run.model_dump(mode="json", exclude=set(_IGNORED))
    page.details(f"All settings of {groups[0].title}", config.to_yaml(first).rstrip())


def _mean(found: dict[str, Any] | None, factor: float) -> str | None:
    if found is None:
        return None
    text, interval = shown(found["mean"], factor), found["interval"]
    return text if interval is None else f"{text} ± {shown(interval, factor)}"


def _number(value: float | None, factor: float = 100.0) -> str | None:
    return None if value is None else shown(value, factor)


def _plain(text: str) -> str:
    """Return a text for a plot, whose font has few scripts and reads $ as mathematics."""
    text = "".join(c if c.isascii() else "?" for c in text).replace("$", r"\$")
    return text if len(text) <= 60 else text[:57] + "..."
