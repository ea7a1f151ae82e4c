"""Full tuning: the gradient of every weight, the shared embedding table's above all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5x_fixture
import tiny

from softprompt_jax.methods import Context, Full, LoRA, Wayward, split
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.trees import flatten


def test_the_gradient_of_the_embedding_table_equals_t5x(shared_fixtures):
    golden = t5x_fixture.golden(shared_fixtures)
    model = t5x_fixture.model(shared_fixtures)
    attach_rows(model, golden["prompt"])
    Full().attach(model, jax.random.key(0), Context(list))
    batch = t5x_fixture.batch(shared_fixtures, prompted=True)
    loss, _, gradient = tiny.loss_logits_gradient(split(model), batch, z_loss=1e-4)
    np.testing.assert_allclose(loss, golden["short/prompted/loss_sum_z1e-4"], rtol=1e-5)
    theirs = golden["short/prompted/grad_token_embedding_sum_z1e-4"]
    np.testing.assert_allclose(gradient["embedding"], theirs, atol=1e-4)
    np.testing.assert_allclose(gradient["prompt"]["rows"], golden["short/prompted/grad_prompt_sum_z1e-4"], atol=1e-4)


@pytest.mark.slow
def test_the_gradient_of_every_weight_equals_finite_differences():
    model = tiny.model(tied=True, scale_output=True, num_layers=1, num_decoder_layers=1)
    Full().attach(model, jax.random.key(0), Context(list))
    parts, batch = split(model), tiny.batch()
    _, _, gradient = tiny.loss_logits_gradient(parts, batch)
    flat, structure = jax.tree.flatten(parts.trainable)
    draw = np.random.default_rng(0)
    for index, slope in enumerate(jax.tree.leaves(gradient)):
        direction = draw.normal(size=slope.shape)
        direction /= np.linalg.norm(direction)
        step = 3e-3

        def loss(factor, index=index, direction=direction) -> float:
            moved = [leaf + factor * direction if i == index else leaf for i, leaf in enumerate(flat)]
            parts.trainable.update(structure.unflatten([jnp.asarray(leaf, jnp.float32) for leaf in moved]))
            return float(tiny.loss_logits_gradient(parts, batch)[0])

        measured = (loss(step) - loss(-step)) / (2 * step)
        assert measured == pytest.approx(float((slope * direction).sum()), rel=2e-2, abs=1e-2), index


def test_what_another_method_has_frozen_stays_frozen():
    model = tiny.model()
    context = Context(lambda text: [5, 6], frozenset({0, 1, 2}))
    for method in (Wayward(length=2), LoRA(), Full()):
        method.attach(model, jax.random.key(0), context)
    parts = split(model)
    frozen = {path for path, _ in flatten(parts.frozen).items()}
    assert frozen == {"prompt.words"}
    assert any(path.endswith("inner.kernel") for path, _ in flatten(parts.trainable).items())
