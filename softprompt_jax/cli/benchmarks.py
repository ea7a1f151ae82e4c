"""Commands about published benchmarks: GLUE and SuperGLUE, and the experiments of Lester et al. (2021)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from softprompt_jax.cli.options import (
    Backbone,
    Coordinator,
    Mesh,
    Overrides,
    Process,
    Processes,
    Source,
    TaskName,
    Trust,
    note,
    print_json,
)
from softprompt_jax.cli.signals import preemptible
from softprompt_jax.cli.use import connect, is_first, note_truncated, predictor_and_task
from softprompt_jax.config import UserError
from softprompt_jax.files import writable

PANEL = "Benchmarks"


def submit(
    source: Source,
    to: Annotated[str, typer.Option(metavar="FOLDER", help="Folder to write the file to.")],
    task: TaskName = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to predict.")] = "test",
    backbone: Backbone = None,
    mesh: Mesh = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
    trust: Trust = False,
) -> None:
    """Predict the test split of a GLUE or SuperGLUE task and write the file that the benchmark's website takes.

    The labels of these test splits are not public, so that `eval` cannot score them.
    """
    connect(coordinator, processes, process, mesh)
    predictor, chosen = predictor_and_task(source, task, backbone, trust=trust, mesh=mesh)
    path, illegal = predictor.submit(chosen, split, Path(to))
    if not is_first():
        return
    note(f"wrote {path}" + (f"; {illegal} illegal answers, written as the first label" * bool(illegal)))
    note_truncated(predictor)


def average(
    benchmark: Annotated[Literal["superglue", "glue"], typer.Argument(help="Benchmark.")],
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Finished runs, one or more of each task.")],
) -> None:
    """Compute the GLUE or SuperGLUE score from the validation scores of finished runs, as JSON.

    It averages as the benchmark does: runs of a task, metrics of a task, then tasks.
    """
    from softprompt_jax.inference.evaluate import benchmark_average

    print_json(benchmark_average(benchmark, [Path(run) for run in runs]))


def paper(
    experiment: Annotated[
        str | None,
        typer.Argument(
            metavar="[EXPERIMENT]",
            help="Name or file of an experiment; all: each that has the form, the cheapest first, seed after seed.",
        ),
    ] = None,
    overrides: Overrides = None,
    form: Annotated[
        Literal["miniature", "real", "published"],
        typer.Option(
            help="miniature: the embedded T5, or those of `make ladder`, on a CPU, a test of the machinery. real: "
            "SmolLM2, on a CPU. published: models of the hub, on an accelerator."
        ),
    ] = "miniature",
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Number of seeds.", show_default="as the experiment says")
    ] = None,
    runs: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the runs, each named by a hash of its settings.")
    ] = Path("runs") / "paper",
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="JSON file to write; of all: the folder.", show_default="DIR/EXPERIMENT-FORM.json"
        ),
    ] = None,
    together: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of prompts of one shape that train in one program, as in `softprompt sweep`.",
            show_default="8; real and published: 1",
        ),
    ] = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHIP:SHAPE",
            help="Train nothing; estimate memory and speed on this machine, as `softprompt plan` does, e.g. v5e:2x4. "
            "Repeat it for several.",
        ),
    ] = None,
    configs: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Train nothing; write the YAML config of every run to this folder."),
    ] = None,
) -> None:
    """Reproduce a figure or table of Lester et al. (2021) and print it.

    Without a name, list all experiments with their cost. The runs train as a sweep: prompts of one shape in one
    program. Experiments share runs. The same command continues where a stopped one was; `timeout 3h softprompt paper
    ...` stops it, with everything saved.
    """
    from softprompt_jax.checkpoints import artifact
    from softprompt_jax.paper import experiments as engine
    from softprompt_jax.paper.results import table

    if experiment is None:
        for line in engine.listing():
            print(line)
        return
    name, settings = Path(experiment).stem, overrides or []
    every = experiment == "all"
    if every and (topology or configs is not None):
        raise UserError("paper all: found --topology or --configs; expected the name of one experiment with these")
    for given, is_wrong in ((to, Path.is_file if every else Path.is_dir), (configs, Path.is_file)):
        if given is not None and is_wrong(given):
            found, expected = ("file", "folder") if given is configs or every else ("folder", "file")
            raise UserError(f"{given}: is a {found}; expected a {expected} to write to; give another name")
    if configs is not None:
        files = engine.write_configs(experiment, form, configs, seeds, settings)
        note(f"wrote {len(files)} configs to {configs}")
        return
    to = to or runs / (form if every else f"{name}-{form}{'-plan' if topology else ''}.json")
    for folder in (to if every else to.parent, runs):
        with writable(folder, folder=True):
            pass
    if topology:
        from softprompt_jax.analysis import plan

        steps = engine.plan_experiment(experiment, form, runs, topology, seeds, note, settings)
        artifact.dump(steps, to)
        for step in steps:
            print(f"{' / '.join(step['lines'])}: {', '.join(step['points']) or 'all'} ({step['runs']} runs)")
            for answer in step["plans"].values():
                print(plan.describe(answer))
        fits = all(answer["fits"] for step in steps for answer in step["plans"].values())
        raise typer.Exit(0 if fits else plan.DOES_NOT_FIT)
    together = together or (8 if form == "miniature" else 1)
    if every:
        with preemptible() as reporter:
            done = dict(engine.run_all(form, runs, to, seeds, together, reporter, settings))
        for name, result in done.items():
            print(f"{name}\n\n{table(result['lines'], engine.load_form(name, form)[2].reported)}\n")
        return
    with preemptible() as reporter:
        result = engine.run_experiment(experiment, form, runs, to, seeds, together, reporter, settings)
    print(table(result["lines"], engine.load_form(experiment, form)[2].reported))
    note(f"wrote {to}")


COMMANDS = {"submit": submit, "average": average, "paper": paper}
