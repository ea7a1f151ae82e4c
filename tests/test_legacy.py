"""What users have from commit 3b45b86 (runs, prompts, sweeps, banks, exports) is read and continued with equal answers.

By public names and the command line only, so that these claims outlive the move of any module. See legacy/README.md.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import pytest
import yaml
from legacy.measure import TEXTS, asked, logits_of_backbone, measured, prompts_of, without_plane
from safetensors.numpy import load_file

from softprompt_jax import (
    PromptBank,
    ensemble,
    inspect,
    load_backbone,
    load_predictor,
    load_prompt,
    load_run,
    rank_sources,
    report,
    sweep,
    train,
)
from softprompt_jax.trust import remember

HERE = Path(__file__).resolve().parent / "legacy"
ARRAYS = dict(np.load(HERE / "goldens.npz"))
SAID = json.loads((HERE / "goldens.json").read_text(encoding="utf-8"))
RUNS = list(dict.fromkeys(label.partition("/")[0] for label, said in SAID.items() if "answers" in said))
QUICK = ("prompt", "embedded", "prefix", "lora", "ia3", "p_tuning")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
OVER = ["seed=0..1", "learning_rate=0.1,0.3"]
MEMBERS = [run["name"] for run in SAID["sweep"]["runs"]]
SLOW = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory) -> Path:
    """Return a folder with all that is in the archives; leave it as it is."""
    folder = tmp_path_factory.mktemp("legacy")
    for archive in HERE.glob("*.tar.gz"):
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
    return folder


@pytest.fixture
def there(unpacked, monkeypatch) -> None:
    """Work where the paths of the runs begin; leave everything as it is."""
    monkeypatch.chdir(unpacked)
    _be_whoever_trained_these()


@pytest.fixture
def copied(unpacked, tmp_path, monkeypatch) -> None:
    """Work in a copy of one's own."""
    shutil.copytree(unpacked, tmp_path / "legacy")
    monkeypatch.chdir(tmp_path / "legacy")
    _be_whoever_trained_these()


def _be_whoever_trained_these() -> None:
    """Have the runs' own settings taken for the user's word."""
    for path in Path().rglob("config.yaml"):
        remember(load_run(path))


def assert_near(found: Any, expected: Any, where: str = "", near: float = 1e-5) -> None:
    """Check that all that was said is said still, numbers to 1e-5; more may be said.

    Euclidean distances to 1e-3: the old code took them as differences of squares, which lose digits.
    """
    if isinstance(expected, dict):
        assert set(expected) <= set(found), where
        for key, value in expected.items():
            assert_near(found[key], value, f"{where}.{key}", 1e-3 if key == "euclid" else 1e-5)
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_near(*pair, f"{where}.{number}", near)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=near, abs=1e-5), where
    else:
        assert found == expected, where


def assert_tensors_near(found: Path | str, expected: Path | str) -> None:
    found, expected = load_file(found), load_file(expected)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, **CLOSE, err_msg=name)
        assert found[name].dtype == value.dtype, name


