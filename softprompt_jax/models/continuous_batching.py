"""Continuous batching: answers join and leave a running batch, so that none waits for the end of another.

Each of S slots has room in the caches for one answer. Every step writes the keys of all slots to the same place of a
ring of R places. T5 knows distances only, so that an answer may begin anywhere in the ring; it sees back to its own
first token. An answer's prefix (of prefix tuning) stands before the ring and is written when the answer joins.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from softprompt_jax.models import per_example
from softprompt_jax.models.attention import bias_before
from softprompt_jax.models.decode import EOS, begin, likely, through_decoder
from softprompt_jax.models.t5 import T5

STEPS = 8  # at most, of one call of `advance`


class Wanted(NamedTuple):
    """How to choose the tokens of each of N answers."""

    limit: Int[Array, "N"]  # most tokens
    forced: Int[Array, "N R"]  # first tokens; 0: free
    rng: UInt32[Array, "N 2"]
    temperature: Float[Array, "N"]  # 0: greedy
    top_k: Int[Array, "N"]  # 0: all
    top_p: Float[Array, "N"]


class Slots(NamedTuple):
    """The state of S answers that are being decoded."""

    caches: tuple[Array, Array]  # keys and values [L, S, H, PR, K], of prefixes and ring
    cross: tuple[Array, Array]  # those of the encodings, behind their prefixes [L, S, H, PT, K]
    seen: Bool[Array, "S PT"]  # which of these are real
    prefix: tuple[Bool[Array, "S P"], ...]  # which keys before the ring are real: without, then with positions
    factors: per_example.BatchState  # of the decoder [S, L, W]
    pointer: Int[Array, ""]  # place of the ring that the next step writes
    age: Int[Array, "S"]  # number of an answer's own keys in the ring
    count: Int[Array, "S"]  # tokens written; an answer ends at `limit`
    last: Int[Array, "S"]  # last token written
    wanted: Wanted


def empty(model: T5, slots: int, ring: int, length: int, rows: per_example.BatchState) -> Slots:
    """Return free slots for at most `length` encoder positions and `ring` decoder positions.

    `rows`: the per-example state of a batch; only its shapes are read.
    """
    settings, zero = model.settings, jnp.zeros((slots,), jnp.int32)
    shape = (model.decoder.depth, slots, settings.num_heads)

    def pair(size: int) -> tuple[Array, Array]:
        return jnp.zeros((*shape, size, settings.d_kv), model.dtype), jnp.zeros(
            (*shape, size, settings.d_kv), model.dtype
        )

    wanted = Wanted(
        zero,
        jnp.zeros((slots, ring), jnp.int32),
        jnp.zeros((slots, 2), jnp.uint32),
        jnp.zeros((slots,)),
        jnp.zeros((slots,), jnp.int32),
        jnp.ones((slots,)),
    )
    own, length = per_example.prefix_lengths(rows, "decoder"), sum(per_example.prefix_lengths(rows, "cross")) + length
    prefix = tuple(jnp.zeros((slots, size), bool) for size in own)
    factors = {name: jnp.ones((slots, *part.shape[1:])) for name, part in per_example.decoder_factors(rows).items()}
    seen, start = jnp.zeros((slots, length), bool), jnp.array(0, jnp.int32)
    age, count, last = (jnp.zeros((slots,), jnp.int32) for _ in range(3))
    return Slots(pair(sum(own) + ring), pair(length), seen, prefix, factors, start, age, count, last, wanted)


def join(
    model: T5,
    slots: Slots,
    rows: per_example.BatchState,
    tokens: Int[Array, "B T"],
    before: Int[Array, "B P"],
    count: Int[Array, ""],
    source: Int[Array, "N"],
    place: Int[Array, "N"],
    wanted: Wanted,
) -> Slots:
    """Encode B texts, read their decoder prompts (0 on the left: shorter), and put `count` answers into slots.

    Answer n belongs to text `source[n]` and gets slot `place[n]`; of N places for answers only the first `count` are
    used. `rows` is the per-example state of the B texts, which the model is given.
    """
    per_example.install(model, rows)
    begun = begin(model, tokens, before, 0)
    first, length = sum(part.shape[1] for part in slots.prefix), before.shape[1]
    ring = slots.caches[0].shape[3] - first

    # Skip this on first reading: the keys of one text are copied into one slot, those of its decoder prompt turned so
    # that they end where the pointer stands.
    def put(n: Any, parts: Any) -> Any:
        row, slot = source[n], place[n]
        caches, crosses = parts

        def into(old: Array, new: Array, start: int = 0) -> Array:
            new = jax.lax.dynamic_slice_in_dim(new.astype(old.dtype), row, 1, 1)
            return jax.lax.dynamic_update_slice(old, new, (0, slot, 0, start, 0))

        crosses = tuple(into(old, new) for old, new in zip(crosses, begun.cross, strict=True))
        if begun.prefix is not None:
            prefix = begun.prefix.keys, begun.prefix.values
            caches = tuple(into(old, new) for old, new in zip(caches, prefix, strict=True))
        if length:  # decoder prompts end just before the pointer
            ends = [jnp.pad(new[..., first:, :], [(0, 0)] * 3 + [(0, ring - length), (0, 0)]) for new in begun.caches]
            turned = [jnp.roll(new, slots.pointer - length, axis=3) for new in ends]
            caches = tuple(into(old, new, first) for old, new in zip(caches, turned, strict=True))
        return caches, crosses

    caches, crosses = jax.lax.fori_loop(0, count, put, (slots.caches, slots.cross))
    where = jnp.where(jnp.arange(len(place)) < count, place, len(slots.age))  # the others are dropped

    def given(old: Array, new: Any) -> Array:
        return old.at[where].set(new, mode="drop")

    seen = begun.seen[:, 0, 0]
    widened = jnp.pad(seen, ((0, 0), (0, slots.seen.shape[1] - seen.shape[1])))
    prefix = slots.prefix
    if begun.prefix is not None and begun.prefix.real is not None:
        new = jnp.split(begun.prefix.real[0], [prefix[0].shape[1]], axis=1)
        prefix = tuple(given(old, part[source]) for old, part in zip(prefix, new, strict=True))
    return Slots(
        caches,
        crosses,
        given(slots.seen, widened[source]),
        prefix,
        {name: given(old, rows[name][source]) for name, old in slots.factors.items()},
        slots.pointer,
        given(slots.age, jnp.sum(before != 0, -1)[source].astype(jnp.int32)),
        given(slots.count, 0),
        given(slots.last, 0),
        Wanted(*map(given, slots.wanted, wanted)),
    )


def leave(slots: Slots, which: Bool[Array, "S"]) -> Slots:
    """End the answers in these slots."""
    wanted = slots.wanted._replace(limit=jnp.where(which, 0, slots.wanted.limit))
    return slots._replace(wanted=wanted)


def advance(
    model: T5, slots: Slots, steps: Int[Array, ""], rows: int, length: int
) -> tuple[Slots, Int[Array, "N S"], Float[Array, "N S"]]:
    """Take up to `steps` steps, N = `STEPS` at most, of the first `rows` slots.

    `length`: encoder positions in use, prefixes included. Return the tokens that each step wrote (-1: none) and their
    log-probabilities.
    """
    capacity = len(slots.age)
    per_example.install(model, {name: part[:rows] for name, part in slots.factors.items()})

    def step(state: Any) -> Any:
        index, slots, tokens, scores = state
        slots, chosen, score = _step(model, slots, rows, length)
        return index + 1, slots, tokens.at[index, :rows].set(chosen), scores.at[index, :rows].set(score)

    def unfinished(state: Any) -> Any:
        index, slots, *_ = state
        return (index < steps) & jnp.any(slots.count < slots.wanted.limit)

    nothing = jnp.full((STEPS, capacity), -1, jnp.int32), jnp.zeros((STEPS, capacity), jnp.float32)
    _, slots, tokens, scores = jax.lax.while_loop(unfinished, step, (jnp.array(0, jnp.int32), slots, *nothing))
    return slots, tokens, scores


def _step(model: T5, slots: Slots, rows: int, length: int) -> tuple[Slots, Int[Array, "S"], Float[Array, "S"]]:
    unpositioned, positioned = (part.shape[1] for part in slots.prefix)
    ring = slots.caches[0].shape[3] - unpositioned - positioned
    age, count, last = (part[:rows] for part in (slots.age, slots.count, slots.last))
    wanted = Wanted(*(part[:rows] for part in slots.wanted))
    behind = (slots.pointer - jnp.arange(ring)) % ring  # steps since each place of the ring was written
    past = jnp.concatenate([*(part[:rows] for part in slots.prefix), behind <= age[:, None]], 1)[:, None, None, :]

    def biased(bias: Any) -> Float[Array, "#B H 1 S"]:
        return bias_before(bias, bias(jnp.zeros((1,), jnp.int32), -behind), age[:, None], unpositioned, positioned)

    place = unpositioned + positioned + slots.pointer
    seen = slots.seen[:rows, None, None, :length]
    x, caches = through_decoder(model, last[:, None], slots.caches, place, biased, past, slots.cross, seen)
    log_p = jax.nn.log_softmax(model.project(model.decoder.norm(x)))[:, 0]
    active = count < wanted.limit
    drawn = active & (wanted.temperature > 0)
    best = jnp.argmax(log_p, -1).astype(jnp.int32)
    free = jax.lax.cond(drawn.any(), lambda: jnp.where(drawn, _draw(log_p, wanted, count), best), lambda: best)
    forced = jnp.take_along_axis(wanted.forced, jnp.minimum(count, ring - 1)[:, None], -1)[:, 0]
    chosen = jnp.where(forced > 0, forced, free)
    score = jnp.where(active, jnp.take_along_axis(log_p, chosen[:, None], -1)[:, 0], 0)
    chosen = jnp.where(active, chosen, 0)
    count = count + active
    limit = jnp.where(chosen == EOS, count, wanted.limit)
    new = slots._replace(
        caches=caches,
        pointer=(slots.pointer + 1) % ring,
        age=slots.age.at[:rows].set(jnp.minimum(age + active, ring - 1)),
        count=slots.count.at[:rows].set(count),
        last=slots.last.at[:rows].set(chosen),
        wanted=slots.wanted._replace(limit=slots.wanted.limit.at[:rows].set(limit)),
    )
    return new, jnp.where(active, chosen, -1), score


def _draw(log_p: Float[Array, "S V"], wanted: Wanted, count: Int[Array, "S"]) -> Int[Array, "S"]:
    scaled = log_p / jnp.where(wanted.temperature > 0, wanted.temperature, 1)[:, None]
    kept = likely(scaled, wanted.top_k, wanted.top_p)

    def draw(rng: Array, number: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.wrap_key_data(rng), number), row)

    return jax.vmap(draw)(wanted.rng, count, kept).astype(jnp.int32)
