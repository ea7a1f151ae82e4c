"""A long context becomes a few prompt rows: an ordinary run on a task with a teacher, and questions to ask it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from softprompt_jax import config
from softprompt_jax.assembly import assemble
from softprompt_jax.config import UserError
from softprompt_jax.data.sources import read_file
from softprompt_jax.data.task import Distill
from softprompt_jax.distributed.cloud_files import is_remote
from softprompt_jax.files import written_whole
from softprompt_jax.inference.evaluate import score_text
from softprompt_jax.methods import split
from softprompt_jax.models.decode import Sampling
from softprompt_jax.progress import Reporter
from softprompt_jax.run import Run
from softprompt_jax.training.distill import ask_teacher, attach_context, context_text
from softprompt_jax.training.loop import train
from softprompt_jax.training.trained_run import TrainedRun

STEPS = 300
# What the model is asked for, in turns, as in self-study (Eyuboglu et al., 2025): facts, reasons, the whole.
REQUESTS = (
    "Write one question about a fact in the text above.",
    "Write one question that asks why or how, and that the text above answers.",
    "Write one question about a name, a number or a date in the text above.",
    "Write one question about what the text above says as a whole.",
)
_ROUNDS = 8  # of questions, until there are enough different ones
_QUESTION_TOKENS = 48


def compress(
    context: str,
    out: str | Path,
    inputs: str | None = None,
    ask: int | None = None,
    backbone: str = "smollm2",
    rows: int = 20,
    overrides: Sequence[str] = (),
    reporter: Reporter | None = None,
    wait: bool = False,
) -> TrainedRun:
    """Train `rows` prompt rows to stand for the text in the file `context`, in the run folder `out`; return the run.

    `inputs`: a file with a row for each input, `inputs` and where known `targets`; every fifth row is for validation.
    `ask`: instead, the model asks so many questions about the text, which are written to `out`.inputs.jsonl.
    `overrides`: settings of the run as in `load_run`, which may change all of these. The same call goes on where a
    killed one stopped. Sources: Snell et al., 2022; Eyuboglu et al., 2025.

    What is returned is that of `train`, with `context_tokens`, and `agreement` with the teacher among its scores.
    Errors: UserError for a text without words or longer than the model's positions, and for rows without inputs.
    """
    reporter = reporter or Reporter(quiet=True)
    if (inputs is None) == (ask is None):
        raise UserError("compress: expected inputs or a number of questions to ask; give one of them")
    settings = {
        "task": {"kind": "distill", "context": context, "inputs": inputs},
        "backbone": backbone,
        "methods": [{"kind": "prompt", "length": rows}],
        "schedule": {"decay": "linear"},
        "steps": STEPS,
        "batch_size": 16,
        "max_input_tokens": 256,
        "evaluate_every": 100,
        "log_every": 10,
    }
    if ask is not None:
        if is_remote(out):
            raise UserError(f"{out}: is not on this machine; expected a local folder for questions that are asked")
        settings["task"] |= {"inputs": str(_questions_of(out)), "input": "\nQuestion: {inputs}\nAnswer:"}
    run = config.parse(Run, config.read(settings, overrides), "compress")
    if not isinstance(run.task, Distill):
        raise UserError(f"compress: found the task {run.task_name}; expected one of kind distill; use train")
    if ask is not None:
        ask_questions(run, ask, _questions_of(out), reporter)
    return train(run, out, reporter, wait)


def _questions_of(out: str | Path) -> Path:
    """Return the file beside a run folder that holds the questions which it asks."""
    return Path(f"{str(out).rstrip('/')}.inputs.jsonl")


def ask_questions(run: Run, count: int, path: Path, reporter: Reporter) -> None:
    """Let the model write `count` different questions about the context of a run into a file, unless it is there."""
    assert isinstance(run.task, Distill)
    mark = hashlib.sha256(context_text(run.task.context).encode()).hexdigest()[:16]
    if path.exists():
        found = [row.get("context", mark) for _, row in read_file(path)]
        if len(found) != count or any(one != mark for one in found):
            wrong = f"{len(found)} questions" if len(found) != count else "questions about another text"
            expected = str(count) if len(found) != count else f"those about {run.task.context}"
            raise UserError(f"{path}: holds {wrong}; expected {expected}; delete it to ask again, or use --inputs")
        return
    asking = run.model_copy(update={"max_target_tokens": _QUESTION_TOKENS})
    questions: dict[str, None] = {}  # in the order of asking
    with jax.set_mesh(run.mesh.build()):
        assembly = assemble(asking)
        attach_context(asking, assembly)
        parts = split(assembly.model)
        chat = run.text.template == "chat"
        texts = [f"\n{REQUESTS[n % len(REQUESTS)]}{'' if chat else chr(10) + 'Question:'}" for n in range(count)]
        for number in range(_ROUNDS):
            how = Sampling(temperature=0.8, top_p=0.95, seed=run.seed + number)
            for answer in ask_teacher(texts, asking, assembly, parts, how):
                if question := read_question(answer.text):
                    questions.setdefault(question)
            reporter.line(f"{path}: {min(len(questions), count)} of {count} questions")
            if len(questions) >= count:
                break
    if len(questions) < count:
        raise UserError(
            f"compress: the model asked {len(questions)} different questions of {count}; expected all; ask for fewer, "
            "or use a larger model"
        )
    with written_whole(path) as partial:
        lines = (
            json.dumps({"inputs": question, "context": mark}, ensure_ascii=False)
            for question in list(questions)[:count]
        )
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_question(text: str) -> str | None:
    """Return the question in what a model wrote; None where there is none: its first line up to a question mark."""
    line, mark, _ = text.strip().partition("\n")[0].partition("?")
    return f"{line.strip()}?" if mark and len(line.split()) > 2 else None


def describe(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield what came of a context as lines: scores beside the teacher's, and the tokens of a request."""
    split_name, untrained = result["baselines"]["split"], result["baselines"]["untrained"]
    known = {
        "agreement": "agreement with the teacher",
        "accuracy": "accuracy",
        "teacher_accuracy": "accuracy of the teacher",
    }
    yield f"{split_name:28} {'before':>7} {'after':>7}"
    for name, title in known.items():
        if name in result[split_name]:
            before, after = (score_text(scores[name], 100.0) for scores in (untrained, result[split_name]))
            yield f"{title:28} {before:>7} {after:>7}"
    yield f"in front of a request: what was trained, instead of {result['context_tokens']} tokens"
