"""Sentiment of sentences from four domains, rated by twenty people (Hutto and Gilbert, 2014).

The ratings come with the source distribution of vaderSentiment (MIT licence): mean ratings from -4 to 4,
of which those of at least 0.5 either way are kept. They are fetched at run time and checked by hash.
97% of the movie sentences also stand in Rotten Tomatoes: never mix the two.
"""

from __future__ import annotations

import html
from typing import Any

from softprompt_jax.config import UserError
from softprompt_jax.data.packages import Package, reader, split_rows, without_duplicates
from softprompt_jax.data.task import Task

LEAST_RATING = 0.5
_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/{}_GroundTruth.txt"
# Name of the file; sizes of validation and test in sentences, a tenth each.
_DOMAINS = {
    "movie": ("movieReviewSnippets", 1003, 1003),
    "amazon": ("amazonReviewSnippets", 374, 361),
    "nyt": ("nytEditorialSnippets", 287, 292),
    "tweets": ("tweets", 353, 371),
}


@reader("vader")
def read_vader(members: dict[str, bytes], part: str) -> dict[str, list[dict[str, Any]]]:
    """Turn a file of (id, mean rating, sentence) lines into split rows.

    Sentences of one review or editorial (ids 12_1, 12_2, ...) stay in one split.
    """
    if part not in _DOMAINS:
        raise UserError(f"vaderSentiment: no part {part!r}; expected one of {', '.join(_DOMAINS)}")
    file, validation, test = _DOMAINS[part]
    rows = []
    for line in members[_MEMBER.format(file)].decode("utf-8-sig").splitlines():
        id_, rating, text = line.split("\t")
        if abs(float(rating)) >= LEAST_RATING:
            # The file writes a double quote as two single ones, and tweets with HTML entities.
            text = " ".join(html.unescape(text).replace("''", '"').split())
            rows.append(
                {
                    "text": text,
                    "label": "positive" if float(rating) > 0 else "negative",
                    "rating": float(rating),
                    "id": id_,
                }
            )
    return split_rows(without_duplicates(rows, "text"), validation, test, lambda row: row["id"].partition("_")[0])


def _task(domain: str) -> Task:
    return Task(
        name=f"sentiment_{domain}",
        source=Package(
            package="vaderSentiment",
            version="3.3.2",
            form="sdist",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            members=[_MEMBER.format(file) for file, _, _ in _DOMAINS.values()],  # all with one download
            reader="vader",
            part=domain,
        ),
        label_words=["negative", "positive"],
        metrics=["accuracy", "f1_macro"],
    )


TASKS = {task.name: task for task in map(_task, _DOMAINS)}
