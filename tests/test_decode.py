"""Greedy decoding: other implementations' tokens, and the tokens of whole forward passes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import peft_fixture
import pytest
import t5x_fixture
import tiny
from flax import nnx

from softprompt_jax.data.prompt_layout import EOS
from softprompt_jax.models import decode


def greedy(model, tokens, max_tokens: int, decoder_prompt=None) -> tuple[np.ndarray, np.ndarray]:
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, tokens, *rest: decode.greedy(nnx.merge(graphdef, state), tokens, max_tokens, *rest))
    output, score = run(state, tokens, decoder_prompt)
    return np.asarray(output), np.asarray(score)


def test_tokens_equal_t5x(shared_fixtures):
    golden = t5x_fixture.golden(shared_fixtures)
    model, batch = t5x_fixture.model(shared_fixtures, prompted=True), t5x_fixture.batch(shared_fixtures, prompted=True)
    tokens, _ = greedy(model, batch["encoder_tokens"], 10)  # t5x gives no scores of greedy decoding
    np.testing.assert_array_equal(tokens, golden["short/prompted/greedy_tokens"][:, 0])


@pytest.mark.parametrize(
    "name",
    [
        "T5V10_PLAIN",
        "PROMPT_TUNING_UMT5",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("T5V11_LONG", "UMT5_PLAIN", "PROMPT_TUNING")),
    ],
)
def test_tokens_equal_transformers_and_peft(shared_fixtures, name):
    model, batch = peft_fixture.model(shared_fixtures, name), peft_fixture.batch(shared_fixtures, name)
    expected = peft_fixture.golden(shared_fixtures, name)["greedy/sequences"]
    assert (expected[:, 0] == 0).all()  # the decoder's first input
    tokens, _ = greedy(model, batch["encoder_tokens"], expected.shape[1] - 1)
    np.testing.assert_array_equal(tokens, expected[:, 1:])


def by_whole_passes(model, tokens, max_tokens: int, before=None) -> tuple[np.ndarray, np.ndarray]:
    """Decode greedily without a cache: the whole decoder again for every token; `before` stands in front."""
    rows = len(tokens)
    before = np.zeros((rows, 0), np.int32) if before is None else np.asarray(before)
    inputs, score, ended = np.zeros((rows, max_tokens + 1), np.int32), np.zeros(rows), np.zeros(rows, bool)
    for position in range(max_tokens):
        decoder_inputs = jnp.asarray(np.concatenate([before, inputs[:, :-1]], 1))
        logits = tiny.forward(model, {"encoder_tokens": tokens, "decoder_inputs": decoder_inputs})[
            :, before.shape[1] + position
        ]
        log_p = np.asarray(jax.nn.log_softmax(logits))
        best = log_p.argmax(-1)
        score += np.where(ended, 0, log_p[np.arange(rows), best])
        inputs[:, position + 1] = np.where(ended, 0, best)
        ended |= best == EOS
    return inputs[:, 1:], score


def eager_to_end(model):
    """Raise the EOS's logit, so that rows end at unlike places."""
    model.head.kernel[...] = model.head.kernel[...].at[:, EOS].multiply(1.5)
    return model


@pytest.mark.parametrize(
    "changes",
    [{"num_layers": 1, "num_decoder_layers": 3}, {"bias_in_every_layer": True, "d_kv": 12}],
    ids=["unequal depths", "bias in every layer"],
)
def test_the_cache_gives_the_tokens_of_whole_passes(changes):
    model = eager_to_end(tiny.model(seed=5, prompt=2, **changes))
    tokens = tiny.batch(rows=8, prompt=2)["encoder_tokens"]
    output, score = greedy(model, tokens, 12)
    expected, expected_score = by_whole_passes(model, tokens, 12)
    np.testing.assert_array_equal(output, expected)
    np.testing.assert_allclose(score, expected_score, atol=1e-4)
    ended = (output == EOS).any(1)
    ends = [list(row).index(EOS) for row in output[ended]]
    assert len(set(ends)) > 1 or not ended.all()  # rows end at unlike places or run to the limit,
    for row, end in zip(output[ended], ends, strict=True):
        assert not row[end + 1 :].any()  # and after the end stands nothing


