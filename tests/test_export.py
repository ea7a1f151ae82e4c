"""Exports are read by others: rows as .npy and safetensors, a tuned model as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import rows

from softprompt_jax import UserError, generate, load_backbone, load_predictor, load_prompt
from softprompt_jax.checkpoints.artifact import load_artifact, save_prompt
from softprompt_jax.checkpoints.backbone import EMBEDDED
from softprompt_jax.checkpoints.packaged import COPIES
from softprompt_jax.checkpoints.peft import save_adapter
from softprompt_jax.export.base_model import base_model
from softprompt_jax.export.export import export
from softprompt_jax.methods import Context, LoRA

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


def test_rows_survive_as_embeddings_for_servers_with_a_note(prompt_run, tmp_path):
    export(prompt_run, "embeds", tmp_path / "embeds")
    found = load_file(tmp_path / "embeds/prompt_embeds.safetensors")["prompt_embeds"]
    np.testing.assert_array_equal(found, load_prompt(prompt_run))
    length, width = found.shape
    assert f"{length} rows of width {width}" in (tmp_path / "embeds/README.md").read_text()
    save_prompt(np.zeros((2, 4), np.float32), tmp_path / "p.safetensors", {"place": "after"})
    with pytest.raises(UserError, match="expected rows before the text"):
        export(tmp_path / "p.safetensors", "embeds", tmp_path / "other")


def test_tuned_model_is_a_backbone_with_its_tokenizer(full_run, tmp_path):
    export(full_run, "hf", tmp_path / "model")
    found = generate(load_backbone(tmp_path / "model"), TEXTS, max_tokens=4)
    expected = load_predictor(full_run).texts(TEXTS)
    assert found == expected
    pieces = tmp_path / "model" / "spiece.model"
    pieces.write_bytes(pieces.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"spiece.model: .*expected"):
        generate(load_backbone(tmp_path / "model"), TEXTS, max_tokens=4)


def test_an_exported_model_keeps_what_its_backbones_config_says_beside_it(full_run, small, tmp_path):
    shutil.copytree(full_run, tmp_path / "run")
    backbone = shutil.copytree(small.backbone, tmp_path / "backbone")
    saved = json.loads((backbone / "config.json").read_text())
    (backbone / "config.json").write_text(json.dumps(saved | {"n_positions": 777, "torch_dtype": "bfloat16"}))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(small.backbone), str(backbone)))
    export(tmp_path / "run", "hf", tmp_path / "model", trust=True)
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == saved | {"n_positions": 777}


def test_an_exported_model_has_a_tokenizer_that_needs_no_sentencepiece(full_run, tmp_path):
    from tokenizers import Tokenizer

    export(full_run, "hf", tmp_path / "model")
    fast = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    ours = load_predictor(full_run).tokenizer
    for row in rows():
        assert fast.encode(row["text"], add_special_tokens=False).ids == ours.encode(row["text"])


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
def test_autopeft_loads_what_is_exported(small, prompt_run, tmp_path):
    from peft import AutoPeftModelForSeq2SeqLM

    export(prompt_run, "peft", tmp_path / "adapter")
    model = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    assert model.base_model.config._name_or_path == str(small.backbone)
    rows = model.get_prompt_embedding_to_save("default").detach().numpy()
    np.testing.assert_array_equal(rows, load_prompt(prompt_run))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
def test_autopeft_finds_the_embedded_model(tmp_path):
    from peft import AutoPeftModelForSeq2SeqLM

    model, method = load_backbone("embedded").model, LoRA(rank=2)
    method.attach(model, jax.random.key(0), Context())
    save_adapter(model, [method], tmp_path, base_model("embedded").source, {})
    assert AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path).peft_config["default"].r == 2


def test_a_prompt_by_peft_gives_its_rows(prompt_run, tmp_path):
    export(prompt_run, "peft", tmp_path / "adapter")
    np.testing.assert_array_equal(load_prompt(tmp_path / "adapter"), load_prompt(prompt_run))
    about = tmp_path / "adapter" / "adapter_config.json"
    known = json.loads(about.read_text())
    about.write_text(json.dumps(known | {"peft_type": "LORA"}))
    with pytest.raises(UserError, match="an adapter of PEFT of kind 'LORA'"):
        load_prompt(tmp_path / "adapter")
    about.write_text(json.dumps(known | {"num_virtual_tokens": 7}))
    with pytest.raises(UserError, match=r"prompt_embeddings of shape \[3, 16\]; expected \[7 or 14, its width\]"):
        load_prompt(tmp_path / "adapter")


def test_what_is_exported_names_its_base_model(prompt_run, full_run, small, tmp_path):
    export(prompt_run, "peft", tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        small.backbone
    )
    export(full_run, "hf", tmp_path / "model")
    for folder in ("adapter", "model"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "read from `backbone`, a folder of its author with no name on the hub" in card
        assert f'from_pretrained({"model, " if folder == "adapter" else ""}"{folder}")' in card
    (tmp_path / "model" / "README.md").write_text("mine")
    export(full_run, "hf", tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() == "mine"


def test_what_is_exported_of_a_copy_names_the_original(prompt_run, full_run, small, tmp_path, monkeypatch):
    monkeypatch.setitem(COPIES, str(small.backbone), ("them/original", "Q4_1"))
    for format, run in (("peft", prompt_run), ("embeds", prompt_run), ("hf", full_run)):
        export(run, format, tmp_path / format)
        card = (tmp_path / format / "README.md").read_text()
        assert "the Q4_1 copy of them/original" in card
        assert (format == "embeds") or "base_model: them/original" in card
    about = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == "them/original"
    assert "AutoPeftModelForSeq2SeqLM.from_pretrained" in (tmp_path / "peft/README.md").read_text()


@pytest.mark.parametrize(
    ("backbone", "source", "name", "sentence"),
    [
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", ..., "the Q4_1 copy of HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("google/flan-t5-base", "google/flan-t5-base", ..., "The base model is google/flan-t5-base."),
        ("embedded", str(EMBEDDED), None, "the small T5 inside softprompt_jax"),
        ("scratch", None, None, "random weights"),
        ("gs://mine/checkpoint_1", None, None, "read from `checkpoint_1`"),
    ],
)
def test_a_base_model_is_named_as_others_know_it(backbone, source, name, sentence):
    found = base_model(backbone)
    assert (found.source, found.name) == (source, source if name is ... else name)
    assert sentence in found.sentence


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
