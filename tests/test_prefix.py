"""Prefix tuning: PEFT's numbers, the keys and values of tokens put in front by hand, decoding, packing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import peft_fixture
import pytest
import tiny
from test_decode import by_whole_passes, eager_to_end, greedy

from softprompt_jax.checkpoints.peft import attach_adapter, save_adapter
from softprompt_jax.config import UserError, parse
from softprompt_jax.methods import Context, Prefix, finish, split
from softprompt_jax.methods.prefix import KeysValues, Prefixes, activations

CONTEXT = Context(lambda text: [5, 6, 7], frozenset({0, 1, 2}))


def prefixed(seed: int = 0, changes=None, **settings):
    model = tiny.model(seed, **(changes or {}))
    method = parse(Prefix, {"length": 3, "network": None, **settings}, "test")
    method.attach(model, tiny.key(1), CONTEXT)
    return model


# --------------------------------------------------------------------------- other implementations


@pytest.mark.parametrize("name", [pytest.param("PREFIX_TUNING", marks=pytest.mark.slow), "PREFIX_TUNING_DEEP"])
def test_logits_loss_gradient_and_tokens_equal_peft(shared_fixtures, name, tmp_path):
    golden, model = peft_fixture.golden(shared_fixtures, name), peft_fixture.model(shared_fixtures, name)
    folder = shared_fixtures / "peft" / name / "adapter"
    method = attach_adapter(model, folder)
    batch = peft_fixture.batch(shared_fixtures, name)
    real = np.asarray(batch["decoder_targets"]) != 0
    loss, logits, gradient = tiny.loss_logits_gradient(split(model), batch)
    np.testing.assert_allclose(logits[real], golden["logits"][real], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss / real.sum(), golden["loss"], rtol=1e-5)
    ours = jax.tree.map(np.asarray, gradient["decoder"]["prefix"]["attention"])
    depth, length = ours["keys"].shape[:2]
    slots = np.zeros((length, 2 * depth, 32), np.float32)  # where layers share a slot, their gradients add up
    for layer in range(depth):
        slots[:, 4 * layer % (2 * depth)] += ours["keys"][layer]
        slots[:, (4 * layer + 1) % (2 * depth)] += ours["values"][layer]
    theirs = golden[f"grad/{peft_fixture.PROMPT_WEIGHT}"]
    np.testing.assert_allclose(slots.reshape(length, -1) / real.sum(), theirs, atol=1e-4)
    if name == "PREFIX_TUNING":  # with the slow ones
        expected = golden["greedy/sequences"]
        tokens, _ = greedy(model, batch["encoder_tokens"], expected.shape[1] - 1)
        np.testing.assert_array_equal(tokens, expected[:, 1:])
    # What PEFT wrote comes out of our hands as it was.
    save_adapter(model, [method], tmp_path, None, {})
    again = peft_fixture.model(shared_fixtures, name)
    attach_adapter(again, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, split(again).trainable, split(model).trainable)


# ------------------------------------------------------------------------------------------ by hand


def test_keys_and_values_of_tokens_before_a_one_layer_encoder_are_those_tokens_to_the_bit():
    model, batch = tiny.model(num_layers=1), tiny.batch()
    words = jnp.asarray([[7, 8, 9]])
    normed = model.encoder.layers.attention_norm.scale[0] * model.embed(words)
    normed = normed / jnp.sqrt(jnp.mean(model.embed(words) ** 2, -1, keepdims=True) + model.settings.epsilon)
    kernels = model.encoder.layers.attention
    keys, values = (normed @ part.kernel[...][0] for part in (kernels.key, kernels.value))
    tokens = batch["encoder_tokens"]
    expected = tiny.encode(model, jnp.concatenate([jnp.tile(words, (len(tokens), 1)), tokens], 1))[:, 3:]
    model.encoder.prefix = Prefixes(KeysValues(keys, values), None, 2, positions=True)
    encoded, real = tiny.encode(model, tokens), np.asarray(tokens) != 0
    np.testing.assert_allclose(encoded[real], expected[real], atol=1e-5)
    model.encoder.prefix = Prefixes(KeysValues(keys, values), None, 2, positions=False)
    assert np.abs(tiny.encode(model, tokens) - expected)[real].max() > 1e-2  # the bias is what differs
    model.encoder.bias.table[...] = jnp.zeros_like(model.encoder.bias.table[...])
    zero_bias = tiny.encode(model, tokens)
    model.encoder.prefix = Prefixes(KeysValues(keys, values), None, 2, positions=True)
    np.testing.assert_allclose(tiny.encode(model, tokens)[real], zero_bias[real], atol=1e-6)


@pytest.mark.slow
def test_a_cross_prefix_is_an_encoding_that_is_longer_by_its_source():
    model, batch = tiny.model(num_decoder_layers=1), tiny.batch()
    more = jnp.asarray(np.random.default_rng(3).normal(size=(3, 16)), jnp.float32)
    segments = (batch["encoder_tokens"] != 0).astype(jnp.int32)
    encoded = jnp.asarray(tiny.encode(model, batch["encoder_tokens"]))
    longer = jnp.concatenate([jnp.tile(more, (4, 1, 1)), encoded], 1)
    expected = model.decode(batch["decoder_inputs"], longer, jnp.pad(segments, ((0, 0), (3, 0)), constant_values=1))
    cross = model.decoder.layers.cross
    pair = (more @ cross.key.kernel[...][0])[None], (more @ cross.value.kernel[...][0])[None]
    model.decoder.prefix = Prefixes(None, KeysValues(*pair), 2, positions=False)
    np.testing.assert_allclose(model.decode(batch["decoder_inputs"], encoded, segments), expected, atol=1e-5)


def test_without_a_network_a_prefix_starts_as_the_activations_of_its_words():
    model = tiny.model(num_layers=3)
    rows = model.embedding[...][jnp.asarray([5, 6, 7])]
    started = activations(model, rows)
    every = {"attentions": ["encoder", "decoder", "cross"], "positions": "none"}
    attached = prefixed(changes={"num_layers": 3}, init={"kind": "text", "text": "words"}, **every)
    np.testing.assert_array_equal(attached.encoder.prefix.attention.keys[...], started["encoder"][0])
    np.testing.assert_array_equal(attached.decoder.prefix.cross.values[...], started["cross"][1])
    # The encoding of the words themselves, through the model's own forward pass, gives the same cross values.
    encoded = tiny.encode(model, jnp.asarray([[5, 6, 7]]))
    values = np.asarray(encoded[0] @ model.decoder.layers.cross.value.kernel[...][1])
    np.testing.assert_allclose(started["cross"][1][1], values, atol=1e-5)
    first = model.decoder.layers.attention.key.kernel[...][0]
    normed = rows / jnp.sqrt(jnp.mean(rows**2, -1, keepdims=True) + 1e-6) * model.decoder.layers.attention_norm.scale[0]
    np.testing.assert_allclose(started["decoder"][0][0], normed @ first, atol=1e-5)


# -------------------------------------------------------------------------- training, decoding, packing


@pytest.fixture(scope="module")
def full():
    """Return a model with a prefix at every attention, made by a network, with umT5's biases."""
    return eager_to_end(prefixed(5, {"bias_in_every_layer": True, "num_decoder_layers": 3}, network=8))


