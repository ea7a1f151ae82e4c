"""Hugging Face's layout: a folder's `config.json`, and the files that its weights are in."""

from __future__ import annotations

import json
from pathlib import Path

from flax import nnx

from softprompt_jax.checkpoints.tensors import Tensor, open_safetensors
from softprompt_jax.checkpoints.torch_file import open_torch
from softprompt_jax.config import UserError
from softprompt_jax.models.families import t5
from softprompt_jax.models.families.t5 import EMBEDDING_ALIASES, HEAD, is_stacked, names
from softprompt_jax.models.t5 import T5Settings, abstract
from softprompt_jax.trees import flatten


def read_settings(folder: Path) -> tuple[T5Settings, bool | None, bool]:
    """Read `config.json`; also return whether it asks for a scaled output (None: it does not say), and for a head."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json; expected a T5 in Hugging Face layout") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); expected a T5 config") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: found {type(config).__name__}; expected a T5 config, a JSON object")
    return t5.settings_of(config, str(path))


def check(settings: T5Settings, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Refuse tensors that are not those of a T5 of these settings: missing, surplus, or of another shape."""
    table = names(settings)
    check_names(table, tensors, source)
    for path, leaf in flatten(nnx.to_pure_dict(nnx.state(abstract(settings)))).items():
        parts_of(tensors, *table[path], leaf.shape[1:] if is_stacked(path) else leaf.shape)


def embedding_name(tensors: dict[str, Tensor]) -> str:
    """Return what the shared table is called here."""
    return next((name for name in EMBEDDING_ALIASES if name in tensors), EMBEDDING_ALIASES[0])


def check_names(table: dict[str, tuple[list[str], bool]], tensors: dict[str, Tensor], source: str | Path) -> None:
    """Refuse tensors of which some are missing, or which are more than a T5's."""
    expected = {name for tensor_names, _ in table.values() for name in tensor_names}
    found = tensors.keys() | ({EMBEDDING_ALIASES[0]} if embedding_name(tensors) in tensors else set())
    missing = sorted(expected - found)
    if missing:
        raise UserError(f"{source}: {len(missing)} weights are missing, first {missing[0]}; expected a complete T5")
    surplus = sorted(n for n in found - expected - {*EMBEDDING_ALIASES, HEAD} if not t5.IGNORED.fullmatch(n))
    if surplus:
        raise UserError(f"{source}: {len(surplus)} weights are unknown, first {surplus[0]}; expected only a T5's")


def parts_of(tensors: dict[str, Tensor], tensor_names: list[str], transposed: bool, shape: tuple) -> list[Tensor]:
    """Return the tensors, one a layer, that make up a weight of ours of this shape."""
    parts = []
    for name in tensor_names:
        tensor = tensors[embedding_name(tensors) if name == EMBEDDING_ALIASES[0] else name]
        tensor = tensor.transposed() if transposed else tensor
        if tensor.shape != shape:
            raise UserError(
                f"tensor {tensor.name}: found shape {list(tensor.shape)}; expected {list(shape)} as the settings say"
            )
        parts.append(tensor)
    return parts


def open_folder(folder: Path) -> dict[str, Tensor]:
    """Open the weights of a Hugging Face folder, in one file or several, safetensors before torch's `.bin`."""
    for single, open_file in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_torch)):
        index = folder / f"{single}.index.json"
        if index.exists():
            return {name: tensor for path in _listed(index) for name, tensor in open_file(path).items()}
        if (folder / single).exists():
            return open_file(folder / single)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{folder}: found {found}; expected weights: model.safetensors, pytorch_model.bin or their sharded forms"
    )


def _listed(index: Path) -> list[Path]:
    """Return the files that an index of sharded weights names; they lie beside it."""
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(Path(name).name != name for name in files):
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: not an index of weights; expected a JSON 'weight_map' of files beside it") from None
    return [index.parent / name for name in files]
