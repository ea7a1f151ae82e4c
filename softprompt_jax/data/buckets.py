"""The order of the batches of an epoch, and the few shapes that batches are padded to.

Real texts are short and uneven; padding to the longest wastes most of the work. Batches are made of
examples of similar length, and each is padded to the smallest of a handful of shapes, since every shape
is compiled once.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

Shape = tuple[int, int]  # encoder and decoder length


def batch_plan(
    order: Int[np.ndarray, " chosen"],
    lengths: Int[np.ndarray, "examples 2"],
    batch_size: int,
    random: np.random.Generator,
    window: int = 64,
) -> Int[np.ndarray, "batches B"]:
    """Return the example ids of every batch of one epoch, whose shuffled examples are `order`.

    Cut them in windows of `window` batches, sort by encoder length, then by decoder length, inside each window, chop
    into batches, permute the batches. The last examples that do not fill a batch (other ones every epoch) are left
    out. Fewer than a batch fill one by starting again.
    """
    if len(order) < batch_size:
        return np.resize(order, (1, batch_size))
    order = order[: len(order) // batch_size * batch_size].copy()
    for start in range(0, len(order), window * batch_size):
        part = order[start : start + window * batch_size]
        order[start : start + len(part)] = part[np.lexsort((lengths[part, 1], lengths[part, 0]))]
    batches = order.reshape(-1, batch_size)
    return batches[random.permutation(len(batches))]


def choose_shapes(
    needed: Int[np.ndarray, "batches 2"], largest: Shape, max_shapes: int = 4, multiple: int = 8
) -> list[Shape]:
    """Choose at most `max_shapes` shapes that pad batches least, smallest first; the last one holds `largest`.

    `needed` has the longest encoder and decoder length of typical batches. Lengths are multiples of
    `multiple`; decoders may also have 2 or 4, since label words are that short and each position pays
    for the whole vocabulary. Shapes are added one by one, each time the one that saves most, then
    exchanged while that saves more.
    """
    needed = rounded(np.asarray(needed), multiple)
    last = tuple(int(length) for length in rounded(np.asarray(largest), multiple))
    pairs, counts = np.unique(needed, axis=0, return_counts=True)
    candidates = np.array([(t, u) for t in _levels(pairs[:, 0], 48) for u in _levels(pairs[:, 1], 12)])
    # cost[c, p]: tokens of one batch row needing pair p in a batch of shape c; too small shapes are impossible.
    fits = (candidates[:, None] >= pairs).all(-1)
    cost = np.where(fits, candidates.sum(1)[:, None], np.inf)
    fallback = np.full(len(pairs), float(sum(last)))
    chosen: list[int] = []

    def total(rows: list[int]) -> np.ndarray:
        """Tokens in all, for each candidate added to `rows`."""
        kept = np.minimum.reduce([fallback, *(cost[row] for row in rows)])
        return np.minimum(kept, cost) @ counts

    best = float(fallback @ counts)
    while len(chosen) < max_shapes - 1:
        totals = total(chosen)
        if totals.min() >= best:
            break
        chosen, best = [*chosen, int(totals.argmin())], float(totals.min())
    improved = True
    while improved:
        improved = False
        for slot in range(len(chosen)):
            others = chosen[:slot] + chosen[slot + 1 :]
            totals = total(others)
            if totals.min() < best:
                chosen, best, improved = [*others, int(totals.argmin())], float(totals.min()), True
    shapes = {(int(t), int(u)) for t, u in candidates[chosen]} if chosen else set()
    return sorted(shapes | {last}, key=lambda shape: (sum(shape), shape))  # type: ignore[arg-type,return-value]


def fitting_shape(shapes: list[Shape], needed: Int[np.ndarray, " 2"]) -> Shape:
    """Return the first (smallest) shape that holds these encoder and decoder lengths."""
    return next(shape for shape in shapes if shape[0] >= needed[0] and shape[1] >= needed[1])


def rounded(lengths: Int[np.ndarray, "... 2"], multiple: int = 8) -> Int[np.ndarray, "... 2"]:
    """Return pairs of lengths rounded up: to multiples, and decoder lengths under 8 to 2 or 4."""
    rounded = -(-lengths // multiple) * multiple
    decoder = lengths[..., 1]
    rounded[..., 1] = np.where(decoder <= 2, 2, np.where(decoder <= 4, 4, rounded[..., 1]))
    return rounded


def _levels(lengths: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the distinct lengths, evenly spaced by rank, with the largest."""
    levels = np.unique(lengths)
    return levels[np.unique(np.linspace(len(levels) - 1, 0, min(most, len(levels))).round().astype(int))]
