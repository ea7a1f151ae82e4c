"""The contract that every method keeps. It runs on each member of the union and knows none by name.

Methods differ here only in what they say of themselves (`methods/base.py`); a new one needs no line in this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import operations
import optax
import pytest
import test_mesh
import tiny
from flax import nnx

from softprompt_jax.assembly import check_own_prompts, layout_of
from softprompt_jax.checkpoints.artifact import load_artifact, save_trained
from softprompt_jax.checkpoints.backbone import load_backbone, save_backbone
from softprompt_jax.checkpoints.peft import attach_adapter, save_adapter
from softprompt_jax.checkpoints.training_state import Checkpoints
from softprompt_jax.config import UserError, parse, to_yaml
from softprompt_jax.methods import METHODS, Context, MethodSettings, Split, leaves, put_trained, split
from softprompt_jax.methods.wrap import merged
from softprompt_jax.models.decode import greedy
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.quantized import quantized
from softprompt_jax.optim.losses import cross_entropy
from softprompt_jax.optim.optimizers import AdamW, build
from softprompt_jax.run import Run, load_run
from softprompt_jax.training.step import make_step
from softprompt_jax.trees import flatten

QUICK = ("prompt", "lora")  # the others are slow: two dozen programs each
KINDS = [*METHODS, "prompt+residual", "prompt+ulpt"]  # a prompt of every kind of reparameterisation, too
OTHERS = ("gpt2", "gemma2", "t5gemma")  # decoder-only models, and an encoder-decoder beside T5
pytestmark = pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
SMALL = {"length": 3, "rank": 2, "width": 3, "hidden": 4, "layers": 1}  # where a method has such a setting
CONTEXT = Context(lambda text: [5 + len(word) for word in text.split()], frozenset({0, 1}))
T, U = 24, 20  # of every batch here, so that all share a program


def pytest_generate_tests(metafunc):
    if "of" in metafunc.fixturenames:  # the family of the model
        metafunc.parametrize("of", ["t5", *(pytest.param(of, marks=pytest.mark.slow) for of in OTHERS)])


def settings(kind: str) -> MethodSettings:
    kind, _, made_of = kind.partition("+")
    small = {name: value for name, value in SMALL.items() if name in METHODS[kind].model_fields}
    return METHODS[kind](**small, **({"reparameterization": made_of} if made_of else {}))


def attached(kind: str, of: str = "t5", seed: int = 0, moved: bool = False, **changes) -> LanguageModel:
    """Return a tiny model with the method, where it starts or moved away from there."""
    model = tiny.model(of=of, **changes)
    settings(kind).attach(model, tiny.key(seed), CONTEXT)
    return move(model) if moved else model


def move(model: LanguageModel) -> LanguageModel:
    """Move all that trains away from where it started, in place."""
    draw = np.random.default_rng(3)
    change = lambda x: x + jnp.asarray(0.1 * draw.normal(size=x.shape), x.dtype)  # noqa: E731
    put_trained(model, jax.tree.map(change, split(model).trainable), "test")
    return model


def batch(model: LanguageModel, packed: bool = False) -> dict[str, jax.Array]:
    """Return three texts with the model's prompt ids around them: a row each, or all in the first row."""
    draw, about, layout = np.random.default_rng(5), model.settings, layout_of(model)
    start = None if model.text_end is None else about.start
    pad = {name: 0 if name.endswith("segments") else min(about.padding, 0) for name in _SIZES}
    rows = {name: np.full((3, size), pad[name], np.int32) for name, size in _SIZES.items()}
    ends = np.zeros((2,), int)
    for index, (text, target) in enumerate([(4, 3), (2, 2), (3, 1)]):
        encoder = layout.around([*draw.integers(2, tiny.ROWS, text), *([] if start is None else [1])])
        words, first = [*draw.integers(2, tiny.ROWS, target), 1], encoder[-1] if start is None else start
        inputs, targets = [*layout.decoder[0], first, *words[:-1]], [about.padding] * layout.lengths[1] + words
        row, starts = (0, ends) if packed else (index, np.zeros((2,), int))
        values = {"encoder_tokens": encoder, "decoder_inputs": inputs, "decoder_targets": targets}
        for name, value in values.items():
            at = starts[0 if name == "encoder_tokens" else 1]
            rows[name][row, at : at + len(value)] = value
            segments = "encoder_segments" if name == "encoder_tokens" else "decoder_segments"
            rows[segments][row, at : at + len(value)] = index + 1
        ends += [len(encoder), len(inputs)]
    return {name: jnp.asarray(value) for name, value in rows.items()}


