"""PEFT's names for the modules of a model, and which settings of an adapter a method must understand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt_jax.config import UserError
from softprompt_jax.models.families import names
from softprompt_jax.models.settings import ModelSettings

_PREFIX = "base_model.model."
# Of every adapter: where it comes from, and what the file's own tensors say better.
_OF_ALL = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version", "auto_mapping"),
    *("inference_mode", "target_modules", "exclude_modules"),
}


def check_settings(config: Mapping[str, Any], understood: set[str]) -> None:
    """Refuse a setting that is not understood and not off: it may change what the adapter computes."""
    for name, value in config.items():
        if name not in understood | _OF_ALL and value not in (None, False, 0, "", "none", [], {}):
            raise UserError(
                f"{name} is {value!r}; expected it to be off, since there is no such thing here; "
                "merge the adapter in PEFT and load the merged model"
            )


def prompt_config(settings: ModelSettings, length: int, submodules: int = 1) -> dict[str, Any]:
    """Return what adapter_config.json says of every prompt and prefix; `submodules`: 2 where the decoder has one."""
    return {
        "num_virtual_tokens": length,
        "num_transformer_submodules": submodules,
        "token_dim": settings.d_model,
        "num_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
    }


def modules(settings: ModelSettings, weight: str) -> list[str]:
    """Return the Hugging Face modules, one a layer, of a weight of ours (`encoder.layers.attention.query.kernel`)."""
    return [name.rpartition(".")[0] for name in names(settings)[weight].tensors]


def products(settings: ModelSettings, weights: Iterable[str]) -> list[list[str]]:
    """Group weights of ours by the product of Hugging Face's that they are: alone, or query, key and value of a fused.

    A group has all weights of its product, in order, also those that are not among `weights`.
    """
    table = names(settings)
    found = {}
    for weight in weights:
        tensors = table[weight].tensors
        together = [other for other in table if table[other].tensors == tensors] if table[weight].share else [weight]
        found[tensors[0]] = sorted(together, key=lambda other: table[other].share or 0)
    return list(found.values())


def join(settings: ModelSettings, group: Sequence[str], parts: Sequence[np.ndarray]) -> np.ndarray:
    """Put what belongs to the outputs [..., out] of a group of `products` together as Hugging Face has them."""
    share = names(settings)[group[0]].share
    return parts[0] if share is None else share.join(parts)


def own_part(settings: ModelSettings, weight: str, values: np.ndarray) -> np.ndarray:
    """Return of what belongs to the outputs [..., out] of a product the part of one of our weights."""
    share = names(settings)[weight].share
    return values if share is None else share.part(values)


def fan_in_fan_out(settings: ModelSettings) -> bool:
    """Tell whether kernels are stored as [in, out] (GPT-2), which an adapter's settings say."""
    return not names(settings)["decoder.layers.attention.query.kernel"].transposed


def shortest(found: Sequence[str], known: Iterable[str]) -> list[str]:
    """Name places by their last part where all places of that name are meant, and by their whole path elsewhere."""
    partly = {path.rpartition(".")[2] for path in set(known) - set(found)}
    ends = ((path, path.rpartition(".")[2]) for path in found)
    return list(dict.fromkeys(path if last in partly else last for path, last in ends))


def target_modules(settings: ModelSettings, places: Sequence[str], ending: str) -> list[str]:
    """Return the names by which PEFT finds exactly the modules of these places, among all whose path ends so."""
    known = [module for weight in names(settings) if weight.endswith(ending) for module in modules(settings, weight)]
    return shortest([module for place in places for module in modules(settings, place + ending)], known)


def short_paths(settings: ModelSettings, places: Sequence[str], ending: str) -> list[str]:
    """Return patterns that match exactly these places of ours, among all whose weights' path ends so."""
    known = [
        weight.removesuffix(ending) for weight in names(settings) if weight.endswith(ending) and weight[:4] != "head"
    ]
    return shortest(sorted(places), known)


def to_layers(settings: ModelSettings, weight: str, ending: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Take a stack of a method's values at one of our weights apart: a tensor for each module, named as PEFT does."""
    found = modules(settings, weight)
    values = values if ".layers." in weight else values[None]
    return {f"{_PREFIX}{name}.{ending}": np.ascontiguousarray(v) for name, v in zip(found, values, strict=True)}


def from_layers(
    settings: ModelSettings, tensors: Mapping[str, np.ndarray], endings: Sequence[str], of: str
) -> dict[str, dict[str, np.ndarray]]:
    """Stack an adapter's tensors: place of ours (the path of its weight without `of`) -> ending -> values [L, ...].

    Each part of a fused product gets the product's tensors.

    Errors: UserError for a tensor that no module of this backbone has, and for modules of some layers only.
    """
    places: dict[str, list[tuple[str, int]]] = {}
    for weight in names(settings):
        for layer, module in enumerate(modules(settings, weight) if weight.endswith(of) else ()):
            places.setdefault(module, []).append((weight, layer))
    pattern = re.compile(rf"{re.escape(_PREFIX)}(.+)\.({'|'.join(map(re.escape, endings))})(?:\.weight)?")
    stacks: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match is None or match[1] not in places:
            raise UserError(
                f"tensor {name}: no such place in this backbone; expected an adapter of this model; give its own"
            )
        for weight, layer in places[match[1]]:
            stacks.setdefault((weight, match[2]), {})[layer] = tensor
    made: dict[str, dict[str, np.ndarray]] = {}
    for (weight, ending), layers in stacks.items():
        found = modules(settings, weight)
        for layer, module in enumerate(found):
            if layer not in layers or layers[layer].shape != next(iter(layers.values())).shape:
                raise UserError(
                    f"{module}.{ending}: missing or of another shape than in other layers; expected equal ones in "
                    f"all {len(found)} layers, which are stacked here; merge it in PEFT and load that model"
                )
        values = np.stack([layers[layer] for layer in range(len(found))])
        made.setdefault(weight.removesuffix(of), {})[ending] = values if ".layers." in weight else values[0]
    return made