@pytest.mark.slow  # the contract of every method has another, with the network
def test_the_gradient_through_the_network_equals_finite_differences_and_reaches_every_part(full):
    parts, batch = split(full), tiny.batch()
    _, _, gradient = tiny.loss_logits_gradient(parts, batch)
    leaves, structure = jax.tree.flatten(gradient)
    assert len(leaves) == 15  # three networks of five arrays
    assert all(np.abs(leaf).max() > 1e-6 for leaf in leaves)
    draw = np.random.default_rng(0)
    direction = [draw.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    slope = sum(float((a * b).sum()) for a, b in zip(leaves, direction, strict=True))

    def loss(step: float) -> float:
        moved = [leaf + step * way for leaf, way in zip(jax.tree.leaves(parts.trainable), direction, strict=True)]
        return float(tiny.loss_logits_gradient(split_with(parts, structure.unflatten(moved)), batch)[0])

    assert (loss(1e-3) - loss(-1e-3)) / 2e-3 == pytest.approx(slope, rel=1e-2)


def split_with(parts, trainable):
    return type(parts)(parts.graphdef, trainable, parts.frozen)


@pytest.mark.slow
def test_the_cache_gives_the_tokens_of_whole_passes(full):
    tokens = tiny.batch(rows=8)["encoder_tokens"]
    output, score = greedy(full, tokens, 10)
    expected, expected_score = by_whole_passes(full, tokens, 10)
    np.testing.assert_array_equal(output, expected)
    np.testing.assert_allclose(score, expected_score, atol=1e-4)


def test_dropping_the_network_leaves_the_function(full):
    plain = finish(full)
    assert {leaf.ndim for leaf in jax.tree.leaves(split(plain).trainable)} == {3}
    assert sorted(split(plain).trainable["decoder"]["prefix"]) == ["attention", "cross"]
    for stack in ("encoder", "decoder"):
        prefixes = getattr(plain, stack).prefix(), getattr(full, stack).prefix()
        jax.tree.map(np.testing.assert_array_equal, *prefixes)
        assert getattr(plain, stack).prefix.positions == getattr(full, stack).prefix.positions
    again = tiny.model(5, bias_in_every_layer=True, num_decoder_layers=3)
    Prefix(length=3).finished().attach(again, tiny.key(0), CONTEXT)
    shapes = jax.tree.map(jnp.shape, (split(plain).trainable, split(again).trainable))
    assert shapes[0] == shapes[1]


@pytest.mark.slow  # the contract of every method packs, too
def test_packed_rows_give_the_logits_of_rows_of_their_own_because_all_examples_share_the_prefix():
    model = prefixed()
    apart = {
        "encoder_tokens": jnp.asarray([[5, 6, 7, 1, 0, 0], [8, 9, 1, 0, 0, 0]]),
        "decoder_inputs": jnp.asarray([[0, 20, 21], [0, 22, 0]]),
    }
    packed = {
        "encoder_tokens": jnp.asarray([[5, 6, 7, 1, 8, 9, 1, 0]]),
        "encoder_segments": jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0]]),
        "decoder_inputs": jnp.asarray([[0, 20, 21, 0, 22, 0]]),
        "decoder_segments": jnp.asarray([[1, 1, 1, 2, 2, 0]]),
    }
    rows, joined = tiny.forward(model, apart), tiny.forward(model, packed)
    np.testing.assert_allclose(joined[0, :3], rows[0], atol=1e-5)
    np.testing.assert_allclose(joined[0, 3:5], rows[1, :2], atol=1e-5)
    assert Prefix().refuses_packing is None
    assert "positions: none" in str(Prefix(positions="before").refuses_packing)


