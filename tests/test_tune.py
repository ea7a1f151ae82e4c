"""A race: those with the lowest loss go on, the winner is an ordinary run, and a killed race ends the same."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
from small_runs import write_config

import softprompt_jax
from softprompt_jax import load_predictor, load_run, tune
from softprompt_jax.checkpoints.artifact import load_prompt
from softprompt_jax.config import UserError, parse
from softprompt_jax.run import Run
from softprompt_jax.training.tune import Budget, default_space, describe, read_budget

TUNE = importlib.import_module("softprompt_jax.training.tune")
pytestmark = pytest.mark.usefixtures("own_cache")
OVER = ["learning_rate=0.001,0.01,0.1,0.3"]


@pytest.fixture(scope="module")
def config(small, tmp_path_factory):
    settings = small.short | {"dropout": 0, "steps": 20, "schedule": {"warmup_steps": 5, "decay": "linear"}}
    return write_config(tmp_path_factory.mktemp("tune") / "config.yaml", settings)


@pytest.fixture(scope="module")
def race(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("raced") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTPROMPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return folder, tune(config, folder, OVER, budget=32)


def test_every_round_has_its_share_of_the_budget_and_the_lowest_losses_go_on(race):
    folder, state = race
    assert [(one["steps"], len(one["candidates"])) for one in state["rounds"]] == [(4, 4), (8, 2)]
    for one in state["rounds"]:
        losses = [judged["loss"] for judged in one["candidates"]]
        assert losses == sorted(losses)
        assert one["kept"] == [judged["name"] for judged in one["candidates"]][: len(one["kept"])]
    assert [*state["rounds"][1]["kept"]] == [state["winner"]]
    assert {judged["name"] for judged in state["rounds"][1]["candidates"]} == set(state["rounds"][0]["kept"])
    assert json.loads((folder / "tune.json").read_text()) == state
    assert {path.name for path in folder.iterdir()} == {"tune.json", "winner"}  # what was raced is gone


def test_the_winner_is_the_run_that_its_settings_are(race, config, small):
    folder, state = race
    run = load_run(config, [f"optimizer.learning_rate={state['settings']['learning_rate']}"])
    assert load_run(folder / "winner" / "config.yaml") == run
    assert state["result"] == json.loads((folder / "winner" / "result.json").read_text())
    assert state["result"]["steps"] == 20
    assert load_predictor(folder / "winner").texts(["the garden is warm today"])


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(TUNE, "train_members", None)


@pytest.mark.usefixtures("no_training")
def test_a_finished_race_is_told_again_and_another_is_refused(race, config, softprompt, refused):
    folder, state = race
    assert tune(config, folder, OVER, budget=32) == state
    command = "tune", config, "--out", folder, "--over", OVER[0], "--budget", "32"
    code, out, err = softprompt(*command)
    assert code == 0
    assert "after training" in err
    table = out.splitlines()
    assert table[0].split() == ["candidate", "steps", "loss", "validation", "fell"]
    assert table[1].split()[0] == state["winner"]
    assert len(table) == 6
    assert sum("after round 1: place" in line and "2 of 4 went on" in line for line in table) == 2
    assert table[5].startswith("2 rounds, 32 steps, ")
    assert json.loads(softprompt(*command, "--json")[1]) == state
    assert "was begun with other settings (run.seed: 0 -> 1)" in refused(*command, "seed=1")
    assert "budget: " in refused(*command[:-1], "64")


@pytest.mark.slow
def test_a_race_of_a_run_in_python_equals_that_of_its_file(race, config, tmp_path):
    state = tune(load_run(config), tmp_path / "out", OVER, budget=32, together=2)
    names = [[judged["name"] for judged in one["candidates"]] for one in state["rounds"]]
    assert names == [[judged["name"] for judged in one["candidates"]] for one in race[1]["rounds"]]
    np.testing.assert_allclose(
        load_prompt(tmp_path / "out" / "winner"), load_prompt(race[0] / "winner"), rtol=1e-4, atol=1e-4
    )


class Killed(BaseException):
    """What no handler of ours catches."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "point", "count"), [("vmapped", "leave_files", 2), ("tune", "train", 1), ("sweep", "_program", 2)]
)
def test_a_killed_race_goes_on_and_ends_the_same(race, config, tmp_path, monkeypatch, owner, point, count):
    module, calls = importlib.import_module(f"softprompt_jax.training.{owner}"), 0
    real = getattr(module, point)

    def dying(*arguments):
        nonlocal calls
        calls += 1
        if calls == count:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, point, dying)
        with pytest.raises(Killed):
            tune(config, tmp_path / "out", OVER, budget=32)
    state = tune(config, tmp_path / "out", OVER, budget=32)
    untimed = [
        [{key: value for key, value in one.items() if not key.endswith(("_s", "seconds"))} for one in each["rounds"]]
        for each in (state, race[1])
    ]
    assert untimed[0] == untimed[1]
    np.testing.assert_array_equal(load_prompt(tmp_path / "out" / "winner"), load_prompt(race[0] / "winner"))
    assert not (tmp_path / "out" / "rounds").exists()