_SIZES = {"encoder_tokens": T, "encoder_segments": T, "decoder_inputs": U, "decoder_targets": U, "decoder_segments": U}


def real_logits(logits: np.ndarray, batch: dict[str, jax.Array]) -> np.ndarray:
    """Return the logits where there is a target, example by example."""
    real = np.asarray(batch["decoder_targets"]) > 0  # no text here has the id 0, which some models have as padding
    return logits[real][np.argsort(np.asarray(batch["decoder_segments"])[real], kind="stable")]


@dataclasses.dataclass(frozen=True)
class Case:
    """A moved model with what one compiled program says of it."""

    model: LanguageModel
    parts: Split
    batch: dict[str, jax.Array]
    loss: float
    logits: np.ndarray
    gradient: Any


@pytest.fixture(scope="module")
def case():
    @functools.cache
    def made(kind: str, of: str) -> Case:
        model = attached(kind, of, moved=True)
        parts, rows = split(model), batch(model)
        loss, logits, gradient = tiny.loss_logits_gradient(parts, rows)
        return Case(model, parts, rows, float(loss), logits, gradient)

    return made


def test_it_says_what_it_is_and_survives_a_config(kind, tmp_path):
    method = settings(kind)
    assert method.paper.rpartition(", ")[2].isdigit()
    assert type(method).__doc__
    run = parse(Run, {"task": "sentiment_movie", "methods": [method.model_dump()]}, "test")
    assert run.methods == [method]
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    assert load_run(tmp_path / "run.yaml") == run


def test_attaching_keeps_every_weight_and_the_same_key_gives_the_same_bits(kind, of):
    plain = flatten(nnx.to_pure_dict(nnx.state(tiny.model(of=of))))
    parts = split(attached(kind, of))
    everything = {path.replace(".inner", ""): leaf for path, leaf in flatten(parts.frozen).items()}
    everything |= {path.replace(".inner", ""): leaf for path, leaf in flatten(parts.trainable).items()}
    for path, leaf in plain.items():
        np.testing.assert_array_equal(everything[path], leaf, err_msg=path)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(parts.trainable))
    jax.tree.map(np.testing.assert_array_equal, split(attached(kind, of)).trainable, parts.trainable)


def test_where_it_says_so_it_starts_as_the_identity(kind, of):
    if settings(kind).identity_at_start:
        model = attached(kind, of)
        rows = batch(model)
        found = tiny.loss_logits_gradient(split(model), rows)[1]
        np.testing.assert_allclose(real_logits(found, rows), real_logits(_plain_logits(of), rows), atol=1e-5)


@functools.cache
def _plain_logits(of: str) -> np.ndarray:
    model = tiny.model(of=of)
    return tiny.loss_logits_gradient(split(model), batch(model))[1]


def test_gradients_of_all_that_trains_are_finite_and_those_of_finite_differences(kind, of, case):
    made = case(kind, of)
    assert jax.tree.structure(made.gradient) == jax.tree.structure(made.parts.trainable)
    slopes = {path: np.abs(slope).max() for path, slope in flatten(made.gradient).items()}
    assert np.isfinite(list(slopes.values())).all(), slopes
    if of == "gpt2":  # without rotary positions the softmax takes a bias of all keys out again
        slopes.pop("decoder.layers.attention.key.bias", None)
    assert min(slopes.values()) > 1e-5 * max(slopes.values()), slopes  # of what has no effect, rounding is left
    draw = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), made.parts.trainable)
    size, step = float(optax.tree.norm(direction)), 3.2e-2

    def difference(step: float) -> float:
        def loss(factor: float) -> float:
            moved = jax.tree.map(lambda x, d: x + factor / size * d, made.parts.trainable, direction)
            return float(tiny.loss_logits_gradient(dataclasses.replace(made.parts, trainable=moved), made.batch)[0])

        return (loss(step) - loss(-step)) / (2 * step)

    expected = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float(jnp.vdot(g, d)), made.gradient, direction)))
    slope = float(optax.tree.norm(made.gradient))
    found = (4 * difference(step) - difference(2 * step)) / 3  # of fourth order, so that the step may exceed rounding
    assert found == pytest.approx(expected / size, rel=3e-2, abs=3e-3 * slope)


