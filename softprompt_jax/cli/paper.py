"""The command `softprompt paper`: list the experiments of Lester et al. (2021), or run one."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Annotated

import typer

from softprompt_jax.cli.signals import preemptible
from softprompt_jax.config import UserError


class Form(enum.StrEnum):
    """Which of an experiment's two forms."""

    miniature = "miniature"
    published = "published"


def paper(
    experiment: Annotated[
        str | None, typer.Argument(metavar="[EXPERIMENT]", help="Its name or file; without one all are listed.")
    ] = None,
    form: Annotated[
        Form,
        typer.Option(
            help="miniature: the embedded T5, or those of make ladder, on a CPU. published: hub models, for a TPU."
        ),
    ] = Form.miniature,
    seeds: Annotated[int | None, typer.Option(min=1, help="\\[default: as the experiment says]")] = None,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Where runs are kept, by the hash of their settings.")] = (
        Path("runs") / "paper"
    ),
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON to write. \\[default: DIR/EXPERIMENT-FORM.json]", show_default=False),
    ] = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHIP:SHAPE",
            help="Only say what every distinct step would take on v5e:2x4, v5p:2x2x1, ... (softprompt plan); "
            "repeat it for several.",
        ),
    ] = None,
    configs: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Only write every run as a config, to plan or train it elsewhere."),
    ] = None,
) -> None:
    """Run a figure or table of Lester et al. (2021), and print it; without a name list all with their cost.

    The same command goes on where a killed one stopped, and prints what is finished. Experiments share runs.
    """
    from softprompt_jax.checkpoints import artifact
    from softprompt_jax.paper import experiments as engine

    if experiment is None:
        for line in engine.listing():
            print(line)
        return
    name = Path(experiment).stem
    for given, is_wrong in ((to, Path.is_dir), (configs, Path.is_file)):
        if given is not None and is_wrong(given):
            found, expected = ("folder", "file") if given is to else ("file", "folder")
            raise UserError(f"{given}: is a {found}; expected a {expected} to write to; give another name")
    if configs is not None:
        files = engine.write_configs(experiment, form.value, configs, seeds)
        print(f"wrote {len(files)} configs to {configs}", file=sys.stderr)
        return
    to = to or runs / f"{name}-{form.value}{'-plan' if topology else ''}.json"
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be made ({error.strerror}); expected a writable folder") from None

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if topology:
        from softprompt_jax.analysis import plan

        steps = engine.plan_experiment(experiment, form.value, runs, topology, seeds, tell)
        artifact.dump(steps, to)
        for step in steps:
            print(f"{' / '.join(step['lines'])}: {', '.join(step['points']) or 'all'} ({step['runs']} runs)")
            for answer in step["plans"].values():
                print(plan.describe(answer))
        fits = all(answer["fits"] for step in steps for answer in step["plans"].values())
        raise typer.Exit(0 if fits else plan.DOES_NOT_FIT)
    with preemptible():
        result = engine.run_experiment(experiment, form.value, runs, to, seeds, tell)
    print(engine.table(result))
    print(f"wrote {to}", file=sys.stderr)