def test_a_row_without_a_token_stays_empty_and_does_not_hold_up_the_others():
    model = tiny.model()
    tokens = tiny.batch()["encoder_tokens"].at[2].set(0)
    output, score = greedy(model, tokens, 6)
    assert not output[2].any()
    assert score[2] == 0
    assert output[0].any()


def test_decoding_stops_when_every_row_has_ended(monkeypatch):
    model = tiny.model()
    # Only the EOS has a logit that is not 0, and the final norm makes it positive.
    model.decoder.norm.scale[...] = jnp.abs(model.decoder.norm.scale[...])
    kernel = jnp.zeros_like(model.head.kernel[...])
    model.head.kernel[...] = kernel.at[:, EOS].set(1.0)
    model.embedding[...] = jnp.abs(model.embedding[...]) * 100  # outweighs every layer
    steps = []
    project = type(model).project

    def spy(self, hidden):
        jax.debug.callback(lambda: steps.append(1))
        return project(self, hidden)

    monkeypatch.setattr(type(model), "project", spy)
    output, _ = greedy(model, tiny.batch()["encoder_tokens"], 50)
    jax.effects_barrier()
    np.testing.assert_array_equal(output[:, 0], EOS)
    assert not output[:, 1:].any()
    assert len(steps) == 1


# ------------------------------------------------------------------------------- beams


def beam(model, tokens, max_tokens: int, how: decode.Beam, *rest) -> tuple[np.ndarray, np.ndarray]:
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, tokens, *rest: decode.beam(nnx.merge(graphdef, state), tokens, max_tokens, how, *rest))
    return tuple(map(np.asarray, run(state, tokens, *rest)))


SEARCHES = {
    "beam4": decode.Beam(),
    "beam4_lp06_es": decode.Beam(length_penalty=decode.LengthPenalty(alpha=0.6), early_stopping=True),
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    "name", ["PROMPT_TUNING", *(pytest.param(name, marks=pytest.mark.slow) for name in ("T5V10_PLAIN", "UMT5_PLAIN"))]
)
def test_hypotheses_and_scores_equal_transformers(shared_fixtures, name, search):
    model, batch = peft_fixture.model(shared_fixtures, name), peft_fixture.batch(shared_fixtures, name)
    golden = peft_fixture.golden(shared_fixtures, name)
    expected, scores = golden[f"{search}/sequences"], golden[f"{search}/sequences_scores"]
    tokens, found = beam(model, batch["encoder_tokens"], expected.shape[-1] - 1, SEARCHES[search])
    expected = expected[..., 1:]
    ended = np.cumsum(expected == EOS, -1) - (expected == EOS) > 0  # transformers fills up with EOS
    np.testing.assert_array_equal(tokens.reshape(expected.shape), np.where(ended, 0, expected))
    np.testing.assert_allclose(found.reshape(scores.shape), scores, atol=1e-4)


def test_scores_are_penalised_log_probabilities_of_the_tokens():
    model, tokens = eager_to_end(tiny.model(prompt=2)), tiny.batch(prompt=2)["encoder_tokens"]
    how = decode.Beam(beams=3, length_penalty=decode.LengthPenalty(kind="t5x", alpha=0.6))
    found, scores = beam(model, tokens, 6, how)
    for rank in range(3):
        inputs = np.pad(found[:, rank, :-1], ((0, 0), (1, 0)))
        logits = tiny.forward(model, {"encoder_tokens": tokens, "decoder_inputs": jnp.asarray(inputs)})
        log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), found[:, rank, :, None], -1)[..., 0]
        lengths = (found[:, rank] != 0).sum(-1)
        total = (log_p * (found[:, rank] != 0)).sum(-1)
        np.testing.assert_allclose(scores[:, rank], total / ((5 + lengths) / 6) ** 0.6, atol=1e-4)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_a_wide_search_finds_the_best_of_all_answers():
    """Two tokens of a vocabulary of 50: with 50 beams nothing can be missed."""
    model, tokens = tiny.model(), tiny.batch(rows=2)["encoder_tokens"]
    _, scores = beam(model, tokens, 2, decode.Beam(beams=50, length_penalty=decode.LengthPenalty(alpha=0.0)))
    firsts = np.arange(tiny.ROWS)
    inputs = np.stack([np.zeros_like(firsts), firsts], 1)
    for row in range(2):
        batch = {"encoder_tokens": jnp.tile(tokens[row], (tiny.ROWS, 1)), "decoder_inputs": jnp.asarray(inputs)}
        log_p = np.asarray(jax.nn.log_softmax(tiny.forward(model, batch)))
        both = log_p[:, 0].diagonal()[:, None] + log_p[:, 1]
        both[EOS] = -np.inf
        best = max(both.max(), log_p[0, 0, EOS])
        assert scores[row, 0] == pytest.approx(best, abs=1e-4)


