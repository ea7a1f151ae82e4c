"""What the settings inside a file ask for is done only if it ships with us, or with the user's own word."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import softprompt_jax
from softprompt_jax import UserError
from softprompt_jax.checkpoints.artifact import load_artifact, save_prompt
from softprompt_jax.config import parse
from softprompt_jax.inference.predictor import named_task
from softprompt_jax.methods import METHODS
from softprompt_jax.methods.prompt import File
from softprompt_jax.run import Run
from softprompt_jax.trust import _files, check_backbone, named_backbone, reader

ROWS = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)


@pytest.fixture(autouse=True)
def stranger(tmp_path, monkeypatch):
    """Be a user who has trained nothing yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def prompt_file(path: Path, **settings: Any) -> Path:
    """Write a prompt whose settings are somebody's."""
    run = {"task": "sentiment_movie", "methods": [{"kind": "prompt", "length": 3}]} | settings
    save_prompt(ROWS, path, {"settings": json.dumps(run)})
    return path


@pytest.fixture
def evil(tmp_path, small, monkeypatch) -> Path:
    """A prompt file whose task is a source distribution with a build that runs code."""
    build = f"open({str(tmp_path / 'PWNED')!r}, 'w')".encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in {"setup.py": build, "PKG-INFO": b"Name: evil\nVersion: 1.0\n", "rows.csv": b"a"}.items():
            entry = tarfile.TarInfo(f"evil-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    (tmp_path / "evil-1.0.tar.gz").write_bytes(buffer.getvalue())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    source = {"kind": "package", "package": "evil", "version": "1.0", "form": "sdist", "reader": "sms"}
    source |= {"sha256": hashlib.sha256(buffer.getvalue()).hexdigest(), "members": ["evil-1.0/rows.csv"]}
    return prompt_file(tmp_path / "evil.safetensors", task={"name": "evil", "source": source})


@pytest.mark.parametrize("command", ["eval", "submit", "ensemble"])
def test_a_package_that_only_the_file_names_is_not_fetched(evil, small, refused, tmp_path, command):
    more = {"submit": ["--to", tmp_path / "out"], "ensemble": [prompt_file(tmp_path / "other.safetensors")]}
    line = refused(command, evil, *more.get(command, []), "--backbone", small.backbone)
    assert "evil.safetensors: its settings ask for the data package {'package': 'evil', 'version': '1.0'" in line
    assert "nothing was read; expected your word; add --task NAME" in line
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "PWNED").exists()


def test_no_build_runs_even_with_the_users_word(evil, small, refused, tmp_path):
    assert "KeyError" not in refused("eval", evil, "--backbone", small.backbone, "--trust", "--split", "no")
    predictor = softprompt_jax.load_predictor(evil, str(small.backbone))
    with pytest.raises(UserError, match="its settings ask for the data package"):
        predictor.evaluate(predictor.task, "validation")
    with pytest.raises(UserError, match="its settings ask for the data package"):
        named_task(evil, "evil")
    assert named_task(evil, "spam_sms") == softprompt_jax.tasks.get("spam_sms")  # `--task`: the user's word
    assert not (tmp_path / "PWNED").exists()


def test_a_named_task_of_the_file_is_not_ours_because_of_its_name(tmp_path):
    other = softprompt_jax.tasks.get("spam_sms").model_dump(mode="json")
    other["source"]["sha256"] = "0" * 64
    with pytest.raises(UserError, match="its settings ask for the data package"):
        named_task(prompt_file(tmp_path / "p.safetensors", task=other), "spam_sms")
    changed = {"name": "spam_sms", "input": "{text} spam?"}  # where its data come from is ours
    assert named_task(prompt_file(tmp_path / "q.safetensors", task=changed), None).input == "{text} spam?"


def test_no_module_that_a_file_names_is_imported(tmp_path, small, refused, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    source = {"kind": "seqio", "name": "t", "module": "evil_module"}
    found = prompt_file(tmp_path / "p.safetensors", task=source)
    line = refused("eval", found, "--backbone", small.backbone)
    assert "ask for the data seqio {'name': 't', 'module': 'evil_module'}" in line
    assert "evil_module" not in sys.modules


def test_a_backbone_is_loaded_by_its_name_on_the_hub_or_the_users_word(tmp_path, small, refused, monkeypatch):
    found = prompt_file(tmp_path / "p.safetensors", backbone=str(small.backbone))
    for command in ("eval", "predict", "inspect"):
        line = refused(command, found)
        assert f"p.safetensors: its settings ask for the backbone {str(small.backbone)!r}; nothing was read" in line
        assert "add --backbone FOLDER, or --trust" in line
    (tmp_path / "bank").mkdir()
    prompt_file(tmp_path / "bank" / "p.safetensors", backbone=str(small.backbone))
    assert "its settings ask for the backbone" in refused("predict", tmp_path / "bank")
    artifacts = [load_artifact(found)]
    assert named_backbone(artifacts, trust=True) == named_backbone(artifacts, str(small.backbone))
    for name in ("embedded", "smollm2", "google/t5-v1_1-base", "t5-small"):
        check_backbone(name, "p", trust=False)
    monkeypatch.chdir(small.backbone.parent)
    for name in ("gs://bucket/t5", "../x", "/x", "~/x", "a/b/c", small.backbone.name):
        with pytest.raises(UserError, match="its settings ask for the backbone"):
            check_backbone(name, "p", trust=False)


def test_what_a_user_has_trained_with_needs_no_second_word(small, prompt_run, own_cache, tmp_path, refused, softprompt):
    line = refused("eval", prompt_run)  # trained by another user
    assert "its settings ask for the data files" in line
    softprompt_jax.train(parse(Run, yaml.safe_load((prompt_run / "config.yaml").read_text()), "test"), prompt_run)
    code, out, _ = softprompt("eval", prompt_run)
    assert code == 0
    assert json.loads(out)["task"] == "moods"
    run = parse(Run, yaml.safe_load((prompt_run / "config.yaml").read_text()), "test")
    other = run.task.model_dump() | {"source": {"kind": "files", "train": "/etc/passwd"}}
    assert "its settings ask" in refused("eval", prompt_file(tmp_path / "p.safetensors", task=other))


def test_a_prompt_that_a_file_began_with_is_read_with_the_users_word(tmp_path):
    prompt_file(tmp_path / "first.safetensors")
    with pytest.raises(UserError, match=r"p: its settings ask for the file '.*first.safetensors'; nothing was read"):
        reader("p", trust=False)(str(tmp_path / "first.safetensors"))
    assert len(reader("p", trust=True)(str(tmp_path / "first.safetensors")).prompt) == 3


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_what_is_finished_needs_no_file(kind):
    method = METHODS[kind]
    named: dict[str, Any] = {"init": File(path="p")} if "init" in method.model_fields else {}
    named |= {"network": None} if kind == "prefix" else {"teachers": ["p"], "tasks": 1} if kind == "multitask" else {}
    run = parse(Run, {"task": "spam_sms"}, "test")
    asked = run.model_copy(update={"methods": [method(**named)]})
    assert [*_files(asked)] == ["p"] * len({"init", "teachers"} & named.keys())
    assert not [*_files(asked.finished())]
