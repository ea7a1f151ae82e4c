"""The paper's experiments: data that make valid runs, a grid that goes on where it stopped, and what is measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_lm
import yaml
from safetensors.numpy import save_file
from small_runs import write_rows

from softprompt_jax.analysis import plan
from softprompt_jax.cli.signals import PREEMPTED
from softprompt_jax.config import Preempted, UserError, parse, to_yaml
from softprompt_jax.paper import experiments, measures, results
from softprompt_jax.run import Run
from softprompt_jax.training import sweep
from softprompt_jax.training.sweep import Member

COMMITTED = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "paper"
ISSUE = {"scale", "length", "initialisation", "objective", "lm_steps", "domain_shift", "paraphrase", "ensemble"}
ISSUE |= {"interpretability", "mixed_tasks", "optimizer", "examples", "released", "t5_base", "scale_pythia"}
METRICS = ("accuracy", "f1", "accuracy", "accuracy")
NAMES = sorted(experiments.experiments())


def with_form(form: experiments.FormName) -> list[str]:
    return [name for name in NAMES if form in experiments.load(name)[0].forms]


def planned(name: str | Path, form: experiments.FormName, seeds: int | None = None) -> list[Member]:
    """Return the runs of an experiment."""
    _, path, grid = experiments.load_form(str(name), form)
    return list(experiments.members(grid, path, seeds))


@pytest.fixture
def grid(small, tmp_path, own_cache):
    """Return a function that writes an experiment of two lines on the small backbone."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(small.short | {"steps": 4, "evaluate_every": 4}))

    def write(**changes) -> Path:
        miniature = {
            "base": "base.yaml",
            "lines": {"few": {"change": {"methods.0.length": 2}}, "more": {"change": {"methods.0.length": 4}}},
            "seeds": 2,
            "cost": "seconds",
            **changes,
        }
        text = {"title": "Lengths", "source": "nowhere", "question": "Which?"}
        file = tmp_path / "lengths.yaml"
        file.write_text(yaml.safe_dump(text | {"miniature": miniature, "real": miniature}))
        return file

    return write


def test_every_figure_and_table_of_the_issue_is_an_experiment():
    assert set(NAMES) == ISSUE


@pytest.mark.parametrize("form", ["miniature", "real"])
def test_every_run_of_a_form_is_valid(form):
    """Those of the published forms are counted, and so read, by the test of the list below."""
    for name in with_form(form):
        members = planned(name, form, 1)
        assert {member.varied["line"] for member in members} == set(experiments.load_form(name, form)[2].lines)
        assert all(isinstance(member.run, Run) and member.run.seed == 0 for member in members)


def build(member: Member) -> int:
    """Build a run's step abstractly and return how many numbers train."""
    import jax

    step, arguments, parts = plan.abstract_step(member.run)
    state, measured = jax.eval_shape(step, *arguments)
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, arguments[0]), member.varied
    assert measured["loss"].shape == ()
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parts.trainable))


def test_real_runs_are_short_runs_of_smollm2_that_share_what_they_can():
    runs = {name: {member.name: member.run for member in planned(name, "real", 1)} for name in with_form("real")}
    for run in (run for of_name in runs.values() for run in of_name.values()):
        assert (run.backbone, run.steps, run.batch_size, run.result_examples) == ("smollm2", 200, 8, 200)
        assert (run.evaluate_every, run.tasks[0].predict_by, run.tasks[0].metrics) == (200, "likelihood", ["accuracy"])
    assert runs["mixed_tasks"].keys() == runs["ensemble"].keys()
    assert runs["interpretability"].keys() < runs["initialisation"].keys()
    assert len({run for of_name in runs.values() for run in of_name}) == 32
    assert {m.run.tasks[0].few_shot.seed for m in planned("examples", "real") if m.run.tasks[0].few_shot} == {0, 1, 2}


def test_the_order_of_experiments_begins_with_the_cheapest():
    order = experiments.in_order("real")
    assert sorted(order) == with_form("real")
    assert order.index("mixed_tasks") == order.index("ensemble") + 1  # whose runs it shares
    assert order[-1] == "length"


