"""Weights and batches on a mesh: the same numbers as on one device, and errors that name the mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from softprompt_jax import sharding
from softprompt_jax.config import UserError, parse
from softprompt_jax.sharding import Mesh, weight_spec

HERE = Path(__file__).parent
EVERY = ["8,1,1", "1,8,1", "1,1,8", "2,2,2", "4,2,1", "4,1,2", "1,2,4", "1,4,2", "2,4,1", "2,1,4"]


def on_eight_devices(methods: list[str], meshes: list[str], steps: int = 10) -> dict:
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    command = [sys.executable, str(HERE / "on_eight_devices.py"), ",".join(methods), str(steps), *meshes]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(answers: dict) -> None:
    for name, found in answers.items():
        assert found["loss"] < 1e-5, (name, found)
        assert found["gradient"] < 1e-5, (name, found)
        assert found["trained"] < 1e-3, (name, found)


@pytest.mark.slow
def test_every_axis_gives_the_numbers_of_one_device():
    answers = on_eight_devices(["prompt"], ["2,2,2"])
    check(answers)
    assert answers["prompt 2,2,2"]["cut"] == [None, "fsdp", "tensor"]


@pytest.mark.slow
def test_every_mesh_gives_the_numbers_of_one_device():
    check(on_eight_devices(["prompt", "full"], EVERY))


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "heads"), (3, 16, 8), (None, "fsdp", "tensor")),
        (("vocab", "embed"), (50, 16), ("tensor", "fsdp")),
        (("vocab", "embed"), (51, 16), (None, "fsdp")),
        (("embed",), (3, 16), ()),
        (("prompt", "embed"), (20, 16), ()),
        (("buckets", "heads"), (32, 8), (None, "tensor")),
    ],
)
def test_matrices_are_cut_and_everything_small_or_odd_stays_whole(axes, shape, expected):
    assert tuple(weight_spec({"data": 2, "fsdp": 4, "tensor": 2}, axes, shape)) == expected


def test_every_weight_of_a_model_names_its_axes():
    from flax import nnx

    model = tiny.model(prompt=2)
    variables = jax.tree.leaves(nnx.state(model), is_leaf=lambda node: isinstance(node, nnx.Variable))
    for variable in variables:
        axes = variable.get_metadata()["axes"]
        assert variable[...].ndim - len(axes) in (0, 1)


def test_one_device_needs_no_mesh():
    with jax.set_mesh(Mesh().build(jax.devices()[:1])):
        batch = {"rows": np.arange(6)}
        assert sharding.spread(batch) is batch
        assert sharding.row_shards() == 1
        assert sharding.process_share() == (0, 1)


@pytest.mark.parametrize(
    ("settings", "devices", "sizes"),
    [({}, 8, (8, 1, 1)), ({"data": 2, "fsdp": -1}, 8, (2, 4, 1)), ({"data": 1, "tensor": -1}, 4, (1, 1, 4))],
)
def test_minus_one_is_what_the_others_leave(settings, devices, sizes):
    assert Mesh(**settings).sizes(devices) == sizes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": 3}, "for 8 device"),
        ({"data": -1, "tensor": 16}, "for 8 device"),
        ({"data": 0}, "expected sizes of 1 or more"),
        ({"data": -1, "fsdp": -1}, "-1 at most once"),
        ({"fdsp": 2}, "did you mean fsdp"),
    ],
)
def test_a_mesh_that_does_not_fit_is_told_in_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        parse(Mesh, settings, "mesh").sizes(8)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3, "fsdp": 1, "tensor": 1}, "data x fsdp is 3; expected a divisor of the 16 rows computed at a time"),
        ({"data": 2, "fsdp": 16, "tensor": 1}, "data x fsdp is 32; expected a divisor of the 16 rows"),
        ({"data": 1, "fsdp": 1, "tensor": 3}, "tensor is 3; expected a divisor of the backbone's 8 heads"),
    ],
)
def test_a_mesh_that_does_not_divide_rows_or_heads_is_told_in_one_line(monkeypatch, sizes, message):
    mesh = types.SimpleNamespace(shape=sizes, empty=False)
    monkeypatch.setattr(sharding, "_mesh", lambda: mesh)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    with pytest.raises(UserError, match=message):
        sharding.check(16, 8)
