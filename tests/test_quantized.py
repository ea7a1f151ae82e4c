"""A backbone in 8 or 4 bits: close to the float one, never trained, never unpacked for longer than a product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_lm
from flax import nnx

from softprompt_jax.assembly import abstract_backbone_of
from softprompt_jax.checkpoints.artifact import load_prompt
from softprompt_jax.checkpoints.backbone import load_backbone
from softprompt_jax.config import UserError, parse
from softprompt_jax.export.import_source import import_source
from softprompt_jax.inference.predictor import load_predictor
from softprompt_jax.methods import Context, Full, LoRA, Prompt, attach, put_trained, split
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.methods.wrap import merged, standing
from softprompt_jax.models.quantized import NF4_LEVELS, QuantizedLinear, pack, quantization_of, quantized, unpack
from softprompt_jax.models.t5 import T5
from softprompt_jax.run import Run
from softprompt_jax.tasks import resolve
from softprompt_jax.training.loop import train

KINDS = ("int8", "nf4")


def draw(*shape) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_nf4_levels_are_the_published_ones():
    # Dettmers et al. (2023), appendix E, to the digits that they print.
    published = {0: -1.0, 1: -0.6961928, 2: -0.5250731, 7: 0.0, 8: 0.0795803, 9: 0.1609302, 14: 0.7229568, 15: 1.0}
    for index, level in published.items():
        assert NF4_LEVELS[index] == pytest.approx(level, abs=1e-6)
    assert len(NF4_LEVELS) == 16


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(128, 24), (3, 96, 8), (2, 20, 5)])
def test_a_kernel_comes_back_within_half_a_step(kind, shape):
    kernel = draw(*shape)
    stored, scale = pack(kernel, kind)
    back = unpack(stored, scale, kind, jnp.float32)
    assert back.shape == kernel.shape
    if kind == "int8":
        assert stored.dtype == jnp.int8
        largest = np.abs(kernel).max(-2, keepdims=True) / 127 / 2
        assert (np.abs(back - kernel) <= largest * 1.0001).all()
    else:
        assert stored.dtype == jnp.uint8
        assert stored.size * 2 == kernel.size
        levels = np.asarray(NF4_LEVELS)
        per_input = np.repeat(scale, shape[-2] // scale.shape[-2], axis=-2)
        nearest = np.abs(np.asarray(kernel / per_input)[..., None] - levels).min(-1)
        np.testing.assert_allclose(np.abs(back - kernel), nearest * per_input, atol=1e-6)


def test_values_that_the_levels_hold_come_back_exactly():
    column = jnp.asarray(NF4_LEVELS)[:, None] * 0.5
    np.testing.assert_array_equal(unpack(*pack(column, "nf4"), "nf4", jnp.float32), column)


def test_zero_columns_stay_zero():
    for kind in KINDS:
        np.testing.assert_array_equal(unpack(*pack(jnp.zeros((16, 3)), kind), kind, jnp.float32), 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_product_and_its_gradient_are_those_of_the_unpacked_kernel(kind):
    model = quantized(tiny.model(), kind)
    linear = jax.tree.map(lambda x: x[0], model.encoder.layers.attention.query)
    assert isinstance(linear, QuantizedLinear)
    x, change = draw(3, 5, 16), draw(3, 5, 16)
    made, back = jax.vjp(linear, x)
    kernel = linear.weight()
    np.testing.assert_allclose(made, x @ kernel, atol=1e-5)
    np.testing.assert_allclose(back(change)[0], change @ kernel.T, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "apart"), [("int8", 0.05), ("nf4", 0.6)])
def test_logits_and_the_prompts_gradient_stay_near(kind, apart):
    wide = {"d_model": 64, "d_kv": 16, "d_ff": 96}
    plain, small = tiny.model(prompt=3, **wide), quantized(tiny.model(prompt=3, **wide), kind)
    batch = tiny.batch(prompt=3)
    (_, logits, gradient), (_, near_logits, near) = (
        tiny.loss_logits_gradient(split(model), batch) for model in (plain, small)
    )
    assert np.linalg.norm(near_logits - logits) < apart * np.linalg.norm(logits)
    one, other = (np.ravel(jax.tree.leaves(g)[0]) for g in (gradient, near))
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 1 - apart


@pytest.mark.slow
def test_the_backward_pass_keeps_no_unpacked_weights():
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_heads": 4, "num_layers": 6, "num_decoder_layers": 1}

    def temporary(kind):
        def build():
            model = T5(tiny.settings(**sizes), jax.random.key(0))
            attach_rows(model, jnp.zeros((2, 128)))
            return quantized(model, kind) if kind else model

        parts = split(nnx.eval_shape(build))
        batch = jax.eval_shape(lambda: tiny.batch(rows=1, length=4, targets=2, prompt=2))

        def loss(trainable, frozen):
            return parts.merge(trainable, jax.lax.stop_gradient(frozen))(batch_of(batch)).sum()

        def batch_of(shapes):
            return {name: jnp.ones(shape.shape, shape.dtype) for name, shape in shapes.items()}

        compiled = jax.jit(jax.grad(loss)).lower(parts.trainable, parts.frozen).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    layer = 4 * (4 * 128 * 128 + 3 * 128 * 512)  # bytes of one encoder layer's kernels in float32
    for kind in KINDS:  # one layer's conversions at a time, not those of all six
        assert temporary(kind) < temporary(None) + 2 * layer


@pytest.mark.slow
def test_qlora_computes_what_lora_does_over_the_unpacked_weights_and_merges_into_them():
    method, batch = LoRA(rank=2, targets=["*"]), tiny.batch()
    small, plain = quantized(tiny.model(), "nf4"), merged(quantized(tiny.model(), "nf4"))
    parts = []
    for model in (small, plain):
        method.attach(model, tiny.key(0), Context(list))
        moved = jax.tree.map(lambda x: x + 0.1 * draw(*x.shape), split(model).trainable)
        put_trained(model, moved, "test")
        parts.append(split(model))
    assert sum(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(parts[0].frozen)) == 7 + 11  # none is left whole
    (_, logits, gradient), (_, expected, slopes) = (tiny.loss_logits_gradient(each, batch) for each in parts)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    scale = max(float(jnp.abs(slope).max()) for slope in jax.tree.leaves(slopes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale), gradient, slopes)
    np.testing.assert_allclose(tiny.forward(merged(small), batch), expected, atol=1e-4)


def test_quantised_weights_refuse_to_train_and_to_be_quantised_again():
    model = quantized(tiny.model(), "int8")
    with pytest.raises(UserError, match="is quantised and cannot train"):
        Full().attach(model, jax.random.key(0), Context(list))
    with pytest.raises(UserError, match="is quantised already"):
        quantized(model, "int8")


def test_merging_gives_plain_weights_with_the_same_function():
    model = quantized(tiny.model(), "int8")
    whole = merged(model)
    batch = tiny.batch()
    np.testing.assert_allclose(tiny.forward(whole, batch), tiny.forward(model, batch), atol=1e-4)
    assert not isinstance(whole.encoder.layers.attention.query, QuantizedLinear)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_loading_quantises_on_the_way_in(small, kind):
    loaded = load_backbone(small.backbone, quantize=kind).model
    whole = quantized(load_backbone(small.backbone).model, kind)
    for one, other in zip(jax.tree.leaves(nnx.state(loaded)), jax.tree.leaves(nnx.state(whole)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert nnx.graphdef(loaded) == nnx.graphdef(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_folder_gives_the_same_bits_as_quantising_again(small, kind, tmp_path, refused, softprompt):
    code, _, err = softprompt(
        "import", small.backbone, "--quantize", kind, "--dtype", "float32", "--to", tmp_path / "q"
    )
    assert code == 0, err
    assert f"a T5 in {kind}" in err
    assert not (tmp_path / "q" / "config.json").exists()  # transformers would take it for its own
    again, stored = load_backbone(small.backbone, quantize=kind), load_backbone(tmp_path / "q")
    for one, other in zip(*(jax.tree.leaves(nnx.state(each.model)) for each in (again, stored)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert nnx.graphdef(stored.model) == nnx.graphdef(again.model)
    assert stored.fingerprint() == again.fingerprint() == load_backbone(small.backbone).fingerprint()
    assert nnx.graphdef(load_backbone(tmp_path / "q", quantize=kind).model) == nnx.graphdef(stored.model)
    run = parse(Run, small.short | {"backbone": str(tmp_path / "q")}, "test")
    assert quantization_of(abstract_backbone_of(run).model) == kind
    half = load_backbone(tmp_path / "q", "bfloat16").model
    assert half.embedding[...].dtype == jnp.bfloat16
    assert half.encoder.layers.attention.query.scale[...].dtype == jnp.float32
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(stored.model)))
    assert (tmp_path / "q" / "quantized.safetensors").stat().st_size < size + 8000
    _, shown, _ = softprompt("show", tmp_path / "q")
    assert f"quantize: {kind}" in shown
    other = {"int8": "nf4", "nf4": "int8"}[kind]
    with pytest.raises(UserError, match=f"is stored in {kind}; expected quantize: {kind} or none, found {other}"):
        load_backbone(tmp_path / "q", quantize=other)
    assert "is quantised; expected float weights" in refused("import", tmp_path / "q", "--to", tmp_path / "again")


def test_a_damaged_quantised_folder_is_told_in_one_line(small, tmp_path):
    import_source(str(small.backbone), tmp_path, quantize="int8")
    about = tmp_path / "quantized.json"
    about.write_text(about.read_text().replace('"d_ff": 32', '"d_ff": 64'))
    with pytest.raises(UserError, match=r"down\.kernel: found \[1, 32, 16\]; expected \[1, 64, 16\]"):
        load_backbone(tmp_path)
    about.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_backbone(tmp_path)


@pytest.mark.slow
def test_a_run_on_a_quantised_folder_trains_what_quantising_while_loading_trains(small, tmp_path, own_cache):
    import_source(str(small.backbone), tmp_path / "q", dtype="float32", quantize="int8")
    results = []
    for name, changes in (("loaded", {"backbone": str(tmp_path / "q")}), ("made", {"quantize": "int8"})):
        run = parse(Run, {**small.short, "steps": 2, "evaluate_every": 2, "checkpoint_every": 2, **changes}, name)
        train(run, tmp_path / name)
        results.append(load_prompt(tmp_path / name))
    np.testing.assert_array_equal(*results)


@pytest.mark.slow
def test_what_was_trained_over_a_quantised_backbone_is_scored_over_it(small, tmp_path, own_cache):
    result = train(parse(Run, small.short | {"quantize": "nf4"}, "test"), tmp_path / "run")
    predictor = load_predictor(tmp_path / "run")
    assert isinstance(predictor.model.encoder.layers.attention.query, QuantizedLinear)
    assert predictor.evaluate(resolve(small.short["task"]), "test") == result["test"]


@pytest.mark.parametrize("of", ["gpt2", *(pytest.param(of, marks=pytest.mark.slow) for of in ("gemma2", "t5gemma"))])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_families_are_quantised_stored_and_trained_beside(of, kind, tmp_path):
    folder = tiny_lm.folder(tmp_path / "floats", tiny.settings(of, vocabulary_rows=416, eos=2))
    import_source(str(folder), tmp_path / "q", dtype="float32", quantize=kind)
    again, stored = load_backbone(folder, quantize=kind), load_backbone(tmp_path / "q")
    for one, other in zip(*(jax.tree.leaves(nnx.state(each.model)) for each in (again, stored)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert nnx.graphdef(stored.model) == nnx.graphdef(again.model)
    assert stored.settings == load_backbone(folder).settings
    assert stored.fingerprint() == load_backbone(folder).fingerprint()
    model = stored.model
    assert quantization_of(model) == kind
    for linear in standing(model).values():
        assert isinstance(linear, QuantizedLinear)
    attach([Prompt(length=3), LoRA(rank=2)], model, tiny.key(0), Context(list))
    batch = tiny.batch(prompt=3)
    ids = batch["encoder_tokens"]  # of `tiny`, whose vocabulary is smaller
    batch["encoder_tokens"] = jnp.where(ids >= tiny.ROWS, ids + 416 - tiny.ROWS, ids)
    found = tiny.loss_logits_gradient(split(model), batch)[2]
    assert {"prompt", "decoder"} <= set(found)
    assert all(np.isfinite(slope).all() for slope in jax.tree.leaves(found))
    assert np.abs(found["prompt"]["rows"]).max() > 0
    assert np.abs(found["decoder"]["layers"]["attention"]["query"]["up"]).max() > 0