def test_a_published_run_is_built_without_weights():
    (xxl,) = [
        member
        for member in planned("length", "published", 1)
        if list(member.varied.values())[:3] == ["xxl", "150", "boolq"]
    ]
    assert xxl.run.backbone == "google/t5-xxl-lm-adapt"
    assert build(xxl) == 150 * 4096


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Put prompts of the shape of the released ones where the experiment looks for them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "released").mkdir(parents=True)
    for name in ("sst2", "mrpc", "rte"):
        np.save(tmp_path / "runs" / "released" / f"{name}.npy", np.zeros((100, 768), np.float32))


def test_the_released_prompts_are_built_and_their_score_is_that_of_before_training(released):
    members = planned("released", "published")
    assert [member.varied["point"] for member in members] == [
        "SST-2 accuracy", "MRPC F1", "MRPC accuracy", "RTE accuracy",
    ]  # fmt: skip
    assert all(member.run.tasks[0].metrics == [metric] for member, metric in zip(members, METRICS, strict=True))
    assert build(members[0]) == 100 * 768
    shutil.rmtree("runs")
    with pytest.raises(UserError, match=r"runs/released/sst2\.npy"):
        build(members[0])


def test_runs_on_t5_base_have_the_splits_and_sizes_of_the_tables(released):
    members = {(m.varied["line"], m.varied["point"]): m.run for m in planned("t5_base", "published", 1)}
    assert len(members) == 4 * 13
    for (_, point), run in members.items():
        (task,), large = run.tasks, point in ("MNLI", "QQP", "QNLI", "SST-2")
        splits = task.source.model_dump()["splits"]
        assert splits["test"].endswith("]") != large
        assert splits["validation"] == ("train[:1000]" if large else "validation[:50%]")
        assert (run.steps, task.hidden) == (100_000 if point in ("MNLI", "QQP", "QNLI") else 40_000, [])
        assert task.words is None or all(word.isdigit() for word in task.words)
    for line, count in (("DePT", 76_800), ("ULPT r=2", 1736)):  # as the tables have them
        assert build(Member("", {}, members[line, "CB"])) == count


def test_published_values_stand_beside_ours():
    _, _, grid = experiments.load_form("ensemble", "published")
    values = {line: {"average": [0.9, 0.92], "best": [0.92]} for line in grid.lines}
    measures.add_means(grid, values)
    rows = results.table(results.cells(grid, values), grid.reported).splitlines()
    assert rows[0] == "|  | average | best | majority vote | mean log-probability |"
    assert rows[2] == "| BoolQ | 91.0 ± 1.4 [91.1] | 92.0 [91.3] | [91.7] |  |"
    assert rows[-1] == "| SuperGLUE | 91.0 ± 1.4 [90.5] | 92.0 [91.0] | [91.3] |  |"


@pytest.mark.parametrize("name", with_form("published"))
def test_published_values_belong_to_columns_of_the_experiment(name):
    _, _, grid = experiments.load_form(name, "published")
    if grid.reported is not None:
        lines = results.cells(grid, {})
        assert set(grid.lines) <= set(grid.reported.lines)
        assert all(set(found) <= set(measures.columns(grid)) for found in grid.reported.lines.values())
        assert all(
            len(found) == len(grid.points) + len(grid.means) for found in lines.values() if grid.points != {"": {}}
        )


def test_a_mean_needs_all_that_it_averages(grid):
    points = {"2": {}, "3": {}}
    file = grid(points=points, lines={"one": {"change": {"methods.0.length": "{point}"}}}, means={"both": ["2", "3"]})
    _, _, found = experiments.load_form(str(file), "miniature")
    values = {"one": {"2": [0.5, 0.7], "3": [0.7]}}
    measures.add_means(found, values)
    assert "both" not in values["one"]
    values["one"]["3"].append(0.9)
    measures.add_means(found, values)
    assert values["one"]["both"] == pytest.approx([0.6, 0.8])
    with pytest.raises(UserError, match=r"means\.both: no '4'"):
        experiments.load_form(str(grid(points=points, means={"both": ["2", "4"]})), "miniature")


