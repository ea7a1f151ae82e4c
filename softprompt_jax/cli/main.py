"""The command line. Bad input gets one line and exit code 2; a defect of ours keeps its traceback."""

from __future__ import annotations

import contextlib
import enum
import errno
import importlib.util
import io
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from softprompt_jax.cli import data as task_commands
from softprompt_jax.cli import paper as paper_command
from softprompt_jax.cli import share as deploy_commands
from softprompt_jax.cli import train as run_commands
from softprompt_jax.cli.allocator import keep_freed_memory
from softprompt_jax.cli.data import (
    JSON_INDENT,
    AnyBackbone,
    Backbone,
    PredictBy,
    Source,
    predictor_and_task,
    report_truncated,
)
from softprompt_jax.cli.share import Dtype, Quantize
from softprompt_jax.cli.signals import INTERRUPTED, preemptible
from softprompt_jax.config import UserError
from softprompt_jax.distributed import cloud_files


class _Commands(TyperGroup):
    """Wrong usage is bad input too: one line and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs | {"standalone_mode": False})
        except Exception as error:
            format_message = getattr(error, "format_message", None)
            if format_message is None:
                raise
            message = format_message().replace("Value error, ", "").rstrip(".?")
            if not message:  # no argument at all: the help has been shown
                return 2
            context = getattr(error, "ctx", None)
            raise UserError(f"{message}; see {context.command_path if context else 'softprompt'} --help") from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Adapt a frozen T5 to text-to-text tasks by training a soft prompt.",
    epilog="Start: softprompt train configs/quickstart.yaml --out runs/first",
)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


class Measure(enum.StrEnum):
    """How the likeness of prompts is measured."""

    mean = "mean"
    rows = "rows"


class Map(enum.StrEnum):
    """What carries a prompt from one backbone to another."""

    linear = "linear"
    network = "network"


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file with the run's settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that differ, e.g. steps=500.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="RUN", help="Run folder. \\[default: runs/ and a hash of the settings]")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Process 0's address; TPU pods and Slurm tell it.", show_default=False),
    ] = None,
    processes: Annotated[int | None, typer.Option(help="How many there are.", show_default=False)] = None,
    process: Annotated[int | None, typer.Option(help="Which one this is, from 0.", show_default=False)] = None,
) -> None:
    """Train a prompt (or what the config says) and score it.

    The same command goes on where a killed one stopped, and prints the result of a finished one. RUN gets
    config.yaml, metrics.jsonl, tensorboard/, checkpoints/, trained.safetensors, prompt.safetensors and result.json.
    """
    with preemptible():
        from softprompt_jax.distributed.multihost import connect, is_first
        from softprompt_jax.progress import Reporter
        from softprompt_jax.run import load_run
        from softprompt_jax.training.loop import train as train_run

        run = load_run(config, overrides or [])
        connect(coordinator, processes, process)
        reporter = Reporter(quiet)
        try:
            result = train_run(run, out, reporter)
        finally:
            reporter.stop()  # a bar hides the cursor
    if not is_first():
        return
    print(json.dumps(result, indent=JSON_INDENT))
    if not quiet:
        print(_summary(run, result), file=sys.stderr)


@app.command(name="eval")
def evaluate(
    source: Source,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="Task, see `softprompt tasks`. \\[default: its own]")
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to score.")] = "validation",
    backbone: Backbone = None,
    any_backbone: AnyBackbone = False,
    predict_by: Annotated[
        PredictBy | None, typer.Option(help="How a label word is found. \\[default: as the task says]")
    ] = None,
) -> None:
    """Score a finished run or a prompt on a split with the task's metrics, as JSON."""
    predictor, chosen = predictor_and_task(source, task, backbone, any_backbone)
    if predict_by is not None:
        from softprompt_jax.tasks import resolve

        chosen = resolve(chosen.model_dump() | {"predict_by": predict_by.value})
    print(json.dumps({"task": chosen.name, "split": split} | predictor.evaluate(chosen, split), indent=JSON_INDENT))
    report_truncated(predictor)


