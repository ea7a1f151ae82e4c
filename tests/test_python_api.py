"""From Python: rows in memory, a loaded backbone, callbacks, metrics and arrays; the run that comes back; its pages."""

from __future__ import annotations

import gc
import json
import pydoc
import re
import shutil
from inspect import unwrap
from pathlib import Path

import jax
import numpy as np
import pandas
import pytest
import tiny_lm
from small_runs import rows

import softprompt_jax as sp
from softprompt_jax.config import UserError, parse
from softprompt_jax.methods import METHODS
from softprompt_jax.run import Run
from softprompt_jax.training.callbacks import numbers_of

pytestmark = pytest.mark.usefixtures("own_cache")
ROOT = Path(__file__).resolve().parents[1]
ROWS = rows()


@pytest.fixture(scope="module")
def lm(small):
    return sp.load_backbone(small.backbone)


@pytest.fixture(scope="module")
def task():
    return sp.Task.from_rows(ROWS, label_words=["yes", "no"], validation=0.2, name="moods")


def run_of(task, **changes) -> Run:
    short = {"steps": 20, "batch_size": 8, "max_input_tokens": 12, "max_target_tokens": 4, "shapes": 1}
    short |= {"log_every": 5, "evaluate_every": 10, "checkpoint_every": 10, "methods": [sp.Prompt(length=3)]}
    return sp.Run(task=task, **(short | changes))


@pytest.fixture(scope="module")
def trained(lm, task, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTPROMPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return sp.train(run_of(task), tmp_path_factory.mktemp("trained") / "run", backbone=lm)


# ------------------------------------------------------------------------------------------ pages as printed


def intents() -> list[dict[str, str]]:
    lines = (ROOT / "configs" / "intents" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M | re.S)


def shortened(code: str, backbone: Path) -> str:
    return re.sub(
        r"steps=300(, evaluate_every=50)?", "steps=4, evaluate_every=2", code.replace('"smollm2"', repr(str(backbone)))
    )


def test_the_pages_code_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    backbone, (ten_lines, more) = tiny_lm.folder(tmp_path / "lm"), blocks("api/README.md")
    names = {"rows": intents()}
    exec(shortened(ten_lines, backbone), names)
    run = names["run"]
    assert set(run.scores) == {"validation"}
    assert (run.prompt.dtype, run.prompt.shape) == (np.float32, (20, 32))
    assert len(run.generate(["where is my parcel"])) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("0 {'validation/accuracy': ")
    assert any(line.startswith("4 {'loss': ") for line in said)
    assert "'best_step': " in said[-1]
    exec(shortened(more, backbone), names)
    assert names["again"]["validation"]["short"] == names["run"].scores["validation"]["short"]
    assert [*Path("runs/curves").glob("events.*")]


def lines_of_ours() -> list[str]:
    text = (ROOT / "docs" / "coming-from-peft.md").read_text(encoding="utf-8").partition("On the command line")[0]
    return re.findall(r"^\| .* \| `(.*)` \|$", text, re.M)


def test_every_line_for_a_peft_user_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines, backbone = lines_of_ours(), tiny_lm.folder(tmp_path / "lm")
    assert len(lines) > 30
    names = {"sp": sp, "rows": intents()}
    for line in lines:
        exec(line.replace('"smollm2"', repr(str(backbone))), names)
    assert names["again"].scores == names["trained"].scores
    assert names["trained"]["validation"].keys() >= {"accuracy", "short"}


# ------------------------------------------------------------------------------------------------------ names


def test_every_method_optimizer_source_and_decoding_is_public_and_on_a_page():
    from typing import get_args

    from softprompt_jax.data.sources import AnySource
    from softprompt_jax.models.decode import Decoding
    from softprompt_jax.optim.optimizers import OPTIMIZERS

    unions = [get_args(get_args(union)[0]) for union in (AnySource, Decoding)]
    for cls in (*METHODS.values(), *OPTIMIZERS.values(), *unions[0], *unions[1], sp.Run, sp.Task):
        assert getattr(sp, cls.__name__) is cls
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    assert set(re.findall(r"^::: softprompt_jax\.(\w+)$", pages, re.M)) == set(sp.__all__)


def test_help_says_what_each_field_is():
    said = pydoc.plain(pydoc.render_doc(sp.Run))
    assert "steps = 30000: number of training steps" in said
    assert "label_smoothing = 0.0: probability of a target that goes to all tokens alike" in said
    assert "length = 100: rows of the prompt" in pydoc.plain(pydoc.render_doc(sp.Prompt))
    assert sp.Prompt().__doc__ == vars(sp.Prompt)["__doc__"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: sp.Run(task="boolq", steps=-1), r"^Run: steps: found -1; input should be greater than 0$"),
        (
            lambda: sp.Task.from_rows([{"text": "a", "label": {1: "b", "c": 2}}]),
            "^rows: train row 1: cannot be written as",
        ),
        (lambda: sp.Task.from_rows(ROWS[:2], validation=0.01), r"^task task: validation: 0.01 of .* leaves split 'val"),
        (lambda: sp.Run(task="boolq", lr=1), r"^Run: lr: unknown setting; .*optimizer.learning_rate\?$"),
        (lambda: sp.Prompt(length=0), r"^Prompt: length: found 0; "),
        (lambda: sp.Task(source={"kind": "files"}, metrics=["f2"]), r"^Task: metrics: .* unknown metric 'f2'; "),
        (lambda: sp.Run(task={"name": "x", "source": {"kind": "files"}, "keep": 3}), r"^Run: task.keep: found 3; "),
        (lambda: sp.Prompt(init=np.full((3, 4), np.nan)), r"^init: .* expected finite rows \[P, D\]$"),
        (lambda: sp.Sampling(top_p=2), r"^Sampling: top_p: found 2; "),
    ],
)
def test_wrong_values_are_one_line_without_a_validators_url(make, said):
    with pytest.raises(UserError, match=said) as refused:
        make()
    assert "http" not in str(refused.value)
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", ["list", "generator", "frame", "datasets", "arrow"])
def test_rows_of_every_kind_are_the_same_task(kind):
    import datasets
    import pyarrow

    given = {
        "list": lambda: ROWS,
        "generator": lambda: (row for row in ROWS),
        "frame": lambda: pandas.DataFrame(ROWS),
        "datasets": lambda: datasets.Dataset.from_list(ROWS),
        "arrow": lambda: pyarrow.Table.from_pylist(ROWS),
    }[kind]()
    assert sp.Task.from_rows(given, validation=0.2) == sp.Task.from_rows(ROWS, validation=0.2)


