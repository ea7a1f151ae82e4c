"""Decoding with KV caches: greedy, sampling and beam search, and the likelihood of given words."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
from pydantic import Field

from softprompt_jax.config import Settings
from softprompt_jax.models.attention import PrefixKeyValues, sees_prefix, with_prefix
from softprompt_jax.models.t5 import T5

EOS = 1
MAX_TOKENS = 64  # of an answer, where no other limit is given
NEVER = -1e9  # score of what is impossible

Caches = tuple[Array, ...]  # keys and values [L, B, H, S, K]
Read = Callable[[Int[Array, "B U"], Any, Caches], tuple[Float[Array, "B U V"], Caches]]


class LengthPenalty(Settings):
    """Divisor of the log-probability of a hypothesis of n tokens: n^alpha (hf), or ((5 + n) / 6)^alpha (t5x)."""

    kind: Literal["hf", "t5x"] = "hf"
    alpha: float = 1.0

    def __call__(self, length: Any) -> Any:
        """Return the divisor for so many tokens, EOS included."""
        return (length if self.kind == "hf" else (5.0 + length) / 6.0) ** self.alpha


class Greedy(Settings):
    """The most likely token at each step."""

    kind: Literal["greedy"] = "greedy"


class Sampling(Settings):
    """Tokens drawn at random. A text's answers depend on the seed and the text's number, not on the batch."""

    kind: Literal["sampling"] = "sampling"
    temperature: float = Field(default=1.0, gt=0)
    top_k: int | None = Field(default=None, ge=1, lt=2**31)  # number of most likely tokens to draw from
    top_p: float | None = Field(
        default=None, gt=0, le=1
    )  # share of probability to draw from: the fewest tokens that have it together
    samples: int = Field(default=1, ge=1)  # number of answers to each text
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)


class Beam(Settings):
    """The best hypotheses of a search that keeps `beams` of them at each step."""

    kind: Literal["beam"] = "beam"
    beams: int = Field(default=4, ge=2)
    length_penalty: LengthPenalty = LengthPenalty()
    early_stopping: bool = False  # search ends as soon as `beams` hypotheses have ended


Decoding = Annotated[Greedy | Sampling | Beam, Field(discriminator="kind")]


def answers(
    model: T5,
    encoder_tokens: Int[Array, "B T"],
    max_tokens: int,
    how: Decoding,
    numbers: Int[Array, "B"],
    decoder_prompt: Int[Array, "B P"] | None = None,
    forced: Int[Array, "B F"] | None = None,
) -> tuple[Int[Array, "B N U"], Float[Array, "B N"]]:
    """Return N answers to each row and their scores, the best first: one, the samples, or the beams.

    `numbers` are those of the texts; a sample depends on the seed and its text's number. Answers begin with `forced`
    (0: free), which counts in their scores and lengths.
    """
    if isinstance(how, Beam):
        return beam(model, encoder_tokens, max_tokens, how, decoder_prompt, forced)
    if isinstance(how, Sampling):
        rngs = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(how.seed)))(numbers)
        return sample(model, encoder_tokens, max_tokens, rngs, how, decoder_prompt, forced)
    output, score = greedy(model, encoder_tokens, max_tokens, decoder_prompt, forced)
    return output[:, None], score[:, None]


class Begun(NamedTuple):
    """Texts that the encoder has read, and decoder prompts [B, P] that the decoder has read."""

    cross: Caches  # keys and values of the encodings, behind a prefix [L, B, H, XT, K]
    seen: Bool[Array, "B 1 1 XT"]  # which of these are real
    prefix: PrefixKeyValues | None  # before the decoder's own keys
    missing: Bool[Array, "B P"]  # where a prompt is shorter
    caches: Caches  # of the decoder: prefix, prompt, then empty places [L, B, H, S, K]


def begin(
    model: T5, tokens: Int[Array, "B T"], prompt: Int[Array, "B P"] | None, places: int, copies: int = 1
) -> Begun:
    """Encode texts and read their decoder prompts (0 on the left: shorter), with so many empty places behind these.

    With `copies` each row is there so many times, one after the other.
    """
    encoded = model.encode(tokens)
    decoder, (prefix, cross_prefix) = model.decoder, model.decoder.prefixes()
    cross = jax.lax.map(
        lambda layer_prefix: with_prefix(layer_prefix[1], *layer_prefix[0].cross.keys_values(encoded)),
        (decoder.layers, cross_prefix),
    )
    seen = sees_prefix((tokens != 0)[:, None, None, :], cross_prefix)
    prompt = jnp.zeros((tokens.shape[0], 0), jnp.int32) if prompt is None else prompt
    if copies > 1:
        cross = jax.tree.map(lambda part: jnp.repeat(part, copies, axis=1), cross)
        seen, prompt = jnp.repeat(seen, copies, axis=0), jnp.repeat(prompt, copies, axis=0)
        if prefix is not None and prefix.real is not None:
            prefix = jax.tree.map(lambda part: jnp.repeat(part, copies, axis=1), prefix)
    rows, length = prompt.shape
    shape = (decoder.depth, rows, model.settings.num_heads, length + places, model.settings.d_kv)
    empty = jnp.zeros(shape, encoded.dtype)
    caches = (empty, empty) if prefix is None else jax.vmap(with_prefix)(prefix, empty, empty)
    begun = Begun(cross, seen, prefix, prompt == 0, caches)
    return begun._replace(caches=decode_at(model, begun, prompt, 0, caches)[1]) if length else begun


def decode_at(
    model: T5, begun: Begun, tokens: Int[Array, "B U"], position: Any, caches: Caches
) -> tuple[Float[Array, "B U D"], Caches]:
    """Run the decoder on tokens at a position, which counts from the first place of the decoder prompts.

    What a shorter prompt lacks is not seen, and the positions of its row count from its first id.
    """
    first = 0 if begun.prefix is None else begun.prefix.keys.shape[-2]
    positions, length = jnp.arange(caches[0].shape[3] - first), begun.missing.shape[1]
    here = position + jnp.arange(tokens.shape[1])
    past, own = (positions <= here[:, None])[None, None], None
    if length:
        past = past & ~jnp.pad(begun.missing, ((0, 0), (0, len(positions) - length)))[:, None, None]
        own = here - begun.missing.sum(-1, keepdims=True)
    biased = functools.partial(model.decoder.biased, queries=here, keys=positions, own=own)
    past = sees_prefix(past, begun.prefix)
    return through_decoder(model, tokens, caches, first + position, biased, past, begun.cross, begun.seen)


def start(
    model: T5,
    encoder_tokens: Int[Array, "B T"],
    max_tokens: int,
    decoder_prompt: Int[Array, "B P"] | None = None,
    copies: int = 1,
) -> tuple[Read, Caches]:
    """Begin, and return the function that reads decoder tokens at a position after the prompt, and the caches."""
    begun = begin(model, encoder_tokens, decoder_prompt, max_tokens, copies)

    def read(tokens, position, caches):
        x, caches = decode_at(model, begun, tokens, begun.missing.shape[1] + position, caches)
        return jax.nn.log_softmax(model.project(model.decoder.norm(x))), caches

    return read, begun.caches


def through_decoder(
    model: T5,
    tokens: Int[Array, "B U"],
    caches: Caches,
    place: Any,
    biased: Callable[[Any], Float[Array, "#B H U S"]],
    past: Bool[Array, "#B 1 #U S"],
    cross: Caches,
    seen: Bool[Array, "B 1 1 T"],
) -> tuple[Float[Array, "B U D"], Caches]:
    """Run the decoder's layers on tokens, whose keys and values go to `place` of the caches [L, B, H, S, K].

    Caches and `cross` [L, B, H, T, K] may have more rows than there are tokens, and `cross` more positions than `seen`;
    these are left as they are.
    """
    decoder, rows = model.decoder, tokens.shape[0]
    shared_bias = None if decoder.bias is None else biased(decoder.bias)

    def of_layer(cache: Array, index: Any, length: Any) -> Array:  # a symbol while exporting
        size = (1, rows, cache.shape[2], length, cache.shape[4])
        return jax.lax.dynamic_slice(cache, (index, 0, 0, 0, 0), size)[0]

    def run(carry, layer_index_deep):
        x, keys, values = carry
        layer, index, deep = layer_index_deep
        x = put(x, deep)
        written: list[Array] = []

        def remember(new_keys, new_values):
            for cache, new in ((keys, new_keys), (values, new_values)):
                written.append(jax.lax.dynamic_update_slice(cache, new[None], (index, 0, 0, place, 0)))
            return of_layer(written[0], index, keys.shape[3]), of_layer(written[1], index, keys.shape[3])

        bias = shared_bias if layer.bias is None else biased(layer.bias)
        x = layer.attend_self(x, bias, past, cache=remember)
        cross_keys_values = of_layer(cross[0], index, seen.shape[-1]), of_layer(cross[1], index, seen.shape[-1])
        x = layer.feed(layer.attend_cross(x, cross_keys_values, seen))
        return (x, *written), None

    deep, put = decoder.layer_prompt_rows(tokens - model.settings.vocabulary_rows)
    xs = (decoder.layers, jnp.arange(decoder.depth), deep)
    (x, *written), _ = jax.lax.scan(run, (model.embed(tokens), *caches), xs)
    return x, tuple(written)


def greedy(
    model: T5,
    encoder_tokens: Int[Array, "B T"],
    max_tokens: int,
    decoder_prompt: Int[Array, "B P"] | None = None,
    forced: Int[Array, "B F"] | None = None,
) -> tuple[Int[Array, "B U"], Float[Array, "B"]]:
    """Return the most likely next tokens up to EOS (then 0), and the sum of their log-probabilities.

    Shapes: B rows, U = `max_tokens`; prompt ids already stand in `encoder_tokens`; those of `decoder_prompt`
    are read before the decoder's first input. Outputs begin with `forced` (0: free). Stops when every row has ended.
    Compiles once per shape.
    """
    read, caches = start(model, encoder_tokens, max_tokens, decoder_prompt)
    return _one_by_one(read, caches, encoder_tokens, max_tokens, lambda log_p, _: jnp.argmax(log_p, -1), forced)


def sample(
    model: T5,
    encoder_tokens: Int[Array, "B T"],
    max_tokens: int,
    rngs: Key[Array, "B"],
    how: Sampling,
    decoder_prompt: Int[Array, "B P"] | None = None,
    forced: Int[Array, "B F"] | None = None,
) -> tuple[Int[Array, "B N U"], Float[Array, "B N"]]:
    """Draw N = `how.samples` answers to each row; return their tokens up to EOS (then 0) and log-probabilities.

    The log-probabilities are the model's, before temperature and cuts. A row's answers follow from its rng alone.
    """
    read, caches = start(model, encoder_tokens, max_tokens, decoder_prompt, how.samples)
    own = jax.vmap(lambda rng: jax.random.split(rng, how.samples))(rngs).reshape(-1)
    tokens = jnp.repeat(encoder_tokens, how.samples, axis=0)
    forced = None if forced is None else jnp.repeat(forced, how.samples, axis=0)

    def draw(log_p, position):
        kept = likely(log_p / how.temperature, how.top_k, how.top_p)
        return jax.vmap(lambda rng, row: jax.random.categorical(jax.random.fold_in(rng, position), row))(own, kept)

    output, score = _one_by_one(read, caches, tokens, max_tokens, draw, forced)
    return output.reshape(-1, how.samples, max_tokens), score.reshape(-1, how.samples)


def likely(
    log_p: Float[Array, "B V"], top_k: int | Int[Array, "B"] | None, top_p: float | Float[Array, "B"] | None
) -> Float[Array, "B V"]:
    """Keep the `top_k` most likely tokens, then the fewest of these that have probability `top_p` together.

    No cut: None, or 0 (`top_k`) and 1 (`top_p`) where rows differ.
    """
    if top_k is None and top_p is None:
        return log_p
    rows, vocabulary = log_p.shape
    most = jnp.broadcast_to(jnp.asarray(0 if top_k is None else top_k), (rows,))[:, None]
    share = jnp.broadcast_to(jnp.asarray(1.0 if top_p is None else top_p), (rows,))[:, None]
    order = jnp.argsort(log_p, descending=True)
    numbers = jnp.arange(vocabulary)
    kept = (most == 0) | (numbers < most)
    shares = jax.nn.softmax(jnp.where(kept, jnp.take_along_axis(log_p, order, -1), NEVER))
    kept = kept & ((jnp.cumsum(shares, -1) - shares < share) | (share >= 1))  # the share of all that are more likely
    # By rank, not by comparing numbers: XLA may compute a number twice and round it differently.
    return jnp.where(jnp.zeros_like(kept).at[jnp.arange(rows)[:, None], order].set(kept), log_p, NEVER)


def beam(
    model: T5,
    encoder_tokens: Int[Array, "B T"],
    max_tokens: int,
    how: Beam,
    decoder_prompt: Int[Array, "B P"] | None = None,
    forced: Int[Array, "B F"] | None = None,
) -> tuple[Int[Array, "B K U"], Float[Array, "B K"]]:
    """Return the K = `how.beams` best hypotheses, the best first, and their penalised log-probabilities.

    All begin with `forced` (0: free). Where there are fewer than K, the others are empty and score `NEVER`. The search
    ends as that of transformers: when no running hypothesis, if it ended now, would beat the worst ended one; with
    `early_stopping` when K have ended.
    """
    K, batch = how.beams, len(encoder_tokens)
    read, caches = start(model, encoder_tokens, max_tokens, decoder_prompt, K)
    penalty, given = how.length_penalty, _given(forced, batch, max_tokens)

    def pick(values, index):
        return jnp.take_along_axis(values, index.reshape(*index.shape, *[1] * (values.ndim - 2)), axis=1)

    def step(state):
        position, running, scores, ended, ended_scores, has_ended, hopeful, _, caches = state
        last = jnp.where(position == 0, 0, running[:, :, position - 1])
        log_p, caches = read(last.reshape(-1, 1), position, caches)
        total = scores[:, :, None] + log_p[:, 0].reshape(batch, K, -1)
        vocabulary = total.shape[-1]
        wanted = given[:, position, None, None]
        total = jnp.where((wanted > 0) & (wanted != jnp.arange(vocabulary)), NEVER, total)
        # Twice as many candidates as beams, since K of them may end here.
        best, index = jax.lax.top_k(total.reshape(batch, -1), 2 * K)
        parent, token = index // vocabulary, index % vocabulary
        longer = pick(running, parent).at[:, :, position].set(token)
        ends = (token == EOS) | (position == max_tokens - 1)

        possible = best > NEVER / 2
        done = jnp.where(ends & possible & (jnp.arange(2 * K) < K), best / penalty(position + 1.0), NEVER)
        closed = (has_ended.all(-1, keepdims=True) & how.early_stopping) | ~hopeful
        done = jnp.where(closed, NEVER, done)
        all_scores = jnp.concatenate([ended_scores, done], 1)
        ended_scores, kept = jax.lax.top_k(all_scores, K)
        ended = pick(jnp.concatenate([ended, longer], 1), kept)
        has_ended = ended_scores > NEVER / 2

        scores, kept = jax.lax.top_k(jnp.where(ends, NEVER, best), K)
        running = pick(longer, kept)
        rows = (jnp.arange(batch)[:, None] * K + pick(parent, kept)).reshape(-1)
        caches = jax.tree.map(lambda cache: cache[:, rows], caches)
        worst = jnp.where(has_ended, ended_scores.min(-1, keepdims=True), NEVER)
        hopeful = hopeful & (scores[:, :1] / penalty(position + 1.0) > worst).any(-1, keepdims=True)
        return position + 1, running, scores, ended, ended_scores, has_ended, hopeful, ends.all(), caches

    def unfinished(state):
        _, _, _, _, _, has_ended, hopeful, all_end, _ = state
        return hopeful.any() & ~all_end & ~(has_ended.all() & how.early_stopping)

    empty = jnp.zeros((batch, K, max_tokens), jnp.int32)
    never = jnp.full((batch, K), NEVER, jnp.float32)
    state = (
        jnp.zeros((), jnp.int32),
        empty,
        never.at[:, 0].set(0.0),  # the K copies of a row are one hypothesis at first
        empty,
        never,
        jnp.zeros((batch, K), bool),
        jnp.ones((batch, 1), bool),
        jnp.zeros((), bool),
        caches,
    )
    _, _, _, ended, ended_scores, *_ = jax.lax.while_loop(unfinished, step, state)
    return ended, ended_scores


def _one_by_one(
    read: Read,
    caches: Caches,
    encoder_tokens: Int[Array, "B T"],
    max_tokens: int,
    choose: Callable[[Float[Array, "B V"], Any], Int[Array, "B"]],
    forced: Int[Array, "B F"] | None,
) -> tuple[Int[Array, "B U"], Float[Array, "B"]]:
    """Append `choose(log_p, position)` to every row until all have ended."""
    batch = encoder_tokens.shape[0]
    given = _given(forced, batch, max_tokens)

    def step(state):
        position, last, ended, caches, output, score = state
        log_p, caches = read(last[:, None], position, caches)
        log_p = log_p[:, 0]
        wanted = given[:, position]
        chosen = jnp.where(wanted > 0, wanted, choose(log_p, position)).astype(jnp.int32)
        score = score + jnp.where(ended, 0, jnp.take_along_axis(log_p, chosen[:, None], -1)[:, 0])
        chosen = jnp.where(ended, 0, chosen)
        output = output.at[:, position].set(chosen)
        return position + 1, chosen, ended | (chosen == EOS), caches, output, score

    def unfinished(state):
        position, _, ended, *_ = state
        return (position < max_tokens) & ~jnp.all(ended)

    state = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
        jnp.all(encoder_tokens == 0, -1),  # rows that only fill the batch
        caches,
        jnp.zeros((batch, max_tokens), jnp.int32),
        jnp.zeros((batch,), jnp.float32),
    )
    *_, output, score = jax.lax.while_loop(unfinished, step, state)
    return output, score


def _given(forced: Int[Array, "B F"] | None, batch: Any, max_tokens: int) -> Int[Array, "B U"]:
    """Return the forced token of each row and position; 0: free."""
    given = jnp.zeros((batch, max_tokens), jnp.int32)
    return given if forced is None else given.at[:, : forced.shape[1]].set(forced[:, :max_tokens])


def score_words(
    model: T5,
    encoder_tokens: Int[Array, "B T"],
    words: Int[Array, "W U"],
    decoder_prompt: Int[Array, "B P"] | None = None,
) -> Float[Array, "B W"]:
    """Return the log-probability of each of W targets (0 is padding) after each input; the encoder runs once."""
    segments = (encoder_tokens != 0).astype(jnp.int32)
    encoded = model.encode(encoder_tokens)
    batch = encoder_tokens.shape[0]
    before = jnp.zeros((batch, 0), jnp.int32) if decoder_prompt is None else decoder_prompt

    def score(word: Int[Array, "U"]) -> Float[Array, "B"]:
        shifted = jnp.broadcast_to(jnp.pad(word[:-1], (1, 0)), (batch, word.shape[0]))
        hidden = model.decode(jnp.concatenate([before, shifted], 1), encoded, segments)[:, before.shape[1] :]
        log_p = jax.nn.log_softmax(model.project(hidden))
        return jnp.sum(jnp.where(word != 0, log_p[:, jnp.arange(word.shape[0]), word], 0), -1)

    return jax.vmap(score, out_axes=1)(words)