@pytest.mark.slow
def test_candidates_that_diverge_fall_and_a_race_of_them_alone_says_so(small, tmp_path):
    changes = {"optimizer": {"kind": "adamw", "weight_decay": 0.01}, "dropout": 0, "steps": 8}
    config = write_config(tmp_path / "config.yaml", small.short | changes)
    state = tune(config, tmp_path / "out", ["learning_rate=1e38,0.1,0.3"], budget=24)
    last = state["rounds"][0]["candidates"][-1]
    assert last["settings"] == {"learning_rate": 1e38}
    assert "the loss was no number at step" in "\n".join(describe(state))
    with pytest.raises(UserError, match="all 2 candidates diverged in round 1; expected one whose loss is finite"):
        tune(config, tmp_path / "all", ["learning_rate=1e38,2e38"], budget=24)


@pytest.mark.slow
def test_a_budget_of_time_measures_a_step_first(config, tmp_path):
    with pytest.raises(UserError, match=r"too small for one step of each of 4 candidates .* at least \d+s; give more"):
        tune(config, tmp_path / "out", OVER, budget="1s")
    state = tune(config, tmp_path / "out", OVER, budget="10m")  # nothing was raced, so that the folder is free
    assert state["probe"]["step_s"] > 0
    assert state["rounds"][0]["steps"] == 20  # more than enough for all steps, and then there is nothing left to race
    assert len(state["rounds"]) == 1
    assert "place 2, 1 of 4 went on" in "\n".join(describe(state))


@pytest.mark.slow
def test_methods_without_rows_race_too(small, tmp_path):
    settings = small.short | {"methods": [{"kind": "lora", "rank": 2}], "steps": 4}
    state = tune(parse(Run, settings, "lora"), tmp_path / "out", budget=20)
    assert [len(one["candidates"]) for one in state["rounds"]] == [5, 2]
    assert (tmp_path / "out" / "winner" / "trained.safetensors").exists()


def test_what_is_tried_by_default_lies_around_the_settings(small):
    run = parse(Run, small.short, "run")
    assert default_space(run) == [
        "learning_rate=0.03,0.1,0.3,0.9,3",
        "init=labels,vocabulary",
        "length=10,20,50",
    ]
    free = parse(Run, small.short | {"task": small.task | {"label_words": None}}, "free")
    assert default_space(free)[1:] == ["length=10,20,50"]
    placed = small.short | {"methods": [{"kind": "prompt", "length": 3, "place": "{prompt:2} {text} {prompt:1}"}]}
    assert default_space(parse(Run, placed, "placed"))[1:] == ["init=labels,vocabulary"]
    started = small.short | {"methods": [{"kind": "prompt", "init": {"kind": "text", "text": "so"}}]}
    assert default_space(parse(Run, started, "started"))[1:] == ["length=10,20,50"]
    prefix = small.short | {"methods": ["prefix"]}
    assert default_space(parse(Run, prefix, "prefix")) == [
        "learning_rate=0.0001,0.00033,0.001,0.003,0.01",
        "length=10,20,50",
    ]
    with pytest.raises(UserError, match=r"hard has no learning rate to try; .* add --over"):
        default_space(parse(Run, small.short | {"methods": [{"kind": "hard", "template": "{text} so"}]}, "hard"))


@pytest.mark.slow
def test_a_first_look_goes_on_after_a_kill_and_past_a_candidate_that_diverges(small, tmp_path, monkeypatch):
    changes = {"optimizer": {"kind": "adamw", "weight_decay": 0.01}, "dropout": 0, "steps": 8}
    config = write_config(tmp_path / "config.yaml", small.short | changes)
    over, real = ["learning_rate=0.1,1e38"], TUNE.train_members

    def killed(_, home, *__, **___):
        (home / "half").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(TUNE, "train_members", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(config, tmp_path / "out", over, budget="10m")
    monkeypatch.setattr(TUNE, "train_members", real)
    state = tune(config, tmp_path / "out", over, budget="10m")  # the first look is at 1e38
    assert state["probe"]["step_s"] > 0
    assert state["winner"] == "learning_rate=0.1"
    with pytest.raises(UserError, match="all 2 candidates diverged in their first steps"):
        tune(config, tmp_path / "all", ["learning_rate=1e38,2e38"], budget="10m")


def test_budgets_are_steps_or_time():
    assert read_budget("4000") == Budget(4000, False)
    assert [read_budget(text) for text in ("90s", "1.5m", "2h")] == [
        Budget(90, True),
        Budget(90, True),
        Budget(7200, True),
    ]
    for text in ("", "0", "-1", "1.5", "20 minutes", "nan", "0m", "9" * 40):
        with pytest.raises(UserError, match=r"--budget .*: expected steps of all candidates together"):
            read_budget(text)


def test_what_cannot_be_raced_is_one_line_and_leaves_room_for_the_corrected_command(config, refused, tmp_path):
    out = tmp_path / "out"
    said = refused("tune", config, "--out", out, "--over", OVER[0], "--budget", "7")
    assert "too small for one step of each of 4 candidates in the first of 2 rounds; expected at least 8 steps" in said
    assert "1 candidate; expected two or more" in refused("tune", config, "--out", out, "--over", "seed=1")
    assert "lerning_rate: unknown setting" in refused("tune", config, "--out", out, "--over", "lerning_rate=1,2")
    assert "no such file" in refused("tune", "nothing.yaml", "--out", out)
    assert "is not on this machine" in refused("tune", config, "--out", "gs://bucket/x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    assert "holds a, no tune.json; expected nothing" in refused("tune", config, "--out", tmp_path / "full")
    (out / "tune.json").write_text("{}")
    assert "lacks settings or rounds" in refused("tune", config, "--out", out)


def test_the_names_of_the_package_are_there():
    assert {"tune", "compress"} <= set(softprompt_jax.__all__)
    assert callable(softprompt_jax.compress)
