"""LoRA: where it stands, what it adds, and the plain weights that it can become."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from softprompt_jax.config import UserError, parse
from softprompt_jax.methods import Context, LoRA, Trainable, split
from softprompt_jax.methods.wrap import linears, merged

CONTEXT = Context(list)


def adapted(method: LoRA, **changes):
    """Return a tiny model with the method, its trained arrays far from where they start."""
    model = tiny.model(**changes)
    method.attach(model, tiny.key(0), CONTEXT)
    draw = np.random.default_rng(3)
    state = nnx.state(model, Trainable)
    moved = jax.tree.map(lambda x: x + jnp.asarray(0.3 * draw.normal(size=x.shape), jnp.float32), state)
    nnx.update(model, moved)
    return model


def test_the_change_is_the_scaled_product():
    model, plain = adapted(LoRA(rank=3, alpha=6)), tiny.model()
    module = model.encoder.layers.attention.query
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.float32)
    layer = jax.tree.map(lambda leaf: leaf[1], module)  # as the scan takes it
    kernel = np.asarray(plain.encoder.layers.attention.query.kernel[...][1])
    down, up = np.asarray(module.down[...][1]), np.asarray(module.up[...][1])
    np.testing.assert_allclose(layer(x), x @ (kernel + 2.0 * down @ up), atol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=2),
        LoRA(rank=4, alpha=4.0, rslora=True, targets=["*"]),
        LoRA(rank=3, dora=True, targets=["output", "down"]),
    ],
    ids=["lora", "rslora", "dora"],
)
def test_merged_is_the_same_function_and_leaves_the_model_as_it_was(method):
    model, batch = adapted(method), tiny.batch()
    before = jax.tree.map(np.array, split(model).frozen)
    logits = tiny.forward(model, batch)
    assert np.abs(logits - tiny.forward(tiny.model(), batch)).max() > 0.1
    plain = merged(model)
    np.testing.assert_allclose(tiny.forward(plain, batch), logits, atol=1e-4)
    assert nnx.graphdef(plain) == nnx.graphdef(tiny.model())
    jax.tree.map(np.testing.assert_array_equal, split(model).frozen, before)  # so that nothing need be unmerged
    np.testing.assert_array_equal(tiny.forward(model, batch), logits)


@pytest.mark.slow
def test_dora_turns_the_gradient_of_the_lengths_off_as_the_paper_does():
    model, batch = adapted(LoRA(rank=2, dora=True, targets=["encoder.*.value"])), tiny.batch()
    parts = split(model)
    assert {*parts.trainable["encoder"]["layers"]["attention"]["value"]} == {"down", "up", "magnitude"}
    module = model.encoder.layers.attention.value
    lengths = jnp.linalg.norm(module.inner.kernel[...] + module.scale * module.down[...] @ module.up[...], axis=-2)

    _, _, gradient = tiny.loss_logits_gradient(parts, batch)
    slopes = gradient["encoder"]["layers"]["attention"]["value"]
    # With constant lengths the gradient of B is that of plain LoRA over columns scaled by magnitude / length.
    scaled = tiny.model()
    value = scaled.encoder.layers.attention.value
    factor = module.magnitude[...] / lengths
    value.kernel = nnx.Param(value.kernel[...] * factor[:, None, :], **value.kernel.get_metadata())
    LoRA(rank=2, targets=["encoder.*.value"]).attach(scaled, tiny.key(0), CONTEXT)
    plain = scaled.encoder.layers.attention.value
    plain.down[...] = module.down[...]
    plain.up[...] = module.up[...] * factor[:, None, :]
    _, _, expected = tiny.loss_logits_gradient(split(scaled), batch)
    np.testing.assert_allclose(
        slopes["up"],
        expected["encoder"]["layers"]["attention"]["value"]["up"] * factor[:, None, :],
        rtol=1e-3,
        atol=1e-4,
    )


def test_dropout_needs_a_key_and_differs_from_place_to_place():
    model, batch = adapted(LoRA(rank=2, dropout=0.5)), tiny.batch()
    plain = tiny.forward(model, batch)
    np.testing.assert_array_equal(tiny.forward(model, batch), plain)
    first, second = (tiny.forward(model, batch, tiny.key(seed)) for seed in (1, 2))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(tiny.forward(model, batch, tiny.key(1)), first)
    numbers = [
        getattr(owner, name).number for owner, name in linears(model).values() if hasattr(getattr(owner, name), "up")
    ]
    assert len(numbers) == len(set(numbers)) == 6


def test_a_run_with_dropout_of_lora_alone_draws_keys():
    from softprompt_jax.run import Run

    task = {"name": "none", "source": {"kind": "files", "train": "none.jsonl"}}
    run = Run(task=task, dropout=0.0, methods=[LoRA(dropout=0.1)])  # type: ignore[arg-type]
    assert run.draws_dropout
    assert not run.model_copy(update={"methods": [LoRA()]}).draws_dropout


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rank": 17}, "lora rank 17 at decoder.layers.attention.query; expected at most its width 16"),
        ({"targets": ["querry"]}, "lora targets: 'querry' matches no weight .*; did you mean query"),
        ({"targets": ["query", "encoder.*.cross.query"]}, "'encoder.*.cross.query' matches no weight of this backbone"),
        ({"targets": ["head"]}, "'head' matches no weight of this backbone"),
    ],
)
def test_what_cannot_be_attached_is_refused_in_a_line(settings, expected):
    with pytest.raises(UserError, match=expected) as error:
        LoRA(**settings).attach(tiny.model(), tiny.key(0), CONTEXT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"targets": []}, {"alpha": 0}, {"dropout": 1.0}, {"ranks": 3}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        parse(LoRA, settings, "methods")
