"""The command line: what it prints, where it writes, and one line with exit code 2 for whatever is wrong."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_runs
import typer
from small_runs import rows, write_backbone, write_config, write_rows

import softprompt_jax
from softprompt_jax import load_predictor, load_prompt
from softprompt_jax.cli import process
from softprompt_jax.cli.main import app
from softprompt_jax.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("own_cache")
ROWS_IN = [row | {"id": number} for number, row in enumerate(rows()[:5])]


@pytest.fixture
def config(small, tmp_path):
    """Write the settings of a short run with changes and return the path."""

    def write(**changes) -> Path:
        return write_config(tmp_path / "a.yaml", small.short | changes)

    return write


# ----------------------------------------------------------------------------------------------- help


COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(softprompt, command):
    code, out, err = softprompt(command, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: softprompt {command}" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_sentences_that_only_the_terminal_breaks(command):
    for paragraph in COMMANDS[command].help.split("\n\n"):
        assert "\n" not in paragraph
        assert paragraph.endswith(".")
    for parameter in COMMANDS[command].params:
        if parameter.name != "help":
            assert parameter.help, f"{command} {parameter.name}: no help"
            assert parameter.help.endswith("."), f"{command} {parameter.name}: {parameter.help}"


def test_commands_are_grouped_in_the_order_of_a_workflow(softprompt):
    out = softprompt("--help")[1]
    groups = ("Data", "Train", "Evaluate and use", "Compare and understand", "Files", "Benchmarks")
    places = [out.index(f"─ {group} ─") for group in groups]
    assert places == sorted(places)
    assert out.index(" train ") < out.index(" eval ") < out.index(" report ") < out.index(" push ")


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (["sweep", "a.yaml", "--out", "x"], "--over"),
        (["sweep", "a.yaml", "--over", "seed=0..1"], "--out"),
        (["report", "x"], "--to"),
        (["plan", "a.yaml"], "--topology"),
    ],
)
def test_required_options_are_marked_and_asked_for(softprompt, refused, command, missing):
    (line,) = (line for line in softprompt(command[0], "--help")[1].splitlines() if f" {missing} " in line)
    assert line.startswith("│ *")
    assert f"Missing option '{missing}'; see softprompt {command[0]} --help" in refused(*command)


def test_the_version_is_told(softprompt):
    assert softprompt("--version") == (0, f"softprompt {softprompt_jax.__version__}\n", "")


def test_importing_the_library_leaves_the_users_process_alone():
    """Loggers, hooks and the environment are the command line's to change, when it runs; not when it is imported."""
    code = """if True:
        import logging, os, sys, threading, transformers, orbax.checkpoint, huggingface_hub, tokenizers, jax
        def state():
            loggers = {name: logging.getLogger(name).level for name in ("", "absl", "transformers", "huggingface_hub")}
            return loggers, dict(os.environ), threading.excepthook, sys.excepthook
        before = state()
        import softprompt_jax.training.loop, softprompt_jax.serve.engine, softprompt_jax.cli.main
        after = state()
        assert before == after, [pair for pair in zip(before, after) if pair[0] != pair[1]]
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_help_lists_the_commands_and_where_to_start(softprompt):
    code, out, _ = softprompt("--help")
    assert code == 0
    for word in ("train", "eval", "predict", "export", "tasks", "tokenizer", "configs/quickstart.yaml"):
        assert word in out
    assert softprompt()[0] == 2


def test_module_is_the_command_and_its_help_waits_for_no_jax():
    code = "import runpy, sys\ntry: runpy.run_module('softprompt_jax', run_name='__main__')\n"
    code += "except SystemExit as stopped: print(stopped.code, {'jax', 'numpy', 'grain'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Usage: softprompt" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "0 set()"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tarin"], "No such command 'tarin'. Did you mean 'train'; see softprompt --help"),
        (["train"], "Missing argument 'CONFIG'; see softprompt train --help"),
        (["train", "a.yaml", "--otu", "x"], "No such option: --otu"),
        (["train", "a.yaml", "--out"], "--out"),
        (["export", "x", "--to", "y", "--format", "z"], "'z' is not one of 'embeds', 'hf', 'npy', 'peft'"),
        (["tokenizer", "a.yaml", "--to", "x", "--size", "many"], "--size"),
    ],
)
def test_wrong_usage_is_one_line(refused, arguments, expected):
    assert expected in refused(*arguments)


# --------------------------------------------------------------------------------------- what it does


def test_finished_run_prints_its_result_and_exits_0(softprompt, small, prompt_run, tmp_path):
    path = write_config(tmp_path / "a.yaml", small.short)
    code, out, err = softprompt("train", path, "--out", prompt_run)
    assert code == 0
    assert json.loads(out) == json.loads((prompt_run / "result.json").read_text())
    assert "finished already; delete the folder to run it again" in err
    assert "test accuracy: " in err
    assert " for the majority class" in err
    code, out, err = softprompt("train", path, "steps=40", "--out", prompt_run, "--quiet")
    assert (code, err) == (0, "")
    assert json.loads(out)["steps"] == 40


def test_eval_prints_the_metrics_of_a_split(softprompt, full_run):
    code, out, _ = softprompt("eval", full_run, "--split", "test")
    result = json.loads((full_run / "result.json").read_text())
    assert code == 0
    assert json.loads(out) == {"task": "moods", "split": "test"} | result["test"]


def test_predict_answers_files_in_order_with_their_fields(softprompt, full_run, tmp_path):
    written = write_rows(tmp_path / "in.jsonl", [*ROWS_IN, {"inputs": "the café 😀", "id": 5}])
    code, out, err = softprompt("predict", full_run, "--input", written, "--output", tmp_path / "out.jsonl")
    assert (code, out, err) == (0, "", "")
    content = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in content.splitlines()]
    answers = load_predictor(full_run).texts([row["text"] for row in ROWS_IN])
    assert found[:5] == [row | {"prediction": answer} for row, answer in zip(ROWS_IN, answers, strict=True)]
    assert found[5]["inputs"] == "the café 😀"
    assert "the café 😀" in content  # not escaped


def test_predict_answers_standard_input_on_standard_output(softprompt, full_run):
    stdin = "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS_IN)
    code, out, _ = softprompt("predict", full_run, stdin=stdin.encode())
    assert code == 0
    assert [json.loads(line)["id"] for line in out.splitlines()] == [0, 1, 2, 3, 4]
    assert softprompt("predict", full_run, stdin=b"") == (0, "", "")


def test_predict_reports_what_it_cut(softprompt, full_run):
    code, _, err = softprompt("predict", full_run, stdin=json.dumps({"inputs": "dull " * 99}).encode())
    assert code == 0
    assert err == "1 inputs truncated to 12 tokens\n"


def test_export_writes_what_it_says(softprompt, prompt_run, tmp_path):
    code, out, err = softprompt("export", prompt_run, "--format", "npy", "--to", tmp_path / "p.npy")
    assert (code, out, err) == (0, "", f"wrote {tmp_path / 'p.npy'}\n")
    np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), load_prompt(prompt_run))


def test_tasks_lists_names_and_words(softprompt):
    code, out, _ = softprompt("tasks")
    assert code == 0
    assert "sentiment_movie" in out
    assert "no, yes" in out


@pytest.fixture
def texts(tmp_path):
    """Write the settings of a pre-training run and return the path."""
    (tmp_path / "text.txt").write_text("\n\n".join(row["text"] + "." for row in rows()), encoding="utf-8")
    task = {"kind": "pretraining", "texts_folder": str(tmp_path), "texts": [{"path": "text.txt"}]}
    return write_config(tmp_path / "a.yaml", {"task": task | {"stages": [{"until": 1.0, "objectives": {"copy": 1}}]}})


def test_tokenizer_is_trained_on_the_texts_of_a_run(softprompt, texts, tmp_path):
    code, _, err = softprompt("tokenizer", texts, "--to", tmp_path / "new", "--size", "150")
    assert code == 0, err
    tokenizer = load_tokenizer(tmp_path / "new")
    assert tokenizer.size == 250
    assert tokenizer.decode(tokenizer.encode("the tea room is warm")) == "the tea room is warm"


def test_tokenizer_that_cannot_be_is_one_line(refused, texts, config, tmp_path):
    error = refused("tokenizer", texts, "--to", tmp_path / "new", "--size", "100000")
    assert "no tokenizer of 100000 pieces (Vocabulary size too high" in error
    error = refused("tokenizer", texts, "--to", tmp_path / "a.yaml" / "new")
    assert "cannot be written (Not a directory)" in error
    (tmp_path / "text.txt").unlink()
    assert "text.txt: no such file" in refused("tokenizer", texts, "--to", tmp_path / "new")
    assert "its task is not pretraining; expected a run with texts" in refused("tokenizer", config(), "--to", tmp_path)


# --------------------------------------------------------------------------------- bad input: settings


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("foo", "'foo': not an override; expected key=value"),
        ("stpes=3", "stpes: unknown setting; expected one of"),
        ("steps=many", "steps: found 'many'; input should be a valid integer"),
        ("task=sentiment_moovie", "task: found 'sentiment_moovie'; expected a name that"),
        ("backbone=${HOME}", "backbone=${HOME}: found '${HOME}'; settings do not interpolate; write the value itself"),
    ],
)
def test_setting_that_does_not_fit(refused, config, tmp_path, override, expected):
    assert expected in refused("train", config(), override, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_config_that_is_not_there(refused, tmp_path):
    assert "none.yaml: no such file; expected a YAML settings file" in refused("train", tmp_path / "none.yaml")


def test_task_that_has_no_such_name(refused, prompt_run):
    assert "task 'spam_smss': unknown; expected one of" in refused("eval", prompt_run, "--task", "spam_smss")


# ------------------------------------------------------------------------- bad input: models and tokenizers


@pytest.fixture
def model(small, tmp_path):
    """Return a copy of the backbone's folder to break."""
    return Path(shutil.copytree(small.backbone, tmp_path / "model"))


