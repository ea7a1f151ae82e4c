"""The training step: what it computes, what it never computes, and what it leaves alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from operations import flops

from softprompt_jax.methods import Context, Full, leaves, split
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.models.t5 import T5
from softprompt_jax.optim.losses import cross_entropy
from softprompt_jax.optim.optimizers import Adafactor, build
from softprompt_jax.run import Run
from softprompt_jax.training.step import make_step

TASK = {"name": "none", "source": {"kind": "files", "train": "none.jsonl"}}
P = 3


def run(**changes) -> Run:
    return Run(**{"task": TASK, "dropout": 0.0, "z_loss": 0.0, **changes})


def prompted(**changes):
    return split(tiny.model(prompt=P, **changes))


def fully(**changes):
    model = tiny.model(**changes)
    Full().attach(model, jax.random.key(0), Context(list))
    return split(model)


def start(parts, optimizer, step: int = 0):
    trainable = jax.tree.map(jnp.copy, parts.trainable)
    return {"trainable": trainable, "optimizer": optimizer.init(trainable), "step": jnp.asarray(step, jnp.int32)}


def one_step(parts, settings: Run, batch, optimizer=None, key=None, step: int = 0):
    """Return what trains and the loss after a step; plain descent shows the gradient itself."""
    optimizer = optimizer or optax.sgd(1.0)
    function = make_step(settings, parts, optimizer)
    state, measured = function(start(parts, optimizer, step), parts.frozen, batch, tiny.key(0) if key is None else key)
    assert int(state["step"]) == step + 1
    return state["trainable"], float(measured["loss"])


# ---------------------------------------------------------------- no weight gradient is ever computed


def step_flops(parts, settings: Run, batch) -> float:
    optimizer = optax.sgd(1.0)
    function = make_step(settings, parts, optimizer)
    return flops(function, start(parts, optimizer), parts.frozen, batch, jax.random.key(0))


def forward_flops(settings, batch) -> tuple[float, float]:
    """Return the operations of products with weights, and of those between activations, on paper."""
    B, T = batch["encoder_tokens"].shape
    U = batch["decoder_inputs"].shape[1]
    D, F, inner = settings.d_model, settings.d_ff, settings.num_heads * settings.d_kv
    feed = (3 if settings.gated else 2) * D * F
    encoder = settings.num_layers * T * (4 * D * inner + feed)
    decoder = settings.num_decoder_layers * (U * (4 * D * inner + 2 * D * inner + feed) + T * 2 * D * inner)
    between = 2 * inner * (settings.num_layers * T * T + settings.num_decoder_layers * (U * U + U * T))
    return 2 * B * (encoder + decoder + U * D * settings.vocabulary_rows), 2 * B * between


def weight_free(found: float, parts, batch, settings) -> None:
    """Assert that a step has the operations of a prompt's: forward, and backward through the activations only."""
    weights, between = forward_flops(settings, batch)
    B, T = batch["encoder_tokens"].shape
    U = batch["decoder_inputs"].shape[1]
    lookups = 2 * 2 * B * (T + U) * P * settings.d_model  # one-hot products with the rows, and their gradient
    # A product of activations has two gradients, one with a frozen weight only one.
    assert found == (1 + 1) * weights + (1 + 2) * between + lookups


@pytest.mark.parametrize("changes", [{}, {"tied": True, "num_decoder_layers": 3}], ids=["untied", "tied"])
def test_a_prompt_step_has_no_weight_gradient(changes):
    parts, batch = prompted(**changes), tiny.batch(prompt=P)
    model = parts.merge(parts.trainable, parts.frozen)
    weights, between = forward_flops(model.settings, batch)
    found = step_flops(parts, run(), batch)
    weight_free(found, parts, batch, model.settings)
    # Full tuning computes every weight gradient: a whole forward's worth more.
    full = fully(**changes)
    text = tiny.batch(length=9 + P)
    assert text["encoder_tokens"].shape == batch["encoder_tokens"].shape
    assert flops(full.merge(full.trainable, full.frozen), text) == weights + between
    assert step_flops(full, run(), text) == 3 * weights + 3 * between
    assert found < 0.75 * step_flops(full, run(), text)


