"""Adapters of PEFT on decoder-only models: theirs are read, ours are read again, fused products are taken apart."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import many_methods
import numpy as np
import optax
import pytest
import test_causal
import tiny
from safetensors.numpy import load_file, save_file

from softprompt_jax import UserError, load_backbone
from softprompt_jax.checkpoints.peft import attach_adapter, save_adapter
from softprompt_jax.export.export import export
from softprompt_jax.methods import IA3, Context, LoRA, Norms, Prefix, put_trained, split
from softprompt_jax.methods.wrap import merged
from softprompt_jax.models import decode
from softprompt_jax.optim.losses import cross_entropy

FIXTURES = test_causal.FIXTURES
ADAPTERS = ("LLAMA_PROMPT", "LLAMA_P_TUNING", "LLAMA_PREFIX", "LLAMA_LORA", "LLAMA_IA3", "GPT2_PROMPT", "GEMMA2_PROMPT")
CONTEXT = Context(list)


@pytest.fixture(autouse=True)
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


def prompted(model, ids: np.ndarray) -> np.ndarray:
    """Return texts with the rows of a model's prompt before them."""
    rows = 0 if model.prompt is None else len(model.prompt.table())
    return np.concatenate([np.tile(model.settings.vocabulary_rows + np.arange(rows), (len(ids), 1)), ids], 1)


@test_causal.needs_fixtures
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
@pytest.mark.parametrize("name", ADAPTERS)
def test_autopeft_loads_our_adapter_with_its_base_model(name, tmp_path):
    import torch
    from peft import AutoPeftModelForCausalLM

    backbone, (data, _) = FIXTURES / name.split("_")[0] / "backbone", test_causal.arrays(name)
    model = load_backbone(backbone).model
    save_adapter(model, [attach_adapter(model, FIXTURES / name / "adapter")], tmp_path, str(backbone), {})
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    ids, mask = (torch.from_numpy(data[key]).long() for key in ("input_ids", "attention_mask"))
    with torch.no_grad():
        found = theirs(input_ids=ids, attention_mask=mask).logits.numpy()
    real = np.pad(data["attention_mask"] == 1, ((0, 0), (found.shape[1] - ids.shape[1], 0)), constant_values=True)
    np.testing.assert_allclose(found[real], data["logits"][real], atol=1e-4)


