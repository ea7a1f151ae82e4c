"""The commands about whole runs and many at once: plan, sweep, ensemble, inspect, report."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from softprompt_jax.cli.data import JSON_INDENT, AnyBackbone, Backbone
from softprompt_jax.cli.signals import preemptible
from softprompt_jax.config import UserError

Over = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUES",
        help="Setting to go over: seed=0..7, learning_rate=0.03,0.1,0.3, any dotted one; repeat it.",
        show_default=False,
    ),
]


def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file with the run's settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that differ, e.g. batch_size=64.")
    ] = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHIP:SHAPE", help="v5e:2x4, v5p:4x4x4, h100:8; repeat it for several.", show_default=False
        ),
    ] = None,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1, help="Share of peak assumed for examples/s.")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per topology.")] = False,
) -> None:
    """Say what a run takes on machines you do not have: compile its step for them, ahead of time.

    TPUs need the extra `tpu`, but no TPU. Exit code 3: it does not fit on one of them.
    """
    from softprompt_jax.analysis import plan as planning

    if not topology:
        raise UserError("plan: no topology; expected at least one; add --topology v5e:2x4")
    answers = planning.plan(config, overrides or [], topology, utilisation)
    for answer in answers:
        print(json.dumps(answer) if as_json else planning.describe(answer))
    if not all(answer["fits"] for answer in answers):
        raise typer.Exit(planning.DOES_NOT_FIT)


def sweep(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file with the runs' settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of all runs, e.g. steps=500.")
    ] = None,
    over: Over = None,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the runs' folders.", show_default=False)] = "",
    together: Annotated[int, typer.Option(min=1, help="Prompts in one program; memory grows with them.")] = 8,
    stop_after: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Stop a prompt after N evaluations without a better score."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
) -> None:
    """Train a config over lists of settings, prompts of one shape together in one program.

    Runs that train only prompts and differ in seed, task, learning rate or init go together; all others one after
    another. Each leaves the folder that train would leave, DIR/NAME. The same command goes on where it was killed.
    """
    if not over:
        raise UserError("sweep: no --over; expected settings to go over; add --over seed=0..4")
    if not out:
        raise UserError("sweep: no --out; expected a folder for the runs; add --out runs/sweep")
    with preemptible():
        from softprompt_jax.progress import Reporter
        from softprompt_jax.training.sweep import describe
        from softprompt_jax.training.sweep import sweep as train_sweep

        reporter = Reporter(quiet)
        try:
            result = train_sweep(config, over, out, overrides or [], together, stop_after, reporter)
        finally:
            reporter.stop()  # a bar hides the cursor
    print(json.dumps(result, indent=JSON_INDENT))
    if not quiet:
        for line in describe(result):
            print(line, file=sys.stderr)


def ensemble(
    runs: Annotated[list[str], typer.Argument(metavar="RUN|PROMPT...", help="Two or more prompts of one task.")],
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Task. \\[default: their own]")] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to score.")] = "validation",
    backbone: Backbone = None,
    any_backbone: AnyBackbone = False,
) -> None:
    """Score prompts of one task together: average, best, majority vote and mean log-probability, each with its sd.

    Every batch holds each text under every prompt. The sd of the average is that over prompts, the others are over
    bootstrap samples of the examples.
    """
    from softprompt_jax.inference.ensemble import ensemble as score_ensemble

    result = score_ensemble(runs, task, split, backbone, any_backbone)
    print(json.dumps(result, indent=JSON_INDENT))
    for name in ("average", "best", "vote", "log_probability"):
        found = {metric: cell for metric, cell in result[name].items() if metric != "source"}
        line = "  ".join(f"{metric} {cell['value']:.4g} ± {cell['sd']:.2g}" for metric, cell in found.items())
        print(f"{name:16} {line}", file=sys.stderr)


def inspect(
    prompts: Annotated[list[str], typer.Argument(metavar="RUN|PROMPT...", help="Prompts of one backbone.")],
    to: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write a page with plots (needs the extra report).")
    ] = None,
    neighbours: Annotated[int, typer.Option(min=2, help="Nearest pieces of each row.")] = 5,
    backbone: Backbone = None,
    any_backbone: AnyBackbone = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")] = False,
) -> None:
    """Read prompts back: norms, nearest pieces, clusters, surviving labels, distances to the start and each other."""
    from softprompt_jax.analysis import inspect as interpret

    result = interpret.inspect(prompts, backbone, neighbours, any_backbone)
    if as_json:
        print(json.dumps(result, indent=JSON_INDENT))
    else:
        for line in interpret.describe(result):
            print(line)
    for path in interpret.write_page(result, to) if to else ():
        print(f"wrote {path}", file=sys.stderr)


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN|DIR...", help="Run folders, or folders of them.")],
    to: Annotated[str, typer.Option(metavar="DIR", help="Folder of the page.", show_default=False)] = "",
) -> None:
    """Compare runs on one HTML page with PNGs: curves, scores with confidence over seeds, tasks, settings."""
    from softprompt_jax.analysis.report import report as write_report

    if not to:
        raise UserError("report: no --to; expected a folder for the page; add --to reports/first")
    for path in write_report(runs, to):
        print(f"wrote {path}", file=sys.stderr)


COMMANDS = (plan, sweep, ensemble, inspect, report)
