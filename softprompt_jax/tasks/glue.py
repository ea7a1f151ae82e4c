"""GLUE (Wang et al., 2018) as T5 reads it (Raffel et al., 2020), and its paraphrase pair with labels swapped.

Rows come from nyu-mll/glue, whose card gives the schema (huggingface.co/datasets/nyu-mll/glue):
labels 0, 1, ... in the order of the words below, -1 in the test splits, whose labels are not public.
RTE is called glue_rte, since SuperGLUE names its fields otherwise. `mrpc_from_qqp` is MRPC in the
label words of QQP, to score a prompt trained on QQP on it, and the other way round (Lester et al., 2021).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from softprompt_jax.data.preprocessors import Row, preparation
from softprompt_jax.data.sources import Hub
from softprompt_jax.data.task import Task
from softprompt_jax.tasks.superglue import fields

_NLI = ("entailment", "neutral", "contradiction")
_QQP = ("not_duplicate", "duplicate")
_MRPC = ("not_equivalent", "equivalent")
_PAIR = fields("sentence1", "sentence2")
_QUESTIONS = fields("question1", "question2")
_NLI_INPUT = fields("hypothesis", "premise")
_F1 = {"metrics": ["f1", "accuracy"]}
_MATCHED = {"train": "train", "validation": "validation_matched", "test": "test_matched"}
_MISMATCHED = {"train": "train", "validation": "validation_mismatched", "test": "test_mismatched"}


@preparation("stsb")
def prepare_stsb(row: Row, split: str) -> list[dict[str, Any]]:
    """Round the score to the nearest fifth: one of 26 texts, "0.0" to "5.0" (-1 hides it)."""
    score = row.get("label", -1)
    return [{**row, "target": "" if score == -1 else f"{np.round(np.float32(score) * 5) / np.float32(5):.1f}"}]


def _task(name: str, input: str, file: str | None, words: Any = None, **settings: Any) -> Task:
    config = settings.pop("config", name)
    splits = settings.pop("splits", {split: split for split in ("train", "validation", "test")})
    defaults: dict[str, Any] = {
        "prefix": f"{config} ",
        "target": {str(label): word for label, word in enumerate(words)} if words else "{target}",
        "hidden": ["test"],
        "submission": f"glue/{file}" if file else None,
    }
    source = Hub(name="nyu-mll/glue", config=config, splits=splits)
    return Task(name=name, source=source, input=input, **defaults | settings)


TASKS = {
    task.name: task
    for task in (
        _task("cola", fields("sentence"), "CoLA", ("unacceptable", "acceptable"), metrics=["matthews"]),
        _task("sst2", fields("sentence"), "SST-2", ("negative", "positive")),
        _task("mrpc", _PAIR, "MRPC", _MRPC, **_F1),
        _task("qqp", _QUESTIONS, "QQP", _QQP, **_F1),
        _task("mrpc_from_qqp", _PAIR, None, _QQP, config="mrpc", **_F1),
        _task("qqp_from_mrpc", _QUESTIONS, None, _MRPC, config="qqp", **_F1),
        _task("stsb", _PAIR, "STS-B", prepare="stsb", metrics=["pearson", "spearman"]),
        _task("mnli", _NLI_INPUT, "MNLI-m", _NLI, splits=_MATCHED),
        _task("mnli_mismatched", _NLI_INPUT, "MNLI-mm", _NLI, config="mnli", splits=_MISMATCHED),
        _task("qnli", fields("question", "sentence"), "QNLI", ("entailment", "not_entailment")),
        _task("glue_rte", _PAIR, "RTE", ("entailment", "not_entailment"), config="rte"),
        _task("wnli", _PAIR, "WNLI", ("not_entailment", "entailment")),
        _task("ax", _NLI_INPUT, "AX", _NLI, prefix="mnli ", splits={"test": "test"}),
    )
}
