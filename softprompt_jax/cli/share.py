"""Commands about files, ours and those of other programs: show, export, import, push."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from softprompt_jax.cli.options import Dtype, Mesh, Quantize, Source, Trust, note

PANEL = "Files"


def show(
    source: Annotated[str, typer.Argument(metavar="FILE|FOLDER", help="Prompt, adapter, checkpoint or run.")],
    norms: Annotated[bool, typer.Option("--norms", help="Also compute norms of large tensors (slow).")] = False,
) -> None:
    """Say what a file or folder is, with its shapes, norms and metadata."""
    from softprompt_jax.export import show as showing

    for line in showing.show(source, norms):
        print(line)


def export(
    source: Source,
    to: Annotated[str, typer.Option(metavar="PATH", help="File (npy, safetensors) or folder (the others) to write.")],
    format: Annotated[
        Literal["embeds", "hf", "npy", "peft", "safetensors", "stablehlo"],
        typer.Option(
            help="peft: an adapter for PEFT. npy, safetensors: the rows of the prompt; of a run without a prompt, "
            "safetensors has all that was trained. hf: a Hugging Face model. stablehlo: a program that needs only JAX. "
            "embeds: the rows as a tensor for servers that take prompt embeddings (vLLM, SGLang)."
        ),
    ],
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="stablehlo: longest answer in tokens.", show_default="as in training"),
    ] = None,
    prompt_input: Annotated[
        bool, typer.Option("--prompt-input", help="stablehlo: the program takes the prompt as an input.")
    ] = False,
    mesh: Mesh = None,
    trust: Trust = False,
) -> None:
    """Write a trained prompt, adapter or tuned model in a format of other programs."""
    from softprompt_jax.export import export as exporting

    exporting.export(source, format, to, max_tokens, prompt_input, trust, mesh)
    note(f"wrote {to}")


def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="T5X checkpoint (folder or gs://), GGUF file, model of Hugging Face, or a prompt file of others.",
        ),
    ],
    to: Annotated[str, typer.Option(metavar="PATH", help="Folder to write; for a prompt a .safetensors file.")],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE|FOLDER|NAME", help="Tokenizer, if SOURCE has none.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the written weights.", show_default="as they are")
    ] = None,
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="Write the frozen layers in 8 or 4 bits, as a folder that only softprompt reads."),
    ] = None,
) -> None:
    """Convert checkpoints and prompts of other programs: a model to a Hugging Face folder, a prompt to our file.

    The written folder can be the backbone of a run.
    """
    from softprompt_jax.export.import_source import import_source

    for line in import_source(source, to, tokenizer, dtype, quantize):
        note(f"wrote {line}")


def push(
    source: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Name on the hub, OWNER/NAME.")],
    public: Annotated[bool, typer.Option("--public", help="Create a public repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only write the files, to RUN/hub.")] = False,
    trust: Trust = False,
) -> None:
    """Upload a finished run with a model card to the Hugging Face hub, to a private repository.

    With --public a new repository is public; one that exists stays as it is. Edit the card in RUN/hub/README.md and
    push again: your changes stay.
    """
    from softprompt_jax.export.push import push as push_run

    folder = push_run(source, repository, dry_run, public, trust)
    note(f"wrote {folder}" if dry_run else f"pushed {folder} to {repository}")


COMMANDS = {"show": show, "export": export, "import": import_, "push": push}
