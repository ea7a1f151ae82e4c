"""Reports: runs grouped by settings, means with confidence, and a page that needs nothing else."""

from __future__ import annotations

import html.parser
import json

import pytest
from small_runs import write_config

from softprompt_jax import report as write_report
from softprompt_jax.analysis.report import (
    Group,
    breakdown,
    curves,
    flatten,
    group_runs,
    read_runs,
    score_statistics,
    table,
)
from softprompt_jax.config import UserError


def write_run(folder, settings, scores, losses=(2.0, 1.0), finished=True):
    """Write the files of a run that scored so on validation and test."""
    folder.mkdir(parents=True)
    write_config(folder / "config.yaml", settings)
    lines = [{"step": 0, "validation": {"accuracy": 0.5, "illegal": 0.0, "count": 16}}]
    lines += [{"step": 10 * number, "loss": loss} for number, loss in enumerate(losses, start=1)]
    lines += [{"step": 20, "validation": {"accuracy": scores[0], "illegal": 0.0, "count": 16}}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + ("" if finished else '{"step": 3'))
    each = [{"accuracy": score, "illegal": 0.0, "count": 16} for score in scores]
    baselines = {"split": "test", "majority": 0.5, "untrained": {"accuracy": 0.25, "illegal": 1.0, "count": 16}}
    result = {"validation": each[0], "test": each[1], "baselines": baselines, "steps": 20, "best_step": 20}
    if finished:
        (folder / "result.json").write_text(json.dumps(result | {"seconds": 1.0}))


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Return a folder: three seeds at one learning rate, one at another, one not finished."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, score in enumerate((0.6, 0.7, 0.8)):
        write_run(folder / "low" / str(seed), small.short | {"seed": seed}, (score + 0.1, score), (2.0 + seed, 1.0))
    other = small.short | {"optimizer": {"kind": "adafactor", "learning_rate": 0.1}}
    write_run(folder / "high" / "0", other, (0.5, 0.4))
    write_run(folder / "high" / "1", other | {"seed": 1}, (0.5, 0.4), finished=False)
    return folder


def test_runs_are_grouped_by_all_settings_but_the_seed(runs):
    groups = group_runs(read_runs([runs / "low", runs / "high", runs / "low" / "0"]))
    assert [group.settings for group in groups] == [{"learning_rate": 0.3}, {"learning_rate": 0.1}]
    assert [[run.run.seed for run in group.runs] for group in groups] == [[0, 1, 2], [0, 1]]
    assert groups[0].title == "learning_rate 0.3"


def test_a_group_is_named_by_task_and_kinds_first_and_not_by_what_it_has_not():
    settings = {
        "backbone": "embedded",
        "length": None,
        "methods.0.kind": "full",
        "optimizer.kind": "adamw",
        "task": "cb",
    }
    assert Group(settings, []).title == "cb, full, adamw, backbone embedded"


def test_table_has_mean_sd_and_students_interval(runs):
    first, second = table(group_runs(read_runs([runs / "low", runs / "high"])))
    assert first["test"]["mean"] == pytest.approx(0.7)
    assert first["test"]["sd"] == pytest.approx(0.1)
    assert first["test"]["interval"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)  # t of 2 degrees at 97.5%
    assert first["test"]["best"] == pytest.approx(0.8)
    assert second["finished"] == 1
    assert second["validation"] == {"mean": 0.5, "sd": None, "interval": None, "best": 0.5}
    assert score_statistics([0.0, 1.0])["interval"] == pytest.approx(12.7062 * 0.5**0.5 / 2**0.5, rel=1e-4)


