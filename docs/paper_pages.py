"""The pages of the paper's experiments: what has been found on SmolLM2, the published setting, and the miniatures."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plot import plot

from softprompt_jax.paper import experiments as paper
from softprompt_jax.paper import results
from softprompt_jax.run import Run

MINIATURE = "miniature.md"


def pages(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each page and picture, from the committed JSON in `folder`."""
    for name in paper.experiments():
        experiment, real, small = paper.load(name)[0], _read(folder / "real" / name), _read(folder / name)
        yield f"{name}.md", experiment_page(name, experiment, real, _read(folder / f"{name}-published-plan"))
        for grid, result, file in (
            (experiment.real, real, name),
            (experiment.miniature, small, f"miniature_{name}"),
        ):
            if picture := picture_of(experiment, grid, result):
                yield f"{file}.svg", picture
    yield MINIATURE, miniature_page(folder)


def _read(path: Path) -> Any:
    path = path.with_name(f"{path.name}.json")
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def picture_of(experiment: paper.Experiment, grid: paper.Grid | None, result: dict[str, Any] | None) -> str | None:
    """Return the plot of a result, if there is anything to draw."""
    if grid is None or result is None:
        return None
    lines = {
        line: {column: cell for column, cell in cells.items() if cell and column not in ("cosine", "same answers")}
        for line, cells in result["lines"].items()
    }
    lines = {line: cells for line, cells in lines.items() if cells}
    if not lines:
        return None
    neighbours = grid.measure == "neighbours"
    y = f"{'share' if neighbours else 'score' if ';' in result['metric'] else result['metric']}, %"
    kind, x = (experiment.plot, experiment.x) if grid.plot is None else (grid.plot, "")
    return plot(experiment.title, lines, kind, y, None if neighbours else result["majority"], x)


def finished(result: dict[str, Any] | None, grid: paper.Grid) -> str:
    """Say how much of a form has been run."""
    if result is None:
        return "a command, not run yet"
    total = len(result["missing"]) + result["cells"]
    fewer = f" of {_seeds(result['seeds'])}, not {grid.seeds}" if result["seeds"] < grid.seeds else ""
    return (f"{result['cells']} of {total} runs" if result["missing"] else f"all {total} runs") + fewer


def metric_of(grid: paper.Grid, result: dict[str, Any]) -> str:
    """Say what the numbers of a form are."""
    spread = "mean ± standard deviation over seeds"
    if grid.measure == "neighbours":
        return f"Shares of label words and of rows, and the cosine to the nearest piece, all times 100, {spread}"
    return f"In percent, {spread}. Metric: {result['metric']}"


def found(name: str, form: paper.FormName, result: dict[str, Any] | None, said: list[str], file: str) -> list[str]:
    """Return what has been found of a form: runs, table, plot, and the sentences of a person."""
    experiment, _, grid = paper.load_form(name, form)
    parts = [f"{_grid(experiment, grid)} Cost: {grid.cost}.", trained(name, form)]
    if result is None:
        return [*parts, results.table(results.cells(grid, {})), "Not run yet: all cells are empty."]
    counted = form == "real" and grid.measure != "ensemble"
    parts += [results.table(result["lines"], counts=counted), f"{metric_of(grid, result)} ({finished(result, grid)})."]
    if counted:
        parts[-1] += " n is the number of seeds."
    if grid.measure != "neighbours" and result["majority"]:
        levels = {column.rpartition(" to ")[2]: value for column, value in result["majority"].items()}
        level = ", ".join(f"{task} {value:.1f}" for task, value in levels.items())
        parts[-1] += f" Always saying the most frequent label comes to {level} in the same metric."
    if missing := result["missing"]:
        seeds = collections.Counter(label.rpartition(", seed ")[0] or "all" for label in missing)
        listed = "; ".join(f"{what} ({count})" for what, count in seeds.items())
        parts.append(f"Not run yet, with the number of seeds: {listed}.")
    if any(cell is None for line in result["lines"].values() for cell in line.values()):
        parts.append("An empty cell waits for runs that it needs.")
    if picture_of(experiment, grid, result):
        parts.append(f"![{experiment.title}: the table as a plot]({file}.svg)")
    parts += [f"{line}: {_pieces(rows)}" for line, rows in result.get("nearest", {}).items()]
    path = f"benchmarks/results/paper/{'real/' * (form == 'real')}{name}.json"
    parts.append(f"Numbers: [{name}.json](../../{path}), {result['date']}, jax {result['versions']['jax']}.")
    return [*parts, *([" ".join(said)] if said else [])]


