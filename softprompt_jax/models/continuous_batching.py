"""Continuous batching: answers join and leave a running batch, so that none waits for the end of another.

Each of S slots has room in the caches for one answer. Every step writes the keys of all slots to the same place of a
ring of R places. A key knows its position (T5: knows distances only), so that an answer may begin anywhere in the ring;
it sees back to its own first token. An answer's prefix (of prefix tuning) stands before the ring, or before the context
of a decoder-only model, and is written when the answer joins. All else in its slot becomes 0 then: a mask does not keep
out what an extreme prompt has left, since 0 x NaN is NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from softprompt_jax.distributed.mesh import constrain_cache, constrain_rows
from softprompt_jax.models import per_example
from softprompt_jax.models.attention import bias_before
from softprompt_jax.models.cache import Begun, begin, through_causal, through_decoder
from softprompt_jax.models.causal import FAR, CausalLM
from softprompt_jax.models.decode import begun_with, likely, penalised
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.t5 import T5
from softprompt_jax.models.t5gemma import T5Gemma

STEPS = 8  # at most, of one call of `advance`
TOP = 20  # most likely tokens of a step that can be told beside the chosen one


class Wanted(NamedTuple):
    """How to choose the tokens of each of N answers."""

    limit: Int[Array, "N"]  # most tokens
    forced: Int[Array, "N R"]  # first tokens; padding: free
    rng: UInt32[Array, "N 2"]
    temperature: Float[Array, "N"]  # 0: greedy
    top_k: Int[Array, "N"]  # 0: all
    top_p: Float[Array, "N"]
    repetition_penalty: Float[Array, "N"]  # 1: none
    top: Bool[Array, "N"]  # whether the most likely tokens are told, too


class Slots(NamedTuple):
    """The state of S answers that are being decoded."""

    caches: tuple[Array, Array]  # keys and values [L, S, H, PR, K], of prefixes and ring
    cross: tuple[Array, Array]  # those of the encodings or contexts, behind their prefixes [L, S, H, PT, K]
    seen: Bool[Array, "S PT"]  # which of these are real
    positions: Int[Array, "S PT"]  # those of a decoder-only model's context; 0 for others
    first: Int[Array, "S"]  # position of the answer's first own key; 0 for T5
    prefix: tuple[Bool[Array, "S P"], ...]  # which keys before the ring are real: without, then with positions
    factors: per_example.BatchState  # of the decoder [S, L, W]
    pointer: Int[Array, ""]  # place of the ring that the next step writes
    age: Int[Array, "S"]  # number of an answer's own keys in the ring
    count: Int[Array, "S"]  # tokens written; an answer ends at `limit`
    last: Int[Array, "S"]  # last token written
    written: Bool[Array, "S V"]  # tokens that a repetition penalty makes less likely
    wanted: Wanted


def nothing_wanted(count: int, ring: int, padding: int) -> Wanted:
    """Return greedy answers of no tokens, in NumPy's arrays that can be filled in."""
    limit, top_k = np.zeros((2, count), np.int32)
    forced, rng = np.full((count, ring), padding, np.int32), np.zeros((count, 2), np.uint32)
    temperature, ones = np.zeros(count, np.float32), np.ones((2, count), np.float32)
    fields: list[Any] = [limit, forced, rng, temperature, top_k, *ones, np.zeros(count, bool)]
    return Wanted(*fields)


def empty(model: LanguageModel, slots: int, ring: int, length: int, rows: per_example.BatchState) -> Slots:
    """Return free slots for at most `length` encoder positions and `ring` decoder positions.

    `rows`: the per-example state of a batch; only its shapes are read.
    """
    settings = model.settings

    def pair(size: int) -> tuple[Array, Array]:
        shape = (model.decoder.depth, slots, settings.num_key_heads, size, settings.d_kv)
        return jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)

    wanted = jax.tree.map(jnp.asarray, nothing_wanted(slots, ring, settings.padding))
    own, length = per_example.prefix_lengths(rows, "decoder"), sum(per_example.prefix_lengths(rows, "cross")) + length
    if model.encoder is None:  # a prefix stands before the context
        own, length = (0, 0), sum(own) + length
    prefix = tuple(jnp.zeros((slots, size), bool) for size in own)
    factors = {name: jnp.ones((slots, *part.shape[1:])) for name, part in per_example.decoder_factors(rows).items()}
    seen, start = jnp.zeros((slots, length), bool), jnp.array(0, jnp.int32)
    positions = jnp.zeros((slots, length), jnp.int32)
    first, age, count, last = (jnp.zeros((slots,), jnp.int32) for _ in range(4))
    caches, written = (pair(sum(own) + ring), pair(length)), jnp.zeros((slots, settings.vocabulary_rows), bool)
    return _sharded(Slots(*caches, seen, positions, first, prefix, factors, start, age, count, last, written, wanted))


