"""Several tasks in one run: how often each is drawn, whose prompt it gets, and what the run leaves of each."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import jax
import numpy as np
import pytest
from small_runs import write_config, write_rows
from test_batches import ROWS, Letters, some_examples

import softprompt_jax
from softprompt_jax import Run, load_predictor, load_prompt
from softprompt_jax.config import UserError, parse
from softprompt_jax.data.batches import TrainBatches
from softprompt_jax.data.packing import Packing
from softprompt_jax.data.prompt_layout import PromptLayout
from softprompt_jax.data.tokenized import concatenate, tokenize
from softprompt_jax.inference.predictor import named_task
from softprompt_jax.methods import Context, Prompt
from softprompt_jax.methods.trainable import leaves
from softprompt_jax.progress import Reporter
from softprompt_jax.tasks.mixture import Equal, Mixture, Proportional, Temperature, draw_mixture

pytestmark = pytest.mark.usefixtures("own_cache")

# --------------------------------------------------------------------------------------------- rates


def test_rates_are_t5s():
    counts = [100, 900, 3000]
    np.testing.assert_allclose(Equal().rates(counts), [1 / 3] * 3)
    np.testing.assert_allclose(Proportional().rates(counts), [0.025, 0.225, 0.75])
    np.testing.assert_allclose(Proportional(limit=1000).rates(counts), [0.05, 0.45, 0.5])
    np.testing.assert_allclose(Temperature(temperature=1).rates(counts), Proportional().rates(counts))
    np.testing.assert_allclose(Temperature(temperature=2, limit=900).rates(counts), np.array([1, 3, 3]) / 7)
    np.testing.assert_allclose(Temperature(temperature=1e9).rates(counts), Equal().rates(counts), atol=1e-6)


def by_task(ids: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    bounds = np.cumsum([0, *counts])
    return [ids[(ids >= low) & (ids < high)] - low for low, high in itertools.pairwise(bounds)]


def test_every_epoch_keeps_the_rates_and_each_task_goes_through_its_examples_evenly():
    counts, rates = [7, 50, 30], np.array([0.4, 0.35, 0.25])
    draw = draw_mixture(counts, rates, seed=1)
    seen = [Counter() for _ in counts]
    for epoch in range(9):
        parts = by_task(draw(epoch, np.random.default_rng(epoch)), counts)
        assert sum(map(len, parts)) == 87
        assert [len(part) for part in parts] == pytest.approx(rates * 87, abs=1)
        for counter, part, count in zip(seen, parts, counts, strict=True):
            counter.update(part.tolist())
            # So far each example was drawn as often as any other, or once more.
            assert max(counter.values()) - min(counter[i] for i in range(count)) <= 1


def test_draws_are_pure_shuffled_and_as_many_as_a_batch_needs():
    counts, rates = [3, 2], np.array([0.5, 0.5])
    draw = draw_mixture(counts, rates, seed=1, at_least=40)
    first = draw(2, np.random.default_rng(0))
    assert len(first) == 40
    np.testing.assert_array_equal(first, draw_mixture(counts, rates, 1, 40)(2, np.random.default_rng(0)))
    assert (first != draw(3, np.random.default_rng(0))).any()
    assert (np.diff(first < 3) != 0).sum() > 8  # not one task after the other
    rare = draw_mixture([5, 5000], np.array([1e-6, 1 - 1e-6]), seed=0)
    assert len(by_task(rare(0, np.random.default_rng(0)), [5, 5000])[0]) == 1


@pytest.mark.parametrize("packing", [None, Packing(length=48)])
def test_multihost_share_a_mixtures_batches_and_every_example_meets_its_own_prompt(packing):
    sets = [tokenize(some_examples(count, seed=count), Letters(), ROWS, 30, 8) for count in (30, 90)]
    layout = PromptLayout(ROWS + np.arange(6).reshape(2, 3))
    options = {"packing": packing, "draw": draw_mixture([30, 90], np.array([0.5, 0.5]), 1)}
    tokens = concatenate(sets)
    whole = TrainBatches(tokens, 16, 1, layout, rows_multiple=2, **options)
    parts = [TrainBatches(tokens, 16, 1, layout, process_index=i, process_count=2, **options) for i in range(2)]
    drawn = Counter()
    for step in range(4 * whole.batches_per_epoch):
        batch = whole.batch(step)
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part.batch(step)[name] for part in parts]), array)
        for row, ids in enumerate(whole.row_ids(step)):
            found = batch["encoder_tokens"][row]
            expected = np.concatenate([layout.around(tokens.input(index), int(index >= 30)) for index in ids])
            np.testing.assert_array_equal(found[: len(expected)], expected)
            drawn.update((ids >= 30).tolist())
    assert drawn[True] / drawn.total() == pytest.approx(0.5, abs=0.08)


# ----------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def mixture(small, tmp_path_factory):
    """Two tasks of unlike size, label words and template; the second has no test split."""
    rows = [json.loads(line) for line in (small.folder / "train.jsonl").read_text().splitlines()]
    folder = tmp_path_factory.mktemp("mixture")
    turned = [{"sentence": row["text"], "mood": int(row["label"] == "yes")} for row in rows]
    parts = {"train": turned[:40], "validation": turned[40:56]}
    source = {
        "kind": "files",
        **{name: str(write_rows(folder / f"{name}.jsonl", part)) for name, part in parts.items()},
    }
    turned_task = {
        "name": "turned",
        "source": source,
        "input": "{sentence} today",
        "target": {0: "yes", 1: "no"},
        "target_field": "mood",
    }
    return {"kind": "mixture", "name": "both", "tasks": [small.task, turned_task]}


def run_of(settings, **changes) -> Run:
    return parse(Run, settings | changes, "test")


@pytest.fixture(scope="module")
def own_run(small, mixture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "own"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTPROMPT_CACHE", str(folder.parent / "cache"))
        settings = small.short | {"task": mixture | {"prompts": "own"}, "steps": 20, "packing": {"length": 32}}
        softprompt_jax.train(run_of(settings), folder)
    return folder


@pytest.mark.slow
def test_each_task_has_its_own_prompt_file_that_scores_as_the_result_says(own_run):
    result = json.loads((own_run / "result.json").read_text())
    assert set(result["validation"]) == {"mean", "tasks"}
    assert set(result["validation"]["tasks"]) == {"moods", "turned"}
    assert set(result["test"]["tasks"]) == {"moods"}
    assert result["baselines"]["split"] == "validation"
    assert result["baselines"]["majority"] == {"moods": 0.5, "turned": 0.5}
    accuracies = [scores["accuracy"] for scores in result["validation"]["tasks"].values()]
    assert result["validation"]["mean"] == pytest.approx(np.mean(accuracies))
    assert not (own_run / "prompt.safetensors").exists()
    assert {path.name for path in (own_run / "prompts").iterdir()} == {"moods.safetensors", "turned.safetensors"}
    prompts = []
    for name, scores in result["validation"]["tasks"].items():
        predictor = load_predictor(own_run / "prompts" / f"{name}.safetensors")
        assert predictor.task.name == name
        assert predictor.evaluate(predictor.task, "validation") == scores
        prompts.append(load_prompt(own_run / "prompts" / f"{name}.safetensors"))
    assert prompts[0].shape == prompts[1].shape == (3, 16)
    assert (prompts[0] != prompts[1]).any()


def test_metrics_are_those_of_each_task_and_their_mean(own_run):
    lines = [json.loads(line) for line in (own_run / "metrics.jsonl").read_text().splitlines()]
    scored = [line["validation"] for line in lines if "validation" in line]
    assert len(scored) == 3
    for scores in scored:
        assert next(iter(scores)) == "mean"
        assert scores["mean"] == pytest.approx((scores["moods/accuracy"] + scores["turned/accuracy"]) / 2)


def test_a_folder_with_several_prompts_answers_for_the_task_that_is_named(own_run):
    result = json.loads((own_run / "result.json").read_text())
    for name, scores in result["validation"]["tasks"].items():
        task = named_task(own_run, name)
        assert load_predictor(own_run, task=name).evaluate(task, "validation") == scores
    assert named_task(own_run, "spam_sms").name == "spam_sms"


def test_a_folder_with_several_prompts_is_told_in_one_line(own_run):
    message = r"own: has a prompt for each task \(moods, turned\); expected the name of one of them; say which task, or"
    for task in (None, "spam_sms"):
        with pytest.raises(UserError, match=message):
            load_predictor(own_run, task=task)
    with pytest.raises(UserError, match=r"has a prompt for each task \(moods.safetensors, turned.safetensors\); exp"):
        load_prompt(own_run)


@pytest.mark.slow
def test_a_mixture_resumes_to_the_bit(small, mixture, own_run, tmp_path, monkeypatch):
    settings = small.short | {"task": mixture | {"prompts": "own"}, "steps": 20, "packing": {"length": 32}}
    run = run_of(settings)

    class Killed(Exception):
        pass

    def failing(self, step):
        if step == 13:
            raise Killed
        return batch(self, step)

    batch = TrainBatches.batch
    with monkeypatch.context() as patch:
        patch.setattr(TrainBatches, "batch", failing)
        with pytest.raises(Killed):
            softprompt_jax.train(run, tmp_path / "run")
    softprompt_jax.train(run, tmp_path / "run")
    for name in ("trained.safetensors", "prompts/moods.safetensors", "prompts/turned.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (own_run / name).read_bytes()


@pytest.mark.slow
def test_one_shared_prompt_is_an_ordinary_prompt(small, mixture, tmp_path):
    rates = {"kind": "temperature", "temperature": 2}
    settings = small.short | {
        "task": mixture | {"rates": rates},
        "steps": 5,
        "methods": [{"kind": "prompt", "length": 4}],
    }
    result = softprompt_jax.train(run_of(settings), tmp_path / "run")
    assert load_prompt(tmp_path / "run").shape == (4, 16)
    predictor = load_predictor(tmp_path / "run")
    assert predictor.task is None
    for task in run_of(settings).tasks:
        assert predictor.evaluate(task, "validation") == result["validation"]["tasks"][task.name]


# ------------------------------------------------------------------------------------------- prompts


def test_prompts_of_a_mixture_start_from_their_tasks_label_words_and_are_weights_of_their_own():
    import tiny

    model = tiny.model()
    words = (("a", "b"), ("c",))
    context = Context(lambda text: [ord(letter) - 90 for letter in text], words_by_task=words)
    Prompt(length=3).attach(model, jax.random.key(0), context)
    rows, table = np.asarray(model.prompt.rows[...]), np.asarray(model.embedding[...])
    assert rows.shape == (2, 3, 16)
    np.testing.assert_array_equal(rows[0][:2], table[[7, 8]])
    np.testing.assert_array_equal(rows[1][:1], table[[9]])
    assert (rows[0][2] != rows[1][2]).any()
    assert leaves(model)["prompt.rows"].stacked
    first = tiny.ROWS
    assert model.prompt.layout.before.tolist() == [[first, first + 1, first + 2], [first + 3, first + 4, first + 5]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "task.tasks: found []; list should have at least 1 item"),
        ({"tasks": ["sentiment_moovie"]}, "task.tasks.0: found 'sentiment_moovie'; expected one of "),
        ({"tasks": ["spam_sms", "spam_sms"]}, "the name 'spam_sms' stands twice; expected a name for each task"),
        ({"rates": "even"}, "task.rates: found {'kind': 'even'}; "),
        ({"rates": {"kind": "temperature", "temperature": 0}}, "task.rates.temperature: found 0; input should be"),
        ({"prompts": "each"}, "task.prompts: found 'each'; input should be 'shared' or 'own'"),
        ({"rate": "equal"}, "task.rate: unknown setting; expected one of kind, name, tasks, rates, prompts; did you"),
    ],
)
def test_mixture_that_does_not_fit_is_one_line(small, mixture, changes, message):
    with pytest.raises(UserError) as error:
        run_of(small.short, task=mixture | changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_own_prompts_need_a_method_that_has_them(small, mixture, tmp_path):
    settings = small.full | {"task": mixture | {"prompts": "own"}}
    with pytest.raises(UserError, match=r"^task.prompts: own, but no method gives each of the 2 tasks a prompt; expec"):
        softprompt_jax.train(run_of(settings), tmp_path / "run")


def test_empty_train_split_of_one_task_is_told(small, mixture, tmp_path):
    source = mixture["tasks"][1]["source"] | {"train": str(write_rows(tmp_path / "none.jsonl", []))}
    tasks = [small.task, mixture["tasks"][1] | {"source": source}]
    with pytest.raises(UserError, match=r"^task turned: split 'train' is empty; expected at least one example; check"):
        softprompt_jax.train(run_of(small.short, task=mixture | {"tasks": tasks}), tmp_path / "run")


def test_a_task_without_validation_is_trained_on_and_not_scored(small, mixture, tmp_path, capsys):
    turned = mixture["tasks"][1]
    source = turned["source"] | {"validation": None, "test": turned["source"]["validation"]}
    only_trained = turned | {"source": source}
    run = run_of(small.short, task=mixture | {"tasks": [small.task, only_trained]}, steps=2)
    result = softprompt_jax.train(run, tmp_path / "run", Reporter())
    assert set(result["validation"]["tasks"]) == set(result["test"]["tasks"]) == {"moods"}
    assert (result["baselines"]["split"], result["baselines"]["majority"]) == ("test", {"moods": 0.5})
    assert "task turned: train 40 (no validation split: trained on, not scored)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^task both: none of its tasks has a validation split; expected one that has"):
        softprompt_jax.train(run_of(small.short, task=mixture | {"tasks": [only_trained]}), tmp_path / "none")


def test_mixture_as_yaml_is_the_same_run(small, mixture, tmp_path):
    run = run_of(small.short, task=mixture | {"tasks": ["spam_sms", mixture["tasks"][1]], "rates": "proportional"})
    path = write_config(tmp_path / "a.yaml", run.model_dump(mode="json"))
    assert softprompt_jax.load_run(path) == run
    assert isinstance(run.task, Mixture)
    assert [task.name for task in run.tasks] == ["spam_sms", "turned"]
