"""IA3: factors behind or before a product, and the weight that they become."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from softprompt_jax.config import UserError, parse
from softprompt_jax.methods import IA3, Context, attach, leaves
from softprompt_jax.methods.wrap import merged, plain_kernel

DRAW = np.random.default_rng(0)


def layer(module, index: int = 1):
    """Return one layer of a stack, as the scan takes it."""
    return jax.tree.map(lambda leaf: leaf[index], module)


def test_factors_stand_behind_and_before_a_product_and_merge_into_it():
    model = tiny.model()
    IA3(outputs=["encoder.*.down"], inputs=["encoder.*.down"]).attach(model, tiny.key(0), Context(list))
    before = model.encoder.layers.feed_forward.down
    behind = before.inner
    assert (before.side, behind.side) == ("inputs", "outputs")
    before.factors[...] = jnp.asarray(DRAW.normal(size=(2, 24)), jnp.float32)
    behind.factors[...] = jnp.asarray(DRAW.normal(size=(2, 16)), jnp.float32)
    x = jnp.asarray(DRAW.normal(size=(3, 5, 24)), jnp.float32)
    kernel = np.asarray(behind.inner.kernel[...])[1]
    expected = (x * before.factors[...][1]) @ kernel * behind.factors[...][1]
    np.testing.assert_allclose(layer(before)(x), expected, atol=1e-5)
    np.testing.assert_allclose(x @ plain_kernel(before)[1], expected, atol=1e-5)
    np.testing.assert_allclose(merged(model).encoder.layers.feed_forward.down.kernel[...], plain_kernel(before))
    with pytest.raises(
        UserError, match=r"ia3 scales both sides of encoder.layers.feed_forward.down, which PEFT cannot"
    ):
        IA3().to_peft(model)


def test_the_default_scales_keys_values_and_the_inner_feed_forward():
    model = tiny.model()
    attach([IA3(learning_rate_scale=0.1)], model, tiny.key(0), Context(list))
    about = leaves(model)
    ends = {path.removesuffix(".factors").split(".", 2)[2] for path in about}
    assert ends == {"attention.key", "attention.value", "cross.key", "cross.value", "feed_forward.down"}
    assert {leaf.learning_rate_scale for leaf in about.values()} == {0.1}
    assert all(leaf.stacked for leaf in about.values())


def test_nothing_to_scale_is_refused():
    with pytest.raises(UserError, match="expected outputs or inputs to scale"):
        parse(IA3, {"outputs": [], "inputs": []}, "methods")
