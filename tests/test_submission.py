"""Files for the servers of GLUE and SuperGLUE, and the benchmarks' averages."""

from __future__ import annotations

import json

import pytest
from benchmark_rows import GOLDEN, RECORD, WSC

from softprompt_jax import tasks
from softprompt_jax.config import UserError
from softprompt_jax.data.examples import examples
from softprompt_jax.data.submission import BENCHMARKS, average, write_submission

ROWS = {name: row for name, _, row, _ in GOLDEN}


def written(tmp_path, name, predictions, rows=None):
    task = tasks.get(name)
    rows = rows or [ROWS[name] | {"idx": index, "label": -1} for index in range(len(predictions))]
    found = list(examples(task, [("row", row) for row in rows], labelled=False))
    path = write_submission(task, found, predictions, tmp_path)
    return path.name, path.read_text().splitlines()


@pytest.mark.parametrize(
    ("name", "file", "predictions", "labels"),
    [
        ("boolq", "BoolQ.jsonl", ["True", "False", "what"], ["true", "false", "false"]),
        ("cb", "CB.jsonl", ["neutral", "entailment"], ["neutral", "entailment"]),
        ("copa", "COPA.jsonl", ["choice2", "choice1"], [1, 0]),
        ("rte", "RTE.jsonl", ["not_entailment"], ["not_entailment"]),
        ("wic", "WiC.jsonl", ["True"], ["true"]),
        ("axb", "AX-b.jsonl", ["entailment"], ["entailment"]),
    ],
)
def test_superglue_files_hold_the_servers_labels(tmp_path, name, file, predictions, labels):
    found, lines = written(tmp_path, name, predictions)
    assert found == file
    assert [json.loads(line) for line in lines] == [{"idx": i, "label": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("name", "file", "predictions", "answers"),
    [
        ("cola", "CoLA.tsv", ["acceptable", "what"], ["1", "0"]),
        ("mnli_mismatched", "MNLI-mm.tsv", ["neutral"], ["neutral"]),
        ("glue_rte", "RTE.tsv", ["not_entailment"], ["not_entailment"]),
        ("stsb", "STS-B.tsv", ["3.4", "9", "what"], ["3.400", "5.000", "0.000"]),
    ],
)
def test_glue_files_are_tables_with_an_index(tmp_path, name, file, predictions, answers):
    found, lines = written(tmp_path, name, predictions)
    assert found == file
    assert lines == ["index\tprediction"] + [f"{i}\t{answer}" for i, answer in enumerate(answers)]


def test_record_wsc_and_multirc_have_forms_of_their_own(tmp_path):
    assert written(tmp_path, "record", ["Brandt"], [RECORD])[1] == ['{"idx": 9, "label": "Brandt"}']
    rows = [WSC | {"label": -1, "idx": index} for index in range(3)]
    labels = [json.loads(line)["label"] for line in written(tmp_path, "wsc", ["baker", "Anna", ""], rows)[1]]
    assert labels == ["True", "False", "False"]
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 2, 3)]
    rows = [ROWS["multirc"] | {"idx": {"paragraph": p, "question": q, "answer": a}} for p, q, a in places]
    _, lines = written(tmp_path, "multirc", ["True", "False", "True", "what"], rows)
    answers = lambda *pairs: [{"idx": idx, "label": label} for idx, label in pairs]  # noqa: E731
    first = [{"idx": 0, "answers": answers((0, 1), (1, 0))}, {"idx": 1, "answers": answers((2, 1))}]
    assert [json.loads(line) for line in lines] == [
        {"idx": 0, "passage": {"questions": first}},
        {"idx": 1, "passage": {"questions": [{"idx": 2, "answers": answers((3, 0))}]}},
    ]


def test_every_benchmark_task_writes_a_file_of_its_own():
    files = [tasks.get(name).submission for name in tasks.names() if tasks.get(name).submission]
    assert len(files) == len(set(files)) == 10 + 11
    for groups in BENCHMARKS.values():
        assert all(tasks.get(name).submission for group in groups for name in group)


def test_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"BoolQ.jsonl: cannot be written"):
        write_submission(tasks.get("boolq"), [], [], tmp_path / "file")


def test_averages_take_the_mean_of_each_set_first():
    # The ensemble column of Lester et al. (2021), table 3.
    ensemble = {"boolq": [91.7], "cb": [100, 100], "copa": [100], "multirc": [67.1, 89.4], "record": [93.2, 93.9]}
    ensemble |= {"rte": [93.5], "wic": [77.4], "wsc": [96.2]}
    assert average("superglue", ensemble) == pytest.approx(91.3, abs=0.05)
    glue = {name: [0.5] for group in BENCHMARKS["glue"] for name in group} | {"mnli": [0.2], "mnli_mismatched": [0.8]}
    assert average("glue", glue) == pytest.approx(0.5)
    assert average("glue", glue | {"mnli": [1.0], "cola": [1.0]}) == pytest.approx(0.5 + (0.4 + 0.5) / 9)
    with pytest.raises(UserError, match="superglue: no scores of wsc; expected all of boolq, cb"):
        average("superglue", {name: score for name, score in ensemble.items() if name != "wsc"})
    with pytest.raises(UserError, match="benchmark 'glu': unknown; expected one of superglue, glue"):
        average("glu", {})
