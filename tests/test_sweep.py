"""Sweeps: prompts that train together end where each would have ended alone, and a killed sweep goes on."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_lm
from small_runs import write_config

import softprompt_jax
from softprompt_jax import load_run
from softprompt_jax.checkpoints.artifact import load_prompt
from softprompt_jax.config import Diverged, UserError
from softprompt_jax.training import vmapped
from softprompt_jax.training.sweep import members, read_axis, sweep

SWEEP = importlib.import_module("softprompt_jax.training.sweep")  # the module; the package's `sweep` is the function
pytestmark = pytest.mark.usefixtures("own_cache")


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def config(small, tmp_path_factory):
    """Return a config with everything that each prompt must have for itself: dropout, clipping, a schedule."""
    settings = small.short | {
        "dropout": 0.1,
        "clip_norm": 1.0,
        "schedule": {"warmup_steps": 4, "decay": "linear"},
        "steps": 20,
        "checkpoint_every": 10,
    }
    return write_config(tmp_path_factory.mktemp("sweep") / "config.yaml", settings)


@pytest.fixture(scope="module")
def swept(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTPROMPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return folder, sweep(config, ["seed=0..1", "learning_rate=0.1,0.3"], folder)


def assert_equal(folder, alone, name):
    """Check that a run of a sweep is the run that stood alone: prompt, losses, learning rates, scores."""
    found, expected = load_prompt(folder / name), load_prompt(alone)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    both = [[line for line in lines(path) if "loss" in line] for path in (folder / name, alone)]
    assert [line["step"] for line in both[0]] == [line["step"] for line in both[1]]
    for one, other in zip(*both, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-6)
        assert one["padding"] == other["padding"]
    results = [json.loads((path / "result.json").read_text()) for path in (folder / name, alone)]
    for key in ("validation", "test", "baselines", "best_step", "steps", "trainable_parameters"):
        assert results[0][key] == results[1][key]


@pytest.mark.slow
def test_prompt_of_a_sweep_is_the_prompt_of_its_own_run(swept, config, tmp_path):
    softprompt_jax.train(load_run(config, ["seed=1", "optimizer.learning_rate=0.1"]), tmp_path / "alone")
    assert_equal(swept[0], tmp_path / "alone", "seed=1,learning_rate=0.1")
    others = [load_prompt(swept[0] / name) for name in ("seed=0,learning_rate=0.1", "seed=1,learning_rate=0.3")]
    assert all(np.abs(load_prompt(tmp_path / "alone") - other).max() > 0.1 for other in others)


@pytest.mark.slow
def test_prompts_without_dropout_and_with_adamw_are_those_of_their_own_runs(config, tmp_path):
    changes = ["dropout=0", "clip_norm=null", "optimizer={kind: adamw, learning_rate: 0.1}", "methods.0.length=5"]
    sweep(config, ["init=labels,random", "optimizer.learning_rate=0.05,0.2"], tmp_path / "out", changes)
    own = [*changes, "methods.0.init=random", "optimizer.learning_rate=0.2"]
    softprompt_jax.train(load_run(config, own), tmp_path / "alone")
    assert_equal(tmp_path / "out", tmp_path / "alone", "init=random,learning_rate=0.2")


def test_sweep_leaves_runs_a_table_and_the_best(swept, config):
    folder, result = swept
    assert json.loads((folder / "sweep.json").read_text()) == result
    assert [run["name"] for run in result["runs"]] == [
        f"seed={seed},learning_rate={rate}" for seed in (0, 1) for rate in (0.1, 0.3)
    ]
    assert {path.name for path in folder.iterdir()} == {*(run["name"] for run in result["runs"]), "sweep.json"}
    for row, rate in zip(result["table"], (0.1, 0.3), strict=True):
        own = [run["score"]["test"] for run in result["runs"] if run["settings"]["learning_rate"] == rate]
        assert row["settings"] == {"learning_rate": rate}
        assert row["runs"] == 2
        assert row["test"]["mean"] == pytest.approx(np.mean(own))
        assert row["test"]["sd"] == pytest.approx(np.std(own, ddof=1))
        assert row["test"]["best"] == max(own)
    best = max(run["score"]["validation"] for run in result["runs"])
    chosen = next(run for run in result["runs"] if run["name"] == result["best"]["moods"])
    assert chosen["score"]["validation"] == best
    run = load_run(folder / "seed=1,learning_rate=0.1" / "config.yaml")
    assert run == load_run(config, ["seed=1", "optimizer.learning_rate=0.1"])


@pytest.mark.usefixtures("no_training")
def test_finished_sweep_returns_its_result_and_more_runs_are_added(swept, config, monkeypatch):
    folder, result = swept
    assert sweep(config, ["seed=0..1", "learning_rate=0.1,0.3"], folder) == result
    monkeypatch.setattr(SWEEP, "_train_group", lambda group, *_: asked.append([m.name for m in group]))
    asked: list[list[str]] = []
    with pytest.raises(UserError, match="has no result"):  # nothing was trained
        sweep(config, ["seed=0..2", "learning_rate=0.1"], folder)
    assert asked == [["seed=2,learning_rate=0.1"]]


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(SWEEP, "backbone_of", None)


@pytest.mark.usefixtures("no_training")
def test_sweep_into_runs_of_other_settings_is_refused(swept, config):
    with pytest.raises(UserError, match=r"was made with other settings \(steps: 20 -> 30\)"):
        sweep(config, ["seed=0..1", "learning_rate=0.1,0.3"], swept[0], ["steps=30"])


@pytest.mark.usefixtures("no_training")
def test_command_prints_a_table_and_json_on_request(swept, config, softprompt):
    command = "sweep", config, "--over", "seed=0..1", "--over", "learning_rate=0.1,0.3", "--out", swept[0]
    code, out, _ = softprompt(*command)
    assert (code, out.splitlines()[0].split()) == (0, ["setting", "task", "runs", "validation", "test"])
    assert "sd: " in out
    assert json.loads(softprompt(*command, "--json")[1]) == swept[1]


@pytest.mark.slow
def test_eight_devices_share_the_rows_of_every_prompt(swept, config, tmp_path):
    over = ["--over", "seed=0..1", "--over", "learning_rate=0.1,0.3"]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-m", "softprompt_jax", "sweep", str(config), *over, "--out", str(tmp_path / "out")],
        env=os.environ | {"XLA_FLAGS": flags},
        check=True,
        cwd=Path(__file__).parents[1],
        capture_output=True,
    )
    for run in swept[1]["runs"]:
        found, expected = (load_prompt(folder / run["name"]) for folder in (tmp_path / "out", swept[0]))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------- killed, diverged, stopped


class Killed(BaseException):
    """What no handler of ours catches."""


@pytest.mark.slow
@pytest.mark.parametrize("point", ["evaluate", "leave_files"])
def test_killed_sweep_goes_on_and_ends_the_same(swept, config, tmp_path, monkeypatch, point):
    calls, owner = 0, vmapped.VmappedGroup if point == "evaluate" else vmapped
    real = getattr(owner, point)

    def dying(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3:  # in mid-training, or when two of four runs have left their files
            raise Killed
        return real(*arguments)

    over = ["seed=0..1", "learning_rate=0.1,0.3"]
    with monkeypatch.context() as patch:
        patch.setattr(owner, point, dying)
        with pytest.raises(Killed):
            sweep(config, over, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*/result.json"))) == (0 if point == "evaluate" else 2)
    again = sweep(config, over, tmp_path / "out")
    assert again == swept[1]
    for run in again["runs"]:
        found, expected = (load_prompt(folder / run["name"]) for folder in (tmp_path / "out", swept[0]))
        np.testing.assert_array_equal(found, expected)
        assert [line["step"] for line in lines(tmp_path / "out" / run["name"])] == [
            line["step"] for line in lines(swept[0] / run["name"])
        ]


@pytest.mark.slow
def test_run_that_diverges_or_stops_early_leaves_the_others_alone(small, tmp_path, monkeypatch):
    changes = {"optimizer": {"kind": "adamw", "weight_decay": 0.01}, "dropout": 0}
    config = write_config(tmp_path / "config.yaml", small.short | changes)
    over = ["learning_rate=0.3,1e38,0.001"]
    result = sweep(config, over, tmp_path / "out", stop_after=2)
    failed = next(run for run in result["runs"] if "failed" in run)
    assert failed["settings"] == {"learning_rate": 1e38}
    assert failed["failed"]["reason"] == "the loss is no finite number"
    assert not (tmp_path / "out" / failed["name"] / "result.json").exists()
    assert len(result["table"]) == 2
    slow = json.loads((tmp_path / "out" / "learning_rate=0.001" / "result.json").read_text())
    found = [line for line in lines(tmp_path / "out" / "learning_rate=0.001") if "validation" in line]
    scores = {line["step"]: np.mean([line["validation"][name] for name in ("accuracy",)]) for line in found[1:]}
    rose = max(scores, key=scores.__getitem__)  # the first of equal ones; a lower loss alone ends no waiting
    assert slow["steps"] == rose + 20 == max(scores) < 40  # two evaluations of ten steps
    monkeypatch.setattr(SWEEP, "backbone_of", None)
    assert sweep(config, over, tmp_path / "out", stop_after=2) == result  # and nothing trains again


@pytest.mark.slow
def test_lengths_train_in_groups_and_other_methods_one_after_another(config, tmp_path, monkeypatch):
    trained: list[int] = []
    real = vmapped.VmappedGroup.fit
    monkeypatch.setattr(vmapped.VmappedGroup, "fit", lambda self: (trained.append(len(self.runs)), real(self))[1])
    sweep(config, ["length=2,4", "seed=0,1"], tmp_path / "lengths", ["steps=2"])
    assert trained == [2, 2]
    result = sweep(config, ["seed=0,1"], tmp_path / "lora", ["steps=2", "methods=[{kind: lora, rank: 2}]"])
    assert trained == [2, 2]
    assert result["table"][0]["runs"] == 2
    assert (tmp_path / "lora" / "seed=1" / "trained.safetensors").exists()
    with pytest.raises(UserError, match="--stop-after is for prompts that train together; found methods lora"):
        sweep(config, ["seed=2"], tmp_path / "lora", ["steps=2", "methods=[{kind: lora, rank: 2}]"], stop_after=1)


def test_a_run_alone_that_diverges_leaves_the_others_alone(config, tmp_path, monkeypatch):
    def train(run, folder, reporter):
        folder.mkdir()
        if run.seed == 1:
            raise Diverged("step 7: the loss is nan", 7)
        scores = {"accuracy": 0.5, "f1_macro": 0.5}
        result = {"validation": scores, "test": None, "best_step": 2}
        (folder / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr(SWEEP, "train", train)
    result = sweep(config, ["seed=0..2"], tmp_path / "out", ["methods=[{kind: lora, rank: 2}]"])
    assert [run.get("failed", {}).get("step") for run in result["runs"]] == [None, 7, None]
    assert result["table"][0]["runs"] == 2
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == result


def test_a_sweep_that_fails_before_its_first_step_leaves_room_for_the_corrected_one(config, tmp_path, monkeypatch):
    over, out = ["seed=0..1"], tmp_path / "out"
    with pytest.raises(UserError, match="nowhere"):
        sweep(config, over, out, ["steps=2", f"backbone={tmp_path / 'nowhere'}"])
    with pytest.raises(UserError, match="has 2 tokens with EOS"):
        sweep(config, over, out, ["steps=2", "max_target_tokens=1"])
    with monkeypatch.context() as patch:  # at its first validation, when settings and group are written
        patch.setattr(vmapped.RunData, "validate", None)
        with pytest.raises(TypeError):
            sweep(config, over, out, ["steps=2"])
    assert not [path for path in out.rglob("*") if path.is_file()]
    assert not (out / "groups").exists() or not list((out / "groups").iterdir())
    result = sweep(config, over, out, ["steps=2", "methods.0.length=2"])
    assert [row["runs"] for row in result["table"]] == [2]


@pytest.mark.slow
def test_of_equal_scores_in_a_sweep_the_lowest_loss_wins_and_waiting_counts_scores(small, tmp_path, monkeypatch):
    config = write_config(tmp_path / "config.yaml", small.short)
    losses = {0: [9.0, 3.0, 2.0, 1.0, 1.0], 1: [9.0, 3.0, 2.0, 2.0, 4.0]}  # at steps 0 to 40, all with one score

    def validate(self, trainable, frozen):
        return {"accuracy": 0.5, "loss": next(left[self.run.seed])}, 0.5

    monkeypatch.setattr(vmapped.RunData, "validate", validate)
    for name, changes, stop_after, steps in (
        ("all", [], None, 40),
        ("few", [], 2, 30),
        ("own", ["patience=2"], None, 30),
    ):
        left = {seed: iter(each) for seed, each in losses.items()}
        out = tmp_path / name
        sweep(config, ["seed=0,1"], out, changes, stop_after=stop_after)
        results = [json.loads((out / f"seed={seed}" / "result.json").read_text()) for seed in losses]
        assert [(result["best_step"], result["steps"]) for result in results] == [(30, steps), (20, steps)]


# ------------------------------------------------------------------------------------------------ what is asked for


def test_batches_of_unlike_shapes_are_filled_with_the_models_padding():
    batches = [
        {
            "encoder_tokens": np.full((2, width), 5, np.int32),
            "encoder_segments": np.ones((2, width), np.int32),
            **dict.fromkeys(("decoder_inputs", "decoder_targets"), np.full((2, width - 1), 6, np.int32)),
        }
        for width in (3, 5)
    ]
    stacked = vmapped.stack_batches(batches, [(8, 6)], -1)
    for name, values in stacked.items():
        for index, batch in enumerate(batches):
            width = batch[name].shape[1]
            np.testing.assert_array_equal(values[index, :, :width], batch[name])
            assert (values[index, :, width:] == (0 if name == "encoder_segments" else -1)).all(), name


@pytest.mark.slow
def test_prompts_of_a_decoder_only_model_with_unlike_seeds_are_those_of_their_own_runs(tmp_path):
    words, draw = " ".join(tiny_lm.TEXTS).split(), np.random.default_rng(0)
    rows = [
        {"text": " ".join(draw.choice(words, draw.integers(1, 20))), "label": ("good", "bad")[n % 2]} for n in range(60)
    ]
    for split, part in (("train", rows[:48]), ("validation", rows[48:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    source = {"kind": "files"} | {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    settings = {
        **{
            "backbone": str(tiny_lm.folder(tmp_path / "lm")),
            "task": {"name": "t", "source": source, "input": "{text}"},
        },
        **{"methods": [{"kind": "prompt", "length": 3}], "steps": 6, "batch_size": 4, "log_every": 1},
        **{"evaluate_every": 6, "checkpoint_every": 6, "max_input_tokens": 64, "max_target_tokens": 8},
    }
    path = write_config(tmp_path / "config.yaml", settings)
    sweep(path, ["seed=0,1"], tmp_path / "many")
    for seed in (0, 1):
        softprompt_jax.train(load_run(path, [f"seed={seed}"]), tmp_path / f"alone{seed}")
        losses = [
            [line["loss"] for line in lines(one) if "loss" in line]
            for one in (tmp_path / f"many/seed={seed}", tmp_path / f"alone{seed}")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_axes_are_ranges_lists_and_short_names():
    assert read_axis("seed=0..3") == ("seed", [0, 1, 2, 3])
    assert read_axis("learning_rate=0.03, 1e-1") == ("optimizer.learning_rate", [0.03, 0.1])
    assert read_axis("init=labels,{kind: text, text: a b}") == (
        "methods.0.init",
        ["labels", {"kind": "text", "text": "a b"}],
    )


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        (["seed"], "--over seed: found no values; expected KEY=VALUES"),
        (["seed=3..1"], "3 is past 1; expected the smaller number first"),
        (["seed=1,1"], "a value stands twice; expected each once"),
        (["seed=1", "seed=2"], "expected one or more settings, each once"),
        (["lerning_rate=1"], "lerning_rate: unknown setting"),
        (["learning_rate=-1"], "optimizer.learning_rate: found -1"),
        (["seed=[1"], "--over seed=[1: not YAML"),
    ],
)
def test_axis_that_cannot_be_read_is_one_line(config, over, expected):
    with pytest.raises(UserError) as error:
        members(config, over)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_elsewhere_is_refused(config):
    with pytest.raises(UserError, match=r"gs://bucket/x: is not on this machine; expected a local folder"):
        sweep(config, ["seed=0..1"], "gs://bucket/x")


def test_names_of_runs_are_file_names_and_differ(config):
    found = members(config, ["init=vocabulary,{kind: text, text: a/b}", "seed=0"])
    assert found[0].name == "init=vocabulary,seed=0"
    assert "/" not in found[1].name
    assert found[1].run.methods[0].init.text == "a/b"  # type: ignore[union-attr]
    (smile,) = members(config, ["init={kind: text, text: so \N{SMILING FACE WITH OPEN MOUTH}}"])
    assert smile.run.methods[0].init.text == "so \N{SMILING FACE WITH OPEN MOUTH}"  # type: ignore[union-attr]
    with pytest.raises(UserError, match="two runs would be called"):
        members(config, ["backbone=a/b,a b"])


def test_command_says_what_is_missing(config, refused):
    assert "Missing option '--over'; see softprompt sweep --help" in refused("sweep", config, "--out", "x")
    assert "Missing option '--out'" in refused("sweep", config, "--over", "seed=0..1")
