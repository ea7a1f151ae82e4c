"""Where prompt rows stand: before a text, after it, at the marks of a template, before the decoder's input."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from softprompt_jax.config import UserError

Ids = Sequence[int] | Sequence[Sequence[int]] | np.ndarray
_MARK = re.compile(r"\{(prompt(?::\d+)?|text)\}")
_NAMED = {"before": ("{prompt}{text}", 0), "after": ("{text}{prompt}", 0), "decoder": ("{text}", 1)}
_NAMED["both"] = (_NAMED["before"][0], 1)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Ids around every text, each [n], or [N, n] for the texts of N tasks; those of V and more are prompt rows.

    The others are anchor words. `after` stands between the text and its EOS, `decoder` before the decoder's
    first input.
    """

    before: Ids = ()
    after: Ids = ()
    decoder: Ids = ()

    @property
    def tasks(self) -> int:
        """How many tasks have each their own; 0 where all share."""
        parts = [np.asarray(part) for part in (self.before, self.after, self.decoder)]
        return max(len(part) if part.ndim == 2 else 0 for part in parts)

    def of_task(self, task: int) -> Placement:
        """Return what stands around the texts of one task."""
        parts = [np.asarray(part, np.int32) for part in (self.before, self.after, self.decoder)]
        return Placement(*(tuple((part[task] if part.ndim == 2 else part).tolist()) for part in parts))

    def for_tasks(self, count: int, first: int, rows: int) -> Placement:
        """Give each of `count` tasks its own `rows` rows in these places; the ids of all rows start at `first`."""

        def moved(ids: Any) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(i + task * rows if i >= first else i for i in ids) for task in range(count))

        return Placement(moved(self.before), moved(self.after), moved(self.decoder))


def place(where: str, length: int, first: int, encode: Callable[[str], list[int]]) -> Placement:
    """Give `length` rows, whose ids start at `first`, their places.

    `where`: "before", "after", "decoder", "both" (`length` rows before the text and as many before the decoder's
    input), or a template such as "{prompt:10} {text} it was {prompt:5}", whose other words are anchors.
    """
    check(where, length)
    template, decoder = _NAMED.get(where, (where, 0))
    on_encoder = length if "{prompt" in template else 0
    ids = list(range(first, first + rows(where, length)))
    sides: list[list[int]] = [[], []]
    side, used = 0, 0
    for part, counted in zip(_parts(template), _counts(template, on_encoder), strict=True):
        if part == "{text}":
            side = 1
        elif counted is not None:
            sides[side] += ids[used : used + counted]
            used += counted
        elif part.strip():
            anchors = encode(part.strip())
            if max(anchors, default=0) >= first:
                raise UserError(f"place {where!r}: {part.strip()!r} has the id {max(anchors)}; expected under {first}")
            sides[side] += anchors
    return Placement(tuple(sides[0]), tuple(sides[1]), tuple(ids[on_encoder:]) if decoder else ())


def rows(where: str, length: int) -> int:
    """Return how many rows there are in all."""
    return 2 * length if where == "both" else length


def check(where: str, length: int) -> None:
    """Raise a ValueError that says what is wrong with a place."""
    if where in _NAMED:
        return
    marks = [part for part in _parts(where) if _MARK.fullmatch(part)]
    if marks.count("{text}") != 1 or len(marks) < 2 or set("".join(_MARK.split(where)[::2])) & set("{}"):
        raise ValueError(
            f"found {where!r}; expected {', '.join(_NAMED)}, or a template with {{text}} once and "
            "{prompt:N} at least once, such as '{prompt:10} {text} it was {prompt:5}'"
        )
    counts = [count for count in _counts(where, length) if count is not None]
    if sum(counts) != length or min(counts) < 1:
        raise ValueError(
            f"{where!r} does not place the prompt's {length} rows; expected {{prompt:N}} that add up to the length "
            "(one may be {prompt}, the rest)"
        )


def _parts(template: str) -> list[str]:
    """Split a template in marks and the texts between them."""
    parts = _MARK.split(template)
    return [f"{{{part}}}" if index % 2 else part for index, part in enumerate(parts)]


def _counts(template: str, length: int) -> list[int | None]:
    """Return for each part how many rows it takes; None for one that is no mark of the prompt."""
    numbers = [re.fullmatch(r"\{prompt(?::(\d+))?\}", part) for part in _parts(template)]
    stated = sum(int(match[1]) for match in numbers if match and match[1])
    open_ended = sum(1 for match in numbers if match and not match[1])
    rest = length - stated if open_ended == 1 else 0
    return [None if match is None else int(match[1]) if match[1] else rest for match in numbers]
