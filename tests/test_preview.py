"""`softprompt task`, `submit` and `average`: what a task looks like, and what a benchmark is given."""

from __future__ import annotations

import json
import types

import pytest
import yaml
from benchmark_rows import GOLDEN
from small_runs import write_config, write_rows

from softprompt_jax import load_predictor, load_run
from softprompt_jax.config import parse, to_yaml
from softprompt_jax.data.task import iterate
from softprompt_jax.tasks import get, resolve

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def config(tmp_path):
    """Write a run on four rows of BoolQ, given as a file, and return its path."""
    row = next(row for name, _, row, _ in GOLDEN if name == "boolq")
    rows = [row | {"label": label} for label in (1, 0, 1)] + [row | {"passage": "long " * 40}]
    hidden = [row | {"label": -1}]
    source = {"kind": "files"} | {
        split: str(write_rows(tmp_path / f"{split}.jsonl", lines))
        for split, lines in (("train", rows), ("test", hidden))
    }
    return write_config(tmp_path / "a.yaml", {"task": {"name": "boolq", "source": source, **inherited("boolq")}})


def inherited(name):
    settings = get(name).model_dump(exclude_defaults=True)
    return {key: value for key, value in settings.items() if key not in ("name", "source")}


def test_task_is_shown_with_lengths_truncations_and_label_counts(softprompt, config):
    code, out, err = softprompt("task", config, "--show", 1, "--max-input-tokens", 20)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "boolq: files; splits train, and without public labels test"
    assert lines[1] == "  input  passage: {passage} question: {question}"
    assert lines[2] == "  labels False, True; metrics accuracy"
    assert lines[3] == "train: 4 examples"
    assert lines[4].startswith("  input tokens with EOS: median ")
    assert lines[4].endswith("; 1 over 20 (truncated)")
    assert lines[5].endswith("; 0 over 64 (too long: a run refuses them)")
    assert lines[6] == "  targets: 'True' 3 (75.0%), 'False' 1 (25.0%)"
    assert lines[7:9] == ["example 1", "  input   passage: The mill opens at six. question: is the mill open"]
    assert lines[9].startswith("  tokens  <100 prompt rows> ▁")
    assert "</s>  (" in lines[9]
    assert lines[10] == "  target  True"
    assert len(lines) == 12


def test_a_config_is_shown_with_its_own_limits_and_tokenizer(softprompt, refused, config, tmp_path):
    own = write_config(tmp_path / "b.yaml", yaml.safe_load(config.read_text()) | {"max_input_tokens": 20})
    assert "; 1 over 20 (truncated)" in softprompt("task", own, "--show", 0)[1]
    assert "; 0 over 200 (truncated)" in softprompt("task", own, "--show", 0, "--max-input-tokens", 200)[1]
    other = write_config(tmp_path / "c.yaml", yaml.safe_load(config.read_text()) | {"backbone": "/none"})
    assert "/none: no such folder; expected a Hugging Face folder" in refused("task", other)
    assert softprompt("task", other, "--tokenizer", "embedded")[0] == 0


def test_hidden_split_is_shown_without_targets(softprompt, config):
    code, out, _ = softprompt("task", config, "--split", "test", "--most", 1)
    assert code == 0
    assert "test: 1 examples" in out
    assert "target" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["boolk"], "task 'boolk': unknown; expected one of "),
        (["spam_sms", "--pin"], "task spam_sms: its rows are not the hub's; expected a task of the hub, or no --pin"),
        (["no.yaml"], "no.yaml: no such file; expected a YAML settings file"),
    ],
)
def test_task_that_cannot_be_shown_is_one_line(refused, arguments, message):
    assert message in refused("task", *arguments)


ROW = {"text": "a warm film", "label": 1}
GOOD = {"input": "{text}", "target": {0: "bad", 1: "good"}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"label": 1}], {}, "a.jsonl:1: no field 'text'; found label"),
        ([ROW], {"input": "{txt}"}, "a.jsonl:1: no field 'txt'; found text, label; did you mean text?"),
        ([], {}, "task mine: split 'train' is empty; expected at least one example"),
        ([ROW | {"label": -1}], {}, "a.jsonl:1: unlabelled (label = -1); expected a label"),
        ([ROW | {"label": 7}], {}, "a.jsonl:1: found label = 7; expected one of 0, 1"),
        ([ROW], {"source": {"kind": "hub", "name": "nobody/nothing"}}, "could not be loaded from the hub ("),
        ([ROW], {"source": {"kind": "files", "validation": "a.jsonl"}}, "no split 'train'; found validation"),
        ([ROW], {"input": "{text"}, "task.input: found '{text'; not a template"),
    ],
)
def test_data_that_do_not_fit_are_one_line_and_exit_2(refused, tmp_path, monkeypatch, rows, settings, message):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", rows)
    source = {"kind": "files", "train": "a.jsonl"}
    task = {"name": "mine", "source": source, **GOOD, **settings}
    assert message in refused("task", write_config(tmp_path / "a.yaml", {"task": task}))