def test_a_step_computes_no_gradient_of_a_frozen_weight(kind, of, case):
    made = case(kind, of)

    def loss(trainable, frozen):
        targets, padding = made.batch["decoder_targets"], made.model.settings.padding
        return cross_entropy(made.parts.merge(trainable, frozen)(made.batch), targets, padding=padding)[0]

    needed = operations.gradient_flops(loss, made.parts.trainable, made.parts.frozen)
    run = Run(task="sentiment_movie", methods=[settings(kind)], dropout=0.0)  # type: ignore[arg-type, list-item]
    step = make_step(run, made.parts, optax.sgd(1.0))
    state = start(made.parts, optax.sgd(1.0))
    assert operations.flops(step, state, made.parts.frozen, made.batch, tiny.key(0)) == needed


SHAPES = {name: {"of": "t5"} | shape for name, shape in tiny.SHAPES.items()} | {of: {"of": of} for of in tiny.FAMILIES}
BRIEF = ("1.0, unequal depths", "umt5, gated silu", "gemma2", "gpt2", "t5gemma")  # the tests with numbers take T5 1.1


@pytest.mark.parametrize(
    "family", [name if name in BRIEF else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]
)
def test_it_attaches_to_every_family_in_bfloat16_with_dropout_and_rematerialisation(kind, family):
    model = attached(kind, dtype="bfloat16", dropout=0.1, remat="full", **SHAPES[family])
    parts, rows = split(model), batch(model)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(parts.trainable))

    def run(trainable):  # traced only: the scan over layers refuses an activation whose dtype or shape has changed
        merged = parts.merge(trainable, parts.frozen)
        return merged.hidden(rows, tiny.key(0)), merged(rows, tiny.key(0))

    hidden, logits = jax.eval_shape(run, parts.trainable)
    assert hidden.dtype == jnp.bfloat16
    assert (logits.shape, logits.dtype) == ((3, U, tiny.ROWS), jnp.float32)


@pytest.mark.slow
def test_in_bfloat16_it_computes_nearly_the_same(kind, of, case):
    made = case(kind, of)
    loss, logits, gradient = tiny.loss_logits_gradient(
        split(attached(kind, of, moved=True, dtype="bfloat16")), made.batch
    )
    assert float(loss) == pytest.approx(made.loss, rel=2e-2)
    expected = real_logits(made.logits, made.batch)
    np.testing.assert_allclose(real_logits(logits, made.batch), expected, atol=5e-2 * np.abs(expected).max())
    one, other = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each)]) for each in (made.gradient, gradient)
    )
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.99


@pytest.mark.parametrize("bits", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_it_stands_over_a_quantised_backbone_or_says_why_not(kind, of, bits):
    model, reason = quantized(tiny.model(of=of), bits), ""
    try:
        settings(kind).attach(model, tiny.key(0), CONTEXT)
    except UserError as error:
        reason = str(error)
    if reason:
        assert re.fullmatch(r"methods: .*; expected .*; .*", reason)
        return
    if bits == "nf4":  # traced only
        parts, rows = split(model), batch(model)

        def loss(trainable):
            logits, padding = parts.merge(trainable, parts.frozen)(rows), model.settings.padding
            return cross_entropy(logits, rows["decoder_targets"], padding=padding)[0]

        gradient = jax.eval_shape(jax.grad(loss), parts.trainable)
        assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, split(attached(kind, of)).trainable)
        return
    plain = merged(quantized(tiny.model(of=of), bits))  # float kernels, those that the stored numbers stand for
    settings(kind).attach(plain, tiny.key(0), CONTEXT)
    found, expected = (tiny.loss_logits_gradient(split(move(each)), batch(each)) for each in (model, plain))
    np.testing.assert_allclose(real_logits(found[1], batch(model)), real_logits(expected[1], batch(model)), atol=1e-4)
    scale = max(float(np.abs(slope).max()) for slope in jax.tree.leaves(expected[2]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale), found[2], expected[2])


def start(parts: Split, optimizer: optax.GradientTransformation) -> dict[str, Any]:
    trainable = jax.tree.map(jnp.copy, parts.trainable)
    return {"trainable": trainable, "optimizer": optimizer.init(trainable), "step": jnp.zeros((), jnp.int32)}


@dataclasses.dataclass(frozen=True)
class Trained:
    """What 30 steps of an unrolled and rematerialised model say, on one batch and without dropout."""

    go_on: Any  # takes a state a step further
    states: list[Any]  # before the first step and after each, in NumPy; the optimizer's first is the gradient
    losses: list[float]
    frozen: tuple[Any, Any]  # before and after


