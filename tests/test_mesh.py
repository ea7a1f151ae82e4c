"""Weights and batches on a mesh: the same numbers as on one device, and errors that name the mesh."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from softprompt_jax.config import UserError, parse
from softprompt_jax.distributed import mesh as sharding
from softprompt_jax.distributed.mesh import Mesh, weight_spec

HERE = Path(__file__).parent
EVERY = ["8,1,1", "1,8,1", "1,1,8", "2,2,2", "4,2,1", "4,1,2", "1,2,4", "1,4,2", "2,4,1", "2,1,4"]


def on_eight_devices(methods: list[str], meshes: list[str], steps: int = 10, of: str = "t5") -> dict:
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    command = [sys.executable, str(HERE / "on_eight_devices.py"), of, ",".join(methods), str(steps), *meshes]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "meshes"), [("prompt", EVERY), ("full", ["2,2,2", "1,8,1", "1,2,4", "2,1,4"])])
def test_every_mesh_gives_the_numbers_of_one_device(kind, meshes):
    answers = on_eight_devices([kind], meshes)
    assert len(answers) == len(meshes)
    for name, found in answers.items():
        assert found["loss"] < 1e-5, (name, found)
        assert found["gradient"] < 1e-5, (name, found)
        assert found["trained"] < 1e-3, (name, found)
    assert answers[f"{kind} 2,2,2"]["cut"] == [None, "fsdp", "tensor"]


@pytest.mark.slow
@pytest.mark.parametrize("of", ["gemma2", "gpt2", "t5gemma"])
def test_other_families_give_the_numbers_of_one_device_packed_and_not(of):
    meshes = ["2,2,2", "1,2,4"]
    answers = on_eight_devices(["prompt", "lora", "packed prompt", "packed lora"], meshes, steps=1, of=of)
    assert len(answers) == 4 * len(meshes)
    for name, found in answers.items():
        assert max(found["loss"], found["gradient"]) < 1e-5, (name, found)
        assert found["trained"] < 1e-3, (name, found)
        assert found["cut"] == [None, "fsdp", "tensor"]


@pytest.mark.slow
def test_a_quantised_backbone_on_a_mesh_gives_the_numbers_of_one_device():
    for name, found in on_eight_devices(["int8", "nf4"], ["2,2,2"], steps=0).items():
        assert max(found["loss"], found["gradient"]) < 1e-5, (name, found)


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


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX tells of a TPU's device, as far as meshes look at it."""

    id: int
    coords: tuple[int, ...]
    slice_index: int = 0
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