def experiment_page(name: str, experiment: paper.Experiment, real: dict[str, Any] | None, plan: Any = None) -> str:
    """Return the page of an experiment: its result on SmolLM2, and the plan of its published runs."""
    parts = [f"# {experiment.title}", f"{experiment.source}. {experiment.question}"]
    if "real" in experiment.forms:
        parts += ["## On SmolLM2", f"    softprompt paper {name} --form real"]
        parts += found(name, "real", real, experiment.found, name)
    if published := experiment.published:
        needs = said_above(paper.experiments()[name].read_text("utf-8").partition("\n")[2])
        parts += ["## Published setting", *([needs] if needs else []), f"    softprompt paper {name} --form published"]
        parts.append(
            f"{_grid(experiment, published)} Cost: {published.cost}. None of these runs was trained. Tests build one "
            "run of each distinct step without weights. [How to run it](README.md#the-published-form)."
        )
        if published.reported:
            parts.append(results.table(results.cells(published, {}), published.reported))
            parts.append(
                f"In brackets what was published: {published.reported.source}. The command prints ours before them."
            )
        parts += [plan_table(plan)] if plan else []
    if "miniature" in experiment.forms:
        parts.append(
            f"[The same on toys of 0.35 to 11 million weights]({MINIATURE}#{_anchor(experiment)}) tests the machinery."
        )
    return (
        "\n\n".join([*parts, f"All is stated in [configs/paper/{name}.yaml](../../configs/paper/{name}.yaml)."]) + "\n"
    )


def miniature_page(folder: Path) -> str:
    """Return the one page of the miniatures."""
    parts = [
        "# The experiments on toys",
        "`softprompt paper NAME` runs an experiment on the embedded T5 of 3 million weights, or on the T5s of `make "
        "ladder` (0.35 to 11 million). **They test the machinery of T5**: initialisation, masks, losses, transfer, "
        "votes and mixed batches run end to end, with three seeds, in minutes of a CPU. The toys were pre-trained on "
        "questions about sentiment, so that they answer these before any training and hardly anything else; what is "
        "found of prompts here says little about language models. [Those are here](README.md).",
    ]
    for name in paper.experiments():
        experiment = paper.load(name)[0]
        if experiment.miniature is not None:
            result, said = _read(folder / name), experiment.found_in_miniature
            parts += [f"## {experiment.title}", f"{experiment.source}. {experiment.question}"]
            parts += [f"    softprompt paper {name}", *found(name, "miniature", result, said, f"miniature_{name}")]
    return "\n\n".join(parts) + "\n"


def _anchor(experiment: paper.Experiment) -> str:
    return experiment.title.lower().replace(" ", "-")


def plan_table(steps: list[dict[str, Any]]) -> str:
    """Return what `softprompt paper --topology` said of each distinct step of an experiment's published runs."""
    lines = ["| compiled for | | runs | fits | peak of GiB a chip | TFLOP a step | examples/s |", "|---" * 7 + "|"]
    for step in steps:
        what = f"{', '.join(step['lines'])}{': ' if step['points'] else ''}{', '.join(step['points'])}"
        for topology, plan in step["plans"].items():
            peak = "?" if plan["peak_bytes"] is None else f"{plan['peak_bytes'] / 2**30:.1f}"
            rate = "" if plan["examples_per_s"] is None else f"{plan['examples_per_s']:,.0f}"
            work = float(f"{plan['flops'] / 1e12:.3g}")
            lines.append(
                f"| {topology} | {what} | {step['runs']} | {'yes' if plan['fits'] else 'no'} | {peak} of "
                f"{plan['limit_bytes'] / 2**30:.0f} | {work:,.10g} | {rate} |"
            )
    share = next(iter(steps[0]["plans"].values()))["utilisation"]
    return "\n".join(lines) + f"\n\nExamples/s are estimated: if the chips reach {share:.0%} of their peak."


