"""What the engine works on: a job is a request, an answer one of the texts that it asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from softprompt_jax.data.tokenizer import Tokenizer
from softprompt_jax.models import decode


@dataclasses.dataclass
class Answer:
    """One answer, growing in a slot."""

    limit: int
    forced: list[int] = dataclasses.field(default_factory=list)
    how: decode.Greedy | decode.Sampling = dataclasses.field(default_factory=decode.Greedy)
    sample: int = 0  # which of the seed's samples
    tokens: list[int] = dataclasses.field(default_factory=list)
    score: float = 0.0
    ends: frozenset[int] = frozenset({1})  # tokens that end it: EOS, and those of its prompt's stop text
    stops: Callable[[list[int]], bool] | None = None  # whether there is a text in its tokens that ends it
    stopped: bool = False  # by such a text
    top: int = 0  # most likely tokens to be told beside each of its own
    log_p: list[float] = dataclasses.field(default_factory=list)  # of each token
    others: list[dict[int, float]] = dataclasses.field(default_factory=list)  # the most likely ones, and theirs

    def add(self, token: int, log_p: float) -> None:
        """Write a token."""
        self.tokens.append(token)
        self.log_p.append(log_p)
        self.score += log_p
        self.stopped = self.stops is not None and self.stops(self.tokens)

    @property
    def done(self) -> bool:
        """Whether it has ended, or cannot go on."""
        return len(self.tokens) >= self.limit or self.ended

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return bool(self.tokens) and (self.stopped or self.tokens[-1] in self.ends)


@dataclasses.dataclass(eq=False)
class Job:
    """A request: a text, the name of its prompt, its answers, and a function to call when they change.

    `notify` is called from the engine's thread: with None after new tokens (if `watched`), at the end with True or with
    a RequestError.
    """

    prompt: str
    ids: list[int]
    answers: list[Answer]
    deadline: float  # of time.monotonic()
    notify: Callable[[Any], object]
    watched: bool = False
    cancelled: bool = False
    places: list[int] = dataclasses.field(default_factory=list)
    length: int = 0  # of the encoder's side
    reader: Tokenizer | None = None  # of the prompt as it was when the request came, which may be gone at its end
