"""Optimizers and schedules: t5x's and optax's numbers, and one update a layer however layers are stacked."""

from __future__ import annotations

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import t5x_fixture
import tiny

from softprompt_jax.checkpoints.backbone import load_adafactor
from softprompt_jax.checkpoints.training_state import Checkpoints
from softprompt_jax.config import UserError, parse
from softprompt_jax.methods import Context, Full, attach, leaves, split
from softprompt_jax.optim.leaf import Leaf
from softprompt_jax.optim.optimizers import Adafactor, AdamW, Schedule, build, describe_rates, restored
from softprompt_jax.run import Run
from softprompt_jax.training.step import build_optimizer
from softprompt_jax.trees import flatten, unflatten


def run_all(optimizer, params, gradients):
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
    history = run_all(made(Adafactor(step_origin=0)), {"a": jnp.asarray(path[0])}, [{"a": g} for g in gradients])
    for found, expected in zip(history, path[1:], strict=True):
        np.testing.assert_allclose(found["a"], expected, atol=1e-5)


# ----------------------------------------------------------------------------------------------- optax

PARAMS = {"a": draw(3, 4), "b": {"c": draw(5, seed=1)}}
ABOUT = {"a": Leaf(False, 1.0), "b.c": Leaf(False, 1.0)}
GRADIENTS = [{"a": draw(3, 4, seed=i), "b": {"c": i * draw(5, seed=i + 9)}} for i in range(2, 6)]


def test_adamw_equals_optax():
    settings = AdamW(learning_rate=0.1, beta1=0.8, beta2=0.95, epsilon=1e-3, weight_decay=0.1)
    theirs = optax.adamw(0.1, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1)
    agree(run_all(made(settings, ABOUT), PARAMS, GRADIENTS), run_all(theirs, PARAMS, GRADIENTS))


def test_the_papers_adafactor_equals_optax():
    theirs = optax.adafactor(
        0.3,
        multiply_by_parameter_scale=False,
        clipping_threshold=1.0,
        decay_rate=0.8,
        weight_decay_rate=1e-5,
        decay_offset=-1_100_000,
    )
    agree(run_all(made(Adafactor(), ABOUT), PARAMS, GRADIENTS), run_all(theirs, PARAMS, GRADIENTS))


def test_clipping_is_of_the_whole_gradient():
    theirs = optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(0.1, weight_decay=0.0))
    ours = made(AdamW(learning_rate=0.1), ABOUT, clip_norm=2.0)
    expected = run_all(theirs, PARAMS, GRADIENTS)
    agree(run_all(ours, PARAMS, GRADIENTS), expected)
    unclipped = run_all(made(AdamW(learning_rate=0.1), ABOUT), PARAMS, GRADIENTS)
    assert np.abs(unclipped[-1]["a"] - expected[-1]["a"]).max() > 1e-3


# ----------------------------------------------------------------------------------- what is ours alone


def test_the_papers_update_has_an_rms_of_the_learning_rate_for_thousands_of_steps():
    rows = draw(20, 16)
    history = [
        rows,
        *(p["a"] for p in run_all(made(Adafactor(weight_decay=0.0)), {"a": rows}, [{"a": 1e-3 * rows}] * 3)),
    ]
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
    together = run_all(optimizer, params, gradients)[-1]

    def layer(tree, index):
        return jax.tree.map(lambda leaf: leaf[index], tree)

    single = made(settings, {name: Leaf(False, 1.0) for name in about})
    for index in range(3):
        alone = run_all(single, layer(params, index), [layer(gradient, index) for gradient in gradients])[-1]
        agree(layer(together, index), alone)
    # As one array the layers would be clipped and scaled together.
    as_one = run_all(single, params, gradients)[-1]
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
    found = run_all(made(Adafactor(weight_decay=0.1)), {"a": PARAMS["a"]}, [zero, zero])[-1]["a"]
    np.testing.assert_allclose(found, 0.81 * PARAMS["a"], rtol=1e-5)
    times_rate = run_all(made(AdamW(learning_rate=0.3, weight_decay=0.1)), {"a": PARAMS["a"]}, [zero])[-1]["a"]
    np.testing.assert_allclose(times_rate, (1 - 0.03) * PARAMS["a"], rtol=1e-5)