@pytest.mark.slow
def test_a_forced_search_finds_the_best_of_all_answers_that_begin_so():
    """A forced token, or two, or none, and the rest free: with 50 beams nothing can be missed."""
    model, tokens = eager_to_end(tiny.model()), tiny.batch(rows=3)["encoder_tokens"]
    forced = np.asarray([[7, 0], [8, 9], [0, 0]], np.int32)
    how = decode.Beam(beams=50, length_penalty=decode.LengthPenalty(alpha=1.0))
    found, scores = beam(model, tokens, 3, how, None, forced)
    assert found[:, :, 0][:2].tolist() == [[7] * 50, [8] * 50]
    assert set(found[1, :, 1]) == {9}
    rest = np.arange(tiny.ROWS)
    for row, first in ((0, [7]), (1, [8, 9])):
        begun = np.tile(np.asarray([0, *first], np.int32), (tiny.ROWS, 1))
        inputs = np.concatenate([begun, rest[:, None]], 1)[:, :3]
        batch = {"encoder_tokens": jnp.tile(tokens[row], (tiny.ROWS, 1)), "decoder_inputs": jnp.asarray(inputs)}
        log_p = np.asarray(jax.nn.log_softmax(tiny.forward(model, batch)))
        if row == 1:
            total = (log_p[0, 0, 8] + log_p[0, 1, 9] + log_p[0, 2]) / 3
        else:
            total = (log_p[0, 0, 7] + log_p[0, 1][:, None] + log_p[:, 2]) / 3
            total[EOS] = -np.inf  # an answer that has ended goes on no more
            total = np.append(total, (log_p[0, 0, 7] + log_p[0, 1, EOS]) / 2)
        best = np.sort(total.ravel())[::-1][:50]
        np.testing.assert_allclose(scores[row], best, atol=1e-4)
    free, free_scores = beam(model, tokens[2:], 3, how)
    np.testing.assert_array_equal(found[2:], free)
    np.testing.assert_allclose(scores[2:], free_scores, atol=1e-5)


def test_a_beginning_without_a_free_place_leaves_one_hypothesis():
    model, tokens = tiny.model(), tiny.batch(rows=1)["encoder_tokens"]
    found, scores = beam(model, tokens, 2, decode.Beam(beams=3), None, np.asarray([[7, 9]], np.int32))
    assert found[0].tolist() == [[7, 9], [0, 0], [0, 0]]
    assert scores[0, 0] > -100
    assert (scores[0, 1:] == decode.NEVER).all()


# ------------------------------------------------------------------------------- sampling


def sample(model, tokens, max_tokens: int, how: decode.Sampling, numbers=None):
    graphdef, state = nnx.split(model)
    numbers = jnp.arange(len(tokens)) if numbers is None else jnp.asarray(numbers)

    @jax.jit
    def run(state, tokens, numbers):
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(how.seed), number))(numbers)
        return decode.sample(nnx.merge(graphdef, state), tokens, max_tokens, keys, how)

    return tuple(map(np.asarray, run(state, tokens, numbers)))


@pytest.mark.slow
def test_samples_follow_the_models_probabilities():
    model, tokens = tiny.model(), tiny.batch(rows=1)["encoder_tokens"]
    how = decode.Sampling(samples=4000, temperature=1.5, top_k=6)
    found, _ = sample(model, tokens, 1, how)
    logits = tiny.forward(model, {"encoder_tokens": tokens, "decoder_inputs": jnp.zeros((1, 1), jnp.int32)})[0, 0]
    expected = np.asarray(jax.nn.softmax(decode.likely(jnp.asarray(logits)[None] / 1.5, 6, None)))[0]
    assert (expected > 0).sum() == 6
    counts = np.bincount(found[0, :, 0], minlength=tiny.ROWS) / 4000
    np.testing.assert_allclose(counts, expected, atol=5 * np.sqrt(0.25 / 4000))


