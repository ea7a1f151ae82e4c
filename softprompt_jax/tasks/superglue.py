"""SuperGLUE (Wang et al., 2019) as T5 reads it (Raffel et al., 2020): fields by name, in T5's order.

Rows come from the hub's conversion of aps/super_glue to parquet, whose schema its card gives
(huggingface.co/datasets/aps/super_glue): label 0, 1, ... in the order of the words below, -1 in the
test splits, whose labels are not public. Beside them stands definite pronoun resolution (Rahman and Ng, 2012),
which T5 reads as WSC and trains on with the eight (its mixture super_glue_v102_proportional):
huggingface.co/datasets/community-datasets/definite_pronoun_resolution. Without a validation split it can be part of
a mixture, which does not score it, and not a run of its own.
"""

from __future__ import annotations

import re
from typing import Any

from softprompt_jax.data.preprocessors import Row, postprocessor, preparation
from softprompt_jax.data.sources import Hub
from softprompt_jax.data.task import Task

_NO_YES = ("False", "True")
_ENTAILMENT = ("entailment", "not_entailment")
_HIGHLIGHT_AFTER_STOP = re.compile(r"([.?!\"'])\n@highlight\n")
_DETERMINERS = re.compile(
    r"a|an|few|her|his|each|every|many|much|my|our|some|that|the|their|these|this|those|which|whose|your"
)


def fields(*names: str) -> str:
    """Return the template that names each field before its text."""
    return " ".join(f"{name}: {{{name}}}" for name in names)


@preparation("multirc")
def prepare_multirc(row: Row, split: str) -> list[dict[str, Any]]:
    """Take the mark-up out of the paragraph, the question and the answer."""
    plain = {name: re.sub("</?b>", "", row[name].replace("<br>", " ")) for name in ("paragraph", "question", "answer")}
    return [{**row, **plain}]


@preparation("record")
def prepare_record(row: Row, split: str) -> list[dict[str, Any]]:
    """Join the entities, make sentences of the highlights; in training one row per answer."""
    passage = _HIGHLIGHT_AFTER_STOP.sub(r"\1 ", row["passage"]).replace("\n@highlight\n", ". ")
    answers = list(row.get("answers") or [])
    shared = {**row, "passage": passage, "entities": ", ".join(row["entities"]), "answers": answers}
    if split == "train":
        return [{**shared, "target": answer} for answer in answers]
    return [{**shared, "target": answers[0] if answers else ""}]


@preparation("wsc")
def prepare_wsc(row: Row, split: str) -> list[dict[str, Any]]:
    """Put asterisks around the pronoun; the target is the noun. Training keeps the rows in which that is right."""
    if split == "train" and row["label"] != 1:
        return []
    pronoun = row["span2_text"]
    text = _blank(row["text"], pronoun, row["span2_index"]).replace(" X ", f" *{pronoun}* ")
    label = row.get("label", -1)
    answers = [] if label == -1 else [_NO_YES[label]]
    return [{**row, "text": text, "target": row["span1_text"], "answers": answers}]


@preparation("dpr")
def prepare_dpr(row: Row, split: str) -> list[dict[str, Any]]:
    """Put asterisks around the first pronoun that follows a space; the target is the candidate it stands for."""
    pronoun = re.compile(f" ({re.escape(row['pronoun'])})([ .,])")
    text = pronoun.sub(r" *\1*\2", row["sentence"], count=1)
    return [{**row, "text": text, "target": row["candidates"][row["label"]] if "label" in row else ""}]


