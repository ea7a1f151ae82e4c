"""P-tuning v2: what stands at prompt positions in every layer, packed rows, decoding, gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_decode import by_whole_passes, eager_to_end, greedy

from softprompt_jax.config import UserError, parse
from softprompt_jax.methods import Context, PTuningV2, put_trained, split
from softprompt_jax.methods.prompt import attach_rows

V = tiny.ROWS
CONTEXT = Context(lambda text: [5, 6, 7], frozenset({0, 1, 2}))
CHANGES = {"num_layers": 3, "num_decoder_layers": 3}


def deep(seed: int = 0, context: Context = CONTEXT, drawn: bool = True, **settings):
    """Return a model with rows at every layer, by default far from where they start."""
    model = tiny.model(seed, **CHANGES)
    parse(PTuningV2, {"length": 3, **settings}, "test").attach(model, tiny.key(1), context)
    if drawn:
        draw = np.random.default_rng(7)
        put_trained(
            model,
            jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), split(model).trainable),
            "",
        )
    return model


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replace", pytest.param("add", marks=pytest.mark.slow)])
def test_every_layer_reads_its_rows_where_the_prompt_stands(mode):
    model = deep(mode=mode)
    tokens = jnp.asarray([[V, V + 1, 9, V + 2, 8, 1]])
    places = np.array([0, 1, 3])
    x, visible, positions = model.embed(tokens), jnp.ones((1, 1, 1, 6), bool), jnp.arange(6)
    bias = model.encoder.bias(positions, positions)
    for index in range(3):
        if index:
            rows = model.encoder.deep.rows[...][index - 1]
            x = x.at[0, places].set(rows) if mode == "replace" else x.at[0, places].add(rows)
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], model.encoder.layers)
        x = layer.feed(layer.attend_self(x, bias, visible))
    np.testing.assert_allclose(tiny.encode(model, tokens), model.encoder.norm(x), atol=1e-4)


@pytest.mark.slow
def test_added_rows_start_as_plain_prompt_tuning_and_replacing_ones_as_words():
    batch = tiny.batch(prompt=3)
    plain, added = tiny.model(**CHANGES), deep(drawn=False, mode="add", init={"kind": "text", "text": "words"})
    attach_rows(plain, added.prompt.rows[...])
    np.testing.assert_array_equal(tiny.forward(added, batch), tiny.forward(plain, batch))
    replaced = deep(drawn=False, init={"kind": "text", "text": "words"})
    # Alone in the encoder, the words that stand there replace themselves.
    words = jnp.asarray([[V, V + 1, V + 2]])
    np.testing.assert_allclose(tiny.encode(replaced, words), tiny.encode(plain, jnp.asarray([[5, 6, 7]])), atol=1e-4)


@pytest.mark.slow
def test_the_gradient_reaches_every_row_and_equals_finite_differences():
    model = deep(place="both")
    parts, batch = split(model), tiny.batch(prompt=3)
    ids = jnp.tile(jnp.arange(V + 3, V + 6, dtype=jnp.int32), (4, 1))
    batch["decoder_inputs"] = jnp.concatenate([ids, batch["decoder_inputs"]], 1)
    batch["decoder_targets"] = jnp.pad(batch["decoder_targets"], ((0, 0), (3, 0)))
    _, _, gradient = tiny.loss_logits_gradient(parts, batch)
    leaves, structure = jax.tree.flatten(gradient)
    assert [leaf.shape for leaf in leaves] == [(2, 3, 16), (2, 3, 16), (6, 16)]
    assert all((np.abs(leaf).max(-1) > 1e-5).all() for leaf in leaves)
    draw = np.random.default_rng(0)
    ways = [draw.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    slope = sum(float((a * b).sum()) for a, b in zip(leaves, ways, strict=True))

    def loss(step: float) -> float:
        moved = [leaf + step * way for leaf, way in zip(jax.tree.leaves(parts.trainable), ways, strict=True)]
        changed = dataclasses.replace(parts, trainable=structure.unflatten(moved))
        return float(tiny.loss_logits_gradient(changed, batch)[0])

    assert (loss(5e-4) - loss(-5e-4)) / 1e-3 == pytest.approx(slope, rel=2e-2)


@pytest.mark.slow
def test_packed_rows_and_tasks_in_one_batch_give_the_logits_of_rows_of_their_own():
    model = deep(context=dataclasses.replace(CONTEXT, words_by_task=((), ())))
    assert model.encoder.deep.rows.shape == (2, 6, 16)
    one, two = list(range(V, V + 3)), list(range(V + 3, V + 6))
    apart = {
        "encoder_tokens": jnp.asarray([[*one, 5, 6, 1], [*two, 8, 1, 0]]),
        "decoder_inputs": jnp.asarray([[0, 20, 21], [0, 22, 0]]),
    }
    packed = {
        "encoder_tokens": jnp.asarray([[*one, 5, 6, 1, *two, 8, 1, 0]]),
        "encoder_segments": jnp.asarray([[1] * 6 + [2] * 5 + [0]]),
        "decoder_inputs": jnp.asarray([[0, 20, 21, 0, 22, 0]]),
        "decoder_segments": jnp.asarray([[1, 1, 1, 2, 2, 0]]),
    }
    rows, joined = tiny.forward(model, apart), tiny.forward(model, packed)
    np.testing.assert_allclose(joined[0, :3], rows[0], atol=1e-4)
    np.testing.assert_allclose(joined[0, 3:5], rows[1, :2], atol=1e-4)


@pytest.mark.slow
def test_greedy_decoding_puts_the_decoders_rows_in_every_layer():
    model = eager_to_end(deep(5, place="decoder"))
    assert model.encoder.deep is None
    tokens = tiny.batch()["encoder_tokens"]
    before = jnp.tile(jnp.arange(V, V + 3, dtype=jnp.int32), (4, 1))
    output, score = greedy(model, tokens, 6, decoder_prompt=before)
    expected, expected_score = by_whole_passes(model, tokens, 6, before=before)
    np.testing.assert_array_equal(output, expected)
    np.testing.assert_allclose(score, expected_score, atol=1e-4)


def test_two_at_once_are_refused():
    with pytest.raises(UserError, match="two methods want prompts at every layer"):
        PTuningV2(length=3).attach(deep(drawn=False, mode="add"), tiny.key(0), CONTEXT)


def test_what_is_left_needs_no_file_that_it_started_from():
    method = parse(PTuningV2, {"init": {"kind": "file", "path": "gone.safetensors"}}, "test")
    assert method.finished().init.kind == "random"
