"""The backbone: the numbers of t5x and transformers, and what a T5 promises at every shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import peft_fixture
import pytest
import t5x_fixture
import tiny
from flax import nnx
from scipy import special, stats

from softprompt_jax.assembly import with_settings
from softprompt_jax.methods import split
from softprompt_jax.models import layers, t5
from softprompt_jax.models.build import abstract
from softprompt_jax.models.layers import dropout
from softprompt_jax.models.t5 import T5
from softprompt_jax.optim.losses import cross_entropy
from softprompt_jax.trees import flatten

# --------------------------------------------------------------------------- other implementations


def test_logits_and_encoding_equal_t5x(shared_fixtures):
    golden, model = t5x_fixture.golden(shared_fixtures), t5x_fixture.model(shared_fixtures)
    batch, real = t5x_fixture.batch(shared_fixtures), t5x_fixture.real_targets(shared_fixtures)
    np.testing.assert_allclose(tiny.forward(model, batch)[real], golden["short/plain/logits"][real], atol=1e-4)
    text = np.asarray(batch["encoder_tokens"]) != 0
    encoded = tiny.encode(model, batch["encoder_tokens"])
    np.testing.assert_allclose(encoded[text], golden["short/plain/encoded"][text], atol=1e-4)


@pytest.mark.slow
def test_cross_attention_of_short_targets_needs_no_keys_and_values(monkeypatch):
    """2 U <= K: the query meets the encoding itself; loss and gradients are those of the keys and values."""
    batch, key = tiny.batch(targets=3, prompt=4), jax.random.key(3)
    made = tiny.model(prompt=4, dropout=0.2, num_heads=3)

    def gradients():
        graphdef, state = nnx.split(made)

        def loss(state):
            return cross_entropy(nnx.merge(graphdef, state)(batch, key), batch["decoder_targets"])[0].sum()

        return jax.jit(jax.value_and_grad(loss)).lower(state)

    assert made.settings.d_kv >= 2 * 3
    short = gradients()
    monkeypatch.setattr(t5.Attention, "cross_attend", _through_keys_and_values)
    long = gradients()
    flops = [lowered.cost_analysis()["flops"] for lowered in (short, long)]
    assert flops[0] < flops[1]
    (loss, gradient), (expected_loss, expected) = (lowered.compile()(nnx.split(made)[1]) for lowered in (short, long))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for (path, found), (_, wanted) in zip(
        flatten(nnx.to_pure_dict(gradient)).items(),
        flatten(nnx.to_pure_dict(expected)).items(),
        strict=True,
    ):
        scale = max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(found, wanted, atol=1e-5 * scale, err_msg=path)


def _through_keys_and_values(attention, x, source, prefix, visible, rng=None):
    return attention(x, attention.keys_values(source, rng), None, visible, rng)


@pytest.mark.parametrize("name", peft_fixture.PLAIN)
def test_logits_encoding_and_loss_equal_transformers(shared_fixtures, name):
    golden, model = peft_fixture.golden(shared_fixtures, name), peft_fixture.model(shared_fixtures, name)
    batch = peft_fixture.batch(shared_fixtures, name)
    real, text = np.asarray(batch["decoder_targets"]) != 0, np.asarray(batch["encoder_tokens"]) != 0
    logits = tiny.forward(model, batch)
    np.testing.assert_allclose(logits[real], golden["logits"][real], atol=1e-4)
    encoded = tiny.encode(model, batch["encoder_tokens"])
    np.testing.assert_allclose(encoded[text], golden["encoder_last_hidden_state"][text], atol=1e-4)
    loss, weight = cross_entropy(jnp.asarray(logits), batch["decoder_targets"])
    np.testing.assert_allclose(loss / weight, golden["loss"], atol=1e-4)


def test_bfloat16_is_as_close_to_float32_as_t5x_bfloat16_is(shared_fixtures):
    golden, real = t5x_fixture.golden(shared_fixtures), t5x_fixture.real_targets(shared_fixtures)
    model = t5x_fixture.model(shared_fixtures, prompted=True, dtype="bfloat16")
    logits = tiny.forward(model, t5x_fixture.batch(shared_fixtures, prompted=True))[real]
    exact = golden["short/prompted/logits"][real]
    theirs = np.sqrt(np.mean((golden["short/prompted_bf16/logits"][real] - exact) ** 2))
    assert logits.dtype == np.float32
    assert np.sqrt(np.mean((logits - exact) ** 2)) < 2 * theirs


# ----------------------------------------------------------------------------- what a model promises


def plain_t5(model, batch) -> np.ndarray:
    """Return the logits of a T5, written a second time: NumPy in float64, loops for layers and positions."""
    settings = model.settings
    weights = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items()}
    batch = jax.tree.map(np.asarray, batch)
    activation = {
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: x * stats.norm.cdf(x),
        "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    }[settings.activation]

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + settings.epsilon) * scale

    def bucket(distance, bidirectional):  # of a key `distance` before its query
        buckets, offset = settings.relative_buckets, 0
        if bidirectional:
            buckets //= 2
            offset = buckets if distance < 0 else 0
        distance = abs(distance) if bidirectional else max(distance, 0)
        exact = buckets // 2
        if distance < exact:
            return offset + distance
        share = np.log(distance / exact) / np.log(settings.relative_max_distance / exact)
        return offset + min(exact + int(share * (buckets - exact)), buckets - 1)

    def bias(table, queries, keys, bidirectional):
        return np.array([[table[bucket(q - k, bidirectional)] for k in range(keys)] for q in range(queries)])

    def attend(x, source, layer, visible, added):
        q, k, v = (
            (y @ layer[f"{name}.kernel"]).reshape(len(y), settings.num_heads, settings.d_kv)
            for name, y in (("query", x), ("key", source), ("value", source))
        )
        scores = np.einsum("thk,shk->tsh", q, k) + added
        weights = special.softmax(np.where(visible[:, :, None], scores, -np.inf), axis=1)
        return np.einsum("tsh,shk->thk", weights, v).reshape(len(x), -1) @ layer["output.kernel"]

    def stack(name, x, visible, encoded=None):
        depth = settings.num_layers if encoded is None else settings.num_decoder_layers
        for index in range(depth):
            start = f"{name}.layers."
            layer = {path.removeprefix(start): w[index] for path, w in weights.items() if path.startswith(start)}
            part = lambda p, layer=layer: {k.removeprefix(p): w for k, w in layer.items() if k.startswith(p)}  # noqa: E731
            table = layer["bias.table"] if settings.bias_in_every_layer else weights[f"{name}.bias.table"]
            added = bias(table, len(x), len(x), encoded is None)
            normed = norm(x, layer["attention_norm.scale"])
            x = x + attend(normed, normed, part("attention."), visible, added)
            if encoded is not None:
                everything = np.ones((len(x), len(encoded)), bool)
                x = x + attend(norm(x, layer["cross_norm.scale"]), encoded, part("cross."), everything, 0)
            normed, feed = norm(x, layer["feed_forward_norm.scale"]), part("feed_forward.")
            hidden = activation(normed @ feed["gate.kernel"])
            x = x + (hidden * (normed @ feed["up.kernel"]) if settings.gated else hidden) @ feed["down.kernel"]
        return norm(x, weights[f"{name}.norm.scale"])

    logits = []
    for encoder_tokens, decoder_inputs in zip(batch["encoder_tokens"], batch["decoder_inputs"], strict=True):
        text = weights["embedding"][encoder_tokens[encoder_tokens != 0]]
        encoded = stack("encoder", text, np.ones((len(text), len(text)), bool))
        causal = np.tril(np.ones((len(decoder_inputs), len(decoder_inputs)), bool))
        x = stack("decoder", weights["embedding"][decoder_inputs], causal, encoded)
        x = x * settings.d_model**-0.5 if settings.scale_output else x
        logits.append(x @ (weights["embedding"].T if settings.tied else weights["head.kernel"]))
    return np.array(logits)


@pytest.mark.parametrize("changes", tiny.SHAPES.values(), ids=tiny.SHAPES)
def test_logits_of_every_shape_equal_a_plain_t5(changes):
    model, batch = tiny.model(**changes), tiny.batch(length=14, targets=20)  # past the exact buckets
    np.testing.assert_allclose(tiny.forward(model, batch), plain_t5(model, batch), rtol=1e-4, atol=1e-4)


def test_a_new_model_has_the_weights_of_its_abstract_twin_and_they_differ_by_layer():
    settings = tiny.settings(num_layers=2)
    made = jax.jit(lambda key: nnx.state(T5(settings, key)))(tiny.key(0))
    shapes = nnx.state(abstract(settings))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    kernel = np.asarray(made["encoder"]["layers"]["attention"]["query"]["kernel"])
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_every_weight_names_one_axis_per_dimension():
    state = nnx.to_pure_dict(nnx.state(tiny.model(prompt=3)), extract_fn=lambda variable: variable)
    for variable in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        axes = variable.get_metadata()["axes"]
        assert variable[...].ndim - len(axes) in (0, 1), variable  # one more: the stacked layers


def test_padding_and_later_decoder_inputs_change_nothing():
    model, batch = tiny.model(), tiny.batch()
    logits = tiny.forward(model, batch)
    longer = batch | {"encoder_tokens": jnp.pad(batch["encoder_tokens"], ((0, 0), (0, 4)))}
    np.testing.assert_allclose(tiny.forward(model, longer), logits, atol=1e-5)
    later = batch | {"decoder_inputs": batch["decoder_inputs"].at[:, 3:].set(7)}
    np.testing.assert_array_equal(tiny.forward(model, later)[:, :3], logits[:, :3])
    assert np.abs(tiny.forward(model, later)[:, 3:] - logits[:, 3:]).max() > 0.01


def packed(batch: dict[str, jax.Array], order: list[list[int]], lengths: tuple[int, int]):
    """Put examples into rows one after the other; return the batch and each example's (row, start)."""
    batch, places = jax.tree.map(np.asarray, batch), {}
    widths = {"encoder_tokens": lengths[0], "encoder_segments": lengths[0]}
    names = ("encoder_tokens", "encoder_segments", "decoder_inputs", "decoder_targets", "decoder_segments")
    made = {name: np.zeros((len(order), widths.get(name, lengths[1])), np.int32) for name in names}
    for row, members in enumerate(order):
        t = u = 0
        for segment, member in enumerate(members, 1):
            tokens, targets = (batch[name][member] for name in ("encoder_tokens", "decoder_targets"))
            tokens, targets = tokens[tokens != 0], targets[targets != 0]
            places[member] = row, u
            made["encoder_tokens"][row, t : t + len(tokens)] = tokens
            made["encoder_segments"][row, t : t + len(tokens)] = segment
            made["decoder_inputs"][row, u + 1 : u + len(targets)] = targets[:-1]
            made["decoder_targets"][row, u : u + len(targets)] = targets
            made["decoder_segments"][row, u : u + len(targets)] = segment
            t, u = t + len(tokens), u + len(targets)
    return made, places


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"bias_in_every_layer": True, "d_kv": 20}], ids=["shared bias", "bias in every layer, wide heads"]
)
def test_a_packed_row_equals_its_examples_by_themselves(changes):
    model, batch = tiny.model(prompt=3, **changes), tiny.batch(prompt=3)
    parts, plain = split(model), tiny.forward(model, batch)
    alone, _ = packed(batch, [[0], [1], [2], [3]], (24, 9))
    together, places = packed(batch, [[2, 0], [3, 1], [], []], (24, 9))
    loss, logits, gradient = tiny.loss_logits_gradient(parts, alone)
    packed_loss, packed_logits, packed_gradient = tiny.loss_logits_gradient(parts, together)
    unseparated = together | {
        name: (together[name] > 0).astype(np.int32) for name in ("encoder_segments", "decoder_segments")
    }
    mixed = tiny.loss_logits_gradient(parts, unseparated)[1]
    for member, (row, start) in places.items():
        length = int((batch["decoder_targets"][member] != 0).sum())
        here = packed_logits[row, start : start + length]
        np.testing.assert_allclose(here, logits[member, :length], atol=1e-5)
        np.testing.assert_allclose(here, plain[member, :length], atol=1e-5)
        # Without segments the neighbours are read: the comparison means something.
        assert np.abs(here - mixed[row, start : start + length]).max() > 0.01
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(packed_gradient["prompt"]["rows"], gradient["prompt"]["rows"], atol=1e-5)


