"""Texts that come in and answers that go out, as lists and as lines of JSON."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from softprompt_jax.config import UserError


def check_texts(texts: Any, where: str) -> list[str]:
    """Return texts as a list. Errors: UserError for one text (its letters would be answered), and for what is none."""
    if isinstance(texts, str):
        raise UserError(f"{where}: found one text, {texts[:40]!r}; expected a list of texts; put it in brackets")
    found = list(texts)
    if wrong := [text for text in found if not isinstance(text, str)]:
        raise UserError(f"{where}: found {type(wrong[0]).__name__} among the texts; expected a list of texts")
    return found


def one_for_each(value: str | Sequence[str], count: int, where: str, what: str) -> list[str]:
    """Return a text for each of `count` texts: the same one, or those that are given."""
    found = [value] * count if isinstance(value, str) else check_texts(value, where)
    if len(found) != count:
        raise UserError(f"{where}: {count} texts and {len(found)} {what}; expected one for each text")
    return found


def answer_lines(
    rows: Iterable[tuple[str, Any]],
    read: Callable[[Any, str], Any],
    answers: Callable[[list[Any], int], list[list[str]]],
    chunk: int,
) -> Iterator[dict[str, Any]]:
    """Yield each row of (where, row) with its `prediction`, in order, a chunk at a time.

    `read(row, where)` returns what is asked for a row; `answers(asked, number)` all answers to each of a chunk, whose
    first one has this number. Of several samples or beams all are the row's `answers`.
    """
    asked = ((row, read(row, where)) for where, row in rows)
    done = 0
    while pending := list(itertools.islice(asked, chunk)):
        for (row, _), texts in zip(pending, answers([one for _, one in pending], done), strict=True):
            yield {**row, "prediction": texts[0], **({"answers": texts} if len(texts) > 1 else {})}
        done += len(pending)
