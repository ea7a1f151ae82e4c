"""Decoding with KV caches: greedy, sampling and beam search, and the likelihood of given words."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
from pydantic import Field

from softprompt_jax.config import Settings
from softprompt_jax.distributed.mesh import constrain_cache
from softprompt_jax.models.cache import Caches, begin, decode_at
from softprompt_jax.models.causal import CausalLM
from softprompt_jax.models.language_model import LanguageModel

MAX_TOKENS = 64  # of an answer, where no other limit is given
NEVER = -1e9  # score of what is impossible
_PLACES = 32  # places of a text whose logits are there at once

Read = Callable[[Int[Array, "B U"], Any, Caches], tuple[Float[Array, "B U V"], Caches]]


class LengthPenalty(Settings):
    """Divisor of the log-probability of a hypothesis of n tokens: n^alpha (hf), or ((5 + n) / 6)^alpha (t5x)."""

    kind: Literal["hf", "t5x"] = "hf"
    alpha: float = 1.0

    def __call__(self, length: Any) -> Any:
        """Return the divisor for so many tokens, EOS included."""
        return (length if self.kind == "hf" else (5.0 + length) / 6.0) ** self.alpha


class OneByOne(Settings):
    """What greedy decoding and sampling have in common."""

    repetition_penalty: float = Field(
        default=1.0, ge=0.01, le=100
    )  # divisor of the logits (factor of negative ones) of
    # tokens that the decoder has read or written: an answer's, and the context's in a decoder-only model; 1: none


class Greedy(OneByOne):
    """The most likely token at each step."""

    kind: Literal["greedy"] = "greedy"


class Sampling(OneByOne):
    """Tokens drawn at random. A text's answers depend on the seed and the text's number, not on the batch."""

    kind: Literal["sampling"] = "sampling"
    temperature: float = Field(default=1.0, ge=1e-4, le=1e4)  # divisor of log-probabilities before a token is drawn
    top_k: int | None = Field(default=None, ge=1, lt=2**31)  # number of most likely tokens to draw from
    top_p: float | None = Field(
        default=None, gt=0, le=1
    )  # share of probability to draw from: the fewest tokens that have it together
    samples: int = Field(default=1, ge=1, le=10_000)  # number of answers to each text
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)


class Beam(Settings):
    """The best hypotheses of a search that keeps `beams` of them at each step."""

    kind: Literal["beam"] = "beam"
    beams: int = Field(default=4, ge=2, le=10_000)
    length_penalty: LengthPenalty = LengthPenalty()
    early_stopping: bool = False  # search ends as soon as `beams` hypotheses have ended


Decoding = Annotated[Greedy | Sampling | Beam, Field(discriminator="kind")]


def answers(
    model: LanguageModel,
    encoder_tokens: Int[Array, "B T"],
    max_tokens: int,
    how: Decoding,
    numbers: Int[Array, "B"],
    decoder_prompt: Int[Array, "B P"] | None = None,
    forced: Int[Array, "B F"] | None = None,
) -> tuple[Int[Array, "B N U"], Float[Array, "B N"]]:
    """Return N answers to each row and their scores, the best first: one, the samples, or the beams.

    `numbers` are those of the texts; a sample depends on the seed and its text's number. Answers begin with `forced`
    (padding: free), which counts in their scores and lengths.
    """
    if isinstance(how, Beam):
        return beam(model, encoder_tokens, max_tokens, how, decoder_prompt, forced)
    if isinstance(how, Sampling):
        rngs = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(how.seed)))(numbers)
        return sample(model, encoder_tokens, max_tokens, rngs, how, decoder_prompt, forced)
    output, score = greedy(model, encoder_tokens, max_tokens, decoder_prompt, forced, how.repetition_penalty)
    return output[:, None], score[:, None]


def start(
    model: LanguageModel,
    encoder_tokens: Int[Array, "B T"],
    max_tokens: int,
    decoder_prompt: Int[Array, "B P"] | None = None,
    copies: int = 1,
) -> tuple[Read, Caches]:
    """Begin; return the function that reads decoder tokens at a position after the prompt to logits, and the caches."""
    begun = begin(model, encoder_tokens, decoder_prompt, max_tokens, copies)

    def read(tokens, position, caches):
        x, caches = decode_at(model, begun, tokens, begun.missing.shape[1] + position, caches)
        return model.project(model.decoder.norm(x)), caches

    return read, begun.caches


def greedy(
    model: LanguageModel,
    encoder_tokens: Int[Array, "B T"],
    max_tokens: int,
    decoder_prompt: Int[Array, "B P"] | None = None,
    forced: Int[Array, "B F"] | None = None,
    repetition_penalty: float = 1.0,
) -> tuple[Int[Array, "B U"], Float[Array, "B"]]:
    """Return the most likely next tokens up to EOS (then padding), and the sum of their log-probabilities.

    Shapes: B rows, U = `max_tokens`; prompt ids already stand in `encoder_tokens`; those of `decoder_prompt`
    are read before the decoder's first input. Outputs begin with `forced` (padding: free). Stops when every row has
    ended. Compiles once per shape.
    """
    read, caches = start(model, encoder_tokens, max_tokens, decoder_prompt)

    def choose(log_p, position):
        return jnp.argmax(log_p, -1)

    return _one_by_one(model, read, caches, encoder_tokens, max_tokens, choose, forced, repetition_penalty)


def sample(
    model: LanguageModel,
    encoder_tokens: Int[Array, "B T"],
    max_tokens: int,
    rngs: Key[Array, "B"],
    how: Sampling,
    decoder_prompt: Int[Array, "B P"] | None = None,
    forced: Int[Array, "B F"] | None = None,
) -> tuple[Int[Array, "B N U"], Float[Array, "B N"]]:
    """Draw N = `how.samples` answers to each row; return their tokens up to EOS (then padding) and log-probabilities.

    The log-probabilities are the model's, before temperature and cuts. A row's answers follow from its rng alone.
    """
    read, caches = start(model, encoder_tokens, max_tokens, decoder_prompt, how.samples)
    own = jax.vmap(lambda rng: jax.random.split(rng, how.samples))(rngs).reshape(-1)
    tokens = jnp.repeat(encoder_tokens, how.samples, axis=0)
    forced = None if forced is None else jnp.repeat(forced, how.samples, axis=0)

    def draw(log_p, position):
        kept = likely(log_p / how.temperature, how.top_k, how.top_p)
        return jax.vmap(lambda rng, row: jax.random.categorical(jax.random.fold_in(rng, position), row))(own, kept)

    output, score = _one_by_one(model, read, caches, tokens, max_tokens, draw, forced, how.repetition_penalty)
    return output.reshape(-1, how.samples, max_tokens), score.reshape(-1, how.samples)


def penalised(
    logits: Float[Array, "B V"], written: Bool[Array, "B V"], penalty: float | Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Make what is written already less likely (penalty over 1). Source: Keskar et al., 2019, as in transformers."""
    factor = jnp.broadcast_to(jnp.asarray(penalty, jnp.float32), logits.shape[:1])[:, None]
    return jnp.where(written, jnp.where(logits < 0, logits * factor, logits / factor), logits)


