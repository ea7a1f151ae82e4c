"""Decoding in slots: answers join and leave a running batch, so that none waits for the end of another.

Each of S slots has a place in the caches. All slots write the token at hand to the same place of a ring of R places:
T5 knows distances only, so that an answer may begin anywhere in the ring, and sees as far back as its own first token.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from softprompt_jax.backbone.decode import EOS, NEVER, through_decoder
from softprompt_jax.backbone.t5 import T5

STEPS = 8  # that `advance` takes at most


class Wanted(NamedTuple):
    """How the answer of each of N slots shall be made."""

    limit: Int[Array, "N"]  # tokens at most
    forced: Int[Array, "N R"]  # what it begins with; 0: free
    key: UInt32[Array, "N 2"]
    temperature: Float[Array, "N"]  # 0: the most likely token each time
    top_k: Int[Array, "N"]  # 0: all
    top_p: Float[Array, "N"]


class Slots(NamedTuple):
    """What is known of S answers in the making."""

    caches: tuple[Array, Array]  # keys and values [L, S, H, R, K]
    cross: tuple[Array, Array]  # those of the encodings [L, S, H, T, K]
    seen: Bool[Array, "S T"]  # which of these are real
    pointer: Int[Array, ""]  # place in the ring of the token at hand
    age: Int[Array, "S"]  # keys of its own that stand before it
    count: Int[Array, "S"]  # tokens written; `limit` is where it ends
    last: Int[Array, "S"]  # the token written last
    wanted: Wanted


def empty(model: T5, slots: int, ring: int, length: int) -> Slots:
    """Return so many free slots, for at most `length` encoder positions and `ring` decoder positions."""
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
    seen = jnp.zeros((slots, length), bool)
    age, count, last = (jnp.zeros((slots,), jnp.int32) for _ in range(3))
    return Slots(pair(ring), pair(length), seen, jnp.array(0, jnp.int32), age, count, last, wanted)


def join(
    model: T5,
    slots: Slots,
    tokens: Int[Array, "B T"],
    before: Int[Array, "B P"],
    count: Int[Array, ""],
    source: Int[Array, "N"],
    place: Int[Array, "N"],
    wanted: Wanted,
) -> Slots:
    """Encode B texts, read their decoder prompts (0 on the left: shorter), and put `count` answers into slots.

    Answer n is to the text `source[n]` and gets the slot `place[n]`; N - `count` of them are not there.
    """
    segments = (tokens != 0).astype(jnp.int32)
    encoded = model.encode(tokens, segments)
    cross = jax.lax.map(lambda layer: layer.cross.keys_values(encoded), model.decoder.layers)
    ring, length = slots.caches[0].shape[3], before.shape[1]
    seen = segments > 0
    own = None
    if length:
        positions = jnp.arange(length)
        shape = (model.decoder.depth, len(tokens), model.settings.num_heads, length, model.settings.d_kv)
        past = (positions <= positions[:, None]) & (before != 0)[:, None, None, :]
        biased = functools.partial(model.decoder.biased, queries=positions, keys=positions)
        nothing = jnp.zeros(shape, encoded.dtype), jnp.zeros(shape, encoded.dtype)
        _, own = through_decoder(model, before, nothing, 0, biased, past, cross, seen[:, None, None, :])

    def put(n: Any, parts: Any) -> Any:
        row, slot = source[n], place[n]
        caches, crosses = parts

        def into(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(old, jax.lax.dynamic_slice_in_dim(new, row, 1, 1), (0, slot, 0, 0, 0))

        crosses = tuple(into(old, new) for old, new in zip(crosses, cross, strict=True))
        if own is not None:  # they end just before the pointer
            ends = [jnp.pad(new, ((0, 0), (0, 0), (0, 0), (0, ring - length), (0, 0))) for new in own]
            turned = [jnp.roll(new, slots.pointer - length, axis=3) for new in ends]
            caches = tuple(into(old, new) for old, new in zip(caches, turned, strict=True))
        return caches, crosses

    caches, crosses = jax.lax.fori_loop(0, count, put, (slots.caches, slots.cross))
    where = jnp.where(jnp.arange(len(place)) < count, place, len(slots.age))  # the others are dropped

    def given(old: Array, new: Any) -> Array:
        return old.at[where].set(new, mode="drop")

    widened = jnp.pad(seen, ((0, 0), (0, slots.seen.shape[1] - seen.shape[1])))
    return Slots(
        caches,
        crosses,
        given(slots.seen, widened[source]),
        slots.pointer,
        given(slots.age, jnp.sum(before != 0, -1)[source].astype(jnp.int32)),
        given(slots.count, 0),
        given(slots.last, 0),
        Wanted(*map(given, slots.wanted, wanted)),
    )


def leave(slots: Slots, which: Bool[Array, "S"]) -> Slots:
    """End the answers in these slots as they are."""
    wanted = slots.wanted._replace(limit=jnp.where(which, 0, slots.wanted.limit))
    return slots._replace(wanted=wanted)


def advance(
    model: T5, slots: Slots, steps: Int[Array, ""], rows: int, length: int
) -> tuple[Slots, Int[Array, "N S"], Float[Array, "N S"]]:
    """Take up to `steps` steps (N = `STEPS` at most) with the first `rows` slots; they use `length` encoder positions.

    Return the tokens that each step wrote (-1: none) and their log-probabilities.
    """
    capacity = len(slots.age)

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
    ring = slots.caches[0].shape[3]
    age, count, last = (part[:rows] for part in (slots.age, slots.count, slots.last))
    wanted = Wanted(*(part[:rows] for part in slots.wanted))
    behind = (slots.pointer - jnp.arange(ring)) % ring  # how long ago each place of the ring was written
    past = (behind <= age[:, None])[:, None, None, :]
    biased = functools.partial(model.decoder.biased, queries=jnp.zeros((1,), jnp.int32), keys=-behind)
    seen = slots.seen[:rows, None, None, :length]
    x, caches = through_decoder(model, last[:, None], slots.caches, slots.pointer, biased, past, slots.cross, seen)
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

    def draw(key: Array, number: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.wrap_key_data(key), number), row)

    return jax.vmap(draw)(wanted.key, count, kept).astype(jnp.int32)


def likely(log_p: Float[Array, "S V"], top_k: Int[Array, "S"], top_p: Float[Array, "S"]) -> Float[Array, "S V"]:
    """Leave each row's `top_k` most likely tokens (0: all), then the fewest that have probability `top_p` together."""
    vocabulary = log_p.shape[-1]
    ordered = jnp.sort(log_p, descending=True)
    kept = jnp.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary)[:, None]
    least = jnp.take_along_axis(ordered, kept - 1, -1)
    log_p = jnp.where(log_p < least, NEVER, log_p)
    ordered = jax.nn.log_softmax(jnp.where(ordered < least, NEVER, ordered))
    before = jnp.cumsum(jnp.exp(ordered), -1) - jnp.exp(ordered)  # of all that are more likely
    last = jnp.sum(before < top_p[:, None], -1, keepdims=True) - 1
    cut = jax.nn.log_softmax(log_p) < jnp.take_along_axis(ordered, last, -1)
    return jnp.where((top_p < 1)[:, None] & cut, NEVER, log_p)