@pytest.mark.parametrize(
    "changes", [{"accumulate": 2}, {"clip_norm": 1.0}, {"dropout": 0.1}], ids=lambda c: next(iter(c))
)
def test_no_setting_of_a_run_brings_weight_gradients_back(changes):
    parts, batch, settings = prompted(dropout=0.1), tiny.batch(prompt=P), run(**changes)
    about = leaves(parts.merge(parts.trainable, parts.frozen))
    optimizer = build(Adafactor(), optax.constant_schedule(0.3), about, settings.clip_norm)
    function = make_step(settings, parts, optimizer)
    found = flops(function, start(parts, optimizer), parts.frozen, batch, jax.random.key(0))
    weight_free(found, parts, batch, tiny.settings())


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_computes_the_forward_again_and_no_weight_gradient(remat):
    plain, batch = prompted(), tiny.batch(prompt=P)
    again = step_flops(prompted(remat=remat), run(), batch) - step_flops(plain, run(), batch)
    weights, between = forward_flops(tiny.settings(), batch)
    assert 0 < again <= weights + between
    assert (again < weights / 2) == (remat == "dots")  # which keeps the products with weights


def test_the_count_sees_a_step_that_differentiates_everything():
    parts, batch = prompted(), tiny.batch(prompt=P)

    def wrong(trainable, frozen):
        def loss(trainable, frozen):
            return cross_entropy(parts.merge(trainable, frozen)(batch), batch["decoder_targets"])[0]

        gradients = jax.grad(loss, argnums=(0, 1))(trainable, frozen)
        return jax.tree.map(lambda row, slope: row - slope, trainable, gradients[0]), optax.tree.norm(gradients)

    found = flops(wrong, parts.trainable, parts.frozen)
    with pytest.raises(AssertionError):
        weight_free(found, parts, batch, tiny.settings())
    assert found > step_flops(parts, run(), batch) + 0.9 * forward_flops(tiny.settings(), batch)[0]


# --------------------------------------------------------------------------- what a step leaves alone


def test_frozen_weights_are_the_same_bits_after_training_and_only_the_state_is_given_away():
    parts, batch = prompted(), tiny.batch(prompt=P)
    before = jax.tree.map(np.array, parts.frozen)
    optimizer = build(Adafactor(), optax.constant_schedule(0.3), leaves(tiny.model(prompt=P)))
    function = make_step(run(), parts, optimizer)
    state = first = start(parts, optimizer)
    losses = []
    for _ in range(20):
        state, measured = function(state, parts.frozen, batch, jax.random.key(0))
        losses.append(float(measured["loss"]))
    assert losses[-1] < losses[0]
    assert np.abs(state["trainable"]["prompt"]["rows"] - parts.trainable["prompt"]["rows"]).max() > 0.3
    jax.tree.map(np.testing.assert_array_equal, parts.frozen, before)
    assert first["trainable"]["prompt"]["rows"].is_deleted()
    assert function._cache_size() == 1  # one program for all steps


# ------------------------------------------------------------------------------------ what it computes


@pytest.fixture(scope="module")
def plain():
    """Return a prompted model taken apart, a batch with targets of unlike lengths, and its gradient."""
    parts, batch = prompted(), tiny.batch(prompt=P)
    loss, _, gradient = tiny.loss_logits_gradient(parts, batch)
    return parts, batch, float(loss), gradient["prompt"]["rows"]


def slope(parts, trainable) -> np.ndarray:
    return np.asarray(parts.trainable["prompt"]["rows"] - trainable["prompt"]["rows"])


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_sum_and_mean_and_accumulation_give_the_gradient_of_the_whole_batch(plain, kind, accumulate):
    parts, batch, loss, gradient = plain
    real = int((batch["decoder_targets"] != 0).sum())
    assert len({int((row != 0).sum()) for row in batch["decoder_targets"]}) > 1  # a mean of means would differ
    trained, measured = one_step(parts, run(loss=kind, accumulate=accumulate, batch_size=4), batch)
    expected = gradient / real if kind == "mean" else gradient
    np.testing.assert_allclose(slope(parts, trained), expected, rtol=1e-5, atol=1e-5)
    assert measured == pytest.approx(loss / real, rel=1e-5)  # reported per token in either case