@pytest.mark.slow
@pytest.mark.parametrize("name", with_form("published"))
def test_every_published_run_is_built_without_weights(name, released):
    """One run of each setting but seeds, texts, losses and numbers of steps, on which a step does not depend."""
    unlike = {
        (member.run.model_dump_json(exclude={"seed", "task", "loss", "steps"}), len(member.run.tasks)): member
        for member in planned(name, "published", 1)
    }
    for member in unlike.values():
        assert build(member) > 0


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("initialisation", 5), ("optimizer", 1), ("length", 25), ("released", 1), ("t5_base", 8), ("scale_pythia", 16)],
)
def test_steps_of_one_size_are_planned_once_whatever_they_begin_with(name, sizes):
    assert len(experiments.steps_of_one_size(planned(name, "published", 1))) == sizes


@pytest.mark.slow
def test_each_distinct_step_is_planned_once(softprompt, tmp_path, monkeypatch):
    asked = []

    def fake(config, overrides, topologies):
        settings = yaml.safe_load(Path(config).read_text())
        asked.append((settings["backbone"], settings["methods"][0]["length"], *topologies))
        fits = settings["methods"][0]["length"] < 150
        return [{
            "topology": topologies[0], "devices": 4, "fits": fits, "peak_bytes": 2**30, "limit_bytes": 2**34,
            "weights_bytes": 5, "state_bytes": 5, "temporary_bytes": 5, "flops": 1e12, "rows_per_device": 8,
            "collectives": {}, "estimated": False, "examples_per_s": 7.0, "utilisation": 0.4, "advice": [],
            "packed": False, "plain_attention": False, "purpose": "train", "batch": 32, "largest_batch": 64,
            "compiler": "libtpu", "kernels": {},
        }]  # fmt: skip

    monkeypatch.setattr(plan, "plan", fake)
    wanted = ["paper", "length", "--form", "published", "--topology", "v5p:2x2x1", "--runs", tmp_path]
    code, out, _ = softprompt(*wanted)
    sizes, lengths = ("small", "base", "large", "xl", "xxl"), (1, 5, 20, 100, 150)
    assert asked == [(f"google/t5-{size}-lm-adapt", length, "v5p:2x2x1") for size in sizes for length in lengths]
    assert code == plan.DOES_NOT_FIT
    told = "v5p:2x2x1: fits; peak 1.00 GiB of 16.00 GiB on each of 4 device(s) (compiled by libtpu)"
    assert f"small: 1 (24 runs)\n{told}\n" in out
    assert out.count("does not fit") == 5
    (first, *rest) = json.loads((tmp_path / "length-published-plan.json").read_text())
    assert (first["lines"], first["points"], first["runs"], len(rest)) == (["small"], ["1"], 24, 24)
    assert "small: 1 (8 runs)\n" in softprompt(*wanted, "--seeds", 1)[1]
    asked.clear()
    assert softprompt("paper", "initialisation", *wanted[2:])[0] == 0
    assert not asked  # its rows begin with something else, but are as many
    assert softprompt(*wanted)[0] == plan.DOES_NOT_FIT
    assert not asked


def write_result(folder: Path, accuracy: float, untrained: float = 0.1) -> None:
    """Write the files of a finished run that scored so on the test split."""
    folder.mkdir(parents=True, exist_ok=True)
    baselines = {"split": "test", "majority": 0.5, "untrained": {"accuracy": untrained}}
    scores = {"validation": {"accuracy": accuracy}, "test": {"accuracy": accuracy}, "best_step": 1}
    result = scores | {"baselines": baselines, "seconds": 2.0}
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def train_group(monkeypatch):
    """Replace the training of a group of runs by a function of the group and the folder of their folders."""

    def replace(function) -> None:
        def train(group: Sequence[Member], folder: Path, *rest) -> None:
            for member in group:  # as every run does before its first step
                (folder / member.name).mkdir(exist_ok=True)
                (folder / member.name / "config.yaml").write_text(to_yaml(member.run))
            function(group, folder)

        monkeypatch.setattr(sweep, "_train_group", train)

    return replace