@pytest.mark.parametrize(
    ("give", "said"),
    [
        ({"rows": "train.jsonl"}, "rows: train: found str; expected dictionaries, one for each row; for a file state"),
        ({"rows": []}, "rows: train: found none; expected at least one row"),
        ({"rows": [["a", "b"]]}, "rows: train row 1: found list; expected a dictionary"),
        ({"rows": {"dev": ROWS}}, "rows: found the split 'dev'; expected some of train, validation, test"),
        ({"rows": {"test": ROWS}}, "rows: found test; expected rows to train on"),
        ({"input": "{txt}"}, "task task: train row 1: no field 'txt'; found text, label; did you mean text"),
        ({"validation": 2}, "Task: validation: found 2; input should be less than 1"),
        ({"label_words": ["no"]}, "found the label 'yes'; expected one of no"),
    ],
)
def test_rows_that_do_not_fit_are_refused(give, said):
    with pytest.raises(UserError, match=re.escape(said)):
        sp.Task.from_rows(**({"rows": ROWS} | give))


def test_arrays_in_rows_are_lists():
    rows = [{"text": "a", "label": np.int64(3), "idx": np.arange(2)}]
    (row,) = sp.Task.from_rows(rows).source._held.value["train"]
    assert row == {"text": "a", "label": 3, "idx": [0, 1]}


def test_validation_is_a_share_by_hash_in_which_equal_inputs_stay_together():
    from softprompt_jax.tasks import load, splits

    twice = sp.Task.from_rows([*ROWS, *ROWS], validation=0.25)
    parts = {split: [example.input for example in load(twice, split)] for split in splits(twice)}
    assert list(parts) == ["train", "validation"]
    assert not set(parts["train"]) & set(parts["validation"])
    assert sorted(parts["train"] + parts["validation"]) == sorted(row["text"] for row in [*ROWS, *ROWS])
    assert 0.1 < len(parts["validation"]) / 192 < 0.4
    longer = sp.Task.from_rows([*ROWS, {"text": "a new one", "label": "yes"}], validation=0.25)
    assert {e.input for e in load(longer, "validation")} - {"a new one"} == set(parts["validation"])


