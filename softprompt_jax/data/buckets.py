"""The order of the batches of an epoch, and the few shapes that batches are padded to.

Most texts are short and a few are long, so padding every batch to the longest text wastes most of the work. Instead a
batch holds examples of similar length, and is padded to the smallest of a few shapes that holds it. The shapes are few
because JAX compiles the step once for each.
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

    `order` is cut into windows of `window` batches. The examples of a window are sorted by encoder length, then by
    decoder length, and cut into batches. In the end all batches are shuffled. The last examples of `order`, if they
    do not fill a batch, are left out; each epoch leaves out others. If all examples together do not fill one batch,
    some stand in it several times.
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
    needed: Int[np.ndarray, "batches 2"], largest: Shape | Int[np.ndarray, " 2"], max_shapes: int = 4, multiple: int = 8
) -> list[Shape]:
    """Return at most `max_shapes` shapes with which batches need little padding, smallest first.

    `needed` has the longest encoder and decoder length of each of some typical batches; the last shape holds `largest`.
    Lengths are multiples of `multiple`. A decoder length may also be 2 or 4: label words are that short, and each
    decoder position costs a product with the whole vocabulary. The search adds the shape that saves most tokens, again
    and again, and then exchanges single shapes while that saves more.
    """
    needed = rounded(np.asarray(needed), multiple)
    last = tuple(int(length) for length in rounded(np.asarray(largest), multiple))
    pairs, counts = np.unique(needed, axis=0, return_counts=True)
    candidates = np.array([(t, u) for t in _levels(pairs[:, 0], 48) for u in _levels(pairs[:, 1], 12)])
    # cost[c, p]: the tokens of a row in a batch of shape c that needs the lengths of pair p; inf if c is too small.
    fits = (candidates[:, None] >= pairs).all(-1)
    cost = np.where(fits, candidates.sum(1)[:, None], np.inf)
    fallback = np.full(len(pairs), float(sum(last)))

    def with_best(rows: list[int]) -> tuple[float, list[int]]:
        """Add the candidate that saves most to the candidates `rows`; return the total of tokens and all of these."""
        kept = np.minimum.reduce([fallback, *(cost[row] for row in rows)])
        totals = np.minimum(kept, cost) @ counts
        return float(totals.min()), [*rows, int(totals.argmin())]

    best, chosen = float(fallback @ counts), []
    while len(chosen) < max_shapes - 1 and (found := with_best(chosen))[0] < best:
        best, chosen = found
    improved = True
    while improved:
        improved = False
        for slot in range(len(chosen)):
            if (found := with_best(chosen[:slot] + chosen[slot + 1 :]))[0] < best:
                (best, chosen), improved = found, True
    shapes = {(int(t), int(u)) for t, u in candidates[chosen]} if chosen else set()
    return sorted(shapes | {last}, key=lambda shape: (sum(shape), shape))  # type: ignore[arg-type,return-value]


def fitting_shape(shapes: list[Shape], needed: Int[np.ndarray, " 2"]) -> Shape:
    """Return the first (smallest) shape that holds these encoder and decoder lengths."""
    return next(shape for shape in shapes if shape[0] >= needed[0] and shape[1] >= needed[1])


def rounded(lengths: Int[np.ndarray, "... 2"], multiple: int = 8) -> Int[np.ndarray, "... 2"]:
    """Return pairs of lengths rounded up to multiples; decoder lengths of up to 4 are rounded up to 2 or 4."""
    rounded = -(-lengths // multiple) * multiple
    decoder = lengths[..., 1]
    rounded[..., 1] = np.where(decoder <= 2, 2, np.where(decoder <= 4, 4, rounded[..., 1]))
    return rounded


def _levels(lengths: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` of the distinct lengths: the largest, and others at equal steps in the sorted list."""
    levels = np.unique(lengths)
    return levels[np.unique(np.linspace(len(levels) - 1, 0, min(most, len(levels))).round().astype(int))]
