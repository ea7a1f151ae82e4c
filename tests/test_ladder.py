"""The ladder of backbones: every size and form of one template builds, trains, is exported and adapted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from softprompt_jax import load_run
from softprompt_jax.backbone.pretrained import EMBEDDED
from softprompt_jax.config import UserError

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
    count, unit = float(size[:-1]), {"k": 1e3, "m": 1e6}[size[-1]]
    assert make.span_run(size, []).backbone.settings.parameters() == pytest.approx(count * unit, rel=0.15)
    assert make.mixture_run(size, []).backbone == make.span_run(size, []).backbone


def test_the_middle_size_is_the_embedded_backbone():
    assert make.mixture_run("3m", []) == load_run(LADDER.parent / "embedded.yaml")


def test_both_forms_read_the_same_texts_and_differ_in_their_objective():
    span, lm = (yaml.safe_load((LADDER / f"{form}.yaml").read_text()) for form in ("span", "lm"))
    assert span["task"]["stages"] == [{"until": 1.0, "objectives": {"span_corruption": 1}}]
    assert lm["task"]["stages"] == [{"until": 1.0, "objectives": {"prefix_lm": 1}}]
    assert span["task"] | {"stages": 0} == lm["task"] | {"stages": 0}


def test_parts_of_the_adaptation_are_the_beginning_of_the_whole(tmp_path):
    whole = make.lm_run(tmp_path, [])
    part = make.lasting(whole, 0.1)
    assert part.steps * 10 == whole.steps
    assert part == whole.model_copy(update={"steps": part.steps})
    assert (whole.schedule.decay, whole.schedule.warmup_steps, len(whole.task.stages)) == ("constant", 0, 1)


@pytest.mark.slow
def test_a_size_is_pre_trained_on_a_mixture(toy, tmp_path):
    no_lexicon = ["task.lexicon=false", 'task.stages=[{"until": 1, "objectives": {"short_spans": 1}}]']
    make.make_size("1m", ["mixture"], 1.0, tmp_path, tmp_path / "curves", [*toy, *no_lexicon])
    check_made(tmp_path, "1m-mixture", "short_spans", "random weights", [1, 2])
    assert "lexicons" not in (tmp_path / "1m-mixture" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("size", make.KEPT)
def test_a_size_is_made_in_every_form_and_for_every_number_of_steps_that_is_kept(size, toy, tmp_path):
    make.make_size(size, ["span", "lm", "mixture"], 2.0, tmp_path, tmp_path / "curves", toy)
    for form, steps in {"span": 4, "lm": 4, "lm-10": 1, "lm-50": 2}.items():
        start, objective = tmp_path / f"{size}-span", "prefix_lm"
        if form == "span":
            start, objective = "random weights", "span_corruption"
        check_made(tmp_path, f"{size}-{form}", objective, start, list(range(1, steps + 1)))
    assert (tmp_path / f"{size}-mixture" / "config.json").read_bytes() == (EMBEDDED / "config.json").read_bytes()


def check_made(folder, name, objective, start, steps):
    """Expect a backbone with its card, and a curve with these steps of two short examples."""
    assert (folder / name / "model.safetensors").exists()
    assert (folder / name / "spiece.model").exists()
    card = (folder / name / "README.md").read_text()
    assert f"Objective: {objective}, from {start}; {len(steps)} steps of 2 examples" in card
    curve = json.loads((folder / "curves" / f"{name}.json").read_text())
    assert [point["step"] for point in curve["train"]] == steps
    assert [point["step"] for point in curve["held_out"]] == sorted({0, *steps[1::2], steps[-1]})
    assert 2 * len(steps) * 10 < curve["tokens"] <= 2 * len(steps) * (24 + 16)


def test_the_card_of_the_mixture_tells_of_its_lexicons():
    assert "polarity lexicons" in make.card(make.mixture_run("1m", []), "1m-mixture", [], {"seconds": 1.0})


def test_adaptation_without_its_backbone_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"1m-span: no backbone; expected the span form of 1m"):
        make.make_size("1m", ["lm"], 1.0, tmp_path, tmp_path, [])