def test_a_share_that_leaves_nothing_and_one_beside_a_split_are_refused(small):
    from softprompt_jax.tasks import load, splits

    few = parse(
        sp.Task,
        small.task | {"validation": 0.0001, "source": {"kind": "files", "train": small.task["source"]["train"]}},
        "test",
    )
    with pytest.raises(UserError, match=r"validation: 0\.0001 of the train rows leaves split 'validation' empty"):
        load(few, "validation")
    both = parse(sp.Task, small.task | {"validation": 0.1}, "test")
    with pytest.raises(UserError, match=r"validation: 0\.1, but the source has a validation split"):
        splits(both)


def test_a_config_names_rows_in_memory_and_going_on_asks_for_them(trained, lm, task, tmp_path):
    saved = sp.load_run(Path(trained.folder) / "config.yaml")
    assert saved.model_dump()["task"]["source"]["sizes"] == {"train": 96}
    shutil.copytree(trained.folder, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    again = sp.Task.from_rows(ROWS, label_words=["yes", "no"], validation=0.2, name="moods")
    assert sp.train(run_of(again), tmp_path / "run", backbone=lm).scores == trained.scores
    other = sp.Task.from_rows(ROWS[:-1], label_words=["yes", "no"], validation=0.2, name="moods")
    with pytest.raises(UserError, match=r"was made with other settings \(task.source.sizes.train: 96 -> 95"):
        sp.train(run_of(other), tmp_path / "run", backbone=lm)
    text = json.dumps(saved.model_dump(mode="json")).replace(task.source.sha256, "0" * 64)
    gone = parse(Run, json.loads(text), "test")
    with pytest.raises(UserError, match=r"its rows \(train 96\) were in memory .* pass Task.from_rows"):
        sp.train(gone, tmp_path / "gone", backbone=lm)
    assert not (tmp_path / "gone" / "config.yaml").exists()


# ------------------------------------------------------------------------------------------------- run objects


def test_a_run_object_says_what_it_is_answers_and_reloads(trained, lm):
    again = sp.TrainedRun.open(trained.folder, lm)
    assert again.scores == trained.scores
    assert again.result == dict(trained) == json.loads((Path(trained.folder) / "result.json").read_text())
    np.testing.assert_array_equal(again.prompt, sp.load_prompt(trained.folder))
    texts = [row["text"] for row in ROWS[:5]]
    assert again.generate(texts) == trained.generate(texts) == sp.load_predictor(trained.folder).texts(texts)
    assert trained.generate([{"text": text} for text in texts]) == again.generate(texts)
    several = trained.answers(texts, decoding=sp.Sampling(samples=3))
    assert [len(answers) for answers in several] == [3] * 5
    assert [line["step"] for line in trained.history if "validation" in line] == [0, 10, 20]
    assert repr(trained).startswith("TrainedRun(moods, prompt, validation accuracy ")
    assert "48 trained" in repr(trained)
    html = trained._repr_html_()
    assert "<th>validation accuracy</th>" in html
    assert "<th>steps</th><td>20</td>" in html


def test_texts_go_into_the_tasks_input():
    from softprompt_jax.training.trained_run import inputs

    task = sp.Task.from_rows(ROWS, input="{text}\nMood:")
    assert inputs(task, ["warm tea"]) == ["warm tea\nMood:"]
    two = sp.Task.from_rows(ROWS, input="{text} ({label})")
    assert inputs(two, [{"text": "a", "label": "b"}]) == ["a (b)"]
    for texts, said in (("warm tea", "found one str"), ([3], "text 1: found int"), ({"text": "a"}, "found one dict")):
        with pytest.raises(UserError, match=said):
            unwrap(inputs)(task, texts)
    with pytest.raises(UserError, match="input has the fields text, label; expected a dictionary"):
        inputs(two, ["a"])


def test_a_folder_without_a_finished_run_does_not_open(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="its run has not finished; expected a result"):
        sp.TrainedRun.open(tmp_path / "run")


def test_without_out_a_run_is_in_a_temporary_folder(lm, task, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = sp.train(run_of(task, steps=2), backbone=lm)
    assert Path(run.folder).parent == tmp_path
    assert (Path(run.folder) / "prompt.safetensors").exists()


def test_train_takes_a_path(small, tmp_path):
    from small_runs import write_config

    run = sp.train(write_config(tmp_path / "mine.yaml", small.short | {"steps": 2}), tmp_path / "run")
    assert run.settings.steps == run["steps"] == 2


def test_runs_share_a_loaded_backbone_without_copies_and_leave_it_alone(lm, task, tmp_path):
    before = lm.fingerprint()
    pointer = lm.model.embedding[...].unsafe_buffer_pointer()
    live = []

    def embeddings():
        gc.collect()  # what tests before this one left in cycles
        return {array.unsafe_buffer_pointer() for array in jax.live_arrays() if array.shape == (160, 16)}

    def look(step, numbers):
        live.append(embeddings())

    held = embeddings()

    runs = [
        sp.train(run_of(task, seed=seed, steps=2), tmp_path / str(seed), backbone=lm, callbacks=[look])
        for seed in (1, 2)
    ]
    assert [run.settings.backbone for run in runs] == [lm.identity] * 2
    assert live
    assert all(pointer in pointers and pointers <= held for pointers in live)
    runs[0].generate(["the garden is warm today"])
    assert runs[0].predictor().model.embedding[...].unsafe_buffer_pointer() == pointer
    assert lm.model.prompt is None
    assert sp.load_backbone(lm.identity).fingerprint() == before == lm.fingerprint()


def test_a_loaded_backbone_gives_the_run_its_name_and_dtype(lm, task, tmp_path):
    with pytest.raises(UserError, match="backbone: found 'embedded' in the run, and a loaded backbone with"):
        sp.train(run_of(task, backbone="embedded"), tmp_path / "run", backbone=lm)
    with pytest.raises(UserError, match="dtype: found 'bfloat16' in the run, and a loaded backbone with 'float32'"):
        sp.train(run_of(task, dtype="bfloat16"), tmp_path / "run", backbone=lm)


def test_things_say_what_they_are(lm, trained):
    assert repr(lm) == f"Backbone({lm.identity!r}, T5, {lm.settings.parameters():,} parameters, float32)"
    bank = sp.PromptBank(lm)
    bank.add("mine", trained.prompt)
    bank.add("folder", trained.folder)
    assert (len(bank), list(bank), "mine" in bank, "other" in bank) == (2, ["folder", "mine"], True, False)
    assert repr(bank) == f"PromptBank({lm.identity!r}, 2 prompts)"
    assert repr(bank.prompt("folder")) == "HostPrompt(3 x 16, before, task 'moods')"
    assert repr(sp.Prompt(length=3)) == "Prompt(length=3)"
    assert "steps=20" in repr(trained.settings)


# --------------------------------------------------------------------------------- callbacks, metrics, arrays


def test_callbacks_hear_of_the_log_validations_checkpoints_and_the_end(lm, task, tmp_path):
    heard = []
    run = sp.train(run_of(task), tmp_path / "run", backbone=lm, callbacks=[lambda *said: heard.append(said)])
    assert [step for step, numbers in heard if "loss" in numbers] == [5, 10, 15, 20]
    assert [step for step, numbers in heard if "validation/loss" in numbers] == [0, 10, 20]
    assert [step for step, numbers in heard if "checkpoint" in numbers] == [10, 20]
    step, end = heard[-1]
    assert (step, end) == (20, numbers_of(run.result))
    losses = {step: numbers["loss"] for step, numbers in heard if "loss" in numbers}
    assert losses == {line["step"]: line["loss"] for line in run.history if "loss" in line}


@pytest.mark.parametrize("when", ["loss", "checkpoint", "validation/accuracy"])
def test_a_callback_may_stop_the_run_which_is_then_scored(lm, task, tmp_path, when):
    def stop(step, numbers):
        return step >= 5 and when in numbers

    run = sp.train(run_of(task, evaluate_every=7, checkpoint_every=3), tmp_path / "run", backbone=lm, callbacks=[stop])
    last = {"loss": 5, "checkpoint": 6, "validation/accuracy": 7}[when]
    assert (run["steps"], run.history[-1]["step"]) == (last, last)
    assert "validation" in run.history[-1]
    assert run.scores["validation"]["accuracy"] == next(
        line["validation"]["accuracy"]
        for line in run.history
        if line["step"] == run["best_step"] and "validation" in line
    )


def test_patience_ends_a_run_and_a_killed_one_ends_at_the_same_step(lm, task, tmp_path):
    """A rate of nearly nothing: no validation is better than the first, whose score ends the waiting."""
    run = run_of(
        task, steps=60, evaluate_every=5, checkpoint_every=5, patience=2, optimizer=sp.Adafactor(learning_rate=1e-9)
    )
    whole = sp.train(run, tmp_path / "whole", backbone=lm)
    assert whole["steps"] == 15

    class Killed(Exception):
        pass

    def kill(step, numbers):
        if step == 10 and "checkpoint" in numbers:
            raise Killed

    with pytest.raises(Killed):
        sp.train(run, tmp_path / "cut", backbone=lm, callbacks=[kill])
    assert dict(sp.train(run, tmp_path / "cut", backbone=lm)) | {"seconds": 0} == dict(whole) | {"seconds": 0}
    (tmp_path / "whole" / "result.json").unlink()  # killed before it was written: no step is taken
    assert dict(sp.train(run, tmp_path / "whole", backbone=lm)) | {"seconds": 0} == dict(whole) | {"seconds": 0}


def test_the_best_checkpoint_is_chosen_by_loss_or_by_a_metric(lm, task, tmp_path):
    def falling(predictions, targets):
        falling.calls += 1
        return {"falling": 1 / falling.calls}

    falling.calls = 0
    run = run_of(task, steps=20, evaluate_every=5, checkpoint_every=5, best_by="falling")
    assert sp.train(run, tmp_path / "falling", backbone=lm, metrics=[falling])["best_step"] == 5
    by_loss = sp.train(run_of(task, steps=20, evaluate_every=5, best_by="loss"), tmp_path / "loss", backbone=lm)
    losses = {
        line["step"]: line["validation"]["loss"] for line in by_loss.history if "validation" in line and line["step"]
    }
    assert by_loss["best_step"] == min(losses, key=lambda step: losses[step])
    with pytest.raises(UserError, match="best_by: found 'f2'; expected one of accuracy, loss"):
        sp.train(run_of(task, best_by="f2"), tmp_path / "f2", backbone=lm)
    assert not (tmp_path / "f2" / "config.yaml").exists()


def test_metrics_are_functions_whose_numbers_stand_beside_the_tasks(lm, task, tmp_path):
    def agreement(predictions, targets):
        assert set(targets) == {"yes", "no"}
        return {"agreement": float(np.mean([a == b for a, b in zip(predictions, targets, strict=True)]))}

    run = run_of(task, steps=4)
    trained = sp.train(run, tmp_path / "run", backbone=lm, metrics=[agreement])
    assert trained.scores["validation"]["agreement"] == trained.scores["validation"]["accuracy"]
    assert trained["baselines"]["untrained"].keys() == trained.scores["validation"].keys()
    config = tmp_path / "run" / "config.yaml"
    assert sp.load_run(config).metric_functions == ["agreement"]
    with pytest.raises(UserError, match=r"scored by agreement, .* found none; .* pass metrics=\[...\]"):
        sp.train(config, tmp_path / "run", backbone=lm)
    (tmp_path / "run" / "result.json").unlink()
    assert sp.train(config, tmp_path / "run", backbone=lm, metrics=[agreement]).scores == trained.scores


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        (lambda p, t: 0.5, "metrics: <lambda> returned float; expected a dictionary"),
        (lambda p, t: {"x": float("nan")}, "returned x = nan; expected a finite number"),
        (lambda p, t: {"accuracy": 1}, "a function returns accuracy, as the task does"),
    ],
)
def test_a_metric_that_returns_no_numbers_is_refused(lm, task, tmp_path, said, refused):
    with pytest.raises(UserError, match=refused):
        sp.train(run_of(task), tmp_path / "run", backbone=lm, metrics=[said])


