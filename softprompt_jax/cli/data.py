"""The commands about tasks: list and show them, answer a benchmark's hidden test split, average its runs."""

from __future__ import annotations

import enum
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompt_jax.config import UserError

Source = Annotated[
    str, typer.Argument(metavar="RUN|PROMPT", help="A finished run's folder, or a prompt file (.safetensors, .npy).")
]
Backbone = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|NAME",
        help="Backbone, where the prompt file does not name it or it has moved.",
        show_default=False,
    ),
]
AnyBackbone = Annotated[
    bool, typer.Option("--any-backbone", help="Use a prompt on another backbone than it was trained on.")
]
JSON_INDENT = 2


class PredictBy(enum.StrEnum):
    """How a label word is found."""

    decoding = "decoding"
    likelihood = "likelihood"
    likelihood_per_token = "likelihood_per_token"


def submit(
    source: Source,
    to: Annotated[str, typer.Option(metavar="FOLDER", help="Where the benchmark's file goes.")],
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Task. \\[default: its own]")] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to answer.")] = "test",
    backbone: Backbone = None,
) -> None:
    """Answer a test split whose labels are hidden, in the form that GLUE's or SuperGLUE's server takes."""
    predictor, chosen = predictor_and_task(source, task, backbone)
    path, illegal = predictor.submit(chosen, split, Path(to))
    print(
        f"wrote {path}" + (f"; {illegal} illegal answers, written as the first label" * bool(illegal)), file=sys.stderr
    )
    report_truncated(predictor)


def average(
    benchmark: Annotated[str, typer.Argument(help="superglue or glue")],
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Finished runs, any number of each task.")],
) -> None:
    """Average the validation scores of finished runs as a benchmark does, as JSON."""
    from softprompt_jax.inference.evaluate import benchmark_average

    print(json.dumps(benchmark_average(benchmark, [Path(run) for run in runs]), indent=JSON_INDENT))


def tasks() -> None:
    """List the tasks that have a name, with their label words."""
    from softprompt_jax.tasks import get, names

    for name in names():
        print(f"{name:20} {', '.join(get(name).words or ['free text'])}")


def task(
    name: Annotated[str, typer.Argument(metavar="NAME|CONFIG", help="A task's name, or a run's YAML file.")],
    show: Annotated[int, typer.Option(min=0, help="Examples to print.")] = 3,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to look at.")] = "train",
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FOLDER|NAME", help="Of which backbone. \\[default: CONFIG's, or embedded]")
    ] = None,
    max_input_tokens: Annotated[int | None, typer.Option(min=1, help="\\[default: CONFIG's, or 512]")] = None,
    max_target_tokens: Annotated[int | None, typer.Option(min=1, help="\\[default: CONFIG's, or 64]")] = None,
    most: Annotated[int, typer.Option(min=1, help="Examples to count at most.")] = 10_000,
    pin: Annotated[bool, typer.Option("--pin", help="Record the revision that the hub has now, and print it.")] = False,
) -> None:
    """Show a task's examples as text and tokens, with lengths, truncations and label counts."""
    from softprompt_jax.checkpoints.backbone import EMBEDDED
    from softprompt_jax.data import preview
    from softprompt_jax.data.tokenizer import load_tokenizer
    from softprompt_jax.models.presets import hub_name
    from softprompt_jax.run import Scratch, load_run
    from softprompt_jax.tasks import get

    backbone, limits = "embedded", (512, 64)
    if name.endswith((".yaml", ".yml")):
        run = load_run(name).expanded()
        chosen, limits = run.tasks, (run.max_input_tokens, run.max_target_tokens)
        backbone = run.backbone.tokenizer if isinstance(run.backbone, Scratch) else run.backbone
        if not chosen:
            raise UserError(f"{name}: its task is pretraining; expected a run on a task; name another file")
    else:
        chosen = [get(name)]
    backbone = tokenizer or backbone
    limits = max_input_tokens or limits[0], max_target_tokens or limits[1]
    read_by = None if pin else load_tokenizer(EMBEDDED if backbone == "embedded" else hub_name(backbone) or backbone)
    for one in chosen:
        if read_by is None:
            print(preview.pinned(one), end="")
            continue
        for line in preview.describe(one, split, read_by, show, limits, most):
            print(line)


def predictor_and_task(
    source: str, name: str | None, backbone: str | None, any_backbone: bool = False
) -> tuple[Any, Any]:
    """Load a predictor, and the task by its name or the predictor's own."""
    from softprompt_jax.inference.predictor import load_predictor, named_task

    chosen = named_task(source, name) if name is not None else None  # before the slow part
    predictor = load_predictor(source, backbone, name, any_backbone=any_backbone)
    chosen = chosen or predictor.task
    if chosen is None:
        raise UserError(f"{source}: says no task; expected one; add --task NAME")
    return predictor, chosen


def report_truncated(predictor: Any) -> None:
    """Tell on standard error how many inputs were cut."""
    if predictor.truncated:
        text = f"{predictor.truncated} inputs truncated to {predictor.max_input_tokens} tokens"
        print(text, file=sys.stderr)