def test_an_unmentioned_attention_is_as_it_was():
    model = prefixed(attentions=["cross"])
    assert model.encoder.prefix is None
    tokens = tiny.batch()["encoder_tokens"]
    np.testing.assert_array_equal(tiny.encode(model, tokens), tiny.encode(tiny.model(), tokens))
    assert sorted(split(model).trainable["decoder"]["prefix"]) == ["cross"]


def test_what_cannot_be_is_refused_in_a_line(tmp_path):
    for settings, message in [
        ({"attentions": ["encoder", "encoder"]}, "each attention once"),
        ({"attentions": []}, "at least 1"),
        ({"network": 4, "init": "vocabulary"}, "init has no say"),
        ({"length": 0}, "length"),
    ]:
        with pytest.raises(UserError, match=message):
            parse(Prefix, settings, "test")
    model = prefixed(attentions=["decoder"], positions="before")
    with pytest.raises(UserError, match="two methods want the prefix"):
        Prefix(length=2).attach(model, tiny.key(0), CONTEXT)
    with pytest.raises(UserError, match="layers of the decoder differ"):
        save_adapter(model, [Prefix(length=3, attentions=["decoder"], positions="before")], tmp_path, None, {})
    with pytest.raises(UserError, match="as PEFT has them"):
        save_adapter(model, [Prefix(length=3)], tmp_path, None, {})


def test_a_prefix_that_begins_as_a_text_needs_no_other_setting_and_stands_where_the_input_is_read():
    text = {"kind": "text", "text": "three words"}
    method = parse(Prefix, {"length": 3, "init": text}, "test")
    assert (method.network, method.positions, method.attentions) == (None, "before", "context")
    assert parse(Prefix, method.model_dump(), "test") == method
    assert parse(Prefix, {"init": "vocabulary"}, "test").positions == "none"
    model = tiny.model()
    method.attach(model, tiny.key(0), CONTEXT)
    assert model.decoder.prefix.attention is None
    finished = tiny.model()
    method.finished().attach(finished, tiny.key(0), CONTEXT)
    assert jax.tree.map(jnp.shape, split(finished).trainable) == jax.tree.map(jnp.shape, split(model).trainable)
    # Its cross attention is exact: the encoding of the text alone, read beside that of the input.
    words = jnp.asarray([[5, 6, 7]])
    keys = model.decoder.layers.cross.key.kernel[...][1]
    expected = (tiny.encode(tiny.model(), words)[0] @ np.asarray(keys)).reshape(3, -1)
    np.testing.assert_allclose(model.decoder.prefix.cross.keys[...][1], expected, atol=1e-4)
