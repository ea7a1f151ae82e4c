"""What a prompt's rows are made of while they train: by hand, and gone in the files of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from softprompt_jax import PromptBank, load_prompt, load_run, train
from softprompt_jax.checkpoints.artifact import read_metadata
from softprompt_jax.config import UserError
from softprompt_jax.export.show import show
from softprompt_jax.inference.predictor import load_predictor
from softprompt_jax.methods import Context, Prompt, split
from softprompt_jax.methods.listing import parameters
from softprompt_jax.methods.prompt import embedding_rms
from softprompt_jax.methods.reparameterization import ULPT, Residual, projection
from softprompt_jax.models.presets import preset

CONTEXT = Context(lambda text: [5, 6, 7], frozenset({0, 1}))


def rows_of(**settings):
    model = tiny.model()
    Prompt(length=4, **settings).attach(model, tiny.key(0), CONTEXT)
    return np.asarray(model.prompt.table()), model


def test_a_residual_prompt_is_its_rows_and_a_tenth_of_their_size_from_a_normed_network():
    plain, _ = rows_of()
    found, model = rows_of(reparameterization=Residual(hidden=5))
    made, rms = model.prompt.rows, embedding_rms(model)
    x = np.asarray(made.rows[...])
    np.testing.assert_array_equal(x, plain)
    hidden = np.maximum(x / rms @ np.asarray(made.down[...]), 0) @ np.asarray(made.up[...])
    normed = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, x + 0.1 * rms * normed, atol=1e-5)
    assert np.sqrt(np.mean((found - plain) ** 2)) == pytest.approx(0.1 * rms, rel=0.05)


def test_ulpt_starts_as_near_to_the_first_rows_as_its_projection_can_make():
    plain, _ = rows_of()
    wide, _ = rows_of(reparameterization=ULPT(dimensions=16))  # as wide as the model: nothing is lost
    np.testing.assert_allclose(wide, plain, atol=1e-4)
    found, model = rows_of(reparameterization=ULPT(dimensions=2, seed=3))
    shift = plain.mean(0)
    best = np.linalg.lstsq(projection(2, 16, 3).T, (plain - shift).T, rcond=None)[0]
    np.testing.assert_allclose(found, shift + best.T @ projection(2, 16, 3), atol=1e-4)
    assert {path: leaf.shape for path, leaf in split(model).trainable["prompt"]["rows"].items()} == {
        "numbers": (4, 2), "scale": (16,), "shift": (16,)
    }  # fmt: skip


def test_the_projection_of_a_seed_is_the_same_everywhere():
    np.testing.assert_allclose(projection(2, 2, 0) * 2**0.5, [[1.7640524, 0.4001572], [0.978738, 2.2408931]], atol=1e-6)
    assert not np.array_equal(projection(2, 2, 0), projection(2, 2, 1))


@pytest.mark.parametrize(("dimensions", "numbers"), [(64, 7_936), (2, 1_736)])
def test_ulpt_has_the_numbers_of_its_paper(dimensions, numbers):
    method = Prompt(length=100, reparameterization=ULPT(dimensions=dimensions))
    assert parameters(preset("t5-v1_1-base"), method) == numbers


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["residual", "ulpt"])
def test_a_run_leaves_plain_rows_that_bank_and_predictor_read_finished_or_not(small, tmp_path, kind):
    method = {"kind": "prompt", "length": 3, "reparameterization": kind}
    (tmp_path / "run.yaml").write_text(json.dumps(small.short | {"methods": [method]}))
    folder = tmp_path / "run"
    result = train(load_run(tmp_path / "run.yaml"), folder)
    rows = load_file(folder / "prompt.safetensors")["prompt"]
    assert rows.shape == (3, 16)
    np.testing.assert_array_equal(load_file(folder / "trained.safetensors")["prompt.rows"], rows)
    texts = ["the garden is warm", "the old mill is rude"]
    expected = load_predictor(folder).texts(texts)
    bank = PromptBank(str(small.backbone))
    bank.add("run", folder)
    assert [answer for answer, _ in bank.generate(texts, "run", 4)] == expected
    # A run that has not finished: what makes the rows is read from its checkpoint.
    (folder / "result.json").unlink()
    for name in ("prompt.safetensors", "trained.safetensors"):
        (folder / name).unlink()
    unfinished = bank.read("unfinished", folder)
    np.testing.assert_allclose(unfinished.rows, rows, rtol=1e-4, atol=1e-4)
    assert unfinished.step == result["best_step"]


@pytest.mark.slow
def test_ulpt_leaves_a_small_file_whose_rows_are_made_on_demand(small, tmp_path):
    method = {"kind": "prompt", "length": 12, "reparameterization": {"kind": "ulpt", "dimensions": 1, "seed": 7}}
    (tmp_path / "run.yaml").write_text(json.dumps(small.short | {"methods": [method]}))
    train(load_run(tmp_path / "run.yaml"), tmp_path / "run")
    compact = tmp_path / "run" / "prompt_compact.safetensors"
    tensors = load_file(compact)
    assert {name: part.shape for name, part in tensors.items()} == {"numbers": (12, 1), "scale": (16,), "shift": (16,)}
    rows = load_file(tmp_path / "run" / "prompt.safetensors")["prompt"]
    np.testing.assert_allclose(load_prompt(compact), rows, rtol=1e-5, atol=1e-5)
    bank = PromptBank(str(small.backbone))
    bank.add("small", compact)
    bank.add("whole", tmp_path / "run")
    assert bank.prompt("small").label_words == bank.prompt("whole").label_words
    (one, score), (other, same) = bank.generate(["the garden is warm"] * 2, ["small", "whole"], 4)
    assert one == other
    assert score == pytest.approx(same, rel=1e-5)  # the rows are made again, equal within rounding
    title = next(iter(show(str(compact))))
    assert "a prompt of 12 rows of width 16" in title
    assert "made of 44 numbers and a seed" in title
    wide = np.ones(1 << 15, np.float32)
    for seed, change in (
        ("7e", {}),
        ("9" * 5000, {}),
        ("7", {"shift": tensors["shift"][:3]}),
        ("7", {"numbers": np.ones((1 << 10, 1), np.float32), "scale": wide, "shift": wide}),  # 128 MiB of 260 kB
        ("7", {"numbers": np.ones((1, 1 << 10), np.float32), "scale": wide, "shift": wide}),
    ):
        save_file(tensors | change, tmp_path / "bad.safetensors", metadata=read_metadata(compact) | {"seed": seed})
        with pytest.raises(UserError, match=r"bad.safetensors: found numbers .* expected \[P, r\], \[D\], \[D\]"):
            load_prompt(tmp_path / "bad.safetensors")
