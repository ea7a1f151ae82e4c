"""Cross entropy: t5x's numbers, and what it must be where the answer is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5x_fixture

from softprompt_jax.optim.losses import cross_entropy, finite_mean


@pytest.mark.parametrize("kind", ["plain", "prompted"])
@pytest.mark.parametrize(
    ("name", "z_loss", "label_smoothing"),
    [("loss_sum_z0", 0.0, 0.0), ("loss_sum_z1e-4", 1e-4, 0.0), ("loss_sum_ls0.1_z0", 0.0, 0.1)],
)
def test_sums_equal_t5x(shared_fixtures, kind, name, z_loss, label_smoothing):
    golden = t5x_fixture.golden(shared_fixtures)
    logits, targets = golden[f"short/{kind}/logits"], golden["short/decoder_target_tokens"]
    loss, weight = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), z_loss, label_smoothing)
    np.testing.assert_allclose(loss, golden[f"short/{kind}/{name}"], rtol=1e-5)
    assert weight == golden["short/decoder_loss_weights"].sum()
    if name == "loss_sum_z0":
        np.testing.assert_allclose(loss / weight, golden[f"short/{kind}/loss_mean_z0"], rtol=1e-5)
        np.testing.assert_allclose(loss, -golden[f"short/{kind}/score_batch"].sum(), rtol=1e-5)


@pytest.fixture
def case() -> tuple[jax.Array, jax.Array]:
    draw = np.random.default_rng(0)
    targets = np.array([[3, 1, 0, 0], [2, 4, 5, 1]], np.int32)
    return jnp.asarray(draw.normal(size=(2, 4, 6)), jnp.float32), jnp.asarray(targets)


def test_it_is_the_negative_log_probability_of_the_real_targets(case):
    logits, targets = case
    log_p = np.asarray(jax.nn.log_softmax(logits))
    expected = -sum(log_p[b, u, t] for (b, u), t in np.ndenumerate(targets) if t)
    loss, weight = cross_entropy(logits, targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert weight == 6


def test_label_smoothing_is_the_divergence_from_the_smoothed_target(case):
    logits, targets = case
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    smoothed = np.full((2, 4, 6), 0.1 / 5)
    np.put_along_axis(smoothed, np.asarray(targets)[..., None], 0.9, -1)
    divergence = (smoothed * (np.log(smoothed) - log_p)).sum(-1)
    expected = divergence[np.asarray(targets) != 0].sum()
    np.testing.assert_allclose(cross_entropy(logits, targets, label_smoothing=0.1)[0], expected, rtol=1e-5)
    perfect = jnp.asarray(np.log(smoothed), jnp.float32)
    np.testing.assert_allclose(cross_entropy(perfect, targets, label_smoothing=0.1)[0], 0, atol=1e-5)


def test_z_loss_pulls_the_normaliser_to_one(case):
    logits, targets = case
    shifted = logits + 3.0  # no probability changes
    np.testing.assert_allclose(cross_entropy(shifted, targets)[0], cross_entropy(logits, targets)[0], rtol=1e-5)
    log_z = np.asarray(jax.nn.logsumexp(shifted, -1))[np.asarray(targets) != 0]
    difference = cross_entropy(shifted, targets, z_loss=0.1)[0] - cross_entropy(shifted, targets)[0]
    np.testing.assert_allclose(difference, 0.1 * (log_z**2).sum(), rtol=1e-5)


def test_padding_has_no_loss_and_no_gradient(case):
    logits, targets = case
    gradient = jax.grad(lambda logits: cross_entropy(logits, targets, 1e-4, 0.1)[0])(logits)
    assert not gradient[0, 2:].any()
    assert gradient[0, :2].any()
    loss, weight = cross_entropy(logits, jnp.zeros_like(targets), 1e-4)
    assert (loss, weight) == (0, 0)


def test_huge_logits_give_a_finite_loss(case):
    logits, targets = case
    assert np.isfinite(cross_entropy(1e6 * logits, targets)[0])


def test_a_candidate_beyond_numbers_does_not_end_a_search():
    losses = jnp.asarray([1.0, jnp.nan, jnp.inf, 3.0])
    assert float(finite_mean(losses)) == 2.0
    assert not np.isfinite(float(finite_mean(jnp.asarray([jnp.nan, jnp.inf]))))