def test_a_batch_of_padding_changes_nothing(plain):
    parts, batch, *_ = plain
    trained, loss = one_step(parts, run(loss="mean"), jax.tree.map(jnp.zeros_like, batch))
    assert loss == 0
    assert not slope(parts, trained).any()


@pytest.mark.slow
def test_dropout_differs_from_step_to_step_and_is_a_function_of_key_and_step():
    parts, batch = split(tiny.model(prompt=P, dropout=0.2)), tiny.batch(prompt=P)
    optimizer = optax.sgd(0.0)
    function = make_step(run(dropout=0.2), parts, optimizer)

    def loss(seed: int, step: int) -> float:
        return float(function(start(parts, optimizer, step), parts.frozen, batch, tiny.key(seed))[1]["loss"])

    assert loss(0, 5) == loss(0, 5)
    assert len({loss(0, 5), loss(0, 6), loss(1, 5)}) == 3


@pytest.mark.slow
def test_parts_of_an_accumulated_batch_have_dropout_of_their_own(monkeypatch):
    parts = split(tiny.model(prompt=P, dropout=0.2))
    twice = jax.tree.map(lambda x: jnp.concatenate([x[:2], x[:2]]), tiny.batch(prompt=P))
    seen, hidden = [], T5.hidden

    def spy(self, batch, rng=None, remat=None):
        jax.debug.callback(lambda data: seen.append(np.asarray(data).tobytes()), jax.random.key_data(rng))
        return hidden(self, batch, rng, remat)

    monkeypatch.setattr(T5, "hidden", spy)
    one_step(parts, run(dropout=0.2, accumulate=2, batch_size=4), twice)
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 2


@pytest.mark.slow
def test_settings_of_the_loss_reach_it(plain):
    parts, batch, _, _ = plain
    settings = run(z_loss=0.1, label_smoothing=0.2)
    loss, _, gradient = tiny.loss_logits_gradient(parts, batch, 0.1, 0.2)
    trained, measured = one_step(parts, settings, batch)
    assert measured == pytest.approx(float(loss) / int((batch["decoder_targets"] != 0).sum()), rel=1e-5)
    np.testing.assert_allclose(slope(parts, trained), gradient["prompt"]["rows"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_full_tuning_learns_the_batch():
    parts, batch = fully(), tiny.batch()
    optimizer = optax.adam(3e-3)
    function = make_step(run(loss="mean"), parts, optimizer)
    state, losses = start(parts, optimizer), []
    for _ in range(60):
        state, measured = function(state, parts.frozen, batch, tiny.key(0))
        losses.append(float(measured["loss"]))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.slow
def test_bfloat16_trains_a_float32_prompt_near_the_float32_one(plain):
    _, batch, loss, gradient = plain
    model = tiny.model(dtype="bfloat16", remat="full")
    assert model.dtype == "bfloat16"
    attach_rows(model, tiny.model(prompt=P).prompt.rows[...])
    parts = split(model)
    optimizer = build(Adafactor(), optax.constant_schedule(0.3), leaves(model))
    state = start(parts, optimizer)
    assert {leaf.dtype for leaf in jax.tree.leaves(state["optimizer"]) if leaf.ndim} == {jnp.dtype("float32")}
    trained, measured = one_step(parts, run(), batch)
    assert trained["prompt"]["rows"].dtype == jnp.float32
    assert measured == pytest.approx(loss / int((batch["decoder_targets"] != 0).sum()), rel=0.05)
    cosine = np.sum(slope(parts, trained) * gradient) / np.linalg.norm(slope(parts, trained)) / np.linalg.norm(gradient)
    assert cosine > 0.95
