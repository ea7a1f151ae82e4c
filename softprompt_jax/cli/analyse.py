"""Commands that compare and explain what was trained: report, inspect, similar, recycle."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

import softprompt_jax
from softprompt_jax.cli.options import AnyBackbone, AsJson, Backbone, Mesh, Trust, note, print_json, print_result

PANEL = "Compare and understand"


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN|DIR...", help="Folders of runs, or folders of them.")],
    to: Annotated[str, typer.Option(metavar="DIR", help="Folder to write the page to.")],
) -> None:
    """Compare runs on one HTML page with plots: scores, their spread over seeds, curves and settings.

    Needs the extra `report`.
    """
    for path in softprompt_jax.report(runs, to):
        note(f"wrote {path}")


def inspect(
    prompts: Annotated[list[str], typer.Argument(metavar="RUN|PROMPT...", help="Prompts of one backbone.")],
    to: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for a page with plots (needs the extra `report`).")
    ] = None,
    neighbours: Annotated[
        int, typer.Option(min=2, help="Number of nearest vocabulary pieces to list for each row.")
    ] = 5,
    backbone: Backbone = None,
    any_backbone: AnyBackbone = False,
    as_json: AsJson = False,
    mesh: Mesh = None,
    trust: Trust = False,
) -> None:
    """Compare the rows of prompts with the vocabulary: which pieces are nearest, and how long the rows are.

    Also says which label words are among the nearest pieces, which rows form clusters, how far the rows are from where
    training began, and how far the prompts are from each other.
    """
    from softprompt_jax.analysis import inspect as inspection

    result = inspection.inspect(prompts, backbone, neighbours, any_backbone, trust, mesh)
    print_result(result, as_json, inspection.describe)
    for path in inspection.write_page(result, to) if to else ():
        note(f"wrote {path}")


def similar(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Prompt of your task, trained for a few steps.")],
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Prompts of other tasks.")],
    measure: Annotated[
        Literal["mean", "rows"],
        typer.Option(help="mean: cosine of the mean rows. rows: mean cosine of all pairs of rows."),
    ] = "mean",
) -> None:
    """Rank prompts of other tasks by their cosine similarity to yours, as JSON: start training from the first.

    This is SPoT (Vu et al., 2022): prompts that are alike after a few steps transfer well. Start from one with the
    setting methods.0.init={kind: file, path: SOURCE}.
    """
    print_json(softprompt_jax.rank_sources(target, sources, measure))


def recycle(
    source: Annotated[str, typer.Argument(metavar="RUN|PROMPT", help="Prompt that was trained on another backbone.")],
    onto: Annotated[str, typer.Option("--onto", metavar="FOLDER|NAME", help="Backbone that the prompt is for.")],
    to: Annotated[str, typer.Option(metavar="FILE", help="File to write, .safetensors.")],
    map: Annotated[
        Literal["linear", "network"],
        typer.Option(help="linear: least squares. network: one hidden layer; takes minutes for large vocabularies."),
    ] = "linear",
    backbone: Backbone = None,
    trust: Trust = False,
) -> None:
    """Convert a prompt for another backbone, so that its training need not begin from nothing.

    A map from one embedding table to the other is fitted on the pieces that both vocabularies have, then applied to
    the rows of the prompt. Prints how many pieces there were and the error of the map.
    """
    from softprompt_jax.analysis.transfer import recycle_prompt

    print_json(recycle_prompt(source, onto, to, map, backbone, trust))


COMMANDS = {"report": report, "inspect": inspect, "similar": similar, "recycle": recycle}
