"""Files of strangers: whatever their bytes say, the answer is a value or a UserError, in memory like their size.

By default a few seconds for each kind of file; LONG=1 takes ten minutes in all.
"""

from __future__ import annotations

import functools
import io
import json
import os
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_file
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from test_torch_file import VALUES, save_tensors

from softprompt_jax.assembly import run_of
from softprompt_jax.checkpoints import gguf, gguf_model, gguf_tokenizer, peft
from softprompt_jax.checkpoints.artifact import load_artifact, save_prompt
from softprompt_jax.checkpoints.tensors import open_safetensors
from softprompt_jax.checkpoints.torch_file import open_torch
from softprompt_jax.config import UserError
from softprompt_jax.export.show import show

LONG = bool(os.environ.get("LONG"))
MOST = 64  # bytes of memory for each byte of a file, and
SPARE = 4 << 20  # bytes whatever its size
VALUES_OF_WIDTH = np.ones(16, np.float32)
RUN = {"task": "spam_sms", "methods": [{"kind": "prompt", "length": 3}]}

# ---------------------------------------------------------------------------------------------- reading


def read_prompt(path: Path) -> None:
    artifact = load_artifact(path)
    run_of(artifact)
    assert np.isfinite(artifact.prompt).all()
    list(show(str(path)))


def read_trained(path: Path) -> None:
    artifact = load_artifact(path)
    run_of(artifact)
    assert isinstance(artifact.tree, dict)
    list(show(str(path)))


def read_safetensors(path: Path) -> None:
    for tensor in open_safetensors(path).values():
        tensor.read()


def read_torch(path: Path) -> None:
    for tensor in open_torch(path).values():
        tensor.read()


def read_gguf(path: Path) -> None:
    opened = gguf.open_gguf(path)
    gguf_tokenizer.tokenizer_files(opened)
    for tensor in gguf_model.open_model(path)[1].values():
        tensor.read()


@functools.cache
def backbone():
    return tiny.model()


def read_adapter(path: Path) -> None:
    (path.parent / peft.CONFIG_FILE).write_bytes(path.read_bytes())
    before = backbone().prompt
    try:
        peft.attach_adapter(backbone(), path.parent)
    finally:
        backbone().prompt = before


@functools.cache
def warm() -> None:
    """Import and compile once what reading needs, which is no matter of a file's size."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / peft.TENSOR_FILE
        adapter.write_bytes(save({"prompt_embeddings": np.ones((3, 16), np.float32)}))
        for kind, (read, name) in READERS.items():
            (Path(folder) / name).write_bytes(valid(kind, Path(folder)))
            read(Path(folder) / name)


def judged(read: Callable[[Path], None], path: Path, content: bytes) -> None:
    """Read a file: no error but ours, and no more memory than its size allows."""
    path.write_bytes(content)
    warm()
    Path("/proc/self/clear_refs").write_text("5")  # the peak below begins anew
    before = resident("VmRSS")
    tracemalloc.start()
    try:
        read(path)
    except UserError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < SPARE + MOST * len(content), f"{peak} bytes for a file of {len(content)}"
    assert resident("VmHWM") - before < 1 << 20


def resident(name: str) -> int:
    """Return a number of KiB that the kernel knows of this process."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


# ---------------------------------------------------------------------------------------------- making

NUMBERS = [0, 1, 2, 3, 127, 255, 65535, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
TEXTS = [b"[" * 9000, b"(" * 9000, b"{", b"}", b'"', b"null", b"NaN", b"-1", b"1e999", b"9" * 5000, b"\xff", b"\0" * 64]
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 1 << 16), st.integers(1, 255)),
        st.tuples(st.just("number"), st.integers(0, 1 << 16), st.sampled_from(NUMBERS)),
        st.tuples(st.just("insert"), st.integers(0, 1 << 16), st.sampled_from(TEXTS)),
        st.tuples(st.just("cut"), st.integers(0, 1 << 16), st.integers(1, 64)),
        st.tuples(st.just("end"), st.integers(0, 1 << 16), st.just(0)),
    ),
    min_size=1,
    max_size=4,
)


def changed(content: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    """Return a file's bytes with some changes, each at a place that is taken modulo its size."""
    for kind, place, value in changes:
        place %= len(content) + 1
        if kind == "flip" and place < len(content):
            content = content[:place] + bytes([content[place] ^ value]) + content[place + 1 :]
        elif kind == "number":
            content = content[:place] + struct.pack("<Q", value) + content[place + 8 :]
        elif kind == "insert":
            content = content[:place] + value + content[place:]
        elif kind == "cut":
            content = content[:place] + content[place + value :]
        elif kind == "end":
            content = content[:place]
    return content


VALUES_OF_JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.sampled_from(NUMBERS), st.just(-1), st.floats(), st.sampled_from(["", "prompt"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["prompt", "kind", "length", "task", "methods", "name", "a"]), inner, max_size=4
        ),
    ),
    max_leaves=12,
)


