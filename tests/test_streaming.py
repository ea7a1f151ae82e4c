"""Weights go slice by slice from files to devices: what is requested, and what is held while that happens."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from softprompt_jax.checkpoints import backbone, tensors
from softprompt_jax.checkpoints.backbone import load_backbone, save_backbone
from softprompt_jax.checkpoints.tensors import checksum, checksums, open_safetensors, read_stacked
from softprompt_jax.config import UserError
from softprompt_jax.distributed.mesh import Mesh
from softprompt_jax.models.build import abstract
from softprompt_jax.models.families import names
from softprompt_jax.models.presets import preset
from softprompt_jax.models.t5 import T5Settings
from softprompt_jax.trees import flatten

HERE = Path(__file__).parent


def measured(*arguments: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "XLA_FLAGS": ""}
    command = [sys.executable, str(HERE / "load_and_measure.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def answer(process: subprocess.Popen) -> dict:
    text, _ = process.communicate(timeout=500)
    assert process.returncode == 0
    return json.loads(text.splitlines()[-1])


def write_sparse(folder: Path, settings: T5Settings, shard_bytes: int) -> int:
    """Write a sharded bfloat16 folder of zeros that takes no space on the disk, and return its bytes of weights."""
    save_backbone(tiny.model(), folder)  # for a config.json, whose sizes are then changed
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text()) | {
        **{name: getattr(settings, name) for name in ("d_model", "d_kv", "d_ff", "num_heads", "num_layers")},
        **{"vocab_size": settings.vocabulary_rows, "num_decoder_layers": settings.num_decoder_layers},
    }
    (folder / "config.json").write_text(json.dumps(config))
    leaves = flatten(nnx.to_pure_dict(nnx.state(abstract(settings))))
    shapes = {}
    for path, (tensor_names, transposed, _) in names(settings).items():
        shape = leaves[path].shape[1:] if ".layers." in path else leaves[path].shape
        shapes |= dict.fromkeys(tensor_names, shape[::-1] if transposed else shape)
    shards: list[dict] = [{}]
    place = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if place and place + size > shard_bytes:
            shards.append({})
            place = 0
        shards[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    weight_map = {}
    for number, header in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as sink:
            sink.write(len(text).to_bytes(8, "little") + text)
            if "lm_head.weight" in header:  # unlike the table: untied
                sink.seek(header["lm_head.weight"]["data_offsets"][0], 1)
                sink.write(b"\x80\x3f")
            sink.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
        weight_map |= dict.fromkeys(header, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return 2 * sum(int(np.prod(shape)) for shape in shapes.values())


def test_a_slice_of_a_weight_asks_for_its_bytes_only(tmp_path):
    model = tiny.model()
    save_backbone(model, tmp_path, "float32")
    read = []

    def counted(tensor):
        def part(index):
            read.append(tensor.part(index))
            return read[-1]

        return dataclasses.replace(tensor, part=part)

    opened = {name: counted(tensor) for name, tensor in open_safetensors(tmp_path / "model.safetensors").items()}
    kernel = model.encoder.layers.feed_forward.gate.kernel[...]  # [L, D, F]; the files have [F, D]
    tensor_names, *_ = names(model.settings)["encoder.layers.feed_forward.gate.kernel"]
    parts = [opened[name].transposed() for name in tensor_names]
    quarter = kernel.shape[2] // 4
    for device in range(4):
        read.clear()
        index = (slice(None), slice(None), slice(device * quarter, (device + 1) * quarter))
        found = read_stacked(parts, kernel.shape, index, np.dtype("float32"))
        np.testing.assert_array_equal(found, kernel[index])
        assert sum(values.nbytes for values in read) == kernel.nbytes // 4
    read.clear()  # a layer asks for a layer
    found = read_stacked(parts, kernel.shape, (slice(1, 2), slice(None), slice(None)), np.dtype("float32"))
    assert len(read) == 1
    np.testing.assert_array_equal(found, kernel[1:])


def test_a_changed_number_is_seen_when_its_tensor_is_read_whole(tmp_path):
    path, values = tmp_path / "model.safetensors", np.arange(1, 40_001, dtype=np.float32).reshape(400, 100)
    arrays = {"wide": values, "scale": np.ones(3, np.float32), "number": np.array(2.0, np.float32)}
    blocks = {
        "wide": [164, *(checksum(values[start : start + 164]) for start in range(0, 400, 164))],
        "scale": [3, checksum(arrays["scale"])],
        "number": [1, checksum(arrays["number"])],
    }
    for metadata in (checksums(arrays), {"crc32": json.dumps(blocks)}):  # also the form that files had before
        save_file(arrays, path, metadata=metadata)
        for name, array in arrays.items():
            opened = open_safetensors(path)[name]
            np.testing.assert_array_equal(opened.read(), array)
            assert opened.checked
        path.write_bytes(path.read_bytes().replace(values[200].tobytes(), values[201].tobytes()))
        with pytest.raises(UserError, match="its checksum does not fit"):
            open_safetensors(path)["wide"].read()
        part = open_safetensors(path)["wide"].read((slice(0, 400), slice(0, 50)))  # too little to compare
        np.testing.assert_array_equal(part[:200], values[:200, :50])


def test_weights_over_the_size_of_a_file_are_written_to_several_and_read_as_one(tmp_path, monkeypatch):
    model = tiny.model()
    monkeypatch.setattr(tensors, "_FILE_BYTES", 4000)
    save_backbone(model, tmp_path, "float32")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    loaded = load_backbone(tmp_path).model
    for one, other in zip(*(jax.tree.leaves(nnx.state(each)) for each in (loaded, model)), strict=True):
        np.testing.assert_array_equal(one, other)
    monkeypatch.undo()
    smaller = tiny.model(1, num_layers=1)
    save_backbone(smaller, tmp_path, "float32")  # the index of the larger one must not win
    assert load_backbone(tmp_path).settings == smaller.settings


def test_weights_lie_as_the_mesh_that_has_been_entered_says(tmp_path, monkeypatch):
    model = tiny.model()
    save_backbone(model, tmp_path, "float32")
    mesh, asked = Mesh().build(jax.devices()[:1]), []

    def where(mesh, variable):
        asked.append((variable.get_metadata()["axes"], variable.shape))
        return NamedSharding(mesh, PartitionSpec())

    monkeypatch.setattr(backbone, "current_mesh", lambda: mesh)
    monkeypatch.setattr(backbone, "variable_sharding", where)
    loaded = load_backbone(tmp_path, "bfloat16")
    leaves = flatten(nnx.to_pure_dict(nnx.state(loaded.model)))
    assert loaded.mesh is mesh
    assert len(asked) == len(leaves)
    assert (("embed", "heads"), (2, 16, 16)) in asked
    assert {leaf.sharding for leaf in leaves.values()} == {NamedSharding(mesh, PartitionSpec())}
    assert {leaf.dtype.name for leaf in leaves.values()} == {"bfloat16"}


@pytest.mark.slow
def test_four_processes_ask_for_a_quarter_each(tmp_path):
    sizes: dict[str, Any] = {"num_heads": 8, "d_model": 128, "d_kv": 16, "d_ff": 256, "vocabulary_rows": 512}
    save_backbone(tiny.model(**sizes), tmp_path, "float32")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = (tmp_path / "model.safetensors").stat().st_size
    processes = [measured(str(tmp_path), "float32", "4", str(number), port) for number in range(4)]
    answers = [answer(process) for process in processes]
    assert {found["fingerprint"] for found in answers} == {load_backbone(tmp_path).fingerprint()}
    for found in answers:
        shares = {name: found[name] / size for name in ("requested", "own")}
        assert 0.24 < shares["own"] < 0.27
        assert 0.24 < shares["requested"] < 0.30  # norms and position biases whole; some rows to compare the tables
    print("of", size, "bytes:", [found["requested"] for found in answers])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_three_billion_parameters_load_in_little_more_than_their_own_memory(tmp_path):
    size = write_sparse(tmp_path, preset("t5-v1_1-xl"), 2 << 30)
    assert size == 2 * 2_849_757_184
    found = answer(measured(str(tmp_path), "bfloat16"))
    print(f"weights {size / 1e9:.2f} GB, anonymous memory at its peak {found['peak'] / 1e9:.2f} GB")
    assert found["own"] == size
    assert size <= found["requested"] < 1.01 * size
    assert found["peak"] < size + 1.5e9


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_backbone_is_never_whole_while_it_is_quantised(tmp_path):
    size = write_sparse(tmp_path, preset("t5-v1_1-large"), 2 << 30)  # bfloat16
    found = answer(measured(str(tmp_path), "bfloat16+int8"))
    print(f"weights {found['own'] / 1e9:.2f} GB of {size / 1e9:.2f}, at its peak {found['peak'] / 1e9:.2f} GB")
    assert found["own"] < 0.56 * size
    assert found["peak"] < found["own"] + 0.7e9 < size  # some stacks of 138 MB, and what XLA compiles