def join(
    model: LanguageModel,
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
            new = jnp.pad(new, [(0, 0)] * 3 + [(0, old.shape[3] - start - new.shape[3]), (0, 0)])
            return jax.lax.dynamic_update_slice(old, new, (0, slot, 0, start, 0))

        crosses = tuple(into(old, new) for old, new in zip(crosses, begun.cross, strict=True))
        prefix = begun.caches if begun.prefix is None else (begun.prefix.keys, begun.prefix.values)
        caches = tuple(into(old, new[..., :first, :]) for old, new in zip(caches, prefix, strict=True))
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
    wider = ((0, 0), (0, slots.seen.shape[1] - seen.shape[1]))
    positions = jnp.zeros_like(seen, jnp.int32) if begun.positions is None else begun.positions
    first_of = jnp.zeros((len(tokens),), jnp.int32) if begun.first is None else begun.first + begun.missing.sum(-1)
    prefix = slots.prefix
    if begun.prefix is not None and begun.prefix.real is not None:
        new = jnp.split(begun.prefix.real[0], [prefix[0].shape[1]], axis=1)
        prefix = tuple(given(old, part[source]) for old, part in zip(prefix, new, strict=True))
    joined = Slots(
        caches,
        crosses,
        given(slots.seen, jnp.pad(seen, wider)[source]),
        given(slots.positions, jnp.pad(positions, wider)[source]),
        given(slots.first, first_of[source]),  # pyright: ignore[reportOptionalSubscript]
        prefix,
        {name: given(old, rows[name][source]) for name, old in slots.factors.items()},
        slots.pointer,
        given(slots.age, jnp.sum(before != 0, -1)[source].astype(jnp.int32)),
        given(slots.count, 0),
        given(slots.last, model.first_input(tokens)[source]),
        given(slots.written, begun_with(model, tokens)[source]),
        Wanted(*map(given, slots.wanted, wanted)),
    )
    return _sharded(joined)


def leave(slots: Slots, which: Bool[Array, "S"]) -> Slots:
    """End the answers in these slots."""
    wanted = slots.wanted._replace(limit=jnp.where(which, 0, slots.wanted.limit))
    return _sharded(slots._replace(wanted=wanted))


def advance(
    model: LanguageModel, slots: Slots, steps: Int[Array, ""], rows: int, length: int
) -> tuple[Slots, Int[Array, "N S"], Float[Array, "N S"], Int[Array, "N S K"], Float[Array, "N S K"]]:
    """Take up to `steps` steps, N = `STEPS` at most, of the first `rows` slots.

    `length`: encoder positions in use, prefixes included. Return the tokens that each step wrote (-1: none), their
    log-probabilities, and of answers with `top` the K most likely tokens of the step (`TOP`) and theirs.
    """
    capacity = len(slots.age)
    per_example.install(model, {name: part[:rows] for name, part in slots.factors.items()})

    def step(state: Any) -> Any:
        index, slots, *outputs = state
        slots, *found = _step(model, slots, rows, length)
        return index + 1, slots, *(old.at[index, :rows].set(new) for old, new in zip(outputs, found, strict=True))

    def unfinished(state: Any) -> Any:
        index, slots, *_ = state
        return (index < steps) & jnp.any(slots.count < slots.wanted.limit)

    top = STEPS, capacity, min(TOP, model.settings.vocabulary_rows)
    nothing = [jnp.zeros(shape, dtype) for shape in (top[:2], top) for dtype in (jnp.int32, jnp.float32)]
    nothing[0] = nothing[0] - 1
    _, slots, *found = jax.lax.while_loop(unfinished, step, (jnp.array(0, jnp.int32), slots, *nothing))
    return _sharded(slots), *found


def _sharded(slots: Slots) -> Slots:
    """Keep slots sharded over the mesh, always alike: a program is compiled for how its arguments lie."""
    caches, cross = (tuple(map(constrain_cache, pair)) for pair in (slots.caches, slots.cross))
    return constrain_rows(slots._replace(caches=(), cross=()))._replace(caches=caches, cross=cross)


def _step(
    model: LanguageModel, slots: Slots, rows: int, length: int
) -> tuple[Slots, Int[Array, "S"], Float[Array, "S"], Int[Array, "S K"], Float[Array, "S K"]]:
    unpositioned, positioned = (part.shape[1] for part in slots.prefix)
    ring = slots.caches[0].shape[3] - unpositioned - positioned
    age, count, last = (part[:rows] for part in (slots.age, slots.count, slots.last))
    wanted = Wanted(*(part[:rows] for part in slots.wanted))
    behind = (slots.pointer - jnp.arange(ring)) % ring  # steps since each place of the ring was written
    seen = slots.seen[:rows, None, None, :length]
    past = jnp.concatenate([*(part[:rows] for part in slots.prefix), behind <= age[:, None]], 1)[:, None, None, :]

    def biased(bias: Any) -> Float[Array, "#B H 1 S"]:
        return bias_before(bias, bias(jnp.zeros((1,), jnp.int32), -behind), age[:, None], unpositioned, positioned)

    place = unpositioned + positioned + slots.pointer
    if isinstance(model, CausalLM | T5Gemma):
        queries = slots.first[:rows, None] + age[:, None]
        positions = slots.positions[:rows, :length] if model.encoder is None else None
        begun = Begun(slots.cross, seen, None, seen[:, 0, 0, :0], slots.caches, positions=positions)
        far, near = jnp.full((rows, unpositioned), FAR), slots.first[:rows, None] + jnp.arange(-positioned, 0)
        where = queries, jnp.concatenate([far, near, queries - behind], 1), past
        x, caches = through_causal(model, last[:, None], slots.caches, place, *where, begun)
    else:
        assert isinstance(model, T5)
        x, caches = through_decoder(model, last[:, None], slots.caches, place, biased, past, slots.cross, seen)
    logits = model.project(model.decoder.norm(x))[:, 0]
    log_p, written = jax.nn.log_softmax(logits), slots.written[:rows]
    active = count < wanted.limit
    punished = active & (wanted.repetition_penalty != 1)
    likes = jax.lax.cond(
        punished.any(),
        lambda: jnp.where(punished[:, None], penalised(logits, written, wanted.repetition_penalty), log_p),
        lambda: log_p,
    )
    drawn = active & (wanted.temperature > 0)
    best = jnp.argmax(likes, -1).astype(jnp.int32)
    free = jax.lax.cond(drawn.any(), lambda: jnp.where(drawn, _draw(likes, wanted, count), best), lambda: best)
    forced = jnp.take_along_axis(wanted.forced, jnp.minimum(count, ring - 1)[:, None], -1)[:, 0]
    chosen = jnp.where(forced > model.settings.padding, forced, free)
    score = jnp.where(active, jnp.take_along_axis(log_p, chosen[:, None], -1)[:, 0], 0)
    chosen = jnp.where(active, chosen, 0)
    tops, none = min(TOP, log_p.shape[-1]), jnp.zeros((rows, min(TOP, log_p.shape[-1])), log_p.dtype)
    likeliest, others = jax.lax.cond(
        (active & wanted.top).any(), lambda: tuple(jax.lax.top_k(log_p, tops)), lambda: (none, none.astype(jnp.int32))
    )
    count = count + active
    limit = jnp.where(model.is_end(chosen), count, wanted.limit)
    new = slots._replace(
        caches=caches,
        pointer=(slots.pointer + 1) % ring,
        age=slots.age.at[:rows].set(jnp.minimum(age + active, ring - 1)),
        count=slots.count.at[:rows].set(count),
        last=slots.last.at[:rows].set(chosen),
        written=slots.written.at[jnp.arange(rows), chosen].set(True),
        wanted=slots.wanted._replace(limit=slots.wanted.limit.at[:rows].set(limit)),
    )
    return new, jnp.where(active, chosen, -1), score, others, likeliest


def _draw(log_p: Float[Array, "S V"], wanted: Wanted, count: Int[Array, "S"]) -> Int[Array, "S"]:
    scaled = log_p / jnp.where(wanted.temperature > 0, wanted.temperature, 1)[:, None]
    kept = likely(scaled, wanted.top_k, wanted.top_p)

    def draw(rng: Array, number: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.wrap_key_data(rng), number), row)

    return jax.vmap(draw)(wanted.rng, count, kept).astype(jnp.int32)
