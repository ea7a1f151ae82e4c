"""Commands about data: list the tasks, look at one, train a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import softprompt_jax
from softprompt_jax.config import UserError

if TYPE_CHECKING:
    from softprompt_jax.data.tokenizer import TextSettings, Tokenizer

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
    backbone: Annotated[
        str | None,
        typer.Option(
            "--backbone",
            "--tokenizer",
            metavar="FOLDER|NAME",
            help="Backbone that reads the task.",
            show_default="that of CONFIG, or embedded",
        ),
    ] = None,
    max_input_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest input in tokens.", show_default="that of CONFIG, or 512")
    ] = None,
    max_target_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest target in tokens.", show_default="that of CONFIG, or 64")
    ] = None,
    most: Annotated[int, typer.Option(min=1, max=10**9, help="Number of examples to count at most.")] = 10_000,
    pin: Annotated[bool, typer.Option("--pin", help="Only print settings with the revision on the hub now.")] = False,
) -> None:
    """Show the examples of a task as text and as a model reads them, with lengths and labels, and how many are cut."""
    from softprompt_jax.data import preview, prompt_layout
    from softprompt_jax.data.tokenizer import PLAIN
    from softprompt_jax.methods import Prompt
    from softprompt_jax.methods.prompt import PromptMethod
    from softprompt_jax.run import Scratch
    from softprompt_jax.tasks import get
    from softprompt_jax.tasks.mixture import newest_as_yaml

    if pin:
        pinned = softprompt_jax.load_run(name).task if name.endswith((".yaml", ".yml")) else get(name)
        print(newest_as_yaml(pinned), end="")
        return
    own, limits, text, methods = "embedded", (512, 64), PLAIN, [Prompt()]
    if name.endswith((".yaml", ".yml")):
        run = softprompt_jax.load_run(name).expanded()
        chosen, limits = run.tasks, (run.max_input_tokens, run.max_target_tokens)
        own = run.backbone.tokenizer if isinstance(run.backbone, Scratch) else run.backbone
        text, methods = run.text, run.methods
        if not chosen:
            raise UserError(f"{name}: its task is pretraining; expected a run on a task; name another file")
    else:
        chosen = [get(name)]
    backbone = backbone or own
    limits = max_input_tokens or limits[0], max_target_tokens or limits[1]
    read_by = _tokenizer(backbone, text)
    method = next((method for method in methods if isinstance(method, PromptMethod)), None)
    layout = prompt_layout.NO_PROMPT
    if method is not None:
        end = None if read_by.form.causal else read_by.eos_id
        layout = prompt_layout.place(method.place, method.length, read_by.size, read_by.encode, end)
    for one in chosen:
        for line in preview.describe(one, split, read_by, show, limits, most, layout):
            print(line)


def _tokenizer(backbone: str, text: TextSettings | None = None) -> Tokenizer:
    """Return the tokenizer of a backbone; of one on the hub no weights are fetched."""
    from softprompt_jax.checkpoints.backbone import local_folder, text_format_of
    from softprompt_jax.checkpoints.packaged import PACKAGES
    from softprompt_jax.data.tokenizer import PLAIN, load_tokenizer
    from softprompt_jax.models.presets import hub_name

    named = backbone == "embedded" or backbone in PACKAGES
    folder = (local_folder(backbone) if named else hub_name(backbone)) or backbone
    return load_tokenizer(folder, text_format_of(backbone), text or PLAIN)


def tokenizer(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of a pre-training run.")],
    to: Annotated[str, typer.Option(metavar="FOLDER", help="Folder to write the tokenizer to.")],
    size: Annotated[int, typer.Option(help="Number of pieces, without the 100 sentinels.")] = 8000,
) -> None:
    """Train a SentencePiece tokenizer on the texts of a pre-training run."""
    from softprompt_jax.pretraining.vocabulary import train_tokenizer

    run = softprompt_jax.load_run(config)
    if run.pretraining is None:
        raise UserError(f"{config}: its task is not pretraining; expected a run with texts")
    train_tokenizer(run.pretraining.located_texts(), Path(to), size)


def new(
    rows: Annotated[
        str,
        typer.Argument(metavar="ROWS", help="File of rows (jsonl, json, csv, tsv, parquet), or folder with splits."),
    ],
    to: Annotated[str, typer.Option(metavar="FILE", help="Config to write.")] = "mine.yaml",
    backbone: Annotated[
        str, typer.Option(metavar="FOLDER|NAME", help="Frozen model whose tokens are counted.")
    ] = "smollm2",
    column: Annotated[
        str | None,
        typer.Option("--input", metavar="COLUMN", help="Column that the model reads.", show_default="a guess"),
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column that it should answer.", show_default="a guess")
    ] = None,
) -> None:
    """Write a commented config for your own rows, and show three examples as the model will read them.

    Columns, label words and lengths are guessed: look at the examples, and correct the file.
    """
    from softprompt_jax.data.starter import starter
    from softprompt_jax.files import writable

    if Path(to).exists():
        raise UserError(f"{to}: exists; expected a new file; give another --to")
    text = starter(rows, to, backbone, _tokenizer(backbone), (column, label))
    with writable(to) as path:
        path.write_text(text, encoding="utf-8")
    print(text)
    task(to, backbone=None, max_input_tokens=None, max_target_tokens=None)


COMMANDS = {"new": new, "tasks": tasks, "task": task, "tokenizer": tokenizer}