@pytest.fixture(scope="module")
def trained():
    @functools.cache
    def made(kind: str, of: str) -> Trained:
        model = attached(kind, of, moved=True, unroll=True, remat="full")
        parts, rows = split(model), batch(model)
        run = Run(task="sentiment_movie", methods=[settings(kind)], dropout=0.0, z_loss=0.0, loss="mean")  # type: ignore
        kept = optax.GradientTransformation(lambda new: jax.tree.map(jnp.zeros_like, new), lambda g, *_: (g, g))
        optimizer = optax.chain(kept, build(AdamW(learning_rate=0.01), optax.constant_schedule(0.01), leaves(model)))
        step, state, losses = make_step(run, parts, optimizer), start(parts, optimizer), []
        go_on = lambda state: step(state, parts.frozen, rows, tiny.key(0))  # noqa: E731
        before, states = jax.tree.map(np.array, parts.frozen), [jax.tree.map(np.array, state)]
        for _ in range(30):
            state, measured = go_on(state)
            states.append(jax.tree.map(np.array, state))
            losses.append(float(measured["loss"]))
        return Trained(go_on, states, losses, (before, parts.frozen))

    return made


@pytest.mark.slow
def test_unrolled_and_rematerialised_it_computes_the_same(kind, of, case, trained):
    made, found = case(kind, of), trained(kind, of)
    hidden, logits = jnp.zeros((3, U, 16)), jnp.zeros((3, U, tiny.ROWS))

    def penalty(trainable):  # with its default settings no method looks at hidden states or logits
        model = made.parts.merge(trainable, made.parts.frozen)
        return jnp.asarray(settings(kind).penalty(model, made.batch, hidden, logits), jnp.float32)

    added, slopes = jax.value_and_grad(penalty)(made.parts.trainable)
    words = int((made.batch["decoder_targets"] > 0).sum())
    assert found.losses[0] == pytest.approx((made.loss + float(added)) / words, rel=1e-5)
    scale = max(float(np.abs(slope).max()) for slope in jax.tree.leaves(made.gradient))
    same = functools.partial(np.testing.assert_allclose, atol=1e-5 * scale)
    jax.tree.map(lambda a, b, c: same(words * a, b + c), found.states[1]["optimizer"][0], made.gradient, slopes)


def test_it_packs_or_says_why_not(kind, of, case):
    reason = settings(kind).refuses_packing
    if reason is not None:
        assert reason
        return
    made = case(kind, of)
    packed = batch(made.model, packed=True)
    assert (np.asarray(packed["encoder_tokens"])[1:] <= 0).all()
    loss, logits, gradient = tiny.loss_logits_gradient(made.parts, packed)
    assert float(loss) == pytest.approx(made.loss, rel=1e-5)
    np.testing.assert_allclose(real_logits(logits, packed), real_logits(made.logits, made.batch), atol=1e-4)
    scale = max(float(np.abs(slope).max()) for slope in jax.tree.leaves(made.gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), gradient, made.gradient)


@pytest.mark.slow
def test_a_mixed_batch_gives_each_task_its_own_prompt_or_it_says_why_not(kind, of):
    own = {"kind": "mixture", "tasks": ["sentiment_movie", "spam_sms"], "prompts": "own"}
    run = parse(Run, {"task": own, "methods": [settings(kind).model_dump()]}, "test")
    model, reason = tiny.model(of=of), ""
    try:
        settings(kind).attach(model, tiny.key(0), dataclasses.replace(CONTEXT, words_by_task=((), ())))
        check_own_prompts(run, model)
    except UserError as error:
        reason = str(error)
    if reason:
        assert re.fullmatch(r"(methods|task.prompts): .*; expected .*", reason)
        return
    move(model)
    layout = model.prompt.layout
    assert layout.tasks == 2

    def logits(tasks: list[int]) -> np.ndarray:
        rows = np.full((2, T), min(model.settings.padding, 0), np.int32)
        for row, task in enumerate(tasks):
            text = layout.around([7, 8, 9, 1], task)
            rows[row, : len(text)] = text
        first = model.first_input(jnp.asarray(rows))
        return tiny.forward(model, {"encoder_tokens": jnp.asarray(rows), "decoder_inputs": first[:, None]})

    mixed, first, second = logits([0, 1]), logits([0, 0]), logits([1, 1])
    np.testing.assert_allclose(mixed, np.stack([first[0], second[1]]), atol=1e-5)
    assert np.abs(mixed[0] - mixed[1]).max() > 1e-3


@pytest.fixture(scope="module")
def on_eight_devices():
    """Return how far loss and gradient of each method on a mesh of 8 devices are from those on one."""
    return test_mesh.on_eight_devices(KINDS, ["2,2,2"], steps=0)


