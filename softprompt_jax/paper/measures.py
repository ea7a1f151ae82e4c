"""What is measured on the runs of an experiment, for each line and column a value for each seed.

A value is there as soon as all the runs that it needs are finished.
"""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from softprompt_jax.analysis.inspect import inspect
from softprompt_jax.data.task import Example, Task
from softprompt_jax.inference.bank import PromptBank
from softprompt_jax.inference.ensemble import ensemble
from softprompt_jax.inference.evaluate import mean_score, run_score, score
from softprompt_jax.inference.predictor import Predictor, load_predictor
from softprompt_jax.paper import records
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
    """Return the first metric of other tasks under what each run has learnt, predicted as its own task is."""
    values: Values = {}
    for (member,) in _finished(members, runs, "line", "point", "task", "seed"):
        (own,), limit = member.run.tasks, member.run.result_examples
        loaded = functools.cache(functools.partial(load_predictor, runs / member.name))
        for target in grid.score_on[member.varied["task"]]:
            task = resolve(target).model_copy(update={"predict_by": own.predict_by})
            found = records.kept(runs, f"on {target}", [member], functools.partial(_evaluate, loaded, task, limit))
            column = _transfer_column(grid, member.varied["task"], target)
            values.setdefault(member.varied["line"], {}).setdefault(column, []).append(found[task.metrics[0]])
    return values, {}


def _evaluate(loaded: Callable[[], Predictor], task: Task, limit: int | None) -> dict[str, float]:
    return loaded().evaluate(task, _scored_on(task), limit)


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
        (task,), folders, limit = group[0].run.tasks, [runs / m.name for m in group], group[0].run.result_examples
        found = records.kept(
            runs,
            "ensemble",
            group,
            lambda task=task, folders=folders, limit=limit: ensemble(folders, split=_scored_on(task), limit=limit),
        )
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

    def read(member: Member) -> dict[str, Any]:
        (prompt,) = inspect([runs / member.name], neighbours=NEIGHBOURS)["prompts"]
        labels, rows = prompt["labels"], prompt["rows"]
        columns = {} if labels is None else {"label words found": labels["survive"] / labels["of"]}
        columns["distinct nearest"] = prompt["nearest_pieces"] / prompt["length"]
        columns["cosine"] = statistics.fmean(row["cosine"][0][1] for row in rows)
        return {"columns": columns, "pieces": [[piece for piece, _ in row["cosine"]] for row in rows[:SHOWN_ROWS]]}

    for (member,) in _finished(members, runs, "line", "point", "task", "seed"):
        found = records.kept(runs, "neighbours", [member], functools.partial(read, member))
        columns = values.setdefault(member.varied["line"], {})
        for column, value in found["columns"].items():
            columns.setdefault(column, []).append(value)
        pieces = [[re.sub("[▁Ġ]", "", piece) for piece in row] for row in found["pieces"]]
        nearest.setdefault(member.varied["line"], pieces)
    return values, {"nearest": nearest}


def mixed_batch_scores(grid: Grid, members: Sequence[Member], runs: Path) -> tuple[Values, dict[str, Any]]:
    """Answer the tests of all tasks of a seed in common batches, and one task at a time; they must not differ.

    Columns: the score of each task when its texts stand among the others', and "same answers", the share of texts
    that get the same answer either way.
    """
    values: Values = {}
    for group in _finished(members, runs, "line", "seed"):
        found = records.kept(runs, "mixed", group, functools.partial(_mixed, group, runs))
        columns = values.setdefault(group[0].varied["line"], {})
        for column, value in found.items():
            columns.setdefault(column, []).append(value)
    return values, {}


def _mixed(group: Sequence[Member], runs: Path) -> dict[str, float]:
    run, columns = group[0].run, {}
    bank = PromptBank(str(run.backbone), max_input_tokens=run.max_input_tokens, dtype=run.dtype)
    longest = max(member.run.max_target_tokens for member in group)
    each: dict[str, tuple[Task, list[Example]]] = {}
    for member in group:
        bank.add(member.varied["task"], runs / member.name)
        (task,) = member.run.tasks
        each[member.varied["task"]] = task, load(task, _scored_on(task))[: member.run.result_examples]
    asked = [(example.input, name) for name, (_, examples) in each.items() for example in examples]
    order = np.random.default_rng(group[0].varied["seed"]).permutation(len(asked))
    words = {name: task.choices for name, (task, _) in each.items()}
    shuffled = _answers(bank, [asked[i] for i in order], words, longest)
    mixed = dict(zip(order.tolist(), shuffled, strict=True))
    same, first = [], 0
    for name, (task, examples) in each.items():
        alone = _answers(bank, [(example.input, name) for example in examples], words, longest)
        own = [mixed[first + number] for number in range(len(examples))]
        columns[name] = mean_score(task, score(task, own, examples))
        same += [one == other for one, other in zip(own, alone, strict=True)]
        first += len(examples)
    return columns | {"same answers": statistics.fmean(same)}


def _answers(
    bank: PromptBank, asked: Sequence[tuple[str, str]], words: dict[str, list[str]], longest: int
) -> list[str]:
    """Return the answer to each (text, name): the likeliest of the name's label words, or what is decoded."""
    texts, names = zip(*asked, strict=True)
    if not any(words.values()):
        return [answer for answer, _ in bank.generate(texts, names, longest)]
    scores = bank.score_words(texts, names, [words[name] for name in names], longest)
    return [words[name][int(np.argmax(found))] for name, found in zip(names, scores, strict=True)]


def add_means(grid: Grid, values: Values) -> None:
    """Add the columns, or of an ensemble the rows, that are means of others, where all of these are there."""
    for name, of in grid.means.items():
        if grid.measure == "ensemble":
            if all(line in values for line in of):
                values[name] = {column: _mean([values[line][column] for line in of]) for column in values[of[0]]}
        else:
            for found in values.values():
                if all(len(found.get(point, ())) == len(found.get(of[0], ())) > 0 for point in of):
                    found[name] = _mean([found[point] for point in of])


def _mean(each: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(of_seed) for of_seed in zip(*each, strict=True)]


def columns(grid: Grid) -> list[str]:
    """Return the columns that a line has when all its runs are finished; label words are not found for every task."""
    return {
        "score": [*(point or "score" for point in grid.points), *grid.means],
        "transfer": list(targets(grid)),
        "ensemble": ["average", "best", "majority vote", "mean log-probability"],
        "neighbours": ["distinct nearest", "cosine"],
        "mixed": [*grid.tasks, "same answers"],
    }[grid.measure]


# From a grid, its runs and their folder to values, and what else the result holds.
MEASURES: dict[Measure, Callable[[Grid, Sequence[Member], Path], tuple[Values, dict[str, Any]]]] = {
    "score": scores,
    "transfer": transfer_scores,
    "ensemble": ensemble_scores,
    "neighbours": neighbour_shares,
    "mixed": mixed_batch_scores,
}
