"""One file a family of models: from its `config.json` to settings and back, and the names of its tensors.

Knows no files on disk: `checkpoints/` opens them and asks here what a name means. To add a family, copy the file that
is nearest and add it to `_FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softprompt_jax.config import UserError, nearest
from softprompt_jax.models.families import gemma, gpt2, gpt_neo, gpt_neox, llama, t5, t5gemma
from softprompt_jax.models.families.common import Opened, Weight
from softprompt_jax.models.settings import ModelSettings

_FAMILIES: tuple[Any, ...] = (t5, t5gemma, llama, gemma, gpt2, gpt_neo, gpt_neox)
MODEL_TYPES = {kind: family for family in _FAMILIES for kind in family.MODEL_TYPES}


def family_of(model_type: Any, where: str) -> Any:
    """Return the family of a `model_type`.

    Errors: UserError says which there are.
    """
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise UserError(
            f"{where}: model_type is {model_type!r}; expected one of {', '.join(sorted(MODEL_TYPES))}"
            f"{nearest(str(model_type), MODEL_TYPES)}"
        )
    return MODEL_TYPES[model_type]


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, Opened],
    equal: Callable[[Opened, Opened], bool],
    where: str,
) -> tuple[ModelSettings, dict[str, Opened]]:
    """Return the settings of a config, completed from the weights, and these under the names of `names`.

    `equal` decides whether two tensors hold the same numbers. Errors: UserError names the field or the tensor.
    """
    family = family_of(config.get("model_type"), where)
    return family.complete(config, family.settings_of(config, where), tensors, equal, where)


def names(settings: ModelSettings) -> dict[str, Weight]:
    """Map each weight of ours to its Hugging Face tensors."""
    return MODEL_TYPES[settings.family].names(settings)


def config_of(settings: ModelSettings, dtype: str) -> dict[str, Any]:
    """Return the `config.json` of a model whose weights are stored as `dtype`."""
    return {**MODEL_TYPES[settings.family].config_of(settings), "dtype": dtype}


def is_stacked(path: str) -> bool:
    """Tell whether a weight of ours has a leading axis of layers."""
    return ".layers." in path
