"""CMA-ES against the package `cma`, searches over words, and whole runs that see no gradient."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import softprompt_jax
from softprompt_jax import UserError, load_predictor
from softprompt_jax.config import parse
from softprompt_jax.methods import BlackBox, Context, Hard, LoRA, finish, leaves, split
from softprompt_jax.optim import gradient_free
from softprompt_jax.optim.gradient_free import CMAES, Constants, Evolution, search_words, tune_rows, words_of
from softprompt_jax.optim.optimizers import build
from softprompt_jax.run import Run
from softprompt_jax.training.step import make_step

CONTEXT = Context(lambda text: [5 + len(word) for word in text.split()], frozenset({0, 1}), word_ids=range(10, 30))


# ---------------------------------------------------------------------------------------------- CMA-ES


@pytest.mark.slow
def test_generations_are_those_of_the_package_cma():
    cma = pytest.importorskip("cma", reason="the extra dev has it")
    n, population = 6, 8
    theirs = cma.CMAEvolutionStrategy(
        n * [0.5],
        0.7,
        {"popsize": population, "CMA_active": False, "seed": 3, "verbose": -9, "CSA_squared": False},
    )
    constants = Constants(
        weights=tuple(float(w) for w in theirs.sp.weights.positive_weights),
        mass=float(theirs.sp.weights.mueff),
        path_rate=float(theirs.sp.cc),
        sigma_rate=float(theirs.adapt_sigma.cs),
        damping=float(theirs.adapt_sigma.damps),
        rank_one=float(theirs.sp.c1),
        rank_mu=float(theirs.sp.cmu),
    )
    ours = Evolution(population, 0.7, 1, n, constants)
    mean, target = jnp.full((n,), 0.5), np.linspace(-1, 1, n)
    state = ours.init(mean)
    for _ in range(8):
        old, size = np.asarray(mean), float(state["deviation"][0])
        candidates = theirs.ask()
        losses = [float(np.sum((1 + np.arange(n)) * (x - target) ** 2)) for x in candidates]
        theirs.tell(candidates, losses)
        mean, state = ours.choose(state, mean, jnp.asarray((np.stack(candidates) - old) / size), jnp.asarray(losses))
        np.testing.assert_allclose(mean, theirs.mean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(state["deviation"][0], theirs.sigma, rtol=5e-4)
        np.testing.assert_allclose(state["covariance"][0], theirs.sm.C, rtol=1e-3, atol=5e-4)


def test_it_finds_the_lowest_point_of_a_long_valley():
    n = 8
    scales, search = 10.0 ** jnp.linspace(0, 3, n), Evolution(12, 1.0, 1, n)

    @jax.jit
    def step(state, mean, key):
        candidates, drawn = search.propose(state, mean, None, key)
        return search.choose(state, mean, drawn, jnp.sum(scales * (candidates - 1) ** 2, -1))

    mean = jnp.zeros((n,))
    state = search.init(mean)
    for key in jax.random.split(jax.random.key(0), 300):
        mean, state = step(state, mean, key)
    np.testing.assert_allclose(mean, np.ones(n), atol=1e-3)
    lengths = np.sort(np.asarray(state["lengths"][0]))
    assert lengths[-1] / lengths[0] == pytest.approx(10**1.5, rel=0.5)  # the valley's shape is what it has learnt


def test_the_default_constants_are_those_of_the_tutorial():
    found = Constants.default(10, 10)
    assert sum(found.weights) == pytest.approx(1)
    assert len(found.weights) == 5
    assert found.mass == pytest.approx(3.167, abs=1e-3)
    assert found.sigma_rate == pytest.approx((3.167 + 2) / (10 + 3.167 + 5), abs=1e-4)
    assert found.rank_one == pytest.approx(2 / (11.3**2 + 3.167), abs=1e-6)


@pytest.mark.slow
def test_alternating_moves_one_layer_a_step_and_the_others_stay():
    model = tiny.model()
    parse(BlackBox, {"length": 3, "dimensions": 4, "deep": True}, "test").attach(model, tiny.key(0), CONTEXT)
    parts, run = split(model), run_of(optimizer={"kind": "cma_es", "alternate": True, "population": 6})
    optimizer = build(run.optimizer, lambda step: 0.0, leaves(model))
    assert (optimizer.blocks, optimizer.dimensions) == (2, 4)
    step = make_step(run, parts, optimizer)
    state = {"trainable": parts.trainable, "optimizer": optimizer.init(parts.trainable), "step": jnp.zeros((), int)}
    seen = []
    for _ in range(3):
        before = jax.tree.map(np.array, state["trainable"])
        state, _ = step(jax.tree.map(jnp.copy, state), parts.frozen, tiny.batch(prompt=3), tiny.key(1))
        changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, state["trainable"])
        seen.append((changed["prompt"]["subspace"]["numbers"], changed["encoder"]["deep"]["subspace"]["numbers"]))
    assert sorted(seen[:2]) == [(False, True), (True, False)]
    assert seen[2] == seen[0]


def run_of(**changes):
    return parse(Run, {"task": "sentiment_movie", "methods": [{"kind": "black_box"}], **changes}, "test")


def test_what_cma_es_cannot_search_is_refused():
    model = tiny.model()
    LoRA(rank=2).attach(model, tiny.key(0), CONTEXT)
    BlackBox(length=3, dimensions=7).attach(model, tiny.key(0), CONTEXT)
    with pytest.raises(UserError, match=r"optimizer: cma_es alternates .*; expected equal ones; set alternate"):
        CMAES(alternate=True).search(leaves(model))
    large = tiny.model(prompt=400)
    with pytest.raises(UserError, match=r"cma_es over 6,400 numbers .*; expected at most 5,000; use the method black"):
        CMAES().search(leaves(large))
    with pytest.raises(UserError, match=r"greedy_words searches words, and prompt.rows train; expected .*hard"):
        gradient_free.GreedyWords().search(leaves(tiny.model(prompt=2)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"clip_norm": 1.0}, "optimizer cma_es has no gradients; expected no clip_norm or schedule"),
        ({"schedule": {"warmup_steps": 5}}, "has no gradients"),
        (
            {"methods": [{"kind": "hard"}], "optimizer": {"kind": "greedy_words", "max_calls": 20_000}, "steps": 1000},
            "greedy_words needs 32,000 calls for 1,000 steps; expected at most max_calls 20,000; set fewer steps",
        ),
        (
            {"optimizer": {"kind": "cma_es", "max_calls": 99}, "steps": 5},
            "cma_es needs 100 calls for 5 steps; expected",
        ),
        ({"methods": [{"kind": "hard", "template": "no place"}]}, "expected words and {text} once, such as"),
        ({"methods": [{"kind": "hard", "template": "{text}"}]}, "expected words and {text} once"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, expected):
    with pytest.raises(UserError) as refused:
        run_of(**changes)
    assert expected in str(refused.value)


def test_the_method_brings_its_optimizer_and_a_run_may_state_another():
    assert run_of().optimizer == CMAES()
    assert run_of(optimizer={"kind": "adamw", "learning_rate": 0.1}).optimizer.kind == "adamw"
    assert run_of(methods=[{"kind": "lora"}]).optimizer.kind == "adamw"


# ---------------------------------------------------------------------------------------------- methods


def test_the_subspace_has_the_size_of_the_words_and_becomes_plain_rows():
    model = tiny.model()
    BlackBox(length=3, dimensions=400, scale=0.5).attach(model, tiny.key(0), CONTEXT)
    start = np.asarray(model.prompt.table())
    numbers = model.prompt.subspace.numbers
    assert set(leaves(model)) == {"prompt.subspace.numbers"}
    numbers[...] = jax.random.normal(tiny.key(1), numbers.shape)
    moved = np.asarray(model.prompt.table())
    assert np.sqrt(np.mean((moved - start) ** 2) / np.mean(start**2)) == pytest.approx(0.5, rel=0.3)
    np.testing.assert_array_equal(finish(model).prompt.rows[...], moved)


@pytest.mark.slow
def test_a_deep_one_becomes_the_rows_of_p_tuning_v2():
    method = BlackBox(length=3, dimensions=5, deep=True)
    model = tiny.model()
    method.attach(model, tiny.key(0), CONTEXT)
    numbers = model.encoder.deep.subspace.numbers
    assert numbers.shape == (1, 5)
    numbers[...] = numbers[...] + 1
    other = tiny.model()
    method.finished().attach(other, tiny.key(1), CONTEXT)
    assert set(leaves(finish(model))) == set(leaves(other))
    batch = tiny.batch(prompt=3)
    np.testing.assert_allclose(tiny.forward(finish(model), batch), tiny.forward(model, batch), atol=1e-5)


def test_a_template_reads_as_if_its_words_were_part_of_the_text():
    model, plain = tiny.model(), tiny.model()
    Hard(template="aaa {text} it was").attach(model, tiny.key(0), CONTEXT)
    ids = [8, 7, 8]
    np.testing.assert_array_equal(model.prompt.table(), np.asarray(plain.embedding[...])[ids])
    layout = model.prompt.layout
    assert (len(layout.before[0]), len(layout.after[0])) == (1, 2)
    batch = tiny.batch(rows=2)
    text = np.asarray(batch["encoder_tokens"])

    def around(before, after):
        rows = [[*before, *row[row > 1], *after, 1] for row in text]
        width = max(map(len, rows))
        return batch | {"encoder_tokens": jnp.asarray([row + [0] * (width - len(row)) for row in rows], jnp.int32)}

    found = tiny.forward(model, around(layout.before[0], layout.after[0]))
    np.testing.assert_allclose(found, tiny.forward(plain, around(ids[:1], ids[1:])), atol=1e-5)
    assert model.prompt.template(model, lambda ids: " ".join(map(str, ids))) == "8 {text} 7 8"


# ---------------------------------------------------------------------------------------------- models of others


def test_rows_are_tuned_through_scores_of_a_model_nobody_sees():
    target = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    seen = []

    def score(rows, batch):
        seen.append((rows.shape, rows.dtype, batch))
        return -np.sum((rows - target) ** 2, (1, 2))

    start = np.ones((2, 4), np.float32)
    found = tune_rows(score, start, range(60), CMAES(population=10), dimensions=16)
    assert seen[0] == ((10, 2, 4), np.float32, 0)
    assert (len(seen), found.calls) == (60, 600)
    assert np.sum((found.best - target) ** 2) < 0.05 * np.sum((start - target) ** 2)
    again = tune_rows(score, start, range(60), CMAES(population=10), dimensions=16)
    np.testing.assert_array_equal(found.best, again.best)
    with pytest.raises(UserError, match=r"returned shape \[2, 4\]; expected \[20\], a number for each"):
        tune_rows(lambda rows, batch: rows[0], start, [0])
    with pytest.raises(UserError, match="max_calls None and the batches allow no generation of 20"):
        tune_rows(score, start, [])
    assert tune_rows(score, start, range(60), CMAES(population=10, max_calls=35), dimensions=16).calls == 30
    with pytest.raises(UserError, match="alternate is for the layers of a deep prompt"):
        tune_rows(score, start, [0], CMAES(alternate=True))
    with pytest.raises(UserError, match=r"score\(rows, batch\): returned a number that is none"):
        tune_rows(lambda rows, batch: np.full(len(rows), np.nan), start, [0])


def test_words_are_searched_with_counted_calls_and_a_cap():
    wanted, calls = {"is", "it", "good"}, []

    def score(text, batch):
        calls.append(text)
        assert "{text}" in text
        return len(wanted & set(text.split()))

    words = ["a", "is", "it", "good", "mill", "tea"]
    found = search_words(score, "x {text} y z", words, range(20), candidates=6)
    assert set(found.best.split()) == {"{text}", *wanted}
    assert found.best.split()[1] == "{text}"
    assert (found.score, found.calls) == (3.0, len(calls))
    calls.clear()
    assert search_words(score, "x {text} y", words, range(20), candidates=6, max_calls=20).calls == len(calls) == 14
    with pytest.raises(UserError, match="max_calls 3 and the batches allow no round of 7 calls"):
        search_words(score, "x {text}", words, range(20), candidates=6, max_calls=3)
    with pytest.raises(UserError, match=r"expected words and \{text\} once"):
        search_words(score, "x y", words, [0])
    phrases = search_words(score, "x {text} y z", ["it is good", "tea"], range(9), candidates=2)
    assert "{text}" in phrases.best
    assert phrases.score == 3.0
    with pytest.raises(UserError, match=r"score\(text, batch\): returned a number that is none"):
        search_words(lambda text, batch: float("nan"), "x {text}", words, [0])
    assert words_of("a {text} b") == ["a", "{text}", "b"]


# ---------------------------------------------------------------------------------------------- whole runs


SEARCHED = [
    ({"kind": "black_box", "length": 3, "dimensions": 10}, {"kind": "cma_es", "population": 8}, 24),
    ({"kind": "black_box", "length": 2, "dimensions": 6, "deep": True}, {"kind": "cma_es", "alternate": True}, 3),
    ({"kind": "hard", "template": "the {text} rude"}, {"kind": "greedy_words", "candidates": 9}, 6),
    ({"kind": "hard", "template": "{text} yes no"}, {"kind": "none"}, 1),
]


def searched(small, method, optimizer, steps):
    quick = {"evaluate_every": max(1, steps // 2), "checkpoint_every": max(1, steps // 2), "log_every": 1}
    return parse(Run, small.short | quick | {"methods": [method], "optimizer": optimizer, "steps": steps}, "test")


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("method", "optimizer", "steps"),
    [
        pytest.param(*each, id=f"{each[0]['kind']} {each[1]['kind']}", marks=[pytest.mark.slow] if slow else [])
        for each, slow in zip(SEARCHED, (True, True, False, True), strict=True)  # the first runs below, too
    ],
)
def test_a_run_without_gradients_is_a_run_like_any_other(small, tmp_path, method, optimizer, steps):
    run = searched(small, method, optimizer, steps)
    result = softprompt_jax.train(run, tmp_path / "run")
    assert (
        result["calls"]
        == steps * {"cma_es": optimizer.get("population", 20), "greedy_words": 10, "none": 1}[run.optimizer.kind]
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == steps
    if method.get("deep") is None and steps > 1:
        assert losses[-1] < losses[0]
    predictor = load_predictor(tmp_path / "run")
    assert len(predictor.texts(["the garden is warm today"])) == 1
    if method["kind"] == "hard":
        assert result["template"].count("{text}") == 1
        assert (result["template"] == method["template"]) == (run.optimizer.kind == "none")
    if not method.get("deep"):
        rows = softprompt_jax.load_prompt(tmp_path / "run")
        np.testing.assert_array_equal(rows, predictor.model.prompt.table())


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("each", [SEARCHED[0], pytest.param(SEARCHED[2], marks=pytest.mark.slow)], ids=["cma", "words"])
def test_an_interrupted_search_goes_on_to_the_same_bits(small, tmp_path, monkeypatch, each):
    from softprompt_jax.training.loop import RunData

    run, whole = searched(small, *each[:2], 6), tmp_path / "whole"
    softprompt_jax.train(run, whole)
    validate, left = RunData.validate, [2]

    def failing(self, *arguments):
        left[0] -= 1
        if left[0] < 0:  # the start and step 3 are scored, step 6 is not
            raise KeyboardInterrupt
        return validate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunData, "validate", failing)
        with pytest.raises(KeyboardInterrupt):
            softprompt_jax.train(run, tmp_path / "cut")
    assert not (tmp_path / "cut" / "result.json").exists()
    softprompt_jax.train(run, tmp_path / "cut")
    for name in ("trained.safetensors", "prompt.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes()