@pytest.mark.slow
def test_on_eight_devices_it_computes_what_it_does_on_one(kind, on_eight_devices):
    apart = on_eight_devices[f"{kind} 2,2,2"]
    assert apart["loss"] < 1e-5
    assert apart["gradient"] < 1e-5


def test_what_is_saved_is_loaded_to_the_bit(kind, of, case, tmp_path):
    made = case(kind, of)
    save_trained(made.model, tmp_path / "trained.safetensors", {})
    other = attached(kind, of, seed=1)
    put_trained(other, load_artifact(tmp_path / "trained.safetensors").tree, "test")
    assert nnx.graphdef(other) == nnx.graphdef(made.model)
    jax.tree.map(np.testing.assert_array_equal, split(other).trainable, made.parts.trainable)


def test_it_becomes_a_plain_t5_or_says_why_not(kind, of, case, tmp_path):
    made, reason = case(kind, of), ""
    try:
        save_backbone(merged(made.model), tmp_path, "float32")
    except UserError as error:
        reason = str(error)
    if reason:
        assert re.fullmatch(r"methods: .*; expected .*; .*", reason)
        return
    loaded = load_backbone(tmp_path).model
    found = tiny.loss_logits_gradient(split(loaded), made.batch)[1]
    np.testing.assert_allclose(real_logits(found, made.batch), real_logits(made.logits, made.batch), atol=1e-4)
    assert nnx.graphdef(loaded) == nnx.graphdef(tiny.model(of=of))


def test_peft_gets_it_and_gives_it_back_or_it_says_why_not(kind, of, case, tmp_path):
    made, method = case(kind, of), settings(kind)
    reason = ""
    try:
        save_adapter(made.model, [method], tmp_path, None, {})
    except UserError as error:
        reason = str(error)
    assert reason or method.peft_type
    if reason:
        assert re.fullmatch(r"methods: .*; expected .*; .*", reason)
        return
    model = tiny.model(of=of)
    attach_adapter(model, tmp_path)
    rows = batch(model)
    found = tiny.loss_logits_gradient(split(model), rows)[1]
    np.testing.assert_allclose(real_logits(found, rows), real_logits(made.logits, made.batch), atol=1e-4)


@pytest.mark.slow
def test_it_learns_a_batch_and_leaves_frozen_weights_as_they_are(kind, of, trained):
    found = trained(kind, of)
    assert found.losses[-1] < found.losses[0] - 0.02
    jax.tree.map(np.testing.assert_array_equal, *found.frozen)
    first, last = (found.states[index]["trainable"] for index in (0, -1))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), first, last)))


@pytest.mark.slow
def test_from_a_checkpoint_it_goes_on_to_the_same_bits(kind, of, trained, tmp_path):
    found = trained(kind, of)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(3, jax.tree.map(jnp.asarray, found.states[3]))
        checkpoints.wait()
        state = checkpoints.restore(3, jax.tree.map(jnp.asarray, found.states[0]))
    state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)  # tied to no device: the same program takes it
    for _ in range(2):
        state, _ = found.go_on(state)
    jax.tree.map(np.testing.assert_array_equal, state, found.states[5])


@pytest.mark.slow
def test_greedy_decoding_with_its_caches_follows_the_logits(kind, of, case):
    model, rows, steps = case(kind, of).model, case(kind, of).batch, 5
    prompt = layout_of(model).decoder[0].tolist()
    ids = jnp.tile(jnp.asarray(prompt, jnp.int32), (3, 1)) if prompt else None
    found, _ = jax.jit(greedy, static_argnums=2)(model, rows["encoder_tokens"], steps, decoder_prompt=ids)
    found = np.asarray(found)
    first = np.asarray(model.first_input(rows["encoder_tokens"]))[:, None]
    inputs = np.concatenate([np.tile(np.asarray(prompt, np.int32), (3, 1)), first, found[:, :-1]], 1)
    # As long as all others, so that the program of the other tests computes it.
    padding = min(model.settings.padding, 0)
    inputs = np.pad(inputs, ((0, 0), (0, U - inputs.shape[1])), constant_values=padding)
    segments = np.tile(np.arange(1, 4, dtype=np.int32)[:, None], (1, U))
    again = rows | {"decoder_inputs": jnp.asarray(inputs), "decoder_segments": jnp.asarray(segments)}
    logits = tiny.loss_logits_gradient(case(kind, of).parts, again)[1]
    best = logits[:, len(prompt) : len(prompt) + steps].argmax(-1)
    for row, expected in zip(found, best, strict=True):
        real = [*row, 1].index(1) + 1
        np.testing.assert_array_equal(row[:real], expected[:real])
