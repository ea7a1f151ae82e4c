"""The list of methods: what trains on a backbone, and under which optimizer."""

from __future__ import annotations

import jax
import pytest
import tiny
from small_runs import CONFIGS
from typer.testing import CliRunner

from softprompt_jax.cli.main import app
from softprompt_jax.methods import METHODS, Context, split
from softprompt_jax.methods.listing import parameters
from softprompt_jax.models.presets import preset
from softprompt_jax.run import load_run


@pytest.mark.slow
def test_every_method_trains_as_much_as_it_says():
    settings = tiny.settings()
    for kind, method in METHODS.items():
        model = tiny.model()
        method().attach(model, tiny.key(0), Context(lambda text: [7] * len(text.split())))
        trained = sum(leaf.size for leaf in jax.tree.leaves(split(model).trainable))
        assert parameters(settings, method()) == trained, kind


@pytest.mark.slow
def test_a_published_size_needs_no_weights_and_has_the_known_counts():
    settings = preset("t5-v1_1-xxl")
    found = {kind: parameters(settings, METHODS[kind]()) for kind in ("prompt", "full", "lora")}
    assert found["prompt"] == 100 * 4096
    assert found["full"] == settings.parameters()
    assert found["lora"] == 2 * 8 * 4096 * (2 * 24 + 4 * 24)  # query and value; rank 8


@pytest.mark.slow
def test_the_command_prints_a_line_for_each():
    result = CliRunner().invoke(app, ["methods", "--backbone", "t5-small"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines] == ["kind", *METHODS]
    assert "Lester et al., 2021" in lines[1]
    assert "51,200" in lines[1]
    assert lines[1].split()[-2:] == ["0.3", "PROMPT_TUNING"]


def test_every_method_has_a_config_and_every_config_is_a_run():
    kinds = {method.kind for path in CONFIGS for method in load_run(path).methods}
    assert kinds == set(METHODS)
    assert all(path.read_text().startswith("# ") for path in CONFIGS)
