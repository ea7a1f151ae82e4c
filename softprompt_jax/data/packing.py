"""Several examples in a row: one static shape for everything, and almost no padding.

Each example keeps its own prompt, and segment numbers keep the examples of a row apart in encoder, decoder and
cross attention. T5 sees distances only, so that an example computes the same wherever it stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pydantic
from jaxtyping import Int

from softprompt_jax.config import Settings, UserError
from softprompt_jax.data.buckets import Shape, rounded


class Packing(Settings):
    """The shape of packed rows.

    `length` counts encoder positions, prompts included (None: as many as the longest example needs);
    `target_length` decoder positions (None: what leaves least padding).
    """

    length: int | None = pydantic.Field(None, gt=0)
    target_length: int | None = pydantic.Field(None, gt=0)


@dataclass(frozen=True)
class Rows:
    """Rows of examples, ragged: row i holds the examples `ids[starts[i]:starts[i + 1]]`."""

    ids: Int[np.ndarray, " examples"]
    starts: Int[np.ndarray, " rows_and_one"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def of_one(cls, plan: Int[np.ndarray, "batches B"]) -> Rows:
        """Return rows of one example each."""
        return cls(plan.reshape(-1), np.arange(plan.size + 1))

    def take(self, rows: Int[np.ndarray, " chosen"]) -> Rows:
        """Return these rows in this order."""
        sizes = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        places = np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], sizes)
        return Rows(self.ids[places], starts)

    def __getitem__(self, row: int | np.integer) -> Int[np.ndarray, " segments"]:
        return self.ids[self.starts[row] : self.starts[row + 1]]


def pack(
    order: Int[np.ndarray, " chosen"], lengths: Int[np.ndarray, "examples 2"], shape: Shape, window: int = 2048
) -> Rows:
    """Put the examples of `order` into rows of `shape`, window by window; each example stands in one row.

    `lengths` has the encoder (with prompt) and decoder positions of every example, none over `shape`.
    """
    ids, starts = [], [np.zeros(1, np.int64)]
    for first in range(0, len(order), window):
        part = order[first : first + window]
        row_of = _best_fit(lengths[part], shape)
        ids.append(part[np.argsort(row_of, kind="stable")])
        starts.append(first + np.cumsum(np.bincount(row_of)))
    return Rows(np.concatenate(ids), np.concatenate(starts))


def choose_row_shape(lengths: Int[np.ndarray, "examples 2"], packing: Packing, sample: int = 2048) -> Shape:
    """Return the (encoder, decoder) positions of packed rows: those that are set, the others chosen.

    Raises UserError when an example is longer than what is set.
    """
    longest = lengths.max(0)
    for name, length in zip(("length", "target_length"), longest, strict=True):
        if (limit := getattr(packing, name)) is not None and limit < length:
            raise UserError(
                f"packing.{name}: found {limit}, an example has {length} positions (its prompt counts); "
                f"expected at least as many; raise packing.{name}, or lower the limit of tokens"
            )
    encoder = packing.length or int(rounded(longest[None])[0, 0])
    if packing.target_length is not None:
        return encoder, packing.target_length
    some = lengths[:: max(1, len(lengths) // sample)]
    even = encoder * some[:, 1].mean() / some[:, 0].mean()  # both sides of a row fill up together
    candidates = {
        (encoder, int(rounded(np.array([[encoder, max(longest[1], math.ceil(even * slack))]]))[0, 1]))
        for slack in (1.0, 1.15, 1.35, 1.6, 2.0)
    }
    return min(sorted(candidates), key=lambda shape: len(pack(np.arange(len(some)), some, shape)) * sum(shape))


def _best_fit(lengths: Int[np.ndarray, "examples 2"], shape: Shape) -> Int[np.ndarray, " examples"]:
    """Return a row for each example: longest first, into the row with the least encoder room that suffices."""
    shortest = lengths.min(0)
    by_room: list[list[int]] = [[] for _ in range(shape[0] + 1)]  # open rows by the encoder positions left
    rooms = 0  # bit n: by_room[n] is not empty
    target_room: list[int] = []
    row_of = np.zeros(len(lengths), np.int64)
    for index in np.argsort(-(lengths / shape).sum(1), kind="stable"):
        need, target = int(lengths[index, 0]), int(lengths[index, 1])
        room, row, fitting = shape[0], -1, rooms >> need << need
        while fitting and row < 0:
            lowest = fitting & -fitting
            room, fitting = lowest.bit_length() - 1, fitting ^ lowest
            row = next((open_row for open_row in by_room[room] if target_room[open_row] >= target), -1)
        if row < 0:
            room, row = shape[0], len(target_room)
            target_room.append(shape[1])
        else:
            by_room[room].remove(row)
            if not by_room[room]:
                rooms ^= 1 << room
        room -= need
        target_room[row] -= target
        row_of[index] = row
        if room >= shortest[0] and target_room[row] >= shortest[1]:
            by_room[room].append(row)
            rooms |= 1 << room
    return row_of
