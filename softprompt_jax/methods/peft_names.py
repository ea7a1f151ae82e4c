"""What PEFT calls the places of a T5, and what of an adapter's settings a method must understand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt_jax.config import UserError
from softprompt_jax.models.families.t5 import names
from softprompt_jax.models.t5 import T5Settings

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


def modules(settings: T5Settings, weight: str) -> list[str]:
    """Return the Hugging Face modules, one a layer, of a weight of ours (`encoder.layers.attention.query.kernel`)."""
    return [name.removesuffix(".weight") for name in names(settings)[weight][0]]


def shortest(found: Sequence[str], known: Iterable[str]) -> list[str]:
    """Name places by their last part where all places of that name are meant, and by their whole path elsewhere."""
    chosen: dict[str, None] = {}
    known = list(known)
    for path in found:
        last = path.rpartition(".")[2]
        all_of_them = {other for other in known if other.rpartition(".")[2] == last} <= set(found)
        chosen[last if all_of_them else path] = None
    return list(chosen)


def target_modules(settings: T5Settings, weights: Sequence[str], ending: str) -> list[str]:
    """Return the names by which PEFT finds exactly the modules of these weights, among all whose path ends so."""
    known = [module for weight in names(settings) if weight.endswith(ending) for module in modules(settings, weight)]
    return shortest([module for weight in weights for module in modules(settings, weight)], known)


def short_paths(settings: T5Settings, places: Sequence[str], ending: str) -> list[str]:
    """Return patterns that match exactly these places of ours, among all whose weights' path ends so."""
    known = [
        weight.removesuffix(ending) for weight in names(settings) if weight.endswith(ending) and weight[:4] != "head"
    ]
    return shortest(sorted(places), known)


def to_layers(settings: T5Settings, weight: str, ending: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Take a stack of a method's values at one of our weights apart: a tensor for each module, named as PEFT does."""
    found = modules(settings, weight)
    values = values if ".layers." in weight else values[None]
    return {f"{_PREFIX}{name}.{ending}": np.ascontiguousarray(v) for name, v in zip(found, values, strict=True)}


def from_layers(
    settings: T5Settings, tensors: Mapping[str, np.ndarray], endings: Sequence[str], of: str
) -> dict[str, dict[str, np.ndarray]]:
    """Stack an adapter's tensors: our weight (its path ends in `of`) -> ending -> values [L, ...].

    Errors: UserError for a tensor that no module of this backbone has, and for modules of some layers only.
    """
    places = {
        module: (weight, layer, len(found))
        for weight in names(settings)
        if weight.endswith(of)
        for found in [modules(settings, weight)]
        for layer, module in enumerate(found)
    }
    pattern = re.compile(rf"{re.escape(_PREFIX)}(.+)\.({'|'.join(map(re.escape, endings))})(?:\.weight)?")
    stacks: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match is None or match.group(1) not in places:
            raise UserError(
                f"tensor {name}: no such place in this backbone; expected an adapter of this T5; give its own"
            )
        weight, layer, _ = places[match.group(1)]
        stacks.setdefault(weight, {}).setdefault(match.group(2), {})[layer] = tensor
    made: dict[str, dict[str, np.ndarray]] = {}
    for weight, parts in stacks.items():
        found = modules(settings, weight)
        for ending, layers in parts.items():
            for layer, module in enumerate(found):
                if layer not in layers or layers[layer].shape != next(iter(layers.values())).shape:
                    raise UserError(
                        f"{module}.{ending}: missing or of another shape than in other layers; expected equal ones in "
                        f"all {len(found)} layers, which are stacked here; merge it in PEFT and load that model"
                    )
            values = np.stack([layers[layer] for layer in range(len(found))])
            made.setdefault(weight, {})[ending] = values if ".layers." in weight else values[0]
    return made