def test_a_target_that_is_too_long_stops_a_run(refused, small, tmp_path):
    settings = small.short | {"max_target_tokens": 1}
    message = refused("train", write_config(tmp_path / "a.yaml", settings), "--out", tmp_path / "run")
    assert "task moods: train: example 0: the target 'yes' has 2 tokens with EOS; expected at most 1; raise" in message


def test_pin_prints_a_config_that_holds_the_commit(softprompt, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: types.SimpleNamespace(sha="c0ffee")
    )
    code, out, _ = softprompt("task", "cb", "--pin")
    assert code == 0
    assert yaml.safe_load(out) == {"task": {"name": "cb", "source": {"revision": "c0ffee"}}}
    (tmp_path / "pinned.yaml").write_text(out)
    task = load_run(tmp_path / "pinned.yaml").tasks[0]
    assert task == get("cb").model_copy(update={"source": get("cb").source.model_copy(update={"revision": "c0ffee"})})
    assert [path.name for path in tmp_path.iterdir()] == ["pinned.yaml"]  # nothing that later runs read


def test_pin_of_a_config_keeps_what_it_changes(softprompt, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: types.SimpleNamespace(sha="c0ffee")
    )
    mine = {"name": "mine", "source": {"kind": "hub", "name": "a/b"}, "label_words": ["x", "y"]}
    tasks = [{"name": "boolq", "with_prefix": True}, mine]
    (tmp_path / "a.yaml").write_text(
        to_yaml({"task": {"kind": "mixture", "tasks": tasks, "rates": "proportional", "prompts": "own"}})
    )
    code, out, _ = softprompt("task", tmp_path / "a.yaml", "--pin")
    assert code == 0
    (tmp_path / "b.yaml").write_text(out)
    before, after = (load_run(tmp_path / name).task for name in ("a.yaml", "b.yaml"))
    assert [task.source.revision for task in after.tasks] == ["c0ffee", "c0ffee"]
    assert after.model_copy(update={"tasks": before.tasks}) == before
    assert (after.tasks[0].with_prefix, after.tasks[1].words) == (True, ["x", "y"])


def test_submission_answers_the_hidden_split(prompt_run, small, tmp_path):
    predictor = load_predictor(prompt_run)
    task = resolve(small.task | {"hidden": ["test"], "submission": "glue/SST-2"})
    path, illegal = predictor.submit(task, "test", tmp_path)
    lines = path.read_text().splitlines()
    assert path.name == "SST-2.tsv"
    assert len(lines) == 1 + 16
    texts = [example.input for example in iterate(task, "test", labelled=False)]
    answers = predictor.texts(texts)
    assert illegal == sum(answer not in ("yes", "no") for answer in answers)
    assert lines[1:] == [f"{i}\t{int(answer == 'no')}" for i, answer in enumerate(answers)]


def test_task_without_a_server_is_refused(refused, prompt_run, tmp_path):
    message = refused("submit", prompt_run, "--to", tmp_path)
    assert "task moods: belongs to no benchmark with a server" in message


def test_average_of_runs_is_the_benchmarks(softprompt, refused, tmp_path):
    from softprompt_jax import Run
    from softprompt_jax.data.submission import BENCHMARKS

    names = [name for group in BENCHMARKS["superglue"] for name in group]
    for number, name in enumerate([*names, "boolq"]):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "config.yaml").write_text(to_yaml(Run(task=name)))
        scores = dict.fromkeys(get(name).metrics, 0.5 + 0.1 * (number == 8)) | {"illegal": 0.0, "count": 9}
        (folder / "result.json").write_text(json.dumps({"validation": scores, "test": None}))
    mixture = {"kind": "mixture", "tasks": ["rte", "wic"]}
    (tmp_path / "5" / "config.yaml").write_text(to_yaml(parse(Run, {"task": mixture}, "test")))
    scores = {name: {"accuracy": 0.5, "illegal": 0.0, "count": 9} for name in ("rte", "wic")}
    (tmp_path / "5" / "result.json").write_text(json.dumps({"validation": {"mean": 0.5, "tasks": scores}}))
    (tmp_path / "6" / "result.json").unlink()
    runs = [tmp_path / str(number) for number in range(9) if number != 6]
    code, out, _ = softprompt("average", "superglue", *runs)
    found = json.loads(out)
    assert code == 0
    assert found["average"] == pytest.approx(0.5 + 0.05 / 8)
    assert found["tasks"]["boolq"] == {"accuracy": pytest.approx(0.55)}
    assert found["tasks"]["cb"] == {"f1_macro": 0.5, "accuracy": 0.5}
    assert "superglue: no scores of cb, copa," in refused("average", "superglue", tmp_path / "0")
    assert "no result.json; expected the folder of a finished run" in refused("average", "glue", tmp_path)
