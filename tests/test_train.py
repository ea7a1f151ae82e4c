"""Runs from their settings to their files: what is written, what is learnt, which checkpoint wins, what is refused."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from small_runs import ROWS, rows, write_config
from tensorboardX.proto.event_pb2 import Event

import softprompt_jax
from softprompt_jax import Run, load_run, methods, progress
from softprompt_jax.assembly import assemble, assemble_trained
from softprompt_jax.checkpoints.artifact import load_artifact, read_metadata
from softprompt_jax.cli import process
from softprompt_jax.config import Diverged, Interrupted, Preempted, UserError, parse, settings_hash
from softprompt_jax.data.batches import evaluation_batches
from softprompt_jax.distributed import folder_lock, multihost
from softprompt_jax.inference.evaluate import mean_loss
from softprompt_jax.progress import Reporter
from softprompt_jax.run import UNHASHED_SETTINGS
from softprompt_jax.training import run_folder
from softprompt_jax.training.run_data import RunData
from softprompt_jax.training.run_folder import begin_folder, check_folder, scores_in

TRAIN = importlib.import_module("softprompt_jax.training.loop")  # the module; the package's `train` is the function
pytestmark = pytest.mark.usefixtures("own_cache")


def run_of(settings, **changes) -> Run:
    return parse(Run, settings | changes, "test")


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


# ------------------------------------------------------------------------------------------ what it writes


def test_saved_config_is_the_run(small, prompt_run):
    assert load_run(prompt_run / "config.yaml") == run_of(small.short)


def test_metrics_have_a_line_per_logged_step(small, prompt_run):
    lines = metrics(prompt_run)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == sorted({*range(4, 41, 4), *range(5, 41, 5)})
    for line in trained:
        assert set(line) == {"step", "loss", "learning_rate", "examples_per_s", "tokens_per_s", "padding", "seconds"}
        assert line["learning_rate"] == pytest.approx(0.3)
        assert line["tokens_per_s"] > line["examples_per_s"] > 0
    assert lines[0]["step"] == 0
    assert set(lines[0]["data"]) == {
        *("examples_per_batch", "batches_per_epoch", "padding", "truncated_inputs", "truncated_targets")
    }
    assert lines[0]["data"]["examples_per_batch"] == 8
    assert lines[0]["data"]["truncated_inputs"] == 0
    assert trained[-1]["padding"] == pytest.approx(lines[0]["data"]["padding"], abs=0.05)
    scored = [line for line in lines if "validation" in line]
    assert [line["step"] for line in scored] == [0, 10, 20, 30, 40]
    assert all(line["validation"]["count"] == 16 for line in scored)


def test_curves_hold_what_metrics_hold(prompt_run):
    (path,) = (prompt_run / "tensorboard").iterdir()
    content, curves, place = path.read_bytes(), {}, 0
    while place < len(content):  # TFRecord: length, its checksum, the event, its checksum
        size = int.from_bytes(content[place : place + 8], "little")
        event = Event.FromString(content[place + 12 : place + 12 + size])
        for value in event.summary.value:
            curves.setdefault(value.tag, {})[event.step] = value.simple_value
        place += size + 16
    assert curves["loss"] == pytest.approx(
        {line["step"]: line["loss"] for line in metrics(prompt_run) if "loss" in line}
    )
    for name in ("accuracy", "loss"):
        assert set(curves[f"validation/{name}"]) == {0, 10, 20, 30, 40}


def test_prompt_file_says_where_it_belongs(small, prompt_run):
    found = load_artifact(prompt_run / "prompt.safetensors")
    prompt, metadata = found.prompt, found.metadata
    trained = load_artifact(prompt_run / "trained.safetensors").tree
    assert prompt.shape == (3, 16)
    np.testing.assert_array_equal(prompt, trained["prompt"]["rows"])
    run = run_of(small.short)
    assert metadata["backbone"] == str(small.backbone)
    assert metadata["fingerprint"] == softprompt_jax.load_backbone(small.backbone).fingerprint()
    assert (metadata["length"], metadata["task"], metadata["settings_hash"]) == (
        "3",
        "moods",
        settings_hash(run, without=UNHASHED_SETTINGS),
    )
    assert parse(Run, json.loads(metadata["settings"]), "prompt") == run


def test_result_has_both_splits_and_what_they_compare_with(prompt_run):
    result = json.loads((prompt_run / "result.json").read_text())
    assert {"test", "validation", "baselines", "steps", "best_step", "seconds"} <= set(result)
    for split in ("test", "validation"):
        assert set(result[split]) == {"accuracy", "illegal", "count"}
    assert result["baselines"]["majority"] == 0.5
    assert result["steps"] == 40
    assert result["seconds"] > 0


def test_nothing_half_written_stays(prompt_run, full_run):
    for folder in (prompt_run, full_run):
        assert not [path for path in folder.rglob("*") if "partial" in path.name or "tmp" in path.name]
        assert len(list((folder / "checkpoints").iterdir())) <= 2


@pytest.mark.slow  # a packed mixture runs in test_mixture.py
def test_packed_run_reports_its_rows_and_learns(small, tmp_path, capsys):
    settings = small.full | {"packing": {"length": 32}, "steps": 40}
    result = softprompt_jax.train(run_of(settings), tmp_path / "run", Reporter())
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("task moods"))
    assert "packed in 2 rows of 32/8, " in line
    assert "padding" in line
    assert result["test"]["accuracy"] >= 0.9
    logged = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert all(0 <= line["padding"] < 0.3 and line["examples_per_s"] > 0 for line in logged)


def test_full_tuning_leaves_no_prompt(full_run):
    assert not (full_run / "prompt.safetensors").exists()
    found = load_artifact(full_run)
    trained, metadata = found.tree, found.metadata
    assert trained["embedding"].shape == (ROWS, 16)
    assert metadata["task"] == "moods"


# ------------------------------------------------------------------------------------------ what it learns


def test_full_tuning_learns_the_task(full_run):
    result = json.loads((full_run / "result.json").read_text())
    assert result["test"]["accuracy"] >= 0.9
    assert result["baselines"]["untrained"]["accuracy"] <= 0.5
    assert losses(full_run)[-1] < 0.3 * losses(full_run)[0]


def test_prompt_tuning_lowers_the_loss(prompt_run):
    found = losses(prompt_run)
    assert np.mean(found[-4:]) < np.mean(found[:4])


def test_of_equal_scores_the_checkpoint_with_the_lowest_loss_is_the_result(small, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 1.0, 2.0, 1.0])  # at steps 0, 10, 20, 30, 40
    monkeypatch.setattr(TRAIN.RunData, "validate", lambda *_: ({"accuracy": 0.0, "loss": next(losses)}, 0.0))
    result = softprompt_jax.train(run_of(small.short), tmp_path / "run")
    assert result["best_step"] == 20
    assert scores_in(tmp_path / "run", run_of(small.short))[20] == (0.0, 1.0)


@pytest.mark.parametrize("predict_by", ["decoding", "likelihood"])  # the latter has the loss from ranking the words
def test_validation_loss_is_the_mean_cross_entropy_of_the_targets(small, prompt_run, predict_by):
    run = run_of(small.short, task=small.task | {"predict_by": predict_by})
    assembly = assemble(run)
    parts = methods.split(assembly.model)
    data = RunData(run, assembly, parts)
    trained = load_artifact(prompt_run / "trained.safetensors").tree
    scores, score = data.validate(trained, parts.frozen)
    batches = [batch for batch, _ in evaluation_batches(data.tasks[0].tokens["validation"], 5, assembly.layout)]
    assert scores["loss"] == pytest.approx(mean_loss(parts, batches)(trained, parts.frozen), rel=1e-5)
    assert score == scores["accuracy"]  # of which the loss is no part


def test_that_most_answers_are_illegal_is_said_once_with_what_to_try(small, tmp_path, monkeypatch, capsys):
    shares = iter([0.9, 0.4, 0.6, 0.7, 0.2])  # at steps 0, 10, 20, 30, 40
    monkeypatch.setattr(TRAIN.RunData, "validate", lambda *_: ({"accuracy": 0.0, "illegal": next(shares)}, 0.0))
    softprompt_jax.train(run_of(small.short), tmp_path / "run", Reporter())
    lines = capsys.readouterr().err.splitlines()
    (place,) = [number for number, line in enumerate(lines) if "more than half of the validation answers" in line]
    assert lines[place - 1].startswith("step 20: validation")  # before training it says nothing
    assert "try predict_by: likelihood" in lines[place]


def test_best_checkpoint_is_the_result_the_earliest_of_equal_ones(small, tmp_path, monkeypatch):
    scores = iter([0.0, 0.2, 0.9, 0.9, 0.1])  # at steps 0, 10, 20, 30, 40

    def validate(self, trainable, frozen):
        score = next(scores)
        return {"accuracy": score}, score

    monkeypatch.setattr(TRAIN.RunData, "validate", validate)
    result = softprompt_jax.train(run_of(small.short), tmp_path / "run")
    assert result["best_step"] == 20
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"20", "40"}

    scores = iter([0.0, 0.2, 0.9])
    shorter = softprompt_jax.train(run_of(small.short, steps=20), tmp_path / "shorter")
    assert shorter["test"] == result["test"]
    found, expected = (load_artifact(tmp_path / name).tree for name in ("run", "shorter"))
    np.testing.assert_array_equal(found["prompt"]["rows"], expected["prompt"]["rows"])


@pytest.mark.slow
def test_pretraining_is_a_run_too(small, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"{row['text']} ." for row in rows()), encoding="utf-8")
    task = {
        "kind": "pretraining",
        "texts": [{"path": str(tmp_path / "text.txt")}],
        "max_input_tokens": 32,
        "max_target_tokens": 32,
        "shapes": [],
        "lexicon": False,
        "stages": [{"until": 1.0, "objectives": {"copy": 1.0}}],
    }
    model = {"vocabulary_rows": ROWS, "d_model": 16, "d_kv": 8, "d_ff": 32}
    model |= {"num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    backbone = {"settings": model, "tokenizer": str(small.backbone)}
    result = softprompt_jax.train(run_of(small.full, task=task, backbone=backbone, steps=20), tmp_path / "run")
    assert result["best_step"] == 20  # the last: pre-training does not choose
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert result["validation"]["loss"] == metrics(tmp_path / "run")[-1]["validation"]["loss"]
    with pytest.raises(UserError, match="prompt with pre-training, whose texts have no place for a prompt"):
        softprompt_jax.train(run_of(small.short, task=task, backbone=backbone), tmp_path / "prompt")
    backbone["settings"] |= {"vocabulary_rows": 110}
    with pytest.raises(UserError, match=r"vocabulary_rows 110; expected at least \d+, the pieces and sentinels"):
        softprompt_jax.train(run_of(small.full, task=task, backbone=backbone), tmp_path / "few")


# --------------------------------------------------------------------------------- again, and what is refused


@pytest.fixture
def no_model(monkeypatch):
    """Fail if a model is loaded: what is refused is refused before that."""

    def assemble(run):
        raise AssertionError("loaded a model")

    monkeypatch.setattr(TRAIN, "assemble", assemble)


@pytest.mark.usefixtures("no_model")
def test_finished_run_returns_its_result(small, prompt_run):
    before = (prompt_run / "metrics.jsonl").read_bytes()
    assert softprompt_jax.train(run_of(small.short), prompt_run) == json.loads((prompt_run / "result.json").read_text())
    assert (prompt_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.usefixtures("no_model")
def test_other_settings_are_refused_with_the_keys_that_differ(small, prompt_run):
    other = run_of(small.short, seed=1, methods=[{"kind": "prompt", "length": 4}])
    with pytest.raises(UserError, match="was made with other settings") as error:
        softprompt_jax.train(other, prompt_run)
    assert "seed: 0 -> 1" in str(error.value)
    assert "length" in str(error.value)
    assert "steps" not in str(error.value)
    assert load_run(prompt_run / "config.yaml") == run_of(small.short)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ("file", "is a file; expected a folder for the run; use another --out"),
        ("notes", "is not empty and no run; expected a new folder; use another --out"),
        ("below a file", r"cannot be written \(Not a directory\)"),
        ("broken config", "config.yaml: not YAML"),
        ("no mapping", "config.yaml: found list; expected a mapping of settings"),
    ],
)
def test_folder_that_is_no_place_for_a_run_is_one_line(small, tmp_path, made, expected):
    out = tmp_path / "out"
    if made == "file":
        out.write_text("mine")
    elif made == "below a file":
        (tmp_path / "file").write_text("mine")
        out = tmp_path / "file" / "out"
    else:
        out.mkdir()
        content = {"notes": "mine", "broken config": "a: [", "no mapping": "[1]"}[made]
        (out / ("notes.txt" if made == "notes" else "config.yaml")).write_text(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=expected) as error:
        softprompt_jax.train(run_of(small.short), out)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_folder_of_a_kill_before_the_first_file_is_a_new_run(small, tmp_path):
    (tmp_path / "config.partial").write_text("task: {na")
    assert check_folder(run_of(small.short), tmp_path) is None
    with begin_folder(run_of(small.short), tmp_path):
        assert load_run(tmp_path / "config.yaml") == run_of(small.short)
        assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.slow
def test_loss_that_is_no_number_is_one_line_and_keeps_what_there_is(small, tmp_path):
    run = run_of(small.full, optimizer={"kind": "adamw", "learning_rate": 1e30})
    with pytest.raises(Diverged, match=r"^step 10: the loss is (nan|inf); expected a finite number; lower the"):
        softprompt_jax.train(run, tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").exists()
    assert not (tmp_path / "run" / "result.json").exists()


def written(folder) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"backbone": "no/where"}, "no/where"),
        ({"task": {"input": "{sentence}"}}, "no field 'sentence'"),
        ({"task": {"label_map": {"maybe": "yes"}}}, "label"),
        ({"max_target_tokens": 1}, "has 2 tokens with EOS"),
    ],
    ids=["backbone", "field", "labels", "data"],
)
def test_a_command_that_fails_before_its_first_step_leaves_room_for_the_corrected_one(
    small, tmp_path, monkeypatch, changes, expected
):
    monkeypatch.setattr(TRAIN, "Checkpoints", None)  # far enough
    task = small.task | changes.pop("task", {})
    with pytest.raises(UserError, match=expected):
        softprompt_jax.train(run_of(small.short | {"task": task}, **changes), tmp_path / "run")
    assert written(tmp_path / "run") == []
    with pytest.raises(TypeError):
        softprompt_jax.train(run_of(small.short), tmp_path / "run")


def test_a_run_that_fails_in_its_first_validation_or_step_takes_its_files_back(small, tmp_path, monkeypatch):
    for name in ("validate", "batches"):
        with monkeypatch.context() as patch:
            patch.setattr(RunData, name, None)
            with pytest.raises(TypeError):
                softprompt_jax.train(run_of(small.short, seed=1), tmp_path / "run")
        assert list((tmp_path / "run").iterdir()) == []
    with monkeypatch.context() as patch:  # from the first step on there is something to go on from
        patch.setattr(TRAIN.Checkpoints, "save", None)
        with pytest.raises(TypeError):
            softprompt_jax.train(run_of(small.short, steps=1), tmp_path / "run")
    assert load_run(tmp_path / "run" / "config.yaml").steps == 1


def test_nothing_is_written_while_another_command_is_in_a_new_folder(small, tmp_path):
    (tmp_path / "run").mkdir()
    with folder_lock.lock_folder(tmp_path / "run"), pytest.raises(UserError, match="expected one at a time"):
        softprompt_jax.train(run_of(small.short), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.usefixtures("no_model")
def test_process_0_decides_for_all_whether_a_run_is_finished(small, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(TRAIN, "assert_same_everywhere", lambda *_: None)
    for answer in ({"value": {"steps": 40}}, {"error": "out: was made with other settings"}):
        monkeypatch.setattr(multihost, "_broadcast_text", lambda _, answer=answer: json.dumps(answer))
        if "value" in answer:
            assert softprompt_jax.train(run_of(small.short), tmp_path / "none") == {"steps": 40}
        else:
            with pytest.raises(UserError, match="was made with other settings"):
                softprompt_jax.train(run_of(small.short), tmp_path / "none")
    assert not (tmp_path / "none").exists()  # this process looked nowhere


def test_long_targets_are_an_error_unless_cut(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TRAIN, "Checkpoints", None)  # far enough
    with pytest.raises(UserError, match=r"^task moods: train: example 0: the target 'yes' has 2 tokens with EOS; exp"):
        softprompt_jax.train(run_of(small.short, max_target_tokens=1), tmp_path / "run")
    task = small.task | {"target": {"yes": "the old mill", "no": "the night train"}, "label_words": None}
    with pytest.raises(TypeError):
        softprompt_jax.train(
            run_of(small.short, task=task, max_target_tokens=3, truncate_targets=True), tmp_path / "cut", Reporter()
        )
    assert "0 inputs truncated to 12 tokens, 96 targets to 3" in capsys.readouterr().err


def test_label_words_that_are_one_to_the_tokenizer_are_refused(small, tmp_path):
    task = small.task | {"target": {"yes": "\U0001f600", "no": "\U0001f621"}, "label_words": None}
    with pytest.raises(
        UserError, match=r"^task moods: the label words '\U0001f600' and '\U0001f621' are the same, as tokens"
    ):
        softprompt_jax.train(run_of(small.short, task=task), tmp_path / "run")


def test_long_inputs_are_cut_counted_and_reported(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TRAIN, "Checkpoints", None)  # far enough
    with pytest.raises(TypeError):
        softprompt_jax.train(run_of(small.short, max_input_tokens=5), tmp_path / "run", Reporter())
    text = capsys.readouterr().err
    assert "task moods: train 64, validation 16, test 16; shapes 11/2;" in text
    assert "96 inputs truncated to 5 tokens" in text


def test_a_folder_in_which_another_process_trains_is_refused_until_that_ends(small, prompt_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes((prompt_run / "config.yaml").read_bytes())
    before = sorted((tmp_path / "run").iterdir())
    code = (
        "import sys, time; from pathlib import Path; from softprompt_jax.distributed.folder_lock import lock_folder\n"
    )
    code += "with lock_folder(Path(sys.argv[1])): print('in', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UserError, match="another process trains in it; expected one at a time"):
            softprompt_jax.train(run_of(small.short), tmp_path / "run")
        assert sorted((tmp_path / "run").iterdir()) == before
        other.kill()
    softprompt_jax.train(run_of(small.short), tmp_path / "run")
    assert (tmp_path / "run" / "prompt.safetensors").read_bytes() == (prompt_run / "prompt.safetensors").read_bytes()


def said(folder) -> list[dict]:
    """What metrics.jsonl says, without what the clock says."""
    clock = {"seconds", "examples_per_s", "tokens_per_s"}
    return [{key: value for key, value in line.items() if key not in clock} for line in metrics(folder)]


def drawn(folder) -> dict[str, dict[int, float]]:
    """What TensorBoard draws: of each tag the numbers by step, those behind a new start taken away."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content = io.BytesIO(path.read_bytes())
        while header := content.read(12):
            event = Event.FromString(content.read(int.from_bytes(header[:8], "little")))
            content.read(4)
            if event.session_log.status:
                found = {tag: {s: v for s, v in each.items() if s < event.step} for tag, each in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return {tag: each for tag, each in found.items() if not tag.endswith(("_per_s", "seconds"))}


def test_a_run_that_is_stopped_again_and_again_leaves_the_lines_of_one_that_was_not(
    small, prompt_run, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    for steps in (3, 4, 6, 1):  # ends at 3, 7, 13, 14, none of which has a line of its own
        left = iter(range(steps, 0, -1))
        with monkeypatch.context() as patch:
            patch.setattr(multihost.Preemption, "reached", lambda self, loss, left=left: next(left) == 1)
            with pytest.raises(Preempted):
                softprompt_jax.train(run_of(small.short), folder)
    with monkeypatch.context() as patch:
        patch.setattr(TRAIN.SaveTimer, "due", lambda self, step: step == 17)  # time adds no line either
        softprompt_jax.train(run_of(small.short), folder)
    assert said(folder) == said(prompt_run)
    assert drawn(folder) == drawn(prompt_run)
    assert (folder / "prompt.safetensors").read_bytes() == (prompt_run / "prompt.safetensors").read_bytes()


def test_the_name_of_this_machine_is_in_no_name_of_a_run(prompt_run):
    assert [path for path in prompt_run.rglob("*") if socket.gethostname() in path.name] == []


def test_a_loss_that_is_no_number_is_never_saved(small, tmp_path, monkeypatch):
    monkeypatch.setattr(TRAIN.SaveTimer, "due", lambda self, step: step in (2, 7))
    made, count = TRAIN.make_step, iter(range(1, 9))

    def make_step(*arguments):
        step = made(*arguments)

        def failing(*given):
            state, measured = step(*given)
            return state, measured | {"loss": measured["loss"] if next(count) < 5 else np.float32("nan")}

        return failing

    monkeypatch.setattr(TRAIN, "make_step", make_step)
    every = dict.fromkeys(("steps", "log_every", "evaluate_every", "checkpoint_every"), 8)
    with pytest.raises(Diverged, match=r"^step 7: the loss is nan"):
        softprompt_jax.train(run_of(small.short, **every), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]


# ------------------------------------------------------------------------------------------------ damaged files

NOT_JSON = {"empty": b"", "half": b'{"step": 1, "vali', "binary": bytes(range(256)), "nesting": b"[" * 100_000}
OTHERS = {"a list": b"[]", "a number": b"7", "nothing": b"{}", "null": b"null", "other types": b'{"validation": [1]}'}


@pytest.mark.parametrize("content", [*(NOT_JSON | OTHERS).values(), None], ids=[*NOT_JSON, *OTHERS, "a folder"])
def test_a_damaged_result_is_one_line_and_comes_back_once_it_is_deleted(
    small, prompt_run, tmp_path, refused, softprompt, content
):
    config = write_config(tmp_path / "a.yaml", small.short)
    run, path = shutil.copytree(prompt_run, tmp_path / "run"), tmp_path / "run" / "result.json"
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    for command in (
        ("train", config, "--out", run, "--quiet"),
        ("report", run, "--to", tmp_path / "page"),
        ("show", run),
    ):
        assert f"{path}: " in (line := refused(*command))
        assert "delete it, and the same command evaluates again" in line
    if content == b"{}":
        path.unlink()
        code, out, _ = softprompt("train", config, "--out", run, "--quiet")
        expected = json.loads((prompt_run / "result.json").read_text())
        assert (code, json.loads(out) | {"seconds": 0}) == (0, expected | {"seconds": 0})
        assert said(run) == said(prompt_run)


LINES = {
    **NOT_JSON,
    **OTHERS,
    "a byte": b'{"step": 4, "loss": "\xff"}',
    "a text": b'{"step": 4, "loss": "1"}',
    "a step that is none": b'{"step": "4", "loss": 1}',
    "no step": b'{"loss": 1}',
    "no metric": b'{"step": 10, "validation": {"loss": 1}}',
}


def test_a_digit_of_a_result_is_no_other_result(small, prompt_run, tmp_path, refused, softprompt):
    config = write_config(tmp_path / "a.yaml", small.short)
    run, path = shutil.copytree(prompt_run, tmp_path / "run"), tmp_path / "run" / "result.json"
    written = path.read_text()
    result = json.loads(written)
    result["test"]["accuracy"] += 0.001
    path.write_text(json.dumps(result))
    for command in (("train", config, "--out", run, "--quiet"), ("show", run)):
        assert f"{path}: is not what the run has written (its checksum differs)" in refused(*command)
    path.unlink()
    assert softprompt("train", config, "--out", run, "--quiet")[0] == 0
    again = json.loads(path.read_text())
    assert again | {"seconds": 0} == json.loads(written) | {"seconds": 0}


@pytest.mark.parametrize("line", [*LINES.values(), None], ids=[*LINES, "a folder"])
def test_damaged_metrics_are_one_line_and_the_run_goes_on_without_them(
    small, prompt_run, tmp_path, refused, softprompt, line
):
    config = write_config(tmp_path / "a.yaml", small.short)
    run, path = shutil.copytree(prompt_run, tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    (run / "result.json").unlink()
    if line is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(path.read_bytes() + line.replace(b"\n", b"") + b"\n")
    for command in (("train", config, "--out", run, "--quiet"), ("report", run, "--to", tmp_path / "page")):
        found = refused(*command)
        assert f"{path}: " in found
        assert "; delete " in found
    if line is None:
        path.rmdir()
        assert softprompt("train", config, "--out", run, "--quiet")[0] == 0
        assert (run / "prompt.safetensors").read_bytes() == (prompt_run / "prompt.safetensors").read_bytes()


def _cut(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:3])


def _other_digit(content: bytes) -> bytes:
    at = content.index(b'"loss": ') + 8
    return content[:at] + (b"1" if content[at : at + 1] != b"1" else b"2") + content[at + 1 :]


@pytest.mark.parametrize("damage", [lambda content: b"", _cut, _other_digit], ids=["empty", "cut", "a digit"])
@pytest.mark.parametrize("finished", [False, True])
def test_metrics_that_the_run_has_not_written_are_one_line(
    small, prompt_run, tmp_path, refused, softprompt, finished, damage
):
    config = write_config(tmp_path / "a.yaml", small.short)
    run, path = shutil.copytree(prompt_run, tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(before := damage(path.read_bytes()))
    if finished:
        refused_by = ("report", run, "--to", tmp_path / "page")
    else:
        (run / "result.json").unlink()
        refused_by = ("train", config, "--out", run, "--quiet")
    line = refused(*refused_by)
    assert f"{path}: is not what the run has written" in line
    assert path.read_bytes() == before
    path.unlink()
    assert softprompt(*refused_by)[0] == 0
    assert (run / "trained.safetensors").exists()


@pytest.mark.parametrize("said", ["[" * 100_000, "{}", '["a", 1]', "[-1, 0]", "7", "[1, 2, 3]", "[10000000000, 0]"])
def test_a_checksum_of_metrics_that_no_run_writes_is_one_line(prompt_run, tmp_path, refused, said):
    run = shutil.copytree(prompt_run, tmp_path / "run")
    path = run / "trained.safetensors"
    save_file(load_file(path), path, metadata=read_metadata(path) | {"metrics_crc32": said})
    assert f"{run / 'metrics.jsonl'}: is not what the run has written" in refused("report", run, "--to", tmp_path / "p")


@pytest.mark.parametrize("name", ["tensorboard", "checkpoints", "metrics.jsonl"])
def test_a_file_or_folder_in_the_place_of_another_is_one_line(small, prompt_run, tmp_path, refused, name):
    config, run = write_config(tmp_path / "a.yaml", small.short), tmp_path / "run"
    run.mkdir()
    shutil.copy(prompt_run / "config.yaml", run)
    (run / name).mkdir() if name == "metrics.jsonl" else (run / name).write_text("mine")
    assert f"{run / name}" in refused("train", config, "--out", run, "--quiet")


def test_an_unfinished_run_is_used_without_the_file_that_it_started_from(small, prompt_run, tmp_path):
    start = tmp_path / "start.safetensors"
    shutil.copy(prompt_run / "prompt.safetensors", start)
    init = {"kind": "file", "path": str(start)}
    for method in ({"kind": "prompt", "init": init}, {"kind": "prefix", "network": None, "init": init}):
        run = run_of(small.short, steps=1, evaluate_every=1, methods=[method | {"length": 3}])
        softprompt_jax.train(run, folder := tmp_path / method["kind"])
        for name in ("result.json", "trained.safetensors", "prompt.safetensors"):
            (folder / name).unlink(missing_ok=True)
    start.unlink()
    for kind in ("prompt", "prefix"):
        found = load_artifact(tmp_path / kind)
        assert found.step == 1
        assert assemble_trained(found, load_run(tmp_path / kind / "config.yaml")).model is not None


# --------------------------------------------------------------------------------------- one folder, one command


@pytest.mark.parametrize("seed", [0, 1], ids=["same settings", "other settings"])
def test_a_command_that_trains_is_not_disturbed_by_a_second_one_at_any_step_of_its_start(
    small, prompt_run, tmp_path, monkeypatch, seed
):
    """Whenever the first writes, renames or saves anything, the second comes."""
    folder, told, busy = tmp_path / "run", [], False

    def second() -> None:
        nonlocal busy
        if busy:
            return
        busy = True
        with pytest.raises(UserError) as refused:
            softprompt_jax.train(run_of(small.short, seed=seed), folder)
        told.append(str(refused.value))
        busy = False

    def around(function):
        def call(*args, **kwargs):
            second()
            found = function(*args, **kwargs)
            second()
            return found

        return call

    for owner, name in (
        *((run_folder, name) for name in ("check_folder", "load_run", "at_read_revisions", "leave_files")),
        *((Path, name) for name in ("write_text", "replace")),
        *((TRAIN.Checkpoints, name) for name in ("__init__", "save", "restore_newest")),
        *((TRAIN, name) for name in ("assemble", "make_step")),
        (run_folder.Log, "__init__"),
    ):
        monkeypatch.setattr(owner, name, around(getattr(owner, name)))
    softprompt_jax.train(run_of(small.short), folder)
    assert len(told) > 30
    assert not [line for line in told if "\n" in line or not line.startswith(f"{folder}: ")]
    expected = {"another process trains in it; expected one at a time; wait for its end with --wait"}
    if seed == 1:
        expected.add("was made with other settings (seed: 0 -> 1)")
    for words in expected:
        assert any(words in line for line in told)
    assert all(any(words in line for words in expected) for line in told)
    assert load_run(folder / "config.yaml").seed == 0
    assert (folder / "prompt.safetensors").read_bytes() == (prompt_run / "prompt.safetensors").read_bytes()
    assert said(folder) == said(prompt_run)


def test_a_command_may_wait_for_the_one_that_trains_and_finds_its_result(small, prompt_run, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    taken, done = threading.Event(), threading.Event()

    def other() -> None:
        with folder_lock.lock_folder(folder):
            taken.set()
            done.wait(60)
            shutil.copytree(prompt_run, folder, dirs_exist_ok=True)

    class Told(Reporter):
        def line(self, text: str) -> None:
            super().line(text)
            done.set()

    with contextlib.ExitStack() as stack:
        held = threading.Thread(target=other)
        held.start()
        stack.callback(held.join)
        assert taken.wait(60)
        result = softprompt_jax.train(run_of(small.short), folder, Told(), wait=True)
    assert result == json.loads((prompt_run / "result.json").read_text())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"{folder}: another command trains in it; waiting for its end"
    assert lines[1].startswith(f"{folder}: finished already")


@pytest.mark.parametrize("made_again", [False, True], ids=["deleted", "made again"])
@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (RunData, "validate", 1),  # at the start
        (RunData, "validate", 3),
        (TRAIN.Checkpoints, "__init__", 1),
        (TRAIN.Checkpoints, "save", 2),
        (run_folder, "leave_files", 1),
        (run_folder.Log, "write", 4),
    ],
    ids=["start", "validation", "open", "save", "end", "line"],
)
def test_a_folder_that_is_deleted_under_a_run_ends_it_in_a_line_and_what_is_new_there_stays(
    small, tmp_path, monkeypatch, made_again, owner, name, count
):
    folder, left, function = tmp_path / "run", count, getattr(owner, name)

    def deleting(*args, **kwargs):
        nonlocal left
        left -= 1
        found = function(*args, **kwargs) if name == "validate" else None
        if left == 0:
            while folder.exists():  # a checkpoint may be under way
                shutil.rmtree(folder, ignore_errors=True)
            if made_again:
                folder.mkdir()
                (folder / "config.yaml").write_text("another's")
        return found if name == "validate" else function(*args, **kwargs)

    monkeypatch.setattr(owner, name, deleting)
    with pytest.raises(UserError, match=r"run: was deleted or moved while this command was in it") as error:
        softprompt_jax.train(run_of(small.short, evaluate_every=20), folder)
    assert "\n" not in str(error.value)
    if made_again and name == "validate":  # elsewhere it is deleted between looking and writing
        assert {path.name for path in folder.iterdir()} == {"config.yaml"}
    if made_again:
        assert (folder / "config.yaml").read_text() == "another's"
    elif name == "validate":
        assert not folder.exists()


def test_a_finished_run_is_made_longer_to_the_bits_of_a_run_that_was_never_shorter(
    small, prompt_run, tmp_path, capsys, monkeypatch
):
    longer, folder = run_of(small.short, steps=60), tmp_path / "run"
    shutil.copytree(prompt_run, folder)
    with monkeypatch.context() as patch:  # it fails before its first step: still finished
        patch.setattr(RunData, "batches", None)
        with pytest.raises(TypeError):
            softprompt_jax.train(longer, folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in prompt_run.iterdir()}
    assert softprompt_jax.train(run_of(small.short), folder) == json.loads((prompt_run / "result.json").read_text())
    result = softprompt_jax.train(longer, folder, Reporter())
    assert "resumed at step 40" in capsys.readouterr().err
    assert load_run(folder / "config.yaml") == longer
    expected = softprompt_jax.train(longer, tmp_path / "whole")
    assert result.result | {"seconds": 0} == expected.result | {"seconds": 0}
    assert (folder / "prompt.safetensors").read_bytes() == (tmp_path / "whole" / "prompt.safetensors").read_bytes()
    assert losses(folder) == losses(tmp_path / "whole")
    with pytest.raises(UserError, match=r"was made with other settings \(steps: 60 -> 40\)"):
        softprompt_jax.train(run_of(small.short), folder)


@pytest.mark.parametrize(
    ("schedule", "latest", "reason"),
    [
        ({"decay": "constant", "warmup_steps": 3}, 40, None),
        ({"decay": "inverse_sqrt", "warmup_steps": 3}, 40, None),
        ({"decay": "linear", "warmup_steps": 20}, 10, None),  # still warming up
        ({"decay": "linear"}, None, None),  # no checkpoint yet
        ({"decay": "linear", "warmup_steps": 20}, 30, "its linear decay was that of 40 steps"),
        ({"decay": "cosine"}, 5, "its cosine decay was that of 40 steps"),
    ],
)
def test_a_run_is_made_longer_where_its_learning_rates_so_far_stay(small, tmp_path, schedule, latest, reason):
    shorter = run_of(small.short, schedule=schedule)
    with begin_folder(shorter, tmp_path) as begun:
        begun()
    if latest is not None:
        with contextlib.closing(TRAIN.Checkpoints(tmp_path / "checkpoints")) as checkpoints:
            checkpoints.save(latest, {"step": np.int32(latest)})
    longer = run_of(small.short, schedule=schedule, steps=60)
    if reason is None:
        assert check_folder(longer, tmp_path, tmp_path / "checkpoints") is None
    else:
        with pytest.raises(UserError, match=rf"cannot go on from 40 to 60 steps \({reason}") as error:
            check_folder(longer, tmp_path, tmp_path / "checkpoints")
        assert "\n" not in str(error.value)
    assert load_run(tmp_path / "config.yaml") == shorter


def test_a_finished_run_without_its_checkpoints_cannot_be_made_longer(small, prompt_run, tmp_path):
    for name in ("config.yaml", "result.json"):
        shutil.copy(prompt_run / name, tmp_path)
    with pytest.raises(UserError, match=r"cannot go on from 40 to 60 steps \(its checkpoints are gone"):
        check_folder(run_of(small.short, steps=60), tmp_path, tmp_path / "checkpoints")


def test_a_checkpoint_comes_by_time_too(small, tmp_path, monkeypatch):
    saved, save = [], TRAIN.Checkpoints.save
    monkeypatch.setattr(
        TRAIN.Checkpoints, "save", lambda self, step, *rest: (saved.append(step), save(self, step, *rest))
    )
    monkeypatch.setattr(TRAIN.SaveTimer, "due", lambda self, step: step in (2, 5))
    every = {"steps": 7, "evaluate_every": 1000, "checkpoint_every": 1000, "log_every": 1000}
    softprompt_jax.train(run_of(small.short, **every), tmp_path / "run")
    assert saved == [2, 5, 7]
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [
        7
    ]  # lines do not follow the clock


@pytest.mark.parametrize("count", [1, 2])
def test_time_saves_at_the_same_steps_in_every_process_by_the_clock_of_process_0(monkeypatch, count):
    now, told = 0.0, []
    monkeypatch.setattr(TRAIN.time, "monotonic", lambda: now)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    timers = [TRAIN.SaveTimer(0) for _ in range(count)]

    def run_on_process_0(action):
        told.append(action())
        return told[-1 - (len(told) - 1) % count]  # the first of each round

    monkeypatch.setattr(TRAIN, "run_on_process_0", run_on_process_0)
    saves: list[list[int]] = [[] for _ in timers]
    for step in range(1, 1001):
        now += 2.0  # seconds a step, at first more
        for timer, own in zip(timers, saves, strict=True):
            if timer.due(step):
                own.append(step)
                timer.saved(step, 0.0)
        now += 30.0 * (step < 3)
    assert all(own == saves[0] for own in saves)
    assert len(saves[0]) == pytest.approx((2 * 1000 + 60) / TRAIN.SAVE_EVERY_S, abs=1.5)
    if count > 1:
        assert len(told) < count * 12 * len(saves[0])  # they wait for each other a few times only


def test_a_slow_checkpoint_takes_a_twentieth_of_the_time_at_most(monkeypatch):
    now = 0.0
    monkeypatch.setattr(TRAIN.time, "monotonic", lambda: now)
    timer = TRAIN.SaveTimer(0)
    timer.saved(0, 60.0)
    now = 1199.0
    assert not timer.due(1)
    now = 1200.0
    assert timer.due(2)


def test_time_left_and_speed_leave_out_steps_that_compile(monkeypatch, capsys):
    now = 0.0
    for module in (progress, TRAIN):
        monkeypatch.setattr(module.time, "monotonic", lambda: now)
    reporter, meter = Reporter(), TRAIN.Meter()
    reporter.start("train", 0, 100)
    for step in range(1, 11):
        now += 200.0 if step == 1 else 1.0
        if step == 1:
            reporter.skip(200.0)
        meter.add(np.float32(2), TRAIN.BatchCounts(30, 20, 60, 8), 200.0 if step == 1 else None)
    reporter.update(10, 100, "loss 2")
    assert "step 10/100  loss 2  1m30s left" in capsys.readouterr().err
    speed = meter.read()
    assert (speed.loss, speed.examples_per_s, speed.tokens_per_s, speed.padding) == (2, 8, 30, 0.25)
    reporter.start("train", 0, 100)  # nothing but a compilation: better than no figure
    now += 50.0
    reporter.skip(50.0)
    reporter.update(1, 100, "loss 2")
    assert "1h22m left" in capsys.readouterr().err


def test_the_bar_names_its_times(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    reporter = Reporter()
    reporter.start("train", 0, 100)
    reporter.update(50, 100, "loss 2")
    console = Console(width=150, file=io.StringIO())
    console.print(reporter._bar)
    reporter.stop()
    assert re.search(r"50/100 +0:00:00 +elapsed +0s left +loss 2", console.file.getvalue())


def test_the_second_interrupt_goes_to_whoever_had_it_before():
    told: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: told.append(number))
    try:
        with contextlib.suppress(Preempted), multihost.Preemption() as preemption:
            signal.raise_signal(signal.SIGINT)
            assert (preemption.reached(None), told) == (True, [])
            signal.raise_signal(signal.SIGINT)
            assert told == [signal.SIGINT]
            assert isinstance(preemption.stopped("x"), Interrupted)
            raise Preempted
        assert told == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_leaving_is_noticed_and_the_old_answer_to_sigterm_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(Preempted), multihost.Preemption() as preemption:
        assert not preemption.reached(None)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(None)
        raise Preempted
    assert signal.getsignal(signal.SIGTERM) is before


class Pending:
    """The loss of a step that has begun; it is there when somebody waits for it."""

    def __init__(self, loss):
        self.loss, self.waited = loss, False

    def block_until_ready(self):
        self.waited = True
        return self

    def __float__(self):
        self.waited = True
        return float(self.loss)


def test_no_more_than_three_steps_are_queued_so_that_a_notice_is_heeded_soon(small, tmp_path, monkeypatch):
    made, begun, queued = TRAIN.make_step, [], []

    def make_step(*arguments):
        step = made(*arguments)

        def pending(*given):
            state, measured = step(*given)
            begun.append(Pending(measured["loss"]))
            queued.append(sum(not each.waited for each in begun))
            return state, measured | {"loss": begun[-1]}

        return pending

    monkeypatch.setattr(TRAIN, "make_step", make_step)
    every = dict.fromkeys(("steps", "log_every", "evaluate_every", "checkpoint_every"), 8)
    softprompt_jax.train(run_of(small.short, **every), tmp_path / "run")
    assert queued == [1, 1, 2, 3, 3, 3, 3, 3]  # the first compiles and is waited for


def test_a_notice_after_a_run_has_looked_for_the_last_time_goes_to_whoever_had_sigterm_before(
    small, tmp_path, monkeypatch
):
    found, told = RunData.result, []
    monkeypatch.setattr(RunData, "result", lambda *words: (found(*words), signal.raise_signal(signal.SIGTERM))[0])
    before = signal.signal(signal.SIGTERM, lambda *_: told.append((tmp_path / "run" / "result.json").exists()))
    try:
        softprompt_jax.train(run_of(small.short, steps=1), tmp_path / "run")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [True]


def test_part_of_the_validation_split_is_for_training_only(small, tmp_path):
    run = run_of(small.short, steps=2, evaluate_every=2, evaluation_examples=5)
    result = softprompt_jax.train(run, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation"]["count"] for line in lines if "validation" in line] == [5, 5]
    assert result["validation"]["count"] == 16


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard/events.out.tfevents"])
def test_a_full_disk_is_told_with_the_file_that_did_not_fit(small, tmp_path, refused, monkeypatch, name):
    full, write = OSError(28, os.strerror(28)), run_folder.TensorBoard._add

    def add(self, **values):
        if "summary" in values:
            raise full
        write(self, **values)

    opened = Path.open

    def fail(self, mode="r", *rest, **more):
        if self.name == name and mode == "a":
            raise full
        return opened(self, mode, *rest, **more)

    if name == "metrics.jsonl":
        monkeypatch.setattr(Path, "open", fail)
    else:
        monkeypatch.setattr(run_folder.TensorBoard, "_add", add)
    config = write_config(tmp_path / "a.yaml", small.short)
    line = refused("train", config, "--out", tmp_path / "run", "--quiet")
    assert str(tmp_path / "run" / name) in line
    assert "cannot be written (No space left on device)" in line


def test_what_tensorstore_says_of_a_write_that_nobody_waits_for_is_not_printed(monkeypatch):
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    process.prepare()
    closed, other = (types.SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "other"))
    sys.unraisablehook(closed)
    sys.unraisablehook(other)
    assert told == [other]
