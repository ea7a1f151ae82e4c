"""Ensembles: one pass equals one prompt at a time, votes and means are what they say, misuse is one line."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt_jax import PromptBank, load_predictor, train
from softprompt_jax.checkpoints.artifact import load_artifact, load_prompt, save_prompt
from softprompt_jax.config import UserError, parse
from softprompt_jax.inference.ensemble import Ensemble, EnsembleAnswers, ensemble
from softprompt_jax.models import decode
from softprompt_jax.models.quantized import quantization_of
from softprompt_jax.run import Run
from softprompt_jax.tasks import load


@pytest.fixture(scope="module")
def prompts(prompt_run, tmp_path_factory):
    """Return three prompt files of unlike rows and lengths that give unlike answers."""
    folder = tmp_path_factory.mktemp("prompts")
    found = load_artifact(prompt_run)
    rows, metadata = found.prompt, found.metadata
    draw = np.random.default_rng(0)
    for name, length in (("a", 3), ("b", 3), ("c", 2)):
        noise = draw.normal(size=rows[:length].shape).astype(np.float32)
        save_prompt(rows[:length] + 2 * noise, folder / f"{name}.safetensors", metadata)
    return [folder / f"{name}.safetensors" for name in "abc"]


@pytest.fixture(scope="module")
def joined(prompts):
    return Ensemble(prompts)


@pytest.fixture(scope="module")
def found(joined):
    return joined.answers(load(joined.task, "test"))


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_one_pass_gives_the_answers_of_each_prompt_alone(prompts, joined, found):
    texts = [example.input for example in load(joined.task, "test")]
    alone = [load_predictor(path).texts(texts) for path in (prompts[0], prompts[2])]
    assert any(len(set(answers)) > 1 for answers in found.predicted)
    assert found.of(0) == alone[0]
    assert found.of(2) == alone[1]  # the short one, which is filled with padding


@pytest.mark.slow
def test_log_probabilities_are_those_of_each_prompt_alone(prompts, joined, found):
    assert found.log_probabilities.shape == (16, 3, 2)
    assert found.candidates == [["yes", "no"]] * 16
    model = load_predictor(prompts[2]).model  # the short one
    words = jnp.asarray([[*joined.bank.tokenizer.encode(word), 1] for word in ("yes", "no")])
    tokens = np.zeros((16, 20), np.int32)
    for row, example in zip(tokens, load(joined.task, "test"), strict=True):
        ids = model.prompt.layout.around([*joined.bank.tokenizer.encode(example.input), 1])
        row[: len(ids)] = ids
    expected = jax.jit(lambda tokens: decode.score_words(model, tokens, words))(tokens)
    np.testing.assert_allclose(found.log_probabilities[:, 2], expected, rtol=1e-4, atol=1e-4)


def test_free_text_is_voted_on_among_what_the_prompts_say(joined, found):
    free = joined.task.model_copy(update={"label_words": None, "target": "{label}"})
    if free.words is not None:
        pytest.fail("the task still has label words")
    answers = joined.answers(load(joined.task, "test")[:4], free)
    for texts, candidates, scores in zip(answers.predicted, answers.candidates, answers.log_probabilities, strict=True):
        assert candidates == list(dict.fromkeys(texts))
        assert (scores[:, len(candidates) :] < -1e8).all()
        assert (scores[:, : len(candidates)] > -1e8).all()
    labels = found.log_probabilities[:4]  # what a prompt says is scored as the same label word is
    for index, (texts, row) in enumerate(zip(answers.candidates, answers.log_probabilities, strict=True)):
        for place, text in enumerate(texts):
            if text in ("yes", "no"):
                np.testing.assert_allclose(row[:, place], labels[index, :, ("yes", "no").index(text)], rtol=1e-4)


def test_prompts_of_unlike_places_vote_together(prompts, found, joined, tmp_path):
    rows = load_artifact(prompts[0])
    for place, length in (("after", 3), ("both", 1)):
        path = tmp_path / f"{place}.safetensors"
        save_prompt(rows.prompt[: 2 * length if place == "both" else length], path, rows.metadata | {"place": place})
    files = [prompts[0], tmp_path / "after.safetensors", tmp_path / "both.safetensors"]
    answers = Ensemble(files).answers(load(joined.task, "test"))
    np.testing.assert_allclose(answers.log_probabilities[:, 0], found.log_probabilities[:, 0], rtol=1e-4, atol=1e-5)
    for number in (1, 2):
        apart = Ensemble([files[number], prompts[1]]).answers(load(joined.task, "test"))
        np.testing.assert_allclose(
            answers.log_probabilities[:, number], apart.log_probabilities[:, 0], rtol=1e-4, atol=1e-5
        )


def test_votes_and_means():
    scores = np.log(
        np.array([[[0.6, 0.4], [0.6, 0.4], [0.01, 0.99]], [[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]], np.float32)
    )
    answers = EnsembleAnswers([["no", "no", "yes"], ["no", "yes", "other"]], [["no", "yes"]] * 2, scores)
    assert answers.vote() == ["no", "no"]  # the majority; of equally many the likelier
    assert answers.likeliest() == ["yes", "no"]  # one prompt that is sure outweighs two that are not
    assert answers.of(2) == ["yes", "other"]


def test_scores_have_average_best_and_both_ensembles_with_their_sd(prompts, found, joined):
    result = ensemble(prompts, split="test")
    own = [line["accuracy"] for line in result["prompts"]]
    assert [line["source"] for line in result["prompts"]] == [str(path) for path in prompts]
    assert result["average"]["accuracy"] == {
        "value": pytest.approx(np.mean(own)),
        "sd": pytest.approx(np.std(own, ddof=1)),
    }
    assert result["best"]["accuracy"]["value"] == max(own)
    targets = [example.target for example in load(joined.task, "test")]
    for name, texts in (("vote", found.vote()), ("log_probability", found.likeliest())):
        share = np.mean([text == target for text, target in zip(texts, targets, strict=True)])
        assert result[name]["accuracy"]["value"] == share
        # The bootstrap's sd of a share is sqrt(p (1 - p) / n), up to the noise of 200 samples.
        assert result[name]["accuracy"]["sd"] == pytest.approx((share * (1 - share) / 16) ** 0.5, rel=0.25, abs=1e-6)


def test_command_prints_a_table_and_json_on_request(softprompt, prompts):
    command = "ensemble", *prompts[:2], "--split", "test"
    code, out, err = softprompt(*command)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["average", "best", "vote", "log_probability"]
    assert all("±" in line and line.endswith("(sd)") for line in out.splitlines())
    assert json.loads(softprompt(*command, "--json")[1])["count"] == 16


def test_what_is_no_ensemble_is_one_line(prompts, prompt_run, full_run, tmp_path):
    found = load_artifact(prompt_run)
    rows, metadata = found.prompt, found.metadata
    other = tmp_path / "other.safetensors"

    def refused(*sources) -> str:
        with pytest.raises(UserError) as error:
            Ensemble(sources)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "found 1 prompt; expected two or more" in refused(prompts[0])
    assert "found a prompt twice" in refused(prompts[0], prompts[0])
    assert "full changes the model for every text" in refused(prompts[0], full_run)
    save_prompt(rows, other, metadata | {"task": "spam"})
    assert "trained on task spam (spam)" in refused(prompts[0], other)
    save_prompt(rows, other, metadata | {"fingerprint": "0" * 16, "backbone": "t5"})
    assert "expected one backbone for all" in refused(prompts[0], other)
    for name in "xy":
        np.save(tmp_path / f"{name}.npy", load_prompt(prompt_run))
    assert "says no backbone; expected one" in refused(tmp_path / "x.npy", tmp_path / "y.npy")
    with pytest.raises(UserError, match="says no task; expected one; add --task NAME"):
        ensemble([tmp_path / "x.npy", tmp_path / "y.npy"], backbone=metadata["backbone"])


def test_backbone_is_kept_as_the_runs_had_it(prompts, tmp_path):
    sources = []
    for path in prompts[:2]:
        found = load_artifact(path)
        rows, metadata = found.prompt, found.metadata
        settings = json.dumps(json.loads(metadata["settings"]) | {"quantize": "int8"})
        sources.append(tmp_path / path.name)
        save_prompt(rows, sources[-1], metadata | {"settings": settings})
    joined = Ensemble(sources)
    assert quantization_of(joined.bank.backbone.model) == "int8"


def test_words_are_scored_behind_the_sentinel_that_answers_begin_with(small, tmp_path):
    for seed in range(2):
        settings = small.short | {"target_sentinel": True, "steps": 2, "seed": seed}
        train(parse(Run, settings, "test"), tmp_path / str(seed))
    joined = Ensemble([tmp_path / "0", tmp_path / "1"])
    assert joined.bank.word_ids(joined.members[0].source, "yes")[0] == joined.bank.tokenizer.sentinel(0)
    assert joined.bank.word_ids(joined.members[0].source, "yes")[1:] == [
        *joined.bank.tokenizer.encode("yes"),
        joined.bank.tokenizer.eos_id,
    ]
    bank = PromptBank.open(tmp_path)
    assert bank.prompt("0").target_sentinel