def test_a_grid_is_trained_once_and_goes_on(grid, tmp_path, train_group):
    file, runs, to = grid(), tmp_path / "runs", tmp_path / "result.json"
    accuracy = {"few": (0.5, 0.7), "more": (0.6, 0.9)}
    labels = {member.name: (member.varied["line"], member.varied["seed"]) for member in planned(file, "miniature")}
    trained = []

    def train(group: Sequence[Member], folder: Path) -> None:
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append([labels[member.name] for member in group])
        for member in group:
            line, seed = labels[member.name]
            write_result(folder / member.name, accuracy[line][seed])

    train_group(train)
    with pytest.raises(KeyboardInterrupt):
        experiments.run_experiment(str(file), "miniature", runs, to)
    assert trained == [[("few", 0), ("few", 1)]]  # of one shape, so in one program
    partial = json.loads(to.read_text())
    assert (partial["cells"], partial["missing"]) == (2, ["more, seed 0", "more, seed 1"])
    few = {"score": {"mean": 60.0, "sd": 14.14, "values": [50.0, 70.0]}}
    assert partial["lines"] == {"few": few, "more": {"score": None}}
    assert results.table(partial["lines"]).endswith("| few | 60.0 ± 14.1 |\n| more |  |")
    trained.clear()
    result = experiments.run_experiment(str(file), "miniature", runs, to)
    assert trained == [[("more", 0), ("more", 1)]]
    assert json.loads(to.read_text()) == result
    assert (result["missing"], result["majority"]) == ([], {"moods": 50.0})
    for line, values in accuracy.items():
        percent = [100 * value for value in values]
        found = result["lines"][line]["score"]
        assert found["values"] == pytest.approx(percent)
        assert found["mean"] == pytest.approx(statistics.mean(percent))
        assert found["sd"] == pytest.approx(statistics.stdev(percent), abs=0.01)
    assert results.table(result["lines"]).splitlines() == [
        "|  | score |",
        "|---|---|",
        "| few | 60.0 ± 14.1 |",
        "| more | 75.0 ± 21.2 |",
    ]


def test_a_stopped_experiment_has_written_what_is_finished(grid, softprompt, tmp_path, train_group):
    def train(group: Sequence[Member], folder: Path) -> None:
        if group[0].varied["line"] == "more":
            raise Preempted("told to stop, saved at step 3")
        for member in group:
            write_result(folder / member.name, 0.5)

    train_group(train)
    code, out, err = softprompt("paper", grid(), "--runs", tmp_path / "runs")
    assert (code, out) == (PREEMPTED, "")
    assert "told to stop, saved at step 3" in err
    assert json.loads((tmp_path / "runs" / "lengths-miniature.json").read_text())["cells"] == 2
    train_group(lambda group, folder: [write_result(folder / member.name, 0.5) for member in group])
    assert softprompt("paper", grid(), "--runs", tmp_path / "runs")[:2] == (
        0,
        "|  | score |\n|---|---|\n| few | 50.0 ± 0.0 |\n| more | 50.0 ± 0.0 |\n",
    )


def test_a_run_that_diverges_stays_missing_and_is_not_trained_again(grid, tmp_path, train_group):
    asked = []

    def train(group: Sequence[Member], folder: Path) -> None:
        for member in group:
            asked.append(member.run.seed)
            if member.run.seed == 0:
                (folder / member.name / "failed.json").write_text(
                    '{"step": 7, "reason": "the loss is no finite number"}'
                )
            else:
                write_result(folder / member.name, 0.5)

    train_group(train)
    for _ in range(2):
        result = experiments.run_experiment(str(grid()), "miniature", tmp_path / "runs", tmp_path / "to.json")
        assert (result["cells"], result["missing"]) == (2, ["few, seed 0", "more, seed 0"])
    assert asked == [0, 1, 0, 1]


def test_a_run_that_was_begun_alone_goes_on_alone(grid, tmp_path, monkeypatch):
    """As those of earlier versions were, whose checkpoints are in the run's own folder."""
    (few, more) = planned(grid(seeds=1), "miniature")
    (tmp_path / "runs" / more.name / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / more.name / "config.yaml").write_text(yaml.safe_dump(more.run.model_dump(mode="json")))
    (tmp_path / "runs" / few.name).mkdir()
    write_result(tmp_path / "runs" / few.name, 0.5)
    (tmp_path / "runs" / few.name / "config.yaml").write_text(yaml.safe_dump(few.run.model_dump(mode="json")))
    alone = []
    monkeypatch.setattr(sweep, "train", lambda run, folder, *_: (alone.append(folder.name), write_result(folder, 1.0)))
    result = experiments.run_experiment(
        str(tmp_path / "lengths.yaml"), "miniature", tmp_path / "runs", tmp_path / "to.json"
    )
    assert alone == [more.name]
    assert [line["score"]["mean"] for line in result["lines"].values()] == [50.0, 100.0]


