"""Files of torch are read without torch; nothing that one asks for is ever run."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import softprompt_jax
from softprompt_jax.checkpoints.backbone import load_backbone, save_backbone
from softprompt_jax.checkpoints.torch_file import open_torch
from softprompt_jax.config import UserError

TYPES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}
VALUES = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(key: str, dtype: str, count: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """Write the pickle of a tensor as torch does."""
    storage = b"(" + text("storage") + f"ctorch\n{TYPES[dtype]}\n".encode() + text(key) + text("cpu") + number(count)
    arguments = b"(" + storage + b"tQ" + number(offset) + numbers(shape) + numbers(strides) + b"\x89"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"ccollections\nOrderedDict\n)RtR"


def save(path: Path, pickled: bytes, storages: dict[str, np.ndarray], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        for key, values in storages.items():
            archive.writestr(f"archive/data/{key}", values.tobytes())
        archive.writestr("archive/version", b"3\n")
    return path


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Save contiguous tensors, each in a storage of its own."""
    parts = b""
    for key, (name, values) in enumerate(tensors.items()):
        strides = tuple(int(np.prod(values.shape[axis + 1 :])) for axis in range(values.ndim))
        parts += text(name) + tensor(str(key), values.dtype.name, values.size, 0, values.shape, strides)
    storages = {str(key): values for key, values in enumerate(tensors.values())}
    return save(path, b"ccollections\nOrderedDict\n)R(" + parts + b"u", storages)


def of_values(path: Path, offset=0, shape=(6, 4), strides=(4, 1), count=24, dtype="float32", values=VALUES) -> Path:
    pickled = b"}" + text("w") + tensor("0", dtype, count, offset, shape, strides) + b"s"
    return save(path, pickled, {"0": values})