# --------------------------------------------------------------------------------- how it is computed


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"remat": "dots"}, {"remat": "full", "unroll": True}],
    ids=["remat dots", "remat full, unrolled"],
)
def test_rematerialisation_and_unrolling_change_no_number(changes):  # that they happen, test_step.py counts
    batch = tiny.batch(prompt=3)
    loss, logits, gradient = tiny.loss_logits_gradient(split(tiny.model(prompt=3)), batch)
    other_loss, other_logits, other = tiny.loss_logits_gradient(split(tiny.model(prompt=3, **changes)), batch)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(other_logits, logits, atol=1e-5)
    np.testing.assert_allclose(other["prompt"]["rows"], gradient["prompt"]["rows"], atol=1e-5)


def test_changing_settings_shares_the_weights():
    model = tiny.model()
    other = with_settings(model, dropout=0.5)
    assert other.settings.dropout == 0.5
    assert other.embedding[...] is model.embedding[...]


def test_abstract_models_of_one_shape_share_nothing():
    first = abstract(tiny.settings())
    first.embedding.set_metadata("axes", ("changed",))
    nnx.update(first, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1,), leaf.dtype), nnx.state(first)))
    first.decoder.layers.cross = None
    second, fresh = (
        abstract(tiny.settings()),
        nnx.eval_shape(lambda: T5(tiny.settings(), jax.random.key(0), "float32")),
    )
    assert nnx.split(second)[0] == nnx.split(fresh)[0]
    assert jax.tree.map(lambda leaf: leaf.shape, nnx.state(second)) == jax.tree.map(
        lambda leaf: leaf.shape, nnx.state(fresh)
    )
    assert second.embedding.get_metadata()["axes"] == ("vocab", "embed")


