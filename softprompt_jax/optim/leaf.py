"""What an optimizer knows about a trainable array. `methods.trainable.leaves` describes those of a model."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One trainable array."""

    stacked: bool  # has a leading axis of layers, each of which is a weight of its own
    learning_rate_scale: float  # factor of the learning rate
    shape: tuple[int, ...] = ()
    method: int = 0  # which method of the run's list has attached it
    word_ids: str | None = None  # path of the frozen ids [N] whose embeddings may be its rows; None: any numbers may
