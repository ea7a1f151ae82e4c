"""What a run's folder says of its task and data is whole, and folders of older versions go on."""

from __future__ import annotations

import json
import types
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import yaml

from softprompt_jax import Run, load_run, tasks, train
from softprompt_jax.config import UserError, parse, settings_hash, to_yaml
from softprompt_jax.run import UNHASHED_SETTINGS
from softprompt_jax.training.run_folder import default_folder

pytestmark = pytest.mark.usefixtures("own_cache")
COMMIT, OTHER = "c0ffee" * 6 + "c0ff", "decade" * 6 + "deca"


@pytest.fixture
def moods(small, monkeypatch):
    """A named task, `moods`; call it to change its settings."""

    def change(**settings):
        values = {key: value for key, value in small.task.items() if key != "name"} | settings
        monkeypatch.setitem(tasks._settings(), "moods", values)
        tasks.get.cache_clear()

    change()
    yield change
    tasks.get.cache_clear()


def run_of(small, **changes) -> Run:
    return parse(Run, small.short | {"steps": 2, "evaluate_every": 1, "checkpoint_every": 1} | changes, "test")


def rewrite(folder, **changes) -> None:
    """Change the settings in a run's config.yaml, and take its result away."""
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(to_yaml(saved | changes))
    (folder / "result.json").unlink(missing_ok=True)


def test_a_run_on_a_named_task_keeps_its_settings_and_sees_a_later_edit(small, moods, tmp_path):
    run = run_of(small, task="moods")
    result = train(run, tmp_path / "run")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["task"]["label_words"], saved["task"]["input"]) == (["yes", "no"], "{text}")
    assert train(run_of(small, task="moods"), tmp_path / "run") == result
    moods(input="{text} !")
    with pytest.raises(UserError, match=r"was made with other settings \(task.input: '{text}' -> '{text} !'\)"):
        train(run_of(small, task="moods"), tmp_path / "run")
    assert load_run(tmp_path / "run" / "config.yaml").tasks[0].input == "{text}"


def test_a_folder_that_has_the_name_of_its_task_only_goes_on(small, moods, tmp_path, monkeypatch):
    run, runs = run_of(small, task="moods"), tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    whole = train(run, default_folder(run))
    assert default_folder(run) == (runs / settings_hash(run, without=UNHASHED_SETTINGS)).relative_to(tmp_path)
    older = runs / "0123456789ab"  # the hash that another version gave to these settings
    default_folder(run).rename(older)
    rewrite(older, task="moods")
    assert default_folder(run) == older.relative_to(tmp_path)
    again = train(run, default_folder(run))
    assert again.result | {"seconds": 0} == whole.result | {"seconds": 0}
    assert [path.name for path in runs.iterdir()] == [older.name]
    assert default_folder(run_of(small, task="moods", seed=1)).name != older.name


def test_a_run_reads_the_revision_that_the_hub_had_when_it_began(small, tmp_path, monkeypatch):
    hub, read = types.SimpleNamespace(commit=COMMIT), []

    def load_dataset(name, config, data_files, split, revision):
        read.append(revision)
        return [json.loads(line) for line in Path(small.task["source"][split]).read_text().splitlines()]

    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: types.SimpleNamespace(sha=hub.commit)
    )
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run = run_of(small, task={"name": "moods", "source": {"kind": "hub", "name": "a/b"}, "label_words": ["yes", "no"]})
    whole = train(run, tmp_path / "run")
    assert set(read) == {COMMIT}
    assert load_run(tmp_path / "run" / "config.yaml").tasks[0].source.revision == COMMIT
    hub.commit = OTHER
    assert train(run, tmp_path / "run") == whole
    (tmp_path / "run" / "result.json").unlink()
    read.clear()
    assert train(run, tmp_path / "run")["test"] == whole["test"]
    assert set(read) == {COMMIT}
    stated = run.task.model_copy(update={"source": run.task.source.model_copy(update={"revision": OTHER})})
    with pytest.raises(UserError, match=rf"other settings \(task.source.revision: '{COMMIT}' -> '{OTHER}'"):
        train(run.model_copy(update={"task": stated}), tmp_path / "run")
