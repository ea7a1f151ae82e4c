"""Commands that use what was trained: eval, predict, ensemble, serve."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import typer

from softprompt_jax.cli.options import (
    AnyBackbone,
    AsJson,
    Backbone,
    Dtype,
    Quantize,
    Source,
    Split,
    TaskName,
    note,
    print_json,
)
from softprompt_jax.config import UserError
from softprompt_jax.distributed import cloud_files

PANEL = "Evaluate and use"
PredictBy = Literal["decoding", "likelihood", "likelihood_per_token"]


def evaluate(
    source: Source,
    task: TaskName = None,
    split: Split = "validation",
    backbone: Backbone = None,
    any_backbone: AnyBackbone = False,
    predict_by: Annotated[
        PredictBy | None,
        typer.Option(
            help="How a label is predicted: decode freely, or take the label word of the highest log-probability.",
            show_default="as the task says",
        ),
    ] = None,
) -> None:
    """Score a run or a prompt on a split with the metrics of the task, and print them as JSON."""
    predictor, chosen = predictor_and_task(source, task, backbone, any_backbone)
    if predict_by is not None:
        from softprompt_jax.tasks import resolve

        chosen = resolve(chosen.model_dump() | {"predict_by": predict_by})
    print_json({"task": chosen.name, "split": split} | predictor.evaluate(chosen, split))
    note_truncated(predictor)


def predict(
    source: Source,
    input: Annotated[
        str,
        typer.Option(metavar="FILE|-", help="jsonl: a line is an object with the task's fields, or with `inputs`."),
    ] = "-",
    output: Annotated[str, typer.Option(metavar="FILE|-", help="jsonl: the same lines with a `prediction`.")] = "-",
    backbone: Backbone = None,
    any_backbone: AnyBackbone = False,
    decoding: Annotated[
        str | None,
        typer.Option(
            metavar="KIND|YAML",
            help="greedy, beam, sampling, or settings such as '{kind: beam, beams: 8}'.",
            show_default="greedy",
        ),
    ] = None,
) -> None:
    """Read jsonl and write each line with its `prediction`, in order.

    Several samples or beams are written as `answers`. A folder with several prompts or runs is a bank: each line names
    its prompt, {"inputs": "...", "prompt": "NAME"}.
    """
    from softprompt_jax.inference.bank import PromptBank
    from softprompt_jax.inference.predictor import load_predictor
    from softprompt_jax.run import read_decoding

    if input != "-":
        input = str(cloud_files.local(input))
    if input != "-" and (not Path(input).exists() or Path(input).is_dir()):
        raise UserError(f"{input}: no such file; expected jsonl, or - for standard input")
    if input != "-" and Path(output).exists() and Path(output).samefile(input):
        raise UserError(f"{output}: is the input too; expected another file for the output")
    folder = cloud_files.local(source)
    bank = folder.is_dir() and not (folder / "config.yaml").exists()
    how = None if decoding is None else read_decoding(decoding)
    with _output(output) as sink:
        if bank:
            predictor = PromptBank.open(folder, backbone, any_backbone=any_backbone)
            for name in predictor.names:
                note_checkpoint(name, predictor.prompt(name).step)
            answered = predictor.lines(_json_lines(input), decoding=how)
        else:
            predictor = load_predictor(source, backbone, decoding=how, any_backbone=any_backbone)
            note_checkpoint(source, predictor.step)
            answered = predictor.lines(_json_lines(input))
        if Path(output).is_file():
            sink.truncate(0)  # only now: a command that fails earlier leaves an old file as it was
        for line in answered:
            sink.write(json.dumps(line, ensure_ascii=False) + "\n")
            sink.flush()
    note_truncated(predictor)


def ensemble(
    runs: Annotated[list[str], typer.Argument(metavar="RUN|PROMPT...", help="Two or more prompts of one task.")],
    task: TaskName = None,
    split: Split = "validation",
    backbone: Backbone = None,
    any_backbone: AnyBackbone = False,
    as_json: AsJson = False,
) -> None:
    """Score several prompts of one task as one: average, best prompt, majority vote and mean log-probability.

    Prints a table of metrics, each with its standard deviation (sd): for `average` over the prompts, for the others
    over bootstrap samples of the examples.
    """
    from softprompt_jax.inference.ensemble import ensemble as score_ensemble

    result = score_ensemble(runs, task, split, backbone, any_backbone)
    if as_json:
        print_json(result)
        return
    for name in ("average", "best", "vote", "log_probability"):
        found = {metric: cell for metric, cell in result[name].items() if metric != "source"}
        line = "  ".join(f"{metric} {cell['value']:.4g} ± {cell['sd']:.2g} (sd)" for metric, cell in found.items())
        print(f"{name:16} {line}")


def serve(
    source: Annotated[str, typer.Argument(metavar="BANK", help="Folder of prompt files and runs.")],
    backbone: Backbone = None,
    any_backbone: AnyBackbone = False,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any but this machine's own (localhost) needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port. 0 takes any that is free.")] = 8000,
    token_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="File with the token that clients must send.", show_default="$SOFTPROMPT_TOKEN"
        ),
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            metavar="KEY=VALUE",
            help="slots (answers at once), max_input_tokens, max_tokens, max_prompt_rows, max_decoder_rows, "
            "max_waiting, max_body_bytes, max_prompt_bytes or timeout_s. Repeat it for several.",
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of weights and activations.")] = "float32",
    quantize: Annotated[Quantize | None, typer.Option(help="Keep the backbone's layers in 8 or 4 bits.")] = None,
) -> None:
    """Answer requests over HTTP, each under the prompt that it names; / is a page to try them (extra `serve`).

    On SIGTERM it finishes open requests, then exits.
    """
    from softprompt_jax.serve import server

    server.serve_folder(source, backbone, host, port, token_file, limits or [], dtype, quantize, any_backbone)


def predictor_and_task(
    source: str, name: str | None, backbone: str | None, any_backbone: bool = False
) -> tuple[Any, Any]:
    """Load a predictor, and the task by its name or the predictor's own."""
    from softprompt_jax.inference.predictor import load_predictor, named_task

    chosen = named_task(source, name) if name is not None else None  # before the slow part
    predictor = load_predictor(source, backbone, name, any_backbone=any_backbone)
    note_checkpoint(source, predictor.step)
    chosen = chosen or predictor.task
    if chosen is None:
        raise UserError(f"{source}: says no task; expected one; add --task NAME")
    return predictor, chosen