@pytest.mark.parametrize("settings", [Adafactor(weight_decay=0.0), AdamW()], ids=["adafactor", "adamw"])
def test_the_learning_rate_of_a_leaf_is_scaled_by_its_own_factor(settings):
    params, gradient = {"a": draw(3, 4), "b": draw(3, 4)}, {"a": draw(3, 4, seed=1), "b": draw(3, 4, seed=1)}
    scaled = made(settings, {"a": Leaf(False, 1.0), "b": Leaf(False, 0.25)})
    found = run_all(scaled, params, [gradient] * 2)[-1]
    np.testing.assert_allclose(found["b"] - params["b"], 0.25 * (found["a"] - params["a"]), rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------- methods of a list

PROMPT = {"kind": "prompt", "length": 3}
LORA = {"kind": "lora", "rank": 2, "targets": ["encoder.layers.attention.query"]}
DOWN, UP = (f"encoder.layers.attention.query.{part}" for part in ("down", "up"))


def run_of(**changes) -> Run:
    return parse(Run, {"task": "sentiment_movie", **changes}, "test")


def listed(**changes):
    """Return a run, what trains of a small model with its methods, and what is known of each array."""
    run, model = run_of(**changes), tiny.model()
    attach(run.methods, model, tiny.key(0), Context(lambda text: [7] * len(text.split())))
    return run, split(model).trainable, leaves(model)


def moved(run: Run, trainable, about, steps: int = 3):
    """Return by path what has been trained, with gradients that are the same for every run."""
    drawn = [
        unflatten({path: draw(*leaf.shape, seed=step) for path, leaf in flatten(trainable).items()})
        for step in range(steps)
    ]
    return flatten(run_all(build_optimizer(run, about), trainable, drawn)[-1])


def test_each_method_of_a_list_moves_as_under_its_own_optimizer_alone():
    schedule = {"warmup_steps": 2, "decay": "linear"}
    together = moved(*listed(methods=[PROMPT, LORA], schedule=schedule, steps=9))
    prompt = moved(*listed(methods=[PROMPT], schedule=schedule, steps=9))
    adafactor = run_of(methods=[PROMPT]).optimizer
    assert (adafactor.kind, adafactor.learning_rate) == ("adafactor", 0.3)
    np.testing.assert_array_equal(together["prompt.rows"], prompt["prompt.rows"])

    _, trainable, _ = listed(methods=[PROMPT, LORA])
    theirs = optax.adamw(Schedule(**schedule).build(2e-3, 9), weight_decay=0.0)
    alone = {path: flatten(trainable)[path] for path in (DOWN, UP)}
    gradients = [{path: draw(*leaf.shape, seed=step) for path, leaf in alone.items()} for step in range(3)]
    agree({path: together[path] for path in alone}, run_all(theirs, alone, gradients)[-1])
    other = moved(*listed(methods=[LORA, PROMPT], schedule=schedule, steps=9))
    np.testing.assert_array_equal(other[UP], together[UP])  # B starts at 0: the order of the list changes nothing


def test_a_method_with_the_optimizer_none_stays_and_its_gradient_is_not_clipped_for():
    still = LORA | {"optimizer": {"kind": "none"}}
    run, trainable, about = listed(methods=[PROMPT, still], clip_norm=0.5)
    found = moved(run, trainable, about)
    np.testing.assert_array_equal(found[DOWN], flatten(trainable)[DOWN])
    alone = moved(*listed(methods=[PROMPT], clip_norm=0.5))
    np.testing.assert_array_equal(found["prompt.rows"], alone["prompt.rows"])


def test_clipping_is_of_the_gradient_of_all_methods_together():
    run, trainable, about = listed(methods=[PROMPT, LORA | {"optimizer": {"kind": "adamw", "epsilon": 10.0}}])
    clipped, _, _ = listed(methods=run.methods, optimizer=run.optimizer, clip_norm=1.0)
    optimizer, gradient = build_optimizer(clipped, about), jax.tree.map(lambda leaf: draw(*leaf.shape), trainable)
    norm = optax.tree.norm(gradient)
    small = jax.tree.map(lambda leaf: leaf / norm, gradient)
    expected = run_all(build_optimizer(run, about), trainable, [small])[-1]
    agree(run_all(optimizer, trainable, [gradient])[-1], expected)


def names_of(tree) -> list[str]:
    return [jax.tree_util.keystr(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def test_methods_with_one_optimizer_keep_the_state_that_checkpoints_of_earlier_versions_have():
    # Printed by commit 3b45b86; a checkpoint is read by these names.
    factored, adam = ("count", "v_row", "v_col", "v"), ("count", "mu", "nu")
    expected = {
        "prompt, clipped": [*(f"[1]['prompt.rows'].{name}" for name in factored), "[3]['prompt.rows'].count"],
        "lora": [
            *(f"[0]['{path}'].{name}" for path in (DOWN, UP) for name in adam),
            *(f"[2]['{path}'].count" for path in (DOWN, UP)),
        ],
        "prompt, lora": [
            *(f"[0]['{path}'].{name}" for path in (DOWN, UP, "prompt.rows") for name in factored),
            *(f"[2]['{path}'].count" for path in (DOWN, UP, "prompt.rows")),
        ],
    }
    saved = run_of(methods=[PROMPT]).model_dump()["optimizer"]  # complete, as config.yaml has it
    runs = {
        "prompt, clipped": {"methods": [PROMPT], "clip_norm": 1.0},
        "lora": {"methods": [LORA]},
        "prompt, lora": {"methods": [PROMPT, LORA], "optimizer": saved},
    }
    for name, changes in runs.items():
        run, trainable, about = listed(**changes)
        assert names_of(jax.eval_shape(build_optimizer(run, about).init, trainable)) == expected[name], name
        assert all("optimizer" not in method for method in run.model_dump()["methods"])  # so that its hash is the same
    scaled, trainable, about = listed(methods=[PROMPT, LORA | {"learning_rate_scale": 0.01}])
    assert names_of(jax.eval_shape(build_optimizer(scaled, about).init, trainable)) == expected["prompt, lora"]
    assert about[DOWN].learning_rate_scale == 0.01


def test_the_state_of_unlike_optimizers_is_saved_and_read(tmp_path):
    run, trainable, about = listed(methods=[PROMPT, LORA, LORA | {"optimizer": {"kind": "none"}}], clip_norm=1.0)
    optimizer = build_optimizer(run, about)
    fresh = {"trainable": trainable, "optimizer": optimizer.init(trainable)}
    gradient = jax.tree.map(lambda leaf: draw(*leaf.shape), trainable)
    state = fresh | {"optimizer": optimizer.update(gradient, fresh["optimizer"], trainable)[1]}
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        found = checkpoints.restore(1, fresh)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_the_first_line_of_a_run_names_each_rate():
    run, _, about = listed(methods=[PROMPT, LORA, LORA | {"optimizer": {"learning_rate": 1e-4}}])
    scale = about["prompt.rows"].learning_rate_scale
    assert describe_rates(run.method_names, run.optimizers, about) == (
        f"learning rate: prompt {0.3 * scale:.4g} (adafactor, 0.3 x {scale:.4g}); lora 0.002 (adamw); "
        "lora_2 0.0001 (adamw)"
    )


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
    checkpoint = str(shared_fixtures / "t5x" / "t5_1_1_tiny_f32")
    model = t5x_fixture.model(shared_fixtures)
    run = run_of(methods=[{"kind": "full"}], optimizer={"kind": "adafactor", "restore": True, "step_origin": 5})
    attach(run.methods, model, jax.random.key(0), Context(list))
    trainable, about = split(model).trainable, leaves(model)
    state = build_optimizer(run, about, checkpoint).init(trainable)
    step, slots = load_adafactor(checkpoint)
    assert step == 1_100_000
    assert state[0].keys() == slots.keys() == about.keys()
    later = Adafactor(step_origin=step)
    agree(state, restored(made(later, about).init(trainable), slots, "there"))
    with pytest.raises(UserError, match="no T5X checkpoint; expected one, since only these hold optimizer slots"):
        build_optimizer(run, about, "embedded")


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
    first, second = run_all(optimizer, start, [start, start])
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