def begun_with(model: LanguageModel, tokens: Int[Array, "B T"]) -> Bool[Array, "B V"]:
    """Return what counts as written before an answer begins: the context without an encoder, else its first input."""
    read = tokens if model.encoder is None else model.first_input(tokens)[:, None]
    rows = model.settings.vocabulary_rows
    ids = jnp.where(model.is_real(read) | (model.encoder is not None), read, rows)  # no id: dropped, as prompt rows are
    return jnp.zeros((len(tokens), rows), bool).at[jnp.arange(len(tokens))[:, None], ids].set(True, mode="drop")


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
    # Those whose more likely tokens have less than the share; always the first, since 1e-300 is 0 in float32.
    kept = kept & ((jnp.cumsum(shares, -1) - shares < share) | (share >= 1) | (numbers == 0))
    # By rank, not by comparing numbers: XLA may compute a number twice and round it differently.
    return jnp.where(jnp.zeros_like(kept).at[jnp.arange(rows)[:, None], order].set(kept), log_p, NEVER)


def beam(
    model: LanguageModel,
    encoder_tokens: Int[Array, "B T"],
    max_tokens: int,
    how: Beam,
    decoder_prompt: Int[Array, "B P"] | None = None,
    forced: Int[Array, "B F"] | None = None,
) -> tuple[Int[Array, "B K U"], Float[Array, "B K"]]:
    """Return the K = `how.beams` best hypotheses, the best first, and their penalised log-probabilities.

    All begin with `forced` (padding: free). Where there are fewer than K, the others are empty and score `NEVER`. The
    search ends as that of transformers: when no running hypothesis, if it ended now, would beat the worst ended one;
    with `early_stopping` when K have ended.
    """
    K, batch = how.beams, len(encoder_tokens)
    read, caches = start(model, encoder_tokens, max_tokens, decoder_prompt, K)
    penalty, given, padding = how.length_penalty, _given(model, forced, batch, max_tokens), model.settings.padding
    first = model.first_input(encoder_tokens)[:, None]

    def pick(values, index):
        return jnp.take_along_axis(values, index.reshape(*index.shape, *[1] * (values.ndim - 2)), axis=1)

    def step(state):
        position, running, scores, ended, ended_scores, has_ended, hopeful, _, caches = state
        last = jnp.where(position == 0, first, running[:, :, position - 1])
        logits, caches = read(last.reshape(-1, 1), position, caches)
        total = scores[:, :, None] + jax.nn.log_softmax(logits)[:, 0].reshape(batch, K, -1)
        vocabulary = total.shape[-1]
        wanted = given[:, position, None, None]
        total = jnp.where((wanted > padding) & (wanted != jnp.arange(vocabulary)), NEVER, total)
        # Twice as many candidates as beams, since K of them may end here.
        best, index = jax.lax.top_k(total.reshape(batch, -1), 2 * K)
        parent, token = index // vocabulary, index % vocabulary
        longer = pick(running, parent).at[:, :, position].set(token)
        ends = model.is_end(token) | (position == max_tokens - 1)

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
        parents = pick(parent, kept)
        caches = jax.tree.map(lambda cache: constrain_cache(_of_parents(cache, parents)), caches)
        worst = jnp.where(has_ended, ended_scores.min(-1, keepdims=True), NEVER)
        hopeful = hopeful & (scores[:, :1] / penalty(position + 1.0) > worst).any(-1, keepdims=True)
        return position + 1, running, scores, ended, ended_scores, has_ended, hopeful, ends.all(), caches

    def unfinished(state):
        _, _, _, _, _, has_ended, hopeful, all_end, _ = state
        return hopeful.any() & ~all_end & ~(has_ended.all() & how.early_stopping)

    empty = jnp.full((batch, K, max_tokens), padding, jnp.int32)
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


