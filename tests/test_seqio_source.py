"""A seqio Task runs with its own preprocessors, lengths, postprocessor and metrics; what cannot is told in a line."""

from __future__ import annotations

import itertools
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from seqio_module import MODULE, NAME

from softprompt_jax import Run, load_prompt, load_run, tasks, train
from softprompt_jax.assembly import layout_of
from softprompt_jax.checkpoints.backbone import EMBEDDED
from softprompt_jax.config import UserError, parse
from softprompt_jax.data.preview import describe
from softprompt_jax.data.seqio_source import Seqio
from softprompt_jax.data.task import Task, iterate
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.inference.evaluate import Batching, score
from softprompt_jax.inference.predictor import load_predictor
from softprompt_jax.models.decode import score_words


def task(name, module=NAME, **settings):
    return tasks.resolve({"kind": "seqio", "name": name, "module": module, **settings})


def error_of(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="session")  # a process imports it once
def module(tmp_path_factory, small):
    pytest.importorskip("seqio")
    folder = tmp_path_factory.mktemp("seqio")
    files = {split: small.task["source"][split] for split in ("train", "validation", "test")}
    own = str(small.backbone / "spiece.model")
    text = MODULE.format(parts=f"{NAME}_parts", own=own, other=str(EMBEDDED / "spiece.model"), files=files)
    (folder / f"{NAME}.py").write_text(text)
    parts = folder / f"{NAME}_parts"
    parts.mkdir()
    for name, text in (
        ("__init__", ""),
        ("words", "from . import deeper\n"),
        ("deeper", "import json\n"),
        ("idle", ""),
    ):
        (parts / f"{name}.py").write_text(text)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def with_seqio(test):
    for mark in (pytest.mark.seqio, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("module")):
        test = mark(test)
    return pytest.mark.usefixtures("own_cache")(test)


def run_of(small, name, **changes) -> Run:
    settings = {"kind": "seqio", "name": name, "module": NAME, "label_words": ["yes", "no"]}
    return parse(Run, small.short | {"task": settings} | changes, "test")


# ------------------------------------------------------------------------------------------- examples


@with_seqio
def test_examples_are_those_of_the_tasks_preprocessors_with_their_ids(small):
    found, tokenizer = tasks.load(task("moods"), "train"), load_tokenizer(small.backbone)
    with open(small.task["source"]["train"]) as lines:
        expected = [json.loads(line) for line in lines]
    assert [(example.input, example.target) for example in found] == [(row["text"], row["label"]) for row in expected]
    assert [example.fields["words"] for example in found] == [len(row["text"].encode()) for row in expected]
    for example in found:
        assert example.ids == tuple([*tokenizer.encode(text), 1] for text in (example.input, example.target))
    assert tasks.splits(task("moods")) == ["train", "validation", "test"]
    doubled = tasks.load(task("doubled"), "test")[0]
    once = tokenizer.encode(doubled.input)
    assert doubled.ids[0] == [*once, *once, 1]
    assert [example.target for example in iterate(task("moods"), "test", labelled=False)] == [""] * 16


@with_seqio
def test_lengths_are_what_the_task_trims_to_and_cuts_are_seen():
    row = next(iterate(task("moods", lengths=[3, 2]), "train"))
    assert (len(row.ids[0]), row.ids[0][-1]) == (3, 1)
    assert row.cut == (True, False)
    row = next(iterate(task("moods"), "train"))
    assert row.cut == (False, False)
    assert len(row.ids[0]) > 3


@with_seqio
def test_an_endless_split_goes_on_from_any_example():
    endless = task("endless")
    assert endless.source.is_endless("train")
    assert not task("moods").source.is_endless("train")
    whole = [(row.input, row.target) for row in itertools.islice(iterate(endless, "train"), 90)]
    rest = itertools.islice(iterate(endless, "train", first=70), 20)
    assert [(row.input, row.target) for row in rest] == whole[70:]
    assert len(set(whole[:64])) < 64  # shuffled over the ends of rounds
    drawn = task("drawn", endless=True)
    ids = [row.ids for row in itertools.islice(iterate(drawn, "train"), 5)]
    assert [row.ids for row in itertools.islice(iterate(drawn, "train"), 5)] == ids
    other = task("drawn", endless=True, seed=1)
    assert [row.ids for row in itertools.islice(iterate(other, "train"), 5)] != ids
    assert drawn.source.is_endless("train")
    assert not drawn.source.is_endless("validation")