def test_a_prompt_starts_from_an_array(lm, task, tmp_path):
    start = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    still = {"steps": 1, "optimizer": sp.Adafactor(learning_rate=1e-12, weight_decay=0)}
    run = sp.train(run_of(task, **still), tmp_path / "run", backbone=lm, init=start)
    np.testing.assert_allclose(run.prompt, start, atol=1e-5)
    same = run_of(task, **still, methods=[sp.Prompt(length=3, init=start)])
    assert sp.train(same, tmp_path / "run", backbone=lm).scores == run.scores  # finished already
    saved = sp.load_run(tmp_path / "run" / "config.yaml").model_dump()["methods"][0]["init"]
    assert (saved["kind"], saved["shape"]) == ("array", (3, 16))
    with pytest.raises(UserError, match=r"other settings \(methods"):
        sp.train(run_of(task, **still), tmp_path / "run", backbone=lm, init=start + 1)
    with pytest.raises(UserError, match=r"init is an array \[4, 16\]; expected \[3, 16\]"):
        sp.train(run_of(task), tmp_path / "other", backbone=lm, init=np.zeros((4, 16), np.float32))
    with pytest.raises(UserError, match="init: found rows for the method lora"):
        sp.train(run_of(task, methods=["lora"]), tmp_path / "lora", backbone=lm, init=start)


