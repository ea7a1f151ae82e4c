"""Adapters: the network that is added, and where each style puts it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from softprompt_jax.config import UserError
from softprompt_jax.methods import Adapter, Context, leaves
from softprompt_jax.methods.wrap import merged

CONTEXT = Context(list)


@pytest.mark.parametrize(
    ("style", "places"),
    [
        ("houlsby", {"attention.output", "cross.output", "feed_forward.down"}),
        ("pfeiffer", {"feed_forward.down"}),
    ],
)
def test_each_style_has_its_places(style, places):
    model = tiny.model()
    Adapter(style=style, width=3).attach(model, tiny.key(0), CONTEXT)
    about = leaves(model)
    assert {path.rpartition(".")[0].split(".", 2)[2] for path in about} == places
    assert all(leaf.stacked for leaf in about.values())
    with pytest.raises(UserError, match="what bottleneck adds cannot be merged into a weight"):
        merged(model)


def test_a_network_is_added_to_the_output():
    model, draw = tiny.model(), np.random.default_rng(0)
    Adapter(width=3, activation="silu").attach(model, tiny.key(0), CONTEXT)
    module = model.encoder.layers.attention.output
    for weight in (module.down, module.down_bias, module.up, module.up_bias):
        weight[...] = jnp.asarray(draw.normal(size=weight.shape), jnp.float32)
    x = jnp.asarray(draw.normal(size=(3, 4, 16)), jnp.float32)
    y = x @ module.inner.kernel[...][1]
    hidden = jax.nn.silu(y @ module.down[...][1] + module.down_bias[...][1])
    layer = jax.tree.map(lambda leaf: leaf[1], module)
    np.testing.assert_allclose(layer(x), y + hidden @ module.up[...][1] + module.up_bias[...][1], atol=1e-4)
