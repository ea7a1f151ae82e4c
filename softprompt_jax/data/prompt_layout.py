"""Where prompt rows stand: before a text, after it, at the marks of a template, before the decoder's input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from softprompt_jax.config import UserError

EOS = 1  # of T5s, unless a model says otherwise
_MARK = re.compile(r"(\{(?:prompt(?::\d+)?|text)\})")
_NAMED = {"before": ("{prompt}{text}", 0), "after": ("{text}{prompt}", 0), "decoder": ("{text}", 1)}
_NAMED["both"] = (_NAMED["before"][0], 1)


class PromptLayout:
    """The ids around every text: [n] of one task or of all alike, or [N, n] for the texts of N tasks.

    Ids of V and more are prompt rows, the others are anchor words. `after` stands between a text and its EOS,
    `decoder` before the decoder's first input. `tasks` is N, 0 where all share; the arrays are [max(N, 1), n]. `end` is
    the id at the end of every text; None: texts have none (decoder-only models).
    """

    before: Int[np.ndarray, "N _"]
    after: Int[np.ndarray, "N _"]
    decoder: Int[np.ndarray, "N _"]

    def __init__(self, before: Any = (), after: Any = (), decoder: Any = (), end: int | None = EOS):
        parts = [np.asarray(part, np.int32) for part in (before, after, decoder)]
        self.tasks = max(len(part) if part.ndim == 2 else 0 for part in parts)
        wide = [np.broadcast_to(part, (max(self.tasks, 1), part.shape[-1])) for part in parts]
        self.before, self.after, self.decoder = wide
        self.end = end

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
        end = len(text) - int(len(text) > 0 and text[-1] == self.end)
        return np.concatenate([self.before[task], text[:end], self.after[task], text[end:]])

    def before_decoder(self, task: int = 0) -> Int[np.ndarray, " P"]:
        """Return what the decoder reads before its first input, for a text of a task."""
        return self.decoder[task if self.tasks else 0]

    def around_each(self, texts: Int[Array, "B T"], padding: int = 0) -> Int[Array, "B S"]:
        """Return the same for all texts of a traced batch; those without an EOS get one where texts have one."""
        ending = [] if self.end is None else [self.end]
        around = [jnp.asarray(ids, texts.dtype) for ids in (self.before[0], [*self.after[0], *ending, padding])]
        before, after = (jnp.broadcast_to(ids, (texts.shape[0], len(ids))) for ids in around)
        everything = jnp.concatenate([before, texts, after], 1)
        at = jnp.arange(everything.shape[1] - 1)
        words = texts > padding if self.end is None else (texts > padding) & (texts != self.end)
        end = before.shape[1] + jnp.sum(words, -1, keepdims=True)
        behind = jnp.minimum(
            at - end + before.shape[1] + texts.shape[1], everything.shape[1] - 1
        )  # the last is padding
        return jnp.take_along_axis(everything, jnp.where(at < end, at, behind), 1)

    def of_task(self, task: int) -> PromptLayout:
        """Return what stands around the texts of one task."""
        return PromptLayout(*(part[task if self.tasks else 0] for part in self.parts), end=self.end)

    def for_tasks(self, count: int, first: int, rows: int) -> PromptLayout:
        """Give each of `count` tasks its own `rows` rows in these places; the ids of all rows start at `first`."""
        moved = (part + rows * np.arange(count)[:, None] * (part >= first) for part in self.parts)
        return PromptLayout(*moved, end=self.end)

    def with_rows(self, where: Int[np.ndarray, " P"], first: int) -> PromptLayout:
        """Return the same places for rows of which the i-th, with the id `first` + i, lies at where[i] of the table."""
        moved = (np.where(ids >= first, first + where[np.maximum(ids - first, 0)], ids) for ids in self.parts)
        return PromptLayout(*(ids if self.tasks else ids[0] for ids in moved), end=self.end)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PromptLayout)
            and (self.tasks, self.end) == (other.tasks, other.end)
            and all(map(np.array_equal, self.parts, other.parts))
        )

    def __hash__(self) -> int:
        return hash(tuple(part.tobytes() for part in self.parts))

    def __repr__(self) -> str:
        return f"PromptLayout{tuple(part.tolist() for part in self.parts)}"


NO_PROMPT = PromptLayout()


def place(
    where: str, length: int, first: int, encode: Callable[[str], list[int]], end: int | None = EOS
) -> PromptLayout:
    """Give `length` rows, whose ids start at `first`, their places around texts that end with `end`.

    `where`: "before", "after", "decoder", "both" (`length` rows before the text and as many before the decoder's
    input), or a template such as "{prompt:10} {text} it was {prompt:5}", whose other words are anchors.
    """
    check(where, length)
    template, decoder = _NAMED.get(where, (where, 0))
    if decoder and end is None:
        raise ValueError(f"place {where!r}: this model has no decoder; expected before, after or a template")
    on_encoder = length if "{prompt" in template else 0
    ids = list(range(first, first + rows(where, length)))
    sides: list[list[int]] = [[], []]
    side, used = 0, 0
    for part, counted in zip(_MARK.split(template), _counts(template, on_encoder), strict=True):
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
    return PromptLayout(sides[0], sides[1], ids[on_encoder:] if decoder else (), end)


def rows(where: str, length: int) -> int:
    """Return how many rows there are in all."""
    return 2 * length if where == "both" else length


def check(where: str, length: int) -> None:
    """Raise a ValueError that says what is wrong with a place."""
    if where in _NAMED:
        return
    parts = _MARK.split(where)
    marks, words = parts[1::2], "".join(parts[::2])
    if marks.count("{text}") != 1 or len(marks) < 2 or set(words) & set("{}"):
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


def _counts(template: str, length: int) -> list[int | None]:
    """Return for each mark, and each text between marks, how many rows it takes; None for what is not of the prompt."""
    stated = [(f"{{prompt:{number}}}", int(number)) for number in re.findall(r"\{prompt:(\d+)\}", template)]
    rest = length - sum(number for _, number in stated) if template.count("{prompt}") == 1 else 0
    numbers = {**dict(stated), "{prompt}": rest}
    return [numbers.get(part) for part in _MARK.split(template)]
