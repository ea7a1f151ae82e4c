"""The compiled functions that answer, and the model as one argument of them.

They are compiled once for each structure of a model, shape and way of decoding, whoever calls them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from softprompt_jax.distributed.mesh import ROWS, row_shards
from softprompt_jax.models import continuous_batching, decode, per_example
from softprompt_jax.models.causal import CausalLM
from softprompt_jax.models.continuous_batching import TOP, Slots
from softprompt_jax.models.decode import Decoding
from softprompt_jax.models.language_model import LanguageModel

JOINED = 8  # texts of requests that are encoded together


class Structure:
    """A model's graphdef as part of a program's key; it is hashed once, not at every call."""

    def __init__(self, graphdef: Any):
        self.graphdef, self._hash = graphdef, hash(graphdef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self.graphdef == other.graphdef)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceModel:
    """A model as one argument of a compiled function: the arrays that change between batches, and all others.

    Of a batch there are also the tables of extras and the entries of its prompts in them.
    """

    structure: Structure = dataclasses.field(metadata={"static": True})
    changing: Any
    frozen: Any
    tables: Any = dataclasses.field(default_factory=dict)
    entries: Any = None

    @classmethod
    def of(cls, model: LanguageModel, changing: Any) -> DeviceModel:
        """Take a model apart; `changing`: nnx's filter for what changes."""
        graphdef, *states = nnx.split(model, changing, ...)
        return cls(Structure(graphdef), *states)

    def merge(self) -> LanguageModel:
        """Return the model, without extras."""
        return nnx.merge(self.structure.graphdef, self.changing, self.frozen)

    def extras(self) -> per_example.BatchState:
        """Return the extras of each row of the batch."""
        return per_example.gather(self.tables, self.entries) if self.tables else {}


@functools.partial(jax.jit, static_argnums=(1, 2))
def answers(
    batch: DeviceModel, how: Decoding, max_tokens: int, tokens: Array, before: Any, numbers: Array, forced: Any
) -> tuple[Int[Array, "B N U"], Float[Array, "B N"]]:
    """Run `decode.answers`; `before` [B, P] is the decoder prompt."""
    model = batch.merge()
    per_example.install(model, batch.extras())
    return decode.answers(model, tokens, max_tokens, how, numbers, before, forced)


@jax.jit
def score_context(batch: DeviceModel, tokens: Int[Array, "B T"]) -> Any:
    """Run `decode.score_context` for as many of the most likely tokens as a step of the server tells."""
    model = batch.merge()
    per_example.install(model, batch.extras())
    assert isinstance(model, CausalLM)
    return decode.score_context(model, tokens, min(TOP, model.settings.vocabulary_rows))


@jax.jit
def score_words(
    batch: DeviceModel, tokens: Int[Array, "B T"], before: Int[Array, "B P"], words: Int[Array, "B W U"]
) -> Float[Array, "B W"]:
    """Run `decode.score_words` with words of its own for each text."""

    def of_text(tokens: Array, before: Array, entry: Array, words: Array) -> Array:
        model = batch.merge()
        per_example.install(model, dataclasses.replace(batch, entries=entry[None]).extras())
        return decode.score_words(model, tokens[None], words, before[None])[0]

    return jax.vmap(of_text, spmd_axis_name=ROWS if row_shards() > 1 else None)(tokens, before, batch.entries, words)


# ----------------------------------------------------------------------------------------- continuous batching


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def empty_slots(batch: DeviceModel, size: int, ring: int, length: int) -> Slots:
    """Run `continuous_batching.empty`."""
    return continuous_batching.empty(batch.merge(), size, ring, length, batch.extras())


@functools.partial(jax.jit, donate_argnums=1)
def join_slots(batch: DeviceModel, slots: Slots, *answers: Any) -> Slots:
    """Run `continuous_batching.join`."""
    return continuous_batching.join(batch.merge(), slots, batch.extras(), *answers)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=1)
def advance_slots(model: DeviceModel, slots: Slots, steps: Any, rows: int, length: int) -> Any:
    """Run `continuous_batching.advance`."""
    return continuous_batching.advance(model.merge(), slots, steps, rows, length)


leave_slots = jax.jit(continuous_batching.leave, donate_argnums=0)
