"""What a template cannot say: how a row of a data set becomes rows with the fields of a template, and answers labels.

A preprocessor takes a row and the name of its split and returns rows: none, one, or (in training) one
per answer. Outside training it returns exactly one, since every question is answered once. Its ValueError says why
a row does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from softprompt_jax.data.registry import Registry

Row = Mapping[str, Any]
Preprocessor = Callable[[Row, str], list[dict[str, Any]]]
Postprocessor = Callable[[str, str], str]
PREPROCESSORS: Registry[Preprocessor] = Registry()  # each takes (row, split) and returns rows
POSTPROCESSORS: Registry[Postprocessor] = Registry()  # each takes (prediction, target) and returns what is scored
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_SPACES = re.compile(r"[ \t\n\f\r]+")


def one_space(text: str) -> str:
    """Make one space of each run of white space."""
    return _SPACES.sub(" ", text)


def pad_punctuation(text: str) -> str:
    """Put spaces around ASCII punctuation, as T5 does for SQuAD (Raffel et al., 2020)."""
    return one_space(_PUNCTUATION.sub(r" \1 ", text))


# ------------------------------------------------------------ SuperGLUE

_NO_YES = ("False", "True")
_HIGHLIGHT_AFTER_STOP = re.compile(r"([.?!\"'])\n@highlight\n")
_DETERMINERS = re.compile(
    r"a|an|few|her|his|each|every|many|much|my|our|some|that|the|their|these|this|those|which|whose|your"
)


@PREPROCESSORS.register("multirc")
def prepare_multirc(row: Row, split: str) -> list[dict[str, Any]]:
    """Take the mark-up out of the paragraph, the question and the answer."""
    plain = {name: re.sub("</?b>", "", row[name].replace("<br>", " ")) for name in ("paragraph", "question", "answer")}
    return [{**row, **plain}]


@PREPROCESSORS.register("record")
def prepare_record(row: Row, split: str) -> list[dict[str, Any]]:
    """Join the entities, make sentences of the highlights; in training one row per answer."""
    passage = _HIGHLIGHT_AFTER_STOP.sub(r"\1 ", row["passage"]).replace("\n@highlight\n", ". ")
    answers = list(row.get("answers") or [])
    shared = {**row, "passage": passage, "entities": ", ".join(row["entities"]), "answers": answers}
    if split == "train":
        return [{**shared, "target": answer} for answer in answers]
    return [{**shared, "target": answers[0] if answers else ""}]


@PREPROCESSORS.register("wsc")
def prepare_wsc(row: Row, split: str) -> list[dict[str, Any]]:
    """Put asterisks around the pronoun; the target is the noun. Training keeps the rows in which that is right."""
    if split == "train" and row["label"] != 1:
        return []
    pronoun = row["span2_text"]
    text = _blank(row["text"], pronoun, row["span2_index"]).replace(" X ", f" *{pronoun}* ")
    label = row.get("label", -1)
    answers = [] if label == -1 else [_NO_YES[label]]
    return [{**row, "text": text, "target": row["span1_text"], "answers": answers}]


@PREPROCESSORS.register("dpr")
def prepare_dpr(row: Row, split: str) -> list[dict[str, Any]]:
    """Put asterisks around the first pronoun that follows a space; the target is the candidate it stands for."""
    pronoun = re.compile(f" ({re.escape(row['pronoun'])})([ .,])")
    text = pronoun.sub(r" *\1*\2", row["sentence"], count=1)
    return [{**row, "text": text, "target": row["candidates"][row["label"]] if "label" in row else ""}]


@PREPROCESSORS.register("axg")
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


@POSTPROCESSORS.register("wsc")
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


# ------------------------------------------------------------ other sets


@PREPROCESSORS.register("stsb")
def prepare_stsb(row: Row, split: str) -> list[dict[str, Any]]:
    """Round the score to the nearest fifth: one of 26 texts, "0.0" to "5.0" (-1 hides it)."""
    score = row.get("label", -1)
    return [{**row, "target": "" if score == -1 else f"{np.round(np.float32(score) * 5) / np.float32(5):.1f}"}]


@PREPROCESSORS.register("snli")
def prepare_snli(row: Row, split: str) -> list[dict[str, Any]]:
    """Leave out rows without an agreed label."""
    return [] if split and row.get("label") == -1 else [dict(row)]


@PREPROCESSORS.register("squad")
def prepare_squad(row: Row, split: str) -> list[dict[str, Any]]:
    """Pad the punctuation of question, context and answers; the target is the first answer."""
    answers = row.get("answers") or []
    answers = [pad_punctuation(text) for text in (answers["text"] if isinstance(answers, dict) else answers)]
    texts = {name: pad_punctuation(row[name]) for name in ("question", "context")}
    return [{**row, **texts, "answers": answers, "target": answers[0] if answers else ""}]
