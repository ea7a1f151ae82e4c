"""Hugging Face's layout of a model: a folder's `config.json`, and the files that its weights are in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flax import nnx

from softprompt_jax.checkpoints.tensors import Tensor, open_safetensors, open_sharded
from softprompt_jax.checkpoints.torch_file import open_torch
from softprompt_jax.config import UserError
from softprompt_jax.models.families.t5 import is_stacked, names
from softprompt_jax.models.t5 import T5Settings, abstract
from softprompt_jax.trees import flatten


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json; expected a T5 in Hugging Face layout") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); expected a T5 config") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: found {type(config).__name__}; expected a T5 config, a JSON object")
    return config


def open_folder(folder: Path) -> dict[str, Tensor]:
    """Open the weights of a folder, in one file or several, safetensors before torch's `.bin`."""
    for file, open_file in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_torch)):
        if tensors := open_sharded(folder / file, open_file):
            return tensors
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{folder}: found {found}; expected weights: model.safetensors, pytorch_model.bin or their sharded forms"
    )


def weight_parts(settings: T5Settings, tensors: dict[str, Tensor], source: str | Path) -> dict[str, tuple[Tensor, ...]]:
    """Return for each weight of ours the tensors that it is made of, one a layer, turned as we have them.

    Errors: UserError for tensors that are not those of the settings: missing, surplus, or of another shape.
    """
    table = names(settings)
    expected = {name for tensor_names, _ in table.values() for name in tensor_names}
    if missing := sorted(expected - tensors.keys()):
        raise UserError(f"{source}: {len(missing)} weights are missing, first {missing[0]}; expected a complete T5")
    if surplus := sorted(tensors.keys() - expected):
        raise UserError(f"{source}: {len(surplus)} weights are unknown, first {surplus[0]}; expected only a T5's")
    shapes = {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(nnx.state(abstract(settings)))).items()}
    parts = {}
    for path, (tensor_names, transposed) in table.items():
        shape = shapes[path][1:] if is_stacked(path) else shapes[path]
        parts[path] = tuple(tensors[name].transposed() if transposed else tensors[name] for name in tensor_names)
        if wrong := next((part for part in parts[path] if part.shape != shape), None):
            raise UserError(
                f"tensor {wrong.name}: found shape {list(wrong.shape)}; expected {list(shape)} as the settings say"
            )
    return parts