def test_the_scan_over_layers_equals_a_loop():
    model, batch = tiny.model(num_layers=3), tiny.batch()
    stack, tokens = model.encoder, batch["encoder_tokens"]
    visible = t5.same_segment((tokens != 0).astype(jnp.int32), (tokens != 0).astype(jnp.int32))
    positions = jnp.arange(tokens.shape[1])
    graphdef, state = nnx.split(stack.layers)

    @jax.jit
    def run(state, x):
        layer = nnx.merge(graphdef, state)
        return layer.feed(layer.attend_self(x, stack.bias(positions, positions), visible))

    x = model.embed(tokens)
    for index in range(3):
        x = run(jax.tree.map(lambda leaf, i=index: leaf[i], state), x)
    np.testing.assert_allclose(tiny.encode(model, tokens), stack.norm(x), atol=1e-5)


# ------------------------------------------------------------------------------------------- dropout


def test_dropout_zeroes_a_feature_along_the_whole_row_and_keeps_the_expectation():
    x = jnp.ones((64, 3, 200))
    dropped = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert (dropped == dropped[:, :1]).all()  # the same features at every position
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    assert len({row.tobytes() for row in dropped[:, 0]}) == 64  # others in every row
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_without_a_key_a_model_with_dropout_is_the_model_without():
    model, batch = tiny.model(), tiny.batch()
    dropping = with_settings(model, dropout=0.3)
    np.testing.assert_array_equal(tiny.forward(dropping, batch), tiny.forward(model, batch))
    first, again, other = (tiny.forward(dropping, batch, tiny.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_every_dropout_in_every_layer_has_a_key_of_its_own(monkeypatch):
    seen = []

    def spy(name, position):
        original = getattr(t5, name)

        def call(*arguments):
            record = lambda data: seen.append(np.asarray(data).tobytes())  # noqa: E731
            jax.debug.callback(record, jax.random.key_data(arguments[position]))
            return original(*arguments)

        for module in (t5, layers):
            monkeypatch.setattr(module, name, call, raising=False)

    spy("dropout", 2)
    spy("attend", 6)
    depth = 3
    model = tiny.model(dropout=0.1, num_layers=depth, num_decoder_layers=depth, prompt=2)
    parts = split(model)
    batch, key = tiny.batch(prompt=2), tiny.key(0)
    jax.jit(lambda t, f: parts.merge(t, f)(batch, key))(parts.trainable, parts.frozen).block_until_ready()
    jax.effects_barrier()
    # Each stack: its input and its output. Each block: its residual; attention weights; hidden features.
    assert len(seen) == 2 * 2 + depth * (2 + 2) + depth * (2 + 2 + 2)
    assert len(set(seen)) == len(seen)
