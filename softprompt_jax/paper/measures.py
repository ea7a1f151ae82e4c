"""What is measured on the runs of an experiment, for each line and column a value for each seed.

A value is there as soon as all the runs that it needs are finished.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from softprompt_jax.analysis.inspect import inspect
from softprompt_jax.checkpoints import artifact
from softprompt_jax.data.task import Example, Task
from softprompt_jax.inference.bank import PromptBank
from softprompt_jax.inference.ensemble import ensemble
from softprompt_jax.inference.evaluate import mean_score, run_score, score
from softprompt_jax.inference.predictor import load_predictor
from softprompt_jax.tasks import load, resolve, splits
from softprompt_jax.training.run_folder import read_result
from softprompt_jax.training.sweep import Member

if TYPE_CHECKING:
    from softprompt_jax.paper.experiments import Grid

Measure = Literal["score", "transfer", "ensemble", "neighbours", "mixed"]
Values = dict[str, dict[str, list[float]]]  # line, column, a fraction for each seed
NEIGHBOURS, SHOWN_ROWS = 5, 8


def _finished(members: Sequence[Member], runs: Path, *keys: str) -> Iterator[list[Member]]:
    """Yield the runs that agree in `keys` ("line", "point", "task", "seed"), where all of them are finished."""
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        groups.setdefault(tuple(member.varied[key] for key in keys), []).append(member)
    for group in groups.values():
        if all((runs / member.name / "result.json").exists() for member in group):
            yield group


def _scored_on(task: Task) -> str:
    return "test" if "test" in splits(task) else "validation"


def scores(grid: Grid, members: Sequence[Member], runs: Path) -> tuple[Values, dict[str, Any]]:
    """Return the mean metric of each point, after training or before it, and the mean of that over tasks."""
    values: Values = {}
    for group in _finished(members, runs, "line", "point", "seed"):
        line, point = group[0].varied["line"], group[0].varied["point"]
        found = []
        for member in group:
            result = read_result(runs / member.name, member.run) or {}
            baselines = result["baselines"]
            trained = grid.lines[line].read == "trained"
            found.append(run_score(member.run, result[baselines["split"]] if trained else baselines["untrained"]))
        values.setdefault(line, {}).setdefault(point or "score", []).append(statistics.fmean(found))
    return values, {}


def transfer_scores(grid: Grid, members: Sequence[Member], runs: Path) -> tuple[Values, dict[str, Any]]:
    """Return the first metric of other tasks under what each run has learnt; it is kept in the run's folder."""
    values: Values = {}
    for (member,) in _finished(members, runs, "line", "point", "task", "seed"):
        kept, predictor = runs / member.name / "scored_on.json", None
        known = json.loads(kept.read_text()) if kept.exists() else {}
        for target in grid.score_on[member.varied["task"]]:
            task = resolve(target)
            if target not in known:
                predictor = predictor or load_predictor(runs / member.name, trust=True)
                known[target] = predictor.evaluate(task, _scored_on(task))
                artifact.dump(known, kept)
            column = _transfer_column(grid, member.varied["task"], target)
            values.setdefault(member.varied["line"], {}).setdefault(column, []).append(known[target][task.metrics[0]])
    return values, {}


def targets(grid: Grid) -> dict[str, Task]:
    """Return the tasks of `score_on` by the column that they have in the table."""
    return {_transfer_column(grid, of, target): resolve(target) for of, on in grid.score_on.items() for target in on}


def _transfer_column(grid: Grid, trained_on: str, target: str) -> str:
    return target if len(grid.tasks) < 2 else f"{trained_on} to {target}"


def ensemble_scores(grid: Grid, members: Sequence[Member], runs: Path) -> tuple[Values, dict[str, Any]]:
    """Return the scores of the seeds of a line by themselves, of the best, and of the two ways to join them."""
    values: Values = {}
    for group in _finished(members, runs, "line"):
        if len(group) < 2:
            continue
        task = group[0].run.tasks[0]
        found = ensemble([runs / member.name for member in group], split=_scored_on(task))
        alone = [{name: value for name, value in each.items() if name != "source"} for each in found["prompts"]]
        columns = values[group[0].varied["line"]] = {"average": [mean_score(task, each) for each in alone]}
        ways = ("best", "best"), ("majority vote", "vote"), ("mean log-probability", "log_probability")
        for column, way in ways:
            joined = {name: cell["value"] for name, cell in found[way].items() if name != "source"}
            columns[column] = [mean_score(task, joined)]
    return values, {}