def test_stop_texts_end_answers():
    from softprompt_jax.inference.texts import until

    assert until("one two three", ["three", "two"]) == "one "
    assert until("one two", "x") == until("one two", ()) == "one two"


def test_generate_stops_at_texts(lm):
    whole = sp.generate(lm, ["the garden is warm today"], max_tokens=8, stop=False)[0]
    assert len(whole) > 3
    assert (
        sp.generate(lm, ["the garden is warm today"], max_tokens=8, stop=whole[2:])[0] == whole[: whole.find(whole[2:])]
    )
    with pytest.raises(UserError, match="tokens and stop as text"):
        sp.generate(lm, [[5, 6, 1]], stop=["x"])


def test_what_passed_silently_is_refused(lm):
    tokens = np.ones((2, 3), np.int32)
    for call, said in (
        (lambda: sp.generate(lm, "where is it"), "found one text, 'where is it'; expected a list of texts"),
        (lambda: sp.generate(lm, ["a"], np.full((3, 16), np.nan)), "prompt: holds NaN or infinity"),
        (lambda: unwrap(sp.logits)(lm, tokens.astype(np.float32), tokens), "tokens: found float32; expected integers"),
        (lambda: unwrap(sp.logits)(lm, tokens, tokens[:1]), "2 rows of encoder tokens and 1 of decoder tokens"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            call()


# ---------------------------------------------------------------------------------------- trackers, notebooks


@pytest.mark.http
def test_wandb_gets_the_numbers_of_a_run(lm, task, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="see make test-http")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = sp.train(run_of(task, wandb="moods"), tmp_path / "run", backbone=lm)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert (tmp_path / "run" / "wandb.txt").read_text() in file.name
    assert wandb.run is None  # it has ended
    content = file.read_bytes()
    for name in (b"validation/accuracy", b"learning_rate", b"best_step"):
        assert name in content
    assert run.settings.wandb == "moods"


def test_without_wandb_the_setting_is_refused(lm, task, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="wandb moods: the package wandb is not installed"):
        sp.train(run_of(task, wandb="moods"), tmp_path / "run", backbone=lm)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
def test_a_notebook_shows_progress_and_a_table(small, tmp_path):
    import nbclient
    import nbformat

    config = tmp_path / "mine.json"
    config.write_text(json.dumps(small.short | {"steps": 8, "evaluate_every": 4}))
    code = "import softprompt_jax as sp\nfrom softprompt_jax.config import parse\nimport json\n"
    code += f"run = parse(sp.Run, json.load(open({str(config)!r})), 'test')\nsp.train(run, {str(tmp_path / 'run')!r})"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=300).execute()
    shown = [output.get("data", {}) for output in notebook.cells[0].outputs]
    bars = [data["text/html"] for data in shown if "<progress" in data.get("text/html", "")]
    assert len(bars) == 1
    assert 'value="8" max="8"' in bars[0]
    assert any("<th>validation accuracy</th>" in data.get("text/html", "") for data in shown)
