"""What both sides compute: the backbone's size, the prompt, and the same examples (numpy only)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

PROMPT_LENGTH = 100
BATCH_SIZE = 8
LEARNING_RATE = 0.01
WEIGHT_DECAY = 0.01  # torch's default; both sides decay by learning rate times this


@dataclass(frozen=True)
class Workload:
    """Random token ids: a fixed shape, and a set of real lengths. A target's last id is 1, EOS."""

    vocabulary_rows: int
    input_tokens: int = 256  # of text; the prompt comes on top
    target_tokens: int = 16
    examples: int = 2048  # of real lengths: enough for PEFT's sampler and our windows to be at their best
    median: float = 60.0
    sigma: float = 0.7
    shortest: int = 8
    batch_size: int = BATCH_SIZE
    causal: bool = False  # whether the backbone is a decoder-only model, for which text and target are one row
    prompt_scale: float = 1.0  # factor of the prompt's first rows

    @classmethod
    def read(cls, folder: str | Path) -> Workload:
        """Read the workload that stands beside a backbone's weights."""
        return cls(**json.loads((Path(folder) / "workload.json").read_text()))

    def write(self, folder: str | Path) -> None:
        """Put the workload beside a backbone's weights."""
        (Path(folder) / "workload.json").write_text(json.dumps(asdict(self)))

    def _ids(self, random: np.random.Generator, length: int) -> np.ndarray:
        return np.append(random.integers(3, self.vocabulary_rows, length - 1), 1).astype(np.int32)

    def fixed(self, count: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Batches of pairs (input, target) that fill the fixed shape."""
        random = np.random.default_rng(0)
        return [
            [
                (self._ids(random, self.input_tokens), self._ids(random, self.target_tokens))
                for _ in range(self.batch_size)
            ]
            for _ in range(count)
        ]

    @cached_property
    def uneven(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Pairs of log-normal lengths: inputs as stated above, targets about a tenth of that."""
        random = np.random.default_rng(1)
        inputs = random.lognormal(np.log(self.median), self.sigma, self.examples)
        targets = random.lognormal(np.log(self.target_tokens * 0.4), 0.5, self.examples)
        inputs = np.clip(inputs.round(), min(self.shortest, self.input_tokens), self.input_tokens).astype(int)
        targets = np.clip(targets.round(), 2, self.target_tokens).astype(int)
        return [(self._ids(random, i), self._ids(random, t)) for i, t in zip(inputs, targets, strict=True)]

    def prompt(self, width: int) -> np.ndarray:
        """The prompt's first rows [P, D]."""
        rows = np.random.default_rng(2).uniform(-0.5, 0.5, (PROMPT_LENGTH, width))
        return (self.prompt_scale * rows).astype(np.float32)


def systematic_sample(costs: np.ndarray, count: int) -> np.ndarray:
    """Choose `count` batches that stand for an epoch: every n-th in the order of their cost, then shuffled."""
    order = np.argsort(costs, kind="stable")
    places = ((np.arange(count) + 0.5) * len(order) / count).astype(int)
    return np.random.default_rng(3).permutation(order[places])
