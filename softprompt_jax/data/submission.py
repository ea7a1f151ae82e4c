"""Files of predictions for the servers of GLUE and SuperGLUE, and the averages of these benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softprompt_jax.config import UserError
from softprompt_jax.data.preprocessors import POSTPROCESSORS
from softprompt_jax.data.task import Example, Task
from softprompt_jax.files import writable

# The sets whose mean is the score; those in one tuple are averaged first, as MNLI's two halves are.
BENCHMARKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "superglue": (("boolq",), ("cb",), ("copa",), ("multirc",), ("record",), ("rte",), ("wic",), ("wsc",)),
    "glue": (
        *(("cola",), ("sst2",), ("mrpc",), ("stsb",), ("qqp",), ("mnli", "mnli_mismatched")),
        *(("qnli",), ("glue_rte",), ("wnli",)),
    ),
}
# Where the server wants numbers for GLUE's labels, in the order of the label words; elsewhere the word itself.
_GLUE_NUMBERS = {"CoLA", "SST-2", "MRPC", "QQP", "WNLI"}


def average(benchmark: str, scores: Mapping[str, Sequence[float]]) -> float:
    """Return a benchmark's score: the mean over its sets of each one's mean metric (Wang et al., 2018 and 2019).

    `scores` maps the name of each task to its metrics; a missing one is a UserError.
    """
    if benchmark not in BENCHMARKS:
        raise UserError(f"benchmark {benchmark!r}: unknown; expected one of {', '.join(BENCHMARKS)}")
    groups = BENCHMARKS[benchmark]
    missing = [name for group in groups for name in group if not scores.get(name)]
    if missing:
        raise UserError(
            f"{benchmark}: no scores of {', '.join(missing)}; expected all of "
            f"{', '.join(name for group in groups for name in group)}; evaluate them first"
        )
    return float(np.mean([np.mean([np.mean(scores[name]) for name in group]) for group in groups]))


def write_submission(task: Task, examples: Sequence[Example], predictions: Sequence[str], folder: Path) -> Path:
    """Write the file that the benchmark's server takes for a task, and return its path.

    The server accepts only labels. So an illegal prediction is written as the first label word, or in STS-B as 0; the
    caller counts and reports these.
    """
    check_server(task)
    assert task.submission is not None
    benchmark, _, name = task.submission.partition("/")
    lines = {"glue": _glue, "superglue": _superglue}[benchmark](task, name, examples, predictions)
    path = folder / f"{name}.{'tsv' if benchmark == 'glue' else 'jsonl'}"
    with writable(path):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def check_server(task: Task) -> None:
    """Raise a UserError if no benchmark's server takes the task's answers."""
    if task.submission is None:
        raise UserError(f"task {task.name}: belongs to no benchmark with a server; expected one of GLUE or SuperGLUE")


def _legal(task: Task, prediction: str) -> str:
    words = task.words or []
    return prediction if prediction in words or not words else words[0]


def _glue(task: Task, name: str, examples: Sequence[Example], predictions: Sequence[str]) -> Iterable[str]:
    yield "index\tprediction"
    for number, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
        if task.words is None:
            try:
                answer: Any = f"{min(max(float(prediction), 0.0), 5.0):.3f}"
            except ValueError:
                answer = "0.000"
        else:
            word = _legal(task, prediction)
            answer = task.words.index(word) if name in _GLUE_NUMBERS else word
        yield f"{example.fields.get('idx', number)}\t{answer}"


def _superglue(task: Task, name: str, examples: Sequence[Example], predictions: Sequence[str]) -> Iterable[str]:
    if name == "MultiRC":
        yield from _multirc(task, examples, predictions)
        return
    for number, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
        index = example.fields.get("idx", number)
        answer: Any = _legal(task, prediction)
        if name == "ReCoRD":
            index = index["query"]
        elif name == "WSC":
            answer = POSTPROCESSORS["wsc"](prediction, example.fields["span1_text"]) or "False"
        elif name == "COPA":
            answer = (task.words or []).index(answer)
        elif name in ("BoolQ", "WiC"):
            answer = answer.lower()
        yield json.dumps({"idx": index, "label": answer}, ensure_ascii=False)


def _multirc(task: Task, examples: Sequence[Example], predictions: Sequence[str]) -> Iterable[str]:
    """Write a line per paragraph, with its questions and their answers inside."""
    paragraphs: dict[int, dict[int, list[dict[str, int]]]] = {}
    for example, prediction in zip(examples, predictions, strict=True):
        index = example.fields["idx"]
        questions = paragraphs.setdefault(index["paragraph"], {})
        answer = {"idx": index["answer"], "label": int(_legal(task, prediction) == "True")}
        questions.setdefault(index["question"], []).append(answer)
    for paragraph, questions in paragraphs.items():
        listed = [{"idx": question, "answers": answers} for question, answers in questions.items()]
        yield json.dumps({"idx": paragraph, "passage": {"questions": listed}})