def _of_parents(cache: Float[Array, "L BN *rest"], parents: Int[Array, "B N"]) -> Float[Array, "L BN *rest"]:
    """Return for each of a text's hypotheses what its parent among them has; no text looks at another's."""
    by_text = cache.reshape(cache.shape[0], *parents.shape, *cache.shape[2:])
    return jax.vmap(lambda own, chosen: own[:, chosen], (1, 0), 1)(by_text, parents).reshape(cache.shape)


def _one_by_one(
    model: LanguageModel,
    read: Read,
    caches: Caches,
    encoder_tokens: Int[Array, "B T"],
    max_tokens: int,
    choose: Callable[[Float[Array, "B V"], Any], Int[Array, "B"]],
    forced: Int[Array, "B F"] | None,
    repetition_penalty: float,
) -> tuple[Int[Array, "B U"], Float[Array, "B"]]:
    """Append `choose(log_p, position)` to every row until all have ended; a penalty changes what it is given."""
    batch = encoder_tokens.shape[0]
    given, padding = _given(model, forced, batch, max_tokens), model.settings.padding

    def step(state):
        position, last, ended, caches, output, score, written = state
        logits, caches = read(last[:, None], position, caches)
        logits = logits[:, 0]
        log_p = jax.nn.log_softmax(logits)
        free = choose(log_p if written is None else penalised(logits, written, repetition_penalty), position)
        wanted = given[:, position]
        chosen = jnp.where(wanted > padding, wanted, free).astype(jnp.int32)
        score = score + jnp.where(ended, 0, jnp.take_along_axis(log_p, chosen[:, None], -1)[:, 0])
        if written is not None:
            written = written.at[jnp.arange(batch), chosen].set(True)
        chosen = jnp.where(ended, padding, chosen)
        output = output.at[:, position].set(chosen)
        return position + 1, chosen, ended | model.is_end(chosen), caches, output, score, written

    def unfinished(state):
        position, _, ended, *_ = state
        return (position < max_tokens) & ~jnp.all(ended)

    state = (
        jnp.zeros((), jnp.int32),
        model.first_input(encoder_tokens),
        ~jnp.any(model.is_real(encoder_tokens), -1),  # rows that only fill the batch
        caches,
        jnp.full((batch, max_tokens), padding, jnp.int32),
        jnp.zeros((batch,), jnp.float32),
        None if repetition_penalty == 1 else begun_with(model, encoder_tokens),
    )
    *_, output, score, _ = jax.lax.while_loop(unfinished, step, state)
    return output, score


