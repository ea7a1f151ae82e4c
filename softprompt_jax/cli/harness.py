"""The command that lets EleutherAI's lm-evaluation-harness evaluate our models."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from softprompt_jax.cli.options import note
from softprompt_jax.config import UserError

PANEL = "Evaluate and use"
_WITHOUT_DEFAULTS = ("ls", "validate", "-h", "--help", "-C", "--config")  # commands of the harness, or its own file


def lm_eval(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARGUMENTS", help="Arguments of lm_eval as they are; run --help prints all of them."),
    ] = None,
) -> None:
    """Run EleutherAI's lm-evaluation-harness (pip install lm_eval) with our models, and with its own arguments.

    --model softprompt --model_args run=RUN, bank=BANK,prompt=NAME or backbone=NAME --tasks TASK --include_path DIR.

    --model_args may also say backbone, task, any_backbone, trust, dtype, quantize, mesh, batch_size, max_length,
    max_tokens (of an answer) and eos (whether EOS behind a continuation counts).
    """
    from softprompt_jax.inference.harness import register

    register(note)
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    sys.argv = ["lm-eval", *with_defaults(arguments or [])]
    try:
        cli_evaluate()
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        raise UserError(
            f"lm-eval: {error}; expected tasks of softprompt lm-eval ls tasks, or of --include_path"
        ) from None


def with_defaults(arguments: list[str]) -> list[str]:
    """Add our model, and the batch size that suits it, to a run that names none: the harness's own are hf and 1."""
    options = {argument.partition("=")[0] for argument in arguments}
    if not arguments or options & {*_WITHOUT_DEFAULTS}:
        return arguments
    model = [] if options & {"-M", "--model"} else ["--model", "softprompt"]
    size = [] if options & {"-b", "--batch_size"} else ["--batch_size", "auto"]
    return [*arguments, *model, *size]


COMMANDS = {"lm-eval": lm_eval}
# The harness reads its own options. From its first word on nothing is looked at, so that `run --help` is its help.
SETTINGS: dict[str, dict[str, Any]] = {
    "lm-eval": {"context_settings": {"ignore_unknown_options": True, "allow_interspersed_args": False}}
}
