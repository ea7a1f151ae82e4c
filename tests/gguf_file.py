"""A small writer of GGUF files, and a tiny Llama in one."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import tiny_lm

TYPES = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}
FORMATS = {np.dtype("<f4"): 0, np.dtype("<f2"): 1}
Stored = tuple[tuple[int, ...], int, bytes]  # shape, number of the format, blocks


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value_of(value: Any) -> bytes:
    """Return a metadata value with its kind before it."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if value >= 0 else struct.pack("<Ii", 5, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", 9, TYPES[value.dtype.str[1:]], len(value)) + value.tobytes()
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))


def pack(metadata: dict[str, Any], tensors: dict[str, np.ndarray | Stored], version: int = 3) -> bytes:
    """Return the bytes of a file."""
    alignment = metadata.get("general.alignment", 32)
    infos, data = b"", b""
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            tensor = tensor.shape, FORMATS[tensor.dtype], tensor.tobytes()
        shape, kind, blocks = tensor
        infos += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += blocks + bytes(-len(blocks) % alignment)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + value_of(value) for key, value in metadata.items()) + infos
    return head + bytes(-len(head) % alignment) + data


def tokenizer_metadata(pre: str = "gpt-2") -> dict[str, Any]:
    """Return the tokenizer of `tiny_lm`."""
    about = json.loads(tiny_lm._tokenizer())["model"]
    pieces = sorted(about["vocab"], key=about["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": np.array([3] * 3 + [1] * (len(pieces) - 3), "<i4"),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in about["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    }


def model_metadata(architecture: str = "llama", **changes) -> dict[str, Any]:
    """Return the sizes of `tiny_lm`'s model."""
    values = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    sizes = {f"{architecture}.{key}": value for key, value in (values | changes).items()}
    return {"general.architecture": architecture, **sizes}


def tensors(rows: int) -> dict[str, np.ndarray]:
    """Return the weights of a tiny Llama; its queries and keys in the order of GGUF."""
    rng, found = np.random.default_rng(0), {}
    for layer in range(2):
        shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
        shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
        for name, shape in shapes.items():
            found[f"blk.{layer}.{name}.weight"] = 0.2 * rng.normal(size=shape)
        for name in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{name}.weight"] = 1 + 0.1 * rng.normal(size=32)
    found["token_embd.weight"] = 0.2 * rng.normal(size=(rows, 32))
    found["output_norm.weight"] = 1 + 0.1 * rng.normal(size=32)
    return {name: values.astype("<f4") for name, values in found.items()}


def llama(path: Path, **changes: Any) -> Path:
    """Write a tiny Llama with a tokenizer; `changes` of its metadata have `__` for a dot."""
    metadata = model_metadata() | tokenizer_metadata() | {k.replace("__", "."): v for k, v in changes.items()}
    path.write_bytes(pack(metadata, tensors(len(metadata["tokenizer.ggml.tokens"]))))
    return path
