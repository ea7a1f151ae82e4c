"""P-tuning: PEFT's numbers, an LSTM step by step, and plain rows in the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import peft_fixture
import pytest
import tiny

from softprompt_jax import load_run, train
from softprompt_jax.checkpoints import artifact
from softprompt_jax.checkpoints.peft import attach_adapter, save_adapter
from softprompt_jax.config import UserError, parse
from softprompt_jax.data.prompt_layout import PromptLayout
from softprompt_jax.inference.predictor import load_predictor
from softprompt_jax.methods import Context, PTuning, finish, split
from softprompt_jax.methods.p_tuning import LSTM, MLP, Direction
from softprompt_jax.run import Run

CONTEXT = Context(lambda text: [5, 6], frozenset({0, 1, 2}))


def tuned(**settings):
    model = tiny.model()
    parse(PTuning, {"length": 3, "hidden": 4, **settings}, "test").attach(model, tiny.key(1), CONTEXT)
    return model


def test_pefts_adapter_is_a_plain_prompt_with_its_logits_loss_and_gradient(shared_fixtures):
    golden, model = peft_fixture.golden(shared_fixtures, "P_TUNING"), peft_fixture.model(shared_fixtures, "P_TUNING")
    method = attach_adapter(model, shared_fixtures / "peft" / "P_TUNING" / "adapter")
    assert (method.kind, method.length) == ("prompt", 5)
    batch = peft_fixture.batch(shared_fixtures, "P_TUNING")
    ids = jnp.tile(jnp.arange(128, 133, dtype=jnp.int32), (4, 1))
    batch["encoder_tokens"] = jnp.concatenate([ids, batch["encoder_tokens"]], 1)
    real = np.asarray(batch["decoder_targets"]) != 0
    loss, logits, gradient = tiny.loss_logits_gradient(split(model), batch)
    np.testing.assert_allclose(logits[real], golden["logits"][real], atol=1e-4)
    np.testing.assert_allclose(loss / real.sum(), golden["loss"], rtol=1e-5)
    # The fixture's weights are those after training; the last bias moves every row alike.
    expected = golden["grad/prompt_encoder.default.mlp_head.4.bias"]
    np.testing.assert_allclose(gradient["prompt"]["rows"].sum(0) / real.sum(), expected, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_rows_and_gradients_equal_those_of_pefts_network(kind):
    torch = pytest.importorskip("torch")
    from peft import PromptEncoder, PromptEncoderConfig

    torch.manual_seed(0)
    theirs = PromptEncoder(
        PromptEncoderConfig(
            task_type="SEQ_2_SEQ_LM",
            num_virtual_tokens=5,
            num_transformer_submodules=1,
            token_dim=6,
            encoder_hidden_size=4,
            encoder_reparameterization_type=kind.upper(),
            encoder_num_layers=2,
        )
    )
    weights = {name: value.detach().numpy() for name, value in theirs.named_parameters()}
    ours = (MLP if kind == "mlp" else lambda *sizes: LSTM(*sizes, layers=2))(tiny.key(0), 6, 4)
    for name, index in zip(
        ("first", "second", "third") if kind == "mlp" else ("first", "second"), (0, 2, 4), strict=False
    ):
        getattr(ours, name).kernel[...] = jnp.asarray(weights[f"mlp_head.{index}.weight"].T)
        getattr(ours, name).bias[...] = jnp.asarray(weights[f"mlp_head.{index}.bias"])
    for layer in range(2 if kind == "lstm" else 0):
        for name, end in (("forwards", ""), ("backwards", "_reverse")):
            part = getattr(ours, f"{name}{layer}")
            part.input.kernel[...] = jnp.asarray(weights[f"lstm_head.weight_ih_l{layer}{end}"].T)
            biases = (weights[f"lstm_head.bias_{which}_l{layer}{end}"] for which in ("ih", "hh"))
            part.input.bias[...] = jnp.asarray(sum(biases))
            part.recurrent[...] = jnp.asarray(weights[f"lstm_head.weight_hh_l{layer}{end}"].T)
    rows = theirs(torch.arange(5)[None])
    pull = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    (rows[0] * torch.from_numpy(pull)).sum().backward()
    made, backwards = jax.vjp(ours, jnp.asarray(weights["embedding.weight"]))
    np.testing.assert_allclose(made, rows[0].detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(backwards(jnp.asarray(pull))[0], theirs.embedding.weight.grad.numpy(), atol=1e-5)


def by_hand(direction: Direction, x: np.ndarray) -> np.ndarray:
    """Run an LSTM direction in NumPy, forwards over `x`."""
    kernel, bias = (np.asarray(part[...], np.float64) for part in (direction.input.kernel, direction.input.bias))
    recurrent = np.asarray(direction.recurrent[...], np.float64)
    hidden = cell = np.zeros(len(recurrent))
    output = []
    for row in x:
        enter, forget, new, leave = np.split(row @ kernel + bias + hidden @ recurrent, 4)
        cell = cell / (1 + np.exp(-forget)) + np.tanh(new) / (1 + np.exp(-enter))
        hidden = np.tanh(cell) / (1 + np.exp(-leave))
        output.append(hidden)
    return np.array(output)


def test_the_lstm_reads_in_both_directions():
    network, x = LSTM(tiny.key(0), 6, 4, layers=2), np.random.default_rng(0).normal(size=(5, 6))
    assert np.asarray(network.forwards0.recurrent[...]).std() > 0.1
    y = x
    for layer in range(2):
        forwards, backwards = getattr(network, f"forwards{layer}"), getattr(network, f"backwards{layer}")
        y = np.concatenate([by_hand(forwards, y), by_hand(backwards, y[::-1])[::-1]], 1)
    y = np.maximum(y @ np.asarray(network.first.kernel[...]), 0) @ np.asarray(network.second.kernel[...])
    np.testing.assert_allclose(network(jnp.asarray(x, jnp.float32)), y, atol=1e-5)


@pytest.mark.slow
def test_the_gradient_reaches_every_part_and_equals_finite_differences():
    model, batch = tuned(), tiny.batch(prompt=3)
    parts = split(model)
    _, _, gradient = tiny.loss_logits_gradient(parts, batch)
    leaves, structure = jax.tree.flatten(gradient)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in leaves)
    draw = np.random.default_rng(0)
    ways = [draw.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    length = np.sqrt(sum((way**2).sum() for way in ways))
    ways = [way / length for way in ways]
    slope = sum(float((a * b).sum()) for a, b in zip(leaves, ways, strict=True))

    def loss(step: float) -> float:
        moved = [leaf + step * way for leaf, way in zip(jax.tree.leaves(parts.trainable), ways, strict=True)]
        return float(
            tiny.loss_logits_gradient(type(parts)(parts.graphdef, structure.unflatten(moved), parts.frozen), batch)[0]
        )

    assert (loss(2e-3) - loss(-2e-3)) / 4e-3 == pytest.approx(slope, rel=2e-2)


def test_rows_are_of_the_size_of_words_and_stay_when_the_network_goes(tmp_path):
    model = tuned(length=40, hidden=16, network="mlp")
    rms = float(jnp.sqrt(jnp.mean(model.embedding[...] ** 2)))
    assert float(jnp.sqrt(jnp.mean(model.prompt.table() ** 2))) == pytest.approx(rms, rel=0.5)
    plain = finish(model)
    np.testing.assert_array_equal(plain.prompt.rows[...], model.prompt.table())
    assert jax.tree.map(jnp.shape, split(plain).trainable) == {"prompt": {"rows": (40, 16)}}
    save_adapter(model, [PTuning(length=40, hidden=16, network="mlp")], tmp_path, None, {})
    again = tiny.model()
    attach_adapter(again, tmp_path)
    np.testing.assert_array_equal(again.prompt.rows[...], plain.prompt.rows[...])


def test_vectors_may_start_as_words():
    model = tuned(init={"kind": "text", "text": "two"})
    rows = model.prompt.scale * model.prompt.vectors[...]
    np.testing.assert_allclose(rows, model.embedding[...][jnp.asarray([5, 6, 5])], rtol=1e-5)


def test_a_place_that_peft_has_not_is_refused(tmp_path):
    model = tuned(place="{prompt:1} {text} it was {prompt:2}")
    assert model.prompt.layout == PromptLayout((50,), (5, 6, 51, 52), ())
    with pytest.raises(UserError, match="PEFT knows no other"):
        save_adapter(model, [PTuning(length=3, place="after")], tmp_path, None, {})


@pytest.mark.slow
def test_a_run_leaves_rows_that_predict_as_its_network_did(small, own_cache, tmp_path):
    place = "{prompt:2} {text} the garden {prompt:1}"
    methods = [{"kind": "p_tuning", "length": 3, "hidden": 8, "place": place}]
    run = parse(Run, small.short | {"methods": methods}, "test")
    result = train(run, tmp_path / "run")
    assert load_run(tmp_path / "run" / "config.yaml") == run
    found = artifact.load_artifact(tmp_path / "run")
    trained, rows, metadata = found.tree, found.prompt, found.metadata
    np.testing.assert_array_equal(trained["prompt"]["rows"], rows)
    assert metadata["place"] == place
    predictor = load_predictor(tmp_path / "run")
    assert predictor.evaluate(predictor.task, "test") == pytest.approx(result["test"])
