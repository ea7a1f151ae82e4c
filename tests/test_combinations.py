"""Several methods in one run: a list in the settings, and no code that knows about it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import tiny
from small_runs import rows, write_config

import softprompt_jax
from softprompt_jax import UserError, load_predictor
from softprompt_jax.checkpoints.artifact import load_artifact
from softprompt_jax.config import parse
from softprompt_jax.export.export import export
from softprompt_jax.methods import split
from softprompt_jax.optim.optimizers import Schedule
from softprompt_jax.progress import Reporter
from softprompt_jax.run import Run
from softprompt_jax.trees import flatten

pytestmark = pytest.mark.usefixtures("own_cache")
TEXTS = [row["text"] for row in rows()[:8]]
LORA = {"kind": "lora", "rank": 2, "targets": ["*"], "learning_rate_scale": 0.1}


def run_of(small, folder, *methods):
    changes = {
        "methods": list(methods),
        "optimizer": {"kind": "adafactor"},
        "steps": 4,
        "evaluate_every": 4,
        "checkpoint_every": 4,
        "log_every": 2,
    }
    softprompt_jax.train(parse(softprompt_jax.Run, small.short | changes, "test"), folder)
    return folder


@pytest.fixture(scope="module")
def combined(small, tmp_path_factory):
    """Return the folder of a run of a prompt, LoRA and IA3."""
    folder = tmp_path_factory.mktemp("combined")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTPROMPT_CACHE", str(folder / "cache"))
        return run_of(small, folder / "run", {"kind": "prompt", "length": 3}, LORA, {"kind": "ia3"})


@pytest.mark.slow
def test_all_of_them_train_and_the_predictor_has_them_all(combined):
    trained = flatten(load_artifact(combined).tree)
    predictor = load_predictor(combined)
    parts = flatten(split(predictor.model).trainable)
    assert parts.keys() == trained.keys()
    assert {path.rpartition(".")[2] for path in trained} == {"rows", "down", "up", "factors"}
    for path, values in trained.items():
        np.testing.assert_array_equal(values, parts[path])
    assert all(np.any(values != 0) for path, values in trained.items() if path.endswith(".up"))
    assert all(np.any(values != 1) for path, values in trained.items() if path.endswith(".factors"))
    assert not (combined / "prompt.safetensors").exists()  # alone it would answer differently
    assert len(predictor.texts(TEXTS)) == len(TEXTS)


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("peft", "found prompt and lora and ia3; expected one, since a PEFT adapter holds one"),
        ("npy", "it trained no prompt|no prompt.safetensors"),
    ],
)
@pytest.mark.slow
def test_what_other_formats_cannot_hold_is_refused(combined, tmp_path, format, expected):
    with pytest.raises(UserError, match=expected):
        export(combined, format, tmp_path / "out.npy")


@pytest.mark.slow
def test_methods_on_weights_merge_together_into_a_hugging_face_model(small, tmp_path):
    folder = run_of(small, tmp_path / "run", LORA, {"kind": "ia3"}, {"kind": "norms", "learning_rate_scale": 0.01})
    export(folder, "hf", tmp_path / "model")
    merged = softprompt_jax.load_backbone(tmp_path / "model").model
    batch = tiny.batch(rows=3)
    found = tiny.forward(merged, batch)
    np.testing.assert_allclose(found, tiny.forward(load_predictor(folder).model, batch), atol=1e-4)
    plain = tiny.forward(softprompt_jax.load_backbone(small.backbone).model, batch)
    assert np.abs(plain - found).max() > 0.01


@pytest.mark.slow
def test_a_prefix_and_adapters_train_together(small, tmp_path):
    folder = run_of(small, tmp_path / "run", {"kind": "prefix", "length": 3, "network": 4}, {"kind": "adapter"})
    trained = flatten(load_artifact(folder).tree)
    assert {path.rpartition(".")[2] for path in trained} >= {"keys", "values", "down", "up"}
    assert len(load_predictor(folder).texts(TEXTS)) == len(TEXTS)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"methods": [{"kind": "lora", "targets": ["qery"]}]},
            "lora targets: 'qery' matches no weight of this backbone;",
        ),
        (
            {"methods": [{"kind": "lora", "rank": 17}]},
            "lora rank 17 at decoder.layers.attention.query; expected at most",
        ),
        (
            {"methods": [{"kind": "prompt", "length": 90}], "packing": {"length": 64}},
            "packing.length: found 64, an example has 99 positions (its prompt counts); expected at least as many;",
        ),
        (
            {"methods": [{"kind": "prompt", "length": 2}, {"kind": "wayward", "text": "say"}]},
            "two methods want the prompt; expected one; remove the other",
        ),
        (
            {"methods": [{"kind": "multitask", "teachers": ["a"]}, {"kind": "lora"}]},
            "teachers beside another method, which would change them too: expected multitask alone",
        ),
        ({"methods": [{"kind": "full"}], "quantize": "int8"}, "is quantised and cannot train; expected float weights;"),
    ],
)
def test_methods_that_cannot_be_are_one_line(refused, small, tmp_path, changes, expected):
    config = write_config(tmp_path / "a.yaml", small.short | changes)
    assert expected in refused("train", config, "--out", tmp_path / "run", "--quiet")


@pytest.mark.slow
def test_each_rate_is_named_in_the_first_lines_and_the_metrics_and_an_interrupted_run_goes_on(small, tmp_path):
    class Lines(Reporter):
        def line(self, text: str) -> None:
            told.append(text)

    told: list[str] = []
    lora = {"kind": "lora", "rank": 2, "optimizer": {"learning_rate": 1e-3}}
    quick = {"evaluate_every": 2, "checkpoint_every": 2, "log_every": 1, "steps": 4, "schedule": {"decay": "linear"}}
    run = parse(Run, small.short | quick | {"methods": [{"kind": "prompt", "length": 3}, lora]}, "test")
    softprompt_jax.train(run, tmp_path / "whole", Lines(quiet=True))
    assert any(re.match(r"learning rate: prompt \S+ \(adafactor.*\); lora 0.001 \(adamw\)$", line) for line in told)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates[0] == pytest.approx({"prompt": 0.3, "lora": 1e-3})
    assert rates[2] == pytest.approx({"prompt": 0.15, "lora": 5e-4})

    steady = run.model_copy(update={"schedule": Schedule()})  # with which a run can be made longer
    softprompt_jax.train(steady, tmp_path / "whole at one rate")
    softprompt_jax.train(steady.model_copy(update={"steps": 2}), tmp_path / "cut")
    softprompt_jax.train(steady, tmp_path / "cut", Lines(quiet=True))
    assert "resumed at step 2" in told
    whole, again = (flatten(load_artifact(tmp_path / name).tree) for name in ("whole at one rate", "cut"))
    for path, values in whole.items():
        np.testing.assert_array_equal(again[path], values)
