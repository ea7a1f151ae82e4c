"""Bias tuning: what it adds to a T5, which has none, and what is still a plain T5 afterwards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from softprompt_jax.config import UserError, parse
from softprompt_jax.methods import Bias, Context, leaves
from softprompt_jax.methods.wrap import merged

CONTEXT = Context(list)


def test_a_vector_is_added_to_every_product_but_keys_and_the_position_biases_train():
    model = tiny.model()
    Bias().attach(model, tiny.key(0), CONTEXT)
    about = set(leaves(model))
    assert {path for path in about if not path.endswith(".shift")} == {"encoder.bias.table", "decoder.bias.table"}
    assert len(about) == 2 + 6 + 9  # products of an encoder layer, of a decoder layer
    module = model.decoder.layers.cross.value
    module.shift[...] = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16)), jnp.float32)
    x = jnp.ones((3, 4, 16))
    layer = jax.tree.map(lambda leaf: leaf[1], module)
    np.testing.assert_allclose(layer(x), x @ module.inner.kernel[...][1] + module.shift[...][1], atol=1e-5)
    with pytest.raises(UserError, match="what shifted adds cannot be merged into a weight"):
        merged(model)


def test_a_vector_added_to_all_keys_changes_nothing():
    model, draw = tiny.model(), np.random.default_rng(0)
    Bias(targets=["key"], positions=False).attach(model, tiny.key(0), CONTEXT)
    attention = jax.tree.map(lambda leaf: leaf[0], model.encoder.layers.attention)
    x, visible = jnp.asarray(draw.normal(size=(3, 4, 16)), jnp.float32), jnp.ones((3, 1, 1, 4), bool)
    plain = attention(x, attention.keys_values(x), None, visible)
    attention.key.shift[...] = jnp.asarray(draw.normal(size=(16,)), jnp.float32)
    np.testing.assert_allclose(attention(x, attention.keys_values(x), None, visible), plain, atol=1e-5)


def test_position_biases_alone_leave_a_plain_t5():
    model = tiny.model(bias_in_every_layer=True)
    Bias(targets=[]).attach(model, tiny.key(0), CONTEXT)
    assert set(leaves(model)) == {"encoder.layers.bias.table", "decoder.layers.bias.table"}
    merged(model)
    with pytest.raises(UserError, match="two methods train the position biases"):
        Bias().attach(model, tiny.key(0), CONTEXT)


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="expected targets, positions, or both"):
        parse(Bias, {"targets": [], "positions": False}, "methods")