@app.command()
def predict(
    source: Source,
    input: Annotated[
        str, typer.Option(metavar="FILE|-", help="jsonl: an object with the task's fields, or with 'inputs', a line.")
    ] = "-",
    output: Annotated[str, typer.Option(metavar="FILE|-", help="jsonl: each object with its 'prediction'.")] = "-",
    backbone: Backbone = None,
    any_backbone: AnyBackbone = False,
    decoding: Annotated[
        str | None,
        typer.Option(metavar="KIND|YAML", help="greedy, beam, sampling, or settings such as '{kind: beam, beams: 8}'."),
    ] = None,
) -> None:
    """Answer jsonl with jsonl, in order; with several samples or beams also all 'answers'.

    A folder of prompts (files or runs) is a bank: each line names its own, {"inputs": "...", "prompt": "NAME"}, and any
    mix is answered at once.
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
    source = str(cloud_files.local(source))
    bank = Path(source).is_dir() and not (Path(source) / "config.yaml").exists()
    how = None if decoding is None else read_decoding(decoding)
    with _output(output) as sink:
        if bank:
            predictor = PromptBank.open(source, backbone, any_backbone=any_backbone)
            answered = predictor.lines(_json_lines(input), decoding=how)
        else:
            predictor = load_predictor(source, backbone, decoding=how, any_backbone=any_backbone)
            answered = predictor.lines(_json_lines(input))
        if Path(output).is_file():
            sink.truncate(0)  # only now: a command that fails earlier leaves an old file as it was
        for line in answered:
            sink.write(json.dumps(line, ensure_ascii=False) + "\n")
            sink.flush()
    report_truncated(predictor)


@app.command(name="import")
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="T5X checkpoint or run (folder, gs://), T5, prompt.")],
    to: Annotated[str, typer.Option(metavar="PATH", help="New folder; for a prompt alone a .safetensors file.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FILE|FOLDER|NAME", help="Tokenizer, where SOURCE has none.", show_default=False),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights. \\[default: as they are]", show_default=False)
    ] = None,
    quantize: Annotated[Quantize | None, typer.Option(help="Of the layers.", show_default=False)] = None,
) -> None:
    """Write a checkpoint that others have made as a Hugging Face folder, or a prompt as our file.

    With --quantize the folder is our own: frozen layers in 8 or 4 bits, to be given as a backbone.
    """
    from softprompt_jax.export.import_source import import_source

    kind = None if quantize is None else quantize.value
    for line in import_source(source, to, tokenizer, None if dtype is None else dtype.value, kind):
        print(f"wrote {line}", file=sys.stderr)


@app.command()
def show(
    source: Annotated[str, typer.Argument(metavar="FILE|FOLDER", help="Prompt, adapter, checkpoint or run.")],
    norms: Annotated[bool, typer.Option("--norms", help="Norms also of what is large.")] = False,
) -> None:
    """Say what a file or folder is: its shapes, norms and metadata."""
    from softprompt_jax.export import show as showing

    for line in showing.show(source, norms):
        print(line)


@app.command()
def similar(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A run's folder or a prompt file.")],
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Prompts of other tasks.")],
    measure: Annotated[
        Measure, typer.Option(help="mean: cosine of the mean rows. rows: mean cosine of all pairs of rows.")
    ] = Measure.mean,
) -> None:
    """Rank prompts of other tasks by how alike they are to a target's (SPoT), as JSON: start from the first."""
    from softprompt_jax.analysis.transfer import rank_sources

    print(json.dumps(rank_sources(target, sources, measure.value), indent=JSON_INDENT))


@app.command()
def recycle(
    source: Annotated[str, typer.Argument(metavar="RUN|PROMPT", help="A prompt that was trained on another backbone.")],
    onto: Annotated[str, typer.Option("--onto", metavar="FOLDER|NAME", help="Backbone that shall read it.")],
    to: Annotated[str, typer.Option(metavar="PATH", help="File to write, .safetensors.")],
    map: Annotated[
        Map,
        typer.Option(help="linear: least squares. network: one hidden layer; takes minutes for large vocabularies."),
    ] = Map.linear,
    backbone: Backbone = None,
) -> None:
    """Carry a prompt over to another backbone by a map fitted on the pieces that both vocabularies have."""
    from softprompt_jax.analysis.transfer import recycle_prompt

    print(json.dumps(recycle_prompt(source, onto, to, map.value, backbone), indent=JSON_INDENT))


