"""`softprompt show` says what a file is, and nothing else can be taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from test_torch_file import save_tensors

from softprompt_jax import UserError
from softprompt_jax.checkpoints.artifact import save_prompt
from softprompt_jax.checkpoints.backbone import EMBEDDED, save_backbone
from softprompt_jax.export.show import show

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def shown(source, norms: bool = False) -> str:
    return "\n".join(show(str(source), norms))


def test_a_prompt_is_told_with_its_norms_and_metadata(tmp_path):
    rows = np.array([[3, 4], [0, 1]], np.float32)
    save_prompt(rows, tmp_path / "p.safetensors", {"task": "moods"})
    text = shown(tmp_path / "p.safetensors")
    assert "a prompt of 2 rows of width 2; norms of rows 1 to 5, mean 3" in text
    assert "task: moods" in text
    np.save(tmp_path / "p.npy", rows)
    assert "a prompt of 2 rows of width 2" in shown(tmp_path / "p.npy")
    save_tensors(tmp_path / "p.bin", {"w": rows})
    assert shown(tmp_path / "p.bin").splitlines() == [
        f"{tmp_path / 'p.bin'}: 1 tensors, 4 numbers",
        "  checksums: of 1 of 1 tensors",
        "  w           2x2  norm 5.099",
    ]
    save_file({"prompt": rows}, tmp_path / "p.safetensors")
    assert "checksums: none, a changed number cannot be seen" in shown(tmp_path / "p.safetensors")


def test_runs_are_told_with_their_scores_and_what_they_trained(prompt_run, full_run):
    text = shown(prompt_run)
    assert "a run on moods with prompt, backbone" in text
    assert "  test:\n    accuracy: " in text
    assert "\n  settings:\n    task:\n" in text  # not JSON in one line
    assert "a prompt of " in text
    assert "fingerprint: " in text
    assert "encoder.layers.attention.query.kernel" in shown(full_run)


def test_a_config_is_told_as_one():
    assert shown(QUICKSTART) == f"{QUICKSTART}: a run on sentiment_movie with prompt, backbone embedded"


def test_checkpoints_are_told_with_their_settings(shared_fixtures, tmp_path):
    text = shown(shared_fixtures / "t5x" / "prompted_run")
    assert "a checkpoint of T5X" in text
    assert "step: 1100010" in text
    assert "a prompt of 5 rows of width 64" in text
    assert "Adafactor: slots of 1 weights" in text
    assert "slots of 52 weights" in shown(shared_fixtures / "t5x" / "t5_1_1_tiny_bf16")
    model = tiny.model()
    save_backbone(model, tmp_path, "float32")
    text = shown(tmp_path)
    assert f"a T5 in Hugging Face layout, {model.settings.parameters():,} parameters" in text
    assert "tokenizer: none in the folder" in text
    assert f"norm {np.linalg.norm(model.embedding[...]):.4g}" in text
    assert "an adapter of PEFT, LORA" in shown(shared_fixtures / "peft" / "LORA" / "adapter")


def test_large_files_are_read_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("softprompt_jax.export.show._READ_NUMBERS", 100)
    save_backbone(tiny.model(), tmp_path, "float32")
    assert "norms left out, since" in shown(tmp_path)
    assert "norms left out" not in shown(tmp_path, norms=True)


def edit(folder, **changes) -> None:
    """Change tensors of a folder's weights; None removes one."""
    tensors = load_file(folder / "model.safetensors") | {name.replace("__", "."): v for name, v in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")


def configure(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shorten(folder) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def flip_one(folder) -> None:
    """Flip one bit of a number, which stays finite."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def flip(folder) -> None:
    """Flip the bits that make a number of the table infinite."""
    table = load_file(folder / "model.safetensors")["shared.weight"].copy()
    table[7, 3] = np.inf
    edit(folder, shared__weight=table)


QUERY = "encoder__block__1__layer__0__SelfAttention__q__weight"
DAMAGES = {
    "truncated": (shorten, "not a complete safetensors file"),
    "one bit": (flip_one, "cannot be read (its checksum does not fit: numbers were changed)"),
    "flipped": (flip, "tensor shared.weight: holds numbers that are not finite"),
    "missing": (lambda f: edit(f, **{QUERY: None}), "1 weights are missing, first encoder.block.1"),
    "surplus": (lambda f: edit(f, extra=np.ones(2, np.float32)), "1 weights are unknown, first extra"),
    "shape": (lambda f: edit(f, **{QUERY: np.ones((3, 3), np.float32)}), "found shape [3, 3]; expected [16, 16]"),
    "mixed families": (lambda f: configure(f, model_type="umt5"), "2 weights are missing, first decoder.block.1"),
    "no head": (lambda f: edit(f, lm_head__weight=None), "config.json says untied"),
    "half written": (lambda f: (f / "config.json").unlink(), "none that is known"),
    "half downloaded": (lambda f: (f / "model.safetensors").unlink(), "expected weights: model.safetensors"),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoints_are_one_line_and_exit_2(refused, tmp_path, damage, expected):
    save_backbone(tiny.model(), tmp_path, "float32")
    damage(tmp_path)
    assert expected in refused("show", tmp_path)


def test_an_adapter_of_an_unknown_type_is_one_line(refused, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "OFT"}')
    assert "peft_type is 'OFT'; expected one of" in refused("show", tmp_path)


def test_the_commands_print_what_they_did(softprompt, shared_fixtures, tmp_path):
    run, to = shared_fixtures / "t5x" / "prompted_run", tmp_path / "t5"
    code, out, err = softprompt("import", run, "--to", to, "--tokenizer", EMBEDDED / "spiece.model")
    assert (code, out) == (0, "")
    assert f"wrote {to}: a T5 of " in err
    code, out, err = softprompt("show", to)
    assert (code, err) == (0, "")
    assert out.startswith(f"{to}: a T5 in Hugging Face layout, ")
    assert "a prompt of 5 rows of width 64" in out
    assert "fingerprint: " in out


def test_what_is_none_of_these_is_refused_in_a_line(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "text.txt").write_text("hello")
    for name, problem in {
        "nothing": "no such file or folder; expected a prompt",
        "folder": "none that is known; expected a prompt",
        "text.safetensors": "not a complete safetensors file",
        "text.npy": "not a .npy array",
        "text.txt": "found the suffix '.txt'; expected one of .safetensors, .npy",
    }.items():
        with pytest.raises(UserError, match=problem) as caught:
            shown(tmp_path / name)
        assert "\n" not in str(caught.value)