def neighbour_shares(grid: Grid, members: Sequence[Member], runs: Path) -> tuple[Values, dict[str, Any]]:
    """Read prompts as pieces: the nearest of each row by cosine, whether those are label words, how unlike rows are.

    Columns: "label words found" is the share of the task's label words among the nearest pieces of a row; "distinct
    nearest" the number of pieces that are nearest to a row, as a share of the rows; "cosine" that of the nearest piece.
    """
    values: Values = {}
    nearest: dict[str, list[list[str]]] = {}
    of_backbone: dict[str, list[Member]] = {}
    for (member,) in _finished(members, runs, "line", "point", "task", "seed"):
        of_backbone.setdefault(str(member.run.backbone), []).append(member)
    for group in of_backbone.values():
        prompts = inspect([runs / member.name for member in group], neighbours=NEIGHBOURS)["prompts"]
        for member, prompt in zip(group, prompts, strict=True):
            columns, labels = values.setdefault(member.varied["line"], {}), prompt["labels"]
            found = {} if labels is None else {"label words found": labels["survive"] / labels["of"]}
            found["distinct nearest"] = prompt["nearest_pieces"] / prompt["length"]
            found["cosine"] = statistics.fmean(row["cosine"][0][1] for row in prompt["rows"])
            for column, value in found.items():
                columns.setdefault(column, []).append(value)
            pieces = [[piece.replace("▁", "") for piece, _ in row["cosine"]] for row in prompt["rows"][:SHOWN_ROWS]]
            nearest.setdefault(member.varied["line"], pieces)
    return values, {"nearest": nearest}


def mixed_batch_scores(grid: Grid, members: Sequence[Member], runs: Path) -> tuple[Values, dict[str, Any]]:
    """Answer the tests of all tasks of a seed in common batches, and one task at a time; they must not differ.

    Columns: the score of each task when its texts stand among the others', and "same answers", the share of texts
    that get the same answer either way.
    """
    values: Values = {}
    for group in _finished(members, runs, "line", "seed"):
        run, columns = group[0].run, values.setdefault(group[0].varied["line"], {})
        bank = PromptBank(str(run.backbone), max_input_tokens=run.max_input_tokens, dtype=run.dtype)
        longest = max(member.run.max_target_tokens for member in group)
        each: dict[str, tuple[Task, list[Example]]] = {}
        for member in group:
            bank.add(member.varied["task"], runs / member.name)
            task = member.run.tasks[0]
            each[member.varied["task"]] = task, load(task, _scored_on(task))
        asked = [(example.input, name) for name, (_, examples) in each.items() for example in examples]
        order = np.random.default_rng(group[0].varied["seed"]).permutation(len(asked))
        texts, names = zip(*(asked[i] for i in order), strict=True)
        shuffled = bank.generate(texts, names, longest)
        mixed = dict(zip(order.tolist(), (answer for answer, _ in shuffled), strict=True))
        same, first = [], 0
        for name, (task, examples) in each.items():
            alone = [answer for answer, _ in bank.generate([example.input for example in examples], name, longest)]
            own = [mixed[first + number] for number in range(len(examples))]
            columns.setdefault(name, []).append(mean_score(task, score(task, own, examples)))
            same += [one == other for one, other in zip(own, alone, strict=True)]
            first += len(examples)
        columns.setdefault("same answers", []).append(statistics.fmean(same))
    return values, {}


# From a grid, its runs and their folder to values, and what else the result holds.
MEASURES: dict[Measure, Callable[[Grid, Sequence[Member], Path], tuple[Values, dict[str, Any]]]] = {
    "score": scores,
    "transfer": transfer_scores,
    "ensemble": ensemble_scores,
    "neighbours": neighbour_shares,
    "mixed": mixed_batch_scores,
}
