"""Reports: runs grouped by settings, mean and sd over seeds, and a page that needs nothing else."""

from __future__ import annotations

import html
import html.parser
import json

import pytest
from small_runs import write_config

from softprompt_jax import load_run
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
from softprompt_jax.inference.mistakes import Mistake
from softprompt_jax.training.sweep import Member, describe, summary


def write_run(folder, settings, scores, losses=(2.0, 1.0), finished=True):
    """Write the files of a run that scored so on validation and test."""
    folder.mkdir(parents=True)
    write_config(folder / "config.yaml", settings)
    lines = [{"step": 0, "validation": {"accuracy": 0.5, "mean": 0.5, "illegal": 0.0, "count": 16, "loss": 4.0}}]
    lines += [{"step": 10 * number, "loss": loss} for number, loss in enumerate(losses, start=1)]
    lines += [
        {"step": 20, "validation": {"accuracy": scores[0], "mean": scores[0], "illegal": 0.0, "count": 16, "loss": 2.0}}
    ]
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


def test_a_group_is_named_by_the_fewest_settings_that_a_reader_cares_about(small, tmp_path):
    """Not by how often it was logged, nor by what only its kind of optimizer has."""
    task = small.task | {"name": "others"}
    adamw = {"optimizer": {"kind": "adamw", "learning_rate": 0.01}, "steps": 30}
    write_run(tmp_path / "a", small.short | {"log_every": 1, "evaluate_every": 2}, (0.5, 0.5))
    write_run(tmp_path / "b", small.short | adamw | {"task": task, "log_every": 3}, (0.5, 0.5))
    one, other = group_runs(read_runs([tmp_path]))
    assert (one.settings, other.settings) == ({"task": "moods"}, {"task": "others"})
    assert {"kind", "learning_rate", "steps", "log_every"} <= set(other.others)
    assert "beta1" not in other.others
    # Where nothing else differs, that does.
    write_run(tmp_path / "c", small.short | {"log_every": 5, "evaluate_every": 2}, (0.5, 0.5))
    titles = [group.title for group in group_runs(read_runs([tmp_path / "a", tmp_path / "c"]))]
    assert titles == ["log_every 1", "log_every 5"]
    write_run(tmp_path / "d", small.short | {"log_every": 5, "evaluate_every": 2, "steps": 50}, (0.5, 0.5))
    titles = [group.title for group in group_runs(read_runs([tmp_path / "a", tmp_path / "d"]))]
    assert titles == [f"steps {small.short['steps']}", "steps 50"]


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
    assert curves(groups[0], "score")[0] == ([0, 20], [50, pytest.approx(70)])  # percent, as in the tables
    assert curves(groups[0], "validation_loss")[1] == ([0, 20], [4.0, 2.0])
    (row,) = breakdown(groups)
    assert (row["task"], row["split"]) == ("moods", "test")
    assert set(row["metrics"]) == {"accuracy", "illegal"}
    # A mixture has a line for each of its tasks; what a task is made of says no more than its name.
    other = small.task | {"name": "others", "source": {"kind": "files", "train": "a.jsonl", "validation": "b.jsonl"}}
    mixture = small.short | {"task": {"kind": "mixture", "tasks": [small.task, other]}}
    write_run(tmp_path / "mixed", mixture, (0.5, 0.5))
    scores = {"moods": {"accuracy": 0.75}, "others": {"accuracy": 0.25}}
    result = {"validation": {"mean": 0.5, "tasks": scores}, "test": None, "baselines": None, "best_step": 20}
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
    assert len(err.splitlines()) == 6
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    parsed = Cells()
    parsed.feed(page)
    assert not parsed.open
    titles = ["setting", "test", "validation", "95% interval of the test mean", "before training", "majority class"]
    assert parsed.rows[0] == [*titles, "runs"]
    rows = [[text.replace("\N{NO-BREAK SPACE}", " ") for text in row] for row in parsed.rows]
    low = ["learning_rate 0.3", "70.0 ± 10.0 (80.0)", "80.0 ± 10.0 (90.0)", "45.2 to 94.8", "25.0", "50.0", "3"]
    assert rows[1] == low
    assert rows[2] == ["learning_rate 0.1", "40.0", "50.0", "–", "25.0", "50.0", "1"]
    assert ["moods", "test", "learning_rate 0.1", "40.0", "0.0"] in rows
    assert str(runs / "high" / "1") in page
    assert page.count("data:image/png;base64,") == 4
    assert "://" not in page  # which no picture in base64 can hold
    assert "<script" not in page
    for name in ("loss", "validation_loss", "score", "scores"):
        assert (tmp_path / "page" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "page" / "report.json").read_text())["table"][0]["test"]["mean"] == pytest.approx(0.7)