# ----------------------------------------------------------------------------------------------- runs


def losses(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@with_seqio
def test_a_run_is_the_run_on_the_same_rows_with_the_tasks_own_scores(small, prompt_run, tmp_path):
    result = train(run_of(small, "moods"), tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(prompt_run), rel=1e-4)  # of the same rows, in files
    expected = json.loads((prompt_run / "result.json").read_text())
    assert result["baselines"]["majority"] == expected["baselines"]["majority"]
    scores = result["test"]
    assert set(scores) == {"right", "likely", "count_of_scores", "illegal", "count"}
    assert scores["count_of_scores"] == scores["count"] == 16
    predictor, found = load_predictor(tmp_path / "run"), tasks.load(task("moods"), "test")
    assert predictor.evaluate(predictor.task, "test") == pytest.approx(scores)
    answers = predictor.texts([example.input for example in found])
    right = np.mean([answer == example.target for answer, example in zip(answers, found, strict=True)])
    assert scores["right"] == pytest.approx(100 * right)
    # The log-probabilities beside those by which label words are chosen.
    words = ["yes", "no"]
    ids = jnp.asarray([[*predictor.tokenizer.encode(word), 1] for word in words], jnp.int32)
    tokens = np.zeros((len(found), 24), np.int32)
    for row, example in zip(tokens, found, strict=True):
        whole = [*predictor.model.prompt.layout.before[0], *example.ids[0]]
        row[: len(whole)] = whole
    each = score_words(predictor.model, jnp.asarray(tokens), ids)
    total = sum(float(each[row, words.index(example.target)]) for row, example in enumerate(found))
    assert scores["likely"] == pytest.approx(total / 16, rel=1e-3)


@with_seqio
def test_a_finite_split_is_gone_through_once_a_start_and_its_ids_are_not_stored(small, tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    starts, whole = [], Seqio.examples

    def counted(self, own, split, *rest):
        found = whole(self, own, split, *rest)
        yield next(found)
        starts.append(split)  # a second example was asked for
        yield from found

    monkeypatch.setattr(Seqio, "examples", counted)
    train(run_of(small, "doubled", steps=1), tmp_path / "run")
    assert sorted(starts) == ["test", "train", "validation"]
    assert not (tmp_path / "cache" / "tokens").exists()
    assert "accuracy" in json.loads((tmp_path / "run" / "result.json").read_text())["test"]  # it has no metrics


@with_seqio
def test_an_endless_run_resumes_to_the_bit(small, tmp_path):
    settings = run_of(small, "endless", steps=10, evaluate_every=5, checkpoint_every=5)
    whole = train(settings, tmp_path / "whole")
    half = settings.model_copy(update={"steps": 5})
    train(half, tmp_path / "parts")
    (tmp_path / "parts" / "result.json").unlink()
    saved = (tmp_path / "parts" / "config.yaml").read_text()
    (tmp_path / "parts" / "config.yaml").write_text(saved.replace("steps: 5", "steps: 10"))
    assert train(settings, tmp_path / "parts")["validation"] == whole["validation"]
    np.testing.assert_array_equal(load_prompt(tmp_path / "parts"), load_prompt(tmp_path / "whole"))
    message = error_of(train, run_of(small, "endless", packing=True), tmp_path / "packed")
    assert "task endless: its train split never ends; expected a finite one in a mixture and for packing" in message


@with_seqio
def test_a_mixture_is_a_mixture_of_its_tasks_at_its_rates(small, tmp_path):
    result = train(run_of(small, "both", steps=2), tmp_path / "run")
    assert set(result["test"]["tasks"]) == {"moods", "doubled"}
    assert "right" in result["test"]["tasks"]["moods"]
    saved = load_run(tmp_path / "run" / "config.yaml").task
    assert {task.name: share for task, share in zip(saved.tasks, saved.rates.shares, strict=True)} == {
        **{"moods": 3.0, "doubled": 1.0}
    }
    assert train(run_of(small, "both", steps=2), tmp_path / "run") == json.loads(
        (tmp_path / "run" / "result.json").read_text()
    )


@with_seqio
@pytest.mark.parametrize("name", ["with_aux", "with_objects"])
def test_metrics_are_what_seqios_own_evaluator_makes_of_the_same_answers(prompt_run, name):
    import seqio

    predictor, mine = load_predictor(prompt_run), task(name, label_words=["yes", "no"])
    tasks.splits(mine)  # which registers it

    class Converter(seqio.EncDecFeatureConverter):  # seqio's own takes these two features and no other
        TASK_FEATURES = seqio.EncDecFeatureConverter.TASK_FEATURES | {
            side: seqio.FeatureConverter.FeatureSpec(dtype=feature.dtype)
            for side, feature in seqio.TaskRegistry.get(name).output_features.items()
        }

    weights, ids = predictor._parts, layout_of(predictor.model)
    for split in ("validation", "test"):  # the same metric objects twice
        examples = tasks.load(mine, split)
        answers = [each[0] for each in predictor._answers(examples, mine)]
        tokens = predictor._tokenized(examples)
        likelihoods = predictor._decoder.likelihoods(weights.trainable, weights.frozen, tokens, Batching(7, 9, ids))
        numbered = [(number, np.asarray([*answer.ids, *[0] * 9][:9])) for number, answer in enumerate(answers)]
        evaluator = seqio.Evaluator(name, Converter(pack=False), split)
        expected = evaluator.evaluate(
            compute_metrics=True,
            predict_fn=lambda _, numbered=numbered: numbered,
            score_fn=lambda _, found=likelihoods: list(enumerate(found)),
            predict_with_aux_fn=lambda _, found=answers, numbered=numbered: (
                numbered,
                {"scores": [answer.score for answer in found]},
            ),
        )
        expected = expected[0].result()[name]
        expected.pop("note", None)
        expected = {key: getattr(value, "value", value) for key, value in expected.items()}
        names = {"with_aux": {"right", "mean_score", "sure"}, "with_objects": {"ended", "weighted", "right", "likely"}}
        assert set(expected) == names[name] | ({"count_of_scores"} if name == "with_objects" else set())
        found = predictor.evaluate(mine, split)
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match="its metrics want log-probabilities; expected an evaluation of one prompt"):
        score(mine, [answer.text for answer in answers], examples)
    texts = task("endless", label_words=["yes", "no"])  # whose metrics want no more than these
    assert score(texts, [answer.text for answer in answers], examples)["right"] == pytest.approx(
        100 * np.mean([answer.text == example.target for answer, example in zip(answers, examples, strict=True)])
    )
    plain = task("moods", metrics=["accuracy"], label_words=["yes", "no"])
    assert score(plain, [answer.text for answer in answers], examples)["count"] == 16


@with_seqio
def test_further_features_reach_the_examples_and_lengths_may_name_them(small):
    found = tasks.load(task("with_objects"), "test")
    assert all(example.fields["weights"].tolist() == example.ids[0][:2] for example in found)
    short = tasks.load(task("with_objects", lengths={"inputs": 6, "targets": 4, "weights": 1}), "test")
    assert all(example.fields["weights"].tolist() == example.ids[0][:1] for example in short)
    assert max(len(example.ids[0]) for example in short) == 6
    with pytest.raises(UserError, match="found lengths of inputs; expected inputs and targets among them"):
        task("with_objects", lengths={"inputs": 6})


@with_seqio
def test_a_task_that_wants_seqios_own_cache_is_read_from_there(module):
    import seqio
    import tensorflow as tf

    assert "does not exist in any of the task cache directories" in error_of(tasks.load, task("cached"), "train")
    rows = [{"inputs": [5, 6, 7], "targets": [8], "words": 3}, {"inputs": [9], "targets": [8, 4], "words": 1}]
    types = {"inputs": ("int32", [None]), "targets": ("int32", [None]), "words": ("int32", [])}
    folder = module / "seqio_cache" / "cached"
    folder.mkdir(parents=True)
    with tf.io.TFRecordWriter(str(folder / "train.tfrecord-00000-of-00001")) as writer:
        for row in rows:
            arrays = {name: np.asarray(value, np.int32) for name, value in row.items()}
            writer.write(seqio.utils.dict_to_tfexample(arrays).SerializeToString())
    about = {name: {"dtype": kind, "shape": shape} for name, (kind, shape) in types.items()}
    (folder / "info.train.json").write_text(json.dumps({"num_shards": 1, "features": about, "seqio_version": "0.0.20"}))
    (folder / "stats.train.json").write_text(json.dumps({"examples": 2}))
    (folder / "COMPLETED").touch()
    seqio.add_global_cache_dirs([str(module / "seqio_cache")])
    found = tasks.load(task("cached"), "train")
    assert [example.ids for example in found] == [([5, 6, 7, 1], [8, 1]), ([9, 1], [8, 4, 1])]


@with_seqio
def test_a_task_is_shown_with_its_own_tokens_within_the_limits(small):
    tokenizer = load_tokenizer(small.backbone)
    for name, limit in (("doubled", 40), ("moods", 4)):
        (example, *_) = tasks.load(task(name, lengths=[limit, 8]), "test")
        lines = list(describe(task(name), "test", tokenizer, 1, (limit, 8), 9))
        pieces = " ".join(tokenizer.pieces[id_] for id_ in example.ids[0])
        assert f"  tokens  {pieces}  ({len(example.ids[0])})" in lines


# --------------------------------------------------------------------------------------------- errors


@with_seqio
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "seqio broken: split 'train' could not be prepared ("),
        (
            "everywhere",
            "task everywhere: split 'train' never ends; expected a finite one; take some of it in the seqio",
        ),
        ("one_sided", "has the features targets; expected inputs and targets among them"),
        ("both", "is a Mixture; expected a Task here; name it as a run's task, or one of doubled, moods"),
        ("mods", f"no such Task or Mixture after importing '{NAME}'; expected one of both, broken, cached, doubled"),
    ],
)
def test_what_cannot_be_read_is_one_line(name, message):
    assert message in error_of(tasks.load, task(name), "train")


