"""Prompt rows and trained weights as files, and the backbone that they belong to."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors import safe_open
from safetensors.numpy import save_file

from softprompt_jax.checkpoints.artifact import (
    Artifact,
    dump,
    load_artifact,
    load_prompt,
    save_prompt,
    save_trained,
)
from softprompt_jax.checkpoints.backbone import fingerprint, load_backbone, save_backbone
from softprompt_jax.config import UserError
from softprompt_jax.methods import Context, Full
from softprompt_jax.trees import flatten

ROWS = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)


def test_prompt_rows_return_to_the_bit_with_their_metadata(tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_prompt(ROWS, path, {"task": "moods", "fingerprint": "abc"})
    found = load_artifact(path)
    np.testing.assert_array_equal(found.prompt, ROWS)
    assert found.prompt.dtype == np.float32
    assert found.metadata == {"task": "moods", "fingerprint": "abc", "length": "3"}
    np.testing.assert_array_equal(load_prompt(tmp_path), ROWS)  # the folder of a run
    assert [p.name for p in tmp_path.iterdir()] == ["prompt.safetensors"]
    with safe_open(path, framework="numpy") as opened:  # rows only, no ids
        assert list(opened.keys()) == ["prompt"]


def test_equal_prompts_are_equal_files(tmp_path):
    metadata = {f"key {i}": str(i) for i in range(20)} | {"café": "naïve"}
    contents = set()
    for attempt in range(4):
        path = tmp_path / f"{attempt}.safetensors"
        save_prompt(ROWS, path, metadata)
        contents.add(path.read_bytes())
        assert load_artifact(path).metadata == metadata | {"length": "3"}
    assert len(contents) == 1


def test_a_number_that_was_changed_is_seen_by_its_checksum(tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_prompt(ROWS, path, {})
    content = bytearray(path.read_bytes())
    content[-7] ^= 1  # finite still, and close
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"prompt.safetensors: tensor prompt: cannot be read \(its checksum") as caught:
        load_prompt(path)
    assert "\n" not in str(caught.value)
    save_file({"prompt": ROWS}, path)  # another program's, which has none
    np.testing.assert_array_equal(load_prompt(path), ROWS)
    save_file({"prompt": ROWS}, path, metadata={"crc32": "[3]"})
    with pytest.raises(UserError, match="not a complete safetensors file"):
        load_prompt(path)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_npy_rows_become_float32(tmp_path, dtype):
    np.save(tmp_path / "rows.npy", ROWS.astype(dtype))
    rows = load_prompt(tmp_path / "rows.npy")
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, ROWS, atol=1e-3)


def test_released_prompts_of_the_paper_load(shared_fixtures):
    for name in ("mrpc", "rte", "sst2"):
        rows = load_prompt(shared_fixtures / "released" / f"t5_1_1_lm100k_base_{name}.npy")
        assert rows.shape == (100, 768)
        assert 800 < np.linalg.norm(rows, axis=1).mean() < 1400  # Lester et al.'s rows are long


def test_the_prompt_file_of_a_t5x_run_loads(shared_fixtures):
    found = list((shared_fixtures / "t5x" / "prompted_run").rglob("encoder.prompt.prompt.prompt"))
    assert found
    assert load_prompt(found[0]).shape == (5, 64)


def test_files_that_hold_no_prompt_are_refused_in_a_line(tmp_path):
    for name, array in {"flat": ROWS[0], "cube": ROWS[None], "empty": ROWS[:0]}.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "nothing.npy").write_text("")
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "several.npz", prompt=ROWS)
    np.save(tmp_path / "words.npy", np.array([["a"]]))
    np.save(tmp_path / "nan.npy", ROWS * np.nan)
    save_file({"lora": ROWS}, tmp_path / "other.safetensors")
    save_prompt(ROWS, tmp_path / "cut.safetensors", {})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-9])
    (tmp_path / "run").mkdir()
    (tmp_path / "running").mkdir()
    (tmp_path / "running" / "config.yaml").write_text("")
    problems = {
        "flat.npy": r"shape \[16\]",
        "cube.npy": r"shape \[1, 3, 16\]",
        "empty.npy": r"shape \[0, 16\]",
        "text.npy": "not a .npy array",
        "nothing.npy": "not a .npy array",
        "object.npy": "not a .npy array",
        "several.npz": "not a .npy array",
        "words.npy": "not an array of finite numbers",
        "nan.npy": "not an array of finite numbers",
        "other.safetensors": "holds lora; expected a tensor named 'prompt'",
        "cut.safetensors": "not a complete safetensors file",
        "run": "not a run folder",
        "running": "has no checkpoint yet",
        "missing.npy": "no such file",
    }
    for name, problem in problems.items():
        with pytest.raises(UserError, match=problem) as caught:
            load_prompt(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["prompt", "full"])
def test_what_trains_returns_to_the_bit_with_the_backbones_fingerprint(tmp_path, method):
    model = tiny.model(prompt=3 if method == "prompt" else 0)
    if method == "full":
        Full().attach(model, jax.random.key(0), Context(list))
    save_trained(model, tmp_path / "trained.safetensors", {"task": "moods"})
    found = load_artifact(tmp_path / "trained.safetensors")
    trained, metadata = found.tree, found.metadata
    names = [name for name, _ in flatten(trained).items()]
    assert (names == ["prompt.rows"]) == (method == "prompt")
    for name, value in flatten(trained).items():
        place = model
        for part in name.split("."):
            place = getattr(place, part)
        np.testing.assert_array_equal(value, place[...])
    assert metadata == {"task": "moods", "fingerprint": fingerprint(model)}


def test_a_fingerprint_outlives_dtype_prompt_and_dropout_but_not_another_backbone(tmp_path):
    model = tiny.model()
    save_backbone(model, tmp_path / "float32", "float32")
    save_backbone(model, tmp_path / "bfloat16", "bfloat16")
    found = {
        load_backbone(tmp_path / folder, dtype).fingerprint()
        for folder in ("float32", "bfloat16")
        for dtype in ("float32", "bfloat16")
    }
    found |= {fingerprint(tiny.model(prompt=3)), fingerprint(tiny.model(dropout=0.1, remat="full", unroll=True))}
    assert found == {fingerprint(model)}
    others = [
        tiny.model(seed=1),
        tiny.model(num_layers=3),
        tiny.model(activation="relu"),
        tiny.model(scale_output=True),
    ]
    assert fingerprint(model) not in {fingerprint(other) for other in others}


def test_a_prompt_is_refused_on_another_backbone():
    model = tiny.model()
    metadata = {"fingerprint": fingerprint(model), "backbone": "first"}
    Artifact("prompt.safetensors", metadata).check_backbone(fingerprint(model), "first")
    Artifact("rows.npy", {}).check_backbone(fingerprint(model), "first")  # a .npy does not say
    with pytest.raises(UserError, match=r"prompt.safetensors: trained on backbone first .*, used on second") as caught:
        Artifact("prompt.safetensors", metadata).check_backbone(fingerprint(tiny.model(seed=1)), "second")
    assert "\n" not in str(caught.value)


def test_json_is_written_at_once(tmp_path):
    dump({"test": {"accuracy": 0.5}}, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == {"test": {"accuracy": 0.5}}
    with pytest.raises(TypeError):
        dump({"test": jnp}, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == {"test": {"accuracy": 0.5}}