def test_curves_and_breakdown(runs, small, tmp_path):
    groups = group_runs(read_runs([runs / "low"]))
    assert groups[0].settings == {}
    assert curves(groups[0], "loss") == [([10, 20], [2.0 + seed, 1.0]) for seed in range(3)]
    assert curves(groups[0], "score")[0] == ([0, 20], [0.5, pytest.approx(0.7)])
    (row,) = breakdown(groups)
    assert (row["task"], row["split"]) == ("moods", "test")
    assert set(row["metrics"]) == {"accuracy", "illegal"}
    # A mixture has a line for each of its tasks; what a task is made of says no more than its name.
    other = small.task | {"name": "others", "source": {"kind": "files", "train": "a.jsonl", "validation": "b.jsonl"}}
    mixture = small.short | {"task": {"kind": "mixture", "tasks": [small.task, other]}}
    write_run(tmp_path / "mixed", mixture, (0.5, 0.5))
    scores = {"moods": {"accuracy": 0.75}, "others": {"accuracy": 0.25}}
    result = {"validation": {"mean": 0.5, "tasks": scores}, "test": None, "baselines": None}
    (tmp_path / "mixed" / "result.json").write_text(json.dumps(result))
    write_run(tmp_path / "other", small.short | {"task": other}, (0.5, 0.5))
    groups = group_runs(read_runs([tmp_path, runs / "low"]))
    assert [group.settings for group in groups] == [{"task": "mixture"}, {"task": "others"}, {"task": "moods"}]
    found = {(row["settings"]["task"], row["task"]): row["metrics"]["accuracy"]["mean"] for row in breakdown(groups)}
    assert found == {
        ("mixture", "moods"): 0.75,
        ("mixture", "others"): 0.25,
        ("others", "others"): 0.5,
        ("moods", "moods"): pytest.approx(0.7),
    }


def test_settings_become_dotted_keys():
    nested = {"methods": [{"kind": "prompt", "init": None}], "label_words": ["a", "b"], "empty": {}, "steps": 1}
    assert flatten(nested) == {
        "methods.0.kind": "prompt",
        "methods.0.init": None,
        "label_words": ["a", "b"],
        "empty": {},
        "steps": 1,
    }


class Cells(html.parser.HTMLParser):
    """Collects the cells of every table row."""

    def __init__(self):
        super().__init__()
        self.rows, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.open += [tag] if tag not in ("meta", "img") else []
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_page_has_scores_curves_and_settings_and_needs_nothing_else(softprompt, runs, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = softprompt("report", runs / "low", runs / "high", "--to", tmp_path / "page")
    assert (code, out) == (0, "")
    assert len(err.splitlines()) == 5
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    parsed = Cells()
    parsed.feed(page)
    assert not parsed.open
    titles = ["learning_rate", "runs", "validation", "test", "best validation", "best test", "untrained"]
    assert parsed.rows[0] == [*titles, "majority accuracy"]
    assert parsed.rows[1] == ["0.3", "3", "80.0 ± 24.8", "70.0 ± 24.8", "90.0", "80.0", "25.0", "50.0"]
    assert parsed.rows[2] == ["0.1", "1", "50.0", "40.0", "50.0", "40.0", "25.0", "50.0"]
    assert ["moods", "test", "learning_rate 0.1", "40.0", "0.0"] in parsed.rows
    assert str(runs / "high" / "1") in page
    assert page.count("data:image/png;base64,") == 3
    assert "://" not in page  # which no picture in base64 can hold
    assert "<script" not in page
    for name in ("loss", "score", "scores"):
        assert (tmp_path / "page" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "page" / "report.json").read_text())["table"][0]["test"]["mean"] == pytest.approx(0.7)


def test_folder_without_a_run_is_one_line(tmp_path, refused):
    with pytest.raises(UserError, match="no run; expected the folder of a run, or one that holds some"):
        write_report([tmp_path], tmp_path / "page")
    assert not (tmp_path / "page").exists()
    assert "Missing option '--to'; see softprompt report --help" in refused("report", tmp_path)


def test_what_push_has_written_is_no_run_of_its_own(small, tmp_path):
    for folder in (tmp_path / "runs" / "0", tmp_path / "runs" / "0" / "hub"):
        write_run(folder, small.short, (0.7, 0.6))
    assert [run.folder for run in read_runs([tmp_path / "runs"])] == [tmp_path / "runs" / "0"]
    assert [run.folder for run in read_runs([tmp_path / "runs" / "0" / "hub"])] == [tmp_path / "runs" / "0" / "hub"]


def test_scores_of_a_seqio_task_keep_their_unit(small, tmp_path):
    task = {"kind": "seqio", "name": "moods", "module": "my.tasks"}
    for seed, score in enumerate((84.2, 86.2)):
        write_run(tmp_path / "runs" / str(seed), small.short | {"task": task, "seed": seed}, (score, score))
    (page, *_) = write_report([tmp_path / "runs"], tmp_path / "page")
    text = page.read_text(encoding="utf-8")
    assert "85.2 ± 12.71" in text
    assert "8520" not in text
