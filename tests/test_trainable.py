"""What trains is split from what is frozen, and put together again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from softprompt_jax.config import UserError
from softprompt_jax.methods import IA3, Context, Full, LoRA, Trainable, attach, leaves, put_trained, split
from softprompt_jax.methods.trainable import thaw
from softprompt_jax.methods.wrap import linears, matching, merged
from softprompt_jax.trees import flatten

CONTEXT = Context(list)


def names(tree) -> set[str]:
    return {name for name, _ in flatten(tree).items()}


def test_of_a_prompted_model_the_rows_train_and_nothing_else():
    model = tiny.model(prompt=3)
    everything = names(nnx.to_pure_dict(nnx.state(model)))
    parts = split(model)
    assert names(parts.trainable) == {"prompt.rows"} == set(leaves(model))
    assert names(parts.frozen) == everything - {"prompt.rows"}
    assert not split(tiny.model()).trainable


def test_merging_gives_the_model_that_was_split_also_under_jit():
    model, batch = tiny.model(prompt=3), tiny.batch(prompt=3)
    parts = split(model)
    merged = jax.jit(lambda trainable, frozen: parts.merge(trainable, frozen)(batch))(parts.trainable, parts.frozen)
    np.testing.assert_allclose(merged, tiny.forward(model, batch), atol=1e-6)


@pytest.mark.slow
def test_full_tuning_trains_float32_copies_of_all_weights_and_keeps_the_function():
    model, batch = tiny.model(dtype="bfloat16"), tiny.batch()
    before = tiny.forward(model, batch)
    everything = names(nnx.to_pure_dict(nnx.state(model)))
    Full().attach(model, jax.random.key(0), Context(list))
    parts = split(model)
    assert names(parts.trainable) == everything
    assert not parts.frozen
    assert {leaf.dtype for leaf in jax.tree.leaves(parts.trainable)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(tiny.forward(model, batch), before, atol=1e-6)


def test_leaves_tell_which_weights_are_stacks_of_layers():
    model = tiny.model(bias_in_every_layer=True, prompt=2)
    thaw(model)
    about = leaves(model)
    assert {name for name, leaf in about.items() if leaf.stacked} == {name for name in about if ".layers." in name}
    assert about["encoder.layers.bias.table"].stacked
    assert not about["embedding"].stacked
    assert all(leaf.learning_rate_scale == 1 for leaf in about.values())


def test_thawing_takes_the_wanted_paths_once():
    model = tiny.model(prompt=2)
    changed = thaw(model, lambda path: path.endswith("norm.scale"))
    assert set(changed) == names(split(model).trainable) - {"prompt.rows"}
    assert "decoder.layers.cross_norm.scale" in changed
    assert len(changed) == len(set(changed)) == 7
    assert thaw(model, lambda path: path.endswith("norm.scale")) == []
    assert isinstance(model.encoder.norm.scale, Trainable)
    assert model.encoder.norm.scale.get_metadata()["axes"] == ("embed",)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["query"], {"encoder.layers.attention.query", "decoder.layers.attention.query", "decoder.layers.cross.query"}),
        (["cross.query"], {"decoder.layers.cross.query"}),
        (["encoder.*.query", "encoder.layers.attention.query"], {"encoder.layers.attention.query"}),
        (["encoder.*attention.*"], {f"encoder.layers.attention.{p}" for p in ("query", "key", "value", "output")}),
    ],
)
def test_a_pattern_is_a_whole_path_or_its_end(patterns, expected):
    found = matching(patterns, linears(tiny.model()), "methods")
    assert set(found) == expected
    assert len(found) == len(expected)


def test_methods_stack_in_the_same_place_and_merge_together():
    model, batch = tiny.model(), tiny.batch()
    attach(
        [LoRA(rank=2, targets=["value"]), IA3(), LoRA(rank=2, dora=True, targets=["value"])],
        model,
        tiny.key(0),
        CONTEXT,
    )
    draw = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.3 * draw.normal(size=leaf.shape), jnp.float32), split(model).trainable
    )
    put_trained(model, moved, "test")
    assert set(linears(model)) == set(linears(tiny.model()))  # a pattern finds what stands there now
    np.testing.assert_allclose(tiny.forward(merged(model), batch), tiny.forward(model, batch), atol=1e-4)


def test_values_that_do_not_fit_are_refused_in_a_line():
    model = tiny.model(prompt=2)
    with pytest.raises(UserError, match=r"file: does not fit its settings .* for prompt.rows; expected"):
        put_trained(model, {"prompt": {"rows": jnp.zeros((3, 16))}}, "file")
