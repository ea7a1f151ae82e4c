"""The data set of `configs/intents`: messages to a shop, in balance, no message in two splits, read by its config."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from softprompt_jax.checkpoints.backbone import EMBEDDED
from softprompt_jax.data.sources import read_file
from softprompt_jax.data.task import load
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.run import load_run

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "intents"
ROWS = {split: [row for _, row in read_file(FOLDER / f"{split}.jsonl")] for split in ("train", "validation", "test")}
EVERY = list(itertools.chain.from_iterable(ROWS.values()))


@pytest.fixture(scope="module")
def run():
    return load_run(FOLDER / "run.yaml")


@pytest.fixture(scope="module")
def tokenizer():
    """Return the tokenizer that ships; the one of the config's backbone has to be fetched."""
    return load_tokenizer(EMBEDDED)


@pytest.mark.parametrize(("split", "count"), [("train", 66), ("validation", 12), ("test", 24)])
def test_every_split_has_as_many_messages_of_each_intent(run, split, count):
    assert all(row.keys() == {"text", "label"} for row in ROWS[split])
    assert Counter(row["label"] for row in ROWS[split]) == dict.fromkeys(run.task.words, count)
    turns = [ROWS[split][first : first + 6] for first in range(0, 6 * count, 6)]  # so that the first rows are balanced
    assert all({row["label"] for row in turn} == set(run.task.words) for turn in turns)


def test_no_message_is_there_twice_whatever_its_case_and_punctuation():
    plain = Counter(" ".join(re.findall(r"\w+", row["text"].lower())) for row in EVERY)
    assert [text for text, count in plain.items() if count > 1] == []


def test_messages_are_short_and_tidy():
    assert all(3 <= len(row["text"].split()) <= 25 for row in EVERY)
    assert all(row["text"] == " ".join(row["text"].split()) for row in EVERY)


@pytest.mark.parametrize("split", ROWS)
def test_a_label_word_is_in_at_most_a_third_of_its_messages(run, split):
    own = Counter(row["label"] for row in ROWS[split] if row["label"] in row["text"].lower())
    assert all(3 * own[word] <= len(ROWS[split]) / 6 for word in run.task.words)


def test_counts_of_words_do_not_find_the_intents_of_the_test(run):
    texts, labels = ({split: [row[key] for row in rows] for split, rows in ROWS.items()} for key in ("text", "label"))
    words = TfidfVectorizer()
    model = LogisticRegression(C=10).fit(words.fit_transform(texts["train"]), labels["train"])
    right = {split: model.score(words.transform(texts[split]), labels[split]) for split in ROWS}
    assert right == pytest.approx({"train": 1, "validation": 0.89, "test": 0.38}, abs=0.02)  # as the config says


def test_label_words_begin_with_different_tokens_and_no_input_is_cut(run, tokenizer):
    words = tokenizer.target_batch(run.task.words)
    assert len({ids[0] for ids in words}) == len(words) == 6
    assert max(map(len, words)) <= run.max_target_tokens
    inputs = [run.task.input.format(**row) for row in EVERY]
    assert max(map(len, tokenizer.input_batch(inputs))) <= run.max_input_tokens


def test_the_config_reads_the_messages(run, tokenizer, monkeypatch):
    assert (run.backbone, run.task_name, run.task.predict_by) == ("smollm2", "intents", "likelihood")
    monkeypatch.chdir(ROOT)  # the paths of data are relative to the working directory
    assert [len(load(run.task, split)) for split in ROWS] == [396, 72, 144]
    first = load(run.task, "train")[0]
    assert first.input == "Message: No parcel, no email, no tracking. What is going on?\nIntent:"
    assert first.target == "delivery"
    assert tokenizer.decode(tokenizer.input_ids(first.input)) == first.input.replace("\n", " ")