def damaged(name: str):
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda model: (model / "model.safetensors").unlink(), "expected weights: model.safetensors, pytorch_model"),
        (damaged("model.safetensors"), "not a complete safetensors file"),
        (lambda model: (model / "config.json").unlink(), "no config.json; expected a model in Hugging Face layout"),
        (damaged("config.json"), "cannot be read as JSON"),
        (lambda model: (model / "spiece.model").unlink(), "no tokenizer in the folder"),
        (lambda model: (model / "spiece.model").write_text("nonsense"), "not a SentencePiece model"),
        (lambda model: shutil.rmtree(model), "no such folder; expected a Hugging Face folder or a hub name"),
    ],
    ids=["no weights", "cut weights", "no config", "cut config", "no tokenizer", "broken tokenizer", "nothing"],
)
def test_model_folder_that_is_not_complete(refused, config, model, tmp_path, damage, expected):
    damage(model)
    assert expected in refused("train", config(backbone=str(model)), "--out", tmp_path / "run")


def test_tokenizer_that_does_not_fit_the_model(refused, config, model, tmp_path, monkeypatch):
    monkeypatch.setattr(small_runs, "ROWS", 10)
    write_backbone(model)  # 10 rows; the tokenizer has some 40 pieces
    error = refused("train", config(backbone=str(model)), "--out", tmp_path / "run")
    assert "the tokenizer does not fit the model: it gives the id " in error
    assert "expected ids under 10, the rows of the embedding; use the backbone's own tokenizer" in error


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"pad_id": 3}, "padding has id 3; expected 0 as in the backbone"),
        ({"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}, "EOS has id 2; expected 1 as in the backbone"),
    ],
)
def test_tokenizer_whose_ids_are_not_those_of_a_t5(refused, config, model, tmp_path, ids, expected):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"] * 9),
        model_prefix=str(model / "spiece"),
        model_type="word",
        vocab_size=9,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    assert expected in refused("train", config(backbone=str(model)), "--out", tmp_path / "run")


