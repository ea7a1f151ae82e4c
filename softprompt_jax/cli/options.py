"""Options and arguments that several commands share, and how commands print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import typer

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file with the settings of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, e.g. steps=500 or methods.0.length=20."),
]
Source = Annotated[
    str, typer.Argument(metavar="RUN|PROMPT", help="Folder of a run, or a prompt file (.safetensors, .npy).")
]
Backbone = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|NAME",
        help="Frozen model (folder or hub name), where the prompt names none or it has moved.",
        show_default="the one of the prompt",
    ),
]
AnyBackbone = Annotated[
    bool, typer.Option("--any-backbone", help="Use a prompt with another backbone than it was trained on.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Read, fetch or import what the settings inside the file name: data, packages, modules, folders. What "
        "ships with softprompt, or you have trained with on this machine, needs no --trust.",
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A task of `softprompt tasks`.", show_default="the one it was trained on"),
]
Split = Annotated[str, typer.Option(metavar="NAME", help="Split of the data: train, validation or test.")]
Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="YAML",
        help="Division of the work among devices, such as '{data: 1, fsdp: -1}'.",
        show_default="the run's own",
    ),
]
Coordinator = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Several machines: address of process 0. TPU pods and Slurm set it."),
]
Processes = Annotated[int | None, typer.Option(help="Several machines: number of processes.")]
Process = Annotated[int | None, typer.Option(help="Several machines: number of this process, from 0.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the result only, no progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON with all numbers instead of a table.")]
Topology = Annotated[
    list[str],
    typer.Option(metavar="CHIP:SHAPE", help="Machine, e.g. v5e:2x4, v5p:4x4x4 or h100:8. Repeat it for several."),
]
Dtype = Literal["float32", "bfloat16"]
Quantize = Literal["int8", "nf4"]


def print_json(value: Any) -> None:
    """Print a result for other programs."""
    print(json.dumps(value, indent=2))


def print_result(result: Any, as_json: bool, describe: Callable[[Any], Iterable[str]]) -> None:
    """Print a result for other programs, or the lines that describe it."""
    if as_json:
        print_json(result)
    else:
        print(*describe(result), sep="\n")


def note(text: str) -> None:
    """Print a line for the user, on standard error."""
    print(text, file=sys.stderr, flush=True)
