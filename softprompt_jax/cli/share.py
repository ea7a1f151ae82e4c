"""The commands that put to use elsewhere what was trained: export it, serve it, publish it."""

from __future__ import annotations

import enum
import sys
from typing import Annotated

import typer

from softprompt_jax.cli.data import AnyBackbone, Backbone, Source


class Format(enum.StrEnum):
    """What a run can be exported as."""

    hf = "hf"
    npy = "npy"
    peft = "peft"
    safetensors = "safetensors"
    stablehlo = "stablehlo"


class Dtype(enum.StrEnum):
    """What weights can be written as."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Quantize(enum.StrEnum):
    """How frozen layers can be kept."""

    int8 = "int8"
    nf4 = "nf4"


def export(
    source: Source,
    to: Annotated[
        str, typer.Option(metavar="PATH", help="File (npy, safetensors) or folder (hf, peft, stablehlo) to write.")
    ],
    format: Annotated[
        Format,
        typer.Option(
            help="npy, safetensors: the prompt's rows (safetensors without a prompt: all that trained). "
            "hf: a Hugging Face model. peft: an adapter. stablehlo: a program that needs JAX alone."
        ),
    ],
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of stablehlo's answers. \\[default: as in training]", show_default=False)
    ] = None,
    prompt_input: Annotated[
        bool, typer.Option("--prompt-input", help="stablehlo: the prompt goes in with the text.")
    ] = False,
) -> None:
    """Write a trained prompt, adapter or tuned model for other programs."""
    from softprompt_jax.export import export as exporting

    exporting.export(source, format.value, to, max_tokens, prompt_input)
    print(f"wrote {to}", file=sys.stderr)


def serve(
    source: Annotated[str, typer.Argument(metavar="BANK", help="A folder of prompt files and finished runs.")],
    backbone: Backbone = None,
    any_backbone: AnyBackbone = False,
    host: Annotated[str, typer.Option(help="Address; other than loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    token_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The token that clients must send. \\[default: $SOFTPROMPT_TOKEN]"),
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            metavar="KEY=VALUE",
            help="slots, max_input_tokens, max_tokens, max_prompt_rows, max_decoder_rows, max_waiting, "
            "max_body_bytes, max_prompt_bytes or timeout_s; repeat it for several.",
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = Dtype.float32,
    quantize: Annotated[Quantize | None, typer.Option(help="Of the backbone's layers.", show_default=False)] = None,
) -> None:
    """Answer requests over HTTP, each under the prompt that it names, with a page to try them (extra `serve`).

    SIGTERM: what is here is answered, nothing more is taken.
    """
    from softprompt_jax.serve import server as serving

    kind = None if quantize is None else quantize.value
    serving.serve_folder(source, backbone, host, port, token_file, limits or [], dtype.value, kind, any_backbone)


def push(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Hub name, OWNER/NAME.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only write the files, to RUN/hub.")] = False,
) -> None:
    """Publish a finished run on the hub with a model card; changes to the one in RUN/hub stay."""
    from softprompt_jax.export import push as publishing

    folder = publishing.push(source, repository, dry_run)
    print(f"wrote {folder}" if dry_run else f"pushed {folder} to {repository}", file=sys.stderr)
