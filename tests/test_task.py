"""Rows to examples: templates, label words, and one line for whatever does not fit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from softprompt_jax import tasks
from softprompt_jax.config import UserError, parse, read
from softprompt_jax.data.examples import Example, examples, fill
from softprompt_jax.data.sources import Files
from softprompt_jax.data.task import Task

FILES = {"kind": "files", "train": "train.jsonl"}


def run(rows, labelled=True, **settings):
    task = parse(Task, {"name": "mine", "source": FILES, **settings}, "task")
    return list(examples(task, [(f"place:{i}", row) for i, row in enumerate(rows, start=1)], labelled))


def test_templates_fill_fields_formats_and_doubled_braces():
    row = {"a": "x", "b": 2, "score": 3.14159, "a column": "y"}
    assert fill("{{{a}}} {b} {score:.1f} {a column}", row, "here") == "{x} 2 3.1 y"


def test_braces_inside_a_value_stay_text():
    assert fill("{a}", {"a": "{b} {}"}, "here") == "{b} {}"


def test_mapping_finds_labels_of_every_type():
    mapping = {0: "no", "1": "yes", True: "true", "x": "other"}
    rows = [{"text": "t", "label": label} for label in (0, "0", 0.0, 1, 1.0, True, "x")]
    made = run(rows, target=mapping)
    assert [example.target for example in made] == ["no", "no", "no", "yes", "yes", "true", "other"]
    assert made[0] == Example("t", "no", {"text": "t", "label": 0})


def test_words_come_from_the_mapping_unless_given():
    assert parse(Task, {"source": FILES, "target": {1: "b", 0: "a"}}, "task").words == ["b", "a"]
    assert parse(Task, {"source": FILES, "target": {1: "b"}, "label_words": ["a", "b"]}, "task").words == ["a", "b"]
    assert parse(Task, {"source": FILES}, "task").words is None


def test_unlabelled_rows_are_inputs_when_asked():
    assert run([{"text": "t"}], labelled=False, target={0: "a"}) == [Example("t", "", {"text": "t"})]


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"txt": "t", "label": "a"}, {}, "no field 'text'; found txt, label; did you mean txt?"),
        ({"text": "t"}, {}, "no field 'label'; found text"),
        ({"text": None, "label": "a"}, {}, "the field 'text' is empty"),
        ({"text": "t", "label": None}, {}, "unlabelled (label = None)"),
        ({"text": "t", "label": -1}, {"target": {0: "a"}}, "unlabelled (label = -1)"),
        ({"text": "t", "label": 7}, {"target": {0: "a", 1: "b"}}, "found label = 7; expected one of 0, 1"),
        ({"text": "t", "label": ["a"]}, {"target": {0: "a"}}, "found label = ['a']; expected one of 0"),
        ({"text": "t", "label": "c"}, {"label_words": ["a", "b"]}, "found the label 'c'; expected one of a, b"),
        (
            {"text": "t", "label": "a"},
            {"input": "{text:.1f}"},
            "the field 'text' holds 't'; expected a value for {text:.1f}",
        ),
    ],
)
def test_row_that_does_not_fit_names_its_place(row, settings, message):
    with pytest.raises(UserError) as error:
        run([row], **settings)
    assert message in str(error.value)
    assert str(error.value).startswith("task mine: place:")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": "{text"}, "task: input: found '{text'; not a template"),
        ({"input": "{}"}, "a field without a name"),
        ({"input": "{text!r}"}, "a conversion"),
        ({"target": {}}, "expected at least one value"),
        ({"metrics": ["acuracy"]}, "unknown metric 'acuracy'; expected some of accuracy, "),
        ({"metrics": []}, "expected at least one metric"),
        ({"metrics": ["f1"]}, "task: metrics: found ['f1']; the metric f1 needs two label words or `positive`"),
        ({"metrics": ["f1_macro"]}, "task: metrics: found ['f1_macro']; the metric f1_macro needs label_words"),
        ({"label_words": ["a", "a"]}, "task: label_words: found ['a', 'a']; a word is repeated"),
        (
            {"label_words": ["a"], "target": {0: "b"}},
            "target: found {'0': 'b'}; 'b' is not one of the label_words",
        ),
        ({"label_words": ["a", "b"], "positive": "c"}, "task: positive: found 'c'; expected one of the label words"),
        ({"source": {"kind": "hubb"}}, "found {'kind': 'hubb'}"),
        ({"source": {"kind": "files", "trian": "x"}}, "unknown setting; expected one of"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(settings, message):
    with pytest.raises(UserError) as error:
        parse(Task, {"source": FILES, **settings}, "task")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_group_may_be_named_by_a_list():
    task = Task(name="t", source={"kind": "files"}, input="{a}", target="{b}", group_fields=["idx"])
    (first, second) = examples(
        task, [("1", {"a": "x", "b": "y", "idx": [1, 2]}), ("2", {"a": "x", "b": "y", "idx": 3})]
    )
    assert (hash(first.group), second.group) == (hash(("[1, 2]",)), (3,))


def test_task_by_name_or_inline():
    assert tasks.resolve("sentiment_movie") is tasks.get("sentiment_movie")
    assert tasks.resolve({"source": FILES, "name": "own"}).name == "own"
    assert tasks.resolve(tasks.get("spam_sms")).words == ["no", "yes"]
    with pytest.raises(UserError, match=r"unknown; expected one of .*; did you mean sentiment_movie"):
        tasks.get("sentiment_movies")


def test_the_named_tasks_are_these_each_in_one_file():
    files = [read(path) for path in Path(tasks.__file__).parent.glob("*.yaml")]
    every = [name for file in files for name in file]
    assert sorted(every) == tasks.names()
    assert len(every) == len(set(every)) >= 68


def test_the_tasks_of_the_first_release_have_kept_their_settings():
    kept = json.loads((Path(__file__).parent / "data" / "tasks_of_the_first_release.json").read_text())
    made = {name: tasks.get(name).model_dump(mode="json") for name in kept}
    assert {settings.pop("validation") for settings in made.values()} == {None}  # which came later
    for name, settings in made.items():
        assert hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12] == kept[name], name


@pytest.mark.parametrize("name", tasks.names())
def test_every_named_task_survives_its_own_yaml(name):
    task = tasks.get(name)
    assert parse(Task, task.model_dump(mode="json"), "task") == task
    assert task.name == name


def test_empty_split_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    task = Task(name="mine", source={"kind": "files", "train": str(tmp_path / "empty.jsonl")})
    assert tasks.splits(task) == ["train"]
    with pytest.raises(UserError, match=r"^task mine: split 'train' is empty"):
        tasks.load(task, "train")
    with pytest.raises(UserError, match=r"^task mine: no split 'test'; found train; add it to the source"):
        tasks.load(task, "test")


@pytest.mark.parametrize(
    ("value", "expected"),
    [("Paris", ("Paris",)), (["Paris", 7, 1.0], ("Paris", "7", "1")), ((), ()), (None, ())],
)
def test_answers_are_a_text_or_a_list_of_texts(value, expected):
    task = Task(source=Files(), target="{answer}", answers_field="answers", metrics=["exact_match"])
    (found,) = examples(task, [("here", {"text": "where", "answer": "Paris", "answers": value})])
    assert found.answers == expected


@pytest.mark.parametrize("value", [{"text": ["Paris"], "answer_start": [3]}, [["Paris"]], [None], 7])
def test_answers_that_are_none_are_one_line(value):
    task = Task(source=Files(), target="{answer}", answers_field="answers", metrics=["exact_match"])
    with pytest.raises(UserError, match=r"here: found answers = .*; expected a text or a list of texts"):
        list(examples(task, [("here", {"text": "where", "answer": "Paris", "answers": value})]))