def mistakes(labels, surest):
    counts = [[3 if row == column else 1 for column in range(len(labels) + 1)] for row in range(len(labels))]
    about = {"split": "test", "labels": labels, "answers": [*labels, "(no label)"], "counts": counts}
    return json.dumps(
        {"moods": about | {"surest": [dict(zip(Mistake.model_fields, one, strict=True)) for one in surest]}}
    )


def test_the_page_has_the_confusions_and_the_most_confident_mistakes_of_the_best_setting(small, tmp_path):
    wrong = ("the <tea> room is dull", "no", "yes")
    for seed, probability in enumerate((0.75, 0.9)):
        write_run(tmp_path / "runs" / str(seed), small.short | {"seed": seed}, (0.5, 0.5))
        made = mistakes(["yes", "no"], [(*wrong, probability), (f"other {seed}", "yes", "maybe", 0.5)])
        (tmp_path / "runs" / str(seed) / "mistakes.json").write_text(made)
    (page, *files) = write_report([tmp_path / "runs"], tmp_path / "page")
    parsed = Cells()
    parsed.feed(page.read_text(encoding="utf-8"))
    assert ["text", "right", "answer", "probability", "runs"] in parsed.rows
    rows = [[text.replace("\N{NO-BREAK SPACE}", " ") for text in row] for row in parsed.rows]
    first = rows.index([*wrong, "90%", "2 of 2"])
    assert rows[first + 1 : first + 3] == [[f"other {n}", "yes", "maybe", "50%", "1 of 2"] for n in range(2)]
    assert "confusion4" in {file.stem for file in files}
    # Of many labels the confusions are listed.
    many = mistakes([f"l{number}" for number in range(11)], [])
    for seed in range(2):
        (tmp_path / "runs" / str(seed) / "mistakes.json").write_text(many)
    (page, *files) = write_report([tmp_path / "runs"], tmp_path / "page")
    parsed = Cells()
    parsed.feed(page.read_text(encoding="utf-8"))
    assert ["l0", "l1", "2"] in parsed.rows
    assert "No wrong answer." in page.read_text(encoding="utf-8")
    (tmp_path / "runs" / "0" / "mistakes.json").write_text('{"moods": {"split": 3}}')
    with pytest.raises(UserError, match=r"mistakes.json: moods: "):
        write_report([tmp_path / "runs"], tmp_path / "page")


def test_the_terminal_and_the_page_state_the_same_spread(runs, small, tmp_path):
    """What a sweep prints of these runs is in the cells of the page: mean ± sd, and the best run."""
    members = [
        Member(str(seed), {"seed": seed}, load_run(runs / "low" / str(seed) / "config.yaml")) for seed in range(3)
    ]
    printed = " ".join(describe(summary(members, runs / "low")))
    (page, *_) = write_report([runs / "low"], tmp_path / "page")
    text = page.read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    for cell in ("70.0 ± 10.0 (80.0)", "80.0 ± 10.0 (90.0)"):
        assert cell in printed
        assert f"<td>{cell}</td>" in text
    for said in (printed, text):
        assert "mean of" in said
        assert "task's metrics" in html.unescape(said)
        assert "sd" in said


def test_the_first_table_fits_the_page_however_much_runs_differ(small, tmp_path):
    """Few columns, no cell but numbers that cannot wrap: at most 90 letters side by side in a page of 1,000 pixels."""
    task = small.task | {"name": "others"}
    unlike = {"max_input_tokens": 96, "steps": 30, "log_every": 3, "evaluate_every": 5, "checkpoint_every": 5}
    adamw = {"optimizer": {"kind": "adamw", "learning_rate": 0.01}, "methods": [{"kind": "prefix", "length": 3}]}
    for seed in range(2):
        write_run(tmp_path / "runs" / f"a{seed}", small.short | {"seed": seed}, (0.5, 0.5 + seed / 10))
        other = small.short | unlike | adamw | {"task": task, "seed": seed}
        write_run(tmp_path / "runs" / f"b{seed}", other, (0.7, 0.7))
    (page, *_) = write_report([tmp_path / "runs"], tmp_path / "page")
    parsed = Cells()
    parsed.feed(page.read_text(encoding="utf-8"))
    first = parsed.rows[:3]
    assert [row[0] for row in first] == ["setting", "moods", "others"]
    unbroken = [max(len(word) for row in first for word in row[column].split(" ")) for column in range(len(first[0]))]
    assert len(unbroken) == 7
    assert sum(unbroken) <= 90


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
    text = page.read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert "85.2 ± 1.414 (86.2)" in text
    assert "8520" not in text
