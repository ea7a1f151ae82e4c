"""Optimizers and schedules: t5x's and optax's numbers, and one update a layer however layers are stacked."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import t5x_fixture
import tiny

from softprompt_jax.config import UserError, parse
from softprompt_jax.methods import Context, Full, leaves, split
from softprompt_jax.methods.trainable import Leaf
from softprompt_jax.optim.optimizers import Adafactor, AdamW, Schedule, build, read_slots, restored


def run(optimizer, params, gradients):
    """Return the parameters after every update."""

    @jax.jit
    def step(gradient, state, params):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, history = optimizer.init(params), []
    for gradient in gradients:
        params, state = step(gradient, state, params)
        history.append(params)
    return history


def made(settings, about=None, rate: float | None = None, **changes):
    schedule = optax.constant_schedule(settings.learning_rate if rate is None else rate)
    return build(settings, schedule, about or {"a": Leaf(False, 1.0)}, **changes)


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def agree(found, expected, tolerance: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


# ------------------------------------------------------------------------------------------------- t5x


@pytest.mark.parametrize("origin", [0, 1_100_000])
def test_ten_steps_of_prompt_tuning_follow_t5x(shared_fixtures, origin):
    golden = t5x_fixture.golden(shared_fixtures)
    model, batch = t5x_fixture.model(shared_fixtures, prompted=True), t5x_fixture.batch(shared_fixtures, prompted=True)
    parts = split(model)
    optimizer = made(Adafactor(step_origin=origin), leaves(model))
    state = optimizer.init(parts.trainable)
    path = golden[f"short/prompted/adafactor_prompts_from_step{origin}"]
    update = jax.jit(optimizer.update)
    # Ten steps add up what compiling without optimisation rounds otherwise.
    exact = jax.jit(
        tiny._gradient.__wrapped__, static_argnums=(0, 4, 5), compiler_options={"xla_backend_optimization_level": 3}
    )
    np.testing.assert_array_equal(parts.trainable["prompt"]["rows"], path[0])
    for step in range(10):
        (loss, _), gradient = exact(parts.graphdef, parts.trainable, parts.frozen, batch, 1e-4, 0.0)
        np.testing.assert_allclose(loss, golden[f"short/prompted/adafactor_losses_from_step{origin}"][step], rtol=1e-4)
        updates, state = update(gradient, state, parts.trainable)
        parts.trainable.update(optax.apply_updates(parts.trainable, updates))
        np.testing.assert_allclose(parts.trainable["prompt"]["rows"], path[step + 1], atol=1e-4)


def test_adafactor_alone_follows_t5x(shared_fixtures):
    golden = t5x_fixture.golden(shared_fixtures)
    gradients, path = (golden[f"adafactor_only/100x160/{name}"] for name in ("grads", "params"))
    history = run(made(Adafactor(step_origin=0)), {"a": jnp.asarray(path[0])}, [{"a": g} for g in gradients])
    for found, expected in zip(history, path[1:], strict=True):
        np.testing.assert_allclose(found["a"], expected, atol=1e-5)


# ----------------------------------------------------------------------------------------------- optax

PARAMS = {"a": draw(3, 4), "b": {"c": draw(5, seed=1)}}
ABOUT = {"a": Leaf(False, 1.0), "b.c": Leaf(False, 1.0)}
GRADIENTS = [{"a": draw(3, 4, seed=i), "b": {"c": i * draw(5, seed=i + 9)}} for i in range(2, 6)]


def test_adamw_equals_optax():
    settings = AdamW(learning_rate=0.1, beta1=0.8, beta2=0.95, epsilon=1e-3, weight_decay=0.1)
    theirs = optax.adamw(0.1, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1)
    agree(run(made(settings, ABOUT), PARAMS, GRADIENTS), run(theirs, PARAMS, GRADIENTS))


def test_the_papers_adafactor_equals_optax():
    theirs = optax.adafactor(
        0.3,
        multiply_by_parameter_scale=False,
        clipping_threshold=1.0,
        decay_rate=0.8,
        weight_decay_rate=1e-5,
        decay_offset=-1_100_000,
    )
    agree(run(made(Adafactor(), ABOUT), PARAMS, GRADIENTS), run(theirs, PARAMS, GRADIENTS))


def test_clipping_is_of_the_whole_gradient():
    theirs = optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(0.1, weight_decay=0.0))
    ours = made(AdamW(learning_rate=0.1), ABOUT, clip_norm=2.0)
    expected = run(theirs, PARAMS, GRADIENTS)
    agree(run(ours, PARAMS, GRADIENTS), expected)
    unclipped = run(made(AdamW(learning_rate=0.1), ABOUT), PARAMS, GRADIENTS)
    assert np.abs(unclipped[-1]["a"] - expected[-1]["a"]).max() > 1e-3


# ----------------------------------------------------------------------------------- what is ours alone


def test_the_papers_update_has_an_rms_of_the_learning_rate_for_thousands_of_steps():
    rows = draw(20, 16)
    history = [rows, *(p["a"] for p in run(made(Adafactor(weight_decay=0.0)), {"a": rows}, [{"a": 1e-3 * rows}] * 3))]
    for before, after in itertools.pairwise(history):
        assert float(jnp.sqrt(jnp.mean((after - before) ** 2))) == pytest.approx(0.3, rel=1e-4)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "parameter scaling"])
def test_a_stack_of_layers_is_updated_as_each_layer_by_itself(scaled):
    settings = Adafactor(learning_rate=0.01, parameter_scaling=scaled, weight_decay=1e-3, step_origin=0)
    params = {"layers": {"kernel": draw(3, 130, 140), "scale": draw(3, 8)}}
    # The gradient of one layer grows, of another shrinks: what is clipped in a layer is not in the mean of all.
    sizes = [jnp.ones(3), jnp.asarray([10.0, 1.0, 0.1])]
    gradients = [
        {"layers": {"kernel": size[:, None, None] * draw(3, 130, 140, seed=5), "scale": size[:, None] * draw(3, 8)}}
        for size in sizes
    ]
    about = {name: Leaf(True, 1.0) for name in ("layers.kernel", "layers.scale")}
    optimizer = made(settings, about)
    together = run(optimizer, params, gradients)[-1]

    def layer(tree, index):
        return jax.tree.map(lambda leaf: leaf[index], tree)

    single = made(settings, {name: Leaf(False, 1.0) for name in about})
    for index in range(3):
        alone = run(single, layer(params, index), [layer(gradient, index) for gradient in gradients])[-1]
        agree(layer(together, index), alone)
    # As one array the layers would be clipped and scaled together.
    as_one = run(single, params, gradients)[-1]
    assert np.abs(as_one["layers"]["kernel"] - together["layers"]["kernel"]).max() > 1e-3


def second_moments(state) -> list[tuple[int, ...]]:
    return sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.size > 3)


@pytest.mark.parametrize(
    ("shape", "stacked", "expected"),
    [
        ((200, 130), False, [(130,), (200,)]),  # an embedding table
        ((3, 130, 140), True, [(3, 130), (3, 140)]),
        ((3, 127, 140), True, [(3, 127, 140)]),
        ((127, 512), False, [(127, 512)]),  # prompts up to 127 rows are not factored
        ((128, 512), False, [(128,), (512,)]),
        ((3, 130), True, [(3, 130)]),  # norms of three layers, not a matrix
    ],
)
def test_matrices_with_sides_of_128_and_more_are_factored(shape, stacked, expected):
    optimizer = made(Adafactor(), {"a": Leaf(stacked, 1.0)})
    state = jax.eval_shape(optimizer.init, {"a": jax.ShapeDtypeStruct(shape, jnp.float32)})
    assert second_moments(state) == expected


def test_every_leaf_of_a_model_in_full_tuning_gets_its_optimizer():
    model = tiny.model()
    Full().attach(model, jax.random.key(0), Context(list))
    trainable, about = split(model).trainable, leaves(model)
    for settings in (Adafactor(learning_rate=1e-3, parameter_scaling=True), AdamW(learning_rate=1e-3)):
        optimizer = made(settings, about)

        def once(params, optimizer=optimizer):
            updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
            return optax.apply_updates(params, updates)

        before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), trainable)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), jax.eval_shape(once, trainable)) == before


def test_adafactors_weight_decay_is_per_step_and_not_times_the_learning_rate():
    zero = {"a": jnp.zeros((3, 4))}
    found = run(made(Adafactor(weight_decay=0.1)), {"a": PARAMS["a"]}, [zero, zero])[-1]["a"]
    np.testing.assert_allclose(found, 0.81 * PARAMS["a"], rtol=1e-5)
    times_rate = run(made(AdamW(learning_rate=0.3, weight_decay=0.1)), {"a": PARAMS["a"]}, [zero])[-1]["a"]
    np.testing.assert_allclose(times_rate, (1 - 0.03) * PARAMS["a"], rtol=1e-5)


@pytest.mark.parametrize("settings", [Adafactor(weight_decay=0.0), AdamW()], ids=["adafactor", "adamw"])
def test_the_learning_rate_of_a_leaf_is_scaled_by_its_own_factor(settings):
    params, gradient = {"a": draw(3, 4), "b": draw(3, 4)}, {"a": draw(3, 4, seed=1), "b": draw(3, 4, seed=1)}
    scaled = made(settings, {"a": Leaf(False, 1.0), "b": Leaf(False, 0.25)})
    found = run(scaled, params, [gradient] * 2)[-1]
    np.testing.assert_allclose(found["b"] - params["b"], 0.25 * (found["a"] - params["a"]), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------- slots of a checkpoint


def as_slots(state) -> dict[str, dict[str, np.ndarray]]:
    """Return the second moments of a state as a checkpoint has them: only those that are used."""
    return {
        path: {
            name: np.asarray(leaf)
            for name in ("v", "v_row", "v_col")
            if (leaf := getattr(moments, name)).size > moments.count.size
        }
        for path, moments in state[0].items()
    }


@pytest.mark.slow
def test_restored_slots_go_on_where_they_were_left():
    settings = Adafactor(step_origin=0, learning_rate=0.01, weight_decay=0.0)
    params = {"layers": {"kernel": draw(3, 130, 140), "scale": draw(3, 8)}, "table": draw(130, 200)}
    about = {"layers.kernel": Leaf(True, 1.0), "layers.scale": Leaf(True, 1.0), "table": Leaf(False, 1.0)}
    optimizer, state = made(settings, about), made(settings, about).init(params)
    for seed in range(2):
        _, state = optimizer.update(jax.tree.map(lambda p, n=seed: p * draw(*p.shape, seed=n), params), state, params)
    later = settings.model_copy(update={"step_origin": 2})
    again = made(later, about)
    fresh = again.init(params)
    slots = as_slots(state)
    assert {frozenset(slot) for slot in slots.values()} == {frozenset({"v"}), frozenset({"v_row", "v_col"})}
    expected, _ = optimizer.update(params, state, params)
    agree(again.update(params, restored(fresh, slots, "there"), params)[0], expected)
    unlike = again.update(params, fresh, params)[0]["table"]
    assert np.abs(unlike - expected["table"]).max() > 1e-3

    for wrong, problem in (
        ({"table": {"v": np.ones((130, 200))}}, r"found v \[130, 200\]; expected v_row \[130\], v_col \[200\]"),
        ({"table": slots["table"] | {"m": np.ones((130, 200))}}, "there: momentum for table; expected none"),
        ({"table": {}}, "slots of table: found none; expected v_row"),
    ):
        with pytest.raises(UserError, match=problem) as caught:
            restored(fresh, slots | wrong, "there")
        assert "\n" not in str(caught.value)


def test_slots_and_step_are_those_of_the_backbones_checkpoint(shared_fixtures):
    checkpoint = shared_fixtures / "t5x" / "t5_1_1_tiny_f32"
    settings, slots = read_slots(Adafactor(restore=True, step_origin=5), str(checkpoint))
    assert settings.step_origin == 1_100_000
    model = t5x_fixture.model(shared_fixtures)
    Full().attach(model, jax.random.key(0), Context(list))
    optimizer = made(settings, leaves(model))
    state = restored(optimizer.init(split(model).trainable), slots, "there")
    assert state[0].keys() == slots.keys() == leaves(model).keys()
    assert read_slots(Adafactor(), "nowhere") == (Adafactor(), {})
    with pytest.raises(UserError, match="no T5X checkpoint; expected one, since only these hold optimizer slots"):
        read_slots(Adafactor(restore=True), "embedded")


# ------------------------------------------------------------------------------------------- schedules


def rates(steps: int = 100, at=(0, 25, 50, 100, 1000), **settings) -> list[float]:
    schedule = Schedule(**settings).build(0.2, steps)
    return [round(float(schedule(step)), 6) for step in at]


def test_schedules_have_the_values_that_their_settings_say():
    assert rates() == [0.2] * 5
    assert rates(decay="linear") == [0.2, 0.15, 0.1, 0.0, 0.0]
    assert rates(decay="linear", final=0.5) == [0.2, 0.175, 0.15, 0.1, 0.1]
    assert rates(decay="cosine", at=(0, 50, 100, 200)) == [0.2, 0.1, 0.0, 0.0]
    assert rates(decay="cosine", final=0.5, at=(0, 50, 100)) == [0.2, 0.15, 0.1]
    assert rates(decay="inverse_sqrt", at=(0, 3, 99)) == [0.2, 0.1, 0.02]


def test_warm_up_starts_above_zero_rises_evenly_and_hands_over_without_a_jump():
    rise = rates(warmup_steps=10, at=range(12))
    assert rise[0] == 0.02
    np.testing.assert_allclose(np.diff(rise[:11]), 0.018, atol=1e-6)
    assert rise[10:] == [0.2, 0.2]
    assert rates(warmup_steps=10, decay="linear", at=(10, 55, 100)) == [0.2, 0.1, 0.0]
    assert rates(warmup_steps=10, decay="cosine", at=(10, 55, 100)) == [0.2, 0.1, 0.0]
    assert rates(warmup_steps=25, decay="inverse_sqrt", at=(25, 100)) == [0.2, 0.1]  # lr * sqrt(warmup / step)


def test_the_optimizer_follows_the_schedule():
    schedule = lambda step: jnp.where(step < 1, 0.2, 0.1)  # noqa: E731
    optimizer = build(Adafactor(weight_decay=0.0), schedule, {"a": Leaf(False, 1.0)})
    start = {"a": draw(3, 4)}
    first, second = run(optimizer, start, [start, start])
    np.testing.assert_allclose(first["a"] - second["a"], (start["a"] - first["a"]) / 2, rtol=1e-4)


def test_settings_out_of_range_are_refused():
    for schema, values in (
        (Schedule, {"decay": "exponential"}),
        (Schedule, {"warmup_steps": -1}),
        (Schedule, {"final": 1.5}),
        (Adafactor, {"learning_rate": 0}),
        (Adafactor, {"decay": 1}),
        (Adafactor, {"clipping": 0}),
        (AdamW, {"beta1": 1}),
        (AdamW, {"weight_decay": -1}),
        (AdamW, {"momentum": 0.9}),
    ):
        with pytest.raises(UserError, match=next(iter(values))):
            parse(schema, values, "test")