# --------------------------------------------------------------------------------------- bad input: data


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a", ', "train.jsonl:3: not JSON"),
        ("[1]", "train.jsonl:3: found list; expected a JSON object"),
        ('{"text": "a"}', "train.jsonl:3: no field 'label'; found text"),
        ('{"txt": "a", "label": "yes"}', "train.jsonl:3: no field 'text'; found txt, label; did you mean txt?"),
        ('{"text": "a", "label": "maybe"}', "train.jsonl:3: found the label 'maybe'; expected one of yes, no"),
        ('{"text": "a", "label": null}', "train.jsonl:3: unlabelled (label = None)"),
    ],
)
def test_row_that_does_not_fit_names_its_line(refused, config, small, tmp_path, line, expected):
    path = write_rows(tmp_path / "train.jsonl", rows()[:2])
    path.write_text(path.read_text() + line + "\n")
    source = small.task["source"] | {"train": str(path)}
    error = refused("train", config(task=small.task | {"source": source}), "--out", tmp_path / "run")
    assert expected in error


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"validation": "empty.jsonl"}, "split 'validation' is empty; expected at least one example"),
        ({"train": "none.jsonl"}, "none.jsonl: no such file"),
        ({"validation": None}, "no validation split; found train, test; expected train and validation; keep some rows"),
        ({"train": "rows.xlsx"}, "found the suffix '.xlsx'; expected .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)
def test_split_that_does_not_fit(refused, config, small, tmp_path, monkeypatch, changes, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "rows.xlsx").write_text("")
    task = small.task | {"source": small.task["source"] | changes}
    assert expected in refused("train", config(task=task), "--out", tmp_path / "run")


def test_target_that_is_too_long_names_its_split(refused, config, tmp_path):
    error = refused("train", config(max_target_tokens=1), "--out", tmp_path / "run")
    assert "task moods: train: example 0: the target 'yes' has 2 tokens with EOS; expected at most 1" in error


# ------------------------------------------------------------------------------------ bad input: output


def test_out_that_is_no_place_for_a_run(refused, config, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file; expected a folder for the run" in refused("train", config(), "--out", tmp_path / "file")
    assert "cannot be written (Not a directory)" in refused("train", config(), "--out", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_out_of_another_run(refused, config, prompt_run):
    error = refused("train", config(), "steps=41", "seed=1", "--out", prompt_run)
    assert "was made with other settings (steps: 40 -> 41; seed: 0 -> 1); expected the same; use another --out" in error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk(refused, full_run, tmp_path):
    written = write_rows(tmp_path / "in.jsonl", ROWS_IN)
    error = refused("predict", full_run, "--input", written, "--output", "/dev/full")
    assert "cannot be written (No space left on device)" in error


def test_predictions_that_cannot_be_written(refused, full_run, tmp_path):
    written = write_rows(tmp_path / "in.jsonl", ROWS_IN)
    for place in (tmp_path, tmp_path / "none" / "out.jsonl"):
        assert "cannot be written" in refused("predict", full_run, "--input", written, "--output", place)
    assert "is the input too" in refused("predict", full_run, "--input", written, "--output", written)
    assert written.read_text().count("\n") == 5


def test_predict_that_fails_early_leaves_an_old_output(refused, prompt_run, tmp_path):
    written, old = write_rows(tmp_path / "in.jsonl", ROWS_IN), tmp_path / "old.jsonl"
    old.write_text("mine")
    (tmp_path / "run").mkdir()
    refused("predict", tmp_path / "run", "--input", written, "--output", old)
    refused("predict", prompt_run, "--input", tmp_path / "none", "--output", old)
    assert old.read_text() == "mine"


# ---------------------------------------------------------------------------------- bad input: predictions


@pytest.mark.parametrize(
    ("stdin", "expected"),
    [
        (b'{"text": "a"}\n{"text": ', "standard input:2: not JSON"),
        (b"\n[1]\n", "standard input:2: found list; expected a JSON object with the task's fields"),
        (b'{"txt": "a"}\n', "standard input:1: no field 'text'; found txt; did you mean txt?"),
        (b'{"text": "caf\xe9"}\n', "standard input:1: not UTF-8; expected one JSON object a line in UTF-8"),
    ],
)
def test_line_that_does_not_fit_names_its_place(refused, full_run, stdin, expected):
    assert expected in refused("predict", full_run, stdin=stdin)


def test_source_that_is_no_run_or_prompt(refused, prompt_run, full_run, tmp_path):
    other = write_backbone(tmp_path / "other", seed=1)
    wider = write_backbone(tmp_path / "wider", width=24)
    (tmp_path / "broken.safetensors").write_bytes((prompt_run / "prompt.safetensors").read_bytes()[:-8])
    prompt = prompt_run / "prompt.safetensors"
    np.save(tmp_path / "p.npy", load_prompt(prompt))
    for arguments, expected in [
        ([tmp_path / "none"], "no such file; expected prompt rows as .npy, .safetensors or a run folder"),
        ([tmp_path / "other"], "it is not a run folder); expected the folder of a run"),
        ([tmp_path / "broken.safetensors"], "not a complete safetensors file"),
        ([tmp_path / "p.npy"], "says no backbone; expected one; add --backbone"),
        ([tmp_path / "p.npy", "--backbone", wider], "prompt: found shape [3, 16]; expected [P, 24]"),
        ([prompt, "--backbone", other], "; expected the same backbone; give the one it was trained on"),
        ([prompt, "--split", "dev"], "no split 'dev'; found train, validation, test"),
    ]:
        assert expected in refused("eval", *arguments)


def test_an_unfinished_run_answers_from_its_best_checkpoint_and_without_one_is_refused(
    refused, softprompt, tmp_path, prompt_run
):
    run = tmp_path / "run"
    shutil.copytree(prompt_run / "checkpoints", run / "checkpoints")
    shutil.copy(prompt_run / "config.yaml", run)
    code, out, err = softprompt("eval", run)
    assert (code, json.loads(out)) == (0, json.loads(softprompt("eval", prompt_run)[1])), err
    shutil.rmtree(run / "checkpoints")
    assert "run: has no checkpoint yet; expected one; wait for the run's first" in refused("predict", run)


def test_broken_checkpoint(softprompt, small, prompt_run, tmp_path):
    run = Path(shutil.copytree(prompt_run, tmp_path / "run"))
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "40" / "default" / "d")
    shutil.rmtree(run / "checkpoints" / "40" / "default" / "ocdbt.process_0")
    code, _, err = softprompt("train", write_config(tmp_path / "a.yaml", small.short), "--out", run)
    assert code == 2
    (line,) = (line for line in err.splitlines() if line.startswith("softprompt: "))
    assert "checkpoints/40: cannot be read" in line
    assert "delete this folder to go on from the one before" in line
    assert err.splitlines()[-1] == line
    assert "Traceback" not in err


# ------------------------------------------------------------------------------------- a real process


def test_one_line_in_a_real_process(small, tmp_path):
    path = write_config(tmp_path / "a.yaml", small.short | {"backbone": str(tmp_path)})
    command = [sys.executable, "-m", "softprompt_jax", "train", str(path), "--out", str(tmp_path / "run")]
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "40"}
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"softprompt: {tmp_path}: no config.json; expected a model in Hugging Face layout\n"


def test_pipe_that_closes_early_is_quiet(full_run, tmp_path):
    written = write_rows(tmp_path / "in.jsonl", ROWS_IN * 500)
    command = [sys.executable, "-m", "softprompt_jax", "predict", str(full_run), "--input", str(written)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout.readline().startswith(b'{"text"')
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 1


# --------------------------------------------------------------------------------------------- transfer


def test_similar_ranks_and_recycle_carries_over(softprompt, refused, small, tmp_path):
    draw = np.random.default_rng(0)
    for name in ("target", "other"):
        np.save(tmp_path / f"{name}.npy", draw.normal(size=(3, 16)).astype(np.float32))
    target, other = tmp_path / "target.npy", tmp_path / "other.npy"
    code, out, _ = softprompt("similar", target, other, target, "--measure", "mean")
    assert code == 0
    ranked = json.loads(out)
    assert [entry["source"] for entry in ranked] == [str(target), str(other)]
    wide = write_backbone(tmp_path / "wide", width=24, seed=1)
    to = tmp_path / "carried.safetensors"
    code, out, _ = softprompt("recycle", target, "--backbone", small.backbone, "--onto", wide, "--to", to)
    assert code == 0
    assert json.loads(out)["rows"] == [3, 24]
    assert load_prompt(to).shape == (3, 24)
    assert "says no backbone" in refused("recycle", target, "--onto", wide, "--to", to)


# ----------------------------------------------------------------------------------------------- devices


def test_devices_that_are_not_here_are_told_in_one_line():
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "softprompt_jax", "train", "configs/quickstart.yaml", "--out", "none/of/this"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith("softprompt: JAX_PLATFORMS=cuda: JAX cannot compute there (")
    expected = (
        "expected the device, its driver and the extra cuda13, cuda12 or tpu; install them, or unset JAX_PLATFORMS"
    )
    assert ran.stderr.endswith(f"{expected}\n")
    assert ran.stderr.count("\n") == 1


def test_a_library_that_a_plugin_misses_is_told_without_a_traceback(caplog):
    log = logging.getLogger("jax._src.xla_bridge")
    log.addFilter(process._in_one_line)
    try:
        raise RuntimeError("Unable to load cuDNN. Is it installed?")
    except RuntimeError:
        log.exception("Jax plugin configuration error: %s", "cuda13")
    finally:
        log.removeFilter(process._in_one_line)
    (record,) = caplog.records
    assert record.exc_info is None
    assert record.getMessage() == "Jax plugin configuration error: cuda13: Unable to load cuDNN. Is it installed?"
