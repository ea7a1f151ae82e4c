"""Commands that use what was trained: eval, predict, ensemble, serve."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import typer

import softprompt_jax
from softprompt_jax.cli.options import (
    AnyBackbone,
    AsJson,
    Backbone,
    Coordinator,
    Dtype,
    Mesh,
    Process,
    Processes,
    Quantize,
    Source,
    Split,
    TaskName,
    Trust,
    note,
    print_json,
)
from softprompt_jax.config import UserError, parse
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
    mesh: Mesh = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
    trust: Trust = False,
) -> None:
    """Score a run or a prompt on a split with the metrics of the task, and print them as JSON."""
    connect(coordinator, processes, process, mesh)
    predictor, chosen = predictor_and_task(source, task, backbone, any_backbone, trust, mesh)
    if predict_by is not None:
        chosen = parse(type(chosen), chosen.model_dump() | {"predict_by": predict_by}, "--predict-by")
    scores = predictor.evaluate(chosen, split)
    if is_first():
        print_json({"task": chosen.name, "split": split} | scores)
        note_truncated(predictor)


def predict(
    source: Source,
    input: Annotated[
        str, typer.Option(metavar="FILE|-", help="jsonl: a line is an object with the task's fields, or with `inputs`.")
    ] = "-",
    output: Annotated[str, typer.Option(metavar="FILE|-", help="jsonl: the same lines with a `prediction`.")] = "-",
    backbone: Backbone = None,
    any_backbone: AnyBackbone = False,
    decoding: Annotated[
        str | None,
        typer.Option(
            metavar="KIND|YAML",
            help="greedy, beam, sampling, or settings such as '{kind: beam, beams: 8}'.",
            show_default="the run's own; of a bank greedy",
        ),
    ] = None,
    mesh: Mesh = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
    trust: Trust = False,
) -> None:
    """Read jsonl and write each line with its `prediction`, in order.

    Several samples or beams are written as `answers`. A folder with several prompts or runs is a bank: each line names
    its prompt, {"inputs": "...", "prompt": "NAME"}. Several processes share the lines; each writes a part, and the
    first one joins them.
    """
    from softprompt_jax.distributed.multihost import raise_everywhere, run_on_process_0
    from softprompt_jax.inference import shares
    from softprompt_jax.run import read_decoding

    connect(coordinator, processes, process, mesh)
    if input != "-":
        input = str(cloud_files.local(input))
    if input != "-" and (not Path(input).exists() or Path(input).is_dir() or Path(input).is_char_device()):
        raise UserError(f"{input}: no such file; expected jsonl, or - for standard input")
    if input != "-" and Path(output).exists() and Path(output).samefile(input):
        raise UserError(f"{output}: is the input too; expected another file for the output")
    how = None if decoding is None else read_decoding(decoding)
    devices, share, place = _share(source, input, output, mesh)
    error = ""
    try:
        with _output(place) as sink:
            predictor, answered = _answered(source, input, backbone, any_backbone, how, trust, devices, share)
            if Path(place).is_file():
                sink.truncate(0)  # only now: a command that fails earlier leaves an old file as it was
            failed = []
            for line in answered:
                failed += [line["error"]] if line["prediction"] is None else []
                sink.write(json.dumps(line, ensure_ascii=False) + "\n")
                sink.flush()
        note_truncated(predictor)
    except UserError as found:
        error, failed = str(found), []
    raise_everywhere(error)
    if place != output:
        run_on_process_0(lambda: shares.join(output, share))
    raise_everywhere(f"{source}: {len(failed)} lines have no prediction; {failed[0]}" if failed else "")


def _share(source: str, input: str, output: str, mesh: str | None) -> tuple[Any, Any, str]:
    """Return the devices and the lines that are this process's to use, and where it writes."""
    import jax

    from softprompt_jax.assembly import own_mesh
    from softprompt_jax.checkpoints.artifact import load_artifact
    from softprompt_jax.distributed.mesh import make_mesh, process_block
    from softprompt_jax.inference.bank_folder import artifacts_in, is_bank
    from softprompt_jax.inference.shares import ALL, Share, part_name

    if jax.process_count() == 1:
        return mesh, ALL, output
    if "-" in (input, output):
        raise UserError("predict: several processes and standard input or output; expected --input and --output files")
    folder = cloud_files.local(source)
    found = artifacts_in(folder).values() if is_bank(folder) else [load_artifact(source)]
    devices = make_mesh(mesh, own_mesh(found))
    assert devices is not None  # several processes have several devices
    block, index, count = process_block(devices)
    with open(input, "rb") as lines:
        share = Share.of_lines(sum(1 for line in lines if line.strip()), index, count)
    writes = jax.process_index() == block.devices.flat[0].process_index  # one of those that compute together
    return block, share, part_name(output, share) if writes else os.devnull