def _given(model: LanguageModel, forced: Int[Array, "B F"] | None, batch: Any, max_tokens: int) -> Int[Array, "B U"]:
    """Return the forced token of each row and position; padding: free."""
    given = jnp.full((batch, max_tokens), model.settings.padding, jnp.int32)
    return given if forced is None else given.at[:, : forced.shape[1]].set(forced[:, :max_tokens])


def score_context(
    model: CausalLM, tokens: Int[Array, "B T"], top: int
) -> tuple[Float[Array, "B T"], Int[Array, "B T K"], Float[Array, "B T K"]]:
    """Return the log-probability of each token of contexts behind those before it, and the K = `top` most likely tokens
    in its place with theirs. What stands first has 0, since nothing foretells it.
    """
    hidden, _ = model.run(tokens)
    following = jnp.minimum(tokens[:, 1:], model.settings.vocabulary_rows - 1)  # a prompt row is never foretold
    parts = _score_places(model, model.decoder.norm(hidden)[:, :-1], following, top)
    padded = (jnp.pad(part, ((0, 0), (1, 0), *((0, 0),) * (part.ndim - 2))) for part in parts)
    return tuple(padded)  # pyright: ignore[reportReturnType]


def score_targets(model: LanguageModel, batch: dict[str, Array]) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """Return the log-probability of each target of a batch, and whether each of its tokens is the most likely one."""
    targets = batch["decoder_targets"]
    real = model.is_real(targets)
    log_p, best, _ = _score_places(model, model.hidden(batch), jnp.maximum(targets, 0), 1)
    return jnp.sum(jnp.where(real, log_p, 0), -1), jnp.all((best[..., 0] == targets) | ~real, -1)


def _score_places(
    model: LanguageModel, hidden: Float[Array, "B U D"], tokens: Int[Array, "B U"], top: int
) -> tuple[Float[Array, "B U"], Int[Array, "B U K"], Float[Array, "B U K"]]:
    """Return the log-probability of a token at each place, and the K = `top` most likely ones with theirs."""

    def score(here: tuple[Float[Array, "B D"], Int[Array, "B"]]) -> Any:
        log_p = jax.nn.log_softmax(model.project(here[0]))
        return jnp.take_along_axis(log_p, here[1][:, None], -1)[:, 0], *jax.lax.top_k(log_p, top)

    by_place = hidden.swapaxes(0, 1), tokens.T
    own, values, ids = jax.lax.map(score, by_place, batch_size=_PLACES)  # all logits at once would be U x V
    return own.T, ids.swapaxes(0, 1), values.swapaxes(0, 1)


def score_words(
    model: LanguageModel,
    encoder_tokens: Int[Array, "B T"],
    words: Int[Array, "W U"],
    decoder_prompt: Int[Array, "B P"] | None = None,
) -> Float[Array, "B W"]:
    """Return the log-probability of each of W targets (with padding) after each input, which is read once."""
    read, caches = start(model, encoder_tokens, words.shape[1], decoder_prompt)
    first = model.first_input(encoder_tokens)

    def score(word: Int[Array, "U"]) -> Float[Array, "B"]:
        rest = jnp.broadcast_to(word[:-1], (len(first), len(word) - 1))
        logits, _ = read(jnp.concatenate([first[:, None], rest], 1), 0, caches)
        picked = jax.nn.log_softmax(logits)[:, jnp.arange(len(word)), jnp.maximum(word, 0)]
        return jnp.sum(jnp.where(model.is_real(word), picked, 0), -1)

    return jax.vmap(score, out_axes=1)(words)
