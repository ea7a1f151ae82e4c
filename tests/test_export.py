"""Exports are read by others: rows as .npy and safetensors, a tuned model as a Hugging Face folder."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest
from small_runs import rows

from softprompt_jax import UserError, generate, load_backbone, load_predictor, load_prompt
from softprompt_jax.checkpoints.artifact import load_artifact, save_prompt
from softprompt_jax.export.export import export

pytestmark = pytest.mark.usefixtures("own_cache")
TEXTS = [row["text"] for row in rows()[:8]]


def test_rows_survive_as_npy_under_the_name_given(prompt_run, tmp_path):
    export(prompt_run, "npy", tmp_path / "new" / "v1.0.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "new" / "v1.0.npy"), load_prompt(prompt_run))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["v1.0.npy"]


def test_rows_that_stand_elsewhere_are_not_written_without_their_place(tmp_path):
    save_prompt(np.zeros((2, 4), np.float32), tmp_path / "p.safetensors", {"place": "after"})
    with pytest.raises(UserError, match=r"do not all stand before the text \(after\), which .npy cannot say"):
        export(tmp_path / "p.safetensors", "npy", tmp_path / "p.npy")
    assert not (tmp_path / "p.npy").exists()


def test_rows_survive_as_safetensors_with_their_metadata(prompt_run, tmp_path):
    export(prompt_run / "prompt.safetensors", "safetensors", tmp_path / "p.safetensors")
    found, expected = load_artifact(tmp_path / "p.safetensors"), load_artifact(prompt_run)
    np.testing.assert_array_equal(found.prompt, expected.prompt)
    assert found.metadata == expected.metadata
    assert (tmp_path / "p.safetensors").read_bytes() == (prompt_run / "prompt.safetensors").read_bytes()


def test_tuned_model_is_a_backbone_with_its_tokenizer(full_run, tmp_path):
    export(full_run, "hf", tmp_path / "model")
    found = generate(load_backbone(tmp_path / "model"), TEXTS, max_tokens=4)
    expected = load_predictor(full_run).texts(TEXTS)
    assert found == expected


def test_an_exported_model_has_a_tokenizer_that_needs_no_sentencepiece(full_run, tmp_path):
    from tokenizers import Tokenizer

    export(full_run, "hf", tmp_path / "model")
    fast = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    ours = load_predictor(full_run).tokenizer
    for row in rows():
        assert fast.encode(row["text"], add_special_tokens=False).ids == ours.encode(row["text"])


def test_unfinished_run_exports_its_best_checkpoint(full_run, tmp_path):
    shutil.copytree(full_run, tmp_path / "run")
    for name in ("result.json", "trained.safetensors"):
        (tmp_path / "run" / name).unlink()
    before = sorted(map(str, (tmp_path / "run").rglob("*")))
    export(tmp_path / "run", "hf", tmp_path / "model")
    assert sorted(map(str, (tmp_path / "run").rglob("*"))) == before
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no checkpoint yet; expected one; wait for the run's first"):
        export(tmp_path / "run", "hf", tmp_path / "model")


@pytest.mark.parametrize(
    ("format", "to", "expected"),
    [
        ("npy", "p.bin", "ends in '.bin'; expected a file name ending in .npy"),
        ("safetensors", "p", "ends in ''; expected a file name ending in .safetensors"),
        ("npy", "file/p.npy", r"p.npy: cannot be written"),
        ("safetensors", "file/p.safetensors", r"p.safetensors: cannot be written"),
        ("hf", "model", "has a prompt, which no Hugging Face model holds; export it as peft or npy"),
    ],
)
def test_export_that_cannot_be_is_one_line(prompt_run, tmp_path, format, to, expected):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=expected) as error:
        export(prompt_run, format, tmp_path / to)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_model_cannot_go_where_a_file_is(full_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written \(File exists\)"):
        export(full_run, "hf", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_a_run_without_a_prompt_trained_survives_as_safetensors(full_run, tmp_path):
    export(full_run, "safetensors", tmp_path / "new" / "all.safetensors")
    found, expected = load_artifact(tmp_path / "new" / "all.safetensors"), load_artifact(full_run)
    assert jax.tree.all(jax.tree.map(np.array_equal, found.tree, expected.tree))
    assert found.metadata == expected.metadata


def test_prompt_of_a_run_without_one_is_one_line(full_run, tmp_path):
    with pytest.raises(
        UserError, match=r"no prompt.safetensors \(it trained no prompt\); expected the folder of a finished prompt run"
    ):
        export(full_run, "npy", tmp_path / "p.npy")
    with pytest.raises(UserError, match="it is not a run folder"):
        export(tmp_path, "hf", tmp_path / "model")


def test_a_model_is_not_written_beside_one_in_several_files(full_run, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index.json: of weights in several files, which would be read first"):
        export(full_run, "hf", tmp_path)


def test_a_program_is_not_given_the_prompt_of_an_earlier_export(prompt_run, tmp_path):
    export(prompt_run, "stablehlo", tmp_path, prompt_input=True)
    assert (tmp_path / "prompt.npy").exists()
    export(prompt_run, "stablehlo", tmp_path)
    assert not (tmp_path / "prompt.npy").exists()
