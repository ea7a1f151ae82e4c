"""A seqio Task as a source of rows: text as its preprocessors leave it; what cannot be taken over is told."""

from __future__ import annotations

import sys

import pytest

from softprompt_jax import Run, tasks
from softprompt_jax.backbone.pretrained import EMBEDDED
from softprompt_jax.config import UserError, parse
from softprompt_jax.tasks.task import Task

MODULE = """
import functools
import seqio
import tensorflow as tf

VOCABULARY = seqio.SentencePieceVocabulary({model!r})
FEATURES = {{side: seqio.Feature(VOCABULARY, add_eos=True) for side in ("inputs", "targets")}}


def rows(split, shuffle_files=False, seed=None):
    words = [b"one", b"two", b"three"][: 3 if split == "train" else 1]
    return tf.data.Dataset.from_tensor_slices({{"word": words, "number": list(range(len(words)))}})


@seqio.map_over_dataset
def ask(row):
    return {{"inputs": tf.strings.join(["say ", row["word"]]), "targets": row["word"], "number": row["number"]}}


@seqio.map_over_dataset
def double(row):
    return {{**row, "inputs": tf.concat([row["inputs"], row["inputs"]], 0)}}


SOURCE = seqio.FunctionDataSource(rows, splits=["train", "validation"])
END = seqio.preprocessors.append_eos_after_trim
for name, steps in {{
    "words": [ask, seqio.preprocessors.tokenize, END],
    "doubled_words": [ask, seqio.preprocessors.tokenize, double, END],
    "endless_words": [lambda rows: rows.repeat(), ask, seqio.preprocessors.tokenize, END],
}}.items():
    seqio.TaskRegistry.add(name, SOURCE, preprocessors=steps, output_features=FEATURES, metric_fns=[])
seqio.MixtureRegistry.add("mixed_words", ["words", "doubled_words"], default_rate=1)
"""


def task(name, module="softprompt_seqio_words"):
    return tasks.resolve({"kind": "seqio", "name": name, "module": module})


def error_of(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    pytest.importorskip("seqio")
    folder = tmp_path_factory.mktemp("seqio")
    text = MODULE.format(model=str(EMBEDDED / "spiece.model"))
    (folder / "softprompt_seqio_words.py").write_text(text)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.mark.seqio
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("module")
def test_task_gives_the_texts_of_its_preprocessors():
    found = tasks.load(task("words"), "train")
    assert [(example.input, example.target) for example in found] == [
        (f"say {word}", word) for word in ("one", "two", "three")
    ]
    assert [example.fields["number"] for example in found] == [0, 1, 2]
    assert tasks.splits(task("words")) == ["train", "validation"]
    assert len(tasks.load(task("words"), "validation")) == 1


@pytest.mark.seqio
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("doubled_words", "the tokens of 'inputs' are not those of its text and EOS; expected no preprocessor that"),
        ("endless_words", "split 'train' never ends; expected a finite one"),
        (
            "mixed_words",
            "is a Mixture; expected a Task; state kind: mixture with a seqio task for each",
        ),
        ("wards", "no such Task after importing 'softprompt_seqio_words'; expected one of doubled_words, "),
    ],
)
def test_what_cannot_be_taken_over_is_one_line(name, message):
    assert message in error_of(tasks.load, task(name), "train")


def test_module_out_of_reach_or_seqio_not_installed_is_one_line():
    message = error_of(tasks.load, task("words", "no.such.module"), "train")
    assert "seqio is not installed" in message or "module 'no.such.module' cannot be imported" in message


def test_run_states_a_seqio_task_by_its_kind_and_keeps_it_in_its_config():
    run = parse(Run, {"task": {"kind": "seqio", "name": "words", "module": "m", "label_words": ["one"]}}, "test")
    source = {"kind": "seqio", "name": "words", "module": "m"}
    settings = {"name": "words", "source": source, "input": "{inputs}", "target": "{targets}", "label_words": ["one"]}
    assert run.tasks == [parse(Task, settings, "test")]
    assert parse(Run, run.model_dump(mode="json"), "test") == run
    with pytest.raises(UserError, match="module: missing"):
        parse(Run, {"task": {"kind": "seqio", "name": "words"}}, "test")
