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

from softprompt_jax.backbone import decode


def greedy(model, tokens, max_tokens: int, segments=None, decoder_prompt=None) -> tuple[np.ndarray, np.ndarray]:
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, tokens, *rest: decode.greedy(nnx.merge(graphdef, state), tokens, max_tokens, *rest))
    output, score = run(state, tokens, segments, decoder_prompt)
    return np.asarray(output), np.asarray(score)


def test_tokens_equal_t5x(shared_fixtures):
    golden = t5x_fixture.golden(shared_fixtures)
    model, batch = t5x_fixture.model(shared_fixtures, prompted=True), t5x_fixture.batch(shared_fixtures, prompted=True)
    tokens, _ = greedy(model, batch["encoder_tokens"], 10)  # t5x gives no scores of greedy decoding
    np.testing.assert_array_equal(tokens, golden["short/prompted/greedy_tokens"][:, 0])


@pytest.mark.parametrize("name", ["T5V10_PLAIN", "T5V11_LONG", "UMT5_PLAIN", "PROMPT_TUNING", "PROMPT_TUNING_UMT5"])
def test_tokens_equal_transformers_and_peft(shared_fixtures, name):
    model, batch = peft_fixture.model(shared_fixtures, name), peft_fixture.batch(shared_fixtures, name)
    expected = peft_fixture.golden(shared_fixtures, name)["greedy/sequences"]
    assert (expected[:, 0] == 0).all()  # the decoder's first input
    tokens, _ = greedy(model, batch["encoder_tokens"], expected.shape[1] - 1)
    np.testing.assert_array_equal(tokens, expected[:, 1:])


def by_whole_passes(model, tokens, max_tokens: int, segments=None, before=None) -> tuple[np.ndarray, np.ndarray]:
    """Decode greedily without a cache: the whole decoder again for every token; `before` stands in front."""
    rows = len(tokens)
    before = np.zeros((rows, 0), np.int32) if before is None else np.asarray(before)
    inputs, score, ended = np.zeros((rows, max_tokens + 1), np.int32), np.zeros(rows), np.zeros(rows, bool)
    batch = {"encoder_tokens": tokens} | ({} if segments is None else {"encoder_segments": segments})
    for position in range(max_tokens):
        decoder_inputs = jnp.asarray(np.concatenate([before, inputs[:, :-1]], 1))
        logits = tiny.forward(model, batch | {"decoder_inputs": decoder_inputs})[:, before.shape[1] + position]
        log_p = np.asarray(jax.nn.log_softmax(logits))
        best = log_p.argmax(-1)
        score += np.where(ended, 0, log_p[np.arange(rows), best])
        inputs[:, position + 1] = np.where(ended, 0, best)
        ended |= best == decode.EOS
    return inputs[:, 1:], score


def eager_to_end(model):
    """Raise the EOS's logit, so that rows end at unlike places."""
    model.head.kernel[...] = model.head.kernel[...].at[:, decode.EOS].multiply(1.5)
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
    ended = (output == decode.EOS).any(1)
    ends = [list(row).index(decode.EOS) for row in output[ended]]
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
    model.head.kernel[...] = kernel.at[:, decode.EOS].set(1.0)
    model.embedding[...] = jnp.abs(model.embedding[...]) * 100  # outweighs every layer
    steps = []
    project = type(model).project

    def spy(self, hidden):
        jax.debug.callback(lambda: steps.append(1))
        return project(self, hidden)

    monkeypatch.setattr(type(model), "project", spy)
    output, _ = greedy(model, tiny.batch()["encoder_tokens"], 50)
    jax.effects_barrier()
    np.testing.assert_array_equal(output[:, 0], decode.EOS)
    assert not output[:, 1:].any()
    assert len(steps) == 1