def _pieces(rows: list[list[str]]) -> str:
    said = "; ".join(" ".join(f"`{piece}`" for piece in row) for row in rows)
    return f"nearest pieces of each of the first rows, seed 0, a semicolon after each row: {said}"


def trained(name: str, form: paper.FormName) -> str:
    """Say what each line of an experiment trains, without what differs among its points."""
    _, path, grid = paper.load_form(name, form)
    runs = collections.defaultdict(list)
    for member in paper.members(grid, path, seeds=1):
        line = member.varied["line"]
        runs[line].append((grid.lines[line].read, member.run))
    lines = collections.defaultdict(list)
    for line, each in runs.items():
        facts = zip(*(_facts(*one) for one in each), strict=True)
        lines[", ".join(fact[0] for fact in facts if fact[0] and len(set(fact)) == 1)].append(line)
    whose = [f"{'; '.join(names)}: {said}" if len(lines) > 1 else said for said, names in lines.items()]
    return "\n".join(["What is trained:", "", *(f"- {text}" for text in whose)])


def _facts(read: str, run: Run) -> list[str]:
    if read == "untrained":
        return ["nothing"]
    (method,) = run.methods
    rows = getattr(method, "length", None)
    what = ["all weights" if method.kind == "full" else method.kind, f"{rows} rows" if rows else ""]
    optimizer = f"{run.optimizer.kind} at {run.optimizer.learning_rate:g}"
    schedule = "" if run.schedule.decay == "constant" else f", {run.schedule.decay} decay"
    steps = f"{run.steps:,} steps of {run.batch_size} examples"
    backbone = run.backbone if isinstance(run.backbone, str) else "random weights"
    return [*what, optimizer + schedule, steps, f"on the backbone {backbone}"]


def _grid(experiment: paper.Experiment, grid: paper.Grid) -> str:
    """Say which runs a grid has."""
    x = f" ({experiment.x})" if experiment.x and grid.plot is None else ""
    axes = {"line": list(grid.lines), f"point of the x axis{x}": [*filter(None, grid.points)], "task": list(grid.tasks)}
    named = [f"{name}: {'; '.join(values)}" for name, values in axes.items() if values]
    return f"A run for each {'. Each '.join(named)}. {_seeds(grid.seeds)} of each."


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def listing(folder: Path) -> str:
    """Return the list of experiments with the first of what was found."""
    rows = []
    for name in paper.experiments():
        experiment, result = paper.load(name)[0], _read(folder / "real" / name)
        run = finished(result, experiment.real) if experiment.real else "no weights for it here"
        forms = ", ".join(form for form in experiment.forms if form != "real")
        said = experiment.found[0] if experiment.found and result else ""
        rows.append(f"| [{experiment.title}]({name}.md) | {experiment.source} | {run} | {forms} | {said} |")
    head = "| experiment | in the paper | on SmolLM2 | other forms | what came out |"
    return f"{head}\n|---|---|---|---|---|\n" + "\n".join(rows)


def readme(folder: Path) -> str:
    """Return the table and the picture that the README shows: other domains, and what rows start from, on SmolLM2."""
    parts, shift, starts = [], _read(folder / "real" / "domain_shift"), _read(folder / "real" / "initialisation")
    if shift:
        parts.append(results.table(shift["lines"], counts=bool(shift["missing"])))
    experiment, _, grid = paper.load_form("initialisation", "real")
    if picture_of(experiment, grid, starts):
        parts.append("![Test accuracy by what the rows started from](docs/experiments/initialisation.svg)")
    return "\n\n".join(parts)


def said_above(text: str) -> str:
    """Return a config's comments as Markdown: lines that are set in are commands."""
    lines = [line[1:].rstrip() for line in text.splitlines() if line.startswith("#")]
    parts = []
    for is_command, found in itertools.groupby(lines, lambda line: line.startswith("   ")):
        stripped = [line.strip() for line in found]
        parts.append("\n".join(f"    {line}" for line in stripped) if is_command else " ".join(stripped))
    return "\n\n".join(parts)
