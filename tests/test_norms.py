"""Norm tuning: which scales train, and that a tuned model is a plain T5."""

from __future__ import annotations

import pytest
import tiny
from flax import nnx

from softprompt_jax.config import UserError
from softprompt_jax.methods import Context, Norms, attach, leaves, split
from softprompt_jax.methods.wrap import merged

CONTEXT = Context(list)


def test_every_norm_trains_or_those_that_a_pattern_matches():
    model = tiny.model()
    Norms().attach(model, tiny.key(0), CONTEXT)
    assert set(leaves(model)) == {
        *(f"{stack}.{name}.scale" for stack in ("encoder", "decoder") for name in ("norm", "layers.attention_norm")),
        *(f"{stack}.layers.feed_forward_norm.scale" for stack in ("encoder", "decoder")),
        "decoder.layers.cross_norm.scale",
    }
    assert nnx.to_pure_dict(nnx.state(merged(model))).keys() == nnx.to_pure_dict(nnx.state(tiny.model())).keys()
    few = tiny.model()
    attach([Norms(targets=["norm", "cross_norm"], learning_rate_scale=0.5)], few, tiny.key(0), CONTEXT)
    about = leaves(few)
    assert set(about) == {"encoder.norm.scale", "decoder.norm.scale", "decoder.layers.cross_norm.scale"}
    assert {leaf.learning_rate_scale for leaf in about.values()} == {0.5}


def test_what_cannot_be_attached_is_refused_in_a_line():
    model = tiny.model()
    with pytest.raises(UserError, match=r"norms targets: 'crossnorm' matches no weight .*; did you mean cross_norm"):
        Norms(targets=["crossnorm"]).attach(model, tiny.key(0), CONTEXT)
    Norms(targets=["norm"]).attach(model, tiny.key(0), CONTEXT)
    with pytest.raises(UserError, match="two methods train the same norms"):
        Norms().attach(model, tiny.key(0), CONTEXT)
    assert split(model).trainable
