"""What others have made becomes a Hugging Face folder or a prompt of ours, number for number."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from test_torch_file import save_tensors

from softprompt_jax import UserError, load_backbone, load_prompt
from softprompt_jax.checkpoints import tensors as tensors_module
from softprompt_jax.checkpoints.artifact import load_artifact
from softprompt_jax.checkpoints.backbone import EMBEDDED, save_backbone
from softprompt_jax.data.tokenizer import load_tokenizer
from softprompt_jax.export.import_source import import_source

# Finders of modules that do not know what a fresh environment with transformers lacks.
FRESH = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        lacking = name.startswith(("sentencepiece", "tiktoken", "google.protobuf"))
        return None if lacking else self.finder.find_spec(name, *rest)

sys.meta_path[:] = map(Without, sys.meta_path)
from transformers import AutoTokenizer
print(AutoTokenizer.from_pretrained(sys.argv[1])("the garden is warm").input_ids)
"""
SPIECE = str(EMBEDDED / "spiece.model")


def same(folder, other) -> None:
    batch = tiny.batch()
    first, second = load_backbone(folder), load_backbone(other)
    assert first.settings == second.settings
    assert first.fingerprint() == second.fingerprint()
    np.testing.assert_array_equal(tiny.forward(first.model, batch), tiny.forward(second.model, batch))


def test_a_t5x_run_becomes_a_backbone_and_a_prompt_that_know_each_other(shared_fixtures, tmp_path):
    run = shared_fixtures / "t5x" / "prompted_run"
    written = import_source(str(run), tmp_path / "t5", SPIECE)
    assert [line.split(": ")[0] for line in written] == [str(tmp_path / "t5"), str(tmp_path / "t5/prompt.safetensors")]
    same(tmp_path / "t5", run)
    found = load_artifact(tmp_path / "t5")
    rows, metadata = found.prompt, found.metadata
    np.testing.assert_array_equal(rows, load_prompt(run))
    backbone = load_backbone(tmp_path / "t5")
    assert metadata == {
        **{"backbone": str(tmp_path / "t5"), "fingerprint": backbone.fingerprint()},
        **{"step": "1100010", "length": "5"},
    }
    assert load_tokenizer(tmp_path / "t5").encode("a") == load_tokenizer("embedded" and EMBEDDED).encode("a")
    import_source(str(run), tmp_path / "new" / "p.safetensors")  # the prompt alone
    np.testing.assert_array_equal(load_prompt(tmp_path / "new" / "p.safetensors"), rows)


def test_transformers_reads_the_tokenizer_of_what_is_imported_in_a_fresh_environment(tmp_path):
    import_source("embedded", tmp_path / "t5")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "t5")]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ours = load_tokenizer(tmp_path / "t5")
    assert json.loads(found) == [*ours.encode("the garden is warm"), ours.eos_id]


@pytest.mark.parametrize("files", ["one", "several"])
def test_a_bin_becomes_safetensors_in_files_of_a_size(tmp_path, monkeypatch, files):
    save_backbone(tiny.model(), tmp_path / "old", "float32")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "model.safetensors").unlink()
    save_tensors(tmp_path / "old" / "pytorch_model.bin", tensors)
    shutil.copy(SPIECE, tmp_path / "old")
    if files == "several":
        monkeypatch.setattr(tensors_module, "_FILE_BYTES", 8_000)
    import_source(str(tmp_path / "old"), tmp_path / "new")
    same(tmp_path / "new", tmp_path / "old")
    found = list((tmp_path / "new").glob("*.safetensors"))
    assert (len(found) > 2) == (files == "several")
    assert (tmp_path / "new" / "spiece.model").exists()
    # and narrower
    import_source(str(tmp_path / "old"), tmp_path / "half", dtype="bfloat16")
    assert load_backbone(tmp_path / "half").fingerprint() == load_backbone(tmp_path / "new").fingerprint()
    assert sum(path.stat().st_size for path in (tmp_path / "half").glob("model*.safetensors")) < 0.7 * sum(
        path.stat().st_size for path in found
    )


def test_what_cannot_be_imported_is_refused_in_a_line(shared_fixtures, tmp_path):
    run = str(shared_fixtures / "t5x" / "prompted_run")
    adapter = str(shared_fixtures / "peft" / "LORA" / "adapter")
    np.save(tmp_path / "p.npy", np.ones((2, 3), np.float32))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    new = tmp_path / "new"
    for arguments, problem in (
        ((run, new), "has no tokenizer; expected one; add --tokenizer"),
        ((run, new, str(tmp_path / "empty")), "no tokenizer in the folder"),
        ((run, new, "nobody/nothing"), "nobody/nothing: neither a file nor a folder nor reachable on the hub"),
        ((run, tmp_path / "full", SPIECE), "holds weights already"),
        ((run, tmp_path / "p.npy", SPIECE), "holds weights already, or is a file"),
        ((adapter, new, SPIECE), "an adapter of PEFT; expected a language model"),
        ((str(tmp_path / "p.npy"), new), "expected a file name ending in .safetensors"),
        ((str(tmp_path / "none"), new), "no such folder"),
        ((run, tmp_path / "p.npy" / "sub", SPIECE), "cannot be written"),
    ):
        with pytest.raises(UserError, match=problem) as caught:
            import_source(*arguments)
        assert "\n" not in str(caught.value)
    assert not new.exists()
