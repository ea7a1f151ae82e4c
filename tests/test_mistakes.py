"""What a run leaves of its wrong answers: which label was taken for which, and what it was surest of."""

from __future__ import annotations

import json
import math

import pytest

from softprompt_jax.config import parse
from softprompt_jax.data.task import Example, Task
from softprompt_jax.inference.evaluate import DecodedAnswer
from softprompt_jax.inference.mistakes import mistakes_of, read_mistakes


def task(**settings):
    return parse(Task, {"name": "t", "source": {"kind": "files", "train": "t.jsonl"}} | settings, "test")


def test_answers_are_counted_by_right_label_and_the_surest_wrong_ones_come_first():
    examples = [
        Example("a", "yes"),
        Example("b" * 600, "yes"),
        Example("c", "no"),
        Example("d", "no", answers=("yes",)),
    ]
    said = [("yes", 0.9), ("no", 0.5), ("maybe", 0.7), ("yes", 0.6)]
    answers = [DecodedAnswer(text, [], math.log(probability)) for text, probability in said]
    found = mistakes_of(task(label_words=["yes", "no"]), "test", answers, examples)
    assert found["counts"] == [[1, 1, 0], [1, 0, 1]]
    assert found["answers"] == ["yes", "no", "(no label)"]
    surest = [(one["input"], one["target"], one["answer"], one["probability"]) for one in found["surest"]]
    assert surest == [("c", "no", "maybe", 0.7), ("b" * 500, "yes", "no", 0.5)]  # d may be answered so
    many = mistakes_of(task(label_words=["yes", "no"]), "test", answers * 20, examples * 20)
    assert len(many["surest"]) == 10
    assert mistakes_of(task(), "test", answers, examples) is None  # of free text most answers are unlike the target


def test_a_run_leaves_its_mistakes_and_they_agree_with_its_score(prompt_run):
    (found,) = read_mistakes(prompt_run).values()
    result = json.loads((prompt_run / "result.json").read_text())
    assert found.split == "test"
    total, right = sum(map(sum, found.counts)), sum(row[number] for number, row in enumerate(found.counts))
    assert total == result["test"]["count"]
    assert right / total == pytest.approx(result["test"]["accuracy"])
    assert sum(row[-1] for row in found.counts) / total == pytest.approx(result["test"]["illegal"])
    assert len(found.surest) == min(10, total - right)
    assert all(one.answer != one.target for one in found.surest)