def said_of(folder: str) -> dict[str, Any]:
    """Return what a run has left: its losses by step, and its result but for the time."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    result = json.loads(Path(folder, "result.json").read_text())
    losses = [[line["step"], line["loss"]] for line in lines if "loss" in line]
    return {"losses": losses, "result": {key: value for key, value in result.items() if key != "seconds"}}


# ------------------------------------------------------------------------------------------- finished runs


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in RUNS])
def test_a_finished_run_answers_as_it_did(name):
    labels = []
    for label, predictor in prompts_of(name):
        found, said = measured(predictor)
        expected = {key: ARRAYS[f"{label}/{key}"] for key in ("scores", "logits") if f"{label}/{key}" in ARRAYS}
        assert set(expected) <= set(found)
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, **CLOSE, err_msg=f"{label}: {key}")
        assert_near(said, SAID[label], label)
        labels.append(label)
    assert labels == [label for label in SAID if label.partition("/")[0] == name]


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_known_by_its_old_command(name):
    """Were its settings read otherwise, it would be refused as made with others, or train again."""
    expected = json.loads(Path(name, "result.json").read_text())
    assert train(load_run(f"{name}.yaml"), name) == expected
    saved = load_run(f"{name}/config.yaml")
    assert load_run(f"{name}.yaml").model_copy(update={"dropout": saved.dropout}) == saved  # 0.1 for today's null


@pytest.mark.usefixtures("there")
def test_settings_of_old_runs_are_what_they_were():
    for name in RUNS:
        saved = yaml.safe_load(Path(name, "config.yaml").read_text())
        assert_near(load_run(f"{name}/config.yaml").model_dump(mode="json"), saved, name)


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("name", ["prompt", pytest.param("lora", marks=SLOW)])
def test_checkpoints_of_a_finished_run_hold_its_last_and_its_best(name):
    expected = said_of(name)
    kept = Path(shutil.copytree(name, "kept"))
    for file in ("result.json", "trained.safetensors", "prompt.safetensors"):
        Path(name, file).unlink(missing_ok=True)
    train(load_run(f"{name}.yaml"), name)
    assert_near(said_of(name), expected)
    assert_tensors_near(f"{name}/trained.safetensors", kept / "trained.safetensors")
    assert Path(name, "prompt.safetensors").exists() == (kept / "prompt.safetensors").exists()


@pytest.mark.usefixtures("there")
def test_the_command_line_scores_and_answers_as_it_did(softprompt):
    code, out, err = softprompt("eval", "prompt", "--split", "test")
    assert code == 0, err
    assert_near(json.loads(out), {"task": "moods", "split": "test"} | SAID["prompt"]["test"])
    stdin = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    code, out, err = softprompt("predict", "prompt", stdin=stdin)
    assert code == 0, err
    assert [json.loads(line)["prediction"] for line in out.splitlines()] == SAID["prompt"]["answers"]


# -------------------------------------------------------------------------------------- runs that go on


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize(
    "name",
    ["stopped", "stopped_list", *(pytest.param(f"stopped_{kind}", marks=SLOW) for kind in ("mixture", "search"))],
)
def test_a_stopped_run_goes_on_to_the_same_end(softprompt, name):
    """`stopped` and `stopped_mixture` had SIGTERM and saved; the others died by SIGKILL two steps past a checkpoint."""
    code, out, err = softprompt("train", f"{name}.yaml", "--out", name)
    assert code == 0, err
    assert f"resumed at step {9 if name in ('stopped', 'stopped_mixture') else 10}" in err
    assert_near(json.loads(out), SAID[name]["result"])
    assert_near(said_of(name), SAID[name])
    assert SAID[name]["result"]["best_step"] > 12  # what is compared has gone on
    trained = load_file(f"{name}/trained.safetensors")
    expected = {key.removeprefix(f"{name}/final/"): value for key, value in ARRAYS.items() if f"{name}/final/" in key}
    assert set(trained) == set(expected)
    for path, value in expected.items():
        np.testing.assert_allclose(trained[path], value, **CLOSE, err_msg=path)


@SLOW
@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("name", ["from_prompt", "from_multitask"])
def test_a_new_run_starts_from_an_old_one(name):
    train(load_run(f"{name}.yaml"), name)
    np.testing.assert_allclose(load_prompt(name), ARRAYS[f"{name}/final"], **CLOSE)


# -------------------------------------------------------------------------------------------- sweeps


@pytest.mark.usefixtures("there")
def test_a_finished_sweep_returns_its_result():
    assert json.loads(Path("sweep", "sweep.json").read_text()) == SAID["sweep"]
    assert_near(sweep("sweep.yaml", OVER, "sweep"), SAID["sweep"])


@SLOW
@pytest.mark.usefixtures("copied")
def test_a_member_that_a_sweep_lacks_is_trained_by_the_same_call():
    """Its losses are the same; of checkpoints with equal scores a new run keeps the one with the lowest loss."""

    def losses() -> list[float]:
        lines = map(json.loads, Path(f"sweep/{MEMBERS[2]}", "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    expected = losses()
    shutil.rmtree(f"sweep/{MEMBERS[2]}")
    found = sweep("sweep.yaml", OVER, "sweep")
    assert len(expected) > 1
    np.testing.assert_allclose(losses(), expected, **CLOSE)
    others = [index for index, name in enumerate(MEMBERS) if name != MEMBERS[2]]
    assert_near([found["runs"][index] for index in others], [SAID["sweep"]["runs"][index] for index in others])
    assert_near(found["best"], SAID["sweep"]["best"])


@pytest.mark.usefixtures("copied")
def test_a_stopped_sweep_is_completed_by_the_same_command(softprompt):
    """It had two prompts finished, and two together at step 5."""
    assert [Path("sweep_stopped", name, "result.json").exists() for name in MEMBERS] == [True, True, False, False]
    code, out, err = softprompt(
        "sweep", "sweep.yaml", "--over", OVER[0], "--over", OVER[1], "--out", "sweep_stopped", "--together", 2, "--json"
    )
    assert code == 0, err
    assert "resumed at step 5" in err
    assert [run["name"] for run in json.loads(out)["runs"]] == MEMBERS
    for name in MEMBERS:
        np.testing.assert_allclose(load_prompt(f"sweep_stopped/{name}"), ARRAYS[f"sweep_stopped/{name}"], **CLOSE)
    assert not Path("sweep_stopped", "groups").exists()


@pytest.mark.usefixtures("there")
def test_an_ensemble_of_a_sweep_scores_as_it_did():
    assert_near(ensemble([f"sweep/{name}" for name in MEMBERS], split="test"), SAID["ensemble"])


@pytest.mark.usefixtures("there")
def test_prompts_are_ranked_and_described_as_they_were():
    sources = [f"sweep/{name}" for name in MEMBERS]
    assert_near(rank_sources("prompt", sources), SAID["rank_sources"])
    assert_near(without_plane(inspect(["prompt", *sources[:2]])), SAID["inspect"])


@SLOW
@pytest.mark.usefixtures("there")
def test_a_page_compares_old_runs_finished_or_not(tmp_path):
    pytest.importorskip("matplotlib")
    report(["sweep", "prompt", "lora", "stopped"], tmp_path / "page")
    table = json.loads((tmp_path / "page" / "report.json").read_text())["table"]
    assert sorted(row["finished"] for row in table) == [1, 1, 2, 2]
    assert sorted(len(row["seeds"]) for row in table) == [1, 2, 2, 2]


# --------------------------------------------------------------------------------- banks and prompt files


@pytest.mark.usefixtures("there")
def test_a_bank_answers_as_it_did(softprompt):
    names = sorted({line["prompt"] for line in SAID["bank"]})
    stdin = "".join(json.dumps(line) + "\n" for line in asked(names)).encode()
    code, out, err = softprompt("predict", "bank", stdin=stdin)
    assert code == 0, err
    assert [json.loads(line) for line in out.splitlines()] == SAID["bank"]
    bank = PromptBank.open("bank")
    assert bank.names == names
    alone = [name for name in names if f"{name}/scores" in ARRAYS]
    assert len(alone) > 3
    for name in alone:  # what a run answers by itself
        answers = bank.generate(TEXTS, name, max_tokens=4)
        assert [answer for answer, _ in answers] == SAID[name]["answers"]
        np.testing.assert_allclose([score for _, score in answers], ARRAYS[f"{name}/scores"], **CLOSE)


@pytest.mark.usefixtures("there")
def test_prompt_files_hold_the_rows_of_their_runs():
    rows = load_prompt("prompt")
    assert rows.shape == (4, 8)
    for path in ("prompt/prompt.safetensors", "exports/prompt.npy", "exports/prompt.safetensors", "bank/prompt"):
        np.testing.assert_array_equal(load_prompt(path), rows)
    np.testing.assert_array_equal(load_prompt("bank/turned.safetensors"), load_prompt("own/prompts/turned.safetensors"))
    predictor = load_predictor("exports/prompt.safetensors")
    assert predictor.texts(TEXTS) == SAID["prompt"]["answers"]
    assert predictor.evaluate(predictor.task, "test") == SAID["prompt"]["test"]


@pytest.mark.usefixtures("there")
def test_each_prompt_of_a_mixture_answers_from_its_file():
    for task in ("moods", "turned"):
        predictor = load_predictor(f"own/prompts/{task}.safetensors")
        assert predictor.texts(TEXTS) == SAID[f"own/{task}"]["answers"]
        np.testing.assert_allclose(
            [answers[0].score for answers in predictor.scored(TEXTS)], ARRAYS[f"own/{task}/scores"], **CLOSE
        )


# ------------------------------------------------------------------------------------ backbones and exports


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(
    ("source", "adapter"),
    [
        *[(source, None) for source in ("backbone", "int8", "nf4", "exports/hf")],
        *[("backbone", f"exports/{name}") for name in ("peft_lora", "peft_prompt")],
    ],
)
def test_a_backbone_or_adapter_folder_has_its_logits(source, adapter):
    found = logits_of_backbone(load_backbone(source, adapter=adapter))
    np.testing.assert_allclose(found, ARRAYS[f"{adapter or source}/logits"], **CLOSE)


@pytest.mark.usefixtures("there")
def test_an_old_run_is_exported_as_it_was(softprompt, tmp_path):
    for run, format, to, files in (
        ("lora", "peft", "peft_lora", ["adapter_model.safetensors", "adapter_config.json"]),
        ("prompt", "peft", "peft_prompt", ["adapter_model.safetensors", "adapter_config.json"]),
        ("lora", "hf", "hf", ["model.safetensors", "config.json", "spiece.model"]),
        ("prompt", "npy", "prompt.npy", [""]),
        ("prompt", "safetensors", "prompt.safetensors", [""]),
        ("ia3", "safetensors", "ia3.safetensors", [""]),
    ):
        code, _, err = softprompt("export", run, "--format", format, "--to", tmp_path / to)
        assert code == 0, err
        for file in files:
            made, before = tmp_path / to / file, Path("exports", to, file)
            if before.suffix == ".safetensors":
                assert_tensors_near(made, before)
            elif before.suffix == ".json":
                assert_near(json.loads(made.read_text()), json.loads(before.read_text()), str(before))
            else:
                assert made.read_bytes() == before.read_bytes()


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_backbone_is_quantised_as_it_was(softprompt, tmp_path, kind):
    code, _, err = softprompt("import", "backbone", "--to", tmp_path / kind, "--quantize", kind, "--dtype", "float32")
    assert code == 0, err
    assert_tensors_near(tmp_path / kind / "quantized.safetensors", Path(kind, "quantized.safetensors"))
    made, before = (json.loads((folder / "quantized.json").read_text()) for folder in (tmp_path / kind, Path(kind)))
    assert_near(made, before)


@pytest.mark.usefixtures("there")
def test_an_exported_program_answers_as_its_run():
    folder = Path("exports", "program")
    program = jax.export.deserialize(bytearray((folder / "program.stablehlo").read_bytes()))
    pieces = PromptBank("backbone").tokenizer
    ids = [pieces.encode(text) for text in TEXTS]
    texts = np.zeros((len(ids), max(map(len, ids)) + 1), np.int32)
    for row, text in zip(texts, ids, strict=True):
        row[: len(text)] = text
    tokens, scores = jax.jit(program.call)(load_file(folder / "weights.safetensors"), texts)
    assert [pieces.decode([int(i) for i in row if i]) for row in tokens] == SAID["prompt"]["answers"]
    np.testing.assert_allclose(scores, ARRAYS["prompt/scores"], **CLOSE)