@with_seqio
def test_another_vocabulary_and_metrics_that_want_more_are_one_line(small, tmp_path):
    tokenizer = load_tokenizer(small.backbone)
    task("moods").check(tokenizer)
    message = error_of(task("of_another").check, tokenizer)
    assert "seqio of_another: the vocabulary of 'inputs' is not the backbone's: it has 8000 pieces" in message
    assert "is not the backbone's: " in error_of(task("moods").check, load_tokenizer(EMBEDDED))
    assert "is not the backbone's: " in error_of(task("of_bytes").check, tokenizer)
    (tmp_path / "config.json").write_text('{"vocab_size": 384}')
    task("of_bytes").check(load_tokenizer(tmp_path))
    assert "vocabulary" in error_of(train, run_of(small, "of_another"), tmp_path / "a")
    found = error_of(train, run_of(small, "with_layers"), tmp_path / "b")
    assert "the metric Layers wants SCORE_WITH_INTERMEDIATES; expected PREDICTION, PREDICTION_WITH_AUX or" in found
    found = error_of(train, run_of(small, "twice"), tmp_path / "d")
    assert "two of its metrics give 'right'; expected each name once" in found
    short = run_of(small, "moods", max_target_tokens=1)
    assert "has more than 1 tokens with EOS; expected at most 1" in error_of(train, short, tmp_path / "c")