@pytest.mark.parametrize("path", sorted(COMMITTED.rglob("*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_committed_result_has_the_statistics_of_its_values(path):
    result = json.loads(path.read_text())
    if path.stem.endswith("-plan"):
        return
    assert results.table(result["lines"]).count("\n| ") == len(result["lines"])
    for columns in result["lines"].values():
        for found in filter(None, columns.values()):
            assert results.percent_statistics([value / 100 for value in found["values"]]) == found


def test_a_seed_counts_when_all_its_tasks_are_there_and_untrained_is_read(grid, tmp_path, small):
    tasks = {"moods": {}, "again": {"task": small.task | {"name": "again"}}}
    file = grid(
        lines={"start": {"read": "untrained"}}, tasks={name: {"task": small.task} | c for name, c in tasks.items()}
    )
    members = planned(file, "miniature")
    for number, member in enumerate(members[:3]):
        write_result(tmp_path / member.name, 1.0, untrained=0.1 * (number + 1))
    result = results.collect(experiments.load_form(str(file), "miniature")[2], members, tmp_path)
    assert result["lines"] == {"start": {"score": {"mean": 15.0, "sd": None, "values": [15.0]}}}
    assert result["missing"] == ["start, moods, seed 1"]  # tasks in the order of the file


def test_the_majority_class_is_scored_as_the_table_is(grid, tmp_path, small):
    """One of four is "yes": always "no" is right three times, with an F1 of 6 / 7 for "no" and 0 for "yes"."""
    rows = [{"text": f"tea {i}", "label": "yes" if i % 4 == 0 else "no"} for i in range(8)]
    source = {"kind": "files", **dict.fromkeys(("train", "validation"), str(write_rows(tmp_path / "rows.jsonl", rows)))}
    file = grid(change={"task": small.task | {"source": source, "metrics": ["accuracy", "f1_macro"]}})
    members = planned(file, "miniature")
    (member, *_) = members
    (tmp_path / member.name).mkdir()
    scores = {"accuracy": 1.0, "f1_macro": 0.5}
    baselines = {"split": "validation", "untrained": scores}
    found = {"validation": scores, "test": None, "best_step": 1, "baselines": baselines, "seconds": 1.0}
    (tmp_path / member.name / "result.json").write_text(json.dumps(found))
    result = results.collect(experiments.load_form(str(file), "miniature")[2], members, tmp_path)
    assert result["metric"] == "mean of accuracy and f1_macro"
    assert result["majority"] == {"moods": pytest.approx(100 * (3 / 4 + (6 / 7) / 2) / 2, abs=0.01)}


@pytest.mark.slow
def test_what_is_read_off_prompts_agrees_with_reading_them_one_by_one(grid, tmp_path, small, monkeypatch):
    """The same two runs serve a vote, neighbours, transfers and mixed batches."""
    from softprompt_jax.inference.predictor import load_predictor
    from softprompt_jax.tasks import load, resolve

    runs, to, lines = tmp_path / "runs", tmp_path / "result.json", {"few": {}}
    file = grid(measure="ensemble", lines=lines)
    members = planned(file, "miniature")
    voted = experiments.run_experiment(str(file), "miniature", runs, to)["lines"]["few"]
    assert [json.loads((runs / member.name / "result.json").read_text())["together"] for member in members] == [2, 2]
    examples = load(resolve(small.task), "test")
    inputs, targets = [example.input for example in examples], np.asarray([example.target for example in examples])
    right = np.asarray([np.asarray(load_predictor(runs / member.name).texts(inputs)) == targets for member in members])
    assert voted["average"]["values"] == pytest.approx(100 * right.mean(1), abs=0.01)
    assert voted["best"]["mean"] == pytest.approx(100 * right.mean(1).max(), abs=0.01)
    vote = voted["majority vote"]["mean"]  # one of the two answers
    assert 100 * right.all(0).mean() - 0.01 <= vote <= 100 * right.any(0).mean() + 0.01
    assert voted["mean log-probability"]["mean"] >= vote  # it knows the label words, which hardly trained prompts miss

    near = experiments.run_experiment(str(grid(measure="neighbours", lines=lines)), "miniature", runs, to)
    assert [len(row) for row in near["nearest"]["few"]] == [measures.NEIGHBOURS] * 3
    assert near["nearest"]["few"][0][0] == "yes"  # the first row began as the first label word, and has hardly moved
    assert near["lines"]["few"]["label words found"]["values"] == [100, 100]

    tasks = {"moods": {"task": small.task}}
    mixed = experiments.run_experiment(str(grid(measure="mixed", tasks=tasks, lines=lines)), "miniature", runs, to)
    assert mixed["lines"]["few"]["same answers"]["values"] == [100, 100]
    assert mixed["lines"]["few"]["moods"]["values"] == voted["average"]["values"]

    known = {"moods": resolve(small.task), "moods too": resolve(small.task | {"metrics": ["f1_macro", "accuracy"]})}
    monkeypatch.setattr(measures, "resolve", lambda task: known.get(task) or resolve(task))
    moved = {"measure": "transfer", "tasks": tasks, "score_on": {"moods": list(known)}}
    moved = experiments.run_experiment(str(grid(**moved, lines=lines)), "miniature", runs, to)
    assert moved["metric"] == "accuracy and f1_macro"
    assert moved["lines"]["few"]["moods"]["values"] == voted["average"]["values"]
    assert moved["majority"] == {"moods": 50.0, "moods too": pytest.approx(100 / 3, abs=0.01)}


def test_names_stand_for_line_and_point(grid):
    file = grid(
        lines={"3": {}, "5": {"points": ["x"]}},
        points={"x": {}, "y": {}},
        change={"methods.0.length": "{line}", "backbone": "backbones/{point}"},
    )
    members = planned(file, "miniature", 1)
    found = [(member.run.methods[0].model_dump()["length"], member.run.backbone) for member in members]
    assert found == [(3, "backbones/x"), (3, "backbones/y"), (5, "backbones/x")]


def test_words_of_a_grid_are_any_letters(grid):
    file = grid(change={"methods.0.init": {"kind": "text", "text": "\N{GRINNING FACE}"}})
    for member in planned(file, "miniature"):
        assert member.run.methods[0].model_dump()["init"]["text"] == "\N{GRINNING FACE}"


def test_places_that_are_taken_are_one_line(grid, refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a folder; expected a file to write to" in refused("paper", grid(), "--to", tmp_path)
    assert "is a file; expected a folder to write to" in refused("paper", grid(), "--configs", tmp_path / "file")
    assert "is a file; expected a folder to write to" in refused("paper", "all", "--to", tmp_path / "file")
    assert "expected the name of one experiment" in refused("paper", "all", "--topology", "v5e:1x1")


def test_runs_become_configs_that_are_runs(grid, tmp_path, softprompt):
    code, _, err = softprompt("paper", grid(), "--configs", tmp_path / "configs")
    assert code == 0
    assert "wrote 4 configs" in err
    lengths = sorted(
        parse(Run, yaml.safe_load(path.read_text()), str(path)).methods[0].model_dump()["length"]
        for path in (tmp_path / "configs").iterdir()
    )
    assert lengths == [2, 2, 4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lines": {"few": {"change": {"stepz": 3}}}}, "few: .*stepz: unknown setting; .*did you mean steps"),
        ({"lines": {"few": {"points": ["z"]}}}, "no point 'z'; expected some of"),
        ({"measure": "transfer"}, "score_on names where each of `tasks` is scored"),
        ({"score_on": {"a": ["b"]}}, "score_on names where each of `tasks` is scored"),
        ({"base": "none.yaml"}, "none.yaml: no such file"),
        ({"seeds": 0}, "seeds"),
    ],
)
def test_wrong_experiments_are_refused_in_one_line(grid, refused, tmp_path, changes, message):
    assert re.search(message, refused("paper", grid(**changes), "--runs", tmp_path / "runs"))


def test_unknown_experiment_names_the_nearest(refused):
    assert "did you mean length?" in refused("paper", "lenght")
    with pytest.raises(UserError, match="unknown; expected one of"):
        experiments.load("nothing")


@pytest.mark.slow
def test_all_experiments_are_listed_with_their_cost(softprompt):
    code, out, _ = softprompt("paper")
    assert code == 0
    for name in NAMES:
        assert f"\n{name} " in f"\n{out}"
    for form in experiments.FORMS:
        assert out.count(f"{form} ") >= len(with_form(form)) > 0


def test_a_sentinel_stands_before_targets_and_is_read_over(small, own_cache):
    from softprompt_jax.assembly import assemble
    from softprompt_jax.training.run_data import TaskSplits

    run = parse(Run, small.short | {"target_sentinel": True}, "test")
    assembly = assemble(run)
    data = TaskSplits(run.tasks[0], run, assembly, 0)
    first, word, end = data.tokens["test"].target(0).tolist()
    assert (first, end) == (assembly.tokenizer.sentinel(0), assembly.tokenizer.eos_id)
    assert assembly.tokenizer.decode([first, word, end]) == data.examples["test"][0].target


def test_a_real_experiment_goes_on_from_its_json_alone(grid, tmp_path, train_group):
    """One seed after the other; what is read off weights is not read again, and trained again where it is missing."""
    file, runs, to = grid(lines={"few": {}}, measure="neighbours", seeds=2), tmp_path / "runs", tmp_path / "to"
    trained = []

    def train(group: Sequence[Member], folder: Path) -> None:
        for member in group:
            trained.append(member.run.seed)
            write_result(folder / member.name, 0.5)
            (folder / member.name / "checkpoints").mkdir()
            save_file({"rows": np.zeros((2, 3), np.float32)}, folder / member.name / "trained.safetensors")

    row = {"cosine": [("▁yes", 0.5)]}
    prompt = {"labels": {"survive": 1, "of": 2}, "nearest_pieces": 1, "length": 2, "rows": [row, row]}
    read = []

    def inspect(sources: Sequence[Path], neighbours: int) -> dict:
        read.extend(sources)
        return {"prompts": [prompt]}

    train_group(train)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "inspect", inspect)
        first = experiments.run_experiment(str(file), "real", runs, to / "lengths.json", together=1, only_seed=0)
        assert (trained, first["cells"], len(read)) == ([0], 1, 1)
        assert first["missing"] == ["few, seed 1"]
        assert [run["result"] is None for run in first["runs"].values()] == [False, True]
        assert not list(runs.glob("*/checkpoints"))
        shutil.rmtree(runs)
        whole = experiments.run_experiment(str(file), "real", runs, to / "lengths.json", together=1)
        assert (trained, len(read), whole["missing"]) == ([0, 1], 2, [])
        assert whole["lines"]["few"]["label words found"]["values"] == [50, 50]
        shutil.rmtree(runs / "measured")
        for held in to.glob("*.json"):
            held.write_text(json.dumps(json.loads(held.read_text()) | {"measured": {}}))
        again = experiments.run_experiment(str(file), "real", runs, to / "lengths.json", together=1)
        assert (trained, again["lines"]) == ([0, 1, 0], whole["lines"])  # the weights of seed 1 were still there


def test_results_of_an_older_version_are_known_by_their_settings(grid, tmp_path, train_group):
    file, runs, to = grid(seeds=1), tmp_path / "runs", tmp_path / "to" / "lengths.json"
    train_group(lambda group, folder: [write_result(folder / member.name, 0.5) for member in group])
    before = experiments.run_experiment(str(file), "real", runs, to, together=1)
    shutil.rmtree(runs)
    older = json.loads(to.read_text())
    older["runs"] = {f"{number:012x}": run for number, run in enumerate(older["runs"].values())}
    to.write_text(json.dumps(older))
    train_group(lambda group, folder: pytest.fail("a finished run is trained again"))
    again = experiments.run_experiment(str(file), "real", runs, to, together=1)
    assert (again["lines"], again["missing"]) == (before["lines"], [])
    with pytest.raises(
        UserError, match=r"holds results with no other settings; expected evaluate_every=2; give another"
    ):
        experiments.run_experiment(str(file), "real", runs, to, overrides=["evaluate_every=2"])


def test_all_experiments_train_one_seed_before_the_next(grid, tmp_path, train_group, monkeypatch, softprompt):
    lengths = grid()
    other = lengths.with_name("other.yaml")
    other.write_text(lengths.read_text().replace("methods.0.length: 4", "methods.0.length: 3"))
    monkeypatch.setattr(experiments, "experiments", lambda: {"lengths": lengths, "other": other})
    trained = []

    def train(group: Sequence[Member], folder: Path) -> None:
        for member in group:
            trained.append((member.run.methods[0].model_dump()["length"], member.run.seed))
            write_result(folder / member.name, 0.5)

    train_group(train)
    asked = ["paper", "all", "evaluate_every=2", "--form", "real", "--runs", tmp_path / "runs", "--to", tmp_path / "to"]
    code, out, _ = softprompt(*asked)
    assert code == 0
    assert trained == [(2, 0), (3, 0), (4, 0), (2, 1), (3, 1), (4, 1)]
    assert out.count("| few | 50.0 ± 0.0 |") == 2
    written = [json.loads((tmp_path / "to" / f"{name}.json").read_text()) for name in ("lengths", "other")]
    assert [(each["cells"], each["settings"]) for each in written] == [(4, ["evaluate_every=2"])] * 2


def test_a_form_that_an_experiment_lacks_is_one_line(refused):
    assert "has no form published; expected one of real" in refused("paper", "examples", "--form", "published")


@pytest.mark.slow
def test_a_killed_real_experiment_goes_on_and_keeps_its_finished_runs(tmp_path):
    """On a small decoder-only model, prompts and all weights, as the experiments on SmolLM2 have them."""
    rows = [{"text": f"{text} {word}", "label": word} for text in tiny_lm.TEXTS[:3] for word in ("good", "bad")]
    source = {"kind": "files", **{s: str(write_rows(tmp_path / f"{s}.jsonl", rows)) for s in ("train", "validation")}}
    task = {"name": "toy", "source": source, "label_words": ["good", "bad"], "predict_by": "likelihood"}
    base = {"backbone": str(tiny_lm.folder(tmp_path / "lm")), "task": task, "steps": 6, "batch_size": 2, "shapes": 1}
    base |= {"evaluate_every": 6, "max_input_tokens": 24, "max_target_tokens": 4, "result_examples": 4}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base | {"methods": [{"kind": "prompt", "length": 3}]}))
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "methods": [{"kind": "full"}]}))
    lines = {"prompt tuning": {}, "model tuning": {"base": "all.yaml"}}
    real = {"base": "base.yaml", "lines": lines, "seeds": 2, "cost": "seconds"}
    text = {"title": "Toy", "source": "nowhere", "question": "Which?", "real": real}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(text))
    runs, to = tmp_path / "runs", tmp_path / "toy.json"
    command = [sys.executable, "-m", "softprompt_jax", "paper", str(tmp_path / "toy.yaml"), "--form", "real"]
    command += ["--runs", str(runs), "--to", str(to)]
    environment = os.environ | {"SOFTPROMPT_CACHE": str(tmp_path / "cache")}

    def finished() -> dict[str, dict]:
        found = json.loads(to.read_text())["runs"] if to.exists() else {}
        return {name: run["result"] for name, run in found.items() if run["result"] is not None}

    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        ends = time.monotonic() + 300
        while len(finished()) < 2 and time.monotonic() < ends and process.poll() is None:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    before = finished()
    assert 2 <= len(before) < 4
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    after = finished()
    assert len(after) == 4
    assert {name: after[name] for name in before} == before
    lines = json.loads(to.read_text())["lines"]
    assert [len(line["score"]["values"]) for line in lines.values()] == [2, 2]
    shutil.rmtree(runs)
    again = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
    assert again.stderr.count("2 runs, 2 of them finished") == 2  # seed by seed
    assert (finished(), json.loads(to.read_text())["lines"]) == (after, lines)