def chips(*shape: int, slices: int = 1, kind: str = "TPU v5") -> list[Chip]:
    places = [place for _ in range(slices) for place in np.ndindex(*reversed(shape))]
    each = math.prod(shape)
    return [Chip(i, (*place[::-1], 0)[:3], i // each, device_kind=kind) for i, place in enumerate(places)]


@pytest.mark.parametrize(
    ("shape", "kind", "sizes"),
    [
        ((4, 4, 4), "TPU v5", (64, 1, 1)),
        ((4, 4, 4), "TPU v5", (2, 32, 1)),
        ((4, 4, 4), "TPU v4", (8, 8, 1)),
        ((4, 4), "TPU v6 lite", (2, 8, 1)),
        ((4, 4), "TPU v5 lite", (1, 2, 8)),
        ((2, 4), "TPU v5 lite", (8, 1, 1)),
    ],
)
def test_every_mesh_of_a_slice_is_laid_out(shape, kind, sizes):
    devices = chips(*shape, kind=kind)
    found = sharding.arrange_devices(sizes, devices)
    assert found.shape == sizes
    assert sorted(chip.id for chip in found.flat) == list(range(len(devices)))


def test_neighbours_on_an_axis_are_near_each_other():
    def farthest(mesh: np.ndarray) -> int:
        pairs = zip(mesh[..., :-1].flat, mesh[..., 1:].flat, strict=True)
        return max(int(np.abs(np.subtract(one.coords, other.coords)).sum()) for one, other in pairs)

    devices = chips(4, 4, kind="TPU v5 lite")
    assert farthest(sharding.arrange_devices((1, 2, 8), devices)) == 2
    assert farthest(np.asarray(devices, object).reshape(1, 2, 8)) == 4  # in their order


@pytest.mark.parametrize(
    ("sizes", "alike"),
    [((16, 1, 1), None), ((2, 8, 1), (1, 2)), ((4, 1, 4), (1, 2)), ((1, 16, 1), None), ((1, 2, 8), (2,))],
)
def test_slices_share_rows_before_weights(sizes, alike):
    found = sharding.arrange_devices(sizes, chips(2, 4, slices=2, kind="TPU v5 lite"))
    assert sorted(chip.id for chip in found.flat) == list(range(16))
    slices = np.vectorize(lambda chip: chip.slice_index)(found)
    assert (np.diff(slices.reshape(-1)) != 0).sum() == 1  # one half each
    if alike:  # along these axes all chips are of one slice
        assert (slices == slices.min(axis=alike, keepdims=True)).all()


def test_devices_that_no_arrangement_fits_are_told_and_not_taken_in_their_order(monkeypatch):
    def none(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", none)
    with pytest.raises(UserError, match="no arrangement of 8 devices as data 4 x fsdp 1 x tensor 2"):
        sharding.arrange_devices((4, 1, 2), chips(2, 4))


def test_the_state_of_a_weight_lies_as_the_weight_of_its_whole_path(monkeypatch):
    mesh = Mesh().build(jax.devices()[:1])
    monkeypatch.setattr(sharding, "current_mesh", lambda: mesh)
    inner, outer = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("fsdp", "tensor"))

    def array(sharding=None, shape=(4, 4)):
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)

    weights = {"norm": {"scale": array(inner)}, "stack": {"norm": {"scale": array(outer)}}}
    slots = {"norm": {"scale": {"v": array(), "count": array(shape=())}}}
    state = {"trainable": weights, "optimizer": [slots | {"stack": slots}]}
    found = sharding.state_sharding(state, weights)
    assert found["trainable"]["stack"]["norm"]["scale"] == outer
    assert found["optimizer"][0]["norm"]["scale"]["v"] == inner
    assert found["optimizer"][0]["stack"]["norm"]["scale"]["v"] == outer
    assert found["optimizer"][0]["norm"]["scale"]["count"].spec == PartitionSpec()


def test_one_device_needs_no_mesh():
    with jax.set_mesh(Mesh().build(jax.devices()[:1])):
        batch = {"rows": np.arange(6)}
        assert sharding.shard_local_batch(batch) is batch
        assert sharding.row_shards() == 1
        assert sharding.process_share() == (0, 1)


@pytest.mark.parametrize(
    ("settings", "devices", "sizes"),
    [
        ({}, 8, (8, 1, 1)),
        ({"fsdp": -1}, 8, (1, 8, 1)),
        ({"data": 2, "fsdp": -1}, 8, (2, 4, 1)),
        ({"data": 1, "tensor": -1}, 4, (1, 1, 4)),
    ],
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
        ({"data": 1, "fsdp": 1, "tensor": 8}, "tensor is 8; expected a divisor of the feed-forward width 28"),
        ({"data": 1, "fsdp": 8, "tensor": 1}, "fsdp is 8; expected a divisor of the backbone's width 20"),
    ],
)
def test_a_mesh_that_does_not_divide_rows_or_weights_is_told_in_one_line(monkeypatch, sizes, message):
    mesh = types.SimpleNamespace(shape=sizes, empty=False)
    monkeypatch.setattr(sharding, "current_mesh", lambda: mesh)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    with pytest.raises(UserError, match=message):
        sharding.check_divisible(16, 8, 20, 28)


def test_key_heads_that_a_mesh_does_not_divide_are_told_in_one_line(monkeypatch):
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 4}, empty=False)
    monkeypatch.setattr(sharding, "current_mesh", lambda: mesh)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    with pytest.raises(UserError, match="tensor is 4; expected a divisor of the backbone's 2 key heads, which 8 heads"):
        sharding.check_divisible(16, 2, 20, 28, 8)