def _answered(
    source: str, input: str, backbone: str | None, any_backbone: bool, how: Any, trust: bool, devices: Any, share: Any
) -> tuple[Any, Iterator[dict[str, Any]]]:
    """Return the predictor or the bank of a source, and the lines of the input with their predictions."""
    from softprompt_jax.inference.bank_folder import is_bank

    if is_bank(folder := cloud_files.local(source)):
        bank = softprompt_jax.PromptBank.open(folder, backbone, trust, any_backbone=any_backbone, mesh=devices)
        for name in bank.names:
            note_checkpoint(name, bank.prompt(name).step)
        return bank, bank.lines(_json_lines(input), chunk=share.chunk, decoding=how, share=share[:2])
    predictor = softprompt_jax.load_predictor(
        source, backbone, decoding=how, any_backbone=any_backbone, trust=trust, mesh=devices
    )
    note_checkpoint(source, predictor.step)
    return predictor, predictor.lines(_json_lines(input), share.chunk, share[:2])


def ensemble(
    runs: Annotated[list[str], typer.Argument(metavar="RUN|PROMPT...", help="Two or more prompts of one task.")],
    task: TaskName = None,
    split: Split = "validation",
    backbone: Backbone = None,
    any_backbone: AnyBackbone = False,
    as_json: AsJson = False,
    mesh: Mesh = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
    trust: Trust = False,
) -> None:
    """Score several prompts of one task as one: average, best prompt, majority vote and mean log-probability.

    Prints a table of metrics, each with its standard deviation (sd): for `average` over the prompts, for the others
    over bootstrap samples of the examples.
    """
    connect(coordinator, processes, process, mesh)
    result: dict[str, Any] = {**softprompt_jax.ensemble(runs, task, split, backbone, any_backbone, trust, mesh)}
    if not is_first():
        return
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
            "max_waiting, max_body_bytes, max_prompt_bytes, max_prompts (uploaded), max_uploads (at once), timeout_s, "
            "header_timeout_s or keep_alive_s. Repeat it for several.",
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of weights and activations.")] = "float32",
    quantize: Annotated[Quantize | None, typer.Option(help="Keep the backbone's layers in 8 or 4 bits.")] = None,
    mesh: Mesh = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder in which uploaded prompts are kept; its prompts are served too.",
            show_default="in memory only",
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Answer requests over HTTP, each under the prompt that it names, in our protocol and in OpenAI's (extra `serve`).

    / is a page to try the prompts. On SIGTERM it finishes open requests, then exits.
    """
    from softprompt_jax.serve import server

    settings = {"dtype": dtype, "quantize": quantize, "any_backbone": any_backbone, "mesh": mesh, "store": store}
    server.serve_folder(source, backbone, host, port, token_file, limits or [], trust, **settings)


def connect(coordinator: str | None, processes: int | None, process: int | None, mesh: str | None) -> None:
    """Connect the processes of this job, and refuse a mesh that their devices do not make, before anything is read."""
    import jax

    from softprompt_jax.cli.process import keep_results_apart
    from softprompt_jax.distributed import multihost
    from softprompt_jax.distributed.mesh import make_mesh

    multihost.connect(coordinator, processes, process)
    if jax.process_count() > 1:
        keep_results_apart()
    make_mesh(mesh)


def is_first() -> bool:
    """Is this the process that prints?"""
    from softprompt_jax.distributed import multihost

    return multihost.is_first()


def predictor_and_task(
    source: str,
    name: str | None,
    backbone: str | None,
    any_backbone: bool = False,
    trust: bool = False,
    mesh: str | None = None,
) -> tuple[Any, Any]:
    """Load a predictor, and the task by its name or the predictor's own."""
    from softprompt_jax.inference.predictor import named_task

    chosen = named_task(source, name, trust)  # before the slow part
    predictor = softprompt_jax.load_predictor(source, backbone, name, any_backbone=any_backbone, trust=trust, mesh=mesh)
    note_checkpoint(source, predictor.step)
    if chosen is None:
        raise UserError(f"{source}: says no task; expected one; add --task NAME")
    return predictor, chosen


def note_checkpoint(source: str, step: int | None) -> None:
    """Say on standard error that a run is read from the checkpoint of a step, since it has not finished."""
    if step is not None and is_first():
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
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not JSON ({error}); expected one JSON object a line") from None


@contextlib.contextmanager
def _output(path: str) -> Iterator[IO[str]]:
    try:
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(cloud_files.writing(path)) if cloud_files.is_remote(path) else Path(path)
            sink = sys.stdout if path == "-" else stack.enter_context(place.open("a"))
            if isinstance(sink, io.TextIOWrapper):
                # Half of a surrogate pair, which UTF-8 has not, becomes JSON's \\ud83d.
                sink.reconfigure(encoding="utf-8", errors="backslashreplace")
            yield sink
    except OSError as error:  # also of what is written when the file is closed
        if path == "-" or error.filename not in (None, path):
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror}); expected a writable file") from None


COMMANDS = {"eval": evaluate, "predict": predict, "ensemble": ensemble, "serve": serve}
