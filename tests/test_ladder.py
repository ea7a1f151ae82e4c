"""The ladder of backbones: every size and form of one template builds, trains, is exported and adapted."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from softprompt_jax import config, load_run
from softprompt_jax.checkpoints.backbone import EMBEDDED
from softprompt_jax.config import UserError

ROOT = Path(__file__).resolve().parents[1]
LADDER = ROOT / "configs" / "pretrain" / "ladder"
sys.path.insert(0, str(LADDER))  # as when make.py is a script
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
    span, lm = (config.read(LADDER / f"{form}.yaml") for form in ("span", "lm"))
    assert span["task"]["stages"] == [{"until": 1.0, "objectives": {"span_corruption": 1}}]
    assert lm["task"]["stages"] == [{"until": 1.0, "objectives": {"prefix_lm": 1}}]
    assert span["task"] | {"stages": 0} == lm["task"] | {"stages": 0}


def test_parts_of_the_adaptation_are_the_beginning_of_the_whole(tmp_path):
    whole = make.lm_run(tmp_path, [])
    part = make.lasting(whole, 0.1)
    assert part.steps * 10 == whole.steps
    assert part == whole.model_copy(update={"steps": part.steps})
    assert (whole.schedule.decay, whole.schedule.warmup_steps, len(whole.task.stages)) == ("constant", 0, 1)


MEMBERS = {
    "NewsArticles.csv": b'title,text\nRain,"It rained.\n \nIt stopped."\nWrong,"They said ""?no."\n',
    "en.csv": b'"party","text"\n"A","I thank my hon. Friend."\n',
    "political_data.json": b'[{"name": "one", "speeches": ["THEY: Thank you.\\nTHEY: Thanks.", "Once more."]}]',
    "grimm-tales.tab": b"Title\tContent\nstring\tstring\n\tinclude=True\nA Tale\tThere was a man.\n",
    "dict/data.adj": b'  1 licence\n00001740 00 a 02 able(p) 0 up_to 0 001 ! 0 a 0 | having skill; "able to swim"  \n',
}


def test_texts_out_of_packages_stand_in_for_a_corpus_that_is_not_there(tmp_path, monkeypatch):
    def members(package):
        return {name: text for name in package.members for end, text in MEMBERS.items() if name.endswith(end)}

    monkeypatch.setattr(make.texts, "fetch_members", members)
    monkeypatch.chdir(tmp_path)  # beside which no ../shared lies
    settings = make.other_texts(tmp_path / "texts", ["steps=2"])
    expected = {
        "news.txt": "Rain\nIt rained.\nIt stopped.\n",
        "debates.txt": "I thank my hon. Friend.\n",
        "speeches.txt": "THEY: Thank you.\nTHEY: Thanks.\n\nOnce more.\n",
        "tales.txt": "There was a man.\n",
        "wordnet.txt": "able, up to: having skill.\n",
    }
    assert {path.name: path.read_text() for path in (tmp_path / "texts").iterdir()} == expected
    task = make.mixture_run("1m", settings).task
    assert task.texts_folder == str(tmp_path / "texts")
    assert [text.path for text in task.texts] == list(expected)
    assert [text.form for text in task.texts] == ["text"] * 4 + ["dictionary"]
    assert make.other_texts(tmp_path / "texts", ["task.texts_folder=mine"]) == []
    monkeypatch.chdir(tmp_path / "texts")
    (tmp_path / "shared" / "data" / "corpus").mkdir(parents=True)
    assert make.other_texts(tmp_path / "texts", []) == []


@pytest.mark.network
def test_the_packages_have_their_texts(tmp_path):
    make.texts.write(tmp_path)
    words = {path.stem: len(path.read_text().split()) for path in tmp_path.iterdir()}
    assert words == {"news": 1331038, "debates": 193189, "speeches": 170181, "tales": 76926, "wordnet": 1461406}


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
    for form, steps in {"span": 4, "lm": 4, "lm-10": 1, "lm-50": 2, "lm-1000": 40}.items():
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
    assert (folder / "curves" / f"{name}.md").read_text() == card
    curve = json.loads((folder / "curves" / f"{name}.json").read_text())
    assert [point["step"] for point in curve["train"]] == steps
    assert [point["step"] for point in curve["held_out"]] == sorted({0, *steps[1::2], steps[-1]})
    assert 2 * len(steps) * 10 < curve["tokens"] <= 2 * len(steps) * (24 + 16)


def test_the_card_of_the_mixture_tells_of_its_lexicons():
    assert "polarity lexicons" in make.card(make.mixture_run("1m", []), "1m-mixture", [], {"seconds": 1.0})


def test_adaptation_without_its_backbone_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"1m-span: no backbone; expected the span form of 1m"):
        make.make_size("1m", ["lm"], 1.0, tmp_path, tmp_path, [])
