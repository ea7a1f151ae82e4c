"""Which label word is taken for which, and the mistakes that a model is surest of: `mistakes.json` of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompt_jax.config import Settings, parse
from softprompt_jax.data.task import Example, Task
from softprompt_jax.files import read_object
from softprompt_jax.inference.evaluate import DecodedAnswer

MISTAKES_FILE = "mistakes.json"
OTHER = "(no label)"
_KEPT, _LONGEST = 10, 500  # mistakes, letters of an input


class Mistake(Settings):
    """A wrong answer."""

    input: str  # text that the model read, at most its first 500 letters
    target: str  # right answer
    answer: str  # what the model said
    probability: float  # of the whole answer under the model; of beams, after the length penalty


class Mistakes(Settings):
    """The answers to a split of a task that has label words."""

    split: str  # which examples
    labels: list[str]  # right answers, by row
    answers: list[str]  # given answers, by column: the labels, and last all others
    counts: list[list[int]]  # examples, by right and given answer
    surest: list[Mistake]  # most confident wrong answers, the surest first


def mistakes_of(
    task: Task, split: str, answers: Sequence[DecodedAnswer], examples: Sequence[Example]
) -> dict[str, Any] | None:
    """Return the `Mistakes` of answers as JSON has them; None for a task whose answers are no label words."""
    if task.words is None or task.postprocess is not None or task.scored_by_source:
        return None
    columns = {word: number for number, word in enumerate([*task.words, OTHER])}
    counts, wrong = [[0] * len(columns) for _ in task.words], []
    for answer, example in zip(answers, examples, strict=True):
        if example.target in task.words:
            counts[columns[example.target]][columns.get(answer.text, len(task.words))] += 1
        if answer.text != example.target and answer.text not in example.answers:
            said = {"input": example.input[:_LONGEST], "target": example.target, "answer": answer.text}
            wrong.append(said | {"probability": round(math.exp(min(answer.score, 0.0)), 4)})
    surest = sorted(wrong, key=lambda one: -one["probability"])[:_KEPT]
    about = {"split": split, "labels": [*task.words], "answers": [*columns], "counts": counts}
    return about | {"surest": surest}


def read_mistakes(folder: Path) -> dict[str, Mistakes]:
    """Return the mistakes of a run by task; none where it has left no file. Errors: UserError for a damaged file."""
    if not (path := folder / MISTAKES_FILE).exists():
        return {}
    found = read_object(path, "the mistakes of a run, as it has written them; delete it")
    return {task: parse(Mistakes, values, f"{path}: {task}") for task, values in found.items()}
