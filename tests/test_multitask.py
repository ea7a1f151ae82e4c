"""Multitask prompts: PEFT's numbers, every way of sharing, distillation, and the start of a new task from old ones."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_fixture
import pytest
import tiny
from test_decode import greedy
from test_step import one_step, run

from softprompt_jax import load_backbone, load_predictor, load_prompt, train
from softprompt_jax.checkpoints.artifact import load_artifact
from softprompt_jax.checkpoints.peft import attach_adapter, save_adapter
from softprompt_jax.config import UserError, parse
from softprompt_jax.data.prompt_layout import PromptLayout
from softprompt_jax.export.export import export
from softprompt_jax.methods import Context, Multitask, finish, put_trained, split
from softprompt_jax.methods.prompt import attach_rows
from softprompt_jax.run import Run

V = tiny.ROWS
CONTEXT = Context(lambda text: [5, 6], frozenset({0, 1, 2}))
COMBINES = ["product", "add", "concatenate", "project"]


def tasks(count: int, **more) -> Context:
    return dataclasses.replace(CONTEXT, words_by_task=((),) * count, **more)


def prompted(count: int = 0, context: Context | None = None, **settings):
    model = tiny.model()
    method = parse(Multitask, {"length": 4, "init": "vocabulary", **settings}, "test")
    method.attach(model, tiny.key(1), context or (tasks(count) if count else CONTEXT))
    return model


# --------------------------------------------------------------------------- other implementations


@pytest.mark.parametrize(
    "name", ["MULTITASK_PROMPT_TUNING", pytest.param("MULTITASK_PROMPT_TUNING_SUB1", marks=pytest.mark.slow)]
)
def test_logits_loss_gradient_and_tokens_equal_peft(shared_fixtures, name, tmp_path):
    golden, model = peft_fixture.golden(shared_fixtures, name), peft_fixture.model(shared_fixtures, name)
    method = attach_adapter(model, shared_fixtures / "peft" / name / "adapter")
    both = name == "MULTITASK_PROMPT_TUNING"
    assert (method.place, method.length, method.tasks) == ("both" if both else "before", 5, 3)
    batch, task = peft_fixture.batch(shared_fixtures, name), golden["extra/task_ids"][:, None]
    rows = 10 if both else 5
    before, decoder = (128 + task * rows + np.arange(start, start + 5) for start in (0, 5))
    batch["encoder_tokens"] = jnp.concatenate([jnp.asarray(before, jnp.int32), batch["encoder_tokens"]], 1)
    if both:
        batch["decoder_inputs"] = jnp.concatenate([jnp.asarray(decoder, jnp.int32), batch["decoder_inputs"]], 1)
        batch["decoder_targets"] = jnp.pad(batch["decoder_targets"], ((0, 0), (5, 0)))
    real = np.asarray(batch["decoder_targets"]) != 0
    loss, logits, gradient = tiny.loss_logits_gradient(split(model), batch)
    np.testing.assert_allclose(logits[real], golden["logits"][real], atol=1e-4)
    np.testing.assert_allclose(loss / real.sum(), golden["loss"], rtol=1e-5)
    theirs = {"shared": "embedding.weight", "columns": "prefix_task_cols", "rows": "prefix_task_rows"}
    for ours, other in theirs.items():
        expected = golden[f"grad/prompt_encoder.default.{other}"]
        np.testing.assert_allclose(gradient["prompt"][ours] / real.sum(), expected, rtol=1e-3, atol=1e-4)
    if not both:  # with the slow ones
        expected = golden["greedy/sequences"]
        tokens, _ = greedy(model, batch["encoder_tokens"], expected.shape[1] - 1)
        np.testing.assert_array_equal(tokens, expected[:, 1:])
    save_adapter(model, [method], tmp_path, None, {})
    again = peft_fixture.model(shared_fixtures, name)
    attach_adapter(again, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, split(again).trainable, split(model).trainable)


# ------------------------------------------------------------------------------------- ways of sharing


@pytest.mark.parametrize("combine", COMBINES)
def test_every_task_starts_with_the_shared_rows_and_reaches_all_its_parts(combine):
    model = prompted(3, combine=combine, rank=2)
    table = np.asarray(model.prompt.table())
    assert table.shape == (12, 16)
    np.testing.assert_allclose(table.reshape(3, 4, 16), np.tile(table[:4], (3, 1, 1)), rtol=1e-6)
    known = np.asarray(model.embedding[...])
    assert all(np.isclose(known, row, rtol=1e-5).all(1).any() for row in table[:4])  # words of the vocabulary

    def total(trainable):
        rows = split(model).merge(trainable, split(model).frozen).prompt.table()
        return jnp.sum(rows * jnp.arange(1.0, 1 + rows.size).reshape(rows.shape))

    gradient = jax.grad(total)(split(model).trainable)["prompt"]
    late = {"own"} if combine == "project" else set()  # the projection lets a task's own rows in with its first step
    assert {name for name, leaf in gradient.items() if not np.abs(leaf).max()} == late


@pytest.mark.parametrize("combine", COMBINES)
def test_rows_are_what_the_name_says(combine):
    model, draw = prompted(2, combine=combine, rank=2), np.random.default_rng(0)
    parts = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), split(model).trainable)
    put_trained(model, parts, "test")
    part = parts["prompt"]
    expected = {
        "product": lambda n: part["shared"] * (part["columns"][n] @ part["rows"][n]),
        "add": lambda n: part["shared"] + part["own"][n],
        "concatenate": lambda n: np.concatenate([part["shared"], part["own"][n]]),
        "project": lambda n: part["shared"] @ part["projection"][:16] + part["own"][n] @ part["projection"][16:],
    }[combine]
    found = np.asarray(model.prompt.table()).reshape(2, 4, 16)
    for n in range(2):
        np.testing.assert_allclose(found[n], expected(n), atol=1e-5)


def test_ids_of_a_task_are_its_own():
    placed = prompted(2, place="both", length=2).prompt.layout
    assert placed == PromptLayout(((V, V + 1), (V + 4, V + 5)), ((), ()), ((V + 2, V + 3), (V + 6, V + 7)))
    assert prompted(length=2).prompt.layout == PromptLayout((V, V + 1), (), ())


# ---------------------------------------------------------------------------------------- distillation


def test_distillation_is_the_divergence_of_answers_and_the_distance_of_states():
    draw = np.random.default_rng(3)
    taught = {name: draw.normal(size=(4, 16)).astype(np.float32) for name in "ab"}
    context = tasks(2, load_rows=taught.__getitem__)
    model = prompted(context=context, teachers=["a", "b"], distillation=0.5)
    method = Multitask(length=4, teachers=["a", "b"], distillation=0.5)
    batch = tiny.batch(prompt=4)
    batch["encoder_tokens"] = batch["encoder_tokens"].at[2:, :4].add(4)  # the last two rows are of task b
    real = np.asarray(batch["decoder_targets"]) != 0

    teacher = tiny.model()
    attach_rows(teacher, np.concatenate([taught["a"], taught["b"]]))
    states = [np.asarray(jax.jit(lambda m: m.hidden(batch))(m), np.float64) for m in (teacher, model)]
    answers = [
        np.asarray(jax.nn.log_softmax(m.project(jnp.asarray(x, jnp.float32))), np.float64)
        for m, x in zip((teacher, model), states, strict=True)
    ]
    divergence = (np.exp(answers[0]) * (answers[0] - answers[1])).sum(-1)
    expected = 0.5 * (divergence + ((states[0] - states[1]) ** 2).mean(-1))[real].sum()
    assert expected > 1

    def penalty(model):
        hidden = model.hidden(batch)
        return method.penalty(model, batch, hidden, model.project(hidden))

    penalty = jax.jit(penalty)
    np.testing.assert_allclose(penalty(model), expected, rtol=1e-4)
    # A student with its teachers' rows has nothing to learn from them.
    put_trained(model, split(prompted(2)).trainable, "test")
    same = prompted(
        context=dataclasses.replace(context, load_rows=lambda name: _task_rows(model, name)), teachers=["a", "b"]
    )
    np.testing.assert_allclose(penalty(same), 0, atol=1e-4)
    assert set(split(model).trainable["prompt"]) == {"shared", "columns", "rows"}  # teachers do not train


def _task_rows(model, name: str) -> np.ndarray:
    return np.asarray(model.prompt.table()).reshape(2, 4, 16)["ab".index(name)]


@pytest.mark.slow
def test_a_step_adds_the_penalty_of_its_methods_to_the_loss():
    taught = np.random.default_rng(3).normal(size=(4, 16)).astype(np.float32)
    context = dataclasses.replace(CONTEXT, load_rows=lambda path: taught)
    parts, batch = split(prompted(context=context, teachers=["a"])), tiny.batch(prompt=4)
    losses, moved = {}, {}
    for weight in (0.0, 1.0, 2.0):
        method = {"kind": "multitask", "length": 4, "teachers": ["a"], "distillation": weight}
        moved[weight], losses[weight] = one_step(parts, run(methods=[method]), batch, optax.sgd(1e-3))
    assert losses[2.0] - losses[1.0] == pytest.approx(losses[1.0] - losses[0.0], rel=1e-3)
    assert losses[1.0] > losses[0.0] + 0.01
    assert np.abs(moved[1.0]["prompt"]["shared"] - moved[0.0]["prompt"]["shared"]).max() > 1e-6


# -------------------------------------------------------------------------------------- the second stage


@pytest.mark.parametrize("combine", COMBINES)
def test_a_new_task_starts_from_the_mean_of_the_old_ones_or_one_or_what_they_share(combine):
    first, draw = prompted(3, combine=combine), np.random.default_rng(0)
    trained = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), split(first).trainable)
    put_trained(first, trained, "test")
    # What a run leaves has no teachers and can be started from.
    assert jax.tree.map(jnp.shape, split(finish(first)).trainable) == jax.tree.map(jnp.shape, trained)
    context = dataclasses.replace(CONTEXT, load_trained=lambda path: trained)
    start = {"combine": combine, "init": None, "source": "runs/first", "context": context}
    one = prompted(source_task=1, **start)
    np.testing.assert_allclose(one.prompt.table(), np.asarray(first.prompt.table())[4:8], atol=1e-5)
    mean = split(prompted(**start)).trainable["prompt"]
    for name, value in trained["prompt"].items():
        expected = value if name in ("shared", "projection") else value.mean(0, keepdims=True)
        np.testing.assert_allclose(mean[name], expected, atol=1e-6)
    shared = np.asarray(prompted(source_task="shared", **start).prompt.table())
    known = {"product": trained["prompt"]["shared"], "add": trained["prompt"]["shared"]}
    if combine in known:
        np.testing.assert_allclose(shared, known[combine], atol=1e-6)


def test_what_cannot_be_is_refused_in_a_line(tmp_path):
    for settings, message in [
        ({"source": "runs/a", "init": "vocabulary"}, "init and source both"),
        ({"combine": "concatenate", "length": 1}, "length of 2"),
        ({"combine": "divide"}, "combine"),
    ]:
        with pytest.raises(UserError, match=message):
            parse(Multitask, settings, "test")
    with pytest.raises(UserError, match="multitask rank 5; expected at most 4, the lesser of"):
        prompted(2, rank=5)
    with pytest.raises(UserError, match="mixture has 2; expected the same"):
        prompted(2, tasks=3)
    with pytest.raises(UserError, match=r"found 1 teachers for 2 task\(s\)"):
        prompted(2, teachers=["a"])
    with pytest.raises(UserError, match=r"a: a prompt of shape \[3, 16\]; expected \[4, 16\]"):
        prompted(context=dataclasses.replace(CONTEXT, load_rows=lambda path: np.zeros((3, 16))), teachers=["a"])
    trained = split(prompted(2)).trainable
    context = dataclasses.replace(CONTEXT, load_trained=lambda path: trained)
    for settings, message in [
        ({"combine": "add"}, "runs/a: found columns, rows, shared; expected shared, own"),
        ({"source_task": 2}, "source_task is 2; expected under 2"),
        ({"length": 5}, "its prompt has 4 rows; expected 5"),
    ]:
        with pytest.raises(UserError, match=message):
            prompted(context=context, init=None, source="runs/a", **settings)
    with pytest.raises(UserError, match="PEFT knows no other"):
        save_adapter(prompted(2, combine="add"), [Multitask(length=4, combine="add")], tmp_path, None, {})


@pytest.mark.slow
def test_both_stages_run_from_settings(small, prompt_run, own_cache, tmp_path):
    tasks = [small.task, small.task | {"name": "again"}]
    mixture = {"kind": "mixture", "tasks": tasks, "prompts": "own"}
    first = {"kind": "multitask", "length": 3, "teachers": [str(prompt_run), str(prompt_run)]}
    settings = small.short | {"steps": 10, "task": mixture, "methods": [first]}
    train(parse(Run, settings, "test"), tmp_path / "first")
    trained = load_artifact(tmp_path / "first").tree["prompt"]
    assert {name: value.shape for name, value in trained.items()} == {
        **{"shared": (3, 16), "columns": (2, 3, 1), "rows": (2, 1, 16)},
    }
    for number, name in enumerate(("moods", "again")):
        expected = trained["shared"] * (trained["columns"][number] @ trained["rows"][number])
        np.testing.assert_allclose(
            load_prompt(tmp_path / "first" / "prompts" / f"{name}.safetensors"), expected, atol=1e-5
        )
    second = {"kind": "multitask", "length": 3, "source": str(tmp_path / "first")}
    result = train(parse(Run, small.short | {"steps": 10, "methods": [second]}, "test"), tmp_path / "second")
    predictor = load_predictor(tmp_path / "second")
    assert predictor.evaluate(predictor.task, "test") == pytest.approx(result["test"])
    moved = load_prompt(tmp_path / "second")
    assert moved.shape == (3, 16)
    # The plain run's export reads what was trained, also when the first stage is gone.
    (tmp_path / "first").rename(tmp_path / "gone")
    export(tmp_path / "second", "peft", tmp_path / "adapter")
    backbone = load_backbone(small.backbone, adapter=tmp_path / "adapter")
    np.testing.assert_array_equal(backbone.model.prompt.table(), moved)
