"""Commands that train, and what helps to choose what to train: methods, plan, train, sweep."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from softprompt_jax.cli.options import AsJson, Config, Overrides, Quiet, Topology, note, print_json
from softprompt_jax.cli.signals import preemptible

PANEL = "Train"


def methods(
    backbone: Annotated[
        str, typer.Option(metavar="NAME|FOLDER", help="A published size, e.g. t5-v1_1-base, or a backbone.")
    ] = "embedded",
) -> None:
    """List the methods: parameters that each trains with default settings, its paper, optimizer and name in PEFT."""
    from softprompt_jax.checkpoints.backbone import load_backbone
    from softprompt_jax.methods.listing import listed
    from softprompt_jax.models.presets import PRESETS

    settings = PRESETS[backbone] if backbone in PRESETS else load_backbone(backbone).settings
    total = settings.parameters()
    print(f"{'kind':12} {'paper':24} {'trains':>15} {'share':>9}  {'optimizer':14} PEFT")
    for one in listed(settings):
        share = f"{one.parameters / total:.4%}"
        print(f"{one.kind:12} {one.paper:24} {one.parameters:15,} {share:>9}  {one.optimizer:14} {one.peft or '-'}")


def plan(
    config: Config,
    topology: Topology,
    overrides: Overrides = None,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the chip's peak that the estimate of examples/s assumes.")
    ] = 0.4,
    as_json: AsJson = False,
) -> None:
    """Estimate memory and speed of a run on machines that you do not have, by compiling its step for them.

    TPUs need the extra `tpu`, but no TPU. The exit code is 3 if the run does not fit on one of the machines.
    """
    from softprompt_jax.analysis import plan as planning

    answers = planning.plan(config, overrides or [], topology, utilisation)
    for answer in answers:
        print(json.dumps(answer) if as_json else planning.describe(answer))
    if not all(answer["fits"] for answer in answers):
        raise typer.Exit(planning.DOES_NOT_FIT)


def train(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Folder of the run, local or gs://.", show_default="runs/ and a hash of the settings"
        ),
    ] = None,
    quiet: Quiet = False,
    coordinator: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Several machines: address of process 0. TPU pods and Slurm set it."),
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Several machines: number of processes.")] = None,
    process: Annotated[int | None, typer.Option(help="Several machines: number of this process, from 0.")] = None,
) -> None:
    """Train what the config says, by default a prompt, score it and print the result as JSON.

    The same command continues a run that was stopped, and prints the result of a finished one. RUN gets config.yaml,
    metrics.jsonl, tensorboard/, checkpoints/, trained.safetensors, prompt.safetensors and result.json.
    """
    with preemptible():
        from softprompt_jax.distributed.multihost import connect, is_first
        from softprompt_jax.progress import Reporter
        from softprompt_jax.run import load_run
        from softprompt_jax.training.loop import train as train_run

        run = load_run(config, overrides or [])
        connect(coordinator, processes, process)
        reporter = Reporter(quiet)
        try:
            result = train_run(run, out, reporter)
        finally:
            reporter.stop()  # a bar hides the cursor
    if not is_first():
        return
    print_json(result)
    if not quiet:
        note(_summary(run, result))


def _summary(run: Any, result: dict[str, Any]) -> str:
    """Say in a line how the result compares with no training and with the majority class."""
    from softprompt_jax.inference.evaluate import score_factor, score_text

    baselines = result.get("baselines")
    if baselines is None:
        return f"validation: {result['validation']}"
    scores = result[baselines["split"]]
    name, times = next(iter(scores)), score_factor(run)
    sign = "%" if times == 100 else ""
    after, before = (f"{score_text(found[name], times)}{sign}" for found in (scores, baselines["untrained"]))
    text = f"{baselines['split']} {name}: {after} after training, {before} before"
    return f"{text}, {baselines['majority']:.1%} for the majority class" if name == "accuracy" else text


def sweep(
    config: Config,
    over: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUES",
            help="Setting and its values: seed=0..7, learning_rate=0.03,0.1 or any dotted one. Repeat it for several.",
        ),
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the folders of the runs.")],
    overrides: Overrides = None,
    together: Annotated[
        int, typer.Option(min=1, help="Prompts that train in one program. Memory grows with them.")
    ] = 8,
    stop_after: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Stop a prompt after N evaluations without a better score."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a config with every combination of some settings, and print a table: mean, sd and best over seeds.

    Runs that train only prompts and differ in seed, task, learning rate or init train in one program. All others train
    one after another. Each leaves the folder that `train` would leave, DIR/NAME; DIR/sweep.json has all numbers. The
    same command continues where a stopped one was.
    """
    with preemptible():
        from softprompt_jax.progress import Reporter
        from softprompt_jax.training.sweep import describe
        from softprompt_jax.training.sweep import sweep as train_sweep

        reporter = Reporter(quiet)
        try:
            result = train_sweep(config, over, out, overrides or [], together, stop_after, reporter)
        finally:
            reporter.stop()  # a bar hides the cursor
    if as_json:
        print_json(result)
        return
    for line in describe(result):
        print(line)


COMMANDS = {"methods": methods, "plan": plan, "train": train, "sweep": sweep}
