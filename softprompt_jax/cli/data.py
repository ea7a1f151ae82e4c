"""Commands about data: list the tasks, look at one, train a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softprompt_jax.config import UserError

PANEL = "Data"


def tasks() -> None:
    """List the tasks that come with the package, with their label words."""
    from softprompt_jax.tasks import get, names

    for name in names():
        print(f"{name:20} {', '.join(get(name).words or ['free text'])}")


def task(
    name: Annotated[str, typer.Argument(metavar="NAME|CONFIG", help="A task of `tasks`, or the YAML file of a run.")],
    show: Annotated[int, typer.Option(min=0, help="Number of examples to print.")] = 3,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to look at.")] = "train",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME",
            help="Backbone whose tokenizer is used.",
            show_default="that of CONFIG, or embedded",
        ),
    ] = None,
    max_input_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest input in tokens.", show_default="that of CONFIG, or 512")
    ] = None,
    max_target_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest target in tokens.", show_default="that of CONFIG, or 64")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Number of examples to count at most.")] = 10_000,
    pin: Annotated[bool, typer.Option("--pin", help="Only print settings with the revision on the hub now.")] = False,
) -> None:
    """Show the examples of a task as text and tokens, with their lengths and labels, and how many are cut."""
    from softprompt_jax.checkpoints.backbone import EMBEDDED
    from softprompt_jax.data import preview
    from softprompt_jax.data.tokenizer import load_tokenizer
    from softprompt_jax.models.presets import hub_name
    from softprompt_jax.run import Scratch, load_run
    from softprompt_jax.tasks import get
    from softprompt_jax.tasks.mixture import newest_as_yaml

    if pin:
        print(newest_as_yaml(load_run(name).task if name.endswith((".yaml", ".yml")) else get(name)), end="")
        return
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
    read_by = load_tokenizer(EMBEDDED if backbone == "embedded" else hub_name(backbone) or backbone)
    for one in chosen:
        for line in preview.describe(one, split, read_by, show, limits, most):
            print(line)


def tokenizer(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of a pre-training run.")],
    to: Annotated[str, typer.Option(metavar="FOLDER", help="Folder to write the tokenizer to.")],
    size: Annotated[int, typer.Option(help="Number of pieces, without the 100 sentinels.")] = 8000,
) -> None:
    """Train a SentencePiece tokenizer on the texts of a pre-training run."""
    from softprompt_jax.pretraining.vocabulary import train_tokenizer
    from softprompt_jax.run import load_run

    run = load_run(config)
    if run.pretraining is None:
        raise UserError(f"{config}: its task is not pretraining; expected a run with texts")
    train_tokenizer(run.pretraining.located_texts(), Path(to), size)


COMMANDS = {"tasks": tasks, "task": task, "tokenizer": tokenizer}
