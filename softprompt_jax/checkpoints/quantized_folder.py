"""A quantised backbone on disk: `quantized.json`, `quantized.safetensors` and the tokenizer's files.

transformers cannot read it, so that there is no config.json. Tensors have the paths of our model, layers stacked:
kernels as packed integers and their float32 scales, all else in floats.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from flax import nnx
from pydantic import SerializeAsAny

from softprompt_jax.checkpoints.tensors import Tensor, open_sharded, write_sharded
from softprompt_jax.config import Settings, UserError, parse
from softprompt_jax.files import read_object, writable
from softprompt_jax.models.build import settings_class
from softprompt_jax.models.language_model import LanguageModel
from softprompt_jax.models.quantized import Quantization, abstract_quantized, quantization_of
from softprompt_jax.models.settings import ModelSettings
from softprompt_jax.trees import flatten

ABOUT, TENSORS = "quantized.json", "quantized.safetensors"


class About(Settings):
    """What stands in `quantized.json`."""

    quantize: Quantization
    settings: SerializeAsAny[ModelSettings]
    fingerprint: str  # that of the float backbone: what was trained on one is taken by the other
    source: str  # what it was made from


def is_quantized_folder(source: str | Path) -> bool:
    """Tell whether a source is the folder of a quantised backbone."""
    return (Path(source).expanduser() / ABOUT).is_file()


def read_about(folder: str | Path, quantize: Quantization | None = None) -> About:
    """Read what a quantised backbone is, without its weights; another kind than `quantize` is a UserError."""
    path = Path(folder).expanduser() / ABOUT
    values = read_object(path, "what import --quantize wrote")
    if isinstance(stated := values.get("settings"), dict):
        values["settings"] = parse(settings_class(stated.get("family", "t5")), stated, f"{path}: settings")
    about = parse(About, values, str(path))
    if quantize not in (None, about.quantize):
        raise UserError(
            f"backbone {folder}: is stored in {about.quantize}; expected quantize: {about.quantize} or none, found "
            f"{quantize}; quantise the original"
        )
    return about


def save(model: LanguageModel, folder: Path, source: str, fingerprint: str) -> None:
    """Write a quantised model as it is: its floats stay in their dtype."""
    kind = quantization_of(model)
    if kind is None:
        raise UserError(f"{source}: is not quantised; expected a backbone in int8 or nf4; load it with quantize")
    about = About(quantize=kind, settings=model.settings, fingerprint=fingerprint, source=source)
    leaves = flatten(nnx.to_pure_dict(nnx.state(model))).items()
    with writable(folder, folder=True):
        write_sharded(folder / TENSORS, ((path, np.asarray(leaf)) for path, leaf in leaves), {})
        (folder / ABOUT).write_text(json.dumps(about.model_dump(mode="json"), indent=2) + "\n")


def weight_parts(folder: str | Path, about: About) -> dict[str, tuple[Tensor, ...]]:
    """Return for each weight of ours the tensor that it is; one that is missing or does not fit is a UserError."""
    tensors, parts = open_sharded(Path(folder).expanduser() / TENSORS), {}
    model = abstract_quantized(about.settings, "float32", about.quantize)
    for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items():
        if path not in tensors or tensors[path].shape != leaf.shape:
            found = list(tensors[path].shape) if path in tensors else "none"
            raise UserError(f"{folder}: {path}: found {found}; expected {list(leaf.shape)}; import it again")
        parts[path] = (tensors[path],)
    return parts
