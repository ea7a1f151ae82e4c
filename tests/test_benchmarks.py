"""The benchmarks' tasks: texts as T5's preprocessors give them, of rows in the hub's schemas; hidden labels."""

from __future__ import annotations

import dataclasses

import pytest
from benchmark_rows import GOLDEN, RECORD, WSC

from softprompt_jax import tasks
from softprompt_jax.config import UserError
from softprompt_jax.data.examples import examples, input_text
from softprompt_jax.data.preprocessors import read_wsc
from softprompt_jax.data.sources import Hub
from softprompt_jax.inference.evaluate import score


def made(name, row, split, labelled=True, **changes):
    task = tasks.resolve({"name": name, **changes})
    return list(examples(task, [("row 1", row)], labelled, split))


@pytest.mark.parametrize(
    ("name", "split", "row", "expected"), GOLDEN, ids=[f"{g[0]}-{i}" for i, g in enumerate(GOLDEN)]
)
def test_rows_become_the_texts_of_t5(name, split, row, expected):
    found = made(name, row, split, with_prefix=True)
    assert [(e.input, e.target, e.answers, e.group) for e in found] == expected
    for with_prefix, example in zip(found, made(name, row, split), strict=True):
        assert tasks.get(name).prefix + example.input == with_prefix.input


def test_every_hub_task_has_a_golden_example():
    hub = {name for name in tasks.names() if isinstance(tasks.get(name).source, Hub)}
    families = {name.split("_")[0] for name, *_ in GOLDEN}
    assert {name for name in hub if name.split("_")[0] not in families} == set()


def test_prompt_is_the_same_for_labelled_and_unlabelled_rows():
    for name, split, row, expected in GOLDEN:
        if expected:
            unlabelled = {key: value for key, value in row.items() if key not in ("label", "answers")}
            (example,) = made(name, unlabelled, "test", labelled=False)
            assert example.input == input_text(tasks.get(name), unlabelled, "here") == made(name, row, split)[0].input
            assert (example.target, example.answers) == ("", ())


def test_wsc_finds_the_pronoun_beside_the_index_and_tells_where_there_is_none():
    behind = WSC | {"span2_index": 6}
    assert made("wsc", behind, "train")[0].input == made("wsc", WSC, "train")[0].input
    glued = WSC | {"text": 'Udo waved . "Look at her!" he said. ', "span2_text": "her", "span2_index": 5}
    assert made("wsc", glued, "train")[0].input == 'Udo waved . "Look at *her* !" he said.'
    for index, message in (
        (3, "word 3 is 'old', not 'she'"),
        (0, "neither the first nor the last"),
        (99, "word 99 of"),
    ):
        with pytest.raises(UserError, match=rf"task wsc: row 1: does not fit the preprocessor 'wsc' \(.*{message}"):
            made("wsc", WSC | {"span2_index": index}, "train")


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("The Old Baker", "True"),
        ("baker", "True"),
        ("her old baker from town", "True"),
        ("Anna", "False"),
        ("the old baker's", "False"),
        ("the", ""),
        ("", ""),
    ],
)
def test_wsc_reads_a_noun_as_true_or_false(prediction, answer):
    assert read_wsc(prediction, "the old baker") == answer


def test_wsc_is_scored_by_the_noun_it_names():
    rows = [WSC, WSC | {"label": 0}, WSC | {"label": 0}]
    found = [example for row in rows for example in made("wsc", row, "validation")]
    scores = score(tasks.get("wsc"), ["baker", "Anna", ""], found)
    assert scores == {"accuracy": pytest.approx(2 / 3), "illegal": 0.0, "count": 3}


def test_record_is_scored_by_its_best_answer():
    (example,) = made("record", RECORD, "validation")
    scores = score(tasks.get("record"), ["the Brandt"], [example])
    assert (scores["exact_match"], scores["squad_f1"]) == (1.0, 1.0)


def test_multirc_is_scored_per_answer_and_per_question():
    row = next(row for name, _, row, _ in GOLDEN if name == "multirc")
    labels = {(11, 1): 1, (11, 2): 0, (12, 3): 1}
    found = [
        made("multirc", row | {"label": label, "idx": {"paragraph": 2, "question": q, "answer": a}}, "validation")[0]
        for (q, a), label in labels.items()
    ]
    scores = score(tasks.get("multirc"), ["True", "maybe", "True"], found)
    assert scores["group_exact_match"] == 0.5
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1))  # "maybe" is a false positive
    assert scores["illegal"] == pytest.approx(1 / 3)


def test_axg_counts_the_pairs_that_are_answered_alike():
    row = next(row for name, _, row, _ in GOLDEN if name == "axg")
    found = [made("axg", row | {"idx": index, "label": 0}, "test")[0] for index in range(6)]
    answers = ["entailment", "entailment", "not_entailment", "not_entailment", "entailment", "not_entailment"]
    scores = score(tasks.get("axg"), answers, found)
    assert scores["group_agreement"] == pytest.approx(2 / 3)
    assert scores["accuracy"] == 0.5
    with pytest.raises(UserError, match="metrics of groups: examples without a group"):
        score(tasks.get("axg"), answers[:1], [dataclasses.replace(found[0], group=None)])


def test_hidden_test_splits_are_not_scored():
    for name in ("boolq", "mnli"):
        task = tasks.get(name)
        assert tasks.splits(task) == ["train", "validation"]
        with pytest.raises(UserError, match=f"task {name}: the labels of split 'test' are not public; expected one of"):
            tasks.load(task, "test")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("record", {"passage": "p", "query": "q"}, "task record: row 1: no field 'entities'; found passage, query"),
        ("squad", {"question": None, "context": "x"}, "does not fit the preprocessor 'squad'"),
        ("mrqa_drop", {"question": "x"}, "no field 'subset'; found question"),
        ("wmt14_en_de", {"translation": {"en": "x"}}, "no field 'de'; found en"),
        ("cb", {"premise": "x", "hypothesis": "y", "label": -1}, "unlabelled (label = -1)"),
        ("stsb", {"sentence1": "x", "sentence2": "y", "label": -1.0}, "unlabelled (target = '')"),
        ("squad", {"question": "x", "context": "y", "answers": {"text": []}}, "unlabelled (target = '')"),
    ],
)
def test_row_of_another_schema_is_one_line(name, row, message):
    with pytest.raises(UserError) as error:
        made(name, row, "validation")
    assert message in str(error.value)


def test_named_task_is_changed_in_part():
    changed = tasks.resolve({"name": "cb", "with_prefix": True, "metrics": ["accuracy"]})
    assert changed == tasks.get("cb").model_copy(update={"with_prefix": True, "metrics": ["accuracy"]})
    with pytest.raises(UserError, match=r"task 'boolk': unknown; .*did you mean boolq"):
        tasks.resolve({"name": "boolk", "with_prefix": True})


def test_unknown_function_names_the_nearest():
    with pytest.raises(UserError, match=r"task: prepare: found 'squat'; expected one of .*; did you mean squad"):
        tasks.resolve({"name": "squad", "prepare": "squat"})
