"""Where prompt rows stand: before a text, after it, at the marks of a template, before the decoder's input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from softprompt_jax.config import UserError

EOS = 1  # of every T5
_MARK = re.compile(r"\{(prompt(?::\d+)?|text)\}")
_NAMED = {"before": ("{prompt}{text}", 0), "after": ("{text}{prompt}", 0), "decoder": ("{text}", 1)}
_NAMED["both"] = (_NAMED["before"][0], 1)


class PromptLayout:
    """The ids around every text: [n] of one task or of all alike, or [N, n] for the texts of N tasks.

    Ids of V and more are prompt rows, the others are anchor words. `after` stands between a text and its EOS,
    `decoder` before the decoder's first input. `tasks` is N, 0 where all share; the arrays are [max(N, 1), n].
    """

    before: Int[np.ndarray, "N _"]
    after: Int[np.ndarray, "N _"]
    decoder: Int[np.ndarray, "N _"]

    def __init__(self, before: Any = (), after: Any = (), decoder: Any = ()):
        parts = [np.asarray(part, np.int32) for part in (before, after, decoder)]
        self.tasks = max(len(part) if part.ndim == 2 else 0 for part in parts)
        wide = [np.broadcast_to(part, (max(self.tasks, 1), part.shape[-1])) for part in parts]
        self.before, self.after, self.decoder = wide

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids before, after and on the decoder's side."""
        return self.before, self.after, self.decoder

    @property
    def lengths(self) -> tuple[int, int]:
        """How much longer it makes what the encoder and the decoder read."""
        return self.before.shape[1] + self.after.shape[1], self.decoder.shape[1]

    def row_count(self, first: int) -> int:
        """Return how many prompt rows, whose ids start at `first`, stand around one text; the others are words."""
        return sum(int(np.count_nonzero(ids[0] >= first)) for ids in self.parts)

    def around(self, text: Any, task: int = 0) -> Int[np.ndarray, " PT"]:
        """Return what the encoder reads for the ids of one text of a task, with its EOS (if it has one) at the end."""
        text, task = np.asarray(text, np.int32), task if self.tasks else 0
        end = len(text) - int(len(text) > 0 and text[-1] == EOS)
        return np.concatenate([self.before[task], text[:end], self.after[task], text[end:]])

    def before_decoder(self, task: int = 0) -> Int[np.ndarray, " P"]:
        """Return what the decoder reads before its first input, for a text of a task."""
        return self.decoder[task if self.tasks else 0]

    def around_each(self, texts: Int[Array, "B T"]) -> Int[Array, "B S"]:
        """Return the same for all texts of a traced batch (0 is padding); those without an EOS get one."""
        before, after = (jnp.asarray(ids, jnp.int32) for ids in (self.before[0], [*self.after[0], EOS]))
        lengths = jnp.sum((texts != 0) & (texts != EOS), -1, keepdims=True)
        at = jnp.arange(texts.shape[1] + len(before) + len(after))[None] - len(before)  # 0: the text's first

        def taken(ids: Array, index: Array) -> Array:
            return ids[jnp.clip(index, 0, len(ids) - 1)] if len(ids) else jnp.zeros_like(index)

        text = jnp.take_along_axis(
            texts, jnp.clip(jnp.broadcast_to(at, (texts.shape[0], at.shape[1])), 0, texts.shape[1] - 1), 1
        )
        behind = at - lengths
        end = jnp.where(behind < len(after), taken(after, behind), 0)
        return jnp.where((at >= 0) & (behind < 0), text, jnp.where(at < 0, taken(before, at + len(before)), end))

    def of_task(self, task: int) -> PromptLayout:
        """Return what stands around the texts of one task."""
        return PromptLayout(*(part[task if self.tasks else 0] for part in self.parts))

    def for_tasks(self, count: int, first: int, rows: int) -> PromptLayout:
        """Give each of `count` tasks its own `rows` rows in these places; the ids of all rows start at `first`."""
        return PromptLayout(*(part + rows * np.arange(count)[:, None] * (part >= first) for part in self.parts))

    def with_rows(self, where: Int[np.ndarray, " P"], first: int) -> PromptLayout:
        """Return the same places for rows of which the i-th, with the id `first` + i, lies at where[i] of the table."""
        moved = (np.where(ids >= first, first + where[np.maximum(ids - first, 0)], ids) for ids in self.parts)
        return PromptLayout(*(ids if self.tasks else ids[0] for ids in moved))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PromptLayout)
            and self.tasks == other.tasks
            and all(map(np.array_equal, self.parts, other.parts))
        )

    def __hash__(self) -> int:
        return hash(tuple(part.tobytes() for part in self.parts))

    def __repr__(self) -> str:
        return f"PromptLayout{tuple(part.tolist() for part in self.parts)}"


NO_PROMPT = PromptLayout()


def place(where: str, length: int, first: int, encode: Callable[[str], list[int]]) -> PromptLayout:
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
    return PromptLayout(sides[0], sides[1], ids[on_encoder:] if decoder else ())


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
