"""The ladder of backbones: every size and form of one template builds, trains, is exported and adapted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LADDER = ROOT / "configs" / "pretrain" / "ladder"
_spec = importlib.util.spec_from_file_location("ladder_make", LADDER / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)
SIZES = list(make.sizes())


@pytest.fixture
def toy(tmp_path, own_cache) -> list[str]:
    """Return overrides for two steps on a few lines of text."""
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"The clerk of office {n} wrote {n} letters to the town before noon.\n\n" for n in range(60))
    )
    short = {"texts": [{"path": str(text)}], "texts_folder": "", "max_input_tokens": 24, "max_target_tokens": 16}
    overrides = [f"task.{key}={json.dumps(value)}" for key, value in short.items()]
    return [*overrides, "steps=2", "batch_size=2", "log_every=1", "evaluate_every=2", "checkpoint_every=2"]


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_as_many_parameters_as_its_name_says(size):
    millions = make.span_run(size, []).backbone.settings.parameters() / 1e6
    assert millions == pytest.approx(float(size.removesuffix("m")), rel=0.15)


def test_both_forms_read_the_same_texts_and_differ_in_their_objective():
    span, lm = (yaml.safe_load((LADDER / f"{form}.yaml").read_text()) for form in ("span", "lm"))
    assert span["task"]["stages"] == [{"until": 1.0, "objectives": {"span_corruption": 1}}]
    assert lm["task"]["stages"] == [{"until": 1.0, "objectives": {"prefix_lm": 1}}]
    assert span["task"] | {"stages": 0} == lm["task"] | {"stages": 0}
    assert lm["steps"] * 10 == span["steps"]


def test_parts_of_the_adaptation_are_the_beginning_of_the_whole(tmp_path):
    whole, part = (make.lm_run(tmp_path, share, []) for share in (1.0, 0.1))
    assert part.steps * 10 == whole.steps
    assert part == whole.model_copy(update={"steps": part.steps})
    assert (whole.schedule.decay, whole.schedule.warmup_steps, len(whole.task.stages)) == ("constant", 0, 1)


@pytest.mark.slow
def test_the_smallest_is_made_in_both_forms_with_card_and_curve(toy, tmp_path):
    span = tmp_path / "1m-span"
    make.make(make.span_run("1m", toy), "1m-span", tmp_path, tmp_path / "curves")
    make.make(make.lm_run(span, 1.0, toy), "1m-lm", tmp_path, tmp_path / "curves")
    for form, objective in (("span", "span_corruption"), ("lm", "prefix_lm")):
        card = (tmp_path / f"1m-{form}" / "README.md").read_text()
        assert f"Objective: {objective}, from" in card
        assert "2 steps of 2 examples" in card
        curve = json.loads((tmp_path / "curves" / f"1m-{form}.json").read_text())
        assert [point["step"] for point in curve["train"]] == [1, 2]
        assert [point["step"] for point in curve["held_out"]] == [0, 2]
        assert (tmp_path / f"1m-{form}" / "spiece.model").exists()
    assert str(span) in (tmp_path / "1m-lm" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES[1:])
def test_every_size_trains_in_both_forms(size, toy, tmp_path):
    make.make(make.span_run(size, toy), f"{size}-span", tmp_path, tmp_path)
    for form, share in ({"lm": 1.0} | make.KEPT.get(size, {})).items():
        make.make(make.lm_run(tmp_path / f"{size}-span", share, toy), f"{size}-{form}", tmp_path, tmp_path)
        assert (tmp_path / f"{size}-{form}" / "model.safetensors").exists()