@test_causal.needs_fixtures
@pytest.mark.parametrize("name", ADAPTERS)
def test_their_adapter_has_their_logits_gradient_and_training_steps_and_is_written_again(name, tmp_path):
    backbone = FIXTURES / name.split("_")[0] / "backbone"
    model = load_backbone(backbone, adapter=FIXTURES / name / "adapter").model
    data, ids = test_causal.arrays(name)
    tokens = prompted(model, ids)
    rows = tokens.shape[1] - ids.shape[1]
    real = np.pad(ids >= 0, ((0, 0), (rows, 0)), constant_values=True)
    np.testing.assert_allclose(test_causal.all_logits(model, tokens)[real], data["logits"][real], atol=1e-4)

    method = attach_adapter(load_backbone(backbone).model, FIXTURES / name / "adapter")
    save_adapter(model, [method], tmp_path, None, {})
    again = load_backbone(backbone, adapter=tmp_path).model
    jax.tree.map(np.testing.assert_array_equal, split(again).trainable, split(model).trainable)
    folders = (tmp_path, FIXTURES / name / "adapter")
    config, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in folders)
    for key, value in config.items():
        if key == "target_modules":
            assert set(value) == set(theirs[key])
        elif not (key == "peft_type" and name == "LLAMA_P_TUNING"):  # whose rows are a plain prompt here
            assert value == theirs[key], key
    saved, expected = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert saved.keys() == expected.keys()
    for key, value in saved.items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)

    settings = model.settings
    model.settings = settings.model_copy(update={"eos": -5})  # the fixture's answers did not stop
    context = np.full((2, 9 + rows), -1, np.int32)
    context[:, : 6 + rows] = prompted(model, data["greedy"][:, :6])
    answers, _ = decode.greedy(model, jnp.asarray(context), 8)
    np.testing.assert_array_equal(answers, data["greedy"][:, 6:])
    model.settings = settings

    if "train5_adamw_losses" not in data:  # PEFT keeps the rows of P-tuning, not the network that made them
        return
    parts, labels = split(model), np.where(data["labels"] < 0, -1, data["labels"])[:, 1:]

    def loss_of(trainable):
        model = parts.merge(trainable, parts.frozen)
        hidden, _ = model.run(jnp.asarray(tokens))
        logits = model.project(model.decoder.norm(hidden))[:, rows:-1]
        loss, weight = cross_entropy(logits, jnp.asarray(labels), padding=-1)
        return loss / weight

    step = jax.jit(jax.value_and_grad(loss_of))
    put_trained(model, step(parts.trainable)[1], name)  # so that it gets PEFT's names and layout
    slopes = method.to_peft(model)[1]
    known = {key.removeprefix("grad/").replace(".default", ""): data[key] for key in data if key.startswith("grad/")}
    known = {"prompt_embeddings" if "prompt_encoder" in key else key: slope for key, slope in known.items()}
    assert slopes.keys() == known.keys()
    for key, slope in slopes.items():
        np.testing.assert_allclose(slope, known[key], atol=1e-5 * max(1, np.abs(known[key]).max()), err_msg=key)

    optimizer = optax.adamw(0.05, weight_decay=0)
    trainable, state, losses = parts.trainable, optimizer.init(parts.trainable), []
    for _ in range(5):
        loss, gradient = step(trainable)
        losses.append(float(loss))
        updates, state = optimizer.update(gradient, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    np.testing.assert_allclose(losses, data["train5_adamw_losses"], atol=1e-4)


OURS = {
    "lora": LoRA(rank=2),
    "rslora, fused and not": LoRA(rank=2, rslora=True, targets=["query", "value", "feed_forward.down"]),
    "dora": LoRA(rank=2, dora=True, targets=["value", "key", "attention.output"]),
    "ia3": IA3(),
    "ia3, other sides": IA3(outputs=["query", "gate"], inputs=["attention.output"]),
    "ia3, inputs of all": IA3(outputs=["gate"], inputs=["query", "key", "value"]),
    "norms": Norms(),
    "prefix": Prefix(length=3, positions="before", network=None, init="zero"),
}


def changed(of: str, method, alike: bool = False):
    """Return a model with a method that was moved from where it started, and the method."""
    model = tiny.model(of=of)
    method.attach(model, tiny.key(0), CONTEXT)
    draw = np.random.default_rng(0)
    moved = lambda x: x + 0.2 * draw.normal(size=(1 if alike else len(x), *x.shape[1:])).astype(np.float32)  # noqa: E731
    put_trained(model, jax.tree.map(moved, split(model).trainable), "test")
    if alike:  # all parts of a fused product have the same factors of their inputs
        for name in ("key", "value"):
            owner = model.decoder.layers.attention
            getattr(owner, name).factors[...] = owner.query.factors[...]
    return model


@pytest.mark.parametrize("of", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("name", list(OURS))
def test_over_fused_products_our_adapter_is_written_and_read_again_and_merges(of, name, tmp_path):
    model = changed(of, OURS[name], alike=name == "ia3, inputs of all")
    ids = np.random.default_rng(1).integers(0, tiny.ROWS, (2, 9)).astype(np.int32)
    expected = test_causal.all_logits(model, ids)
    assert np.abs(expected - test_causal.all_logits(tiny.model(of=of), ids)).max() > 1e-2
    save_adapter(model, [OURS[name]], tmp_path, None, {})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    if "fan_in_fan_out" in config:
        assert config["fan_in_fan_out"] == (of == "gpt2")
    again = tiny.model(of=of)
    attach_adapter(again, tmp_path)
    np.testing.assert_allclose(test_causal.all_logits(again, ids), expected, atol=1e-4)
    if name != "prefix":
        np.testing.assert_allclose(test_causal.all_logits(merged(model), ids), expected, atol=1e-4)


@pytest.mark.parametrize("of", ["gpt2", "gpt_neox"])
def test_lora_over_a_fused_product_is_the_change_of_its_weight(of, tmp_path):
    """PEFT's own form, by hand: W + s B A over the whole of query, key and value."""
    draw, place = (
        np.random.default_rng(0),
        {"gpt2": "transformer.h.{}.attn.c_attn"}.get(of, "gpt_neox.layers.{}.attention.query_key_value"),
    )
    pairs = [(draw.normal(size=(2, 16)), draw.normal(size=(48, 2))) for _ in range(2)]
    tensors = {}
    for layer, (down, up) in enumerate(pairs):
        name = f"base_model.model.{place.format(layer)}"
        tensors |= {f"{name}.lora_A.weight": np.float32(down), f"{name}.lora_B.weight": np.float32(up)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "fan_in_fan_out": of == "gpt2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    model, plain = tiny.model(of=of), tiny.model(of=of)
    attach_adapter(model, tmp_path)
    from softprompt_jax.methods.wrap import plain_kernel

    for layer, (down, up) in enumerate(pairs):
        change = (2 * up @ down).T  # [in, 48]
        heads = change.reshape(16, 2, 3, 8) if of == "gpt_neox" else change.reshape(16, 1, 3, 16)
        for number, name in enumerate(("query", "key", "value")):
            before, after = (getattr(each.decoder.layers.attention, name) for each in (plain, model))
            found = np.asarray(plain_kernel(after)[layer] - plain_kernel(before)[layer])
            np.testing.assert_allclose(found, heads[:, :, number].reshape(16, 16), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (IA3(outputs=["key"], inputs=["query"]), "ia3 scales both sides of decoder.layers.attention.query"),
        (IA3(inputs=["query"]), "ia3 scales .* which PEFT cannot"),
        (IA3(outputs=["gate"], inputs=["query"]), "ia3 scales the inputs of .*query.kernel.*, which are one product"),
    ],
)
def test_factors_that_a_fused_product_cannot_have_are_refused_in_a_line(method, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        save_adapter(changed("gpt2", method), [method], tmp_path, None, {})
    assert "\n" not in str(error.value)


def test_an_adapter_of_the_other_kind_of_model_is_refused_in_a_line(tmp_path):
    model = changed("llama", LoRA(rank=2))
    save_adapter(model, [LoRA(rank=2)], tmp_path, None, {})
    with pytest.raises(UserError, match="task_type is 'CAUSAL_LM'; expected SEQ_2_SEQ_LM"):
        attach_adapter(tiny.model(of="t5gemma"), tmp_path)


@pytest.mark.parametrize("of", ["gpt2", pytest.param("t5gemma", marks=pytest.mark.slow)])
def test_a_run_leaves_an_adapter_and_a_merged_model(of, tmp_path):
    wanted = {"lora": [{"kind": "lora", "rank": 2, "dora": True}]}
    many = many_methods.write(tmp_path, wanted, of)
    batch = tiny.batch() if of == "t5gemma" else {name: ids - 1 for name, ids in tiny.batch().items()}
    expected = tiny.forward(many.models["lora"], batch)
    assert np.abs(expected - tiny.forward(many.backbone.model, batch)).max() > 1e-2
    for form in ("peft", "hf"):
        export(many.folder / "lora", form, tmp_path / form)
    again = load_backbone(many.backbone.folder, adapter=tmp_path / "peft").model
    real = np.asarray(batch["decoder_targets"]) > again.settings.padding
    np.testing.assert_allclose(tiny.forward(again, batch)[real], expected[real], atol=1e-4)
    np.testing.assert_allclose(
        tiny.forward(load_backbone(tmp_path / "hf").model, batch)[real], expected[real], atol=1e-4
    )
