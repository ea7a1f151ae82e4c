"""The command `softprompt paper`: list the experiments of Lester et al. (2021), or run one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from softprompt_jax.cli.signals import preemptible
from softprompt_jax.config import UserError


def paper(
    experiment: Annotated[
        str | None, typer.Argument(metavar="[EXPERIMENT]", help="Its name or file. Without one: list all.")
    ] = None,
    form: Annotated[
        Literal["miniature", "published"],
        typer.Option(
            help="miniature: the embedded T5, or those of `make ladder`, on a CPU. published: hub models, on a TPU."
        ),
    ] = "miniature",
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Number of seeds. \\[default: as the experiment says]")
    ] = None,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Run folders, named by the hash of their settings.")] = (
        Path("runs") / "paper"
    ),
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON to write. \\[default: DIR/EXPERIMENT-FORM.json]", show_default=False),
    ] = None,
    together: Annotated[
        int | None,
        typer.Option(
            min=1, help="Prompts of one shape in one program, as in a sweep. \\[default: 8; published: 1, as planned]"
        ),
    ] = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHIP:SHAPE",
            help="Train nothing; say what each step of another size takes on v5e:2x4, v5p:2x2x1, ... (as "
            "`softprompt plan`). Repeat it for several.",
        ),
    ] = None,
    configs: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Train nothing; write each run as a config, to plan or train it elsewhere."),
    ] = None,
) -> None:
    """Run a figure or table of Lester et al. (2021) and print it. Without a name: list all with their cost.

    The runs train as a sweep: prompts of one shape in one program. Experiments share runs. The same command goes on
    where a killed one stopped.
    """
    from softprompt_jax.checkpoints import artifact
    from softprompt_jax.paper import experiments as engine
    from softprompt_jax.paper.results import table
    from softprompt_jax.progress import Reporter

    if experiment is None:
        for line in engine.listing():
            print(line)
        return
    name, reporter = Path(experiment).stem, Reporter()
    for given, is_wrong in ((to, Path.is_dir), (configs, Path.is_file)):
        if given is not None and is_wrong(given):
            found, expected = ("folder", "file") if given is to else ("file", "folder")
            raise UserError(f"{given}: is a {found}; expected a {expected} to write to; give another name")
    if configs is not None:
        files = engine.write_configs(experiment, form, configs, seeds)
        print(f"wrote {len(files)} configs to {configs}", file=sys.stderr)
        return
    to = to or runs / f"{name}-{form}{'-plan' if topology else ''}.json"
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be made ({error.strerror}); expected a writable folder") from None

    if topology:
        from softprompt_jax.analysis import plan

        steps = engine.plan_experiment(experiment, form, runs, topology, seeds, reporter.line)
        artifact.dump(steps, to)
        for step in steps:
            print(f"{' / '.join(step['lines'])}: {', '.join(step['points']) or 'all'} ({step['runs']} runs)")
            for answer in step["plans"].values():
                print(plan.describe(answer))
        fits = all(answer["fits"] for step in steps for answer in step["plans"].values())
        raise typer.Exit(0 if fits else plan.DOES_NOT_FIT)
    together = together or (8 if form == "miniature" else 1)
    with preemptible():
        try:
            result = engine.run_experiment(experiment, form, runs, to, seeds, together, reporter)
        finally:
            reporter.stop()  # a bar hides the cursor
    print(table(result))
    print(f"wrote {to}", file=sys.stderr)