def note_checkpoint(source: str, step: int | None) -> None:
    """Say on standard error that a run is read from the checkpoint of a step, since it has not finished."""
    if step is not None:
        note(f"{source}: has not finished; step {step} is used")


def note_truncated(predictor: Any) -> None:
    """Say on standard error how many inputs were cut."""
    if predictor.truncated:
        note(f"{predictor.truncated} inputs truncated to {predictor.max_input_tokens} tokens")


def _json_lines(path: str) -> Iterator[tuple[str, Any]]:
    with contextlib.ExitStack() as stack:
        lines = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
        for number, line in enumerate(lines, 1):
            where = f"{'standard input' if path == '-' else path}:{number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8; expected one JSON object a line in UTF-8") from None
            except ValueError as error:
                raise UserError(f"{where}: not JSON ({error}); expected one JSON object a line") from None


@contextlib.contextmanager
def _output(path: str) -> Iterator[IO[str]]:
    with contextlib.ExitStack() as stack:
        try:
            sink = sys.stdout if path == "-" else stack.enter_context(Path(path).open("a"))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); expected a writable file") from None
        if isinstance(sink, io.TextIOWrapper):  # half of a surrogate pair, which UTF-8 has not, becomes JSON's \\ud83d
            sink.reconfigure(encoding="utf-8", errors="backslashreplace")
        yield sink


COMMANDS = {"eval": evaluate, "predict": predict, "ensemble": ensemble, "serve": serve}
