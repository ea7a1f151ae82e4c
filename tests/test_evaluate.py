"""Evaluation is exact: every example counts once, whatever the batch size, and a saved run scores as it did."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import yaml

from softprompt_jax import load_predictor
from softprompt_jax.assembly import assemble
from softprompt_jax.config import UserError, parse
from softprompt_jax.data.batches import evaluation_batches
from softprompt_jax.data.tokenized import tokenize
from softprompt_jax.inference.evaluate import (
    benchmark_average,
    mean_loss,
    mean_score,
    run_score,
    score_factor,
    score_text,
)
from softprompt_jax.methods import split
from softprompt_jax.optim.losses import cross_entropy
from softprompt_jax.run import Run
from softprompt_jax.tasks import Example, load, resolve
from softprompt_jax.training.run_data import RunData

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def predictor(full_run):
    return load_predictor(full_run)


@pytest.fixture(scope="module")
def tokenized(predictor):
    return tokenize(load(predictor.task, "train"), predictor.tokenizer, predictor.model.settings.vocabulary_rows, 12, 4)


@pytest.mark.parametrize("split_name", ["validation", "test"])
def test_saved_run_scores_as_its_result_says(predictor, full_run, split_name):
    result = json.loads((full_run / "result.json").read_text())
    assert predictor.evaluate(predictor.task, split_name) == result[split_name]


def test_saved_prompt_scores_as_its_result_says(prompt_run):
    result = json.loads((prompt_run / "result.json").read_text())
    predictor = load_predictor(prompt_run / "prompt.safetensors")
    assert predictor.evaluate(predictor.task, "validation") == result["validation"]


@pytest.mark.parametrize("batch_size", [7, 100])
def test_padded_last_batch_counts_every_example_once(predictor, batch_size):
    examples = load(predictor.task, "train")  # 64 = 9 * 7 + 1
    scores = dataclasses.replace(predictor, batch_size=batch_size).evaluate(predictor.task, "train")
    answers = [predictor.texts([example.input])[0] for example in examples[:9]]
    assert dataclasses.replace(predictor, batch_size=batch_size).texts([e.input for e in examples])[:9] == answers
    assert scores == predictor.evaluate(predictor.task, "train")
    assert scores["count"] == 64


@pytest.mark.slow
def test_mean_loss_weighs_tokens_not_batches(predictor, tokenized):
    parts = split(predictor.model)
    batches = [batch for batch, _ in evaluation_batches(tokenized, 24)]  # the last has 16 real rows
    found = mean_loss(parts, batches)(parts.trainable, parts.frozen)
    (whole,) = (batch for batch, _ in evaluation_batches(tokenized, 64))
    loss, weight = cross_entropy(
        predictor.model(jax.tree.map(jnp.asarray, whole)), jnp.asarray(whole["decoder_targets"])
    )
    assert weight == 128
    assert found == pytest.approx(float(loss / weight), rel=1e-5)


def test_checkpoints_are_compared_by_the_mean_of_the_metrics(predictor):
    task = predictor.task.model_copy(update={"metrics": ["accuracy", "f1"]})
    assert mean_score(task, {"accuracy": 0.5, "f1": 1.0, "illegal": 0.0, "count": 9}) == 0.75


@pytest.mark.parametrize(
    ("changes", "scores", "expected"),
    [
        ({}, {"accuracy": 0.5, "illegal": 0.0, "count": 9, "loss": 2.0}, "50.0"),
        ({"metrics": ["accuracy", "f1"]}, {"accuracy": 0.5, "f1": 1.0, "loss": 2.0}, "75.0"),
    ],
)
def test_a_score_is_the_mean_of_the_metrics_in_percent(small, changes, scores, expected):
    run = parse(Run, small.short | {"task": small.task | changes}, "test")
    assert score_text(run_score(run, scores), score_factor(run)) == expected


WORDS = ["yes", "no", "the garden is bright", "messy today"]  # of 2, 2, 5 and 3 tokens with EOS


@pytest.fixture(scope="module")
def likelihoods(predictor):
    """Return 20 texts, the log-probability of each word after each of them, and the words' lengths."""
    texts = [example.input for example in load(predictor.task, "train")][:20]
    table, lengths = [], []
    for word in WORDS:
        examples = [Example(text, word) for text in texts]
        one = tokenize(examples, predictor.tokenizer, predictor.model.settings.vocabulary_rows, 12, 8)
        ((batch, ids),) = evaluation_batches(one, len(texts), shapes=[(12, 8)])
        log_p = jax.nn.log_softmax(tiny.forward(predictor.model, batch))
        picked = jnp.take_along_axis(log_p, batch["decoder_targets"][..., None], -1)[..., 0]
        table.append((picked * (batch["decoder_targets"] != 0)).sum(-1)[np.argsort(ids)])
        lengths.append(int(one.target_lengths[0]))
    return texts, np.stack(table), np.asarray(lengths)


@pytest.mark.parametrize("predict_by", ["likelihood", "likelihood_per_token"])
def test_likelihood_chooses_the_best_label_word(predictor, likelihoods, predict_by):
    texts, table, lengths = likelihoods
    task = predictor.task.model_copy(update={"label_words": WORDS, "predict_by": predict_by})
    answers = dataclasses.replace(predictor, task=task)._answers([Example(text, "") for text in texts], task)
    found = [answer.text for (answer,) in answers]
    scores = table if predict_by == "likelihood" else table / lengths[:, None]
    assert lengths.tolist() == [2, 2, 5, 3]
    assert found == [WORDS[i] for i in np.argmax(scores, 0)]
    assert {"yes", "no"} <= set(found)  # the run has learnt the task
    log_p = [table[WORDS.index(answer.text), number] for number, (answer,) in enumerate(answers)]
    np.testing.assert_allclose([answer.score for (answer,) in answers], log_p, rtol=1e-4)
    assert [answer.ids for (answer,) in answers] == [[*predictor.tokenizer.encode(word), 1] for word in found]


def test_likelihood_needs_label_words_and_leaves_nothing_illegal(prompt_run):
    predictor = load_predictor(prompt_run)
    task = predictor.task.model_copy(update={"predict_by": "likelihood"})
    assert predictor.evaluate(task, "validation")["illegal"] == 0.0
    with pytest.raises(
        UserError, match="predict_by: found 'likelihood'; this chooses among label words; expected label_words"
    ):
        resolve({**task.model_dump(), "label_words": None})


def test_an_average_leaves_out_what_was_only_trained_on(prompt_run, tmp_path):
    settings = yaml.safe_load((prompt_run / "config.yaml").read_text())
    known = [{"name": name, "source": settings["task"]["source"]} for name in ("boolq", "dpr")]
    settings["task"] = {"kind": "mixture", "tasks": known}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "result.json").write_text(
        json.dumps({"validation": {"mean": 0.5, "tasks": {"boolq": {"accuracy": 0.5}}}})
    )
    with pytest.raises(UserError, match="superglue"):  # and tells what is missing
        benchmark_average("superglue", [tmp_path])


@pytest.mark.usefixtures("own_cache")
def test_free_text_is_decoded_as_far_as_the_run_allows_and_label_words_as_far_as_the_longest(small):
    def longest(task):
        run = parse(Run, small.short | {"task": task}, "test")
        assembly = assemble(run)
        return RunData(run, assembly, split(assembly.model))._longest

    assert longest(small.task) == 2
    assert longest({name: value for name, value in small.task.items() if name != "label_words"}) == 4
