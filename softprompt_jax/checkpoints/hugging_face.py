"""Hugging Face's layout of a model: a folder's `config.json`, and the files that its weights are in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from softprompt_jax.checkpoints.tensors import Tensor, open_safetensors, open_sharded
from softprompt_jax.checkpoints.torch_file import open_torch
from softprompt_jax.config import UserError, first_line
from softprompt_jax.models.build import abstract
from softprompt_jax.models.families import is_stacked, names
from softprompt_jax.models.families.common import Weight
from softprompt_jax.models.settings import ModelSettings
from softprompt_jax.trees import flatten

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")


def is_hub_name(source: str | Path) -> bool:
    """Tell whether a source is OWNER/NAME and no path: no folder of the owner's name lies here."""
    return _NAME.fullmatch(str(source)) is not None and not Path(source).parent.exists()


def download(source: str | Path, patterns: Sequence[str], where: str, expected: str) -> Path:
    """Return the hub's cache of a repository's files. Errors: UserError, which begins with `where`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except GatedRepoError:
        raise UserError(
            f"{where}: its licence must be accepted first; expected an account that has done so; accept it on the "
            "model's page, then set HF_TOKEN to a token of that account"
        ) from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reached = f"neither a file nor a folder nor reachable on the hub ({first_line(error)})"
        raise UserError(f"{where}: {reached}; expected {expected}") from None


def open_folder(folder: Path) -> dict[str, Tensor]:
    """Open the weights of a folder, in one file or several, safetensors before torch's `.bin`."""
    for file, open_file in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_torch)):
        if tensors := open_sharded(folder / file, open_file):
            return tensors
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{folder}: found {found}; expected weights: model.safetensors, pytorch_model.bin or their sharded forms"
    )


def weight_parts(
    settings: ModelSettings, tensors: dict[str, Tensor], source: str | Path
) -> dict[str, tuple[Tensor, ...]]:
    """Return for each weight of ours the tensors that it is made of, one a layer, turned as we have them.

    Errors: UserError for tensors that are not those of the settings: missing, surplus, or of another shape.
    """
    table = names(settings)
    expected = {name for weight in table.values() for name in weight.tensors}
    if missing := sorted(expected - tensors.keys()):
        raise UserError(f"{source}: {len(missing)} weights are missing, first {missing[0]}; expected a complete model")
    if surplus := sorted(tensors.keys() - expected):
        raise UserError(
            f"{source}: {len(surplus)} weights are unknown, first {surplus[0]}; expected only those of its model_type"
        )
    shapes = {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(nnx.state(abstract(settings)))).items()}
    parts = {}
    for path, weight in table.items():
        shape = shapes[path][1:] if is_stacked(path) else shapes[path]
        parts[path] = tuple(_turned(tensors[name], weight, shape) for name in weight.tensors)
        if wrong := next((part for part in parts[path] if part.shape != shape), None):
            raise UserError(
                f"tensor {wrong.name}: found shape {list(wrong.shape)}; expected {list(shape)} as the settings say"
            )
    return parts


def _turned(tensor: Tensor, weight: Weight, shape: tuple[int, ...]) -> Tensor:
    """Return the view of a tensor in which it is the weight of ours, which has this shape."""
    if weight.transposed and len(tensor.shape) == 2:
        tensor = tensor.transposed()
    share = weight.share
    if share is None or tensor.shape != (*shape[:-1], share.of * shape[-1]):
        return tensor
    return tensor.share(*share)
