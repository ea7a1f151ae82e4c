"""What an optimizer knows about a trainable array. `methods.trainable.leaves` describes those of a model."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One trainable array."""

    stacked: bool  # whether it has a leading axis of layers, each of which is updated as a weight of its own
    learning_rate_scale: float  # factor of the learning rate
    shape: tuple[int, ...] = ()
    method: int = 0  # number of the method that has attached it, in the run's list
    word_ids: str | None = None  # path of frozen ids [N], if its rows must be embeddings of these words
    word_factor: float = 1.0  # by which the rows of the embedding table are multiplied first
