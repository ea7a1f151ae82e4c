"""Our texts and scores beside those of T5's own preprocessors and metric functions (`make test-seqio`)."""

from __future__ import annotations

import ast
import functools
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
from benchmark_rows import GOLDEN, SQUAD, WSC

from softprompt_jax import tasks
from softprompt_jax.data import metrics
from softprompt_jax.data.examples import Example, examples
from softprompt_jax.data.preprocessors import read_wsc
from softprompt_jax.inference.evaluate import score

# TensorFlow, seqio and what they need warn of their own old ways; none of it is ours.
pytestmark = [pytest.mark.seqio, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def t5():
    metrics = pytest.importorskip("t5.evaluation.metrics")
    from t5.data import postprocessors, preprocessors

    return SimpleNamespace(metrics=metrics, preprocessors=preprocessors, postprocessors=postprocessors)


def dataset(row):
    import tensorflow as tf

    types = {"label": tf.float32 if isinstance(row.get("label"), float) else tf.int32}

    def tensor(value, name=""):
        if isinstance(value, dict):
            return {key: tensor(inner) for key, inner in value.items()}
        return tf.constant(value, dtype=types.get(name))

    return tf.data.Dataset.from_tensors({name: tensor(value, name) for name, value in row.items()})


def preprocessor(t5, name, row, split):
    """Return T5's function for a task and the row in the schema that it wants; None where T5 has none."""
    pre, task = t5.preprocessors, tasks.get(name)
    if name == "record":
        return pre.record, {key: value for key, value in row.items() if key != "entity_spans"}  # newer than T5
    if name == "wsc":
        return functools.partial(pre.wsc_simple, correct_referent_only=split == "train"), row
    if name == "dpr":
        return pre.definite_pronoun_resolution_simple, row
    if name == "stsb":
        return pre.stsb, row
    if name.startswith(("squad", "mrqa")):
        return pre.squad, SQUAD
    if name in ("cnn_dailymail", "xsum"):
        article, summary = task.input.strip("{}"), str(task.target).strip("{}")
        return functools.partial(pre.summarize, article_key=article, summary_key=summary), row
    if name.startswith("wmt"):
        _, source, target = name.split("_")
        languages = {"source_language": source, "target_language": target}
        return functools.partial(pre.translate, **languages), row["translation"]
    if name.startswith(("snli", "anli", "docnli")):
        return None
    order = {"multirc": ("question", "answer", "paragraph"), "wic": ("sentence1", "sentence2", "word")}.get(name)
    if name == "axb":
        row = {"premise": row["sentence1"], "hypothesis": row["sentence2"], "label": row["label"], "idx": row["idx"]}
    arguments = {"benchmark_name": task.prefix.strip(), "label_names": list(task.words), "feature_names": order}
    return functools.partial(pre.glue, **arguments), row


@pytest.mark.parametrize(("name", "split", "row"), [g[:3] for g in GOLDEN], ids=[f"{g[0]}-{g[1]}" for g in GOLDEN])
def test_texts_equal_those_of_t5(t5, name, split, row):
    ours = list(examples(tasks.resolve({"name": name, "with_prefix": True}), [("here", row)], True, split))
    found = preprocessor(t5, name, row, split)
    if found is None or name == "mrqa_race":
        pytest.skip("T5 has no preprocessor for it")
    theirs = list(found[0](dataset(found[1])).as_numpy_iterator())
    if name == "record" and split == "validation":
        theirs = theirs[:1]  # T5 repeats the question for every answer and scores the first
    texts = [(row["inputs"].decode(), row["targets"].decode()) for row in theirs]
    assert [(example.input, example.target) for example in ours] == texts


def test_wsc_mends_the_two_rows_of_the_data_set_that_t5_mends(t5):
    """The two texts are read out of T5's own function, which treats them as exceptions."""
    tree = ast.parse(inspect.getsource(t5.preprocessors._wsc_inputs))
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    originals = [text for text in texts if len(text.split()) > 20 and " X " not in text and "A dict" not in text]
    assert len(originals) == 2
    mended = 0
    for text in originals:
        for index, word in enumerate(text.split(" ")):
            pronoun = "him" if "him" in word else "it" if text.split(" ")[index + 1 : index + 2] == ["it"] else None
            if pronoun is None or index == 0:
                continue
            row = WSC | {"text": text, "span2_text": pronoun, "span2_index": index}
            (theirs,) = t5.preprocessors.wsc_simple(dataset(row)).as_numpy_iterator()
            (ours,) = examples(tasks.resolve({"name": "wsc", "with_prefix": True}), [("here", row)], True, "validation")
            if word.startswith(pronoun) and word == pronoun:
                continue  # another "him" of the text, which T5's exception overrules
            assert ours.input == theirs["inputs"].decode()
            mended += 1
    assert mended == 2


def compute(task, predictions, targets):
    return metrics.compute(task.metrics, metrics.Answers(predictions, targets, task.words, task.positive), task.name)


def draw_words(seed, words, count=120):
    """Return predictions, some of them illegal, and targets."""
    draw = np.random.default_rng(seed)
    return [str(w) for w in draw.choice([*words, "", "nonsense"], count)], [str(w) for w in draw.choice(words, count)]


@pytest.mark.parametrize("name", ["boolq", "cb", "copa", "rte", "cola", "mrpc", "qqp", "mnli"])
@pytest.mark.parametrize("seed", range(3))
def test_label_scores_equal_those_of_t5(t5, name, seed):
    task = tasks.get(name)
    predictions, targets = draw_words(seed, task.words)
    ids = [
        [t5.postprocessors.string_label_to_class_id(text, task.words) for text in side]
        for side in (targets, predictions)
    ]
    functions = {
        "accuracy": t5.metrics.accuracy,
        "f1": t5.metrics.f1_score_with_invalid,
        "f1_macro": t5.metrics.mean_multiclass_f1(num_classes=len(task.words)),
        "matthews": t5.metrics.sklearn_metrics_wrapper("matthews_corrcoef", metric_post_process_fn=lambda x: 100 * x),
    }
    ours = compute(task, predictions, targets)
    for metric in task.metrics:
        (theirs,) = functions[metric](*ids).values()
        assert 100 * ours[metric] == pytest.approx(theirs)


@pytest.mark.parametrize("seed", range(3))
def test_multirc_scores_equal_those_of_t5(t5, seed):
    predictions, targets = draw_words(seed, ["False", "True"])
    groups = np.random.default_rng(seed).integers(0, 40, len(targets)).tolist()
    ours = score(
        tasks.get("multirc"),
        predictions,
        [Example("", target, group=(0, group)) for target, group in zip(targets, groups, strict=True)],
    )
    read = t5.postprocessors.multirc
    right = [
        read(target, example={"idx/question": group}, is_target=True)
        for target, group in zip(targets, groups, strict=True)
    ]
    guess = [read(prediction) for prediction in predictions]
    f1 = t5.metrics.multirc_f1_over_all_answers(right, guess)["f1"]
    em = t5.metrics.mean_group_metric(t5.metrics.all_match)(right, guess)["exact_match"]
    assert (100 * ours["f1"], 100 * ours["group_exact_match"]) == (pytest.approx(f1), pytest.approx(em))


@pytest.mark.parametrize("seed", range(3))
def test_number_scores_equal_those_of_t5(t5, seed):
    predictions, targets = draw_words(seed, ["0.0", "1.2", "3.4", "5.0"])
    numbers = [[t5.postprocessors.string_to_float(text) for text in side] for side in (targets, predictions)]
    ours = compute(tasks.get("stsb"), predictions, targets)
    assert 100 * ours["pearson"] == pytest.approx(t5.metrics.pearson_corrcoef(*numbers)["pearson_corrcoef"])
    assert 100 * ours["spearman"] == pytest.approx(t5.metrics.spearman_corrcoef(*numbers)["spearman_corrcoef"])


def sentences(seed, count=40):
    draw = np.random.default_rng(seed)
    words = ["the", "a", "ferry", "Ferry,", "mill", "it's", "late.", "$90", "an", " . ", "rowed"]
    return [" ".join(draw.choice(words, draw.integers(0, 9))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_answer_scores_equal_those_of_t5(t5, seed):
    predictions = sentences(seed)
    answers = [list(pair) for pair in zip(sentences(seed + 10), sentences(seed + 20), strict=True)]
    theirs = t5.metrics.squad(answers, predictions)
    found = [Example("", pair[0], answers=tuple(pair)) for pair in answers]
    ours = score(tasks.get("squad"), predictions, found)
    assert (100 * ours["exact_match"], 100 * ours["squad_f1"]) == (
        pytest.approx(theirs["em"]),
        pytest.approx(theirs["f1"]),
    )


def test_text_scores_equal_those_of_t5(t5):
    predictions, targets = sentences(1), sentences(2)
    task = tasks.resolve({"name": "xsum", "metrics": ["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu_intl"]})
    ours = compute(task, predictions, targets)
    assert 100 * ours["bleu_intl"] == pytest.approx(t5.metrics.bleu(targets, predictions)["bleu"])
    theirs = t5.metrics.rouge(targets, predictions, score_keys=["rouge1", "rouge2", "rougeL", "rougeLsum"])
    for kind, value in theirs.items():  # the median of resampled means, ours is the mean
        assert 100 * ours[kind] == pytest.approx(value, abs=1.0)


def test_wsc_answers_are_read_as_t5_reads_them(t5):
    read = t5.postprocessors.wsc_simple
    for referent in ("the old baker", "Anna's hat", "her", "a b c"):
        for prediction in ["", "the", "Baker", "anna", "Anna's", "hat", "old  baker", "c b", "her", *sentences(4, 20)]:
            theirs = read(prediction, example={"targets_pretokenized": referent.encode()})
            words = {"": -1, "False": 0, "True": 1}
            assert words[read_wsc(prediction, referent)] == theirs, (prediction, referent)
