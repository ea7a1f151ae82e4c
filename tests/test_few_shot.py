"""A few examples: as many of each label as asked for, the same for a seed, of the train split only."""

from __future__ import annotations

from collections import Counter

import pytest
from small_runs import write_rows

from softprompt_jax import tasks
from softprompt_jax.config import UserError, parse
from softprompt_jax.data.few_shot import FewShot
from softprompt_jax.data.task import Task


@pytest.fixture
def task(tmp_path):
    rows = [{"text": f"t{i}", "label": "a" if i % 3 else "b"} for i in range(60)]
    source = {
        "kind": "files",
        "train": str(write_rows(tmp_path / "a.jsonl", rows)),
        "validation": str(tmp_path / "a.jsonl"),
    }

    def make(**settings):
        return parse(Task, {"name": "mine", "source": source, **settings}, "task")

    return make


def test_each_label_word_has_as_many_examples(task):
    chosen = tasks.load(task(label_words=["a", "b"], few_shot={"count": 8}), "train")
    assert Counter(example.target for example in chosen) == {"a": 8, "b": 8}
    order = [int(example.input[1:]) for example in chosen]
    assert order == sorted(set(order))
    assert len(tasks.load(task(few_shot={"count": 8}), "train")) == 8  # free text
    assert len(tasks.load(task(label_words=["a", "b"], few_shot={"count": 8}), "validation")) == 60


def test_choice_is_the_seeds(task):
    chosen = [
        [
            example.input
            for example in tasks.load(task(label_words=["a", "b"], few_shot={"count": 5, "seed": seed}), "train")
        ]
        for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]


def test_every_example_can_be_chosen():
    seen = {i for seed in range(40) for i in FewShot(count=5, seed=seed).choose(["x"] * 20, None, "here")}
    assert seen == set(range(20))


def test_too_few_examples_of_a_label_are_told(task):
    with pytest.raises(
        UserError, match=r"^task mine: train: found 20 examples of 'b'; few_shot.count expected 30; lower it$"
    ):
        tasks.load(task(label_words=["a", "b"], few_shot={"count": 30}), "train")
    with pytest.raises(UserError, match=r"few_shot.count: found 0; input should be greater than 0"):
        task(few_shot={"count": 0})