@app.command()
def methods(
    backbone: Annotated[
        str, typer.Option(metavar="NAME|FOLDER", help="A published size such as t5-v1_1-base, or a backbone.")
    ] = "embedded",
) -> None:
    """List the methods: paper, what trains on a backbone with default settings, optimizer, PEFT's name."""
    from softprompt_jax.checkpoints.backbone import load_backbone
    from softprompt_jax.methods.listing import listed
    from softprompt_jax.models.presets import PRESETS

    settings = PRESETS[backbone] if backbone in PRESETS else load_backbone(backbone).settings
    total = settings.parameters()
    print(f"{'kind':12} {'paper':24} {'trains':>15} {'share':>9}  {'optimizer':14} PEFT")
    for one in listed(settings):
        share = f"{one.parameters / total:.4%}"
        print(f"{one.kind:12} {one.paper:24} {one.parameters:15,} {share:>9}  {one.optimizer:14} {one.peft or '-'}")


@app.command()
def tokenizer(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A pre-training run; its texts are used.")],
    to: Annotated[str, typer.Option(metavar="FOLDER", help="Where to write it.")],
    size: Annotated[int, typer.Option(help="Pieces, without the 100 sentinels.")] = 8000,
) -> None:
    """Train a SentencePiece tokenizer on the texts of a pre-training run."""
    from softprompt_jax.pretraining.vocabulary import train_tokenizer
    from softprompt_jax.run import load_run

    run = load_run(config)
    if run.pretraining is None:
        raise UserError(f"{config}: its task is not pretraining; expected a run with texts")
    train_tokenizer(run.pretraining.located_texts(), Path(to), size)


_DEPLOY = (deploy_commands.export, deploy_commands.serve, deploy_commands.push)
_TASKS = (task_commands.submit, task_commands.average, task_commands.tasks, task_commands.task)
for _command in (*run_commands.COMMANDS, *_DEPLOY, *_TASKS, paper_command.paper):
    app.command()(_command)


def main() -> None:
    """Run the command line and exit."""
    keep_freed_memory()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if importlib.util.find_spec("libtpu") and not any(Path("/dev").glob("accel*")) and not Path("/dev/vfio").exists():
        # An installed libtpu would look for a TPU, and wait for it.
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if Path("/dev/nvidia0").exists() else "cpu")
    # Orbax warns through absl of what is meant here, such as opening a folder to read only. What fails in a thread that
    # writes a checkpoint is raised again where it is waited for: tell it once.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    threading.excepthook = lambda _: None
    try:
        code = app(prog_name="softprompt")
    except UserError as error:
        _fail(" ".join(str(error).split()))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        _fail(
            f"{error.filename or 'output'}: cannot be written ({error.strerror}); expected a writable place with space"
        )
    if code == INTERRUPTED:
        print("softprompt: interrupted; a run goes on with the same command", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    print(f"softprompt: {message}", file=sys.stderr)
    sys.exit(2)


def _summary(run: Any, result: dict[str, Any]) -> str:
    """Say in a line how the result compares with no training and with the majority class."""
    baselines = result.get("baselines")
    if baselines is None:
        return f"validation: {result['validation']}"
    scores = result[baselines["split"]]
    from softprompt_jax.inference.evaluate import shown, unit

    name, times = next(iter(scores)), unit(run)
    sign = "%" if times == 100 else ""
    after, before = (f"{shown(found[name], times)}{sign}" for found in (scores, baselines["untrained"]))
    text = f"{baselines['split']} {name}: {after} after training, {before} before"
    return f"{text}, {baselines['majority']:.1%} for the majority class" if name == "accuracy" else text


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