def test_module_out_of_reach_or_seqio_not_installed_is_one_line():
    message = error_of(tasks.load, task("words", "no.such.module"), "train")
    assert "seqio is not installed" in message or "module 'no.such.module' cannot be imported" in message


def test_run_states_a_seqio_task_by_its_kind_and_keeps_it_in_its_config():
    stated = {"kind": "seqio", "name": "words", "module": "m", "lengths": [64, 8], "label_words": ["one"]}
    run = parse(Run, {"task": stated}, "test")
    source = {"kind": "seqio", "name": "words", "module": "m", "lengths": [64, 8]}
    settings = {"name": "words", "source": source, "input": "{inputs}", "target": "{targets}", "metrics": ["seqio"]}
    assert run.tasks == [parse(Task, settings | {"label_words": ["one"]}, "test")]
    assert parse(Run, run.model_dump(mode="json"), "test") == run
    with pytest.raises(UserError, match="module: missing"):
        parse(Run, {"task": {"kind": "seqio", "name": "words"}}, "test")
    message = error_of(parse, Run, {"task": stated | {"input": "say {inputs}"}}, "test")
    assert "task.input: found 'say {inputs}'; a source of kind seqio makes its own texts; leave it out" in message
    message = error_of(parse, Task, {"source": {"kind": "files"}, "metrics": ["seqio"]}, "test")
    assert "metrics: found ['seqio']; unknown metric 'seqio'; expected some of accuracy" in message
    assert Seqio(name="a", module="b").lengths is None
