"""Pages that are facts say what configs, methods and committed results say; links lead somewhere."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import nbclient
import nbformat
import pytest

from softprompt_jax.field_comments import comments
from softprompt_jax.methods import METHODS
from softprompt_jax.paper import experiments
from softprompt_jax.run import Run

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_pages_and_tables_are_up_to_date():
    """Otherwise: python docs/build.py."""
    assert [str(path.relative_to(ROOT)) for path in build.outdated()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_every_class_of_settings_has_a_section_and_every_link_to_one_leads_there():
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    sections = [line.removeprefix("## ").replace(": ", "-") for line in text.splitlines() if line.startswith("## ")]
    assert len(sections) == len(set(sections))
    linked = set(re.findall(r"\]\(#([^)]+)\)", text))
    for page in (ROOT / "docs" / "methods").glob("*.md"):
        linked |= set(re.findall(r"settings\.md#([^)]+)\)", page.read_text(encoding="utf-8")))
    assert {"optimizer-adafactor", "methods-prompt", "init-file", "source-hub", "mesh"} <= linked <= set(sections)
    for said in (
        "largest root mean square of an update",
        "or an error that says why not",
        "Tokens of inputs and targets, or of features",
    ):
        assert said in text  # comments behind a field, on the line below, on the line above


def test_every_setting_of_a_run_and_of_a_method_is_described():
    for cls in (Run, *METHODS.values()):
        assert set(cls.model_fields) - set(comments(cls)) <= {"kind"}, cls


def test_pictures_are_well_formed_and_described():
    for path in (ROOT / "docs").rglob("*.svg"):
        root = xml.etree.ElementTree.parse(path).getroot()
        assert root.get("role") == "img", path
        assert root.get("aria-label") or root.get("aria-labelledby"), path


def test_a_plot_shows_every_mean():
    value = {"mean": 70.0, "sd": 2.0, "values": [68.0, 72.0]}
    lines = {"one": {"a": value, "b": value | {"mean": 80.0, "sd": None}}, "two": {"a": value | {"mean": 60.0}}}
    for kind, mark in (("bars", "<rect"), ("lines", "<circle")):
        picture = build.paper_pages.plot("A title & more", lines, kind, "accuracy, %", {"task": 55.0})
        xml.etree.ElementTree.fromstring(picture)
        assert "A title &amp; more" in picture
        assert "majority class task 55.0" in picture
        assert picture.count(mark) >= 3
        assert picture.count('stroke-width="1.4"') == 2  # of those that have a deviation


def test_a_plot_of_several_tasks_has_the_majority_class_of_each_however_low():
    value = {"mean": 70.0, "sd": None, "values": [70.0]}
    majority = {"sentiment_movie": 45.0, "intents": 16.7}
    lines = {"movie sentences": {"a": value, "b": value}, "intents": {"a": value, "b": value}}
    picture = build.paper_pages.plot("t", lines, "bars", "accuracy, %", majority)
    assert "majority class movie sentences 45.0" in picture
    assert "majority class intents 16.7" in picture
    columns = {"one": dict.fromkeys(lines, value), "two": dict.fromkeys(lines, value)}
    under = build.paper_pages.plot("t", columns, "bars", "accuracy, %", majority)
    assert len(set(re.findall(r'd="M([\d.]+) [\d.]+H[\d.]+" stroke="[^"]*" stroke-width="1.5"', under))) >= 2


def test_a_plot_has_numbers_to_scale_and_colours_that_mean_the_same_everywhere():
    value = {"mean": 70.0, "sd": None, "values": [70.0]}
    lines = {"model tuning": dict.fromkeys(("0", "10%", "100%", "1000%"), value)}
    picture = build.paper_pages.plot("t", lines, "lines", "accuracy, %", None, "steps")
    places = [float(place) for place in re.findall(r'cx="([\d.]+)"', picture)]
    distances = [b - a for a, b in itertools.pairwise(places)]
    assert distances[1] == pytest.approx(distances[2], abs=0.2)  # equal factors are equal distances; 0 stands apart
    assert "steps (logarithmic scale)" in picture
    two = build.paper_pages.plot("t", lines | {"model tuning, with spam": {"0": value}}, "bars", "accuracy, %")
    (colour,) = set(re.findall(r'stroke="(#\w+)" stroke-width="2.5"', picture))
    assert two.count(f'fill="{colour}" fill-opacity="1"') == 5  # its bars and the legend's area
    assert two.count(f'fill="{colour}" fill-opacity="0.4"') == 2  # of a variant, paler


def test_a_line_without_a_meaning_has_a_colour_of_its_own():
    value = {"mean": 70.0, "sd": None, "values": [70.0]}
    names = ("model tuning", "LoRA", "prompt tuning", "another")
    lines = {name: {"a": value, "b": value} for name in names}
    picture = build.paper_pages.plot("t", lines, "bars", "accuracy, %")
    assert len(set(re.findall(r'fill="(#\w+)" fill-opacity', picture))) == 4


def test_a_plan_is_a_row_for_each_step_and_topology():
    fits = {"fits": True, "peak_bytes": 3 << 30, "limit_bytes": 16 << 30, "flops": 2.5e12, "examples_per_s": 1234.5}
    other = fits | {"fits": False, "peak_bytes": None, "examples_per_s": None}
    plans = {"v5e:2x2": fits | {"utilisation": 0.4}, "v5e:1x1": other}
    table = build.paper_pages.plan_table([{"lines": ["small", "base"], "points": ["20"], "runs": 6, "plans": plans}])
    assert "| v5e:2x2 | small, base: 20 | 6 | yes | 3.0 of 16 | 2.5 | 1,234 |" in table
    assert "| v5e:1x1 | small, base: 20 | 6 | no | ? of 16 | 2.5 |  |" in table
    assert table.endswith("if the chips reach 40% of their peak.")


def test_a_page_says_what_each_line_trains_without_what_its_points_change():
    assert build.paper_pages.trained("length", "miniature").splitlines()[2:] == [
        "- prompt, adafactor at 0.3, 500 steps of 32 examples, on the backbone embedded"
    ]
    assert build.paper_pages.trained("scale", "miniature").splitlines()[2:] == [
        "- prompt tuning: prompt, 20 rows, adafactor at 0.3, 500 steps of 32 examples",
        "- model tuning: all weights, adamw at 0.0005, linear decay, 750 steps of 32 examples",
        "- prompt design: nothing",
    ]


def test_comments_that_are_set_in_are_commands():
    text = "# A method.\n# First:\n#   softprompt train a.yaml\n#   softprompt train b.yaml\n# Then.\ntask: cb  # no\n"
    commands = "    softprompt train a.yaml\n    softprompt train b.yaml"
    assert build.paper_pages.said_above(text) == f"A method. First:\n\n{commands}\n\nThen."


def tutorial() -> nbformat.NotebookNode:
    """Return the tutorial's notebook, with few steps."""
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    nbformat.validate(notebook)
    short = "steps=4 evaluate_every=4 evaluation_examples=32 log_every=2"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"(softprompt train \S+)", rf"\1 {short}", cell.source)
    return notebook


