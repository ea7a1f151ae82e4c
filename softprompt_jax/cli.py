"""The command line. Bad input gets one line and exit code 2; a defect of ours keeps its traceback."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from softprompt_jax.config import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Adapt a frozen T5 to text-to-text tasks by training a soft prompt.",
)
Source = Annotated[str, typer.Argument(metavar="RUN|PROMPT", help="A finished run folder, or a prompt file.")]
Backbone = Annotated[
    str | None, typer.Option(help="Folder or hub name of the backbone, where the prompt file does not say it.")
]
JSON_INDENT = 2


class Format(enum.StrEnum):
    """What a run can be exported as."""

    hf = "hf"
    npy = "npy"
    safetensors = "safetensors"


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file with the run's settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that differ, e.g. steps=500.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="RUN", help="Run folder; default runs/HASH of the settings.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
) -> None:
    """Train a run; the same command goes on where a killed one stopped."""
    from softprompt_jax.progress import Reporter
    from softprompt_jax.run import load_run
    from softprompt_jax.train import train as train_run

    run = load_run(config, overrides or [])
    result = train_run(run, out, Reporter(quiet))
    print(json.dumps(result, indent=JSON_INDENT))
    if not quiet:
        print(_summary(result), file=sys.stderr)


@app.command(name="eval")
def evaluate(
    source: Source,
    task: Annotated[str | None, typer.Option(help="Task name; default: the one it was trained on.")] = None,
    split: Annotated[str, typer.Option(help="Which split to score.")] = "validation",
    backbone: Backbone = None,
) -> None:
    """Score a split with the task's metrics."""
    from softprompt_jax.predict import load_predictor
    from softprompt_jax.tasks import resolve

    chosen = resolve(task) if task is not None else None  # before the slow part
    predictor = load_predictor(source, backbone)
    chosen = chosen or predictor.task
    if chosen is None:
        raise UserError(f"{source}: says no task; expected one; add --task NAME")
    print(json.dumps({"task": chosen.name, "split": split} | predictor.evaluate(chosen, split), indent=JSON_INDENT))


@app.command()
def predict(
    source: Source,
    input: Annotated[
        str, typer.Option(metavar="FILE|-", help="jsonl, one object of fields (or 'inputs') a line.")
    ] = "-",
    output: Annotated[str, typer.Option(metavar="FILE|-", help="jsonl: each object with its 'prediction'.")] = "-",
    backbone: Backbone = None,
) -> None:
    """Answer jsonl with jsonl, in order."""
    from softprompt_jax.predict import load_predictor

    if input != "-" and not Path(input).is_file():
        raise UserError(f"{input}: no such file; expected jsonl, or - for standard input")
    with _output(output) as sink:
        predictor = load_predictor(source, backbone)
        for line in predictor.lines(_json_lines(input)):
            sink.write(json.dumps(line, ensure_ascii=False) + "\n")
            sink.flush()


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="RUN|PROMPT")],
    to: Annotated[str, typer.Option(metavar="PATH", help="The file (npy, safetensors) or folder (hf) to write.")],
    format: Annotated[Format, typer.Option(help="npy or safetensors: the prompt's rows. hf: the whole model.")],
) -> None:
    """Write a trained prompt, or a fully tuned model, for other programs."""
    from softprompt_jax import exporting

    exporting.export(source, format.value, to)


@app.command()
def tasks() -> None:
    """List the tasks that have a name."""
    from softprompt_jax.tasks import get, names

    for name in names():
        print(f"{name:20} {', '.join(get(name).words or ['free text'])}")


@app.command()
def tokenizer(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A pre-training run; its texts are used.")],
    to: Annotated[str, typer.Option(metavar="FOLDER", help="Where to write it.")],
    size: Annotated[int, typer.Option(help="Pieces, without the 100 sentinels.")] = 8000,
) -> None:
    """Train a SentencePiece tokenizer on the texts of a pre-training run."""
    from softprompt_jax.run import load_run
    from softprompt_jax.tasks.vocabulary import train_tokenizer

    run = load_run(config)
    if run.pretraining is None:
        raise UserError(f"{config}: its task is not pretraining; expected a run with texts")
    train_tokenizer(run.pretraining.located_texts(), Path(to), size)


def main() -> None:
    """Run the command line and exit."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        app()
    except UserError as error:
        print(f"softprompt: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("softprompt: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _summary(result: dict[str, Any]) -> str:
    """Say in a line how the result compares with no training and with the majority class."""
    baselines = result.get("baselines")
    if baselines is None:
        return f"validation: {result['validation']}"
    scores = result[baselines["split"]]
    name = next(iter(scores))
    return (
        f"{baselines['split']} {name}: {scores[name]:.1%} after training, {baselines['untrained'][name]:.1%} with the "
        f"untrained prompt, {baselines['majority']:.1%} for the majority class"
    )


def _json_lines(path: str) -> Iterator[tuple[str, Any]]:
    with contextlib.ExitStack() as stack:
        lines = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
        for number, line in enumerate(lines, 1):
            where = f"{'standard input' if path == '-' else path}:{number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8; expected one JSON object a line in UTF-8") from None
            except ValueError as error:
                raise UserError(f"{where}: not JSON ({error}); expected one JSON object a line") from None


@contextlib.contextmanager
def _output(path: str) -> Iterator[IO[str]]:
    if path == "-":
        yield sys.stdout
        return
    try:
        sink = Path(path).open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); expected a writable file") from None
    with sink:
        yield sink
