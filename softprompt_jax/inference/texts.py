"""Texts that come in and answers that go out, as lists and as lines of JSON."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from softprompt_jax.config import UserError
from softprompt_jax.models.decode import NEVER


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
    answers: Callable[[list[Any], int], Sequence[Sequence[tuple[str, float]]]],
    chunk: int,
    share: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, Any]]:
    """Yield each row of (where, row) with its `prediction`, in order, a chunk at a time: each, or those of a `share`.

    `read(row, where)` returns what is asked for a row; `answers(asked, number)` all answers and their scores to each of
    a chunk, whose first one has this number. Of several samples or beams all are the row's `answers`. A row whose
    scores are no numbers has an `error`, and null as its prediction.
    """
    asked = ((row, read(row, where)) for where, row in rows)
    for number in itertools.count():
        if not (pending := list(itertools.islice(asked, chunk))):
            return
        if number % share[1] != share[0]:
            continue
        for (row, _), found in zip(pending, answers([one for _, one in pending], chunk * number), strict=True):
            texts = [text for text, _ in found]
            if not is_number(found[0][1]):
                yield {**row, "prediction": None, "error": no_numbers(row.get("prompt"))}
                continue
            yield {**row, "prediction": texts[0], **({"answers": texts} if len(texts) > 1 else {})}


def is_number(score: float) -> bool:
    """Tell whether a score is an answer's: not NaN, nor that of a search in which every hypothesis was NaN."""
    return NEVER / 2 < score < math.inf


def no_numbers(prompt: object) -> str:
    """Say why a text has no answer under a prompt whose numbers leave float32's range."""
    return f"prompt {prompt or 'of this run'}: its answers are NaN; expected embeddings of usual size; train it again"


def until(text: str, stop: str | Sequence[str]) -> str:
    """Return a text up to where the first of the texts `stop` begins in it."""
    found = [text.find(each) for each in ([stop] if isinstance(stop, str) else stop) if each]
    return text[: min((place for place in found if place >= 0), default=None)]
