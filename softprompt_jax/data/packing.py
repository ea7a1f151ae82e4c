"""Several examples in a row: all batches have one shape, and almost no position is padding.

Each example keeps its own prompt. Segment numbers say which positions of a row belong to the same example, so that the
attention of the encoder, of the decoder and between them stays inside one example. T5 knows only the distance between
two positions, so an example gives the same result wherever it stands in a row.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import numpy as np
import pydantic
from jaxtyping import Int

from softprompt_jax.config import Settings, UserError
from softprompt_jax.data.buckets import Shape, rounded


class Packing(Settings):
    """The shape of packed rows.

    `length` is the number of encoder positions, prompts included (None: as many as the longest example needs).
    `target_length` is the number of decoder positions (None: the number that leaves least padding).
    """

    length: int | None = pydantic.Field(None, gt=0)
    target_length: int | None = pydantic.Field(None, gt=0)


@dataclass(frozen=True)
class Rows:
    """Rows of examples, some with more than others: row i holds the examples `ids[starts[i]:starts[i + 1]]`."""

    ids: Int[np.ndarray, " examples"]
    starts: Int[np.ndarray, " rows_and_one"]

    def __len__(self) -> int:
        return len(self.starts) - 1

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
    """Put the examples of `order` into rows of `shape`. A row holds examples of one window of `window` examples.

    `lengths` has the encoder positions (prompt included) and the decoder positions of every example. None may be larger
    than `shape`.
    """
    ids, starts = [], [np.zeros(1, np.int64)]
    for first in range(0, len(order), window):
        part = order[first : first + window]
        row_of = _best_fit(lengths[part], shape)
        ids.append(part[np.argsort(row_of, kind="stable")])
        starts.append(first + np.cumsum(np.bincount(row_of)))
    return Rows(np.concatenate(ids), np.concatenate(starts))


def choose_row_shape(lengths: Int[np.ndarray, "examples 2"], packing: Packing) -> Shape:
    """Return the (encoder, decoder) positions of packed rows: those that `packing` sets, and the others chosen.

    An example that is longer than what is set is a UserError.
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
    some = lengths[:: max(1, len(lengths) // 2048)]
    even = encoder * some[:, 1].mean() / some[:, 0].mean()  # with so many both sides of a row are full at once
    candidates = {
        (encoder, int(rounded(np.array([[encoder, max(longest[1], math.ceil(even * slack))]]))[0, 1]))
        for slack in (1.0, 1.15, 1.35, 1.6, 2.0)
    }
    return min(sorted(candidates), key=lambda shape: len(pack(np.arange(len(some)), some, shape)) * sum(shape))


def _best_fit(lengths: Int[np.ndarray, "examples 2"], shape: Shape) -> Int[np.ndarray, " examples"]:
    """Return the number of each example's row.

    The longest example comes first. Each goes into the row that has the fewest free encoder positions, among the rows
    in which it fits.
    """
    shortest = lengths.min(0)
    open_rows: list[tuple[int, int, int]] = []  # sorted: free encoder positions, step of the last example, row
    target_room: list[int] = []  # free decoder positions of each row
    row_of = np.zeros(len(lengths), np.int64)
    for step, index in enumerate(np.argsort(-(lengths / shape).sum(1), kind="stable")):
        need, target = lengths[index].tolist()
        wide_enough = range(bisect.bisect(open_rows, (need,)), len(open_rows))
        place = next((place for place in wide_enough if target_room[open_rows[place][2]] >= target), None)
        if place is None:
            room, row = shape[0], len(target_room)
            target_room.append(shape[1])
        else:
            room, _, row = open_rows.pop(place)
        target_room[row] -= target
        row_of[index] = row
        if room - need >= shortest[0] and target_room[row] >= shortest[1]:
            bisect.insort(open_rows, (room - need, step, row))
    return row_of