def test_the_tutorial_trains_and_answers():
    cells = "\n".join(cell.source for cell in tutorial().cells if cell.cell_type == "code")
    assert cells.count("softprompt train") == cells.count("steps=4") == 3
    assert "softprompt predict runs/tutorial " in cells


@pytest.mark.network
def test_the_tutorial_runs_as_a_notebook(tmp_path):
    """In a checkout of links, so that runs/ is a new one."""
    for name in ("configs", "softprompt_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "softprompt").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m softprompt_jax "$@"\n')
    (bin_ / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for script in bin_.iterdir():
        script.chmod(0o755)
    strict = tmp_path / "strict.sh"  # so that a cell fails with any of its commands
    strict.write_text("set -euo pipefail\n")
    paths = {"PATH": f"{bin_}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "BASH_ENV": str(strict)}
    notebook = tutorial()
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=os.environ | paths)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.text for output in outputs if output.get("name") == "stdout").splitlines()
    answers = [json.loads(line) for line in said if '"prediction"' in line]
    assert [answer["prompt"] for answer in answers] == ["movie", "spam", "mail"] * 2  # predicted, and served
    assert all(isinstance(answer["prediction"], str) for answer in answers)


def test_numbers_that_experiments_found_are_in_their_results():
    """A number with a decimal is a mean, a deviation, a majority class, or a difference within a line or column."""
    for name, path in experiments.experiments().items():
        experiment, _ = experiments.load(str(path))
        for grid, place, found in (
            (experiment.real, f"real/{name}", experiment.found),
            (experiment.miniature, name, experiment.found_in_miniature),
        ):
            result = build.RESULTS / "paper" / f"{place}.json"
            if grid is None or not result.exists():
                continue
            result = json.loads(result.read_text())
            lines = [{column: cell for column, cell in line.items() if cell} for line in result["lines"].values()]
            columns = [
                [line[column] for line in lines if column in line] for column in {c for line in lines for c in line}
            ]
            known = list(result["majority"].values())
            for cells in [list(line.values()) for line in lines] + columns:
                known += [cell[key] for cell in cells for key in ("mean", "sd") if cell[key] is not None]
                known += [abs(one["mean"] - other["mean"]) for one, other in itertools.combinations(cells, 2)]
            scale = 100 if grid.measure == "neighbours" else 1
            names = " ".join([*grid.lines, *grid.points])
            for number in re.findall(r"\d+\.\d+\b(?! million)", " ".join(found)):
                half = 0.51 * 10.0 ** -len(number.partition(".")[2])
                is_known = number in names or any(abs(float(number) - value / scale) <= half for value in known)
                assert is_known, f"{name}: {number} is not in {place}.json"


def test_speed_is_that_of_the_latest_quiet_run_beside_pefts_best(tmp_path):
    def line(date, side, variant, seconds, others=0.01, cores=1):
        about = {"date": date, "others": others, "size": "small", "dtype": "float32", "cores": cores, "case": "fixed"}
        about |= {"machine": {"family_model": "1/2"}, "cpu_s_rounds": [seconds] * 2, "wall_s_per_step": seconds / 2}
        return about | {"side": side, "variant": variant, "cpu_s_per_step": seconds}

    lines = [line("1", "ours", "scan", 9.0), line("1", "peft", "sdpa", 9.0)]
    lines += [line("2", "ours", "scan", 4.0), line("2", "peft", "sdpa", 6.0), line("2", "peft", "compile", 5.0)]
    lines += [line("2", "peft", "sdpa-kept", 4.5), line("2", "peft", "compile", 1.0, cores=2)]
    lines += [line("4", "ours", "scan", 2.0, cores=2), line("4", "peft", "sdpa", 3.0, cores=2)]
    lines += [line("3", "ours", "scan", 1.0, others=0.5), line("3", "peft", "sdpa", 8.0, others=0.5)]
    lines += [line("3", "ours", "unroll", 2.0, others=0.5)]
    (tmp_path / "training_step.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name in ("decoding", "mixed_prompts"):
        (tmp_path / f"{name}.jsonl").write_text("")
    what = "a step, small, float32, fixed lengths"
    assert build.speed.speeds(tmp_path) == [
        (what, 4.0, 5.0, "compile", 4.5, 2, True, "1/2"),
        (f"{what}, 2 cores", 1.0, 1.5, "sdpa", None, 2, True, "1/2"),
        (f"{what}, unrolled", 2.0, 8.0, "sdpa", None, 2, False, "1/2"),
    ]


@pytest.mark.network
def test_the_readme_trains_and_answers_as_printed(tmp_path):
    """Its YAML, commands and Python, on files such as it describes."""
    kinds = {"negative": "a boring film , worse than number {}", "positive": "a lovely film , better than number {}"}
    for split, numbers in (("train", range(40)), ("validation", range(40, 50))):
        lines = [{"text": text.format(n), "label": label} for n in numbers for label, text in kinds.items()]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    softprompt = tmp_path / "bin" / "softprompt"
    softprompt.parent.mkdir()
    softprompt.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m softprompt_jax "$@"\n')
    softprompt.chmod(0o755)
    environment = os.environ | {"PATH": f"{softprompt.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"XLA_FLAGS": ""}  # programs that are quick to compile take three times as long to run
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL))
    said = {}
    for language, command in (("bash", ["bash", "-euo", "pipefail", "-c"]), ("python", [sys.executable, "-c"])):
        done = subprocess.run(
            [*command, blocks[language]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said[language] = done.stdout.splitlines()
    assert json.loads(said["bash"][-1])["text"] == "what a lovely film"
    assert json.loads(said["bash"][-1])["prediction"] == "positive"
    assert said["python"][1] == "['positive']"
    assert said["python"][2].startswith("[('positive', -")  # of the bank