@preparation("axg")
def prepare_axg(row: Row, split: str) -> list[dict[str, Any]]:
    """Number the pairs of rows that differ in a pronoun's gender: they follow one another."""
    return [{**row, "pair": row["idx"] // 2} if "idx" in row else dict(row)]


def _blank(text: str, pronoun: str, index: int) -> str:
    """Put X for the word at `index`; two rows of WSC point beside the pronoun or at one with punctuation."""
    words = text.split(" ")
    if not 0 < index < len(words):
        raise ValueError(f"word {index} of {len(words)} is the pronoun, neither the first nor the last")
    if words[index] == pronoun:
        return " ".join([*words[:index], "X", *words[index + 1 :]])
    rest = words[index].removeprefix(pronoun)
    if rest != words[index] and not any(map(str.isalnum, rest)):
        return " ".join([*words[:index], "X", rest, *words[index + 1 :]]).rstrip()
    if index + 1 < len(words) and words[index + 1] == pronoun:
        return _blank(text, pronoun, index + 1)
    raise ValueError(f"word {index} is {words[index]!r}, not {pronoun!r}")


@postprocessor("wsc")
def read_wsc(prediction: str, target: str) -> str:
    """Return "True" where the prediction names the noun, "" where it says nothing (wrong in any case)."""
    predicted, noun = (
        " ".join(word for word in text.strip().lower().split(" ") if not _DETERMINERS.fullmatch(word))
        for text in (prediction, target)
    )
    if not predicted:
        return ""
    if ("'" in predicted) != ("'" in noun):  # the noun's owner is another one
        return "False"
    found, wanted = set(predicted.split(" ")), set(noun.split(" "))
    return str(found <= wanted or wanted <= found)


def _task(name: str, input: str, submission: str, config: str | None = None, words: Any = None, **settings) -> Task:
    test_only = name in ("axb", "axg")
    splits = {"test": "test"} if test_only else {split: split for split in ("train", "validation", "test")}
    defaults: dict[str, Any] = {
        "prefix": f"{name} ",
        "target": {str(label): word for label, word in enumerate(words)} if words else "{target}",
        "hidden": [] if test_only else ["test"],
        "submission": f"superglue/{submission}",
    }
    source = Hub(name="aps/super_glue", config=config or name, converted=True, splits=splits)
    return Task(name=name, source=source, input=input, **defaults | settings)


TASKS = {
    task.name: task
    for task in (
        _task("boolq", fields("passage", "question"), "BoolQ", words=_NO_YES),
        _task(
            "cb",
            fields("hypothesis", "premise"),
            "CB",
            words=("entailment", "contradiction", "neutral"),
            metrics=["f1_macro", "accuracy"],
        ),
        _task("copa", fields("choice1", "choice2", "premise", "question"), "COPA", words=("choice1", "choice2")),
        _task(
            "multirc",
            fields("question", "answer", "paragraph"),
            "MultiRC",
            words=_NO_YES,
            prepare="multirc",
            group_fields=["idx.paragraph", "idx.question"],
            metrics=["f1", "group_exact_match"],
        ),
        _task(
            "record",
            fields("query", "entities", "passage"),
            "ReCoRD",
            prepare="record",
            answers_field="answers",
            metrics=["squad_f1", "exact_match"],
        ),
        _task("rte", fields("hypothesis", "premise"), "RTE", words=_ENTAILMENT),
        _task("wic", fields("sentence1", "sentence2", "word"), "WiC", words=_NO_YES),
        _task(
            "wsc",
            "{text}",
            "WSC",
            config="wsc.fixed",
            prefix="wsc: ",
            prepare="wsc",
            postprocess="wsc",
            answers_field="answers",
        ),
        Task(
            name="dpr",
            source=Hub(
                name="community-datasets/definite_pronoun_resolution", splits={"train": "train", "test": "test"}
            ),
            prefix="wsc: ",
            target="{target}",
            prepare="dpr",
        ),
        # The diagnostic sets are read as RTE; a prompt trained on rte is scored on them.
        _task(
            "axb",
            "hypothesis: {sentence2} premise: {sentence1}",
            "AX-b",
            prefix="rte ",
            words=_ENTAILMENT,
            metrics=["matthews"],
        ),
        _task(
            "axg",
            fields("hypothesis", "premise"),
            "AX-g",
            prefix="rte ",
            words=_ENTAILMENT,
            prepare="axg",
            group_fields=["pair"],
            metrics=["accuracy", "group_agreement"],
        ),
    )
}