def test_a_backbone_in_torchs_format_is_the_one_in_safetensors(tmp_path):
    save_backbone(tiny.model(), tmp_path, "float32")
    expected = load_backbone(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    save_tensors(tmp_path / "pytorch_model.bin", tensors)
    found = load_backbone(tmp_path)
    assert found.fingerprint() == expected.fingerprint()
    batch = tiny.batch()
    np.testing.assert_array_equal(tiny.forward(found.model, batch), tiny.forward(expected.model, batch))
    # and in several files
    (tmp_path / "pytorch_model.bin").unlink()
    halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": sorted(tensors)[i::2] for i in range(2)}
    for file, members in halves.items():
        save_tensors(tmp_path / file, {name: tensors[name] for name in members})
    index = {"weight_map": {name: file for file, members in halves.items() for name in members}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(tiny.forward(load_backbone(tmp_path).model, batch), tiny.forward(found.model, batch))
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=f"{file}: missing; expected every file that the index names"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_of_every_width_are_read_whole_and_in_parts(tmp_path, dtype):
    values = VALUES.astype(jnp.dtype(dtype))
    found = open_torch(of_values(tmp_path / "w.bin", dtype=dtype, values=values))["w"]
    np.testing.assert_array_equal(found.read(), values)
    assert found.read().dtype == values.dtype
    np.testing.assert_array_equal(found.read((slice(2, 5), slice(1, 3))), values[2:5, 1:3])


def test_strides_offsets_and_shared_storages_are_followed(tmp_path):
    pickled = b"}(" + text("turned") + tensor("0", "float32", 24, 0, (4, 6), (1, 4))
    pickled += text("rows") + tensor("0", "float32", 24, 8, (2, 4), (4, 1)) + b"u"
    found = open_torch(save(tmp_path / "w.bin", pickled, {"0": VALUES}))
    np.testing.assert_array_equal(found["turned"].read(), VALUES.T)
    np.testing.assert_array_equal(found["rows"].read(), VALUES[2:4])


def test_an_old_adapter_of_peft_is_attached_from_its_bin(shared_fixtures, tmp_path):
    source = shared_fixtures / "peft" / "PROMPT_TUNING_SUB1"
    (tmp_path / "adapter_config.json").write_bytes((source / "adapter" / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter" / "adapter_model.safetensors")
    save_tensors(tmp_path / "adapter_model.bin", tensors)
    model = softprompt_jax.load_backbone(source / "backbone", adapter=tmp_path).model
    np.testing.assert_array_equal(model.prompt.rows[...], tensors["prompt_embeddings"])


# --------------------------------------------------------------------------------------------- errors


def refused(path: Path, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)


def read_all(path: Path) -> None:
    for found in open_torch(path).values():
        found.read()


class Hostile:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize(("function", "name"), [(os.mkdir, f"{os.name}.mkdir"), (eval, "eval"), (getattr, "getattr")])
def test_nothing_that_a_file_names_is_run(tmp_path, protocol, function, name):
    arguments = {os.mkdir: (str(tmp_path / "ran"),), getattr: (os, "system")}
    arguments = arguments.get(function, (f"__import__('os').mkdir({str(tmp_path / 'ran')!r})",))
    if function is getattr:
        arguments = ("", "upper")
    pickled = pickle.dumps({"w": Hostile(function, *arguments)}, protocol=protocol)
    path = tmp_path / "w.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    refused(path, rf"asks for \w+\.{name.split('.')[-1]}, which no tensor needs.*nothing of it was run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "asked",
    [
        *["torch\nload", "torch._utils\n_rebuild_sparse_tensor", "torch.serialization\n_load", "numpy\nload"],
        *["collections\ndefaultdict", "torch\nFloatTensor", "builtins\nexec", "torch._utils\n__builtins__.eval"],
    ],
)
def test_every_other_name_is_refused_also_of_torch(tmp_path, asked):
    path = save(tmp_path / "w.bin", b"}" + text("w") + f"c{asked}\n".encode() + b")Rs", {})
    refused(path, rf"asks for {asked.split(chr(10))[0]}\.")


def test_state_that_a_file_sets_on_what_it_may_name_changes_nothing_here(tmp_path):
    """BUILD on a class, a function and a storage type; then an ordinary file still reads."""
    for place in (b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"):
        state = b"N}" + text("__code__") + text("x") + b"s\x86b"
        with pytest.raises(UserError):
            open_torch(save(tmp_path / "bad.bin", b"}" + text("w") + place + state + b"s", {}))
    items = b"ccollections\nOrderedDict\n)R}" + text("items") + text("x") + b"sb"
    assert open_torch(save(tmp_path / "odd.bin", items, {})) == {}
    np.testing.assert_array_equal(open_torch(of_values(tmp_path / "w.bin"))["w"].read(), VALUES)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"count": 25}, "tensor w cannot be read .*has 96 bytes instead of 100"),
        ({"count": -1}, "its shape is no list of numbers"),
        ({"offset": 1}, r"its shape \[6, 4\] does not fit its storage of 24 numbers"),
        ({"shape": (7, 4)}, "does not fit"),
        ({"strides": (5, 1)}, "does not fit"),
        ({"shape": (1 << 30, 1 << 30), "strides": (0, 0)}, "does not fit"),
        ({"strides": (-4, 1), "offset": 20}, "its shape is no list of numbers"),
        ({"shape": (24,)}, "tensor w cannot be read"),
        ({"dtype": "int64"}, "has 96 bytes instead of 192"),
        ({"values": np.full((6, 4), np.inf, np.float32)}, "tensor w: holds numbers that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_their_storage_are_refused(tmp_path, changes, problem):
    refused(of_values(tmp_path / "w.bin", **changes), problem)


def test_keys_that_take_years_to_hash_and_endless_shapes_are_refused(tmp_path):
    doubled = b"}" + b")" + b"q\x00h\x00\x86" * 45  # 45 times (x, x) of itself: as a key 2^45 hashes
    path = tmp_path / "w.bin"
    refused(save(path, doubled + b"Ns", {}), "a key that is no text")
    refused(save(path, b"}(" + doubled[1:] + b"Nu", {}), "a key that is no text")
    deep = b"}" + b")" + b"\x85" * 1_000_000
    refused(save(path, deep + b"Ns", {}), "a key that is no text")
    refused(save(path, b"(" + doubled[1:] + b"Nd", {}), "a key that is no text")
    for odd in (b"\x8f(" + doubled[1:] + b"\x90", b"\x96" + struct.pack("<Q", 1 << 40)):
        refused(save(path, odd, {}), "its pickle cannot be read")
    endless = b"(\x8a\x09" + (1 << 70).to_bytes(9, "little") + number(0) + b"t"
    pickled = b"}" + text("w") + tensor("0", "float32", 0, 0, (), ()).replace(b"(t(t", endless * 2) + b"s"
    refused(save(path, pickled, {"0": VALUES[:0]}), "its shape is no list of numbers")


def test_files_of_other_kinds_and_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "w.bin"
    good = of_values(path).read_bytes()
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
    refused(path, r"the format of torch before 1\.6; .* load and save it again with a newer torch")
    for content in (b"", b"PK\x03\x04", good[:200], good[:-30], b"<html>not found</html>"):
        path.write_bytes(content)
        refused(path, "w.bin: not a complete file of torch")
    place = good.index(VALUES.tobytes())
    path.write_bytes(good[: place + 50] + bytes([good[place + 50] ^ 1]) + good[place + 51 :])  # one bit
    refused(path, "w.bin: tensor w: cannot be read .its checksum does not fit")
    place = good.index(b"data.pkl") + 20
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    refused(path, "w.bin: not a complete file of torch")
    save(path, b"}" + text("w") + tensor("0", "float32", 24, 0, (6, 4), (4, 1)) + b"s", {"1": VALUES})
    refused(path, "no storage archive/data/0")
    save(path, b"}" + text("w") + tensor("0", "float32", 24, 0, (6, 4), (4, 1)) + b"s", {"0": VALUES * 0}, 8)
    refused(path, "its storage archive/data/0 is compressed")
    for odd in (b"}" + text("w") + number(3) + b"s", b"](" + number(1) + b"e", text("hello")):
        refused(save(path, odd, {}), "holds other things than tensors by name")
    refused(save(path, b"}" + number(1) + b")s", {}), "its pickle cannot be read")
    refused(save(path, b"}" + text("w") + b")s", {}), "tensor w cannot be read")
    refused(save(path, b"}0R", {}), "its pickle cannot be read")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    refused(path, "not a complete file of torch")


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_torch_saves_is_what_we_read(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    wanted = getattr(torch, dtype)
    base = torch.randn(40, 8).to(wanted)
    saved = {
        "whole": base,
        "turned": base.T,
        "part": base[3:9, 2:6],
        "shared": base,
        "parameter": torch.nn.Parameter(torch.randn(3, 5).to(wanted)),
        "scalar": torch.tensor(2.5, dtype=wanted),
        "empty": torch.zeros(0, 4, dtype=wanted),
        "numbers": torch.arange(5),
    }
    torch.save(saved, tmp_path / "w.bin")
    found = open_torch(tmp_path / "w.bin")
    assert found.keys() == saved.keys()
    for name, value in saved.items():
        as_torch = torch.from_numpy(found[name].read().astype(np.float64))
        assert torch.equal(as_torch, value.detach().double()), name
        assert found[name].shape == tuple(value.shape)
        assert found[name].read().dtype.name == str(value.dtype).removeprefix("torch.")


@pytest.mark.torch
def test_a_state_with_metadata_and_the_old_format(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    torch.save(module.state_dict(), tmp_path / "w.bin")  # an OrderedDict that carries `_metadata`
    found = open_torch(tmp_path / "w.bin")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tuple(value.shape) for name, value in module.state_dict().items()
    }
    torch.save(module.state_dict(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.bin", r"the format of torch before 1\.6")
    torch.save(module, tmp_path / "module.bin")
    refused(tmp_path / "module.bin", "asks for torch.nn.modules.container.Sequential")
