"""Commands that train, and what helps to choose what to train: methods, plan, train, sweep, tune, compress."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer

import softprompt_jax
from softprompt_jax.cli.options import (
    AsJson,
    Config,
    Coordinator,
    Overrides,
    Process,
    Processes,
    Quiet,
    Topology,
    note,
    print_json,
    print_result,
)
from softprompt_jax.cli.signals import preemptible

PANEL = "Train"
Wait = Annotated[
    bool, typer.Option("--wait", help="Wait for the end of another command that trains in the folder, then go on.")
]


def methods(
    backbone: Annotated[
        str, typer.Option(metavar="NAME|FOLDER", help="A published size, e.g. t5-v1_1-base, or a backbone.")
    ] = "embedded",
) -> None:
    """List the methods: parameters that each trains with default settings, its paper, optimizer and name in PEFT."""
    from softprompt_jax.checkpoints.backbone import load_backbone
    from softprompt_jax.methods import METHODS
    from softprompt_jax.methods.listing import optimizer_of, parameters
    from softprompt_jax.models.presets import published_size

    settings = published_size(backbone) or load_backbone(backbone).settings
    total = settings.parameters()
    print(f"{'kind':12} {'paper':24} {'trains':>15} {'share':>9}  {'optimizer':14} PEFT")
    for kind, method in METHODS.items():
        count, optimizer = parameters(settings, method()), optimizer_of(method)
        share, peft = f"{count / total:.4%}", method.peft_type or "-"
        print(f"{kind:12} {method.paper:24} {count:15,} {share:>9}  {optimizer:14} {peft}")


def plan(
    config: Config,
    topology: Topology,
    overrides: Overrides = None,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the chip's peak that the estimate of examples/s assumes.")
    ] = 0.4,
    purpose: Annotated[
        Literal["train", "predict", "serve"],
        typer.Option("--for", help="What the machine is to do with the run: train it, predict texts, or serve it."),
    ] = "train",
    as_json: AsJson = False,
) -> None:
    """Estimate memory and speed of a run on machines that you do not have, by compiling its step for them.

    With --for predict or serve that of its answers: weights, caches, and the most texts that are answered at once.
    TPUs need the extra `tpu`, but no TPU; GPUs the extra `cuda13` or `cuda12`, without which the figures are estimates,
    and say so. The exit code is 3 if the run does not fit on one of the machines.
    """
    from softprompt_jax.analysis import plan as planning

    answers = planning.plan(config, overrides or [], topology, utilisation, purpose)
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
    wait: Wait = False,
    quiet: Quiet = False,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
) -> None:
    """Train what the config says, by default a prompt, score it and print the result as JSON.

    The same command continues a run that was stopped, and prints the result of a finished one. RUN gets config.yaml,
    metrics.jsonl, tensorboard/, checkpoints/, trained.safetensors, prompt.safetensors, mistakes.json (wrong answers
    where the task has label words) and result.json.
    """
    with preemptible(quiet) as reporter:
        from softprompt_jax.distributed.multihost import connect, is_first
        from softprompt_jax.training.run_folder import default_folder

        run = softprompt_jax.load_run(config, overrides or [])
        connect(coordinator, processes, process)
        place = default_folder(run.expanded()) if out is None else out
        result = softprompt_jax.train(run, place, reporter, wait).result
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
        int | None, typer.Option(min=1, metavar="N", help="Stop a prompt after N evaluations without a better score.")
    ] = None,
    wait: Wait = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a config with every combination of some settings, and print a table: mean, sd and best over seeds.

    Runs that train only prompts and differ in seed, task, learning rate or init train in one program. All others train
    one after another. Each leaves the folder that `train` would leave, DIR/NAME; DIR/sweep.json has all numbers. The
    same command continues where a stopped one was.
    """
    with preemptible(quiet) as reporter:
        from softprompt_jax.training.sweep import describe

        result = softprompt_jax.sweep(config, over, out, overrides or [], together, stop_after, reporter, wait)
    print_result(result, as_json, describe)


def tune(
    config: Config,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the race; the winner's run is DIR/winner.")],
    overrides: Overrides = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUES",
            help="Setting to choose and its values, as in sweep. Repeat it for several.",
            show_default="5 learning rates; of prompts also label words or vocabulary, and 10, 20 or 50 rows",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS|TIME",
            help="Steps of all candidates together (4000), or time (90s, 20m, 2h); without the winner's own run.",
            show_default="8 times the config's steps",
        ),
    ] = None,
    together: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prompts of one shape that train in one program.",
            show_default="8 on an accelerator or where batches have one shape, else 1",
        ),
    ] = None,
    wait: Wait = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Find settings by a race, train the winner to the end, and print a table: who fell when, and why.

    In each round all candidates train for a share of the steps, and a third of them, those with the lowest validation
    loss, go on. DIR/winner is an ordinary run; DIR/tune.json has all numbers. The same command continues where a
    stopped one was.
    """
    with preemptible(quiet) as reporter:
        from softprompt_jax.training.tune import describe

        result = softprompt_jax.tune(config, out, over or [], overrides or [], budget, together, reporter, wait)
    print_result(result, as_json, describe)
    if not quiet and not as_json:
        note(_summary(softprompt_jax.load_run(f"{out}/winner/config.yaml"), result["result"]))


def compress(
    context: Annotated[str, typer.Argument(metavar="CONTEXT", help="Text file: an instruction, examples, a document.")],
    out: Annotated[str, typer.Option(metavar="RUN", help="Folder of the run.")],
    overrides: Overrides = None,
    inputs: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rows with `inputs` and, where known, `targets`: jsonl, json, csv or tsv."),
    ] = None,
    ask: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Instead: the model asks N questions, which RUN.inputs.jsonl keeps."),
    ] = None,
    backbone: Annotated[str, typer.Option(metavar="FOLDER|NAME", help="Frozen model.")] = "smollm2",
    rows: Annotated[int, typer.Option(min=1, help="Prompt rows that replace the context.")] = 20,
    wait: Wait = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a few prompt rows to stand for a long context, by distillation from the model that reads it.

    The result is a run like any other, for predict, serve and export. It takes settings as `train` does, such as
    steps=500; a prefix is methods='[{kind: prefix, length: 50, network: null, positions: before}]'. The same command
    continues where a stopped one was.
    """
    with preemptible(quiet) as reporter:
        from softprompt_jax.training.compress import compress, describe

        result = compress(context, out, inputs, ask, backbone, rows, overrides or [], reporter, wait).result
    print_result(result, as_json, describe)


COMMANDS = {"methods": methods, "plan": plan, "train": train, "sweep": sweep, "tune": tune, "compress": compress}
