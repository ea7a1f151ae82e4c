"""Runs from their settings to their files: what is written, what is learnt, which checkpoint wins, what is refused."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from small_runs import ROWS, rows
from tensorboardX.proto.event_pb2 import Event

import softprompt_jax
from softprompt_jax import Run, load_run
from softprompt_jax.checkpoints.artifact import load_trained, read_prompt
from softprompt_jax.config import Diverged, Preempted, UserError, parse, settings_hash
from softprompt_jax.distributed import folder_lock, multihost
from softprompt_jax.progress import Reporter
from softprompt_jax.run import UNHASHED_SETTINGS
from softprompt_jax.training.run_data import RunData
from softprompt_jax.training.run_folder import begin_folder, check_folder

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
    assert set(curves["validation/accuracy"]) == {0, 10, 20, 30, 40}


def test_prompt_file_says_where_it_belongs(small, prompt_run):
    prompt, metadata = read_prompt(prompt_run / "prompt.safetensors")
    trained, _ = load_trained(prompt_run / "trained.safetensors")
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
    trained, metadata = load_trained(full_run / "trained.safetensors")
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
    found, expected = (load_trained(tmp_path / name / "trained.safetensors")[0] for name in ("run", "shorter"))
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


def test_long_targets_are_an_error_unless_cut(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TRAIN, "Checkpoints", None)  # far enough
    with pytest.raises(UserError, match=r"^task moods: train: example 0: the target 'yes' has 2 tokens with EOS; exp"):
        softprompt_jax.train(run_of(small.short, max_target_tokens=1), tmp_path / "run")
    with pytest.raises(TypeError):
        softprompt_jax.train(
            run_of(small.short, max_target_tokens=1, truncate_targets=True), tmp_path / "cut", Reporter()
        )
    assert "0 inputs truncated to 12 tokens, 96 targets to 1" in capsys.readouterr().err


def test_long_inputs_are_cut_counted_and_reported(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TRAIN, "Checkpoints", None)  # far enough
    with pytest.raises(TypeError):
        softprompt_jax.train(run_of(small.short, max_input_tokens=5), tmp_path / "run", Reporter())
    text = capsys.readouterr().err
    assert "task moods: train 64, validation 16, test 16; shapes 11/2;" in text
    assert "96 inputs truncated to 5 tokens" in text


def test_a_folder_in_which_another_process_trains_is_refused_until_that_ends(small, prompt_run, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes((prompt_run / "config.yaml").read_bytes())
    before = sorted((tmp_path / "run").iterdir())
    code = "import sys, time; from pathlib import Path; from softprompt_jax.distributed.folder_lock import lock_folder\n"
    code += "with lock_folder(Path(sys.argv[1])): print('in', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        monkeypatch.setattr(TRAIN, "lock_folder", functools.partial(folder_lock.lock_folder, wait_s=0.1))
        with pytest.raises(UserError, match="another process trains in it; expected one at a time"):
            softprompt_jax.train(run_of(small.short), tmp_path / "run")
        assert sorted((tmp_path / "run").iterdir()) == before
        other.kill()
    softprompt_jax.train(run_of(small.short), tmp_path / "run")
    assert (tmp_path / "run" / "prompt.safetensors").read_bytes() == (prompt_run / "prompt.safetensors").read_bytes()


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