@functools.cache
def valid(kind: str, folder: Path) -> bytes:
    """Return the bytes of a good file."""
    path = folder / "valid"
    if kind == "npy":
        np.save(buffer := io.BytesIO(), np.ones((3, 16), np.float32))
        return buffer.getvalue()
    if kind == "prompt":
        save_prompt(np.ones((3, 16), np.float32), path, {"settings": json.dumps(RUN)})
    elif kind == "trained":
        return save({"prompt.rows": np.ones((3, 16), np.float32)}, {"settings": json.dumps(RUN)})
    elif kind == "compact":
        numbers = {"numbers": np.ones((3, 2), np.float32), "scale": VALUES_OF_WIDTH, "shift": VALUES_OF_WIDTH}
        return save(numbers, {"seed": "7", "settings": json.dumps(RUN)})
    elif kind == "torch":
        save_tensors(path, {"w": VALUES, "v": VALUES[0]})
    elif kind == "gguf":
        gguf_file.llama(path)
    else:
        return json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 3}).encode()
    return path.read_bytes()


READERS = {
    "npy": (read_prompt, "p.npy"),
    "prompt": (read_prompt, "p.safetensors"),
    "trained": (read_trained, "p.safetensors"),
    "compact": (read_prompt, "p.safetensors"),
    "torch": (read_torch, "p.bin"),
    "gguf": (read_gguf, "p.gguf"),
    "adapter": (read_adapter, "p.json"),
}
limits = settings(
    max_examples=3000 if LONG else 40,
    deadline=None,
    database=None,
    derandomize=not LONG,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def place(tmp_path):
    """Return a folder in which an adapter's tensors lie."""
    (tmp_path / peft.TENSOR_FILE).write_bytes(save({"prompt_embeddings": np.ones((3, 16), np.float32)}))
    return tmp_path


@pytest.mark.parametrize("kind", READERS)
@limits
@given(changes=CHANGES)
@example(changes=[("insert", 60, b"(" * 9000)])
@example(changes=[("number", 0, (1 << 64) - 1)])
@example(changes=[("flip", 6, 3)])  # .npy 2.0, whose header says that it has 662 MB
def test_changed_files_are_read_or_refused(kind, place, changes):
    read, name = READERS[kind]
    judged(read, place / name, changed(valid(kind, place), changes))


@pytest.mark.parametrize("key", ["settings", "crc32", "fingerprint", "length"])
@pytest.mark.parametrize("kind", ["prompt", "trained"])
@limits
@given(value=VALUES_OF_JSON)
@example(value={"prompt": [0, 1]})
@example(value={"prompt": ["a", 1]})
@example(value={"prompt": [None, 1]})
@example(value={"task": "spam_sms", "methods": [{"kind": "prefix", "length": 1_000_000}]})
@example(value="[" * 100_000)
@example(value={"task": {"kind": []}})
def test_metadata_are_read_or_refused(kind, key, place, value):
    text = value if isinstance(value, str) else json.dumps(value)
    name = "prompt" if kind == "prompt" else "prompt.rows"
    judged(READERS[kind][0], place / "p.safetensors", save({name: np.ones((3, 16), np.float32)}, {key: text}))


@limits
@given(
    st.tuples(*[st.sampled_from(NUMBERS)] * 2),
    st.sampled_from(["<f4", "<f8", "|O", "<U9", "|b1", "<c8"]),
    st.booleans(),
)
@example((10**12, 160), "<f4", False)
@example((10**12, 0), "<f4", False)
@example((0, (1 << 64) - 1), "<f4", False)
@example((10**8, 160), "<f4", False)
def test_headers_of_npy_are_read_or_refused(place, shape, dtype, fortran):
    header = repr({"descr": dtype, "fortran_order": fortran, "shape": shape}).encode().ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(192)
    judged(read_prompt, place / "p.npy", content)


@limits
@given(
    st.dictionaries(
        st.sampled_from(["a", "a.b", "prompt", "prompt.rows", "..", "", "a" + ".b" * 5000]),
        st.tuples(st.lists(st.sampled_from([0, 1, 3, 10**12, 1 << 40]), max_size=3), st.integers(0, 12)),
        max_size=3,
    )
)
@example({"a": ([1], 4), "a.b": ([1], 4)})
@example({"prompt": ([10**12, 0], 0)})
def test_headers_of_safetensors_are_read_or_refused(place, tensors):
    header, start = {}, 0
    for name, (shape, size) in tensors.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    judged(read_trained, place / "p.safetensors", struct.pack("<Q", len(text)) + text + bytes(start))


@limits
@given(
    st.dictionaries(
        st.sampled_from(
            ["r", "num_virtual_tokens", "lora_alpha", "target_modules", "task_type", "modules_to_save", "bias"]
        ),
        VALUES_OF_JSON,
    ),
    st.sampled_from(sorted(peft._KINDS)),
)
@example({"num_virtual_tokens": 10**9}, "MULTITASK_PROMPT_TUNING")
@example({"r": 10**9}, "LORA")
def test_settings_of_adapters_are_read_or_refused(place, values, kind):
    judged(read_adapter, place / "p.json", json.dumps(values | {"peft_type": kind}).encode())
