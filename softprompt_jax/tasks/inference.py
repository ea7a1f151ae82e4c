"""Natural language inference sets from which SPoT's prompts start (Vu et al., 2022), in its form.

Schemas: huggingface.co/datasets/stanfordnlp/snli (label -1: the annotators did not agree; such rows are
left out), /facebook/anli (splits train_r1, dev_r1, test_r1, ...), /tasksource/doc-nli (labels as words; its splits
are smaller than those of Yin et al., 2021). MNLI, QNLI and RTE are in glue.py, CB in superglue.py.
"""

from __future__ import annotations

from typing import Any

from softprompt_jax.data.preprocessors import Row, preparation
from softprompt_jax.data.sources import Hub
from softprompt_jax.data.task import Task

_WORDS = {"0": "entailment", "1": "neutral", "2": "contradiction"}


@preparation("snli")
def prepare_snli(row: Row, split: str) -> list[dict[str, Any]]:
    """Leave out rows without an agreed label."""
    return [] if split and row.get("label") == -1 else [dict(row)]


def _task(name: str, source: Hub, input: str, **settings) -> Task:
    defaults = {"target": _WORDS, "one_space": True, "prefix": f"{name} "}
    return Task(name=name, source=source, input=input, **defaults | settings)


def _anli(number: int) -> Task:
    splits = {"train": f"train_r{number}", "validation": f"dev_r{number}", "test": f"test_r{number}"}
    # SPoT's copy calls the premise "context".
    return _task(
        f"anli_r{number}", Hub(name="facebook/anli", splits=splits), "hypothesis: {hypothesis} context: {premise}"
    )


TASKS = {
    task.name: task
    for task in (
        *map(_anli, (1, 2, 3)),
        _task(
            "docnli",
            Hub(name="tasksource/doc-nli"),
            "hypothesis: {hypothesis} premise: {premise}",
            target={word: word for word in ("entailment", "not_entailment")},
            metrics=["f1", "accuracy"],
            positive="entailment",
        ),
        _task("snli", Hub(name="stanfordnlp/snli"), "hypothesis: {hypothesis} premise: {premise}", prepare="snli"),
    )
}
