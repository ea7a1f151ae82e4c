"""`softprompt new`: columns, labels and lengths are guessed, and the config that comes of it trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import rows, write_rows

import softprompt_jax as sp
from softprompt_jax.config import UserError
from softprompt_jax.data.starter import guess

pytestmark = pytest.mark.usefixtures("own_cache")


def test_columns_are_guessed_by_name_then_by_their_values():
    named = [{"id": str(n), "label": "ab"[n % 2], "text": f"number {n}"} for n in range(10)]
    assert guess(named) == ("text", "label", ["a", "b"], ["id"])
    unnamed = [{"x": f"a longer text {n}", "y": "ab"[n % 2], "z": n} for n in range(10)]
    assert guess(unnamed) == ("x", "y", ["a", "b"], ["z"])
    free = [{"question": f"what is {n}", "reply": f"it is {n}, as ever and always"} for n in range(10)]
    assert guess(free) == ("question", "reply", [], [])
    assert guess(named, label="id").label == "id"
    assert guess([{"text": f"number {n}", "label": n % 3} for n in range(9)]).words == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([{"text": "a"}], "found the columns text; expected two, a text and its label"),
        ([{"text": "a", "b:c": "d"}], "found the columns text, b:c; expected two"),
    ],
)
def test_rows_without_two_columns_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        guess(given)


def test_the_config_that_new_writes_is_commented_and_trains(softprompt, small, tmp_path):
    data, to = write_rows(tmp_path / "moods.jsonl", rows()), tmp_path / "moods.yaml"
    code, out, err = softprompt("new", data, "--to", to, "--backbone", small.backbone)
    assert code == 0, err
    text = to.read_text()
    assert text in out
    assert out.count("\nexample ") == 3
    assert "  tokens  <20 prompt rows>" in out
    settings = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert text.count("#") >= len(settings) - 1  # a comment above each but `task:`
    run = sp.load_run(to)
    task = run.tasks[0]
    assert (task.input, task.target, task.words, task.validation) == ("{text}", "{label}", ["yes", "no"], 0.1)
    longest = max(len(row["text"].split()) for row in rows())
    assert longest <= run.max_input_tokens <= longest + 16
    short = ["steps=2", "evaluate_every=2", "methods.0.length=2"]
    assert set(sp.train(sp.load_run(to, short), tmp_path / "run").scores) == {"validation"}


def test_a_folder_with_a_validation_split_keeps_it_and_a_file_is_not_overwritten(softprompt, refused, small, tmp_path):
    for split, part in (("train", rows()[:60]), ("validation", rows()[60:])):
        write_rows(tmp_path / f"{split}.jsonl", part)
    code, _, err = softprompt(
        "new", tmp_path, "--to", tmp_path / "a.yaml", "--backbone", small.backbone, "--label", "label"
    )
    assert code == 0, err
    task = sp.load_run(tmp_path / "a.yaml").tasks[0]
    assert (task.source.kind, task.validation) == ("folder", None)
    assert "a.yaml: exists; expected a new file" in refused("new", tmp_path, "--to", tmp_path / "a.yaml")
    assert "column 'x': not in the rows; expected one of text, label" in refused(
        "new", tmp_path, "--to", tmp_path / "b.yaml", "--backbone", small.backbone, "--input", "x"
    )


def test_a_causal_model_reads_the_name_of_the_label_before_it_answers(tmp_path):
    import tiny_lm

    from softprompt_jax.checkpoints.backbone import text_format_of
    from softprompt_jax.data.starter import starter
    from softprompt_jax.data.tokenizer import load_tokenizer

    folder = tiny_lm.folder(tmp_path / "lm")
    made = [{"message": f"where is {n}", "intent": "ab"[n % 2]} for n in range(8)]
    write_rows(Path(tmp_path / "rows.jsonl"), made)
    text = starter(
        str(tmp_path / "rows.jsonl"), "mine.yaml", str(folder), load_tokenizer(folder, text_format_of(folder))
    )
    assert "input: " + json.dumps("{message}\nIntent:") in text