def test_a_rows_samples_do_not_depend_on_its_company():
    model, tokens = eager_to_end(tiny.model()), tiny.batch(rows=4)["encoder_tokens"]
    how = decode.Sampling(samples=3, seed=5)
    found, scores = sample(model, tokens, 5, how)
    again, again_scores = sample(model, tokens[::-1], 5, how, [3, 2, 1, 0])
    np.testing.assert_array_equal(found, again[::-1])
    np.testing.assert_allclose(scores, again_scores[::-1], atol=1e-5)
    assert len({tuple(row) for row in found.reshape(-1, 5)}) > 4


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(None, None, 4), (2, None, 2), (None, 0.69, 2), (None, 0.71, 3), (3, 0.5, 2), (1, 1.0, 1)],
)
def test_cuts_leave_the_most_likely(top_k, top_p, kept):
    log_p = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3]]))
    left = np.asarray(decode.likely(log_p, top_k, top_p))[0] > -1e8
    assert left.tolist() == [i in [1, 3, 2, 0][:kept] for i in range(4)]


def test_the_last_token_that_is_kept_is_not_lost_to_rounding():
    """Of many random rows, each keeps exactly the fewest that have the probability together."""
    log_p = jnp.asarray(np.random.default_rng(0).normal(size=(2000, 40)), jnp.float32)
    ordered = np.sort(np.asarray(log_p, np.float64))[:, ::-1]
    shares = np.exp(ordered) / np.exp(ordered).sum(-1, keepdims=True)
    before = shares.cumsum(-1) - shares
    clear = (np.abs(before - 0.7) > 1e-5).all(-1)
    kept = np.asarray(decode.likely(log_p, None, 0.7) > -1e8).sum(-1)
    np.testing.assert_array_equal(kept[clear], (before < 0.7).sum(-1)[clear])
    assert clear.sum() > 1900


def test_answers_begin_with_what_is_forced():
    model, tokens = eager_to_end(tiny.model()), tiny.batch(rows=3)["encoder_tokens"]
    forced = np.asarray([[7, 9], [8, 0], [0, 0]], np.int32)
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, *rest: decode.greedy(nnx.merge(graphdef, state), rest[0], 5, None, rest[1]))
    found, scores = map(np.asarray, run(state, tokens, forced))
    assert found[0, :2].tolist() == [7, 9]
    assert found[1, 0] == 8
    free, _ = greedy(model, tokens, 5)
    np.testing.assert_array_equal(found[2], free[2])
    inputs = np.pad(found[:, :-1], ((0, 0), (1, 0)))
    logits = tiny.forward(model, {"encoder_tokens": tokens, "decoder_inputs": jnp.asarray(inputs)})
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), found[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores, (log_p * (found != 0)).sum(-1), atol=1e-4)


@pytest.mark.slow
def test_a_shorter_decoder_prompt_shares_a_batch():
    """0 on the left: such a row decodes as it does by itself, also behind a prefix with positions."""
    from softprompt_jax.methods import Context, Prefix

    model = eager_to_end(tiny.model(prompt=3))
    Prefix(length=2, network=None, positions="before", init="vocabulary").attach(model, tiny.key(3), Context(list))
    tokens = tiny.batch(rows=3)["encoder_tokens"]
    first = tiny.ROWS
    prompts = np.asarray([[0, 0, first], [first, first + 1, first + 2], [0, first + 2, first]], np.int32)
    found, scores = greedy(model, tokens, 6, prompts)
    for row, length in enumerate((1, 3, 2)):
        alone, score = greedy(model, tokens[row : row + 1], 6, prompts[row : row + 1, 3 - length :])
        np.testing.assert_array_equal(found[row : row + 1], alone)
        np.testing.assert_allclose(scores[row : row + 1], score, atol=1e-5)
